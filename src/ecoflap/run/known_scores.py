"""Reads and checks the scores of samples in a file: lists of equal length, of finite numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ecoflap.evaluation.paired import Samples

Score = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Scores(BaseModel):
    """:class:`ecoflap.evaluation.paired.Samples` as a file has them."""

    model_config = ConfigDict(extra="forbid")

    scores: list[Score] = Field(min_length=1)
    index: list[int]
    kinds: list[str | None] = []
    tokens: list[Annotated[int, Field(ge=1, le=10**9)]] = []
    others: dict[str, Annotated[list[Score], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> Scores:
        n = len(self.scores)
        if {len(self.index), len(self.kinds) or n, len(self.tokens) or n} != {n}:
            raise ValueError(f"{n} scores, but its other lists have another length")
        return self

    def samples(self) -> Samples:
        """The same as the dataclass to compute with."""
        return Samples(**self.model_dump())


def _known(value: Any) -> Any:
    return value if isinstance(value, Samples) else Scores.model_validate(value).samples()


KnownSamples = Annotated[Samples, BeforeValidator(_known)]  # a field of a model that is read from a file

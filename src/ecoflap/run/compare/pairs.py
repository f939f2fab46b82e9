"""Pairs the models of a comparison over the samples of each test: with the dense model, the uniform one and the best.

With several seeds a sample's score is the mean over them, so that the error is that of the choice of samples alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from ecoflap.evaluation.paired import Paired, Samples, paired

DENSE, UNIFORM, BEST = "dense", "uniform", "best"


class Pairing(BaseModel):
    """A method at a sparsity on a test, against other models: ``dense``; ``uniform``, its criterion with one sparsity
    for all layers; and, of a single seed, ``best``, the best method at that sparsity. Groups of samples are left out.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    sparsity: float
    test: str
    against: dict[str, Paired] = Field(default_factory=dict)

    @field_serializer("against")
    def _as_written(self, against: dict[str, Paired]) -> dict[str, Any]:
        return {name: pair.to_json() for name, pair in against.items()}


class StoredPairing(BaseModel):
    """A model in one form of its values against the dense model as it was loaded, on one test.

    ``method`` and ``sparsity`` None: the dense model in that form.
    """

    model_config = ConfigDict(frozen=True)

    method: str | None
    sparsity: float | None
    values: str
    test: str
    dense: Paired

    @field_serializer("dense")
    def _as_written(self, dense: Paired) -> dict[str, Any]:
        return dense.to_json()


class Named(Protocol):
    """What is read of a method."""

    @property
    def name(self) -> str: ...
    @property
    def importance(self) -> str: ...
    @property
    def criterion(self) -> str: ...
    @property
    def options(self) -> dict[str, Any]: ...


def uniform_of(methods: Sequence[Named]) -> dict[str, str]:
    """Method → the method with its criterion and one sparsity for all layers; where there are several, the one that
    shares most options with it. All options of that one must be those of the method."""
    found: dict[str, str] = {}
    for method in methods:
        near = [
            other for other in methods
            if other.importance == "uniform" != method.importance and other.criterion == method.criterion
            and other.options.items() <= method.options.items()
        ]  # fmt: skip
        if near:
            found[method.name] = max(near, key=lambda other: len(other.options)).name
    return found


Place = tuple[str, float, str]  # method, sparsity, test


StoredPlace = tuple[str | None, float | None, str, str]  # method, sparsity, form of the values, test


def stored_pairings(
    samples: Mapping[StoredPlace, Sequence[Samples]], dense: Mapping[str, Samples]
) -> Iterator[StoredPairing]:
    """All that can be paired; of each place one model a seed."""
    for (method, sparsity, form, test), models in samples.items():
        if test in dense and (pair := paired(models, [dense[test]])) is not None:
            alone = replace(pair, groups={})
            yield StoredPairing(method=method, sparsity=sparsity, values=form, test=test, dense=alone)


def pairings(
    samples: Mapping[Place, Sequence[Samples]],
    dense: Mapping[str, Samples],
    uniform: Mapping[str, str],
    best: Mapping[tuple[float, str], str],
) -> Iterator[Pairing]:
    """All that can be paired.

    Args:
        samples: of each place one model a seed.
        dense: of each test.
        uniform: see :func:`uniform_of`.
        best: sparsity and test → the best method.
    """
    for (method, sparsity, test), models in samples.items():
        others: dict[str, Sequence[Samples]] = {}
        if test in dense:
            others[DENSE] = [dense[test]]
        if method in uniform:
            others[UNIFORM] = samples.get((uniform[method], sparsity, test), ())
        first = samples.get((best.get((sparsity, test), ""), sparsity, test), ())
        if len(models) == len(first) == 1:
            others[BEST] = first
        pairs = {name: paired(models, other) for name, other in others.items()}
        against = {name: replace(pair, groups={}) for name, pair in pairs.items() if pair is not None}
        if against:
            yield Pairing(method=method, sparsity=sparsity, test=test, against=against)

"""Pairs the models of a comparison over the samples of each test: with the dense model, the uniform one and the best.

With several seeds, a sample's score is the mean over them, so the error is only that of the choice of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from ecoflap.evaluation.paired import Paired, Samples, paired

DENSE, UNIFORM, BEST = "dense", "uniform", "best"


class Pairing(BaseModel):
    """Differences of a method at a sparsity on a test from other models: ``dense``; ``uniform``, its criterion with one
    sparsity for all layers; and, if there is a single seed, ``best``, the best method. Without groups of samples.
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
    """Difference of a model in a stored form from the dense model as it was loaded, on one test.

    ``method`` and ``sparsity`` are None for the dense model in that form.
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
    """The attributes of a method that are read here."""

    @property
    def name(self) -> str: ...
    @property
    def importance(self) -> str: ...
    @property
    def criterion(self) -> str: ...
    @property
    def options(self) -> dict[str, Any]: ...


def uniform_of(methods: Sequence[Named]) -> dict[str, str]:
    """From each method to the method with its criterion and one sparsity for all layers.

    The latter may have no option that the method does not have; of several, the one with the most options is taken.
    """
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
    """All differences of stored forms; ``samples`` has one model per seed for each place."""
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
    """All differences of pruned models.

    Args:
        samples: one model per seed for each place.
        dense: of each test.
        uniform: see :func:`uniform_of`.
        best: the best method for each sparsity and test.
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

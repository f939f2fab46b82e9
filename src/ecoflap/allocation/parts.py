"""Defines the result of an allocation and of a search, and reads and writes ``allocation.json``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ecoflap.allocation.checks import AGGREGATES, GRANULARITIES, check_names, choice, field, fixed_ratio, unit
from ecoflap.allocation.rules import RULES
from ecoflap.errors import InvalidOption
from ecoflap.support.reading import read_json
from ecoflap.support.registry import unknown


def read_allocation(path: str | Path) -> Allocation:
    """Read an ``allocation.json``, which may be edited by hand.

    Raises:
        InvalidOption: it can't be read or is no allocation; the message names the file and the layer.
    """
    data = read_json(path, "the allocation")
    try:
        return Allocation.from_json(data)
    except InvalidOption as error:
        raise InvalidOption(f"{path}: {error}") from error


_WHERE = "allocation: search"


@dataclass(frozen=True)
class SearchRecord:
    """The start of a search, the losses after its steps, and its last measured costs.

    Attributes:
        metric: the kind of ``losses``: ``kl`` (nats, from the dense model's outputs to the pruned one's) or ``loss``.
        losses: at the start and after every accepted step.
        rounds: the round of each loss: ``start``, ``block 1``, ``layer 2 along the walk``, ``swaps``.
        given: number of zeros at the start by layer name.
        costs: cost of the pruned weights by block name, as the last round measured it, in units of ``metric``; empty if
            there was no round.
    """

    metric: str
    losses: tuple[float, ...]
    rounds: tuple[str, ...]
    given: Mapping[str, int]
    costs: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain dicts, lists and numbers."""
        return {**vars(self), "losses": list(self.losses), "rounds": list(self.rounds)}

    @classmethod
    def from_json(cls, data: Any) -> SearchRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            InvalidOption: a field is missing or of the wrong kind.
        """
        losses, rounds = field(data, "losses", list, _WHERE), field(data, "rounds", list, _WHERE)
        given, costs = field(data, "given", dict, _WHERE), field(data, "costs", dict, _WHERE)
        if not all(map(_finite, (*losses, *costs.values()))) or not all(map(_count, given.values())):
            raise InvalidOption(f"{_WHERE}: losses and costs must be numbers, and 'given' whole ones")
        if len(losses) != len(rounds) or not losses:
            raise InvalidOption(f"{_WHERE}: {len(losses)} losses of {len(rounds)} rounds")
        return cls(
            metric=field(data, "metric", str, _WHERE),
            losses=tuple(map(float, losses)),
            rounds=tuple(map(str, rounds)),
            given=given,
            costs={name: float(cost) for name, cost in costs.items()},
        )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class LayerAllocation:
    """The allocation of one layer: ``zeros`` of its ``weights``; ``achieved`` is the sparsity after pruning."""

    name: str
    tower: str
    modality: str
    block: str
    shape: tuple[int, int] | None
    weights: int
    zeros: int
    achieved: float | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


@dataclass(frozen=True)
class Allocation:
    """Zeros for every layer, in the given order, with the options of the allocation.

    ``model_parameters`` is the number of all parameters of the model, prunable or not, if known; ``search`` records the
    search that found this allocation, if any.
    """

    sparsity: float
    max_sparsity: float
    granularity: str
    aggregate: str
    pattern: str
    layers: tuple[LayerAllocation, ...]
    model_parameters: int | None = None
    rule: str = "proportional"
    search: SearchRecord | None = None

    @property
    def total_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def model_sparsity(self) -> float | None:
        """Zeros as a fraction of all parameters of the model; None if their number is unknown."""
        return self.zeros / self.model_parameters if self.model_parameters else None

    def __getitem__(self, name: str) -> LayerAllocation:
        """The allocation of the layer called ``name``. Raises UnknownName with the nearest name."""
        found = self._by_name.get(name)
        if found is None:
            raise unknown("layer", name, list(self._by_name))
        return found

    @cached_property
    def _by_name(self) -> dict[str, LayerAllocation]:
        return {layer.name: layer for layer in self.layers}  # for speed: a mixture has tens of thousands

    def with_achieved(self, achieved: Mapping[str, float]) -> Allocation:
        """A copy with the sparsity that pruning achieved in the layers of ``achieved``."""
        layers = (replace(layer, achieved=achieved.get(layer.name, layer.achieved)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def to_json(self) -> dict[str, Any]:
        """The content of ``allocation.json`` as plain dicts, lists and numbers."""
        layers = [
            {**vars(layer), "shape": layer.shape and list(layer.shape), "sparsity": layer.sparsity}
            for layer in self.layers
        ]
        totals: dict[str, Any] = {"total_weights": self.total_weights, "zeros": self.zeros}
        if self.model_parameters is not None:
            totals["model_sparsity"] = self.model_sparsity
        own = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}
        if self.search is not None:
            own["search"] = self.search.to_json()
        return {"format": 1, **totals, **own, "layers": layers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Allocation:
        """Read what :meth:`to_json` wrote, which may be edited by hand.

        A layer's ``zeros`` is used; if it is missing, its ``sparsity`` is rounded to the nearest count. Totals are
        recomputed, so that edited numbers need not add up to the old total.

        Raises:
            InvalidOption: a field is missing, of the wrong kind or out of range; the message names the layer.
        """
        if not isinstance(data, Mapping) or data.get("format") != 1:
            raise InvalidOption("allocation: not a file of this kind ('format' must be 1)")
        entries = field(data, "layers", list, "allocation")
        layers = tuple(_read_layer(entry, number) for number, entry in enumerate(entries, 1))
        check_names([layer.name for layer in layers])
        allocation = cls(
            sparsity=float(unit("sparsity", data.get("sparsity"))),
            max_sparsity=float(unit("max_sparsity", data.get("max_sparsity"))),
            granularity=choice("granularity", field(data, "granularity", str, "allocation"), GRANULARITIES),
            aggregate=choice("aggregate", field(data, "aggregate", str, "allocation"), AGGREGATES),
            pattern=field(data, "pattern", str, "allocation"),
            layers=layers,
            model_parameters=_model_parameters(data, layers),
            rule=RULES.check(str(data.get("rule", "proportional"))),
            search=SearchRecord.from_json(data["search"]) if data.get("search") is not None else None,
        )
        declared = data.get("total_weights", allocation.total_weights)
        if declared != allocation.total_weights:
            raise InvalidOption(
                f"allocation: total_weights is {declared} but the layers have {allocation.total_weights} weights; "
                "a layer was added, removed or resized"
            )
        fixed = fixed_ratio(allocation.pattern)
        for layer in layers:
            if fixed is not None and layer.zeros not in (0, fixed[0] * layer.weights, layer.weights):
                raise InvalidOption(
                    f"allocation: layer '{layer.name}': pattern {allocation.pattern} makes {fixed[0] * layer.weights} "
                    f"zeros of {layer.weights} (or 0 to leave the layer dense), not {layer.zeros}"
                )
        return allocation


def _model_parameters(data: Mapping[str, Any], layers: Iterable[LayerAllocation]) -> int | None:
    count = data.get("model_parameters")
    if count is not None and (not isinstance(count, int) or count < sum(layer.weights for layer in layers)):
        raise InvalidOption(f"allocation: model_parameters is {count!r}, not a count of at least that of the layers")
    return count


def _read_layer(entry: Any, number: int) -> LayerAllocation:
    name = field(entry, "name", str, f"allocation, layer {number}")
    where = f"allocation: layer '{name}'"
    weights = field(entry, "weights", int, where)
    shape = None if entry.get("shape") is None else field(entry, "shape", list, where)
    if shape is not None and ([type(n) for n in shape] != [int, int] or shape[0] * shape[1] != weights):
        raise InvalidOption(f"{where}: shape {shape} does not have {weights} weights")
    by_sparsity = None
    if entry.get("sparsity") is not None:
        by_sparsity = round(unit(f"{where}: sparsity", entry["sparsity"]) * weights)
    zeros = by_sparsity if "zeros" not in entry else field(entry, "zeros", int, where)
    if zeros is None:
        raise InvalidOption(f"{where}: give 'zeros' or 'sparsity'")
    if not 0 <= zeros <= weights or weights < 1:
        raise InvalidOption(f"{where}: zeros must be from 0 to its {weights} weights, not {zeros}")
    if by_sparsity not in (None, zeros):
        warnings.warn(f"{where}: 'zeros' {zeros} counts, 'sparsity' {entry['sparsity']} is ignored", stacklevel=3)
    achieved = entry.get("achieved")
    return LayerAllocation(
        name=name,
        tower=field(entry, "tower", str, where),
        modality=entry.get("modality") or "",
        block=field(entry, "block", str, where),
        shape=None if shape is None else (shape[0], shape[1]),
        weights=weights,
        zeros=zeros,
        achieved=None if achieved is None else float(unit(f"{where}: achieved", achieved)),
    )

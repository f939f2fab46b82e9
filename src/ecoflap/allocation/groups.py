"""Groups layers for the allocation: pools share one budget, groups share one sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ecoflap.allocation.checks import unit
from ecoflap.errors import InfeasibleAllocation
from ecoflap.support.registry import unknown


@dataclass(frozen=True)
class LayerSize:
    """A layer for the allocation: its place, its number of weights, its score (None: not scored)."""

    name: str
    tower: str
    block: str
    weights: int
    score: float | None
    modality: str = ""
    shape: tuple[int, int] | None = None
    expert: str = ""  # of a mixture that holds it


@dataclass(frozen=True)
class Pool:
    """Layers that share one budget: ``target`` of their weights become zero."""

    name: str
    target: Fraction
    layers: tuple[LayerSize, ...]

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)


@dataclass(frozen=True)
class Group:
    """Layers that share one sparsity, as a rule sees them.

    Attributes:
        key: orders groups independently of the order of the layers: (tower, block), (layer name) or (tower).
        layers: its members.
        weights: of all members.
        least: weights that must be kept (set by the cap of the sparsity).
        most: weights that may be kept (set by the floor of the sparsity).
        score: of its members, combined by ``aggregate``; 0 if they have none.
        data: the entry of ``allocate(..., data=…)`` for this group, for rules that need more than a score.
    """

    key: tuple[str, ...]
    layers: tuple[LayerSize, ...]
    weights: int
    least: int
    most: int
    score: Fraction
    data: Any = None

    @property
    def name(self) -> str:
        """The block, layer or tower."""
        return self.key[-1]


def make_pools(
    layers: Sequence[LayerSize], target: Fraction, budget: str, tower_sparsity: Mapping[str, float]
) -> list[Pool]:
    """The budgets by ``budget`` and ``tower_sparsity``, in the order of their first layers.

    Raises:
        UnknownName: ``tower_sparsity`` names no tower or modality.
        InvalidOption: one of its targets is no number from 0 to 1.
    """
    towers = {layer.tower: layer.modality for layer in layers}
    known = list(dict.fromkeys([*towers, *(modality for modality in towers.values() if modality)]))
    for key in tower_sparsity:
        if key not in known:
            raise unknown("tower", key, known)
    own = {key: unit(f"tower_sparsity of '{key}'", value) for key, value in tower_sparsity.items()}
    members: dict[str, list[LayerSize]] = {}
    targets: dict[str, Fraction] = {}
    for layer in layers:
        key = next((key for key in (layer.tower, layer.modality) if key in own), "")
        name = layer.tower if budget == "tower" else key
        members.setdefault(name, []).append(layer)
        targets[name] = own.get(key, target)
    return [Pool(name, targets[name], tuple(members[name])) for name in members]


def make_groups(
    pool: Pool,
    keep: int,
    cap: Fraction,
    floor: Fraction,
    granularity: str,
    aggregate: str,
    data: Mapping[str, Any] | None = None,
) -> list[Group]:
    """The pool's groups with their limits.

    Raises:
        InfeasibleAllocation: the limits don't allow ``keep`` weights in total; the message gives the feasible range.
    """
    members: dict[tuple[str, ...], list[LayerSize]] = {}
    for layer in pool.layers:
        key = {
            "layer": (layer.name,),
            "expert": (layer.tower, layer.expert or layer.block),
            "block": (layer.tower, layer.block),
            "tower": (layer.tower,),
        }[granularity]
        members.setdefault(key, []).append(layer)
    groups = [
        _group(key, tuple(layers), cap, floor, aggregate, (data or {}).get(key[-1])) for key, layers in members.items()
    ]
    if any(group.least > group.most for group in groups):
        raise infeasible(pool, floor, cap, Fraction(1), Fraction(0), granularity)
    least, most = sum(group.least for group in groups), sum(group.most for group in groups)
    if not least <= keep <= most:
        lowest, highest = (1 - Fraction(kept, pool.weights) for kept in (most, least))
        raise infeasible(pool, floor, cap, lowest, highest, granularity)
    return groups


def _group(
    key: tuple[str, ...], layers: tuple[LayerSize, ...], cap: Fraction, floor: Fraction, aggregate: str, data: Any
) -> Group:
    weights = sum(layer.weights for layer in layers)
    score = sum((Fraction(layer.score or 0.0) for layer in layers), Fraction(0))
    return Group(
        key=key,
        layers=layers,
        weights=weights,
        least=math.ceil((1 - cap) * weights),
        most=math.floor((1 - floor) * weights),
        score=score / {"sum": 1, "mean": weights, "layer-mean": len(layers)}[aggregate],
        data=data,
    )


def infeasible(
    pool: Pool, floor: Fraction, cap: Fraction, low: Fraction, high: Fraction, granularity: str = ""
) -> InfeasibleAllocation:
    """The error for a target outside of ``low`` to ``high``, the range that ``floor`` and ``cap`` allow."""
    where = f" of '{pool.name}'" if pool.name else ""
    limits = f"min_sparsity {float(floor):g} and max_sparsity {float(cap):g}"
    whole = f" (in whole weights of each {granularity})" if granularity else ""
    if low > high:
        return InfeasibleAllocation(f"no sparsity{where} satisfies {limits}{whole}; widen them")
    return InfeasibleAllocation(
        f"sparsity {float(pool.target):g}{where} is out of reach: {limits}{whole} allow {float(low):.9g} to "
        f"{float(high):.9g}; change the sparsity or the limits"
    )

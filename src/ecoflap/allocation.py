"""Allocation: global scores of the layers to an exact number of zeros for each layer. Pure integers and fractions.

Source: ECoFLaP (Sung et al., ICLR 2024, arXiv 2310.02998), section 3.2: every group of layers keeps what its cap
demands, the rest of the budget is dealt in proportion to the scores, in numbers of weights. See docs/allocation.md.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ecoflap.apportion import deal, round_to_total
from ecoflap.errors import InfeasibleAllocation, InvalidOption, NonFiniteLoss
from ecoflap.registry import unknown

GRANULARITIES = ("block", "layer", "tower")
AGGREGATES = ("sum", "mean")
BUDGETS = ("global", "tower")


@dataclass(frozen=True)
class LayerSize:
    """What the allocation needs to know of a layer: where it stands, how many weights, its score (None: not scored)."""

    name: str
    tower: str
    block: str
    weights: int
    score: float | None
    modality: str = ""
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class LayerAllocation:
    """The decision for one layer: ``zeros`` of its ``weights``; ``achieved`` is the sparsity after pruning."""

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
    """Zeros for every layer, in the order of the layers given, with the options that led to them.

    ``model_parameters`` counts all parameters of the model, prunable or not, where it is known.
    """

    sparsity: float
    max_sparsity: float
    granularity: str
    aggregate: str
    pattern: str
    layers: tuple[LayerAllocation, ...]
    model_parameters: int | None = None

    @property
    def total_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def model_sparsity(self) -> float | None:
        """Zeros as a fraction of all parameters of the model; None where their number is not known."""
        return self.zeros / self.model_parameters if self.model_parameters else None

    def __getitem__(self, name: str) -> LayerAllocation:
        """The allocation of the layer called ``name``. Raises UnknownName with the nearest name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise unknown("layer", name, [layer.name for layer in self.layers])

    def with_achieved(self, achieved: Mapping[str, float]) -> Allocation:
        """A copy with the sparsity that pruning really made, for the layers named in ``achieved``."""
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
        fields = {name: value for name, value in vars(self).items() if value is not None}
        return {"format": 1, **totals, **fields, "layers": layers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Allocation:
        """Read what :meth:`to_json` wrote, perhaps edited by hand.

        A layer's ``zeros`` counts; where it is absent, its ``sparsity`` is turned into the nearest count. The sum of
        the file is recomputed, so the edited numbers need not add up to the old total.

        Raises:
            InvalidOption: a field is missing, of the wrong kind or out of range; the message names the layer.
        """
        if not isinstance(data, Mapping) or data.get("format") != 1:
            raise InvalidOption("allocation: not a file of this kind ('format' must be 1)")
        entries = _field(data, "layers", list, "allocation")
        layers = tuple(_read_layer(entry, number) for number, entry in enumerate(entries, 1))
        _check_names([layer.name for layer in layers])
        allocation = cls(
            sparsity=float(_unit("sparsity", data.get("sparsity"))),
            max_sparsity=float(_unit("max_sparsity", data.get("max_sparsity"))),
            granularity=_choice("granularity", _field(data, "granularity", str, "allocation"), GRANULARITIES),
            aggregate=_choice("aggregate", _field(data, "aggregate", str, "allocation"), AGGREGATES),
            pattern=_field(data, "pattern", str, "allocation"),
            layers=layers,
            model_parameters=_model_parameters(data, layers),
        )
        declared = data.get("total_weights", allocation.total_weights)
        if declared != allocation.total_weights:
            raise InvalidOption(
                f"allocation: total_weights is {declared} but the layers have {allocation.total_weights} weights; "
                "a layer was added, removed or resized"
            )
        fixed = _fixed_ratio(allocation.pattern)
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


def allocate(
    layers: Sequence[LayerSize],
    *,
    sparsity: float,
    max_sparsity: float | None = None,
    min_sparsity: float = 0.0,
    granularity: str = "block",
    aggregate: str = "sum",
    budget: str = "global",
    tower_sparsity: Mapping[str, float] | None = None,
    uniform: bool = False,
    pattern: str = "unstructured",
) -> Allocation:
    """Decide how many weights of each layer become zero; exact to the weight, independent of the layers' order.

    Args:
        layers: sizes and scores (finite, >= 0; scores may be None with ``uniform``).
        sparsity: target p, a fraction of all weights of ``layers``; round((1 - p) N) weights are kept in all.
        max_sparsity: no group above it; default min(1, p + 0.1), p being a tower's own target where it has one.
        min_sparsity: no group below it.
        granularity: what shares one sparsity: "block", "layer" or "tower".
        aggregate: a group's score is the "sum" of its layers' scores, or that divided by its weights ("mean").
        budget: "global", or "tower": every tower meets its target by itself.
        tower_sparsity: own targets by tower name or modality (a name wins). Each key is a budget of its own (with
            budget "tower", each of its towers is); the towers not named keep the overall target, together or each.
        uniform: the same sparsity in every layer; scores are not looked at.
        pattern: "unstructured", or "N:M" which fixes every layer's ratio and so asks for ``uniform``.

    Raises:
        InvalidOption: an option or score is out of range or contradicts another one.
        NonFiniteLoss: a score is NaN or infinite.
        InfeasibleAllocation: the target cannot be met under the cap and floor; the feasible range is given.
        UnknownName: ``tower_sparsity`` names no tower or modality.
    """
    target, floor = _unit("sparsity", sparsity), _unit("min_sparsity", min_sparsity)
    cap = None if max_sparsity is None else _unit("max_sparsity", max_sparsity)
    _choice("granularity", granularity, GRANULARITIES)
    _choice("aggregate", aggregate, AGGREGATES)
    _choice("budget", budget, BUDGETS)
    _check_layers(layers, scored=not uniform)
    fixed = _fixed_ratio(pattern)
    if fixed is not None:
        target = _check_ratio(pattern, fixed, target, layers, free=not uniform or bool(tower_sparsity))

    pools = _pools(layers, target, budget, tower_sparsity or {})
    exact = [(1 - pool.target) * sum(layer.weights for layer in pool.layers) for pool in pools]
    kept_in_pool = round_to_total(exact, round(sum(exact, Fraction(0))), [pool.name for pool in pools])
    zeros: dict[str, int] = {}
    for pool, keep in zip(pools, kept_in_pool, strict=True):
        pool_cap = cap if cap is not None else min(Fraction(1), pool.target + Fraction(1, 10))
        if uniform:
            if not floor <= pool.target <= pool_cap:
                raise _infeasible(pool, floor, pool_cap, floor, pool_cap)
            groups = [(list(pool.layers), keep)]
        else:
            groups = _deal_to_groups(pool, keep, pool_cap, floor, granularity, aggregate)
        for members, kept in groups:
            weights = [layer.weights for layer in members]
            cut, whole = sum(weights) - kept, sum(weights)
            shares = round_to_total([Fraction(cut * n, whole) for n in weights], cut, [m.name for m in members])
            zeros.update(zip((layer.name for layer in members), shares, strict=True))

    highest = cap if cap is not None else min(Fraction(1), max(pool.target for pool in pools) + Fraction(1, 10))
    return Allocation(
        sparsity=float(target),
        max_sparsity=float(highest),
        granularity=granularity,
        aggregate=aggregate,
        pattern=pattern,
        layers=tuple(
            LayerAllocation(s.name, s.tower, s.modality, s.block, s.shape, s.weights, zeros[s.name]) for s in layers
        ),
    )


@dataclass(frozen=True)
class _Pool:
    """Layers that share one budget: ``target`` of their weights become zero."""

    name: str
    target: Fraction
    layers: tuple[LayerSize, ...]


def _pools(
    layers: Sequence[LayerSize], target: Fraction, budget: str, tower_sparsity: Mapping[str, float]
) -> list[_Pool]:
    towers = {layer.tower: layer.modality for layer in layers}
    known = list(dict.fromkeys([*towers, *(modality for modality in towers.values() if modality)]))
    for key in tower_sparsity:
        if key not in known:
            raise unknown("tower", key, known)
    own = {key: _unit(f"tower_sparsity of '{key}'", value) for key, value in tower_sparsity.items()}
    members: dict[str, list[LayerSize]] = {}
    targets: dict[str, Fraction] = {}
    for layer in layers:
        key = next((key for key in (layer.tower, layer.modality) if key in own), "")
        name = layer.tower if budget == "tower" else key
        members.setdefault(name, []).append(layer)
        targets[name] = own.get(key, target)
    return [_Pool(name, targets[name], tuple(members[name])) for name in members]


def _deal_to_groups(
    pool: _Pool, keep: int, cap: Fraction, floor: Fraction, granularity: str, aggregate: str
) -> list[tuple[list[LayerSize], int]]:
    """Groups of the pool's layers with the number of weights that each keeps; their sum is ``keep``."""
    groups: dict[tuple[str, ...], list[LayerSize]] = {}
    for layer in pool.layers:
        key = {"layer": (layer.name,), "block": (layer.tower, layer.block), "tower": (layer.tower,)}[granularity]
        groups.setdefault(key, []).append(layer)
    sizes = [sum(layer.weights for layer in members) for members in groups.values()]
    least = [math.ceil((1 - cap) * size) for size in sizes]
    most = [math.floor((1 - floor) * size) for size in sizes]
    if any(low > high for low, high in zip(least, most, strict=True)):
        raise _infeasible(pool, floor, cap, Fraction(1), Fraction(0), granularity)
    if not sum(least) <= keep <= sum(most):
        lowest, highest = (1 - Fraction(sum(kept), sum(sizes)) for kept in (most, least))
        raise _infeasible(pool, floor, cap, lowest, highest, granularity)
    scores = [sum((Fraction(layer.score or 0.0) for layer in m), Fraction(0)) for m in groups.values()]
    if aggregate == "mean":
        scores = [score / size for score, size in zip(scores, sizes, strict=True)]
    # Only ratios count, so the scores become integers once: sums stay exact, without a gcd at every step.
    common = math.lcm(*(score.denominator for score in scores))
    whole = [score.numerator * (common // score.denominator) for score in scores]
    room = [high - low for low, high in zip(least, most, strict=True)]
    dealt = deal(keep - sum(least), room, whole, list(groups))
    return [(m, low + more) for m, low, more in zip(groups.values(), least, dealt, strict=True)]


def _infeasible(
    pool: _Pool, floor: Fraction, cap: Fraction, low: Fraction, high: Fraction, granularity: str = ""
) -> InfeasibleAllocation:
    """The error for a target outside of ``low`` to ``high``, all that ``floor`` and ``cap`` leave, if anything."""
    where = f" of '{pool.name}'" if pool.name else ""
    limits = f"min_sparsity {float(floor):g} and max_sparsity {float(cap):g}"
    whole = f" (in whole weights of each {granularity})" if granularity else ""
    if low > high:
        return InfeasibleAllocation(f"no sparsity{where} satisfies {limits}{whole}; widen them")
    return InfeasibleAllocation(
        f"sparsity {float(pool.target):g}{where} is out of reach: {limits}{whole} allow {float(low):.9g} to "
        f"{float(high):.9g}; change the sparsity or the limits"
    )


def _check_layers(layers: Sequence[LayerSize], scored: bool) -> None:
    if not layers:
        raise InvalidOption("allocation: there are no layers to allocate to")
    _check_names([layer.name for layer in layers])
    for layer in layers:
        if layer.weights < 1:
            raise InvalidOption(f"layer '{layer.name}' has {layer.weights} weights; at least 1 is needed")
        if not scored:
            continue
        if layer.score is None:
            raise InvalidOption(
                f"layer '{layer.name}' has no score; measure its importance or use importance 'uniform'"
            )
        if not math.isfinite(layer.score):
            raise NonFiniteLoss(f"the score of layer '{layer.name}' is {layer.score}; measure its importance again")
        if layer.score < 0:
            raise InvalidOption(f"the score of layer '{layer.name}' is {layer.score}; scores must be 0 or more")


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InvalidOption(f"layer '{name}' appears {count} times")


def _fixed_ratio(pattern: str) -> tuple[Fraction, int] | None:
    """The sparsity that an N:M ``pattern`` fixes and its M; None for "unstructured"."""
    if pattern == "unstructured":
        return None
    from ecoflap.pruning.patterns import NofM, parse_pattern  # imports torch, which nothing else here needs

    parsed = parse_pattern(pattern)
    return (parsed.sparsity, parsed.group) if isinstance(parsed, NofM) else None


def _check_ratio(
    pattern: str, fixed: tuple[Fraction, int], target: Fraction, layers: Sequence[LayerSize], free: bool
) -> Fraction:
    ratio, group = fixed
    digits = len(str(float(target)).partition(".")[2])
    if target != ratio and not (digits > 1 and target == round(ratio, digits)):  # 0.67 will do for 1:3
        raise InvalidOption(f"pattern {pattern} fixes the sparsity at {float(ratio):g}, not {float(target):g}")
    if free:
        raise InvalidOption(
            f"pattern {pattern} fixes every layer's sparsity at {float(ratio):g}, so nothing can be allocated by "
            "score or tower; use importance 'uniform'"
        )
    for layer in layers:
        columns = layer.shape[1] if layer.shape else layer.weights
        if columns % group:
            raise InvalidOption(f"pattern {pattern} does not divide the {columns} columns of layer '{layer.name}'")
    return ratio


def _unit(option: str, value: object) -> Fraction:
    """``value`` as the exact fraction of its decimal form, within [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidOption(f"{option} must be a number from 0 to 1, not {value!r}")
    return Fraction(str(float(value)))


def _choice(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise unknown(option, value, list(known))
    return value


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {int: "a whole number", str: "a text", list: "a list"}[kind]
        raise InvalidOption(f"{where}: '{key}' must be {wanted}, not {value!r}")
    return value


def _read_layer(entry: Any, number: int) -> LayerAllocation:
    name = _field(entry, "name", str, f"allocation, layer {number}")
    where = f"allocation: layer '{name}'"
    weights = _field(entry, "weights", int, where)
    shape = None if entry.get("shape") is None else _field(entry, "shape", list, where)
    if shape is not None and ([type(n) for n in shape] != [int, int] or shape[0] * shape[1] != weights):
        raise InvalidOption(f"{where}: shape {shape} does not have {weights} weights")
    by_sparsity = None
    if entry.get("sparsity") is not None:
        by_sparsity = round(_unit(f"{where}: sparsity", entry["sparsity"]) * weights)
    zeros = by_sparsity if "zeros" not in entry else _field(entry, "zeros", int, where)
    if zeros is None:
        raise InvalidOption(f"{where}: give 'zeros' or 'sparsity'")
    if not 0 <= zeros <= weights or weights < 1:
        raise InvalidOption(f"{where}: zeros must be from 0 to its {weights} weights, not {zeros}")
    if by_sparsity not in (None, zeros):
        warnings.warn(f"{where}: 'zeros' {zeros} counts, 'sparsity' {entry['sparsity']} is ignored", stacklevel=3)
    achieved = entry.get("achieved")
    return LayerAllocation(
        name=name,
        tower=_field(entry, "tower", str, where),
        modality=entry.get("modality") or "",
        block=_field(entry, "block", str, where),
        shape=None if shape is None else (shape[0], shape[1]),
        weights=weights,
        zeros=zeros,
        achieved=None if achieved is None else float(_unit(f"{where}: achieved", achieved)),
    )

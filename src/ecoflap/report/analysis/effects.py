"""Effects of options: ε, draws and samples of the zeroth order against the exact gradient norm; granularity and cap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ecoflap.errors import EcoflapError
from ecoflap.importance.scores import Estimate, Importance
from ecoflap.model.parts import Layer
from ecoflap.report.analyses import Effects
from ecoflap.report.analysis.agreement import spearman
from ecoflap.report.analysis.registry import Analysis, NotApplicable
from ecoflap.report.charts.analysis import effect_charts, share_charts
from ecoflap.report.charts.static import picture
from ecoflap.support.progress import Labelled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject

EPSILONS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
DRAWS = (1, 2, 4, 8)
SEEDS = 3  # for the standard error
EPSILON = 1e-3  # of the effects of draws and samples
ABOVE = (0.0, 0.05, 0.1, 0.2, 0.3, 1.0)  # caps minus the sparsity
_LABELS = {"epsilon": "ε", "draws": "noises per batch", "samples": "calibration samples"}


class Estimates:
    """A journal in memory: estimates by (layer, batch, draw)."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int, int], float] = {}

    def estimates(self) -> Iterable[Estimate]:
        return ()

    def append(self, estimate: Estimate) -> None:
        self.values[estimate.layer, estimate.batch, estimate.draw] = estimate.value

    def blocks(self, layers: Sequence[Layer], batches: int, draws: int) -> np.ndarray:
        """Block scores ``[blocks]`` of block probes: the mean of |g| over the first batches and draws; the projection g
        on the noise of a block is the sum of its layers' parts."""
        sums: dict[str, np.ndarray] = {}
        for layer in layers:
            part = [[self.values[layer.name, b, d] for d in range(draws)] for b in range(batches)]
            sums[layer.block] = sums.get(layer.block, np.zeros((batches, draws))) + np.array(part)
        return np.array([np.abs(found).mean() for found in sums.values()])


def exact_blocks(values: Mapping[tuple[str, int, int], float], layers: Sequence[Layer], batches: int) -> np.ndarray:
    """The exact values of block probes, ``[blocks]``: the mean over batches of √(2/π)·‖∇L‖₂ of each block.

    Args:
        values: √(2/π)·‖∇L‖₂ of each layer and batch, from ``gradient-norm``.
    """
    squares: dict[str, np.ndarray] = {}
    for layer in layers:
        part = np.array([values[layer.name, batch, 0] for batch in range(batches)])
        squares[layer.block] = squares.get(layer.block, np.zeros(batches)) + part**2
    return np.array([np.sqrt(found).mean() for found in squares.values()])


def compute(subject: Subject) -> dict[str, Any]:
    """Agreement of block probes with the exact norms, each for :data:`SEEDS` seeds.

    ``epsilon`` and ``draws`` are compared with the exact norms of the same batch, ``samples`` with those of all
    batches, which includes the variation of the data.
    """
    from ecoflap.importance.measure import measure_importance

    layers, batches = subject.anatomy.layers, subject.batches

    def measured(name: str, seed: int, count: int, **options: Any) -> Estimates:
        journal, progress = Estimates(), Labelled(subject.progress, f"effects, seed {seed}")
        measure_importance(
            subject.checkpoint.model, batches[:count], name, seed=seed, loss=subject.objective,
            anatomy=subject.anatomy, progress=progress, journal=journal, **options,
        )  # fmt: skip
        return journal

    exact = measured("gradient-norm", 0, len(batches)).values
    seeds = [subject.recipe.seed + number for number in range(SEEDS)]
    zeroth = {"probe": "block", "epsilon": EPSILON}
    many = [measured("zeroth-order", seed, 1, draws=max(DRAWS), **zeroth) for seed in seeds]
    every = [measured("zeroth-order", seed, len(batches), **zeroth) for seed in seeds] if len(batches) > 1 else many
    first, whole = exact_blocks(exact, layers, 1), exact_blocks(exact, layers, len(batches))

    epsilons = []
    for epsilon in EPSILONS:
        found = many if epsilon == EPSILON else [
            measured("zeroth-order", seed, 1, **{**zeroth, "epsilon": epsilon}) for seed in seeds
        ]  # fmt: skip
        epsilons.append(_row(epsilon, [one.blocks(layers, 1, 1) for one in found], first))
    draws = [_row(count, [one.blocks(layers, 1, count) for one in many], first) for count in DRAWS]
    counts = [1 << power for power in range(len(batches).bit_length()) if 1 << power < len(batches)] + [len(batches)]
    samples = [
        _row(_samples(batches[:count]), [one.blocks(layers, count, 1) for one in every], whole) for count in counts
    ]
    own = subject.importance
    scores = own if own is not None else _exact_importance(subject, exact, len(batches))
    return {
        "effects": {"epsilon": epsilons, "draws": draws, "samples": samples},
        "allocations": allocations(subject.recipe.shares(), scores),
        "seeds": SEEDS,
        "samples": subject.measured_on,
        "probe": "block",
        "scores": scores.method,
        "sparsity": subject.recipe.sparsity,
    }


def _samples(batches: Sequence[Any]) -> int:
    from ecoflap.data.batches import batch_size_of

    return sum(batch_size_of(batch) for batch in batches)


def _exact_importance(subject: Subject, exact: Mapping[tuple[str, int, int], float], batches: int) -> Importance:
    """The exact norms as scores, for a run that measured none."""
    from ecoflap.importance.scores import summarise

    layers = subject.anatomy.layers
    scores = {layer.name: summarise(exact[layer.name, batch, 0] for batch in range(batches)) for layer in layers}
    return Importance("gradient-norm", {}, layers, scores)


def _row(value: float, found: Sequence[np.ndarray], exact: np.ndarray) -> dict[str, Any]:
    """Mean and standard error over seeds, for the rank correlation and the mean relative error of block scores."""
    known = exact > 0
    relations = [spearman(scores.tolist(), exact.tolist()) for scores in found]
    errors = [float((np.abs(scores - exact)[known] / exact[known]).mean()) if known.any() else None for scores in found]
    mean, stderr = _spread(relations)
    error, error_stderr = _spread(errors)
    return {"value": value, "spearman": mean, "stderr": stderr, "error": error, "error_stderr": error_stderr}


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None, None
    return float(np.mean(known)), float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None


def allocations(shares: Mapping[str, Any], scores: Importance) -> dict[str, dict[str, dict[str, float]]]:
    """The towers' sparsities by option (granularity, cap), value and tower; infeasible values are left out.

    Args:
        shares: the options of the run's allocation, from ``Recipe.shares``.
    """
    options = {name: value for name, value in shares.items() if value is not None}
    sparsity = options["sparsity"]
    caps = list(dict.fromkeys(round(min(1.0, sparsity + above), 6) for above in ABOVE))
    found: dict[str, dict[str, dict[str, float]]] = {"granularity": {}, "cap": {}}
    for granularity in ("layer", "block", "tower"):
        _try(found["granularity"], granularity, scores, {**options, "granularity": granularity})
    for cap in caps:
        _try(found["cap"], f"{cap:g}", scores, {**options, "max_sparsity": cap})
    return found


def _try(into: dict[str, dict[str, float]], value: str, scores: Importance, options: dict[str, Any]) -> None:
    from ecoflap.api import allocate

    try:
        allocation = allocate(scores, **options)
    except EcoflapError:
        return
    towers: dict[str, list[int]] = {}
    for layer in allocation.layers:
        sums = towers.setdefault(layer.tower, [0, 0])
        sums[0] += layer.zeros
        sums[1] += layer.weights
    into[value] = {tower: zeros / weights for tower, (zeros, weights) in towers.items()}


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """Above: rank correlation and relative error against each option. Below: the towers' sparsities."""
    content = Effects.model_validate(data)
    if not any((*content.effects.values(), *content.allocations.values())):
        raise NotApplicable("nothing was measured")
    return {"": picture([effect_charts(content), share_charts(content)])}


ANALYSIS = Analysis(draw, compute)

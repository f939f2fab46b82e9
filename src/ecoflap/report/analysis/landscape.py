"""Slices of the calibration loss in random directions around the dense and the sparse model.

Filter-normalised directions of Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets" (arXiv 1712.09913),
section 4: every filter (here: row of a matrix) of the random direction has the norm of the model's own filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ecoflap.report.analyses import Landscape
from ecoflap.report.analysis.registry import Analysis
from ecoflap.report.charts.analysis import landscape_charts
from ecoflap.report.charts.static import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from ecoflap.model.parts import Layer
    from ecoflap.report.analysis.subject import Subject
    from ecoflap.support.progress import Task

LINE = tuple(round(-1 + step / 10, 6) for step in range(21))
PLANE = tuple(round(-1 + step / 5, 6) for step in range(11))
KEPT_BYTES = 1 << 30  # of directions in memory; larger models draw them again for every point


def direction(weight: Tensor, layer: Layer, number: int, seed: int, masked: bool = False) -> Tensor:
    """A random direction of a matrix, in its stored shape: each row (output feature) has the norm of the weight's row.

    Args:
        weight: fp32, ``[out, in]``, or ``[in, out]`` if the layer is stored transposed.
        number: 0 and 1 are the two directions of a plane.
        seed: decides the direction, with the layer's name and ``number``.
        masked: weights that are zero stay zero.
    """
    from ecoflap.importance.projections import noise

    drawn = noise(weight.shape, weight.device, seed=seed, layer=f"landscape/{layer.name}", batch=0, draw=number)
    if masked:
        drawn = drawn * (weight != 0)
    inputs = 0 if layer.transposed else 1
    norm = drawn.norm(dim=inputs, keepdim=True)
    scale: Tensor = weight.norm(dim=inputs, keepdim=True) / norm.where(norm > 0, norm.new_ones(()))
    return drawn * scale


class Slices:
    """The loss of a model at W + α·d₀ + β·d₁, with W and d over all prunable matrices. Parameters are not changed."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], losses: Any, *, seed: int, masked: bool) -> None:
        self._model, self._layers, self._losses, self._seed, self._masked = model, layers, losses, seed, masked
        self._known: dict[tuple[float, float], float] = {}
        self._directions: dict[tuple[str, int], Tensor] = {}
        self._keep = 2 * 4 * sum(layer.numel for layer in layers) <= KEPT_BYTES

    def loss(self, alpha: float, beta: float) -> float:
        """The mean loss over the batches; may be NaN or infinite."""
        from ecoflap.model.slices import stored_matrix
        from ecoflap.model.swapping import layers_swapped

        if (alpha, beta) not in self._known:
            moved: list[Tensor] = []
            for layer in self._layers:
                weight = stored_matrix(self._model, layer.name)
                moved.append(weight + alpha * self._direction(weight, layer, 0))
                if beta:
                    moved[-1] += beta * self._direction(weight, layer, 1)
            with layers_swapped(self._model, zip(self._layers, moved, strict=True)):
                self._known[alpha, beta] = self._losses(self._model)
        return self._known[alpha, beta]

    def _direction(self, weight: Tensor, layer: Layer, number: int) -> Tensor:
        key = (layer.name, number)
        if key in self._directions:
            return self._directions[key]
        drawn = direction(weight, layer, number, self._seed, self._masked)
        if self._keep:
            self._directions[key] = drawn
        return drawn


def compute(subject: Subject) -> dict[str, Any]:
    """The loss along a line (21 points) and over a plane (11 × 11), of the dense and of the sparse model.

    The loss is that of the first half of the batches: a slice needs many forwards, and changes little with more data.
    The line is the plane's first direction. Both models use the same random directions; for the sparse model they are
    zero where its weights are zero, and are normalised to its own rows.
    """
    from ecoflap.data.batches import batch_size_of

    line: dict[str, Any] = {"alpha": list(LINE)}
    plane: dict[str, Any] = {"alpha": list(PLANE), "beta": list(PLANE)}
    points = len({*((a, 0.0) for a in LINE), *((a, b) for a in PLANE for b in PLANE)})
    with subject.progress.stage("landscape", total=2 * points) as task:
        for which in ("dense", "pruned"):
            model = subject.checkpoint.model if which == "dense" else subject.pruned
            line[which], plane[which] = _slices(subject, model, which == "pruned", task)
    return {"samples": sum(batch_size_of(batch) for batch in _batches(subject)), "line": line, "plane": plane}


def _batches(subject: Subject) -> Sequence[Any]:
    return subject.batches[: (len(subject.batches) + 1) // 2]


def _slices(subject: Subject, model: nn.Module, masked: bool, task: Task) -> tuple[list[float], list[list[float]]]:
    import torch

    from ecoflap.report.analysis.subject import computing

    def losses(moved: nn.Module) -> float:
        found = [float(subject.objective(moved, batch)) for batch in batches]
        task.advance()
        return sum(found) / len(found)

    layers, batches = subject.anatomy.layers, _batches(subject)
    with computing(model), torch.no_grad():
        slices = Slices(model, layers, losses, seed=subject.recipe.seed, masked=masked)
        line = [slices.loss(alpha, 0.0) for alpha in LINE]
        return line, [[slices.loss(alpha, beta) for beta in PLANE] for alpha in PLANE]


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """The line of both models, and the plane of each, on one scale."""
    return {"": picture([landscape_charts(Landscape.model_validate(data))])}


ANALYSIS = Analysis(draw, compute)

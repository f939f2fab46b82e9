"""Distributions of weights, gradients and local scores in each tower, to show why one threshold does not fit all.

Local score: Wanda's |w|·‖x‖ (Sun et al. 2023, arXiv 2306.11695). The comparison is that of Sung et al. 2024 (ECoFLaP,
arXiv 2310.02998), figure 2. Histograms of log10|x| are filled piece by piece, with the same edges for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ecoflap.data.objectives import Objective
from ecoflap.importance.base import ProbeContext
from ecoflap.importance.gradient import visit_gradients
from ecoflap.model.parts import Anatomy
from ecoflap.model.slices import stored_matrix
from ecoflap.report.analyses import Distributions
from ecoflap.report.analysis.registry import Analysis
from ecoflap.report.charts.analysis import distribution_charts
from ecoflap.report.charts.static import picture
from ecoflap.support.progress import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ecoflap.report.analysis.subject import Subject

KINDS = ("weight", "gradient", "local")


def compute(subject: Subject) -> dict[str, Any]:
    """Histograms for each tower of the dense model, over all its prunable weights.

    ``gradient`` is the mean gradient over the calibration batches; ``local`` uses input norms over all real tokens.
    Layers that no token reached have no local score.
    """
    from ecoflap.report.analysis.subject import computing
    from ecoflap.statistics.dense import dense_statistics

    model, anatomy, batches = subject.checkpoint.model, subject.anatomy, subject.batches
    counts: dict[str, dict[str, LogHistogram]] = {
        tower.name: {kind: LogHistogram() for kind in KINDS} for tower in anatomy.towers
    }
    total = len(batches) + sum(1 for block in anatomy.blocks if block.layers)
    with computing(model), subject.progress.stage("distributions", total=total) as task:
        gradients = mean_gradients(model, anatomy, batches, subject.objective, task)
        for layer in anatomy.layers:
            counts[layer.tower]["weight"].add(stored_matrix(model, layer.name))
            counts[layer.tower]["gradient"].add(gradients.pop(layer.name))
        for block, statistics in dense_statistics(model, anatomy, batches, subject.objective):
            for layer in block.layers:
                found = statistics[layer.name]
                if found is not None:
                    weight = stored_matrix(model, layer.name)
                    norm = found.norm[:, None] if layer.transposed else found.norm
                    counts[layer.tower]["local"].add(weight * norm)
            task.advance(1, block.name)
    return {
        "samples": subject.measured_on,
        "towers": {
            tower.name: {
                "modality": tower.modality,
                **{kind: histogram.to_json() for kind, histogram in counts[tower.name].items()},
            }
            for tower in anatomy.towers
        },
    }


def draw(data: Mapping[str, Any], subject: Subject) -> dict[str, Figure]:
    """One panel per quantity, one outline per tower."""
    return {"": picture([distribution_charts(Distributions.model_validate(data))])}


ANALYSIS = Analysis(draw, compute)
LOW, HIGH = -46, 40  # decades: the range of fp32
FINE = 100  # bins per decade while counting: the median is exact to 1.2 %
COARSE = 10  # bins per decade in the result


class LogHistogram:
    """Counts values by the logarithm of their size."""

    def __init__(self) -> None:
        self._counts = torch.zeros((HIGH - LOW) * FINE, dtype=torch.int64)
        self._zeros = 0

    def add(self, values: Tensor) -> None:
        """Count all entries of ``values`` (any shape, finite)."""
        sizes = values.detach().abs().flatten()
        sizes = sizes[sizes > 0].double()
        self._zeros += values.numel() - len(sizes)
        bins = ((sizes.log10() - LOW) * FINE).floor().long().clamp_(0, len(self._counts) - 1)
        self._counts += torch.bincount(bins, minlength=len(self._counts)).cpu()

    def to_json(self) -> dict[str, Any]:
        """``log10_edges`` (n + 1, a tenth of a decade apart), ``share`` of all values in each bin (n), ``median`` and
        ``zeros``.

        The median is that of nonzero values (None if there are none), ``zeros`` the share of exact zeros. Shares and
        zeros add up to 1.
        """
        found = int(self._counts.sum())
        total = found + self._zeros
        if not found:
            return {"log10_edges": [0.0], "share": [], "median": None, "zeros": 1.0 if total else None}
        coarse = self._counts.view(-1, FINE // COARSE).sum(dim=1)
        filled = coarse.nonzero().flatten()
        first, last = int(filled[0]), int(filled[-1]) + 1
        return {
            "log10_edges": [round(LOW + place / COARSE, 6) for place in range(first, last + 1)],
            "share": [int(count) / total for count in coarse[first:last]],
            "median": 10 ** self._middle(found),
            "zeros": self._zeros / total,
        }

    def _middle(self, found: int) -> float:
        """log10 of the median, if values are distributed evenly inside their bin."""
        sums = self._counts.cumsum(0)
        place = int((sums < found / 2).sum())
        inside = (found / 2 - int(sums[place]) + int(self._counts[place])) / int(self._counts[place])
        return LOW + (place + inside) / FINE


def mean_gradients(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], objective: Objective, task: Task
) -> dict[str, Tensor]:
    """∇L of the mean loss over ``batches`` by parameter name, in the shape of the parameter; zeros if there is none.

    One backward pass per batch. Memory: one number per prunable weight, and one block's activations. The model and its
    own gradients are restored.

    Raises:
        NonFiniteLoss: names the batch.
        InvalidOption: the model can't be differentiated.
    """
    context = ProbeContext(model, anatomy, batches, objective, seed=0)
    means = {layer.name: torch.zeros_like(stored_matrix(model, layer.name)) for layer in anatomy.layers}

    def add(name: str, weight: Tensor, gradient: Tensor) -> None:
        means[name].add_(gradient, alpha=1 / len(batches))

    for index in range(len(batches)):
        visit_gradients(context, index, add, instead="leave out --what distributions")
        task.advance(1, f"gradient of batch {index}")
    return means

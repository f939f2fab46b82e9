"""Recovery: fits the nonzero weights of a pruned model to the dense model's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ecoflap.allocation import Allocation
from ecoflap.allocation.parts import LayerAllocation
from ecoflap.allocation.patterns import Pattern, Unstructured
from ecoflap.data.objectives import on_device
from ecoflap.errors import InvalidOption
from ecoflap.model.compute import computing_in
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.slices import matrix_in, stored_matrix
from ecoflap.pruning.criteria import Needs, Pruned, check_statistics
from ecoflap.pruning.journal import BlockJournal, PrunedBlock
from ecoflap.pruning.least_squares import Reconstruction
from ecoflap.pruning.walk import WalkResult, walk
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.inputs import InputGram, InputStatistics
from ecoflap.support.ranges import check_count, check_positive
from ecoflap.support.registry import check_options
from ecoflap.support.work import Work

if TYPE_CHECKING:
    from ecoflap.allocation.patterns import Compare
    from ecoflap.pruning.criteria import BlockOrder

Weights = Mapping[str, Tensor]  # stored weights by parameter name


@dataclass(frozen=True)
class RecoveryOptions:
    """Options of the fit.

    Attributes:
        steps: of conjugate gradients, which start from the pruned model's weights.
        damping: added to the diagonal of the inputs' moments, which is scaled to 1; keeps weights near the dense ones.
    """

    steps: int = 20
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_count("recover_options: steps", self.steps)
        check_positive("recover_options: damping", self.damping)


def recovery_options(options: Mapping[str, Any] | None) -> RecoveryOptions:
    """Make the options. Raises InvalidOption for an unknown option, or a value out of range."""
    check_options("recovery", "recover", RecoveryOptions, options or {})
    return RecoveryOptions(**(options or {}))


@dataclass(frozen=True)
class FitLayer:
    """Fits the weights of one layer under its mask: asymmetric masked least squares.

    Minimises ‖X Wᵀ − X̂ Ŵᵀ‖² over all Ŵ that are zero where ``pruned`` is zero: W is the dense weight, X are the layer's
    inputs in the dense model (GPTAQ's asymmetric targets, arXiv 2504.02692), X̂ those in the model that is recovered up
    to this layer. The solver is that of ALPS (arXiv 2406.07831).

    Attributes:
        pruned: (out, in), the start of the conjugate gradients.
    """

    pruned: Tensor
    options: RecoveryOptions
    name: ClassVar[str] = "recover"
    statistics: ClassVar[Needs] = "pair"
    default_compare: ClassVar[Compare] = "matrix"
    order: ClassVar[BlockOrder] = "sequential"

    def __call__(self, weight: Tensor, statistics: InputStatistics | None, zeros: int, pattern: Pattern) -> Pruned:
        """Fit to the dense ``weight`` (out, in); without tokens, or without zeros, the pruned weight is returned.

        Raises:
            NonFiniteLoss: a weight or a statistic is not finite.
        """
        given = self.pruned.to(weight.device, weight.dtype)
        mask = given != 0
        if statistics is None or statistics.tokens == 0 or bool(mask.all()):
            return Pruned(given.clone(), mask)
        gram = check_statistics(self.name, statistics, weight.shape[1])
        assert isinstance(gram, InputGram)
        layer = Reconstruction.of(weight, gram, self.options.damping)
        w = layer.solve(given.float() * layer.scale, mask, self.options.steps)
        return layer.pruned(w, mask, given)


def recover_layers(
    model: nn.Module,
    anatomy: Anatomy,
    pruned: Weights,
    batches: Sequence[Any],
    options: RecoveryOptions,
    work: Work,
    journal: BlockJournal | None = None,
    *,
    offload: bool | str = False,
    tokens: TokenChoice = ALL,
) -> WalkResult:
    """Set the zeros of ``pruned`` in a dense ``model``, in place, and fit the other weights.

    Args:
        pruned: a weight for each layer of ``anatomy``.
        journal: contains the blocks of an interrupted recovery, and receives new ones; the same for all workers.
        offload, tokens: see :func:`~ecoflap.pruning.walk.walk`.

    Returns:
        the zeros of each layer, and the layers that no calibration token reached, which have the weights of ``pruned``.

    Raises:
        NonFiniteLoss: a layer's input or weight is not finite; names the layer.
    """

    def of(layer: Layer) -> FitLayer:
        given = pruned[layer.name]
        return FitLayer(given.t() if layer.transposed else given, options)

    allocation = allocation_of_zeros(anatomy, pruned)
    with computing_in(model, work.compute):
        return walk(
            model, anatomy, allocation, batches, of(anatomy.layers[0]), Unstructured("matrix"), each=of,
            run=on_device(work.loss), offload=offload, tokens=tokens, progress=work.progress, journal=journal,
            workers=work.workers,
        )  # fmt: skip


def allocation_of_zeros(anatomy: Anatomy, pruned: Weights) -> Allocation:
    """The allocation with the zeros of a pruned model."""
    rows = tuple(
        LayerAllocation(
            layer.name, layer.tower, layer.modality, layer.block, layer.shape, layer.numel,
            layer.numel - int(torch.count_nonzero(pruned[layer.name])),
        )
        for layer in anatomy.layers
    )  # fmt: skip
    sparsity = sum(row.zeros for row in rows) / sum(row.weights for row in rows)
    highest = max(row.sparsity for row in rows)
    return Allocation(sparsity, highest, "layer", "sum", "unstructured", rows, anatomy.total_parameters)


class DenseWeights:
    """A copy of the dense weights of a model, on the CPU; ``names`` are those of the matrices."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        self._kept = {name: stored_matrix(model, name).to("cpu", copy=True) for name in names}

    def swap(self) -> dict[str, Tensor]:
        """Restore the dense weights; return the current ones, on the CPU."""
        pruned = {}
        for name in list(self._kept):
            weight = stored_matrix(self._model, name)
            pruned[name] = weight.to("cpu", copy=True)
            weight.copy_(self._kept.pop(name))
        return pruned


class SecondWalk:
    """The part of a journal for a second walk over the same blocks."""

    def __init__(self, journal: BlockJournal) -> None:
        self._journal, self.folder = journal, journal.folder

    def load(self, block: str) -> PrunedBlock | None:
        return self._journal.load(f"recovered.{block}")

    def save(self, block: str, pruned: PrunedBlock) -> None:
        self._journal.save(f"recovered.{block}", pruned)

    def place(self, block: str) -> Path | None:
        return self._journal.place(f"recovered.{block}")


def weights_to_recover(dense: nn.Module, pruned: nn.Module, anatomy: Anatomy, names: tuple[str, str]) -> Weights:
    """The weights of ``pruned`` for each layer of ``anatomy``, copied to the CPU, after a check that the models match.

    Args:
        anatomy: of ``dense``.
        names: of the dense and the pruned model, for messages.

    Raises:
        InvalidOption: weights or shapes don't match; nothing is pruned; or weights outside of the layers differ.
    """
    of_dense, of_pruned = names
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    for name in [*before, *after]:
        shapes = [tuple(model[name].shape) if name in model else None for model in (before, after)]
        if shapes[0] != shapes[1]:
            said = " and ".join(
                f"{'missing' if shape is None else shape} in {of}" for shape, of in zip(shapes, names, strict=True)
            )
            raise InvalidOption(
                f"{of_pruned} was not pruned from {of_dense}: {name} is {said}; give the dense model of the same shapes"
            )
    found = {layer.name: matrix_in(after[layer.parameter].detach(), layer.name) for layer in anatomy.layers}
    held = {layer.parameter for layer in anatomy.layers}
    zeros = [sum(int((model[name] == 0).sum()) for name in held) for model in (before, after)]
    if zeros[1] <= zeros[0]:
        raise InvalidOption(
            f"{of_pruned} has no more zeros in its layers than {of_dense}, so there is nothing to recover: is the "
            "pruned model given as the dense one, or the dense one as the pruned?"
        )
    others = [name for name, weight in after.items() if name not in held and not _alike(weight, before[name])]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InvalidOption(
            f"{of_pruned} differs from {of_dense} outside of the layers to be recovered ({others[0]}{more}): include "
            "layers that are pruned; a model that was trained afterwards can't be recovered"
        )
    return {name: weight.to("cpu", copy=True) for name, weight in found.items()}


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal up to their dtypes."""
    coarse = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return bool(torch.equal(one.to(other.device, coarse), other.to(coarse)))


def sparse_part(anatomy: Anatomy, pruned: Weights, dense: nn.Module) -> Anatomy:
    """The anatomy without layers that have the dense weights and no zeros: these are not recovered."""

    def sparse(layers: Iterable[Layer]) -> tuple[Layer, ...]:
        return tuple(
            layer for layer in layers
            if bool((pruned[layer.name] == 0).any()) or not _alike(pruned[layer.name], stored_matrix(dense, layer.name))
        )  # fmt: skip

    towers = (
        replace(tower, blocks=tuple(replace(block, layers=sparse(block.layers)) for block in tower.blocks))
        for tower in anatomy.towers
    )
    return replace(anatomy, towers=tuple(tower for tower in towers if tower.layers))

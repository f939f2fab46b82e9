"""Global criteria: rounds of scores over all layers, each round with one threshold for each budget.

``global-magnitude`` scores by |w|, the simplest baseline; ``iterative-gradient`` by first-order scores, each round
sparser than the last. The lowest scores of many tensors are found exactly, without concatenating the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ecoflap.allocation import Allocation
from ecoflap.data.objectives import Objective
from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.base import ProbeContext
from ecoflap.importance.gradient import visit_gradients
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.model.precision import computing_in_fp32
from ecoflap.model.slices import stored_matrix
from ecoflap.model.trace import evaluating
from ecoflap.pruning.criteria import GlobalCriterion, Scores
from ecoflap.pruning.journal import BlockJournal, NoJournal, PrunedBlock
from ecoflap.pruning.walk import WalkResult, achieved
from ecoflap.support.progress import Progress, Silent, Task
from ecoflap.support.ranges import check_count

_HALF = 16  # bits that one pass decides
_FIRST = -1  # the key of weights that are zero already


def keys_of(scores: Tensor, weight: Tensor) -> Tensor:
    """Integers in the order of the scores: the bits of nonnegative fp32 numbers, read as int32.

    Args:
        scores: fp32, at least 0, of any shape.
        weight: of the same shape; weights that are zero already get the lowest key, with any score.

    Raises:
        NonFiniteLoss: a score is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise NonFiniteLoss("a score is NaN or infinite")
    keys = scores.abs().contiguous().view(torch.int32)  # abs: no -0.0, whose bits are those of a negative integer
    return keys.masked_fill_(weight == 0, _FIRST)


@dataclass
class Lowest:
    """The lowest keys of a pool of tensors: all below ``limit``, and the first ``ties`` of those equal to it.

    :meth:`take` must be called once for each tensor; the order decides among equal keys.
    """

    limit: int
    ties: int

    def take(self, keys: Tensor) -> Tensor:
        """Mask of this tensor's entries among the lowest keys, in its shape."""
        lowest = keys < self.limit
        equal = keys == self.limit
        count = int(equal.sum())
        if self.ties >= count:
            lowest |= equal
        elif self.ties > 0:
            order = equal.flatten().cumsum(0).view_as(equal)
            lowest |= equal & (order <= self.ties)
        self.ties -= min(count, self.ties)
        return lowest


def lowest(pool: Callable[[], Iterable[Tensor]], count: int) -> Lowest:
    """The ``count`` lowest keys of all tensors that ``pool()`` yields; equal ones in its order, then by index.

    The limit is found by two histograms, of the upper and of the lower half of its bits, so that ``pool`` is called
    twice, and the keys of only one tensor are in memory.

    Args:
        pool: yields int32 keys (:func:`keys_of`), the same ones at each call.
        count: from 0 to the number of keys.
    """
    if count == 0:
        return Lowest(_FIRST, 0)
    upper, below = _bin(_histogram(((keys - _FIRST) >> _HALF for keys in pool()), 1 << (31 - _HALF)), count)
    inside = ((keys - _FIRST)[((keys - _FIRST) >> _HALF) == upper] & ((1 << _HALF) - 1) for keys in pool())
    lower, under = _bin(_histogram(inside, 1 << _HALF), count - below)
    return Lowest((upper << _HALF) + lower + _FIRST, count - below - under)


def _histogram(pool: Iterable[Tensor], bins: int) -> Tensor:
    """Number of occurrences of each integer from 0 to ``bins`` - 1: (bins) int64 on the CPU."""
    total = torch.zeros(bins, dtype=torch.int64)
    for values in pool:
        total += torch.bincount(values.flatten(), minlength=bins).cpu()
    return total


def _bin(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin with the ``count``-th lowest value (from 1), and the number of values in the bins before it."""
    up_to = histogram.cumsum(0)
    index = int(torch.searchsorted(up_to, count))
    return index, int(up_to[index] - histogram[index])


def prune_globally(
    model: nn.Module,
    anatomy: Anatomy,
    budgets: Allocation,
    pools: Mapping[str, str],
    batches: Sequence[Any],
    criterion: GlobalCriterion,
    *,
    objective: Objective,
    offload: bool = False,
    progress: Progress | None = None,
    journal: BlockJournal | None = None,
) -> WalkResult:
    """Prune ``model`` in place; weights that stay are bit-identical.

    The number of zeros of a pool is exact (larger only if more weights were zero before). Equal scores are ordered by
    layer, then by the weight's index in its stored matrix; weights that are zero already come first.

    Args:
        budgets: zeros of each layer; only the sum over the layers of a pool counts.
        pools: name of the budget of each layer.
        batches: calibration batches, for criteria that read data.
        objective: ``objective(model, batch)`` giving the loss, which moves the batch to the model's device.
        offload: keep tensors of the size of the model in the computer's memory.
        journal: contains the rounds of an interrupted run, and receives new ones: one entry each, with one bit per
            weight.

    Returns:
        the allocation with the zeros of each layer and its current sparsity.

    Raises:
        NonFiniteLoss: a weight, loss or score is not finite; names the layer or the batch.
        InvalidOption: the criterion needs gradients, and the model has none.
    """
    cutter = _Cutter(model, anatomy, pools, journal or NoJournal())
    totals = {pool: sum(budgets[layer.name].zeros for layer in layers) for pool, layers in cutter.pools.items()}
    targets = {
        pool: criterion.targets(totals[pool], sum(layer.numel for layer in layers))
        for pool, layers in cutter.pools.items()
    }
    rounds = len(next(iter(targets.values())))
    gradients = criterion.steps(len(batches))
    steps = gradients + 1 if gradients else len(anatomy.layers)  # compared with a gradient, cutting takes no time
    context = ProbeContext(model, anatomy, batches, objective, seed=0)
    done, cut = cutter.restore(rounds)
    with ExitStack() as stack:
        for state in (evaluating(model), cache_disabled(model)):
            stack.enter_context(state)
        task = stack.enter_context((progress or Silent()).stage("pruning", rounds * steps, done * steps))
        for number in range(done, rounds):
            scores = criterion.scores(context, offload, task)
            cut = {}
            for name, mask in cutter.masks(scores, {pool: counts[number] for pool, counts in targets.items()}):
                cut[name] = mask
                task.advance(0 if gradients else 1, name)
            task.advance(1 if gradients else 0, "zeros written")
            cutter.finish(number, cut)
    zeros = {name: int(np.unpackbits(packed.numpy()).sum(dtype=np.int64)) for name, packed in cut.items()}
    layers = tuple(replace(row, zeros=zeros[row.name]) for row in budgets.layers)
    return WalkResult(achieved(model, replace(budgets, layers=layers)), ())


class _Cutter:
    """Makes masks from scores, applies them and saves them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, pools: Mapping[str, str], journal: BlockJournal) -> None:
        self.model, self.journal, self.pool_of, self.layers = model, journal, pools, anatomy.layers
        self.pools: dict[str, list[Layer]] = {}
        for layer in anatomy.layers:
            self.pools.setdefault(pools[layer.name], []).append(layer)

    def masks(self, scores: Scores, counts: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """Name and packed mask of the zeros, layer by layer; weights are not changed yet.

        Args:
            counts: zeros of each pool.
        """

        def keys(layer: Layer) -> Tensor:
            weight = stored_matrix(self.model, layer.name)
            if not torch.isfinite(weight).all():
                raise NonFiniteLoss(f"the weight {layer.name} holds NaN or infinite values: the checkpoint is damaged")
            try:
                return keys_of(scores(layer), weight)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{layer.name}: {error}") from error

        def all_keys(members: Iterable[Layer]) -> Callable[[], Iterator[Tensor]]:
            return lambda: map(keys, members)

        limits = {pool: lowest(all_keys(members), counts[pool]) for pool, members in self.pools.items()}
        for layer in self.layers:
            yield layer.name, _packed(limits[self.pool_of[layer.name]].take(keys(layer)))

    def finish(self, number: int, cut: Mapping[str, Tensor]) -> None:
        """Save a round's masks and set its zeros."""
        self.journal.save(_entry(number), PrunedBlock(cut))
        self._apply(cut)

    def restore(self, rounds: int) -> tuple[int, dict[str, Tensor]]:
        """The number of finished rounds, and the masks of the last of them, whose zeros are set."""
        for number in reversed(range(rounds)):
            found = self.journal.load(_entry(number))
            if found is not None:
                cut = dict(found.weights)
                self._apply(cut)
                return number + 1, cut
        return 0, {}

    def _apply(self, cut: Mapping[str, Tensor]) -> None:
        for name, packed in cut.items():
            weight = stored_matrix(self.model, name)
            weight.masked_fill_(_unpacked(packed, weight.shape).to(weight.device), 0)


def _entry(number: int) -> str:
    return f"round-{number + 1}"


def _packed(mask: Tensor) -> Tensor:
    """One bit per element, on the CPU: uint8, (⌈n / 8⌉)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel()).astype(bool)).view(shape)


@dataclass(frozen=True)
class GlobalMagnitude:
    """score = |w|, the absolute value (Han et al. 2015, arXiv 1506.02626); reads no data.

    Additional memory: some copies of one matrix.
    """

    name: ClassVar[str] = "global-magnitude"

    def targets(self, zeros: int, weights: int) -> Sequence[int]:
        """One round."""
        return (zeros,)

    def steps(self, batches: int) -> int:
        return 0

    def scores(self, context: ProbeContext, offload: bool, task: Task) -> Scores:
        """|w| in fp32; see :class:`ecoflap.pruning.criteria.GlobalCriterion`."""

        def magnitude(layer: Layer) -> Tensor:
            return stored_matrix(context.model, layer.name).float().abs()

        return magnitude


@dataclass(frozen=True)
class IterativeGradient:
    """score = |w|·E|g|, measured again in each of N rounds; round i makes the model p^(N/i) sparse.

    The baseline of Sung et al. 2024 (arXiv 2310.02998, section 4), called OBD there, after LeCun et al. 1989. g is the
    gradient of one calibration batch's mean loss, E the mean over batches; both are computed in fp32 for every dtype of
    the checkpoint. Weights that are zero stay zero: each round's zeros include those of the round before.

    Memory: E|g| of all prunable weights, 4 bytes each (in the computer's memory with ``offload_activations``), the
    model in fp32, the inputs of its blocks, and the activations of one block, which are recomputed in the backward pass
    as in :class:`~ecoflap.importance.gradient.FirstOrder`. Time: two forwards and a backward pass for each batch and
    round.

    Attributes:
        rounds: N.
    """

    name: ClassVar[str] = "iterative-gradient"

    rounds: int = 3

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def targets(self, zeros: int, weights: int) -> Sequence[int]:
        """round(n·p^(N/i)) for i = 1 … N with p = zeros / n; the last is exact."""
        share = zeros / weights
        early = (round(weights * share ** (self.rounds / number)) for number in range(1, self.rounds))
        return (*(min(zeros, count) for count in early), zeros)

    def steps(self, batches: int) -> int:
        return batches

    def scores(self, context: ProbeContext, offload: bool, task: Task) -> Scores:
        """|w|·Σ|g| over the batches, which has the same order as |w|·E|g|.

        Raises:
            InvalidOption: the model can't be differentiated.
            NonFiniteLoss: a loss is not finite.
        """
        device = torch.device("cpu") if offload else None
        sums = {
            layer.name: torch.zeros_like(stored_matrix(context.model, layer.name), dtype=torch.float32, device=device)
            for layer in context.layers
        }

        def add(name: str, _: Tensor, gradient: Tensor) -> None:
            sums[name] += gradient.abs_().to(sums[name])

        with computing_in_fp32(context.model):
            for index in range(len(context.batches)):
                visit_gradients(context, index, add, instead="criterion 'global-magnitude' needs none")
                task.advance(1, f"gradients of batch {index + 1}")

        def score(layer: Layer) -> Tensor:
            weight = stored_matrix(context.model, layer.name)
            return weight.float().abs() * sums[layer.name].to(weight.device)

        return score

"""Stage 2 of a global criterion: rounds of scores over the whole model, each cut at one limit for each budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecoflap.allocation import Allocation
from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.probe import Objective, ProbeContext
from ecoflap.network.cache import cache_disabled
from ecoflap.network.effort import forward_effort
from ecoflap.network.parts import Anatomy, Layer
from ecoflap.network.trace import evaluating
from ecoflap.progress import Progress, Silent
from ecoflap.pruning.global_criteria import GlobalCriterion, Scores
from ecoflap.pruning.global_selection import keys_of, lowest
from ecoflap.pruning.walk import BlockJournal, NoJournal, PrunedBlock, WalkResult, achieved

_PASSES = 30  # over a layer's weights when it is cut, as products in a forward count


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

    The number of zeros of a pool is exact (more only where more weights were zero before). Equal scores are decided by
    the order of the layers, then by the weight's index in its stored matrix; weights that are zero already come first.

    Args:
        budgets: their sum over the layers of a pool is its number of zeros; how it lies among them is not looked at.
        pools: layer to the name of the budget that it shares.
        batches: calibration batches, for criteria that read data.
        objective: ``objective(model, batch)`` giving the loss, which moves the batch to the model's device.
        offload: keep what is as large as the model in the computer's memory.
        journal: rounds done by an interrupted run, which are taken over, and where new ones go: one entry each, which
            holds a bit a weight.

    Returns:
        the allocation with the zeros that each layer was given, and the sparsity that it now has.

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
    steps = criterion.steps(len(batches)) + len(anatomy.layers)
    context = ProbeContext(model, anatomy, batches, objective, seed=0)
    done, cut = cutter.restore(rounds)
    with ExitStack() as stack:
        for state in (evaluating(model), cache_disabled(model)):
            stack.enter_context(state)
        # A gradient is three forwards; a layer is cut by some passes over its weights.
        efforts = [3 * forward_effort(anatomy)] * criterion.steps(len(batches))
        efforts = (rounds - done) * [*efforts, *(_PASSES * float(layer.numel) for layer in anatomy.layers)]
        task = stack.enter_context((progress or Silent()).stage("pruning", rounds * steps, done * steps, efforts))
        for number in range(done, rounds):
            scores = criterion.scores(context, offload, task)
            cut = {}
            for name, mask in cutter.masks(scores, {pool: counts[number] for pool, counts in targets.items()}):
                cut[name] = mask
                task.advance(1, name)
            cutter.finish(number, cut)
    zeros = {name: int(np.unpackbits(packed.numpy()).sum(dtype=np.int64)) for name, packed in cut.items()}
    layers = tuple(replace(row, zeros=zeros[row.name]) for row in budgets.layers)
    return WalkResult(achieved(model, replace(budgets, layers=layers)), ())


class _Cutter:
    """Makes masks of scores, applies them and keeps them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, pools: Mapping[str, str], journal: BlockJournal) -> None:
        self.model, self.journal, self.pool_of, self.layers = model, journal, pools, anatomy.layers
        self.pools: dict[str, list[Layer]] = {}
        for layer in anatomy.layers:
            self.pools.setdefault(pools[layer.name], []).append(layer)

    def masks(self, scores: Scores, counts: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """Name and packed mask of what is cut, layer by layer; nothing is written yet.

        Args:
            counts: zeros of each pool.
        """

        def keys(layer: Layer) -> Tensor:
            weight = self.model.get_parameter(layer.name).detach()
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
        """Keep a round's masks and write its zeros."""
        self.journal.save(_entry(number), PrunedBlock(cut))
        self._apply(cut)

    def restore(self, rounds: int) -> tuple[int, dict[str, Tensor]]:
        """How many rounds are done, and the masks of the last of them, whose zeros are written."""
        for number in reversed(range(rounds)):
            found = self.journal.load(_entry(number))
            if found is not None:
                cut = dict(found.weights)
                self._apply(cut)
                return number + 1, cut
        return 0, {}

    def _apply(self, cut: Mapping[str, Tensor]) -> None:
        for name, packed in cut.items():
            weight = self.model.get_parameter(name).data
            weight.masked_fill_(_unpacked(packed, weight.shape).to(weight.device), 0)


def _entry(number: int) -> str:
    return f"round-{number + 1}"


def _packed(mask: Tensor) -> Tensor:
    """A bit an element, on the CPU: uint8, (⌈n / 8⌉)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel()).astype(bool)).view(shape)

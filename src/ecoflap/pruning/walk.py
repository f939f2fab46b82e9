"""Walks through the towers block by block: gathers statistics, prunes each layer, runs the pruned block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.allocation import Allocation
from ecoflap.allocation.patterns import Pattern
from ecoflap.data.model_facts import TokenMasks, placeholders, token_masks
from ecoflap.errors import NonFiniteLoss
from ecoflap.model.block_runner import Run, TowerDriver
from ecoflap.model.offload import Offloaded, in_memory, is_offloaded, keep_placeholders
from ecoflap.model.parts import Anatomy, Block, Layer, Tower, parameter_of
from ecoflap.model.patching import cache_disabled, trim
from ecoflap.model.slices import matrix_in, stored_matrix
from ecoflap.model.trace import evaluating
from ecoflap.pruning.criteria import Criterion
from ecoflap.pruning.journal import BlockJournal, NoJournal, PrunedBlock, SpilledBlocks
from ecoflap.pruning.magnitude import Magnitude
from ecoflap.pruning.sequential import EXPERTS_ROOM, DenseModel, LayerGroup, layer_groups, resumed_calls, within_room
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.collect import assign_layers
from ecoflap.statistics.dense import gather
from ecoflap.statistics.gather import NUMBERS, STATISTICS, Gatherer
from ecoflap.statistics.inputs import InputStatistics, all_finite
from ecoflap.statistics.later import decoder_of, gather_later, sequence_of
from ecoflap.statistics.tokens import check_choice, chooser
from ecoflap.support.progress import Progress, Silent, Task, plan
from ecoflap.support.workers import ALONE, Share, Workers, share_of


@dataclass(frozen=True)
class WalkResult:
    """The result of a walk.

    Attributes:
        allocation: with the achieved sparsities.
        unreached: the layers that no calibration token reached.
        tokens: number of calibration tokens that the router sent to each expert, by path; empty if the criterion reads
            no data.
    """

    allocation: Allocation
    unreached: tuple[str, ...]
    tokens: Mapping[str, int] = field(default_factory=dict)


def walk(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Any],
    criterion: Criterion,
    pattern: Pattern,
    *,
    run: Run,
    offload: bool | str = False,
    tokens: TokenChoice = ALL,
    progress: Progress | None = None,
    journal: BlockJournal | None = None,
    workers: Workers = ALONE,
    each: Callable[[Layer], Criterion] | None = None,
) -> WalkResult:
    """Prune ``model`` in place.

    Several workers run a share of the batches each, and prune a share of each block's layers; all get the same model,
    to the bit that of one worker.

    Args:
        model: runs in eval mode and without a KV cache here.
        anatomy: its towers in the order of their calls, so that a later tower sees the earlier ones pruned.
        allocation: zeros for each layer.
        batches: calibration batches on the model's device; not read if the criterion needs no statistics.
        run: runs the model on a batch (the objective).
        offload: where block inputs are kept: "cpu" (or True), or "disk", in the journal's folder.
        tokens: which tokens of a tower that reads text and images enter the statistics.
        journal: contains the blocks of an interrupted walk, and receives new ones; the same for all workers.
        workers: processes with the same ``model`` and ``batches``.
        each: gives the rule of each layer if rules differ; ``criterion`` then names the statistics of all. These rules
            also handle layers that no token reached.

    Raises:
        NonFiniteLoss: a layer's input or weight is not finite; names the layer.
    """
    check_choice(tokens, model, batches, criterion.statistics)
    keep_placeholders(model)
    walker = _Walker(model, criterion, pattern, allocation, journal or NoJournal(), workers, each)
    decoder = decoder_of(anatomy)
    part = share_of(len(batches), workers)
    batches = [batches[number] for number in part.batches]
    visual = placeholders(model)
    masks = {index: token_masks(batch, decoder is not None, visual) for index, batch in enumerate(batches)}
    blocks = [block for block in anatomy.blocks if block.layers]
    folder = walker.journal.folder if offload == "disk" else None
    dense: DenseModel | None = None
    if criterion.statistics == "pair":  # the dense model must run before anything is restored or pruned
        done = {block.name: walker.known(block) for block in blocks}
        entered = [tower for tower in anatomy.towers if any(not done.get(block.name, True) for block in tower.blocks)]
        with evaluating(model), cache_disabled(model):
            dense = DenseModel(model, anatomy, entered, batches, run, offload=offload, folder=folder)
    else:
        done = {block.name: walker.restore(block) for block in blocks}
    gathers = criterion.statistics != "none"
    total = len(_steps(anatomy, gathers, blocks))
    to_do = _steps(anatomy, gathers, [block for block in blocks if not done[block.name]])
    with (
        evaluating(model),
        cache_disabled(model),  # a recorded cache would be filled twice
        (progress or Silent()).stage("pruning", total, total - len(to_do)) as task,
    ):
        plan(task, to_do)
        for tower in anatomy.towers:
            todo = [block for block in tower.blocks if block.layers and not done[block.name]]
            if not todo:
                walker.restore_all(tower.blocks)
                continue
            if not gathers:
                for block in todo:
                    with in_memory(model, block.name):
                        walker.prune_layers(block.layers, None)
                        walker.finish(block, task)
                continue
            driver = TowerDriver(model, tower, batches, run, offload=offload, folder=folder)
            _walk_tower(
                walker, tower, todo, driver, masks, sequence_of(tower, decoder), tokens, part, task, dense,
                passed=_before(anatomy, tower),
                later=partial(
                    gather_later, model, anatomy, batches=batches, run=run, masks=masks, part=part, tokens=tokens
                ),
            )  # fmt: skip
    return WalkResult(achieved(model, allocation), tuple(walker.unreached), walker.tokens)


def _steps(anatomy: Anatomy, gathers: bool, todo: Sequence[Block]) -> list[str]:
    """The kinds of the steps of a walk that prunes ``todo``, in order.

    ``prune``: a block is run for its statistics, and pruned. ``run``: a block is run for the inputs of the next one, or
    before a tower that the walk begins.

    Args:
        gathers: the criterion reads statistics; otherwise blocks are only pruned.
    """
    if not gathers:
        return ["prune"] * len(todo)
    kinds: list[str] = []
    for tower in anatomy.towers:
        chosen = [block in todo for block in tower.blocks]
        if any(chosen):
            kinds += ["run"] * _before(anatomy, tower)
            for block in chosen:
                kinds += ["prune", "run"] if block else ["run"]
            del kinds[len(kinds) - 1 - chosen[::-1].index(True) :]  # nothing runs after the last block to prune
    return kinds


def _before(anatomy: Anatomy, tower: Tower) -> int:
    """Number of blocks that a forward runs before a tower."""
    first = tower.blocks[0].name
    return anatomy.replayable.index(first) if first in anatomy.replayable else 0


def _walk_tower(
    walker: _Walker,
    tower: Tower,
    todo: Sequence[Block],
    driver: TowerDriver,
    masks: Mapping[int, TokenMasks],
    sequence: str | None,
    tokens: TokenChoice,
    part: Share,
    task: Task,
    dense: DenseModel | None,
    *,
    passed: int,
    later: Callable[..., list[Gatherer]],
) -> None:
    model, workers = walker.model, walker.workers
    make = STATISTICS[walker.criterion.statistics]
    for index, block in enumerate(tower.blocks):
        driver.enter(index)
        if not index:
            task.advance(passed, block.name)
        if block not in todo and dense is not None:
            with in_memory(model, block.name):
                dense.skip(tower, index)
            walker.restore_all([block])
        again = later(block, make=make, workers=workers) if block in todo else []
        with in_memory(model, block.name):
            if block in todo:
                before, first = dense.inputs(tower, index) if dense is not None else (None, None)
                choose = chooser(tokens, model, driver, index, block, masks, sequence, workers)
                groups = [LayerGroup(block.layers)]
                resumed = None
                if walker.criterion.order == "sequential":
                    groups = layer_groups(model, driver, index, block, workers, first)
                    resumed = resumed_calls(model, block, groups, driver)
                for group in within_room(groups, NUMBERS[walker.criterion.statistics], EXPERTS_ROOM):
                    gathered = gather(
                        model, driver, index, replace(block, layers=group.layers), make, masks, sequence,
                        tokens, choose=choose, part=part, workers=workers, dense=before, once=group.once,
                        resumed=resumed,
                        pruners=None if again else partial(assign_layers, layers=group.layers, workers=workers.count),
                    )  # fmt: skip
                    gathered.join(again)
                    walker.prune_layers(group.layers, gathered)
                    if resumed is not None:
                        resumed.settle(model.get_parameter(layer.parameter) for layer in group.layers)
                    if before is not None:
                        before.forget(group.layers)
                walker.finish(block, task)
                trim()  # free copies of weights and moments, whose sizes the block's forward can't reuse
            if block == todo[-1]:
                break  # these outputs are not needed: a later tower runs the model up to itself
            driver.run(index, last=True, resumed=resumed if block in todo else None)
            task.advance(1, block.name)
    if dense is not None:
        dense.finish_tower(tower)
        walker.restore_all(tower.blocks)


class _Walker:
    """Prunes single blocks of a model, and records the results."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        pattern: Pattern,
        allocation: Allocation,
        journal: BlockJournal,
        workers: Workers,
        each: Callable[[Layer], Criterion] | None = None,
    ) -> None:
        if is_offloaded(model) and isinstance(journal, NoJournal):
            journal = SpilledBlocks(model)
        self.model, self.criterion, self.pattern, self.journal = model, criterion, pattern, journal
        self.offloaded = Offloaded(model)
        self.allocation, self.workers, self.each = allocation, workers, each
        self.unreached: list[str] = []
        self.tokens: dict[str, int] = {}  # by expert
        self._left: list[str] = []  # layers of the current block without statistics
        self._known: set[str] = set()  # blocks that an interrupted walk has pruned and that are still dense

    def known(self, block: Block) -> bool:
        """Whether an interrupted walk has pruned the block; it stays dense until :meth:`restore_all`."""
        known = self.journal.load(block.name) is not None
        if known:
            self._known.add(block.name)
        return known

    def restore_all(self, blocks: Iterable[Block]) -> None:
        """Restore those of ``blocks`` that an interrupted walk has pruned and that are not restored yet."""
        for block in blocks:
            if block.name in self._known:
                self._known.remove(block.name)
                self.restore(block)

    def restore(self, block: Block) -> bool:
        """Restore a block that an interrupted walk has pruned."""
        done = self.journal.load(block.name)
        if done is None:
            return False
        elsewhere = self._read_from_saved(block, done.weights)
        for name in _parameters(block):
            if name not in elsewhere:
                self.model.get_parameter(name).data.copy_(done.weights[name])
        self.unreached += done.unreached
        self.tokens |= done.tokens
        return True

    def prune_layers(self, layers: Sequence[Layer], gathered: Gatherer | None) -> None:
        """Prune some layers of a block with the statistics of their inputs."""
        # Without statistics there is nothing to share out: all workers prune alike.
        rank = self.workers.rank
        pruner = dict.fromkeys((layer.name for layer in layers), rank)
        if gathered is not None:
            pruner = assign_layers(gathered.owners, layers, self.workers.count)
        left: list[str] = []
        for layer in layers:
            if pruner[layer.name] == rank:
                self._prune_layer(layer, gathered.statistics(layer) if gathered is not None else None)
            if gathered is not None:
                tokens = gathered.tokens_of(layer)
                left += [] if tokens else [layer.name]
                if layer.expert:
                    self.tokens[layer.expert] = max(tokens, self.tokens.get(layer.expert, 0))
                gathered.release(layer)
        if gathered is not None:
            for layer in layers:
                self.workers.copy_from(stored_matrix(self.model, layer.name), pruner[layer.name])
        self._left += left

    def finish(self, block: Block, task: Task) -> None:
        """Save a block whose layers are all pruned."""
        unreached = tuple(layer.name for layer in block.layers if layer.name in self._left)
        self._left.clear()
        weights = {name: self.model.get_parameter(name).data for name in _parameters(block)}
        tokens = {layer.expert: self.tokens[layer.expert] for layer in block.layers if layer.expert in self.tokens}
        self.journal.save(block.name, PrunedBlock(weights, unreached, tokens))
        self._read_from_saved(block, weights)
        self.unreached += unreached
        task.advance(1, block.name)

    def _read_from_saved(self, block: Block, weights: Mapping[str, Tensor]) -> list[str]:
        """Read the offloaded weights of a saved block from its file from now on; return its parameters' names."""
        names = self.offloaded.among(_parameters(block))
        place = self.journal.place(block.name) if names else None
        for name in names:
            assert place is not None
            self.offloaded.move(name, weights[name], place)
        return names

    def _prune_layer(self, layer: Layer, statistics: InputStatistics | None) -> None:
        """Prune one layer; by magnitude, if it has no statistics and ``each`` is not given."""
        stored = stored_matrix(self.model, layer.name)
        weight = stored.t() if layer.transposed else stored
        if not all_finite(weight):
            raise NonFiniteLoss(f"the weight {layer.name} holds NaN or infinite values: the checkpoint is damaged")
        criterion = self.each(layer) if self.each is not None else self.criterion
        known = criterion.statistics == "none" or (statistics is not None and statistics.tokens > 0)
        if not known and self.each is None:
            criterion, statistics = Magnitude(), None
        try:
            pruned = criterion(weight, statistics, self.allocation[layer.name].zeros, self.pattern)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{layer.name}: {error}") from error
        stored.copy_(pruned.weight.t() if layer.transposed else pruned.weight)


def _parameters(block: Block) -> list[str]:
    """Names of the parameters with the block's layers; of a pruned block, these are saved."""
    return list(dict.fromkeys(layer.parameter for layer in block.layers))


def achieved(model: nn.Module, allocation: Allocation) -> Allocation:
    """The allocation with the current sparsity of the weights."""
    weights, zeros = Offloaded(model), dict[str, int]()
    for name, rows in groupby(allocation.layers, lambda row: parameter_of(row.name)):
        parameter = weights.read(model.get_parameter(name))  # stacked matrices are read once
        for row in rows:
            zeros[row.name] = row.weights - int(torch.count_nonzero(matrix_in(parameter, row.name)))
    return allocation.with_achieved({row.name: zeros[row.name] / row.weights for row in allocation.layers})

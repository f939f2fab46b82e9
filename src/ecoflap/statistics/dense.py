"""Gathers input statistics of the dense model in one pass over all batches, block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from ecoflap.data.model_facts import TokenMasks, placeholders, token_masks
from ecoflap.model.block_runner import Run, TowerDriver
from ecoflap.model.offload import in_memory
from ecoflap.model.parts import Anatomy, Block, Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.model.resumed import ResumedCalls
from ecoflap.model.trace import evaluating
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.collect import Pruners, collected
from ecoflap.statistics.dense_inputs import DenseInputs
from ecoflap.statistics.every_token import EveryToken
from ecoflap.statistics.gather import STATISTICS, Gatherer, InputsDiverged
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.statistics.later import decoder_of, gather_later, sequence_of
from ecoflap.statistics.tokens import Chooser, chooser
from ecoflap.support.workers import ALONE, Share, Workers, share_of


def dense_statistics(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    run: Run,
    *,
    kind: str = "norm",
    skip: Collection[str] = (),
    offload: bool | str = False,
    tokens: TokenChoice = ALL,
    workers: Workers = ALONE,
    changing: bool = False,
) -> Iterator[tuple[Block, Mapping[str, InputStatistics | None]]]:
    """Each block with the statistics of its layers' inputs, as soon as they are gathered.

    Memory holds the inputs of one block for all batches, and the statistics that the caller keeps. The model runs in
    eval mode and without a KV cache while the iterator is used, in its current precision. Layers that read the same
    input share an accumulator: don't write to it.

    Args:
        batches: calibration batches; ``run`` puts them on the model's device.
        run: runs the model on a batch (such as an objective).
        kind: "norm" (Wanda) or "gram" (SparseGPT's Hessian).
        skip: names of blocks without statistics; a tower runs only up to the last block that needs them.
        offload: where block inputs are kept: "cpu" (or True) or "disk"; by default on their device.
        tokens: which tokens count in a tower that reads text and images.
        workers: processes that share the batches; all get all statistics.
        changing: the caller changes a block's weights after it got the statistics, and later blocks see the change.

    Yields:
        Blocks in the order of a forward, each with statistics by layer name; None if no token reached the layer.

    Raises:
        NonFiniteLoss: an input is NaN or infinite.
    """
    decoder = decoder_of(anatomy)
    part = share_of(len(batches), workers)
    batches = [batches[number] for number in part.batches]
    visual = placeholders(model)
    masks = {index: token_masks(batch, decoder is not None, visual) for index, batch in enumerate(batches)}
    with evaluating(model), cache_disabled(model):  # a recorded cache would be filled twice
        for tower in anatomy.towers:
            wanted = [block for block in tower.blocks if block.layers and block.name not in skip]
            if not wanted:
                continue
            driver = TowerDriver(model, tower, batches, run, offload=offload)
            sequence = sequence_of(tower, decoder)
            for index, block in enumerate(tower.blocks):
                driver.enter(index)
                if block not in wanted:
                    driver.run(index)
                    continue
                later = gather_later(
                    model,
                    anatomy,
                    block,
                    batches,
                    run,
                    STATISTICS[kind],
                    masks,
                    part=part,
                    workers=workers,
                    tokens=tokens,
                )
                with in_memory(model, block.name):
                    gathered = gather(
                        model, driver, index, block, STATISTICS[kind], masks, sequence, tokens, part=part,
                        workers=workers, outputs=not changing,
                    )  # fmt: skip
                gathered.join(later)
                found = {layer.name: gathered.statistics(layer) for layer in block.layers}
                yield block, {name: got if got is not None and got.tokens else None for name, got in found.items()}
                if block == wanted[-1]:
                    break
                if changing:
                    with in_memory(model, block.name):
                        driver.run(index)


def dense_norms(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    run: Run,
    *,
    offload: bool | str = False,
    workers: Workers = ALONE,
) -> dict[str, InputStatistics]:
    """``InputNorm`` of every prunable layer of the dense model, by parameter name; ``.norm`` is (columns,) fp32.

    Layers that no token reached are missing; an expert's norms are of its own tokens, however few. Arguments and errors
    as in :func:`dense_statistics`.
    """
    found: dict[str, InputStatistics] = {}
    own = TokenChoice(experts=0)
    for _, statistics in dense_statistics(model, anatomy, batches, run, offload=offload, tokens=own, workers=workers):
        found.update({name: got for name, got in statistics.items() if got is not None})
    return found


class SharedNorms:
    """Norms of the dense model's inputs, gathered at the first request and shared by later ones.

    For one model and one list of batches; the model must be dense at every request.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Mapping[str, InputStatistics]] = {}

    def of(self, key: Hashable, gather: Callable[[], Mapping[str, InputStatistics]]) -> Mapping[str, InputStatistics]:
        """The result of ``gather`` at the first request of ``key``: precision, choice of tokens, number of batches."""
        if key not in self._found:
            self._found[key] = gather()
        return self._found[key]


def gather(
    model: nn.Module,
    driver: TowerDriver,
    index: int,
    block: Block,
    make: Callable[[int], InputStatistics],
    masks: Mapping[int, TokenMasks],
    sequence: str | None,
    tokens: TokenChoice = ALL,
    *,
    part: Share | None = None,
    workers: Workers = ALONE,
    pruners: Pruners | None = None,
    outputs: bool = False,
    choose: Chooser | None = None,
    dense: DenseInputs | None = None,
    once: bool = False,
    resumed: ResumedCalls | None = None,
) -> Gatherer:
    """Run block ``index`` on the driver's inputs, and gather the statistics of its layers.

    Args:
        masks: of this worker's batches.
        part: which of all batches these are; by default all, in one group.
        pruners: as in :func:`~ecoflap.statistics.collect.collected`.
        outputs: keep the block's outputs for the next one, as :meth:`TowerDriver.run` does; else each call ends at the
            last layer's input.
        tokens: which tokens count, and the least number of tokens of an expert.
        choose: which tokens count, if that is known already.
        dense: the layers' inputs in the dense model.
        once: a call of the block is known to call each layer once.
        resumed: of the block; runs go on from the last cut, and are cut at the layers.
    """
    if choose is None:
        choose = chooser(tokens, model, driver, index, block, masks, sequence, workers)

    def passed(
        kind: type[Gatherer], layers: Sequence[Layer], shares: Sequence[bool], wanted: Pruners | None
    ) -> Gatherer:
        """One pass over the batches; a second one if layers that share an accumulator diverge."""
        whole = outputs and kind is Gatherer
        for share in shares:
            gatherer = None
            with suppress(InputsDiverged):
                watching = kind(
                    model, replace(block, layers=tuple(layers)), make, masks, sequence, share=share, choose=choose,
                    part=part, whole=whole, dense=dense if kind is Gatherer else None, once=once,
                    begins=resumed.cut if resumed is not None else None,
                )  # fmt: skip
                with watching:
                    (driver.run if whole else driver.observe)(index, watching.before, resumed=resumed)
                watching.check()
                gatherer = watching
            with suppress(InputsDiverged):
                device = model.get_parameter(layers[0].parameter).device
                return collected(gatherer, workers, layers, device, wanted)
        raise AssertionError("layers that share nothing can't diverge")

    gathered = passed(Gatherer, block.layers, (True, False), pruners)
    few = [layer for layer in block.layers if layer.expert and gathered.tokens_of(layer) < tokens.experts]
    if few:
        gathered.fill_up(passed(EveryToken, few, (gathered.shares,), None), tokens.experts)
    return gathered

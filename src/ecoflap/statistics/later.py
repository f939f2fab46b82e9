"""Gathers the inputs of shared weights in all uses after the first.

Zamba 2 uses one block in several layers, ALBERT calls one block repeatedly, DiffusionGemma ties its encoder to its
decoder. Such a weight is pruned once, in the first block that has it, and the tokens of all its uses count. For uses
after the first, the whole model is run once more, in its state when that first block is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.data.model_facts import TokenMasks
from ecoflap.model.block_runner import BlockCall, Run
from ecoflap.model.parts import Anatomy, Block, Layer, Tower, parameter_of
from ecoflap.model.trace import tensors_in
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.collect import collected
from ecoflap.statistics.gather import Gatherer, InputsDiverged
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.statistics.tokens import (
    Chooser,
    TextAttention,
    any_to_choose,
    choosing,
    received_by,
    split_tokens,
    turned,
)
from ecoflap.support.workers import ALONE, Share, Workers


@dataclass(frozen=True)
class Place:
    """A later use of weights of a block.

    Attributes:
        block: the block with the later use, with the shared weights as its layers, under their names in the first
            block; its name is "" if the use is outside of all blocks.
        tower: of the block.
        again: it is the first block itself, whose first call in a forward of its tower is no later use.
    """

    block: Block
    tower: Tower
    again: bool = False


def later_places(model: nn.Module, anatomy: Anatomy, block: Block) -> list[Place]:
    """All later uses of weights of ``block``."""
    towers = {one.name: tower for tower in anatomy.towers for one in tower.blocks}
    own = towers[block.name]
    found: dict[str, list[Layer]] = {}
    for layer in block.layers:
        first = model.get_submodule(layer.module)
        for alias, path in zip(layer.aliases, layer.modules[1:], strict=True):
            if model.get_submodule(path) is first:
                continue  # one module with two names: hooks see all its calls
            home = next((one for one in anatomy.replayable if path.startswith(one + ".")), "")
            there = replace(layer, name=alias, module=path, aliases=(), expert=_expert_of(layer, alias))
            found.setdefault(home, []).append(there)
    places = [
        Place(Block(home, block.tower, block.index, tuple(layers)), towers.get(home, own))
        for home, layers in found.items()
    ]
    return ([Place(block, own, again=True)] if own.repeats else []) + places


def _expert_of(layer: Layer, alias: str) -> str:
    """The expert of the layer under its other name."""
    if not layer.expert:
        return ""
    if layer.stacked:
        inside = layer.module[len(layer.mixture) :]
        return parameter_of(alias).rpartition(".")[0].removesuffix(inside) + layer.expert[len(layer.mixture) :]
    return alias.removesuffix(layer.name[len(layer.expert) :])


class _LaterGatherer(Gatherer):
    """Gathers only while it is open, since a hook on a module can't distinguish its uses."""

    open = False

    def after(self, output: Any) -> None:
        """End a later use."""

    def _feed(self, layer: Layer, x: Tensor) -> None:
        if self.open:
            self._add(layer, x)


class _LaterChoice:
    """Records what a choice of tokens needs of later uses of a block: attention, or changes of direction."""

    open = False

    def __init__(self, choice: TokenChoice, masks: Mapping[int, TokenMasks], block: Block) -> None:
        self._masks, self._block, self._name = masks, block, choice.name
        self._call: BlockCall | None = None
        self._pictures: list[bool] = []
        self._drifts: list[tuple[int, Tensor]] = []
        self.attention = TextAttention()

    def before(self, call: BlockCall) -> None:
        self._call = call
        mask, x = self._masks[call.batch], tensors_in((call.args, call.kwargs))[0]
        self._pictures.append(mask.image is not None)
        self.attention.begin(split_tokens(mask, x, self._block)[1] if mask.image is not None else None)

    def after(self, output: Any) -> None:
        if self._call is not None and self._name == "atv":
            self._drifts.append((self._call.batch, turned(tensors_in((self._call.args, self._call.kwargs))[0], output)))
        self._call = None
        self.attention.end()

    def chooser(self, choice: TokenChoice, workers: Workers) -> Chooser:
        attended = received_by(self.attention, self._pictures, self._block) if self._name == "text+attended" else {}
        return choosing(choice, self._masks, self._block, self._drifts, attended, workers)


def gather_later(
    model: nn.Module,
    anatomy: Anatomy,
    block: Block,
    batches: Sequence[Any],
    run: Run,
    make: Callable[[int], InputStatistics],
    masks: Mapping[int, TokenMasks],
    *,
    part: Share,
    workers: Workers = ALONE,
    tokens: TokenChoice = ALL,
) -> list[Gatherer]:
    """Statistics of the layers of ``block``, one gatherer for each later use; all workers get all statistics.

    Args:
        model: in eval mode, without a KV cache.
        batches: of this worker, as ``masks`` and ``part``.
        tokens: which tokens count, decided for each use; for "atv" and "text+attended" the model runs once more.
    """
    decoder = decoder_of(anatomy)
    found = []
    for place in later_places(model, anatomy, block):
        layers = place.block.layers
        device = model.get_parameter(block.layers[0].parameter).device
        sequence, choose = sequence_of(place.tower, decoder), None

        def run_all(opened: _LaterGatherer | _LaterChoice, place: Place = place) -> None:
            with _opened(model, place, opened) as begin, torch.no_grad():
                for number, batch in enumerate(batches):
                    begin(number)
                    run(model, batch)

        if any_to_choose(tokens, masks, sequence, workers):
            choice = _LaterChoice(tokens, masks, place.block)
            if tokens.name in ("atv", "text+attended"):
                with choice.attention:
                    run_all(choice)
            choose = choice.chooser(tokens, workers)
        for share in (True, False):
            gatherer = None
            with suppress(InputsDiverged):
                watching = _LaterGatherer(
                    model, place.block, make, masks, sequence, share=share, part=part, choose=choose
                )
                with watching:
                    run_all(watching)
                watching.check()
                gatherer = watching
            with suppress(InputsDiverged):
                found.append(collected(gatherer, workers, layers, device))
                break
    return found


@contextmanager
def _opened(model: nn.Module, place: Place, gatherer: _LaterGatherer | _LaterChoice) -> Iterator[Callable[[int], None]]:
    """Context in which the gatherer is open during later uses; gives the function to call before each batch."""
    batch, calls = 0, 0

    def begin(number: int) -> None:
        nonlocal batch
        batch = number

    def drive(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls = 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1 or not place.again:
            gatherer.before(BlockCall(batch, args, kwargs))
            gatherer.open = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if gatherer.open:
            gatherer.after(output)
        gatherer.open = False

    block = model.get_submodule(place.block.name)
    with ExitStack() as hooks:
        driver = model.get_submodule(place.tower.driver)
        hooks.callback(driver.register_forward_pre_hook(drive, with_kwargs=True).remove)
        hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        hooks.callback(block.register_forward_hook(leave).remove)
        yield begin


def decoder_of(anatomy: Anatomy) -> Tower | None:
    """The decoder of an encoder-decoder; None for other models."""
    return next((tower for tower in anatomy.towers if tower.decoder), None)


def sequence_of(tower: Tower, decoder: Tower | None) -> str | None:
    """The sequence, as in :class:`Gatherer`, whose padding mask applies to a tower."""
    if tower.modality != "language":
        return None
    return "decoder" if tower is decoder else "encoder"

"""Gathers input statistics of a block's layers while it runs: once for each distinct input, real tokens only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from ecoflap.data.model_facts import TokenMasks
from ecoflap.errors import NonFiniteLoss
from ecoflap.model.block_runner import BlockCall, Enough
from ecoflap.model.parts import Block, Layer
from ecoflap.model.trace import tensors_in
from ecoflap.statistics.dense_inputs import DenseInputs
from ecoflap.statistics.inputs import InputGram, InputNorm, InputStatistics
from ecoflap.statistics.pair import InputPair
from ecoflap.statistics.real_tokens import OwnMasks, RoutedTokens, own_masks
from ecoflap.statistics.tokens import Chooser
from ecoflap.statistics.watching import inputs_watched
from ecoflap.support.workers import Share

STATISTICS: dict[str, Callable[[int], InputStatistics]] = {"norm": InputNorm, "gram": InputGram, "pair": InputPair}
"""The accumulator for a number of columns, by the name in a criterion's ``statistics``."""
NUMBERS: dict[str, Callable[[int], int]] = {
    "norm": lambda columns: columns,
    "gram": lambda columns: columns**2,
    "pair": lambda columns: 2 * columns**2,
}
"""Its size in fp32 numbers, by the same names."""


class InputsDiverged(Exception):
    """Two layers had the same input in an earlier call, and now have different ones: gather again without sharing."""


class Gatherer:
    """Context in which the block's layers feed their statistics.

    Layers that receive the same tensor object (q, k, v) share one accumulator. Padding is found from the attention
    masks that the block receives, or else from those of the batch. An expert of a mixture receives a part of the tokens
    in the router's order; which of them are real is found by comparing its input with the mixture's. If the mixture
    scales its tokens before routing, all tokens of an expert count.

    Args:
        model: owner of the block.
        block: its layers are watched.
        make: builds an accumulator for a number of input features.
        masks: real tokens of each batch.
        sequence: the sequence that the block works on: ``"encoder"``, ``"decoder"``, or None if no padding mask applies
            (vision towers).
        share: False gives each layer its own accumulator.
        choose: which tokens of the block's own sequence count in each of its calls; None if all real ones do.
        part: the batches of this worker, those of ``masks``; by default all in one group.
        whole: False ends a call with :class:`Enough` at the last layer's input, if every layer had exactly one input in
            the first call (which runs to its end) and there is no router.
        dense: the layers' inputs in the dense model, for :class:`InputPair`.
        once: every layer is known to have one input in a call, so that also the first call ends early.
        begins: called in each call of the block just before the first layer's input is gathered.
    """

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        make: Callable[[int], InputStatistics],
        masks: Mapping[int, TokenMasks],
        sequence: str | None,
        *,
        share: bool = True,
        choose: Chooser | None = None,
        part: Share | None = None,
        whole: bool = True,
        dense: DenseInputs | None = None,
        once: bool = False,
        begins: Callable[[], None] | None = None,
    ) -> None:
        self._begins = begins
        self._model, self._block, self._make = model, block, make
        self._part = part or Share(range(len(masks)), (0,) * len(masks))
        self._masks, self._sequence, self._share = masks, sequence, share
        self._of: dict[str, InputStatistics] = {}
        self._owner: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._fed: list[tuple[Tensor, str]] = []
        self._others: list[Tensor] = []
        self._own = OwnMasks(None, None, False, 0)
        self._choose, self._dense = choose, dense
        self._chosen: Tensor | None = None
        self._batch = self._number = 0
        self._unknown_calls = 0 if once else 1  # calls that run to their end, to count the layers' inputs
        self._whole = whole or any(layer.expert for layer in block.layers)
        self._in_call: set[str] = set()  # layers with an input in this call
        self._routed: dict[str, list[RoutedTokens]] = {}  # by mixture, in this call of the block
        self._in_expert: dict[str, Tensor | None] = {}  # by expert, the mask of real tokens in its current call
        self._hooks = ExitStack()
        self._prior: Gatherer | None = None
        self._least = 0
        self.counts: Mapping[str, int] = {}
        """Number of tokens of all workers by owner, once all is gathered."""

    def __enter__(self) -> Gatherer:
        self._hooks.enter_context(inputs_watched(self._model, self._block.layers, self._feed))
        self._watch_mixtures()
        return self

    def _watch_mixtures(self) -> None:
        if self._sequence is not None:  # otherwise there is no padding
            self._watch_experts([layer for layer in self._block.layers if layer.expert])

    def _watch_experts(self, layers: Sequence[Layer]) -> None:
        """Hook the inputs of each mixture (the list of experts, if it has a forward, and its owner) and each expert."""
        experts = {layer.expert for layer in layers if not layer.stacked}
        for path in {layer.mixture for layer in layers}:
            for watched in (path.rpartition(".")[0], path):
                self._watch(watched, partial(self._note_mixture, path))
        for path in sorted(experts):
            self._watch(path, partial(self._note_expert, path))

    def _watch(self, path: str, note: Callable[..., None]) -> None:
        handle = self._model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
        self._hooks.callback(handle.remove)

    def _note_mixture(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        for x in tensors_in((args, kwargs))[:1]:
            real = self._keep(x)
            self._in_expert = {expert: real for expert, real in self._in_expert.items() if not expert.startswith(path)}
            if real is not None:
                self._routed.setdefault(path, []).append(RoutedTokens(x, real))

    def _note_expert(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._in_expert[path] = None
        for x in tensors_in((args, kwargs))[:1]:
            self._in_expert[path] = self._sent(path.rpartition(".")[0], x)

    def _sent(self, mixture: str, x: Tensor) -> Tensor | None:
        """The mask of real tokens among the rows of an expert's input; None if it is unknown."""
        found = (tokens.real_among(x) for tokens in self._routed.get(mixture, ()))
        return next((real for real in found if real is not None), None)

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        self._fed.clear()
        self._others.clear()
        self._routed.clear()
        self._in_expert.clear()

    def before(self, call: BlockCall) -> None:
        """Begin a call of the block."""
        if self._number == 1:  # the first call is over
            self._whole |= any(self._calls.get(layer.name) != 1 for layer in self._block.layers)
        self._in_call.clear()
        self._batch = call.batch
        if self._dense is not None:
            self._dense.begin(self._number)
        self._fed.clear()
        self._routed.clear()
        self._in_expert.clear()
        # A second tensor beside the hidden states belongs to another sequence (an encoder's output).
        self._others = tensors_in((call.args, call.kwargs))[1:]
        self._own = own_masks(self._model.get_submodule(self._block.name), call.args, call.kwargs)
        self._chosen = None if self._choose is None else self._choose(self._number, call)
        self._number += 1

    @property
    def owners(self) -> Mapping[str, str]:
        """For each layer that was reached, the layer whose accumulator it uses."""
        return self._owner

    def accumulator_of(self, owner: str, columns: int = 0) -> InputStatistics:
        """The accumulator of ``owner``; a new one with ``columns`` columns if no call of this worker reached it."""
        if owner not in self._of:
            self._of[owner] = self._make(columns)
        return self._of[owner]

    def use_owners(self, owners: Mapping[str, str]) -> None:
        """Use these owners, which all workers agreed on."""
        self._owner = dict(owners)

    def check(self) -> None:
        """Raises InputsDiverged if layers that share an accumulator were called a different number of times."""
        for name, owner in self._owner.items():
            if self._calls[name] != self._calls[owner]:
                raise InputsDiverged(name)

    def join(self, later: Sequence[Gatherer]) -> None:
        """Add the statistics of later uses of the layers. All sums must be closed."""
        if not later:
            return
        owners: dict[tuple[int, ...], str] = {}
        owner_of: dict[str, str] = {}
        held: dict[str, InputStatistics] = {}
        for layer in self._block.layers:
            names = (layer.name, *layer.aliases)
            found = [
                place._of[place._owner[name]] for place in (self, *later) for name in names if name in place._owner
            ]
            parts = [one for one in found if one.tokens]
            if not parts:
                continue
            owner = owner_of[layer.name] = owners.setdefault(tuple(map(id, parts)), layer.name)
            if owner == layer.name:
                held[owner] = parts[0].with_others(parts[1:])
        self._owner, self._of = owner_of, held
        self.counts = {owner: statistic.tokens for owner, statistic in held.items()}

    @property
    def shares(self) -> bool:
        """Whether layers with the same input share an accumulator."""
        return self._share

    def tokens_of(self, layer: Layer) -> int:
        """Number of tokens of ``layer``, on all workers."""
        return self.counts.get(self._owner.get(layer.name, ""), 0)

    def fill_up(self, prior: Gatherer, least: int) -> None:
        """From now on, fill up statistics of fewer than ``least`` tokens with average tokens of ``prior``."""
        self._prior, self._least = prior, least

    def statistics(self, layer: Layer) -> InputStatistics | None:
        """The statistics of ``layer``, which others may share; None if no call reached it."""
        owner = self._owner.get(layer.name)
        others = self._prior.statistics(layer) if self._prior is not None else None
        if owner is None:
            return others
        if others is not None:
            self._of[owner].fill_up(others, self._least)
        return self._of[owner]

    def release(self, layer: Layer) -> None:
        """Free the statistics of ``layer`` that no other layer shares."""
        owner = self._owner.pop(layer.name, None)
        if owner is not None and owner not in self._owner.values():
            self._of.pop(owner, None)
        if self._prior is not None:
            self._prior.release(layer)

    def _feed(self, layer: Layer, x: Tensor) -> None:
        if self._begins is not None and not self._in_call:
            self._begins()
        self._add(layer, x)
        self._in_call.add(layer.name)
        if self._number > self._unknown_calls and not self._whole and len(self._in_call) == len(self._block.layers):
            raise Enough

    def _add(self, layer: Layer, x: Tensor) -> None:
        name = layer.name
        self._calls[name] = self._calls.get(name, 0) + 1
        fed_by = next((owner for tensor, owner in self._fed if tensor is x), None) if self._share else None
        owner = self._owner.get(name)
        if fed_by is not None and owner in (None, fed_by):
            self._owner[name] = fed_by
            return
        if owner is None:
            self._owner[name] = owner = name
            self._of[name] = self._make(layer.shape[1])
            self._of[name].apart = not self._part.leads
        elif owner != name:
            raise InputsDiverged(name)
        self._of[owner].begin(self._part.groups[self._batch])
        try:
            self._update(self._of[owner], layer, x)
        except NonFiniteLoss as error:
            batch = self._part.batches[self._batch]
            raise NonFiniteLoss(f"calibration batch {batch}, layer {name}: {error}", batch) from error
        self._fed.append((x, owner))

    def _update(self, statistic: InputStatistics, layer: Layer, x: Tensor) -> None:
        if self._dense is not None and isinstance(statistic, InputPair):
            statistic.update(x, self._counted(x, layer), self._dense.of(layer, x))
        else:
            statistic.update(x, self._counted(x, layer))

    def _counted(self, x: Tensor, layer: Layer) -> Tensor | None:
        """The mask of the tokens that count, in the leading dimensions of ``x``; None if all do."""
        return self._keep(x, layer)

    def _keep(self, x: Tensor, layer: Layer | None = None) -> Tensor | None:
        """The same for ``x`` (batch, tokens, features), also flattened."""
        if layer is not None and layer.stacked and layer.expert and (sent := self._sent(layer.mixture, x)) is not None:
            self._in_expert[layer.expert] = (
                sent  # also for its later matrices, which get the same tokens in the same order
            )
        routed = self._in_expert.get(layer.expert) if layer is not None else None
        if routed is not None and routed.numel() == x.shape[:-1].numel():
            return routed
        if layer is not None and layer.stacked and layer.expert:
            # Tokens that are not sent to it are zero or missing.
            there = (x != 0).any(dim=-1)
            counted = self._own_keep(x, layer)
            return there if counted is None else there * counted.to(there.device)
        return self._own_keep(x, layer)

    def _own_keep(self, x: Tensor, layer: Layer | None) -> Tensor | None:
        """As :meth:`_keep`, for an input that no router has split."""
        foreign = any(x is other for other in self._others)
        real = self._real(x, layer, foreign)
        chosen = None if foreign else _fitting(self._chosen, x)
        if chosen is not None and layer is None:
            chosen = chosen.bool()  # the input of a mixture: tokens of experts have no weights
        if chosen is None or real is None:
            return real if chosen is None else chosen
        return chosen * real.to(chosen.device)

    def _real(self, x: Tensor, layer: Layer | None, foreign: bool) -> Tensor | None:
        if foreign and self._own.attends:
            return _fitting(self._own.others, x)
        own = None if foreign else self._own.of(x, layer.module if layer is not None else "")
        if own is not None or self._sequence is None:
            return own
        masks = self._masks[self._batch]
        wanted = "encoder" if foreign else self._sequence
        return _fitting(masks.decoder if wanted == "decoder" else masks.encoder, x)


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """``mask`` (batch, tokens) in the leading shape of ``x``; None if it belongs to another sequence."""
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return None
    return mask.reshape(x.shape[:-1]).to(x.device)

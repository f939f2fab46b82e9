"""Gathers the statistics of a mixture's experts on all tokens, for experts that the router sends few tokens to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.carried import packed, unpacked
from ecoflap.model.experts import router_of
from ecoflap.model.parts import Layer
from ecoflap.model.slices import slice_name
from ecoflap.model.trace import tensors_in
from ecoflap.statistics.gather import Gatherer
from ecoflap.statistics.real_tokens import RoutedTokens
from ecoflap.statistics.turned_router import TurnedRouter


class EveryToken(Gatherer):
    """As :class:`~ecoflap.statistics.gather.Gatherer`, but each layer of an expert receives all real tokens.

    Just before a mixture runs, each expert is run on all tokens that enter the mixture. This works for

    - a module of stacked experts that takes the router's choice as an argument, as in transformers' interface;
    - a module that multiplies by all experts at once: it receives (experts · tokens, features), with zero rows for the
      tokens that are not sent to an expert (Llama 4). Each expert then gets the rows of all experts, scaled by the
      router;
    - experts that are modules of their own and receive copies of the mixture's tokens;
    - a router that is one linear layer with one logit per expert (JetMoE): the block is run once for each expert, with
      that expert's logit made the highest.

    Layers of other mixtures get no statistics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running = False
        self._tokens: Tensor | None = None  # the tokens that the experts are run on
        self._entered: dict[str, RoutedTokens] = {}  # tokens of the current call, by path of the mixture
        self._seen_to_copy: set[str] = set()
        self._only = "", ""  # mixture and expert, if only that expert's inputs count now
        self._at_once: set[str] = set()  # mixtures that may multiply by all experts at once
        self._seen_at_once: set[str] = set()
        self._turned: dict[str, TurnedRouter] = {}  # by path of the mixture

    def _watch_mixtures(self) -> None:
        experts: dict[str, dict[str, None]] = {}
        for layer in self._block.layers:
            experts.setdefault(layer.mixture, {})[layer.expert] = None
        for path, members in experts.items():
            module = self._model.get_submodule(path)
            choosing = next((place for place in (path, path.rpartition(".")[0]) if self._takes_choice(place)), None)
            if choosing is not None:
                numbers = [int(expert[len(path) + 1 : -1]) for expert in members]
                self._watch(choosing, partial(self._run, path, partial(self._run_chosen, path, numbers)))
            elif any(layer.stacked for layer in self._block.layers if layer.mixture == path):
                takes_tokens = len(inspect.signature(type(module).forward).parameters) == 2  # self and the tokens
                if takes_tokens and (count := _count(module)):
                    self._at_once.add(path)
                    self._watch(path, partial(self._run_at_once, count))
                else:
                    self._turn_router(path, [int(expert[len(path) + 1 : -1]) for expert in members])
            elif isinstance(module, nn.ModuleList | nn.ModuleDict):
                called = getattr(module.forward, "__name__", "") != "_forward_unimplemented"
                alone = partial(_each, [self._model.get_submodule(expert) for expert in members])
                self._watch(path if called else path.rpartition(".")[0], partial(self._run, path, alone))
                for name, _ in module.named_children():
                    self._watch(f"{path}.{name}", partial(self._compare, path))

    def _run(self, path: str, experts: Callable[..., None], module: nn.Module, args: Any, kwargs: Any) -> None:
        """Run the experts on all tokens of a mixture, just before its forward."""
        for x in tensors_in((args, kwargs))[:1]:
            keep = self._keep(x)
            flat = x.reshape(-1, x.shape[-1])
            if isinstance(self._model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
                self._entered[path] = RoutedTokens(x, torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device))
            tokens = flat if keep is None else flat[keep.reshape(-1)]
            if len(tokens):
                self._running, self._tokens = True, tokens
                try:
                    experts(module, tokens)
                finally:
                    self._running, self._tokens = False, None

    def _takes_choice(self, path: str) -> bool:
        """Whether a module takes the tokens, the indices of their experts, and the weights of these."""
        module = self._model.get_submodule(path)
        names = list(inspect.signature(type(module).forward).parameters)[1:4]
        return _in_interface(module) or names == ["hidden_states", "top_k_index", "top_k_weights"]

    def _run_chosen(self, path: str, numbers: Sequence[int], module: nn.Module, tokens: Tensor) -> None:
        """Run these experts one by one. Some modules need two experts a token: the second one's inputs are ignored."""
        for number in numbers:
            choices = [number] if _in_interface(module) else [number, number + 1 if number == 0 else number - 1]
            self._only = path, slice_name(path, number)
            try:
                choice = torch.tensor([choices] * len(tokens), device=tokens.device)
                module.forward(tokens, choice, torch.ones_like(choice, dtype=tokens.dtype))
            finally:
                self._only = "", ""

    def _run_at_once(self, experts: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """As :meth:`_run`, of a module that multiplies (experts, tokens, features) by all experts at once."""
        for x in tensors_in((args, kwargs))[:1]:
            if x.dim() != 2 or len(x) % experts:
                continue
            each = x.view(experts, -1, x.shape[1])
            sent = (each != 0).any(dim=-1)
            keep = self._own_keep(each[0], None)
            tokens = each[sent if keep is None else sent & keep.to(sent.device)]
            if len(tokens):
                self._running, self._tokens = True, tokens
                try:
                    module.forward(tokens.repeat(experts, 1))
                finally:
                    self._running, self._tokens = False, None

    def _turn_router(self, path: str, numbers: Sequence[int]) -> None:
        layers = [layer for layer in self._block.layers if layer.mixture == path]
        parameter = self._model.get_parameter(layers[0].parameter)
        router = router_of(self._model, path, len(parameter)) if parameter.dim() == 3 else None
        if router is None:
            return
        self._turned[path] = TurnedRouter(self._model.get_submodule(router))
        if self._sequence is not None:
            self._watch_experts(layers)
        self._watch(self._block.name, partial(self._run_turned, path, numbers))

    def _run_turned(self, path: str, numbers: Sequence[int], block: nn.Module, args: Any, kwargs: Any) -> None:
        """Run a block once for each of these experts, which gets all tokens of the mixture, just before its own run."""
        for number in numbers:
            self._only = path, slice_name(path, number)
            self._routed.pop(path, None)
            self._fed.clear()  # no other expert shares this one's inputs
            self._running = True
            try:
                given = unpacked(*packed(args, kwargs))  # copies, so that the block's own run sees no change
                with self._turned[path].to(number):
                    block.forward(*given[0], **given[1])
            finally:
                self._running, self._only = False, ("", "")

    def _compare(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note, just before an expert runs, whether its inputs are copies of some of the mixture's tokens.

        If a module of the list receives all tokens, there is no router (Zamba 2's adapters, one for each block).
        """
        if not self._running and path in self._entered:
            for x in tensors_in((args, kwargs))[:1]:
                fewer = x.shape[:-1].numel() < len(self._entered[path])
                if fewer and self._entered[path].real_among(x) is not None:
                    self._seen_to_copy.add(path)

    def _feed(self, layer: Layer, x: Tensor) -> None:
        if self._only[0] and self._only != (layer.mixture, layer.expert):
            return
        if self._running:  # the first matrix of every expert receives the same input, which is gathered once
            same = self._tokens is not None and x.shape == self._tokens.shape and torch.equal(x, self._tokens)
            if same:
                self._seen_at_once.add(layer.mixture)
            super()._feed(layer, self._tokens if same and self._tokens is not None else x)

    def _counted(self, x: Tensor, layer: Layer) -> Tensor | None:
        if layer.mixture in self._turned:
            self._turned[layer.mixture].note(x.shape[:-1].numel())
            return self._keep(x, layer)
        return None  # the tokens are without padding already

    def check(self) -> None:
        """As in the base class; also drops the statistics of mixtures whose experts did not get the right tokens."""
        super().check()
        for layer in self._block.layers:
            path = layer.mixture
            if not layer.stacked:
                right = path in self._seen_to_copy
            elif path in self._turned:
                right = self._turned[path].obeyed
            else:
                right = path not in self._at_once or path in self._seen_at_once
            if not right:
                self.release(layer)


def _in_interface(module: nn.Module) -> bool:
    """Whether a module has transformers' interface for experts."""
    return all(isinstance(getattr(module, name, None), bool) for name in ("is_transposed", "has_gate"))


def _each(experts: Sequence[nn.Module], module: nn.Module, tokens: Tensor) -> None:
    for expert in experts:
        expert(tokens)


def _count(module: nn.Module) -> int:
    """The number of experts that a module stacks; 0 if it has no stack."""
    return min((len(one) for one in module.parameters(recurse=False) if one.dim() == 3), default=0)

"""What the experts of a mixture would receive if each token that enters it were sent to them: what few tokens lack."""

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
    """As :class:`~ecoflap.statistics.gather.Gatherer`, for layers of experts: on all real tokens of their mixture.

    Just before a mixture runs, each of the experts is run on all tokens that enter it. That is possible

    - where a module of stacked experts takes the router's choice as an argument, as in transformers' interface;
    - where one multiplies by all of its experts at once and receives (experts · tokens, features), in which the rows
      that a token is not sent to are zeros (Llama 4): all tokens are those of all experts together, scaled as the
      router scaled them;
    - where experts are modules that receive copies of the mixture's own tokens;
    - where one linear layer gives a number to each expert, and an expert gets all tokens if its number is made the
      highest (JetMoE): the block is run once for each expert with its router turned to that one.

    The layers of others have no statistics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running = False
        self._tokens: Tensor | None = None  # on which experts are run
        self._entered: dict[str, RoutedTokens] = {}  # by list of experts, in this call of its owner
        self._seen_to_copy: set[str] = set()
        self._only = "", ""  # a mixture, and the one of its experts that is fed
        self._at_once: set[str] = set()  # mixtures that may multiply by all experts at once
        self._seen_at_once: set[str] = set()
        self._turned: dict[str, TurnedRouter] = {}  # by mixture that is run so

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
                takes_tokens = len(inspect.signature(type(module).forward).parameters) == 2  # itself, and the tokens
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
        """Just before a mixture's own forward: its experts, on all that enters it."""
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
        """Whether a module takes tokens, the experts chosen for each, and the shares of these."""
        module = self._model.get_submodule(path)
        names = list(inspect.signature(type(module).forward).parameters)[1:4]
        return _in_interface(module) or names == ["hidden_states", "top_k_index", "top_k_weights"]

    def _run_chosen(self, path: str, numbers: Sequence[int], module: nn.Module, tokens: Tensor) -> None:
        """Run these experts of a module one by one. Some code asks for two choices a token: the second is not fed."""
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
        """Just before a block runs: it is run once for each of these experts, which gets all tokens of the mixture."""
        for number in numbers:
            self._only = path, slice_name(path, number)
            self._routed.pop(path, None)
            self._fed.clear()  # what this expert receives is no other's
            self._running = True
            try:
                given = unpacked(*packed(args, kwargs))  # what it leaves behind is no part of the block's own run
                with self._turned[path].to(number):
                    block.forward(*given[0], **given[1])
            finally:
                self._running, self._only = False, ("", "")

    def _compare(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Just before an expert runs on what its router sends: whether these are some of the tokens that entered.

        If all enter each module of a list that runs, there is no router (Zamba 2's adapters, one for each block).
        """
        if not self._running and path in self._entered:
            for x in tensors_in((args, kwargs))[:1]:
                fewer = x.shape[:-1].numel() < len(self._entered[path])
                if fewer and self._entered[path].real_among(x) is not None:
                    self._seen_to_copy.add(path)

    def _feed(self, layer: Layer, x: Tensor) -> None:
        if self._only[0] and self._only != (layer.mixture, layer.expert):
            return
        if self._running:  # what every expert's first matrix receives is the same, and gathered once
            same = self._tokens is not None and x.shape == self._tokens.shape and torch.equal(x, self._tokens)
            if same:
                self._seen_at_once.add(layer.mixture)
            super()._feed(layer, self._tokens if same and self._tokens is not None else x)

    def _counted(self, x: Tensor, layer: Layer) -> Tensor | None:
        if layer.mixture in self._turned:
            self._turned[layer.mixture].note(x.shape[:-1].numel())
            return self._keep(x, layer)
        return None  # padding is out already

    def check(self) -> None:
        """As of the base; mixtures whose experts get other tokens than those that enter are forgotten."""
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
    """Whether it is a module of transformers' interface for experts."""
    return all(isinstance(getattr(module, name, None), bool) for name in ("is_transposed", "has_gate"))


def _each(experts: Sequence[nn.Module], module: nn.Module, tokens: Tensor) -> None:
    for expert in experts:
        expert(tokens)


def _count(module: nn.Module) -> int:
    """How many experts a module stacks; 0 if it has no stack."""
    return min((len(one) for one in module.parameters(recurse=False) if one.dim() == 3), default=0)

"""Handles the matrices of ``nn.MultiheadAttention``, which has q, k and v in one parameter and calls no layers.

Its ``in_proj_weight`` (3·features, features) contains the matrices of q, k and v: the layers ``…in_proj_weight[0]`` to
``[2]``. Its ``out_proj`` is a linear layer, but one function of torch multiplies by its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.model.patching import Forward, forward_replaced, swapped

IN = "in_proj_weight"
OUT = "out_proj.weight"
Seen = Callable[[Tensor], None]


def is_packed(module: nn.Module) -> bool:
    """Whether it is such a module with q, k and v of the same width."""
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


def packed_around(model: nn.Module, layer: str) -> str | None:
    """Path of the packed attention that contains the layer of this name; None if there is none."""
    for leaf in (OUT, *(f"{IN}[{number}]" for number in range(3))):
        path = layer.removesuffix(f".{leaf}")
        if path != layer and is_packed(model.get_submodule(path)):
            return path
    return None


@contextmanager
def attention_inputs_seen(model: nn.Module, seen: Mapping[str, Mapping[str, Seen]]) -> Iterator[None]:
    """Context that reports the inputs (batch, tokens, features) of the matrices of packed attention before their use.

    The input of ``out_proj`` is the module's output with the unit matrix as ``out_proj``: the module runs twice.

    Args:
        seen: by path of a module: the function to call with the input of each matrix, by ``in_proj_weight[0]`` to
            ``[2]`` and ``out_proj.weight``.
    """
    with ExitStack() as hooks:
        for path, of_each in seen.items():
            module = model.get_submodule(path)
            hooks.enter_context(forward_replaced(module, partial(_watching, module, of_each)))
            # With a hook, torch's encoder layers call the module, not one function for the whole layer.
            hooks.callback(module.register_forward_pre_hook(lambda *_: None).remove)
        yield


def _watching(module: Any, seen: Mapping[str, Seen], forward: Forward) -> Forward:
    def run(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        shown: dict[int, Tensor] = {}  # one tensor object for each input, so that equal inputs are recognised
        for number, x in enumerate((query, key, value)):
            if id(x) not in shown:
                shown[id(x)] = _by_batch(module, x)
            if (note := seen.get(f"{IN}[{number}]")) is not None:
                note(shown[id(x)])
        if (note := seen.get(OUT)) is not None:
            unit = torch.eye(module.embed_dim, dtype=module.out_proj.weight.dtype, device=module.out_proj.weight.device)
            with _without_bias(module.out_proj), swapped(module, ["out_proj"], unit):
                attended = forward(query, key, value, *args, **kwargs)[0]
            note(_by_batch(module, attended))
        return forward(query, key, value, *args, **kwargs)

    return run


@contextmanager
def _without_bias(layer: nn.Module) -> Iterator[None]:
    bias = layer._parameters["bias"]
    if bias is not None:
        layer._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        yield
    finally:
        layer._parameters["bias"] = bias


def _by_batch(module: Any, x: Tensor) -> Tensor:
    return x if module.batch_first or x.dim() < 3 else x.transpose(0, 1)


@contextmanager
def projections_swapped(model: nn.Module, paths: Iterable[str], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which packed attention uses other matrices of q, k and v, also in forwards that a backward repeats.

    Args:
        paths: of the modules.
        tensors: replacements by name of the layer; looked up at each call. Tangent and graph are kept.
    """

    def wrap(path: str, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            others = {n: tensors[name] for n in range(3) if (name := f"{path}.{IN}[{n}]") in tensors}
            if not others:
                return forward(*args, **kwargs)
            parts = model.get_parameter(f"{path}.{IN}").chunk(3)
            whole = torch.cat([others.get(number, part) for number, part in enumerate(parts)])
            with swapped(model, [path], whole, IN):
                return forward(*args, **kwargs)

        return run

    with ExitStack() as wraps:
        for path in paths:
            module = model.get_submodule(path)
            wraps.enter_context(forward_replaced(module, partial(wrap, path)))
            wraps.callback(module.register_forward_pre_hook(lambda *_: None).remove)
        yield

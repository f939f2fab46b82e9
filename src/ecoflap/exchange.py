"""What workers tell each other, as bytes: JSON for the structure, safetensors for the tensors in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_TENSOR = "\0tensor"  # the one key of a dict that stands for a tensor
_LENGTH = 8  # bytes of the number in front, the JSON's length


def pack(tree: Any) -> bytes:
    """A tree of dicts with string keys, lists, tuples, strings, numbers, None and tensors as bytes."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(tree, tensors)).encode()
    # Cloned: safetensors refuses tensors that share their memory.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return len(text).to_bytes(_LENGTH, "big") + text + (save_tensors(kept) if kept else b"")


def unpack(data: bytes) -> Any:
    """What :func:`pack` was given; tuples are lists, tensors lie on the CPU."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
    return _whole(json.loads(data[_LENGTH:end]), load_tensors(data[end:]) if len(data) > end else {})


def _plain(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node
        return {_TENSOR: name}
    if isinstance(node, Mapping):
        if not all(isinstance(key, str) for key in node):
            raise TypeError("keys of what workers tell each other are strings")
        return {key: _plain(value, tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value, tensors) for value in node]
    return node


def _whole(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict):
        return tensors[node[_TENSOR]] if _TENSOR in node else {key: _whole(v, tensors) for key, v in node.items()}
    return [_whole(value, tensors) for value in node] if isinstance(node, list) else node

"""Hashes all weights of a model: shows whether two models are bit-identical, and whether a run belongs to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ecoflap.model.offload import Offloaded

_CHUNK = 1 << 24  # elements moved to the CPU at a time, to save memory


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) over name, dtype, shape and bytes of every entry of the state dict, sorted by name.

    A tied weight counts once, under its first name. The result does not depend on device, memory layout or the order of
    registration. Offloaded weights are read one by one.
    """
    digest, weights = hashlib.sha256(), Offloaded(model)
    for name, tensor in _distinct(model):
        header = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0"
        digest.update(header.encode())
        flat = weights.read(tensor).reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            chunk = flat[start : start + _CHUNK].cpu().contiguous()
            digest.update(chunk.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _distinct(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Entries of the state dict by name, each storage view once."""
    seen: set[tuple[object, ...]] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        place = id(tensor) if tensor.is_meta else tensor.data_ptr()  # an offloaded weight has one placeholder
        view = (tensor.device, place, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and view in seen:
            continue
        seen.add(view)
        yield name, tensor

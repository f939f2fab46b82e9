"""Noise as a function of (seed, layer, batch, draw), so that no score depends on order, workers or resume."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def noise_key(seed: int, layer: str, batch: int, draw: int) -> int:
    """A 63-bit generator seed that is unique to the four of them (BLAKE2b of their text)."""
    text = f"{seed}\x00{layer}\x00{batch}\x00{draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def noise(shape: torch.Size, device: torch.device, *, seed: int, layer: str, batch: int, draw: int) -> Tensor:
    """Standard normal fp32 noise of ``shape`` for one probe, from a generator of its own on ``device``.

    The global generators are neither read nor moved. CPU and CUDA generators give different numbers for one key.
    """
    generator = torch.Generator(device=device).manual_seed(noise_key(seed, layer, batch, draw))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

"""Chooses the dtype that a half-precision model computes in: its own, or fp32 on a CPU that is slow in half precision.

Without hardware support, a product in bfloat16 or float16 takes several times as long as in fp32, and converting a
block's weights for its forward costs little in comparison. Results are then those of the model converted to fp32.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from ecoflap.errors import InvalidOption
from ecoflap.model.block_lists import block_lists
from ecoflap.model.files import PACKED
from ecoflap.model.offload import home_of
from ecoflap.model.precision import computing_in_fp32, half_blocks

AUTO, NATIVE, FLOAT32 = "auto", "native", "float32"
SLOW = 1.5  # ratio to the time of an fp32 product above which half precision counts as slow
_HALF = (torch.bfloat16, torch.float16)

_log = logging.getLogger("ecoflap")


def settled(asked: str, model: nn.Module, trial: Callable[[], object] | None = None) -> str:
    """``native`` or ``float32``: as ``asked``; for ``auto`` the faster one on the model's device.

    Args:
        trial: runs the model once; ``auto`` does not choose fp32 if that fails (a module reads weights of a block
            without running it).

    Raises:
        InvalidOption: ``asked`` is no such choice.
    """
    if asked not in (AUTO, NATIVE, FLOAT32):
        raise InvalidOption(f"compute_dtype '{asked}' is not one of {AUTO}, {NATIVE}, {FLOAT32}")
    if asked != AUTO:
        return asked
    if home_of(model).type != "cpu" or getattr(model, "quantization_method", None) == PACKED:
        return NATIVE  # packed layers have their own kernels
    kinds = {parameter.dtype for parameter in model.parameters()}
    if not any(half_is_slow(kind) for kind in _HALF if kind in kinds):
        return NATIVE
    if trial is not None:
        try:
            with computing_in(model, FLOAT32):
                trial()
        except Exception as error:  # a fault of the data is raised again by the next run
            _log.info("%s can't be computed in fp32 block by block: %s", type(model).__name__, error)
            return NATIVE
    return FLOAT32


@contextmanager
def computing_in(model: nn.Module, dtype: str) -> Iterator[None]:
    """Context in which the model computes in its own dtype (``native``) or in fp32, block by block.

    In fp32 the additional memory is one block's fp32 weights and those outside of all blocks (embeddings, head); see
    :func:`ecoflap.model.precision.computing_in_fp32`.

    Args:
        dtype: of :func:`settled`.
    """
    if dtype != FLOAT32:
        yield
        return
    blocks = [path for found in block_lists(model, None) for path in found.elements]
    with computing_in_fp32(model, half_blocks(model, blocks, offloaded=True)):
        yield


@cache
def half_is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU is much slower in ``dtype`` than in fp32: by its instruction sets, or else by a measurement."""
    known = _known(dtype)
    return product_ratio(dtype) > SLOW if known is None else known


def _known(dtype: torch.dtype) -> bool | None:
    """The answer by the CPU's instruction sets; None if they leave it open."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    half = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        kernels = bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")())
        units = torch.cpu._is_avx512_bf16_supported() if half == "bf16" else torch.cpu._is_amx_fp16_supported()
    except (AttributeError, RuntimeError):  # another version of torch, or one without oneDNN
        return None
    if not kernels:
        return True
    return False if units else None


def product_ratio(dtype: torch.dtype, rows: int = 256, size: int = 512) -> float:
    """Time of a product in ``dtype`` divided by that in fp32; the minimum of a few alternating measurements each."""
    x, weight = torch.ones(rows, size), torch.ones(size, size)
    pairs = {dtype: (x.to(dtype), weight.to(dtype)), torch.float32: (x, weight)}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(4):
        for kind, (left, right) in pairs.items():
            begin = time.perf_counter()
            nn.functional.linear(left, right)
            best[kind] = min(best[kind], time.perf_counter() - begin)
    return best[dtype] / best[torch.float32]

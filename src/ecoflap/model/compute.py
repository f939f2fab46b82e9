"""Which numbers a half-precision model computes with: its own, or fp32 where the CPU has no units for them.

Without such units a product in bfloat16 or float16 takes several times as long as one in fp32, and converting a block's
weights for the time of its forward costs little beside it. Results are then those of the model converted to fp32.
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
SLOW = 1.5  # times an fp32 product's time from which half precision does not pay
_HALF = (torch.bfloat16, torch.float16)

_log = logging.getLogger("ecoflap")


def settled(asked: str, model: nn.Module, trial: Callable[[], object] | None = None) -> str:
    """``native`` or ``float32``: what ``asked`` says, or where it is ``auto`` what is fast on the model's device.

    Args:
        trial: runs the model once; ``auto`` does not take fp32 where that fails (a part of the model reads weights of a
            block without running it).

    Raises:
        InvalidOption: ``asked`` is no such choice.
    """
    if asked not in (AUTO, NATIVE, FLOAT32):
        raise InvalidOption(f"compute_dtype '{asked}' is not one of {AUTO}, {NATIVE}, {FLOAT32}")
    if asked != AUTO:
        return asked
    if home_of(model).type != "cpu" or getattr(model, "quantization_method", None) == PACKED:
        return NATIVE  # packed layers have kernels of their own
    kinds = {parameter.dtype for parameter in model.parameters()}
    if not any(half_is_slow(kind) for kind in _HALF if kind in kinds):
        return NATIVE
    if trial is not None:
        try:
            with computing_in(model, FLOAT32):
                trial()
        except Exception as error:  # where the data is at fault, it is told when the model is run for itself
            _log.info("%s can't be computed in fp32 block by block: %s", type(model).__name__, error)
            return NATIVE
    return FLOAT32


@contextmanager
def computing_in(model: nn.Module, dtype: str) -> Iterator[None]:
    """The model computes with its own numbers (``native``) or in fp32, block by block; its weights stay as they are.

    In fp32 the memory above the model is one block's fp32 weights, and what lies outside of all blocks (embeddings,
    head) once more; see :func:`ecoflap.model.precision.computing_in_fp32`.

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
    """Whether this CPU computes in ``dtype`` much slower than in fp32: known by its units, in doubt by a product."""
    known = _known(dtype)
    return product_ratio(dtype) > SLOW if known is None else known


def _known(dtype: torch.dtype) -> bool | None:
    """What the CPU's units say; None where they leave it open."""
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
    """Time of a product in ``dtype`` over that of the same one in fp32, the shortest of a few each, taken in turn."""
    x, weight = torch.ones(rows, size), torch.ones(size, size)
    pairs = {dtype: (x.to(dtype), weight.to(dtype)), torch.float32: (x, weight)}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(4):
        for kind, (left, right) in pairs.items():
            begin = time.perf_counter()
            nn.functional.linear(left, right)
            best[kind] = min(best[kind], time.perf_counter() - begin)
    return best[dtype] / best[torch.float32]

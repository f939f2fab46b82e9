"""Loads the compiled kernels, if the package has them, and registers them with torch."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

OFF = "ECOFLAP_NO_KERNELS"  # environment variable: don't use kernels
CHOICE = "ECOFLAP_ISA"  # environment variable: avx512, avx2, neon or scalar instead of the best one
_LIBRARY = Path(__file__).with_name("lib") / "ecoflap_kernels.so"  # no module: Python must not find it


@cache
def load() -> ctypes.CDLL | None:
    """The library with its operators registered; None if there is none, or torch is older than 2.10."""
    if os.environ.get(OFF) or not _LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        register = library.ecoflap_register
        register.argtypes = [ctypes.c_void_p]
        library.ecoflap_isa.restype = ctypes.c_char_p
        library.ecoflap_most_tokens.restype = ctypes.c_int64
        library.ecoflap_choose.argtypes = [ctypes.c_char_p]
        if choice := os.environ.get(CHOICE):
            library.ecoflap_choose(choice.encode())
        return None if register(_torch_library()._handle) else library
    except (OSError, AttributeError):  # built for another machine or by another version
        return None


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", "neon", "scalar", or "torch" without kernels."""
    library = load()
    return "torch" if library is None else str(library.ecoflap_isa().decode())


def choose(name: str) -> bool:
    """Use another instruction set from now on, for tests; False if this processor or build lacks it."""
    library = load()
    return library is not None and library.ecoflap_choose(name.encode()) == 0


def most_tokens() -> int:
    """Number of tokens up to which kernels multiply without unpacking; 0 without kernels."""
    library = load()
    return 0 if library is None else int(library.ecoflap_most_tokens())


def bf16_products() -> bool:
    """Whether dense bfloat16 products are fast on the processor; otherwise float32 is faster."""
    library = load()
    return library is not None and bool(library.ecoflap_bf16_products())


def _torch_library() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(next(path for path in folder.glob("libtorch_cpu.*") if path.suffix in (".so", ".dylib"))))

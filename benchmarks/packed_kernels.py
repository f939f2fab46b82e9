"""Packed products against dense ones, as ratios of medians of interleaved passes over weights that no cache holds.

    python benchmarks/packed_kernels.py [--isa avx512 avx2] [--threads 1 2] [--tokens 1] [--shapes 4096x4096 2048x5632]

Each pass multiplies by every matrix of a set of about --bytes once, so that weights come from memory, as they do when
a language model writes a token. "dense" is the fastest of F.linear, torch.mv and a kernel of our own (dense_bf16.cpp)
that reads rows as the packed kernels do.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from ecoflap.model.packed import kernels
from ecoflap.model.packed.format import PackedWeight, pack_weight
from ecoflap.model.packed.ops import multiply

Pass = Callable[[], None]


def dense_kernels() -> ctypes.CDLL:
    """The dense comparison, compiled; torch is imported before, so that both use one OpenMP."""
    target = Path(tempfile.mkdtemp()) / "dense.so"
    source = Path(__file__).with_name("dense_bf16.cpp")
    subprocess.run(
        ["g++", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wno-maybe-uninitialized", str(source), "-o", str(target)],
        check=True,
    )
    return ctypes.CDLL(str(target))


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(rows, columns) * 0.02
    weight[torch.rand(rows, columns) < sparsity] = 0
    return weight.to(dtype)


def copies(packed: PackedWeight, count: int, bias: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    none = torch.empty(0)
    parts = (packed.compressed, packed.bitmask, packed.row_offsets, none if packed.scales is None else packed.scales)
    return [(*(part.clone() for part in parts), bias) for _ in range(count)]


def packed_pass(x: torch.Tensor, weights: list[tuple[torch.Tensor, ...]], group_size: int) -> Pass:
    return lambda: [multiply(x, *parts, group_size) for parts in weights] and None


def measure(passes: dict[str, Pass], counts: dict[str, int], repeats: int) -> dict[str, list[float]]:
    """Seconds a matrix of each pass, interleaved; a first round warms up.

    One thread is measured by its processor time, which other work on the machine changes less.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            start = clock()
            run()
            if turn:
                times[name].append((clock() - start) / counts[name])
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


@torch.inference_mode()
def compare(
    shape: tuple[int, int], tokens: int, isa: str, threads: int, args: argparse.Namespace, library: ctypes.CDLL
) -> list[dict[str, object]]:
    rows, columns = shape
    torch.set_num_threads(threads)
    if not kernels.choose(isa):
        return []
    count = max(2, int(args.bytes / (rows * columns * 2)))
    dense = [sparse(rows, columns, 0.0, torch.bfloat16) for _ in range(1)]
    dense += [dense[0].clone() for _ in range(count - 1)]
    x = torch.randn(tokens, columns).bfloat16()
    vector, y = x[0].contiguous(), torch.empty(rows)
    reference: dict[str, Pass] = {"F.linear": lambda: [linear(x, w) for w in dense] and None}
    if tokens == 1:
        given = vector if isa == "avx512" else vector.float()
        own = getattr(library, f"dense_{isa}", None) if isa != "scalar" else None
        reference["mv"] = lambda: [torch.mv(w, vector) for w in dense] and None
        if own is not None:
            call = [
                (ctypes.c_void_p(w.data_ptr()), ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(y.data_ptr()))
                for w in dense
            ]
            reference["own"] = lambda: (
                [own(*c, ctypes.c_int64(rows), ctypes.c_int64(columns), threads) for c in call] and None
            )
    found = []
    none = torch.empty(0)
    for sparsity in args.sparsity:
        weight = sparse(rows, columns, sparsity, torch.bfloat16)
        made = {"packed": pack_weight(weight), "int8": pack_weight(weight, "int8"), "int4": pack_weight(weight, "int4")}
        sets = {name: packed_pass(x, copies(packed, count, none), packed.group_size) for name, packed in made.items()}
        passes = {**reference, **sets}
        times = measure(passes, dict.fromkeys(passes, count), args.repeats)
        best = min(reference, key=lambda name: statistics.median(times[name]))
        row = {
            "isa": isa, "threads": threads, "shape": f"{rows}x{columns}", "tokens": tokens, "sparsity": sparsity,
            **{f"{name}_bytes": round(packed.nbytes / weight.nbytes, 4) for name, packed in made.items()},
            "best_dense": best, "dense_ms": round(1e3 * statistics.median(times[best]), 3),
            **{f"{name}_ms": round(1e3 * statistics.median(times[name]), 3) for name in made},
            "to_best": round(ratio(times[best], times["packed"]), 2),
            "to_linear": round(ratio(times["F.linear"], times["packed"]), 2),
            "int8_to_best": round(ratio(times[best], times["int8"]), 2),
            "int4_to_best": round(ratio(times[best], times["int4"]), 2),
        }  # fmt: skip
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=["avx512", "avx2"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "2048x5632"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--bytes", type=float, default=1.2e9, help="of the dense set; more than the caches hold")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    library = dense_kernels()
    rows = []
    for shape in args.shapes:
        for tokens in args.tokens:
            for isa in args.isa:
                for threads in args.threads:
                    size = tuple(int(side) for side in shape.split("x"))
                    rows += compare((size[0], size[1]), tokens, isa, threads, args, library)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

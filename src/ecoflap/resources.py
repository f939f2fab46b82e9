"""Wall time and peak memory of a stage, sampled while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

INTERVAL = 0.02  # seconds between two looks at the resident memory


@dataclass(frozen=True)
class Usage:
    """What one stage took. Memory is that of the whole process at its peak (resident, and CUDA where there is one)."""

    name: str
    seconds: float
    peak_memory_bytes: int
    peak_cuda_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def measured(name: str, into: list[Usage]) -> Iterator[None]:
    """Append the stage's :class:`Usage` to ``into`` at exit; nothing is appended if it raises."""
    process = psutil.Process()
    peak = process.memory_info().rss
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch, daemon=True, name=f"memory of {name}")
    watcher.start()
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begin
        stop.set()
        watcher.join()
        peak = max(peak, process.memory_info().rss)
    into.append(Usage(name, seconds, peak, torch.cuda.max_memory_allocated() if cuda else None))

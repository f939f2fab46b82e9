"""What of the machine decides the last bits of a run: kept when it begins, and held to when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecoflap.files import read_sealed, write_sealed
from ecoflap.network.offload import home_of
from ecoflap.workers import ALONE, Workers

_log = logging.getLogger("ecoflap")


def machine(model: nn.Module) -> dict[str, Any]:
    """Threads of a CPU's sums, and the processors that the kernels are chosen for."""
    device = home_of(model)
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


@contextmanager
def as_it_began(path: Path, model: nn.Module, workers: Workers = ALONE) -> Iterator[None]:
    """A resumed run computes with as many threads as it began with, whatever this process was given.

    So do all workers. Another processor can't be made the same: that is told, and the run goes on.

    Args:
        path: where the run keeps what it began with; written, by the first worker, if it is not there.
    """
    now = machine(model)
    every = workers.gather(now)
    before = workers.told(lambda: read_sealed(path))
    if before is None:
        before = every[0]
        if workers.first:
            write_sealed(path, now)
    others = {f"{name} {before.get(name)} then, {one[name]} now": None for name in ("instructions", "GPU")
              for one in every if before.get(name) != one[name]}  # fmt: skip
    if others:
        _log.warning(
            "another machine (%s): the last bits may differ from those of an undisturbed run", "; ".join(others)
        )
    try:
        if before["threads"] != now["threads"]:
            _log.info("%d threads, as when the run began, not %d", before["threads"], now["threads"])
            torch.set_num_threads(before["threads"])
        yield
    finally:
        torch.set_num_threads(now["threads"])

"""Records what decides a run's numbers: digests of its input files, the machine, the samples, time and memory.

A run is not resumed if a file with the same name has another content.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from ecoflap.allocation import Allocation
from ecoflap.data.samples import SampleSet
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.model.offload import home_of
from ecoflap.model.parts import Anatomy
from ecoflap.pruning.walk import WalkResult
from ecoflap.run.evaluations import evaluations_of
from ecoflap.run.recipe import Recipe
from ecoflap.run.versions import versions
from ecoflap.statistics.routing import by_mixture
from ecoflap.support.files import read_sealed, write_sealed
from ecoflap.support.workers import ALONE, Workers

if TYPE_CHECKING:
    pass  # from Python 3.11 on; read by type checkers alone


def digests_of(recipe: Recipe) -> dict[str, str]:
    """Digests of the inputs beside model and calibration data: test data, scores, allocation, the user's objective."""
    named = {f"test data of {entry.name}": entry.test for entry in evaluations_of(recipe)}
    scores = recipe.importance if recipe.importance.endswith(".json") else None
    named |= {"allocation": recipe.allocation, "importance": scores, "pruned model": recipe.pruned}
    found = {what: digest for what, source in named.items() if source and (digest := source_digest(source))}
    module, colon, _ = str(recipe.objective).partition(":")
    spec = importlib.util.find_spec(module) if colon else None
    if spec is not None and spec.origin and (digest := source_digest(spec.origin)):
        found["objective"] = digest
    return found


def source_digest(source: str) -> str | None:
    """SHA-256 of a file's content, or of the names and sizes of all files in a folder.

    The name of a split after a colon is ignored. None if it is no local file or folder but an id of the Hub.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = Path(source.rpartition(":")[0]).expanduser()
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    if not path.is_dir() or path == Path():
        return None
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            digest.update(f"{entry.relative_to(path)}\0{entry.stat().st_size}\0".encode())
    return digest.hexdigest()


_log = logging.getLogger("ecoflap")


def machine(model: nn.Module) -> dict[str, Any]:
    """Number of CPU threads and kind of processor, which change the rounding of sums."""
    device = home_of(model)
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


@contextmanager
def threads_of_start(path: Path, model: nn.Module, workers: Workers = ALONE) -> Iterator[None]:
    """Context in which a resumed run, and all its workers, use the number of threads that the run began with.

    On another kind of processor there is only a warning.

    Args:
        path: the file with the machine that the run began on; the first worker writes it if it is missing.
    """
    now = machine(model)
    every = workers.gather(now)
    before = workers.from_first(lambda: read_sealed(path, dict[str, int | str | None]))
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


def experts_record(anatomy: Anatomy, walked: WalkResult) -> dict[str, Any]:
    """For a model with mixtures: ``experts``, the calibration tokens of each expert by mixture, and
    ``removed_experts``, those whose weights are all zero."""
    weights: dict[str, int] = {}
    zeros: dict[str, int] = {}
    rows = {row.name: row for row in walked.allocation.layers}
    for layer in anatomy.layers:
        if layer.expert and layer.name in rows:
            weights[layer.expert] = weights.get(layer.expert, 0) + layer.numel
            zeros[layer.expert] = zeros.get(layer.expert, 0) + rows[layer.name].zeros
    record: dict[str, Any] = {}
    if walked.tokens:
        record["experts"] = by_mixture(anatomy.layers, walked.tokens)
    if removed := [expert for expert, count in weights.items() if zeros[expert] == count]:
        record["removed_experts"] = removed
    return record


def warn_of_layers(anatomy: Anatomy, walked: WalkResult, *, recovered: bool) -> None:
    """Log the layers that no token reached, and the experts whose weights are all zero."""
    how = "not recovered" if recovered else "pruned without its own statistics"
    for name in walked.unreached:
        _log.warning("no calibration token reached %s: %s", name, how)
    for expert in experts_record(anatomy, walked).get("removed_experts", ()):
        _log.warning("%s: all weights of this expert are zero", expert)


def sparsity_summary(anatomy: Anatomy, allocation: Allocation) -> dict[str, Any]:
    """Achieved sparsity over the prunable weights, over all parameters, and per tower."""
    return sparsity_of(anatomy, {row.name: round((row.achieved or 0.0) * row.weights) for row in allocation.layers})


def sparsity_of(anatomy: Anatomy, zeros: Mapping[str, int]) -> dict[str, Any]:
    """The same from the number of zeros in each layer."""
    towers = {}
    for tower in anatomy.towers:
        count = sum(zeros[layer.name] for layer in tower.layers)
        towers[tower.name] = {
            "modality": tower.modality,
            "weights": tower.numel,
            "zeros": count,
            "sparsity": count / tower.numel,
        }
    total = sum(zeros.values())
    return {
        "prunable": total / anatomy.prunable_parameters,
        "model": total / anatomy.total_parameters,
        "prunable_parameters": anatomy.prunable_parameters,
        "model_parameters": anatomy.total_parameters,
        "towers": towers,
    }


def environment(checkpoint: Checkpoint) -> dict[str, Any]:
    """The machine and software that a run used."""
    device = home_of(checkpoint.model)
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "model_class": type(checkpoint.model).__name__,
    }


def calibration_record(
    sample_set: SampleSet | None, objective: str, window_length: int | None = None
) -> dict[str, Any] | None:
    """The source and indices of the samples, and the name of the loss."""
    if sample_set is None:
        return None
    return {
        "source": sample_set.source,
        "objective": objective,
        "columns": sample_set.columns,
        "skipped": sample_set.skipped,
        **({} if window_length is None else {"sequence_length": window_length}),
        **({"length_reason": sample_set.length_reason} if sample_set.length_reason else {}),
        "indices": list(sample_set.indices),
    }


INTERVAL = 0.02  # seconds between two readings of the resident memory


@dataclass(frozen=True)
class Usage:
    """Seconds and peak memory of one stage; memory is that of the whole process (resident, and CUDA if available)."""

    name: str
    seconds: float
    peak_memory_bytes: int
    peak_cuda_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def plus(self, other: Usage) -> Usage:
        """The usage of a stage that two processes did in turn: the sum of times, the higher of the peaks."""
        cuda = [peak for peak in (self.peak_cuda_bytes, other.peak_cuda_bytes) if peak is not None]
        return Usage(
            self.name,
            self.seconds + other.seconds,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
            max(cuda, default=None),
        )


def add_usage(usages: list[Usage], one: Usage) -> None:
    """Add ``one`` to the list; the entry of the same stage, from an interrupted run, is merged with it."""
    for place, known in enumerate(usages):
        if known.name == one.name:
            usages[place] = known.plus(one)
            return
    usages.append(one)


@contextmanager
def measured(name: str, into: list[Usage]) -> Iterator[None]:
    """Append the stage's :class:`Usage` to ``into`` at exit; nothing is appended if it raises."""
    process = psutil.Process()
    peak = process.memory_info().rss
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(INTERVAL):
            with suppress(OSError, psutil.Error):  # too many open files, say: the stage itself may still work
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
        with suppress(OSError, psutil.Error):
            peak = max(peak, process.memory_info().rss)
    into.append(Usage(name, seconds, peak, torch.cuda.max_memory_allocated() if cuda else None))

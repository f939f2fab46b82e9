"""Measures what packing gains on this machine: bytes, loading, time to the first token, tokens per second.

Every round runs each variant once, so that other load on the machine affects all alike; ratios are medians over the
rounds.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from ecoflap.errors import CheckpointError
from ecoflap.model.packed import kernels
from ecoflap.run.bench_models import DENSE, BenchOptions, Subject, embedded, of_folder, random_model
from ecoflap.run.evaluations import UNFIT
from ecoflap.support.progress import Progress, Silent
from ecoflap.support.temporary import TemporaryFolder
from ecoflap.support.text import first_line


def bench(packed: Path | None, options: BenchOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the packed model in the folder ``packed``; without one, the embedded model and a random 1 B LLM.

    Returns:
        ``format``, ``machine`` and ``models``, each with its ``variants`` (bytes, seconds to load) and ``speed``: for
        every number of threads, batch size and variant the seconds to the first token, tokens per second, and both as
        ratios to the dense model in bfloat16 (above 1 is better).

    Raises:
        CheckpointError: ``packed`` is no packed model, or can't generate text.
    """
    progress = progress or Silent()
    threads = torch.get_num_threads()
    found = []
    place = TemporaryFolder("ecoflap-bench-")
    try:
        makers = [partial(of_folder, packed)] if packed else [embedded, random_model]
        for make in makers:
            with _saying(packed):
                subject = make(place.path, options)
                found.append(_measured(subject, options, progress))
                del subject
    finally:
        place.remove()
        torch.set_num_threads(threads)
    machine = {"kernels": kernels.isa(), "processors": os.cpu_count(), "torch": torch.__version__}
    return {"format": 1, "machine": machine, "models": found}


@contextmanager
def _saying(packed: Path | None) -> Iterator[None]:
    """Context that turns other errors of the model into one line; transformers raises many kinds."""
    try:
        yield
    except CheckpointError as error:  # of the plain model that was made of it
        raise CheckpointError(re.sub(r"'[^']*/ecoflap-bench-[^']*'", f"'{packed}'", str(error))) from error
    except UNFIT as error:
        if packed is None:
            raise
        raise CheckpointError(
            f"the model in '{packed}' can't generate text ({type(error).__name__}: {first_line(error)}): look at its "
            "generation_config.json, tokenizer and processor; ECOFLAP_TRACEBACK=1 shows where"
        ) from error


def _measured(subject: Subject, options: BenchOptions, progress: Progress) -> dict[str, Any]:
    everything = torch.get_num_threads()
    counts = dict.fromkeys(count or everything for count in options.threads)
    cells = [(count, size) for count in counts for size in options.batch_sizes]
    speed = []
    with progress.stage(f"bench {subject.name}", len(cells) * (options.rounds + 1) * len(subject.variants)) as task:
        for count, size in cells:
            torch.set_num_threads(count)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in subject.variants}
            for turn in range(options.rounds + 1):
                for name, model in subject.variants.items():
                    once = _generate(model, subject.inputs(model, size), options.new_tokens, size)
                    if turn:  # the first round warms up
                        times[name].append(once)
                    task.advance(1, name)
            speed += [{"threads": count, "batch": size, **row} for row in _rows(times)]
    torch.set_num_threads(everything)
    variants = [
        {
            "variant": name,
            "resident_bytes": _resident(model),
            "stored_bytes": subject.stored.get(name),
            "load_seconds": subject.loading.get(name),
        }
        for name, model in subject.variants.items()
    ]
    return {"model": subject.name, "variants": variants, "speed": speed}


def _rows(times: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    rows = []
    for name, found in times.items():
        reference = times.get(DENSE, found)
        pairs = list(zip(reference, found, strict=True))
        rows.append(
            {
                "variant": name,
                "first_token_seconds": statistics.median(first for first, _ in found),
                "tokens_per_second": statistics.median(rate for _, rate in found),
                "first_token_ratio": statistics.median(dense[0] / own[0] for dense, own in pairs),
                "rate_ratio": statistics.median(own[1] / dense[1] for dense, own in pairs),
            }
        )
    return rows


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Records the time of each token's logits; changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


@torch.inference_mode()
def _generate(model: nn.Module, inputs: dict[str, Any], tokens: int, size: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it, summed over all rows."""
    clock = _Clock()
    start = time.perf_counter()
    model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1,
        logits_processor=LogitsProcessorList([clock]),
    )  # fmt: skip
    return clock.times[0] - start, size * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])


def _resident(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())

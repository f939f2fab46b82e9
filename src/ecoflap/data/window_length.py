"""Chooses the tokens in a window of plain text where the user says nothing: what model, machine and text allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ecoflap.data.model_facts import DEFAULT_LENGTH, max_length, text_config
from ecoflap.model.offload import home_of

CPU_LENGTH = 512  # default on a CPU: attention's time and memory grow with the square of the length
SHORTEST = 64  # a default window has at least so many tokens, if it costs windows
SHARE = 0.25  # of the memory that activations may take; the rest is for weights, statistics and other programs
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


@dataclass(frozen=True)
class WindowLength:
    """Tokens in a window, and the reason in a few words."""

    tokens: int
    reason: str


def default_length(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    windows: int,
    batch_size: int = 1,
    *,
    kept: bool = True,
    memory: int | None = None,
) -> WindowLength:
    """2,048 tokens (on a CPU 512), or the model's longest; then halved, not below 64, while one of two things holds.

    A forward of such windows would take more than a quarter of the memory (:func:`activation_bytes`); or the text gives
    fewer than ``windows`` windows.

    Args:
        tokens: of the text.
        batch_size: windows in a forward.
        kept: the inputs of a block are kept for all windows (calibration); else all logits of a batch (perplexity).
        memory: bytes of the machine; None for what it has. All of it counts, not what is free at the moment, so that
            the same command gives the same windows on one machine.
    """
    known = int(getattr(tokenizer, "model_max_length", 0) or 0)
    own = max_length(model) or (known if 2 <= known < 10**6 else None)  # tokenizers say 1e30 for "no limit"
    device = home_of(model)
    usual, where = (CPU_LENGTH, "on a CPU") if device.type == "cpu" else (DEFAULT_LENGTH, f"on {device.type}")
    if own is not None and own <= usual:
        length, reason = own, "the model's longest"
    else:
        length, reason = usual, f"the default {where}"
    memory = memory_of(device) if memory is None else memory
    while length // 2 >= SHORTEST:
        if activation_bytes(model, length, windows, batch_size, kept=kept) > SHARE * memory:
            reason = f"for {memory / 1e9:.1f} GB of memory"
        elif tokens // length < windows:
            reason = f"for {windows} windows of the text"
        else:
            break
        length //= 2
    return WindowLength(length, reason)


def activation_bytes(model: nn.Module, length: int, windows: int, batch_size: int, *, kept: bool) -> int:
    """About what windows of ``length`` tokens take beside the weights, at 4 bytes a number.

    For one batch: the input of every block, what one block computes, and its attention weights (not every kernel does
    without them). With ``kept`` also the inputs and outputs of one block for all windows; else one batch's logits.
    What the configuration does not say counts nothing, nor does a backward pass: gradient norms take more
    (docs/memory.md).
    """
    config = text_config(model)

    def of(name: str) -> int:
        value = getattr(config, name, 0)
        return value if isinstance(value, int) and value > 0 else 0

    hidden, rows = of("hidden_size"), batch_size * length
    numbers = rows * ((of("num_hidden_layers") + 8) * hidden + 3 * of("intermediate_size"))
    numbers += of("num_attention_heads") * rows * length
    numbers += 2 * windows * length * hidden if kept else rows * of("vocab_size")
    return 4 * numbers


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has; for a CPU those of the machine, or of its container if it has fewer."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [int(psutil.virtual_memory().total)]
    for limit in map(Path, _LIMITS):
        try:
            found.append(int(limit.read_text()))
        except (OSError, ValueError):  # no such file; "max"
            continue
    return min(found)

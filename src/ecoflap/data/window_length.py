"""Chooses the default number of tokens in a window of plain text, by model, machine and text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn

from ecoflap.data.model_facts import DEFAULT_LENGTH, is_encoder_decoder, max_length, text_config
from ecoflap.model.offload import home_of

CPU_LENGTH = 512  # default on a CPU: attention's time and memory grow with the square of the length
SHORTEST = 64  # least number of tokens of a default window, even if there are fewer windows
SHARE = 0.25  # of the memory for activations; the rest is for weights, statistics and other programs
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


Work = Literal["calibration", "test", "training"]


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
    work: Work = "calibration",
    memory: int | None = None,
) -> WindowLength:
    """2,048 tokens (on a CPU 512) or the model's longest, then halved while necessary, but not below 64.

    It is halved while windows would take more than a quarter of the memory (:func:`activation_bytes`), or while the
    text gives fewer than ``windows`` windows.

    Args:
        tokens: of the text.
        batch_size: windows in a forward.
        work: the use of the windows.
        memory: total memory of the machine in bytes; None to ask the system. Free memory does not matter, so that the
            same command always gives the same windows on a machine.
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
        there = max(1, min(windows, tokens // length) if work == "calibration" else tokens // length)
        if activation_bytes(model, length, there, min(batch_size, there), work) > SHARE * memory:
            reason = f"for {memory / 1e9:.1f} GB of memory"
        elif tokens // length < windows:
            reason = f"for {windows} windows of the text"
        else:
            break
        length //= 2
    return WindowLength(length, reason)


def activation_bytes(model: nn.Module, length: int, windows: int, batch_size: int, work: Work) -> int:
    """Approximate memory for windows of ``length`` tokens beside the weights, at 4 bytes per number.

    For a test, one batch's forward with its logits; for calibration, the larger of gradient norms and the default
    criterion; for training, the graph of one batch. Sizes that the configuration does not have count as 0.
    """
    if work == "test":
        return forward_bytes(model, length, batch_size, logits=True)
    if work == "training":
        return training_bytes(model, length, batch_size)
    return max(gradient_bytes(model, length, batch_size), walk_bytes(model, length, windows, batch_size))


def forward_bytes(model: nn.Module, length: int, batch_size: int, *, logits: bool) -> int:
    """A forward of one batch, without a graph (:attr:`Shape.forward`)."""
    shape, seen = Shape.of(model), _seen(model, length)
    rows = batch_size * seen
    return 4 * (rows * shape.forward + shape.attention(rows, seen) + rows * shape.vocabulary * logits)


def gradient_bytes(model: nn.Module, length: int, batch_size: int) -> int:
    """Gradient norms of one batch (:attr:`Shape.gradients`)."""
    shape, seen = Shape.of(model), _seen(model, length)
    rows = batch_size * seen
    return 4 * (rows * shape.gradients + 3 * shape.attention(rows, seen))  # values, softmax, gradient


def training_bytes(model: nn.Module, length: int, batch_size: int) -> int:
    """The graph of all blocks for one batch, the gradients of one, and the logits, their softmax and gradient."""
    shape, seen = Shape.of(model), _seen(model, length)
    rows = batch_size * seen
    in_blocks = shape.blocks * (rows * shape.graph + shape.attention(rows, seen))
    return gradient_bytes(model, length, batch_size) + 4 * (in_blocks + 3 * rows * shape.vocabulary)


def walk_bytes(model: nn.Module, length: int, windows: int, batch_size: int) -> int:
    """ADMM's inputs of all windows while it prunes a block (:attr:`Shape.walk`), and a forward of one batch."""
    kept = 4 * windows * _seen(model, length) * Shape.of(model).walk
    return kept + forward_bytes(model, length, batch_size, logits=False)


def _seen(model: nn.Module, length: int) -> int:
    """Tokens of a window in one tower: an encoder and a decoder get half of them each."""
    return length - length // 2 if is_encoder_decoder(model) else length


@dataclass(frozen=True)
class Shape:
    """Numbers per token in a model's text tower, the wider of two.

    Attributes:
        hidden: between blocks.
        inner: in a feed-forward network, of all experts that a token is sent to.
        heads: of the attention.
        queries: of all heads together.
        keys: of all key heads together; there are as many values.
        blocks: in all text towers.
        whole: attention weights are stored for all pairs of tokens, since no fused kernel is used.
    """

    hidden: int
    inner: int
    heads: int
    queries: int
    keys: int
    blocks: int
    vocabulary: int
    whole: bool

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """From the configuration; 0 for a missing size."""
        config = text_config(model)

        def of(*names: str) -> int:
            values = (getattr(config, name, None) for name in names)
            return next((value for value in values if isinstance(value, int) and value > 0), 0)

        hidden, heads = of("hidden_size"), of("num_attention_heads")
        width = of("head_dim") or hidden // max(heads, 1)
        inner = of("moe_intermediate_size", "intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "n_inner")
        blocks, decoder = of("num_hidden_layers"), of("num_decoder_layers", "decoder_layers")
        return cls(
            hidden=hidden,
            inner=(inner or 4 * hidden) * max(1, of("num_experts_per_tok") if of("moe_intermediate_size") else 1),
            heads=heads,
            queries=heads * width,
            keys=(of("num_key_value_heads") or heads) * width,
            blocks=blocks + (decoder if is_encoder_decoder(model) else 0),
            vocabulary=of("vocab_size"),
            whole=getattr(config, "_attn_implementation", None) in (None, "eager"),
        )

    def attention(self, rows: int, length: int) -> int:
        """Attention weights of ``rows`` tokens in windows of ``length``; a fused kernel stores none."""
        return self.heads * rows * length if self.whole else 0

    @property
    def forward(self) -> int:
        """A block's input and output, its norm, queries, keys and values, and the widest part of the network."""
        return 4 * self.hidden + self.queries + 2 * self.keys + 3 * self.inner

    @property
    def graph(self) -> int:
        """One block's graph.

        It keeps the block's input, its sum with the attention, inputs and outputs of both norms, queries, keys, values,
        the attention's output, and of the network both products, the activation and the last layer's input (measured
        for Llama: 6 hidden, 2 queries, 2 keys, 4 inner).
        """
        return 6 * self.hidden + 2 * self.queries + 2 * self.keys + 4 * self.inner

    @property
    def gradients(self) -> int:
        """The inputs of all blocks; one block's graph, and the gradients of its widest part."""
        return self.blocks * self.hidden + self.graph + 2 * self.hidden + 3 * self.inner

    @property
    def walk(self) -> int:
        """Inputs of a block in the dense and the pruned model, and inputs of its layers in the dense one."""
        return 2 * self.hidden + (2 * self.hidden + self.queries + self.inner)


def memory_of(device: torch.device) -> int:
    """Total memory of the device in bytes; for a CPU that of the machine, or of its container if that is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [int(psutil.virtual_memory().total)]
    for limit in map(Path, _LIMITS):
        try:
            found.append(int(limit.read_text()))
        except (OSError, ValueError):  # no such file; "max"
            continue
    return min(found)

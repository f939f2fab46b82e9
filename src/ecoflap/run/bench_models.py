"""Makes the models that ``ecoflap bench`` measures: a packed checkpoint, the embedded VLM, a random 1 B LLM."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ecoflap.data.prompts import Prompter, image_processor_of, tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.errors import InvalidOption
from ecoflap.model.checkpoint import load
from ecoflap.model.files import weight_bytes
from ecoflap.model.packed.checkpoint import pack_checkpoint, unpack_checkpoint
from ecoflap.model.packed.convert import pack, packable, replace, unpack
from ecoflap.model.packed.format import PackedWeight, pack_weight
from ecoflap.model.packed.holder import PackedParts
from ecoflap.model.packed.linear import PackedLinear
from ecoflap.model.save import save
from ecoflap.support.embedded import calibration_path, model_path

DENSE = "dense bfloat16"
VARIANTS = (DENSE, "dense float32", "packed", "packed int8", "packed int4")
PROMPT = "What is in the picture?"


MOST = 10**6  # rounds, rows, tokens, layers
MOST_THREADS = 1024  # the operating system refuses far more


@dataclass(frozen=True)
class BenchOptions:
    """Tokens of the prompt, generated tokens, rounds, batch sizes, threads (0: all).

    ``layers`` and ``sparsity`` are for the models that are made for the measurement.
    """

    prompt_tokens: int = 32
    new_tokens: int = 8
    rounds: int = 3
    batch_sizes: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (1, 0)
    layers: int = 22
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        counts = (self.prompt_tokens, self.new_tokens - 1, self.rounds, self.layers, *self.batch_sizes)
        if min(counts) < 1 or max(counts) > MOST or not 0 <= min(self.threads) <= max(self.threads) <= MOST_THREADS:
            raise InvalidOption(
                f"bench: counts must be 1 to {MOST:,}, new tokens at least 2, threads 0 (all) to {MOST_THREADS}"
            )
        if not 0.1 <= self.sparsity < 1:
            raise InvalidOption(f"bench: sparsity {self.sparsity} is not between 0.1 and 1")


@dataclass
class Subject:
    """One model in several variants; ``inputs`` makes inputs for a model and a batch size."""

    name: str
    variants: dict[str, nn.Module]
    inputs: Callable[[nn.Module, int], dict[str, Any]]
    stored: dict[str, int] = field(default_factory=dict)
    loading: dict[str, float] = field(default_factory=dict)


def embedded(folder: Path, options: BenchOptions) -> Subject:
    """The embedded VLM, pruned by magnitude and packed into ``folder``."""
    made = load(model_path(), device="cpu")
    for _, layer in packable(made.model):
        weight = layer.weight.detach()
        rank = max(1, int(options.sparsity * weight.numel()))
        weight[weight.abs() <= weight.abs().flatten().float().kthvalue(rank).values] = 0
    save(made, folder / "pruned")
    pack_checkpoint(folder / "pruned", folder / "packed")
    subject = of_folder(folder / "packed", folder, options)
    subject.name = f"embedded VLM at {options.sparsity}"
    return subject


def of_folder(packed: Path, folder: Path, options: BenchOptions) -> Subject:
    """The variants of a packed checkpoint, with the seconds to load it and its plain form from the disk's cache."""
    plain = unpack_checkpoint(packed, folder / "plain", overwrite=True)
    loading: dict[str, list[float]] = {"plain": [], "packed": []}
    own: torch.dtype | None = None
    for _ in range(options.rounds):
        for name, place in (("plain", plain), ("packed", packed)):
            start = time.perf_counter()
            kept = load(place, device="cpu")  # the last one is the packed one
            loading[name].append(time.perf_counter() - start)
            own = own or _main_dtype(kept.model)  # the plain one is the first
    variants: dict[str, nn.Module] = {
        DENSE: load(plain, device="cpu", dtype="bfloat16").model,
        "dense float32": load(plain, device="cpu", dtype="float32").model,
        "packed": kept.model,
    }
    if all(layer.compressed.is_floating_point() for layer in kept.model.modules() if isinstance(layer, PackedParts)):
        for values in ("int8", "int4"):
            small = load(packed, device="cpu").model
            unpack(small)
            pack(small, values=values)
            variants[f"packed {values}"] = small
    dense = "dense float32" if own == torch.float32 else DENSE  # the plain checkpoint has the bytes of its own dtype
    loading[dense] = loading.pop("plain")
    stored = {dense: weight_bytes(plain), "packed": weight_bytes(packed)}
    prompter = Prompter(kept.model, kept.processor) if tokenizer_of(kept.processor) is not None else None
    picture = _picture() if image_processor_of(kept.processor) is not None else None

    def inputs(model: nn.Module, size: int) -> dict[str, Any]:
        if prompter is None:
            return _ids(model, size, options.prompt_tokens)
        text = prompter.render(Sample(images=(picture,) if picture is not None else (), prompt=PROMPT))
        encoded = prompter.encode([text] * size, [(picture,) if picture is not None else ()] * size, "left")
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in encoded.items()}

    means = {name: statistics.median(seconds) for name, seconds in loading.items()}
    return Subject(packed.name, variants, inputs, stored, means)


def _main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the largest floating-point parameter."""
    return max((p for p in model.parameters() if p.is_floating_point()), key=torch.numel).dtype


def _picture() -> Any:
    """An image of the calibration data."""
    import pyarrow.parquet
    from PIL import Image

    content = pyarrow.parquet.read_table(calibration_path(), columns=["image"])["image"][0].as_py()
    return Image.open(io.BytesIO(content["bytes"] if isinstance(content, dict) else content)).convert("RGB")


def _ids(model: nn.Module, size: int, length: int) -> dict[str, Any]:
    words = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    ids = torch.randint(3, words, (size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_model(_: Path, options: BenchOptions) -> Subject:
    """A Llama with random weights in the shape of TinyLlama 1.1B; with fewer layers if memory is short."""
    free = psutil.virtual_memory().available
    layers = max(1, min(options.layers, int(0.5 * free / 0.5e9)))  # all variants of a layer take 0.4 GB
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, dtype="bfloat16", pad_token_id=0,
    )  # fmt: skip
    patterns: dict[tuple[int, int], torch.Tensor] = {}
    packed: dict[tuple[str, tuple[int, int]], PackedWeight] = {}
    variants = {name: _random_variant(config, name, patterns, packed, options.sparsity) for name in VARIANTS}
    name = f"random Llama, {layers} layers of 2048 × 5632, at {options.sparsity}"
    return Subject(name, variants, lambda model, size: _ids(model, size, options.prompt_tokens))


def _random_variant(
    config: LlamaConfig,
    variant: str,
    patterns: dict[tuple[int, int], torch.Tensor],
    packed: dict[tuple[str, tuple[int, int]], PackedWeight],
    sparsity: float,
) -> nn.Module:
    """One variant of the random model. Layers of the same shape are copies of one matrix: values don't change times."""
    dtype = torch.float32 if variant == "dense float32" else torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    inside = {name for name, _ in packable(model) if "layers" in name}
    for name, layer in list(packable(model)):
        shape = (layer.out_features, layer.in_features)
        if shape not in patterns:
            weight = torch.randn(shape) * 0.02
            patterns[shape] = (weight * (torch.rand(shape) >= sparsity)).bfloat16()
        if name not in inside or not variant.startswith("packed"):
            layer.weight = nn.Parameter(patterns[shape].to(dtype, copy=True), requires_grad=False)
            continue
        values = variant.removeprefix("packed").strip() or "auto"
        if (values, shape) not in packed:
            packed[values, shape] = pack_weight(patterns[shape], values)
        one = packed[values, shape]
        parts: dict[str, Any] = {part: tensor.clone() for part, tensor in one.tensors().items() if part != "shape"}
        copy = replace_fields(one, **parts)
        replace(model, name, PackedLinear(copy, layer.bias, dtype=dtype))
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    model.model.rotary_emb = rotary
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.ones if parameter.dim() == 1 else torch.zeros
                setattr(module, name, nn.Parameter(value(parameter.shape, dtype=dtype), requires_grad=False))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(1, config.hidden_size).to(dtype))
    # A slice of the prompt's states is not contiguous, and torch then copies the head's weight for every row. In every
    # variant this would take seconds and hide the differences.
    model.lm_head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    made: nn.Module = model.eval()
    return made

"""Decides the modality of a tower, and which tower is a decoder: from the config, the inputs and the names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ecoflap.model.parts import Tower

# The first match counts, so the bridges (which often have "vision" or "text" earlier in their path) come first.
WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bridge", ("qformer", "resampler", "perceiver", "connector", "projector", "abstractor", "merger", "aligner")),
    (
        "vision",
        ("vision", "visual", "image", "vit", "deit", "beit", "dinov2", "dinov3", "swin", "timm", "patch", "pixel"),
    ),
    ("audio", ("audio", "speech", "wav2vec")),
)
# Modality of a model's inputs: as its class declares it, and by the names of its arguments.
DECLARED = {"image": "vision", "video": "vision", "audio": "audio"}
MAIN_INPUTS = {"pixel_values": "vision", "input_values": "audio", "input_features": "audio"}
TEXT_INPUTS = ("ids", "labels", "embeds")
_MAIN = tuple(MAIN_INPUTS)

VISION_ONLY_FIELDS = ("patch_size", "num_channels")
# Parts of the names of cross-attention inside the blocks of a decoder (T5, BART, BERT).
CROSS_WORDS = ("encdecattention", "encoder_attn", "cross")


def text_config(model: nn.Module) -> Any:
    """The language part of the config (the config itself for a text model); None for a module without config."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the text part is an encoder-decoder (T5, BART, Florence-2, BLIP-2 on T5)."""
    configs = (getattr(model, "config", None), text_config(model))
    return any(bool(getattr(config, "is_encoder_decoder", False)) for config in configs)


def modality_of(path: str, model: nn.Module, inputs: Collection[str] = ()) -> str:
    """Modality of the tower whose list of blocks is at ``path``: bridge, vision, audio or language.

    Decided by a word in the path; else it is language if only text reached it; else by the inputs that the nearest
    model around the tower declares (the ``encoder`` of Whisper takes audio, that of a VisionEncoderDecoder images);
    else by its sub-configuration; else by the arguments of the forward that reached it.

    Args:
        path: module path, for example ``"model.vision_tower.encoder.layers"``.
        inputs: names of the model's arguments that the first block was computed from, if a forward was traced.
    """
    components = path.lower().split(".")
    for modality, words in WORDS:
        if any(word in component for component in components for word in words):
            return modality
    if any(name.endswith(TEXT_INPUTS) for name in inputs) and not any(name.startswith(_MAIN) for name in inputs):
        return "language"  # although the model declares images as its input (PP-FormulaNet's decoder, UDOP)
    return _declared(path, model) or _configured(path, model) or _reached(inputs) or "language"


def _around(path: str, model: nn.Module) -> Iterator[nn.Module]:
    """The modules around ``path``, from the inside to the model itself."""
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def _declared(path: str, model: nn.Module) -> str | None:
    """By the nearest model around: its ``input_modalities``, or else its main input."""
    for module in _around(path, model):
        said = getattr(module, "input_modalities", None)
        main = getattr(module, "main_input_name", None)
        if said is None and main is None:
            continue
        if isinstance(said, str):
            said = (said,)
        found = {DECLARED.get(one, "language") for one in said} if said else {MAIN_INPUTS.get(str(main), "language")}
        return found.pop() if len(found) == 1 and "language" not in found else None
    return None


def _configured(path: str, model: nn.Module) -> str | None:
    """By the nearest configuration around: with patch fields and no text part, it is a vision tower's."""
    config = next((found for module in _around(path, model) if (found := getattr(module, "config", None))), None)
    vision_only = any(hasattr(config, field) for field in VISION_ONLY_FIELDS) and not hasattr(config, "text_config")
    return "vision" if vision_only else None


def _reached(inputs: Collection[str]) -> str | None:
    """By the arguments that reached the tower; None if text is among them, or if none has a known modality."""
    if any(name.endswith(TEXT_INPUTS) for name in inputs):
        return None
    found = {modality for name in inputs for main, modality in MAIN_INPUTS.items() if name.startswith(main)}
    return found.pop() if len(found) == 1 else None


def with_decoder(model: nn.Module, towers: Sequence[Tower]) -> list[Tower]:
    """The towers, with the decoder marked if the model has one.

    It is the last language tower of an encoder-decoder: a model whose configuration says so, or in which this tower has
    cross-attention and another tower reads text, too (BLIP's answers). Two separate text towers are no
    encoder-decoder.
    """
    language = [tower for tower in towers if tower.modality == "language"]
    if not language:
        return list(towers)
    last = language[-1]
    crossing = any(_has_cross_attention(model.get_submodule(block.name)) for block in last.blocks)
    several = len(language) > 1
    decodes = (crossing or several) if is_encoder_decoder(model) else (crossing and several)
    return [replace(tower, decoder=True) if decodes and tower is last else tower for tower in towers]


def _has_cross_attention(block: nn.Module) -> bool:
    return any(word in name.lower() for name, _ in block.named_modules() for word in CROSS_WORDS)

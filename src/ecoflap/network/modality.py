"""Which modality a tower has: a small table of words found in module paths, as data."""

from __future__ import annotations

from typing import Any

# First match wins, so the bridges (which often have "vision" or "text" further up in their path) come first.
WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bridge", ("qformer", "resampler", "perceiver", "connector", "projector", "abstractor", "merger", "aligner")),
    (
        "vision",
        ("vision", "visual", "image", "vit", "deit", "beit", "dinov2", "dinov3", "swin", "timm", "patch", "pixel"),
    ),
    ("audio", ("audio", "speech", "wav2vec")),
    ("language", ("text", "language", "lm", "decoder", "llm", "transformer", "bert", "gpt")),
)

VISION_ONLY_FIELDS = ("patch_size", "num_channels")


def modality_of(path: str, config: Any = None) -> str:
    """Modality of the tower whose ``ModuleList`` sits at ``path``.

    Args:
        path: module path, for example ``"model.vision_tower.encoder.layers"``.
        config: the model's configuration; one with patch fields and no text part makes an unnamed tower a vision one.
    """
    components = path.lower().split(".")
    for modality, words in WORDS:
        if any(word in component for component in components for word in words):
            return modality
    vision_only = any(hasattr(config, field) for field in VISION_ONLY_FIELDS) and not hasattr(config, "text_config")
    return "vision" if vision_only else "language"

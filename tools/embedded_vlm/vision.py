"""Stage 1 of training: the vision tower alone, on telling for each patch what thing covers it, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedded_vlm.data import IGNORE, LABEL_SIZES, LABELS, Pictures, normalise
from embedded_vlm.steps import optimise

EASY_EVERY = 3


def train_vision(
    vision_model: Any,
    scenes: Pictures,
    easy: Pictures,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Callable[[], None] | None = None,
) -> None:
    """Train ``vision_model`` in place; every third batch is of easy-VQA pictures.

    The heads (one linear map per label on every patch's feature) are thrown away afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = nn.Linear(vision_model.config.hidden_size, sum(LABEL_SIZES))

    def forward(pictures: Pictures, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        pixels = normalise(pictures.pixels[rows], mean, std)
        with torch.autocast("cpu", torch.bfloat16):
            features = vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        logits = head(features.float()).split(LABEL_SIZES, dim=-1)
        labels = pictures.labels[rows].long()
        return [(part, labels[..., index]) for index, part in enumerate(logits)]

    def loss(step: int) -> Tensor:
        pictures = scenes if step % EASY_EVERY else easy
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        parts = [
            nn.functional.cross_entropy(p.flatten(0, 1), t.flatten(), ignore_index=IGNORE)
            for p, t in forward(pictures, rows)
        ]
        return torch.stack(parts).sum()

    def report(step: int) -> str:
        # Accuracy on patches of things, per set (training pictures: this is a progress line, not a result).
        lines = []
        for pictures in (scenes, easy):
            with torch.no_grad():
                parts = forward(pictures, torch.arange(200))
            number = parts[LABELS.index("number")][1]
            hits = [(part.argmax(-1) == label)[number > 0].float().mean() for part, label in parts]
            lines.append(" ".join(f"{name} {hit:.3f}" for name, hit in zip(LABELS, hits, strict=True)))
        return " | ".join(lines)

    vision_model.train()
    optimise(
        [*vision_model.parameters(), *head.parameters()],
        loss,
        steps=steps,
        learning_rate=learning_rate,
        report=report,
        label="vision",
        checkpoint=checkpoint,
    )
    vision_model.eval()

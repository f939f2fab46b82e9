"""Stage 2 of training: the T5 alone, on text: a scene in words and a question in, the answer or caption out."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from embedded_vlm.data import Encoder, description
from embedded_vlm.easy_vqa import Picture
from embedded_vlm.questions import CAPTION_PROMPT, Question, ask_any, caption
from embedded_vlm.scenes import GRID, Scene, Thing, all_things, sample_scene
from embedded_vlm.steps import optimise

EASY_SHARE = 0.12
CAPTION_EVERY = 6  # one batch in six is of captions
Row = tuple[Question, Scene]


def easy_caption(color: str, shape: str) -> Question:
    """The caption of an easy-VQA picture."""
    return Question(CAPTION_PROMPT, f"a {color} {shape}", "easy-vqa/caption")


def draw_row(rng: random.Random, pictures: Sequence[Picture], counts: tuple[int, ...], captions: bool) -> Row:
    """One training row: a question (or caption) and the scene that answers it, from easy-VQA or generated."""
    if rng.random() < (0.0 if captions else EASY_SHARE):
        picture = rng.choice(pictures)
        thing = Thing(rng.randrange(GRID), rng.randrange(GRID), picture.color, picture.shape)
        return rng.choice(picture.questions), Scene((thing,))
    scene = sample_scene(rng, "train", counts)
    return (caption(scene) if captions else ask_any(scene, rng)), scene


def exact_match(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Bool (B,): every target token is the most likely one, given the true ones before it."""
    with torch.no_grad():
        logits = model(**batch).logits
    labels = batch["labels"]
    right: Tensor = ((logits.argmax(-1) == labels) | (labels < 0)).all(dim=1)
    return right


def by_kind(rows: Sequence[Question], right: Tensor) -> dict[str, float]:
    """Accuracy per kind."""
    found: dict[str, list[bool]] = defaultdict(list)
    for question, is_right in zip(rows, right.tolist(), strict=True):
        found[question.kind].append(is_right)
    return {kind: sum(values) / len(values) for kind, values in sorted(found.items())}


def name_things(language_model: Any, tokenizer: Any) -> None:
    """Start each compound word at half the sum of its four words' embeddings (same scale as any other word).

    Without this start the encoder has to find out from scratch that ``top_left_red_star`` has to do with ``red``.
    """
    words = language_model.get_input_embeddings().weight
    with torch.no_grad():
        for thing in all_things():
            parts = tokenizer.convert_tokens_to_ids(list(thing.words))
            words[tokenizer.convert_tokens_to_ids(thing.name)] = words[parts].sum(dim=0) / 2


def train_text(
    language_model: Any,
    tokenizer: Any,
    pictures: Sequence[Picture],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Callable[[], None] | None = None,
) -> None:
    """Train ``language_model`` in place; the number of things per scene grows from one or two to four.

    ``pictures`` are easy-VQA training pictures, used for their questions and attributes only: no image is read.
    """
    encoder = Encoder(tokenizer)
    rng = random.Random(f"text/{seed}")
    known = [p for p in pictures if p.color and p.shape]

    def make(step: int, source: random.Random, size: int) -> tuple[list[Row], dict[str, Tensor]]:
        counts = (1, 2, 2, 2) if step < 0.25 * steps else (1, 2, 2, 3, 3, 4)
        rows = [draw_row(source, known, counts, captions=step % CAPTION_EVERY == 0) for _ in range(size)]
        prefixes = [encoder.words(description(scene)) for _, scene in rows]
        return rows, encoder.batch([q for q, _ in rows], prefixes)

    def loss(step: int) -> Tensor:
        _, batch = make(step, rng, batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = language_model(**batch).loss
        return value

    def report(step: int) -> str:
        # Steps of the report are never those of captions; the rows come from their own stream.
        rows, batch = make(step - step % CAPTION_EVERY + 1, random.Random(f"check/{step}"), 600)
        right = exact_match(language_model, batch)
        kinds = by_kind([q for q, _ in rows], right)
        return f"acc {right.float().mean():.3f} " + " ".join(f"{k.split('/')[-1]} {v:.2f}" for k, v in kinds.items())

    name_things(language_model, tokenizer)
    language_model.train()
    optimise(
        language_model.parameters(),
        loss,
        steps=steps,
        learning_rate=learning_rate,
        report=report,
        label="text",
        checkpoint=checkpoint,
    )
    language_model.eval()

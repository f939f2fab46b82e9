"""Stage 3 of training: the bridge (Q-Former, queries, projection) between two frozen towers.

First the queries learn to say what the picture's description says, word by word, as embeddings of the language model
(the language model itself is not run); then the language model's own loss on answers and captions is added, with its
gradient passing through the frozen tower.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedded_vlm.data import Encoder, Pictures, description, normalise
from embedded_vlm.easy_vqa import Picture
from embedded_vlm.model import NUM_QUERIES
from embedded_vlm.questions import Question, ask_any, caption
from embedded_vlm.scenes import Scene
from embedded_vlm.steps import optimise
from embedded_vlm.text import CAPTION_EVERY, by_kind, easy_caption, exact_match

IGNORE = -100
TEMPERATURE = 32.0  # of the squared distance to a word's embedding; two random words are about 2 x 128 apart


def features(vision_model: Any, pictures: Pictures, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The frozen vision tower's outputs, bfloat16 (N, 1 + 36 patches, width): computed once, used in every step."""
    parts = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for pixels in torch.split(pictures.pixels, 128):
            output = vision_model(pixel_values=normalise(pixels, mean, std)).last_hidden_state
            parts.append(output.to(torch.bfloat16))
    return torch.cat(parts)


def speak(model: Any, image_features: Tensor) -> Tensor:
    """Soft words (B, queries, width) in the language model's embedding space, from features (B, 37, width)."""
    queries = model.query_tokens.expand(image_features.shape[0], -1, -1)
    output = model.qformer(query_embeds=queries, encoder_hidden_states=image_features).last_hidden_state
    soft: Tensor = model.language_projection(output.float())
    return soft


def train_bridge(
    model: Any,
    tokenizer: Any,
    scenes: Pictures,
    easy: Pictures,
    easy_questions: Sequence[Picture],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    alignment_steps: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoint: Callable[[], None] | None = None,
) -> None:
    """Train ``model.qformer``, ``model.query_tokens`` and ``model.language_projection`` in place; all else is frozen.

    ``easy`` are the pictures of ``easy_questions``, in the same order.
    """
    model.requires_grad_(False)
    trained = [*model.qformer.parameters(), *model.language_projection.parameters(), model.query_tokens]
    for parameter in trained:
        parameter.requires_grad_(True)
    encoder = Encoder(tokenizer)
    sets = [(p, features(model.vision_model, p, mean, std)) for p in (scenes, easy)]
    targets = [torch.tensor([_target(encoder, s) for s in p.scenes]) for p, _ in sets]
    words = model.language_model.get_input_embeddings().weight.detach()
    language = model.language_model
    prefix = [encoder.image] * model.config.num_query_tokens

    def pick(rng: random.Random, size: int, captions: bool) -> tuple[list[Question], Tensor, Tensor]:
        few = size // 6  # of easy-VQA
        sizes = zip(sets, (size - few, few), strict=True)
        rows = [torch.tensor([rng.randrange(len(p)) for _ in range(n)]) for (p, _), n in sizes]
        asked: list[Question] = []
        for row in rows[0].tolist():
            scene = scenes.scenes[row]
            assert scene is not None
            asked.append(caption(scene) if captions else ask_any(scene, rng))
        for row in rows[1].tolist():
            picture = easy_questions[row]
            known = bool(picture.color and picture.shape)
            told = captions and known
            asked.append(easy_caption(picture.color, picture.shape) if told else rng.choice(picture.questions))
        seen = torch.cat([f[r] for (_, f), r in zip(sets, rows, strict=True)]).float()
        return asked, seen, torch.cat([t[r] for t, r in zip(targets, rows, strict=True)])

    def closeness(soft: Tensor) -> Tensor:
        # Minus the squared distance to every word, up to |soft|^2, which is the same for all words.
        return torch.matmul(soft, 2 * words.T).sub(words.square().sum(dim=-1))

    def align(soft: Tensor, target: Tensor) -> Tensor:
        logits = closeness(soft).flatten(0, 1) / TEMPERATURE
        return nn.functional.cross_entropy(logits, target.flatten(), ignore_index=IGNORE)

    def answer(soft: Tensor, asked: Sequence[Question]) -> dict[str, Tensor]:
        batch = encoder.batch(asked, [prefix] * len(asked))
        ids = batch.pop("input_ids")
        embedded = language.get_input_embeddings()(ids[:, len(prefix) :])
        return {"inputs_embeds": torch.cat([soft, embedded], dim=1), **batch}

    def alignment_loss(step: int) -> Tensor:
        _, seen, target = pick(rng, batch_size, captions=False)
        with torch.autocast("cpu", torch.bfloat16):
            soft = speak(model, seen)
        return align(soft.float(), target)

    def full_loss(step: int) -> Tensor:
        asked, seen, target = pick(rng, batch_size, captions=step % CAPTION_EVERY == 0)
        with torch.autocast("cpu", torch.bfloat16):
            soft = speak(model, seen)
            value: Tensor = language(**answer(soft, asked)).loss
        return value + 0.3 * align(soft.float(), target)

    def report(step: int) -> str:
        asked, seen, target = pick(random.Random(f"check/{step}"), 480, captions=False)
        with torch.no_grad():
            soft = speak(model, seen)
            nearest = closeness(soft).argmax(-1)
        said = (nearest == target)[target >= 0].float().mean()
        right = exact_match(language, answer(soft, asked))
        kinds = by_kind(asked, right)
        line = " ".join(f"{k.split('/')[-1]} {v:.2f}" for k, v in kinds.items())
        return f"words {said:.3f} acc {right.float().mean():.3f} {line}"

    rng = random.Random(f"bridge/{seed}")
    model.eval()
    optimise(
        trained,
        alignment_loss,
        steps=alignment_steps,
        learning_rate=learning_rate,
        report=report,
        label="alignment",
        checkpoint=checkpoint,
    )
    optimise(
        trained,
        full_loss,
        steps=steps,
        learning_rate=learning_rate / 2,
        report=report,
        label="bridge",
        checkpoint=checkpoint,
    )
    model.requires_grad_(True)


def _target(encoder: Encoder, scene: Scene | None) -> list[int]:
    if scene is None:
        return [IGNORE] * NUM_QUERIES
    return encoder.words(description(scene))

"""Trains the projector of the LLaVA in ``llava.py``, both towers frozen, on questions about pictures.

    python benchmarks/llava_train.py [--epochs 3] [--cache DIR] [--output llava_projector.safetensors]

Data: easy-VQA's training pictures with all their questions. The features of the vision tower never change, so they are
computed once. All questions about one picture share its image tokens: they lie one after the other in one sequence,
each with positions that follow on the picture and a mask that hides the other questions, so that each is to the
language model what it is alone. The loss is taken at the answers only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import llava
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ecoflap.calibration.sources import DEFAULT_TEMPLATE

RATE, WARMUP, DECAY = 1e-3, 50, 0.0
PICTURES = 8  # in a step


@dataclass(frozen=True)
class Picture:
    """Features ``[TOKENS, width]`` of one picture, and for each of its questions the tokens after the picture.

    The first ``prompts[i]`` tokens of ``texts[i]`` are the question, the rest the answer with its end token.
    """

    features: Tensor
    texts: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]


def read_questions(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """Picture number to its (question, answer) pairs."""
    found: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text("utf-8")):
        found.setdefault(number, []).append((question, answer))
    return found


@torch.no_grad()
def features_of(model: Any, processor: Any, files: Sequence[Path]) -> Tensor:
    """What the projector is given, ``[pictures, TOKENS, width]`` in bfloat16."""
    parts = []
    for start in range(0, len(files), 64):
        images = [Image.open(file).convert("RGB") for file in files[start : start + 64]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].bfloat16()
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        parts.append(states[llava.FEATURE_LAYER][:, 1:])
    return torch.cat(parts)


def tokens_of(processor: Any, question: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Tokens of question and answer as the processor puts them after the picture, and how many are the question's."""
    tokenizer = processor.tokenizer
    prompt = f"{llava.IMAGE_TOKEN}\n{DEFAULT_TEMPLATE.format(question=question)}"
    whole = tokenizer(f"{prompt} {answer}{tokenizer.eos_token}")["input_ids"][1:]
    return tuple(whole), len(tokenizer(prompt)["input_ids"]) - 1


def read_pictures(model: Any, processor: Any, folder: Path, limit: int | None = None) -> list[Picture]:
    """easy-VQA's pictures of ``folder`` with their questions."""
    questions = sorted(read_questions(folder).items())[:limit]
    features = features_of(model, processor, [folder / "images" / f"{number}.png" for number, _ in questions])
    found = []
    for row, (_, pairs) in zip(features, questions, strict=True):
        texts, prompts = zip(*(tokens_of(processor, *pair) for pair in pairs), strict=True)
        found.append(Picture(row, texts, prompts))
    return found


@dataclass(frozen=True)
class Packed:
    """Several pictures, each with all its questions in one row; see the module's docstring.

    Attributes:
        tokens: ``[B, L]`` text after the pictures.
        visible: bool ``[B, 1, TOKENS + L, TOKENS + L]``, True where a position may look.
        positions: ``[B, TOKENS + L]``.
        targets: ``[B, L]``, the token that each position must predict; -100 where none is asked for.
        question: ``[B, L]``, number of the question that a position belongs to.
    """

    features: Tensor
    tokens: Tensor
    visible: Tensor
    positions: Tensor
    targets: Tensor
    question: Tensor


def pack(pictures: Sequence[Picture]) -> Packed:
    """Put each picture's questions behind it."""
    n = llava.TOKENS
    length = max(sum(map(len, picture.texts)) for picture in pictures)
    shape = (len(pictures), length)
    tokens, targets, question = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100), torch.full(shape, -1)
    positions = torch.arange(n + length).expand(len(pictures), -1).clone()
    for row, picture in enumerate(pictures):
        at = 0
        for number, (text, prompt) in enumerate(zip(picture.texts, picture.prompts, strict=True)):
            end = at + len(text)
            tokens[row, at:end] = torch.tensor(text)
            targets[row, at + prompt - 1 : end - 1] = torch.tensor(text[prompt:])
            question[row, at:end] = number
            positions[row, n + at : n + end] = torch.arange(n, n + len(text))
            at = end
    owner = torch.cat([torch.full((len(pictures), n), -2), question], dim=1)  # -2: the picture
    same = owner[:, :, None] == owner[:, None, :]
    seen = same | (owner[:, None, :] == -2)
    visible = (seen & torch.ones(n + length, n + length).tril().bool())[:, None]
    return Packed(torch.stack([p.features for p in pictures]), tokens, visible, positions, targets, question)


class Projector(nn.Module):
    """The two layers of LLaVA's projector on standardised features; :meth:`folded` is the same on raw ones."""

    def __init__(self, model: Any, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.inner = model.model.multi_modal_projector.float()
        self.mean, self.deviation = mean, deviation
        scale = float(model.model.language_model.embed_tokens.weight.float().std())
        nn.init.normal_(self.inner.linear_1.weight, std=self.inner.linear_1.in_features**-0.5)
        nn.init.normal_(self.inner.linear_2.weight, std=scale * self.inner.linear_2.in_features**-0.5)
        nn.init.zeros_(self.inner.linear_1.bias)
        nn.init.zeros_(self.inner.linear_2.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.inner((features.float() - self.mean) / self.deviation)

    def folded(self) -> dict[str, Tensor]:
        """The state dict of a projector that takes the features as they come."""
        state = {name: value.detach().clone() for name, value in self.inner.state_dict().items()}
        state["linear_1.weight"] /= self.deviation
        state["linear_1.bias"] -= state["linear_1.weight"] @ self.mean
        return {name: value.bfloat16().contiguous() for name, value in state.items()}


def answers(model: Any, projector: Projector, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the answers ``[N, vocabulary]`` in fp32, their targets ``[N]``, and (row, question) ``[N, 2]``."""
    language = model.model.language_model
    texts = language.embed_tokens(packed.tokens)
    inputs = torch.cat([projector(packed.features).to(texts.dtype), texts], dim=1)
    states = language(
        inputs_embeds=inputs, attention_mask=packed.visible, position_ids=packed.positions, use_cache=False
    ).last_hidden_state[:, llava.TOKENS :]
    asked = packed.targets != -100
    row = torch.arange(len(asked))[:, None].expand_as(asked)
    where = torch.stack([row[asked], packed.question[asked]], dim=1)
    return model.lm_head(states[asked]).float(), packed.targets[asked], where


@torch.no_grad()
def accuracy(model: Any, projector: Projector, pictures: Sequence[Picture]) -> tuple[float, int]:
    """Share of questions whose every answer token is the likeliest one, and their number (teacher-forced)."""
    right = total = 0
    for start in range(0, len(pictures), PICTURES):
        logits, targets, where = answers(model, projector, pack(pictures[start : start + PICTURES]))
        wrong = {tuple(place) for place in where[logits.argmax(-1) != targets].tolist()}
        asked = {tuple(place) for place in where.tolist()}
        right, total = right + len(asked) - len(wrong), total + len(asked)
    return right / total, total


def epochs(pictures: Sequence[Picture], number: int, seed: int) -> Iterator[list[Picture]]:
    for epoch in range(number):
        order = random.Random(f"{seed}/{epoch}").sample(range(len(pictures)), len(pictures))
        for start in range(0, len(order) - PICTURES + 1, PICTURES):
            yield [pictures[i] for i in order[start : start + PICTURES]]


def train(model: Any, projector: Projector, pictures: Sequence[Picture], held: Sequence[Picture], options: Any) -> None:
    steps = options.epochs * (len(pictures) // PICTURES)
    optimiser = torch.optim.AdamW(projector.inner.parameters(), lr=RATE, weight_decay=DECAY, betas=(0.9, 0.98))
    start, losses = time.monotonic(), []
    for step, part in enumerate(epochs(pictures, options.epochs, options.seed), 1):
        rate = RATE * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        logits, targets, _ = answers(model, projector, pack(part))
        loss = F.cross_entropy(logits, targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.inner.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % options.report == 0 or step == steps:
            value, _ = accuracy(model, projector, held)
            mean = sum(losses) / len(losses)
            print(
                f"step {step}/{steps} {time.monotonic() - start:.0f} s loss {mean:.3f} held-out {value:.3f}", flush=True
            )
            losses = []
            save_file(projector.folded(), options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the projector of the DINOv2 + SmolLM2 LLaVA.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=50, help="steps between two reports")
    parser.add_argument("--cache", type=Path, default=None, help="default: $ECOFLAP_CACHE or ~/.cache/ecoflap")
    parser.add_argument("--output", type=Path, default=llava.PROJECTOR)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, processor = llava.assemble(options.cache)
    model.requires_grad_(False).bfloat16()
    folder = assets.fetch("easy-vqa", options.cache)
    pictures = read_pictures(model, processor, folder / "train")
    held = read_pictures(model, processor, folder / "test", limit=60)
    stacked = torch.stack([picture.features for picture in pictures]).float().flatten(0, 1)
    projector = Projector(model, stacked.mean(0), stacked.std(0))
    projector.inner.requires_grad_(True)
    train(model, projector, pictures, held, options)


if __name__ == "__main__":
    main()

"""Trains the projector of the LLaVA in ``llava.py``, both towers frozen, on questions and captions.

    python benchmarks/llava_train.py --steps 500 --output FIRST         # questions alone
    python benchmarks/llava_train.py --steps 300 --pictures 5 --captions 8 --rate 5e-4 --init FIRST   # both

Questions: easy-VQA's training pictures with all their questions. Captions: names of emoji and titles of clip art. The
features of the vision tower never change, so they are computed once. All questions about one picture share its image
tokens: they lie one after the other in one sequence, each with positions that follow on the picture and a mask that
hides the other questions, so that each is to the language model what it is alone. The loss is taken at the answers and
captions only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import assets
import llava
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecoflap.data.rows import DEFAULT_TEMPLATE

WARMUP = 50
CAPTION_PROMPT = "A picture of"
CAPTION = re.compile(r"[a-z][a-z -]{2,29}")  # titles that name a thing; the rest are numbers, authors, collections
MOST_OF_ONE = 15  # pictures with the same title; hundreds of stars are called the same
SUBJECTS = ("animals", "buildings", "containers", "electronics", "food", "people", "plants", "recreation", "tools",
            "transportation")  # fmt: skip


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
    """Tokens of prompt and answer as the processor puts them after the picture, and how many are the prompt's."""
    tokenizer = processor.tokenizer
    prompt = f"{llava.IMAGE_TOKEN}\n{question}"
    whole = tokenizer(f"{prompt} {answer}{tokenizer.eos_token}")["input_ids"][1:]
    return tuple(whole), len(tokenizer(prompt)["input_ids"]) - 1


def question_pictures(model: Any, processor: Any, folder: Path, limit: int | None = None) -> list[Picture]:
    """easy-VQA's pictures of ``folder`` with their questions."""
    questions = sorted(read_questions(folder).items())[:limit]
    features = features_of(model, processor, [folder / "images" / f"{number}.png" for number, _ in questions])
    found = []
    for row, (_, pairs) in zip(features, questions, strict=True):
        asked = [tokens_of(processor, DEFAULT_TEMPLATE.format(question=question), answer) for question, answer in pairs]
        found.append(Picture(row, tuple(text for text, _ in asked), tuple(prompt for _, prompt in asked)))
    return found


def read_captions(cache: Path | None, split: str) -> list[tuple[Path, str]]:
    """Pictures of emoji and of clip art with a caption that names what is shown."""
    emoji, art = assets.fetch("emoji", cache) / split, assets.fetch("openclipart", cache)
    found = [(emoji / row["file_name"], row["caption"]) for row in _rows(emoji / "metadata.jsonl")]
    titled = [row for row in _rows(art / f"titles-{split}.jsonl") if row["label"] in SUBJECTS]
    found += [(art / row["file_name"], row["title"].lower().replace("_", " ").strip()) for row in titled]
    times = Counter(caption for _, caption in found)
    return [pair for pair in found if CAPTION.fullmatch(pair[1]) and times[pair[1]] <= MOST_OF_ONE]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def caption_pictures(model: Any, processor: Any, pairs: Sequence[tuple[Path, str]]) -> list[Picture]:
    """Pictures with one text each: the caption after its prompt."""
    features = features_of(model, processor, [file for file, _ in pairs])
    texts = [tokens_of(processor, CAPTION_PROMPT, caption) for _, caption in pairs]
    return [Picture(row, (text,), (prompt,)) for row, (text, prompt) in zip(features, texts, strict=True)]


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

    def unfold(self, state: dict[str, Tensor]) -> None:
        """Take over a projector of raw features."""
        state = {name: value.float() for name, value in state.items()}
        state["linear_1.bias"] = state["linear_1.bias"] + state["linear_1.weight"] @ self.mean
        state["linear_1.weight"] = state["linear_1.weight"] * self.deviation
        self.inner.load_state_dict(state)


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
    for start in range(0, len(pictures), 8):
        logits, targets, where = answers(model, projector, pack(pictures[start : start + 8]))
        wrong = {tuple(place) for place in where[logits.argmax(-1) != targets].tolist()}
        asked = {tuple(place) for place in where.tolist()}
        right, total = right + len(asked) - len(wrong), total + len(asked)
    return right / total, total


@torch.no_grad()
def choosing(model: Any, projector: Projector, pictures: Sequence[Picture], others: int = 9, seed: int = 0) -> float:
    """Share of pictures whose own caption is likelier than ``others`` drawn ones; 1 in ``others`` + 1 by chance."""
    draw, right = random.Random(seed), 0
    captions = sorted({(picture.texts[0], picture.prompts[0]) for picture in pictures})
    for picture in pictures:
        own = (picture.texts[0], picture.prompts[0])
        rivals = draw.sample([caption for caption in captions if caption != own], others)
        texts, prompts = zip(own, *rivals, strict=True)
        logits, targets, where = answers(model, projector, pack([Picture(picture.features, texts, prompts)]))
        losses = torch.zeros(len(texts)).index_add_(0, where[:, 1], F.cross_entropy(logits, targets, reduction="none"))
        right += int(losses.argmin()) == 0
    return right / len(pictures)


def stream(pictures: Sequence[Picture], size: int, seed: int) -> Iterator[list[Picture]]:
    """Endless batches; every picture once before any comes again."""
    for epoch in count():
        order = random.Random(f"{seed}/{epoch}").sample(range(len(pictures)), len(pictures))
        for start in range(0, len(order) - size + 1, size):
            yield [pictures[i] for i in order[start : start + size]]


def train(
    model: Any,
    projector: Projector,
    sources: Sequence[tuple[Sequence[Picture], int]],
    held: tuple[Sequence[Picture], Sequence[Picture]],
    options: Any,
) -> None:
    """Minimise the sum over ``sources`` (pictures, how many in a step) of their mean losses."""
    optimiser = torch.optim.AdamW(projector.inner.parameters(), lr=options.rate, weight_decay=0.0, betas=(0.9, 0.98))
    streams = [stream(pictures, size, options.seed) for pictures, size in sources]
    begin, losses = time.monotonic(), []
    for step in range(1, options.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        optimiser.zero_grad()
        total = 0.0
        for source in streams:
            logits, targets, _ = answers(model, projector, pack(next(source)))
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(projector.inner.parameters(), 1.0)
        optimiser.step()
        losses.append(total)
        if step % options.report == 0 or step == options.steps:
            questions, captions = accuracy(model, projector, held[0])[0], choosing(model, projector, held[1])
            print(
                f"step {step}/{options.steps} {time.monotonic() - begin:.0f} s loss {sum(losses) / len(losses):.3f} "
                f"held-out questions {questions:.3f} captions (1 of 10) {captions:.3f}",
                flush=True,
            )
            losses = []
            save_file(projector.folded(), options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the projector of the DINOv2 + SmolLM2 LLaVA.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=8, help="pictures with questions in a step")
    parser.add_argument("--captions", type=int, default=0, help="pictures with captions in a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--init", type=Path, help="a projector to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=100, help="steps between two reports")
    parser.add_argument("--cache", type=Path, default=None, help="default: $ECOFLAP_CACHE or ~/.cache/ecoflap")
    parser.add_argument("--output", type=Path, default=llava.PROJECTOR)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, processor = llava.assemble(options.cache)
    model.requires_grad_(False).bfloat16()
    folder = assets.fetch("easy-vqa", options.cache)
    sources = [(question_pictures(model, processor, folder / "train"), options.pictures)]
    if options.captions:
        captions = caption_pictures(model, processor, read_captions(options.cache, "train"))
        sources.append((captions, options.captions))
    held = (
        question_pictures(model, processor, folder / "test", limit=60),
        caption_pictures(model, processor, read_captions(options.cache, "test")[::4]),
    )
    stacked = torch.stack([picture.features for picture in sources[0][0]]).float().flatten(0, 1)
    projector = Projector(model, stacked.mean(0), stacked.std(0))
    if options.init:
        projector.unfold(load_file(options.init))
    projector.inner.requires_grad_(True)
    train(model, projector, sources, held, options)


if __name__ == "__main__":
    main()

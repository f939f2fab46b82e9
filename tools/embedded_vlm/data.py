"""Turns scenes, pictures and questions into tensors: cached pixels, dense labels, padded token batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from embedded_vlm.easy_vqa import Picture
from embedded_vlm.model import IMAGE_SIZE, PATCH
from embedded_vlm.questions import Question
from embedded_vlm.scenes import COLORS, GRID, PICTURE_SIZE, SHAPES, Scene, Thing, render
from embedded_vlm.tokenizer import FILLER

PATCHES = (IMAGE_SIZE // PATCH) ** 2
IGNORE = -100
# Per patch: colour and shape (0 = background), reading-order number of the thing (0 = background), row, column.
LABELS = ("color", "shape", "number", "row", "column")
LABEL_SIZES = (len(COLORS) + 1, len(SHAPES) + 1, GRID * GRID + 1, GRID, GRID)
_COLOR_IDS = {name: index + 1 for index, name in enumerate(COLORS)}
_SHAPE_IDS = {name: index + 1 for index, name in enumerate(SHAPES)}
_LEAST_PIXELS = 8  # of 64: a patch with fewer pixels of a thing counts as background


@dataclass(frozen=True)
class Pictures:
    """``pixels`` uint8 (N, 48, 48, 3), ``labels`` int8 (N, 36 patches, 5 labels), and what is in each picture.

    ``scenes`` holds None where an easy-VQA picture's own questions do not tell colour and shape.
    """

    pixels: Tensor
    labels: Tensor
    scenes: tuple[Scene | None, ...]

    def __len__(self) -> int:
        return len(self.scenes)


def draw(scenes: Sequence[Scene], seed: int) -> Pictures:
    """Render ``scenes`` with the jitter of ``seed``."""
    pixels = np.zeros((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.zeros((len(scenes), PATCHES, len(LABELS)), np.int8)
    for index, scene in enumerate(scenes):
        picture, marks = render(scene, random.Random(f"render/{seed}/{index}"))
        pixels[index] = np.asarray(_shrink(picture))
        labels[index] = _patch_labels(scene, marks)
    return Pictures(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(scenes))


def read_pictures(pictures: Sequence[Picture]) -> Pictures:
    """Load easy-VQA pictures; the thing's cell is that of the centre of the pixels that differ from the background."""
    pixels = np.zeros((len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.full((len(pictures), PATCHES, len(LABELS)), IGNORE, np.int8)
    scenes: list[Scene | None] = []
    for index, picture in enumerate(pictures):
        with Image.open(picture.path) as file:
            image = file.convert("RGB")
        pixels[index] = np.asarray(_shrink(image))
        marks = _foreground(image)
        scene = None
        if picture.color and picture.shape and marks.getbbox():
            y, x = (int(axis.mean() * GRID / PICTURE_SIZE) for axis in np.nonzero(np.asarray(marks)))
            scene = Scene((Thing(y, x, picture.color, picture.shape),))
            labels[index] = _patch_labels(scene, marks)
        scenes.append(scene)
    return Pictures(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(scenes))


def _shrink(image: Image.Image) -> Image.Image:
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)  # as the image processor does


def _foreground(image: Image.Image) -> Image.Image:
    colors = image.getcolors(PICTURE_SIZE * PICTURE_SIZE) or []
    background = Image.new("RGB", image.size, max(colors)[1])
    difference = np.asarray(ImageChops.difference(image, background)).astype(np.int32).sum(axis=-1)
    corner = np.asarray(image)[0, 0].astype(np.int32)  # a thing larger than the rest makes its own colour the commonest
    if np.abs(corner - np.asarray(background)[0, 0]).sum() > 60:
        difference = np.abs(np.asarray(image).astype(np.int32) - corner).sum(axis=-1)
    return Image.fromarray((difference > 60).astype(np.uint8))


def _patch_labels(scene: Scene, marks: Image.Image) -> np.ndarray[Any, np.dtype[np.int8]]:
    side = IMAGE_SIZE // PATCH
    small = np.asarray(marks.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST))
    tiles = small.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(PATCHES, PATCH * PATCH)
    pixels = np.stack([(tiles == number + 1).sum(axis=1) for number in range(len(scene.things))], axis=1)
    labels = np.zeros((PATCHES, len(LABELS)), np.int8)
    labels[:, 3:] = IGNORE
    for patch in np.nonzero(pixels.max(axis=1) >= _LEAST_PIXELS)[0]:
        number = int(pixels[patch].argmax())
        thing = scene.things[number]
        labels[patch] = (_COLOR_IDS[thing.color], _SHAPE_IDS[thing.shape], number + 1, thing.row, thing.column)
    return labels


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W), as the image processor does for pictures of the right size."""
    values = pixels.permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def description(scene: Scene) -> list[str]:
    """The scene in four words, one a cell in reading order: the compound name of the thing there, or a full stop."""
    names = {(thing.row, thing.column): thing.name for thing in scene.things}
    return [names.get((row, column), FILLER) for row in range(GRID) for column in range(GRID)]


class Encoder:
    """Texts to token ids, with the ids of a text kept: the same few thousand prompts come again and again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image: int = tokenizer.convert_tokens_to_ids("<image>")
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of ``text``, end token included."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text)["input_ids"]
        return self._known[text]

    def words(self, words: Sequence[str]) -> list[int]:
        """Ids of ``words``, one each, without an end token."""
        return [int(index) for index in self.tokenizer.convert_tokens_to_ids(list(words))]

    def batch(self, questions: Sequence[Question], prefixes: Sequence[list[int]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` (padding is -100), each with its prefix in front."""
        inputs = [prefix + self(q.prompt) for q, prefix in zip(questions, prefixes, strict=True)]
        targets = [self(q.answer) for q in questions]
        ids, mask = _pad(inputs, 0)
        labels, _ = _pad(targets, IGNORE)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _pad(rows: Sequence[list[int]], value: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask

"""Writes the bundled data: calibration samples from the train splits, test questions from the test splits."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from embedded_vlm.easy_vqa import Picture
from embedded_vlm.questions import KINDS, Question, ask, caption
from embedded_vlm.scenes import Scene, render, sample_scene

CALIBRATION_SAMPLES = 256
TEST_EASY = 750
TEST_SCENES_PER_KIND = 130
Row = tuple[Image.Image, Question]


def scene_rows(split: str, per_kind: int, captions: int, seed: int) -> list[Row]:
    """``per_kind`` questions of each kind and ``captions`` captions, each on a scene of its own from ``split``.

    No two scenes of the rows have the same content.
    """
    rng = random.Random(f"bundle/{split}/{seed}")
    seen: set[Scene] = set()
    rows: list[Row] = []
    for kind, wanted in [*((kind, per_kind) for kind in KINDS), ("caption", captions)]:
        found = 0
        while found < wanted:
            scene = sample_scene(rng, split)
            question = caption(scene) if kind == "caption" else ask(scene, kind, rng)
            if question is None or scene in seen:
                continue
            seen.add(scene)
            found += 1
            rows.append((render(scene, rng)[0], question))
    return rows


def easy_rows(pictures: Sequence[Picture], questions: int, seed: int) -> list[Row]:
    """``questions`` of easy-VQA drawn from all of them."""
    rng = random.Random(f"bundle/easy-vqa/{seed}")
    every = [(picture, question) for picture in pictures for question in picture.questions]
    chosen = rng.sample(every, questions)
    rows: list[Row] = []
    for picture, question in chosen:
        with Image.open(picture.path) as file:
            rows.append((file.convert("RGB"), question))
    return rows


def calibration_rows(train: Sequence[Picture], seed: int) -> list[Row]:
    """256 samples in a shuffled order: three eighths easy-VQA, the rest scenes, one in ten of these a caption."""
    easy = easy_rows(train, 96, seed)
    scenes = scene_rows("train", 24, CALIBRATION_SAMPLES - len(easy) - 24 * len(KINDS), seed)
    rows = easy + scenes
    random.Random(f"bundle/order/{seed}").shuffle(rows)
    return rows


def test_rows(test: Sequence[Picture], seed: int) -> list[Row]:
    """750 questions of the easy-VQA test split and 130 of each kind on test scenes, in a shuffled order."""
    rows = easy_rows(test, TEST_EASY, seed) + scene_rows("test", TEST_SCENES_PER_KIND, 0, seed)
    random.Random(f"bundle/order/{seed}").shuffle(rows)
    return rows


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Columns ``image`` (PNG bytes, as the Image feature of ``datasets``), ``question``, ``answer``, ``kind``."""
    import datasets

    columns: dict[str, list[Any]] = {"image": [], "question": [], "answer": [], "kind": []}
    for image, question in rows:
        columns["image"].append({"bytes": _png(image), "path": None})
        columns["question"].append(question.question)
        columns["answer"].append(question.answer)
        columns["kind"].append(question.kind)
    text = datasets.Value("string")
    schema = datasets.Features({"image": datasets.Image(), "question": text, "answer": text, "kind": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=schema).to_parquet(str(path))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()

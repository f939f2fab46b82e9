"""Scores the embedded VLM by kind, beside two blind baselines: ``PYTHONPATH=tools python -m embedded_vlm.score``.

``--easy-vqa DIR`` scores all 9,673 test questions of easy-VQA instead of the bundled ones.
"""

from __future__ import annotations

import argparse
import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ecoflap.support.embedded import model_path, test_path
from embedded_vlm import easy_vqa
from embedded_vlm.questions import CAPTION_PROMPT, PROMPT, ask_any
from embedded_vlm.scenes import sample_scenes

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Rows of a bundled parquet file: ``image`` as an RGB picture, ``question``, ``answer``, ``kind``."""
    import pyarrow.parquet as parquet

    rows: list[Row] = parquet.read_table(path).to_pylist()
    for row in rows:
        row["image"] = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return rows


def answers(model: Any, processor: Any, rows: Sequence[Row], *, blank: bool = False, batch_size: int = 64) -> list[str]:
    """Generated answers (greedy); with ``blank`` every picture is replaced by one of plain white."""
    import torch

    white = Image.new("RGB", (64, 64), "white")
    said: list[str] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        prompts = [
            row["question"] if row["question"] == CAPTION_PROMPT else PROMPT.format(question=row["question"])
            for row in part
        ]
        images = [white if blank else row["image"] for row in part]
        batch = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            # BLIP-2 generates with its language model, which does not see the outer generation config.
            ids = model.generate(**batch, max_new_tokens=model.generation_config.max_new_tokens)
        said += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return said


def accuracy_by_kind(rows: Sequence[Row], said: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Per kind, and for ``easy-vqa``, ``scenes`` and ``all``: exact-match accuracy and number of questions."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, said, strict=True):
        hit = answer == row["answer"]
        for group in (row["kind"], row["kind"].split("/")[0], "all"):
            right[group].append(hit)
    return {group: (sum(hits) / len(hits), len(hits)) for group, hits in sorted(right.items())}


def commonest_answers(training: Iterable[tuple[str, str]], rows: Sequence[Row]) -> list[str]:
    """The language-only baseline: for each row the commonest answer of the same question among ``training`` pairs.

    A question never seen gets the commonest answer of all.
    """
    per_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question, answer in training:
        per_question[question][answer] += 1
        overall[answer] += 1
    return [(per_question.get(row["question"]) or overall).most_common(1)[0][0] for row in rows]


def training_pairs(data: Path | None, scenes: int = 40000) -> list[tuple[str, str]]:
    """Question and answer pairs as in training: of ``scenes`` scenes, and of easy-VQA where ``data`` is given."""
    rng = random.Random("score/pairs")
    pairs = [(q.question, q.answer) for q in (ask_any(s, rng) for s in sample_scenes(99, "train", scenes))]
    if data is not None:
        pairs += [(q.question, q.answer) for p in easy_vqa.read(data, "train") for q in p.questions]
    return pairs


def easy_test_rows(data: Path) -> list[Row]:
    """All test questions of easy-VQA as rows."""
    rows: list[Row] = []
    for picture in easy_vqa.read(data, "test"):
        with Image.open(picture.path) as file:
            image = file.convert("RGB")
        rows += [
            {"image": image, "question": q.question, "answer": q.answer, "kind": q.kind} for q in picture.questions
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table: accuracy of the model, of the model with blank pictures, of the commonest answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--data", type=Path, default=test_path())
    parser.add_argument("--easy-vqa", type=Path, help="unpacked easy-vqa package: score its whole test split")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    data = easy_vqa.find(options.easy_vqa) if options.easy_vqa else None
    rows = easy_test_rows(data) if data else read_rows(options.data)
    columns = [
        accuracy_by_kind(rows, said)
        for said in (
            answers(model, processor, rows),
            answers(model, processor, rows, blank=True),
            commonest_answers(training_pairs(data), rows),
        )
    ]
    print("| kind | n | model | blank picture | commonest answer |\n|---|---|---|---|---|")
    for kind, (_, count) in columns[0].items():
        print(f"| {kind} | {count} | " + " | ".join(f"{100 * column[kind][0]:.1f} %" for column in columns) + " |")


if __name__ == "__main__":
    main()

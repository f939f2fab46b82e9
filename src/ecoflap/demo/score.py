"""Scores the embedded VLM on bundled questions by kind: exact match of the generated answer, and two blind baselines."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ecoflap.demo.questions import CAPTION_PROMPT, PROMPT

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
            ids = model.generate(**batch)
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

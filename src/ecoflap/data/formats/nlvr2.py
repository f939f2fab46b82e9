"""Reads NLVR2: a sentence about two images, true or false, one JSON object in each line."""

from __future__ import annotations

from collections.abc import Sequence

from ecoflap.data.tables import MappedTable, Row, Table

# https://github.com/lil-lab/nlvr/tree/master/nlvr2
PATTERNS = ("train.json", "dev.json", "test1.json", "test2.json", "balanced_*.json", "unbalanced_*.json")


def fits(columns: Sequence[str]) -> bool:
    return {"identifier", "sentence", "label"} <= set(columns)


def nlvr2(table: Table) -> MappedTable:
    """Rows with both images, the sentence as question, and "True" or "False" as answer and label."""
    return MappedTable(table, ["image", "question", "answer", "label", "image_id"], _row)


def _row(row: Row) -> Row:
    """``dev-850-0-1`` is the second sentence about ``dev-850-0-img0.png`` and ``dev-850-0-img1.png``."""
    pair = str(row.get("identifier")).rpartition("-")[0]
    split = pair.partition("-")[0]
    folder = f"{split}/{row['directory']}" if "directory" in row else split  # the training images are in folders
    label = str(row.get("label")).capitalize()
    return {
        "image": [f"{folder}/{pair}-img{number}.png" for number in (0, 1)],
        "question": row.get("sentence"),
        "answer": label,
        "label": label,
        "image_id": pair,
    }

"""Reads GQA: one JSON object of questions by id, with ``imageId``, ``question`` and ``answer``."""

from __future__ import annotations

from ecoflap.data.formats.json import JsonDocument, ObjectTable
from ecoflap.data.formats.place import Place, no_splits
from ecoflap.data.tables import MappedTable, Row

# https://cs.stanford.edu/people/dorarad/gqa/download.html
PATTERNS = ("*_balanced_questions.json", "*_all_questions.json", "testdev*_questions.json")
COLUMNS = ("image", "question", "answer", "kind", "image_id")


def open_gqa(document: JsonDocument, place: Place) -> MappedTable | None:
    """One row per question; None for another kind of document."""
    if document.kind != "object" or document.lists or not len(document.members):
        return None
    table = ObjectTable(document.members, place.source, place.path.parent)
    if not {"imageId", "question"} <= set(table.columns):
        return None
    no_splits(place)
    columns = [c for c in COLUMNS if c != "answer" or "answer" in table.columns]
    return MappedTable(table, columns, _row)


def _row(row: Row) -> Row:
    """``kind`` is the structural type: verify, query, choose, logical, compare."""
    return {
        "image": f"{row.get('imageId')}.jpg",
        "question": row.get("question"),
        "answer": row.get("answer"),
        "kind": (row.get("types") or {}).get("structural"),
        "image_id": str(row.get("imageId")),
    }

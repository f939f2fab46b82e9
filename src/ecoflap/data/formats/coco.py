"""Reads COCO captions and NoCaps: one JSON document whose ``annotations`` name ``images`` by id."""

from __future__ import annotations

from pathlib import Path

from ecoflap.data.formats.json import JsonDocument
from ecoflap.data.formats.place import Place, no_splits
from ecoflap.data.tables import Row, RowTable
from ecoflap.errors import CalibrationError

# https://cocodataset.org/#format-data and https://nocaps.org/download
PATTERNS = ("captions_*.json", "nocaps_*.json")


def open_coco(document: JsonDocument, place: Place) -> RowTable | None:
    """One row an image, with all its captions; None for another kind of document.

    Raises:
        CalibrationError: the annotations are boxes or the like, without captions.
    """
    images, notes = document.lists.get("images"), document.lists.get("annotations")
    if images is None:
        return None
    rows: dict[int, Row] = {}
    for image in images:
        if "file_name" not in image or "id" not in image:
            return None  # Karpathy's
        rows[image["id"]] = {"image": _file(image), "image_id": str(image["id"])}
        if "domain" in image:  # NoCaps: in-domain, near-domain, out-domain
            rows[image["id"]]["kind"] = image["domain"]
    no_splits(place)
    for note in notes or ():
        if "caption" not in note:
            raise CalibrationError(
                f"{place.source} holds no captions but {', '.join(note)}: give the file captions_*.json"
            )
        if (row := rows.get(note["image_id"])) is not None:
            row.setdefault("captions", []).append(note["caption"])
    found = list(rows.values()) if notes is None else [row for row in rows.values() if "captions" in row]
    return RowTable(found, place.source, place.path.parent)


def _file(image: Row) -> str:
    name = str(image["file_name"])
    return name if Path(name).suffix else f"{name}.jpg"

"""Reads Karpathy's split files of COCO, Flickr30k and Flickr8k: ``images`` with sentences and a split."""

from __future__ import annotations

from ecoflap.data.formats.json import JsonDocument
from ecoflap.data.formats.place import Place
from ecoflap.data.tables import RowTable
from ecoflap.errors import CalibrationError

PATTERNS = ("dataset_*.json", "dataset.json")
# Karpathy and Fei-Fei (2015) don't use the rest ("restval") of COCO's validation set; later work trains on it, too.
ALSO = {"train": ("restval",)}


def open_karpathy(document: JsonDocument, place: Place) -> RowTable | None:
    """One row an image of the asked split ("train" by default), with all its sentences; None for another document.

    Raises:
        CalibrationError: no such split.
    """
    images = document.lists.get("images")
    if images is None:
        return None
    wanted = place.split or "train"
    rows, splits = [], set()
    for image in images:
        if "sentences" not in image or "filename" not in image:
            return None
        splits.add(str(image.get("split")))
        if image.get("split") not in (wanted, *ALSO.get(wanted, ())):
            continue
        folder = image.get("filepath")
        rows.append(
            {
                "image": f"{folder}/{image['filename']}" if folder else image["filename"],
                "captions": [sentence["raw"] for sentence in image["sentences"]],
                "image_id": str(image.get("cocoid", image.get("imgid"))),
            }
        )
    if not rows:
        raise CalibrationError(f"{place.source} has no split '{wanted}': it has {', '.join(sorted(splits))}")
    return RowTable(rows, place.source, place.path.parent)

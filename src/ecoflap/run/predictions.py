"""Records the answers of the dense and the pruned model to each test sample, with thumbnails of a few."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ecoflap.errors import EcoflapError
from ecoflap.support.files import storage, write_atomically

if TYPE_CHECKING:
    from ecoflap.run.evaluations import Evaluation

RIGHT = 0.5  # an answer with at least this score counts as right
KINDS = ("both_right", "only_dense", "only_pruned", "both_wrong")
EXAMPLES = 8  # samples of each kind with a thumbnail
LONG_SIDE = 160  # pixels
_GAP = 4  # pixels between two images of one sample
_NEEDED = {"index": int, "prediction": str, "truth": str, "score": float}
_log = logging.getLogger("ecoflap")

Record = Mapping[str, Any]


def answers_of(predictions: Sequence[Record] | None) -> list[dict[str, Any]] | None:
    """The records of a task that scores each answer; None for any other task.

    Such a record has ``index``, ``prediction``, ``truth`` and ``score`` (0 to 1), see
    :class:`~ecoflap.evaluation.TaskResult`; captions, for instance, have no score.
    """
    rows = [dict(record) for record in predictions or ()]
    known = all(isinstance(row.get(name), kind) for row in rows for name, kind in _NEEDED.items())
    return rows if rows and known else None


def compared(dense: Sequence[Record], pruned: Sequence[Record]) -> dict[str, Any]:
    """One task's part of ``predictions.json``, without images.

    Args:
        dense, pruned: records of both models for the same samples, from :func:`answers_of`, in any order.

    Returns:
        ``rows`` in the order of ``dense``; ``counts`` of :data:`KINDS`; ``examples``: for each kind the indices of at
        most :data:`EXAMPLES` rows, spread evenly over the rows of that kind.
    """
    after = {record["index"]: record for record in pruned}
    rows: list[dict[str, Any]] = []
    of_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for record in dense:
        other = after.get(record["index"])
        if other is None:
            continue
        row = {
            "index": record["index"],
            "question": record.get("question"),
            "truth": record["truth"],
            "dense": record["prediction"],
            "pruned": other["prediction"],
            "dense_score": float(record["score"]),
            "pruned_score": float(other["score"]),
            "kind": record.get("kind"),
            "picture": None,
        }
        rows.append(row)
        of_kind[outcome(row)].append(row["index"])
    return {
        "rows": rows,
        "counts": {kind: len(found) for kind, found in of_kind.items()},
        "examples": {kind: spread(found, EXAMPLES) for kind, found in of_kind.items()},
    }


def outcome(row: Mapping[str, Any]) -> str:
    """The kind of a row, one of :data:`KINDS`."""
    dense, pruned = row["dense_score"] >= RIGHT, row["pruned_score"] >= RIGHT
    return KINDS[0 if dense and pruned else 1 if dense else 2 if pruned else 3]


def spread(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``items``, evenly spaced, since data sets are often sorted by class."""
    if len(items) <= count:
        return list(items)
    return [items[position * len(items) // count] for position in range(count)]


def add_pictures(tasks: dict[str, dict[str, Any]], entries: Iterable[Evaluation], seed: int, folder: Path) -> None:
    """Write thumbnails of each task's examples into ``folder``/pictures, and name them in its rows.

    If the data can't be read any more, there are no thumbnails, and a warning is logged.

    Args:
        tasks: as in ``predictions.json``; changed in place.
        entries: the evaluations; the tasks have their names.
        seed: of the run, with which the samples were drawn.

    Raises:
        StorageError: an image can't be written.
    """
    taken: set[str] = set()
    for entry in entries:
        task = tasks.get(entry.name)
        if task is None:
            continue
        stem = _file_stem(entry.name, taken)
        wanted = sorted({index for found in task["examples"].values() for index in found})
        try:
            pictures = _pictures(entry, seed, wanted)
        except EcoflapError as error:
            _log.warning("%s: no images of its examples: %s", entry.name, error)
            continue
        by_index = {row["index"]: row for row in task["rows"]}
        for index, picture in pictures.items():
            name = f"pictures/{stem}-{index:06d}.png"
            write_png(folder / name, picture)
            by_index[index]["picture"] = name


def _file_stem(name: str, taken: set[str]) -> str:
    """An unused file name of letters, digits, ``-`` and ``_`` for an evaluation with any name."""
    stem = base = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "task"
    number = 1
    while stem.lower() in taken:
        number += 1
        stem = f"{base}-{number}"
    taken.add(stem.lower())
    return stem


def _pictures(entry: Evaluation, seed: int, indices: Sequence[int]) -> dict[int, Image.Image]:
    """Thumbnails by row of the test data; rows without images are left out."""
    from ecoflap.data.samples import SampleReader

    source = entry.test
    if source is None:
        from ecoflap.support import embedded

        source = str(embedded.test_path())
    reader = SampleReader(source, samples=entry.samples, seed=seed, **entry.reading())
    return {index: thumbnail(sample.images) for index, sample in reader.at(indices) if sample.images}


def thumbnail(images: Sequence[Image.Image]) -> Image.Image:
    """A sample's images side by side, scaled down so that no side is above :data:`LONG_SIDE` pixels."""
    height = min(max(image.height for image in images), LONG_SIDE)
    same = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    whole = Image.new("RGB", (sum(image.width for image in same) + _GAP * (len(same) - 1), height), "white")
    left = 0
    for image in same:
        whole.paste(image, (left, 0))
        left += image.width + _GAP
    whole.thumbnail((LONG_SIDE, LONG_SIDE))
    return whole


def write_png(path: Path, picture: Image.Image) -> None:
    """Atomically write an image. Raises StorageError."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))

"""Reads the class names of ImageNet: translates synset ids into words by the published mapping files."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

SYNSET = re.compile(r"n\d{8}")
MAPPINGS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt", "map_clsloc.txt", "imagenet_class_index.json")
SOLUTIONS = ("LOC_val_solution.csv", "val.txt", "val_map.txt")
ABOVE = 4  # levels above the images that are searched for the files (ILSVRC/Data/CLS-LOC/val)


def readable(folder: Path, names: Sequence[str]) -> list[str]:
    """Class names for the folder names of ``folder``: words for synset ids if there is a mapping file.

    Of several words the first is taken ("tench, Tinca tinca"), unless another class has the same ("crane").
    """
    if not all(SYNSET.fullmatch(name) for name in names):
        return list(names)
    file = _above(folder, MAPPINGS)
    if file is None:
        return list(names)
    words = dict(_index(file) if file.suffix == ".json" else _lines(file))
    first = {name: words.get(name, name).split(",")[0].strip() for name in names}
    seen = Counter(first.values())
    full = [first[name] if seen[first[name]] == 1 else words.get(name, name) for name in names]
    again = Counter(full)
    return [word if again[word] == 1 else f"{word} ({name})" for word, name in zip(full, names, strict=True)]


def labels_of(folder: Path, images: Sequence[str]) -> tuple[list[int], list[str]] | None:
    """Classes of the images in a flat folder (ImageNet's ``val``), by the published list; None without such a list."""
    file = _above(folder, SOLUTIONS)
    if file is None:
        return None
    with file.open(newline="", encoding="utf-8-sig") as stream:
        if file.suffix == ".csv":
            found = {row[0]: row[1].split()[0] for row in csv.reader(stream) if len(row) > 1 and row[1].split()}
        else:
            found = {Path(row[0]).stem: row[1] for row in map(str.split, stream) if len(row) == 2}
    classes = [found.get(Path(image).stem) for image in images]
    names = sorted(found[key] for key in found if SYNSET.fullmatch(found[key]))
    names = list(dict.fromkeys(names))
    if any(name not in names for name in classes):
        return None
    number = {name: i for i, name in enumerate(names)}
    return [number[str(name)] for name in classes], readable(folder, names)


def _above(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the files ``names`` in ``folder`` or the folders above it."""
    above = [folder, *folder.absolute().parents][: ABOVE + 1]
    return next((place / name for place in above for name in names if (place / name).is_file()), None)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """``n01440764 tench, Tinca tinca``; in map_clsloc.txt ``n02119789 1 kit_fox``."""
    for line in file.read_text("utf-8-sig").splitlines():
        synset, _, words = line.strip().partition("\t" if "\t" in line else " ")
        number, _, rest = words.partition(" ")
        if SYNSET.fullmatch(synset):
            yield synset, rest.replace("_", " ") if number.isdigit() and rest else words.strip()


def _index(file: Path) -> Iterator[tuple[str, str]]:
    """``{"0": ["n01440764", "tench"], ...}``."""
    for synset, word in json.loads(file.read_bytes()).values():
        yield str(synset), str(word).replace("_", " ")

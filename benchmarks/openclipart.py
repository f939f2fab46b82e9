"""Turns Debian's Open Clip Art packages into a folder of labelled pictures with titles, duplicates left out."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SIDE = 224  # pixels of the longer side; the packages hold pictures of every size
TEST_SHARE = 5  # every fifth picture, by its hash, is held out
LEFT_OUT = ("unsorted", "special", "logos")  # no subject of their own
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


def write(png: Path, svg: Path, made: Path) -> None:
    """Write ``train/CATEGORY/NAME.png``, ``test/CATEGORY/NAME.png`` and ``titles-train.jsonl``, ``titles-test.jsonl``.

    The category is the top folder that the library files a picture under; title and keywords come from the SVG of the
    same name. Of pictures that look the same, the first is kept. The titles have file_name, title, keywords, label.
    """
    seen: set[str] = set()
    titles: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for file in sorted(png.rglob("*.png")):
        relative = file.relative_to(png)
        category = relative.parts[0]
        if category in LEFT_OUT or file.is_symlink():
            continue
        try:
            picture = _on_white(file)
        except (OSError, Image.DecompressionBombError):
            continue  # a few files of the package are damaged, one is larger than a poster
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        split = "test" if int(digest[:8], 16) % TEST_SHARE == 0 else "train"
        name = "-".join(relative.parts[1:])
        target = made / split / category / name
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        title, keywords = _described(svg / relative.with_suffix(".svg"))
        row = {"file_name": f"{split}/{category}/{name}", "title": title, "keywords": keywords, "label": category}
        titles[split].append(row)
    for split, rows in titles.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (made / f"titles-{split}.jsonl").write_text(lines, encoding="utf-8")


def _on_white(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square.convert("RGB")


def _described(file: Path) -> tuple[str, list[str]]:
    """Title and keywords in the metadata of an SVG file; empty where there are none."""
    try:
        work = next(_works(file))
    except (OSError, ElementTree.ParseError, StopIteration):
        return "", []
    title = (work.findtext(f"{DUBLIN_CORE}title") or "").strip()
    keywords = [(entry.text or "").strip() for entry in work.iterfind(f"{DUBLIN_CORE}subject/{RDF}Bag/{RDF}li")]
    return title, [keyword for keyword in keywords if keyword]


def _works(file: Path) -> Iterator[ElementTree.Element]:
    for element in ElementTree.parse(file).iter():
        if element.tag.endswith("}Work"):
            yield element

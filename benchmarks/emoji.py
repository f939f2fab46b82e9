"""Turns the npm package of Google's emoji pictures into two image folders with names as captions."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

TEST_SHARE = 10  # every tenth emoji, by the hash of its name, is held out
LEFT_OUT = ("Flags", "Component")  # names of countries, and parts of other emoji


def write(archive: Path, made: Path) -> None:
    """Write ``train/`` and ``test/`` with PNG files on white and ``metadata.jsonl``: file_name, caption, label."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    with tarfile.open(archive) as stream:
        members = {member.name: member for member in stream.getmembers() if member.isfile()}

        def read(name: str) -> bytes:
            source = stream.extractfile(members[name])
            assert source is not None  # a regular file
            return source.read()

        for entry in json.loads(read("package/emoji.json")):
            file = f"package/img/google/64/{entry['image']}"
            if entry["category"] in LEFT_OUT or file not in members:
                continue
            caption = entry["name"].lower() if entry["name"] else entry["short_name"].replace("_", " ")
            split = "test" if hashlib.sha256(caption.encode()).digest()[0] % TEST_SHARE == 0 else "train"
            with Image.open(io.BytesIO(read(file))) as opened:
                picture = opened.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            name = Path(entry["image"]).name
            (made / split).mkdir(exist_ok=True)
            white.convert("RGB").save(made / split / name)
            rows[split].append({"file_name": name, "caption": caption, "label": entry["category"]})
    for split, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (made / split / "metadata.jsonl").write_text(text, encoding="utf-8")

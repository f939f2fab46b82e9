"""Tiny data in the published formats, where the recipes expect it, and in place of the hub's data sets."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families.vlm_words import picture

COLOURS, SHAPES = ("red", "blue", "green"), ("circle", "square", "triangle", "star")
SUBJECTS = ("anatomy", "high_school_biology")


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, 16 + 4 * (number % 3), 20).save(path, "PNG")


def _json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), "utf-8")


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _said(number: int) -> str:
    return f"a {COLOURS[number % 3]} {SHAPES[number % 4]} in the image"


def vqa(folder: Path, pictures: Path, prefix: str, split: str, count: int = 8) -> None:
    """VQAv2 (prefix ``v2_``) and OK-VQA."""
    asked, notes = [], []
    for number in range(count):
        write_picture(pictures / f"COCO_{split}_{number:012d}.jpg", number)
        question = f"what color is the {SHAPES[number % 4]} ?"
        asked.append({"image_id": number, "question": question, "question_id": number})
        answers = [{"answer": COLOURS[number % 3], "answer_id": i} for i in range(10)]
        notes.append({"question_id": number, "image_id": number, "answer_type": "other", "answers": answers})
    _json(folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"questions": asked, "data_subtype": split})
    _json(folder / f"{prefix}mscoco_{split}_annotations.json", {"annotations": notes, "data_subtype": split})


def gqa(folder: Path, count: int = 8) -> None:
    questions = {}
    for number in range(count):
        write_picture(folder / "images" / f"n{number}.jpg", number)
        questions[f"q{number}"] = {
            "imageId": f"n{number}", "question": f"is the {SHAPES[number % 4]} red ?", "answer": "yes",
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
        }  # fmt: skip
    _json(folder / "testdev_balanced_questions.json", questions)


def nocaps(folder: Path, count: int = 6) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "open_images_id": str(n), "domain": "in-domain"} for n in range(count)]
    notes = [{"id": 10 * n + k, "image_id": n, "caption": f"{_said(n + k)} ."} for n in range(count) for k in range(3)]
    for number in range(count):
        write_picture(folder / "images" / f"{number}.jpg", number)
    _json(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": notes})


def karpathy(file: Path, pictures: Path, folder: str | None, count: int = 8) -> None:
    """COCO (with ``folder``) and Flickr30k in Karpathy's split."""
    images = []
    for number in range(2 * count):
        split = "train" if number < count else "test"
        write_picture(pictures / (folder or "") / f"{number}.jpg", number)
        sentences = [{"raw": f"{_said(number + k)} ."} for k in range(2)]
        images.append({"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences})
        if folder is not None:
            images[-1] |= {"filepath": folder, "cocoid": number}
    _json(file, {"images": images, "dataset": "coco" if folder else "flickr30k"})


def nlvr2(folder: Path, count: int = 8) -> None:
    for split, name in (("train", "train.json"), ("test1", "test1.json")):
        rows = []
        for number in range(count):
            pair = f"{split}-{number}-0"
            row = {
                "identifier": f"{pair}-0",
                "sentence": f"the left image is {COLOURS[number % 3]}",
                "label": str(bool(number % 2)),
            }
            place = folder / "test1"
            if split == "train":
                row["directory"], place = number % 2, folder / "images" / "train" / str(number % 2)
            rows.append(row)
            for side in (0, 1):
                write_picture(place / f"{pair}-img{side}.png", number + 5 * side)
        _lines(folder / name, rows)


def webdataset(path: Path, count: int = 8) -> None:
    """A tar of pictures and captions, as CC3M is on the hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            stream = io.BytesIO()
            picture(number, 20, 20).save(stream, "PNG")
            for suffix, content in (("jpg", stream.getvalue()), ("txt", _said(number).encode())):
                entry = tarfile.TarInfo(f"{number:09d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def c4(path: Path, words: Sequence[str], count: int = 8) -> None:
    choose = random.Random(0)
    rows = [{"text": " ".join(choose.choices(words, k=60)), "url": "http://x", "timestamp": "t"} for _ in range(count)]
    _lines(path, rows)


def wikitext(path: Path, words: Sequence[str], count: int = 8) -> None:
    choose = random.Random(1)
    rows = [{"text": "" if n % 2 else " ".join(choose.choices(words, k=50)) + " \n"} for n in range(2 * count)]
    _lines(path, rows)


def mmlu(path: Path, count: int) -> None:
    rows = []
    for number in range(count):
        rows.append({
            "question": f"what color is the {SHAPES[number % 4]} ?", "subject": SUBJECTS[number % 2],
            "choices": ["red", "blue", "green", "yellow"], "answer": number % 4,
        })  # fmt: skip
    _lines(path, rows)


def class_folders(folder: Path, names: Sequence[str], each: int = 3) -> None:
    for number, name in enumerate(names):
        for i in range(each):
            write_picture(folder / name / f"{i}.png", number * each + i)

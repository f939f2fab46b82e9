"""Reads VQAv2 and OK-VQA: a file of questions and a file of annotations, joined by the question id."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

from ecoflap.data.formats.json import JsonDocument, Objects
from ecoflap.data.formats.place import Place, no_splits
from ecoflap.data.images import BrokenSample
from ecoflap.data.tables import ClassNames, Taken
from ecoflap.errors import CalibrationError

# https://visualqa.org/vqa_v2_teaser.html, https://okvqa.allenai.org/download.html
PATTERNS = ("*OpenEnded_mscoco_*_questions.json",)


class VqaTable:
    """One row per question; objects of both files are read when they are drawn."""

    def __init__(self, questions: Objects, notes: Objects | None, subtype: str, folder: Path, source: str) -> None:
        self.source, self._questions, self._notes, self._subtype = source, questions, notes, subtype
        self.folder: Path | None = folder
        self.class_names: ClassNames = {}
        self.columns = ["image", "question", "image_id"]
        self._note_of = array("Q")  # annotation of each question
        if notes is not None:
            self.columns += ["answers", "answer", "answer_type"]
            numbers = {note["question_id"]: number for number, note in enumerate(notes)}
            for question in questions:
                number = numbers.get(question["question_id"])
                if number is None:
                    raise CalibrationError(
                        f"{source}: question {question['question_id']} has no annotation: the files are of two splits"
                    )
                self._note_of.append(number)

    def __len__(self) -> int:
        return len(self._questions)

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> Taken:
        for index, question in zip(indices, self._questions.take(indices), strict=True):
            if isinstance(question, BrokenSample):
                yield question
                continue
            number = question["image_id"]
            row = {
                "image": f"{self._subtype}/COCO_{self._subtype}_{int(number):012d}.jpg",
                "question": question["question"],
                "image_id": str(number),
            }
            if self._notes is not None:
                note = next(self._notes.take([self._note_of[index]]))
                if isinstance(note, BrokenSample):
                    yield note
                    continue
                row |= {
                    "answers": [answer["answer"] for answer in note["answers"]],
                    "answer": note.get("multiple_choice_answer"),
                    "answer_type": note.get("answer_type"),
                }
            yield row


def open_vqa(document: JsonDocument, place: Place) -> VqaTable | None:
    """Questions and annotations, from either of the two files and the other one beside it; None for other documents.

    Raises:
        CalibrationError: the questions' file is not there, or the files don't belong together.
    """
    questions, notes = document.lists.get("questions"), document.lists.get("annotations")
    if questions is None and (notes is None or "question_id" not in next(iter(notes))):
        return None
    no_splits(place)
    name = place.path.name
    if questions is None:
        document = _beside(
            place, [f"OpenEnded_{name}", name.replace("v2_", "v2_OpenEnded_")], "annotations", "questions"
        )
        questions = document.lists.get("questions")
    elif notes is None and (file := _found(place, [name.replace("OpenEnded_", "")], "questions", "annotations")):
        notes = JsonDocument(file, place.source).lists.get("annotations")  # None in a test set
    if questions is None:
        raise CalibrationError(f"{place.source}: the file of its questions holds no questions")
    subtype = document.texts.get("data_subtype") or _subtype(name)
    return VqaTable(questions, notes, subtype, place.path.parent, place.source)


def _beside(place: Place, names: Sequence[str], this: str, other: str) -> JsonDocument:
    file = _found(place, names, this, other)
    if file is None:
        tried = ", ".join(name.replace(this, other) for name in names)
        raise CalibrationError(f"{place.source}: the {other} are not beside it ({tried}): put both files in one folder")
    return JsonDocument(file, place.source)


def _found(place: Place, names: Sequence[str], this: str, other: str) -> Path | None:
    """The first existing file beside ``place`` of ``names``, where ``other`` replaces the word ``this``."""
    files = [place.path.with_name(name.replace(this, other)) for name in names]
    return next((file for file in files if file.is_file() and file != place.path), None)


def _subtype(name: str) -> str:
    """``val2014`` from ``v2_OpenEnded_mscoco_val2014_questions.json``."""
    found = [
        part for part in name.split("_") if part[:-4] in ("train", "val", "test", "test-dev") and part[-4:].isdigit()
    ]
    return found[0] if found else "train2014"

"""Reads easy-VQA (MIT licence, PyPI ``easy-vqa``): 64 px pictures of one shape, with questions and answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ecoflap.errors import CalibrationError
from embedded_vlm.questions import Question
from embedded_vlm.scenes import COLORS, SHAPES


@dataclass(frozen=True)
class Picture:
    """One picture with its questions; ``color`` and ``shape`` are those that the answers tell."""

    path: Path
    color: str
    shape: str
    questions: tuple[Question, ...]


def find(folder: str | Path | None) -> Path:
    """The ``data`` folder of easy-VQA: in ``folder``, below it, or in the installed package.

    Raises CalibrationError if it is nowhere.
    """
    if folder is None:
        try:
            import easy_vqa
        except ImportError as error:
            raise CalibrationError(
                "easy-VQA is not installed: pip install easy-vqa==1.0, or give --easy-vqa"
            ) from error
        folder = Path(easy_vqa.__file__).parent
    found = sorted(Path(folder).glob("**/train/questions.json"))
    if not found:
        raise CalibrationError(f"no easy-VQA data (train/questions.json) in {folder}: give the unpacked package")
    return found[0].parent.parent


def read(data: Path, split: str) -> list[Picture]:
    """All pictures of ``split`` (``train`` or ``test``) that have questions, by number."""
    by_picture: dict[int, list[Question]] = {}
    for question, answer, number in json.loads((data / split / "questions.json").read_text()):
        by_picture.setdefault(number, []).append(Question(question, answer, f"easy-vqa/{_kind(answer)}"))
    pictures = []
    for number, questions in sorted(by_picture.items()):
        color, shape = _attributes(questions)
        pictures.append(Picture(data / split / "images" / f"{number}.png", color, shape, tuple(questions)))
    return pictures


def _kind(answer: str) -> str:
    if answer in COLORS:
        return "color"
    return "shape" if answer in SHAPES else "yes-no"


def _attributes(questions: list[Question]) -> tuple[str, str]:
    """Colour and shape of the one thing, from its questions; an attribute that none tells is the empty string."""
    color = shape = ""
    for question in questions:
        words = question.question.rstrip("?").split()
        affirms = question.answer in COLORS or question.answer in SHAPES
        affirms = affirms or (question.answer == "yes") != bool({"not", "no"} & set(words))
        for word in (question.answer, *(words if affirms else ())):
            color = word if word in COLORS else color
            shape = word if word in SHAPES else shape
    return color, shape

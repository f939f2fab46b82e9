"""Guesses which column of a data set holds the image, the question, the answer; every guess can be overridden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ecoflap.errors import CalibrationError
from ecoflap.registry import unknown

# Usual names of each role, the likeliest first; compared without case, spaces, "-" and "_".
NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_path", "img_path", "image_file",
              "file_name", "filename", "path"),
    "question": ("question", "query"),
    "prompt": ("prompt", "instruction", "input"),
    "answers": ("answers",),
    "text": ("answer", "multiple_choice_answer", "text", "caption", "captions", "txt", "response", "label", "labels",
             "output", "target", "completion", "sentence", "sentences", "content", "title"),
    "kind": ("kind", "question_type", "type"),
}  # fmt: skip
# With a question or prompt the target is an answer; "text" may then be something else (OCR, context): late.
TARGET_NAMES = ("answer", "multiple_choice_answer", "response", "output", "completion", "target", "label", "labels",
                "text", "caption")  # fmt: skip
ROLES = (*NAMES, "answer", "caption", "label")
SYNONYMS = {"answer": "text", "caption": "text", "label": "text"}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def guess_columns(available: Sequence[str], chosen: Mapping[str, str] | None, source: str) -> dict[str, str]:
    """Role (``image``, ``question``, ``prompt``, ``text``, ``answers``, ``kind``) to column name.

    Args:
        available: columns of the data set.
        chosen: role to column, over the guess; ``answer``, ``caption`` and ``label`` mean ``text``; an empty string
            says that the data set has no such column.
        source: for messages.

    Raises:
        UnknownName: a role that does not exist.
        CalibrationError: a chosen column is not there, or nothing usable is found.
    """
    overrides: dict[str, str] = {}
    for role, column in (chosen or {}).items():
        if role not in ROLES:
            raise unknown("column role", role, list(ROLES))
        overrides[SYNONYMS.get(role, role)] = column
        if column and column not in available:
            raise CalibrationError(f"{source} has no column '{column}' (for {role}): it has {', '.join(available)}")
    plain = {_plain(name): name for name in reversed(available)}  # of two alike, the first column wins
    taken = {column for column in overrides.values() if column}
    found: dict[str, str] = {}
    for role, names in NAMES.items():
        if role in overrides:
            if overrides[role]:
                found[role] = overrides[role]
            continue
        if role == "prompt" and "question" in found:
            continue
        if role == "text" and ("question" in found or "prompt" in found):
            names = TARGET_NAMES
        match = next((plain[_plain(n)] for n in names if plain.get(_plain(n), "") not in ("", *taken)), None)
        if match is not None:
            found[role] = match
            taken.add(match)
    if not {"image", "text", "answers"} & found.keys():
        raise CalibrationError(
            f"{source}: none of its columns ({', '.join(available)}) has a usual name for an image or a text; "
            "say which ones hold them (image=..., question=..., text=...)"
        )
    return found

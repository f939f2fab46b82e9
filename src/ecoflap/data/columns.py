"""Guesses which column of a data set holds the image, the question and the answer; options override every guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ecoflap.errors import CalibrationError
from ecoflap.support.registry import unknown

# Usual names of each role, the likeliest first; compared without case, spaces, "-", "_" and ".".
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "image": ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture", "pictures", "image_path", "img_path",
              "image_file", "file_name", "filename", "filepath", "path", "bmp", "gif", "tif", "tiff"),
    "question": ("question", "query", "question_stem", "goal"),
    "prompt": ("prompt", "instruction", "input"),
    "context": ("context", "passage"),
    "choices": ("choices", "options"),
    "answers": ("answers",),
    "text": ("answer", "multiple_choice_answer", "text", "caption", "captions", "txt", "response", "output", "target",
             "completion", "sentence", "sentences", "content", "title"),
    "label": ("label", "labels", "cls", "class", "class_name", "category"),
    "kind": ("kind", "answer_type", "question_type", "type", "subject"),
    "group": ("image_id", "img_id", "cocoid"),
}  # fmt: skip
# With a question or prompt the target is an answer; "text" comes late, since it may be something else (OCR, context).
TARGET_NAMES = ("answer", "answer_key", "multiple_choice_answer", "response", "output", "completion", "target", "gold",
                "label", "labels", "text", "caption")  # fmt: skip
# Roles that are often spread over several columns: two images, lettered options.
SPREAD: dict[str, tuple[tuple[str, ...], ...]] = {
    "image": (("image_0", "image_1"), ("image_1", "image_2"), ("img0", "img1"), ("left_image", "right_image"),
              ("image_left", "image_right")),
    "choices": (("A", "B", "C", "D", "E"), ("A", "B", "C", "D"), ("A", "B", "C"), ("sol1", "sol2"),
                ("answerA", "answerB", "answerC"), ("option1", "option2"), ("ending0", "ending1", "ending2", "ending3"),
                ("opa", "opb", "opc", "opd")),
}  # fmt: skip
FILE_NAMES = ("filename", "filenames")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")  # suffixes of a tar's members
ROLES = (*NAMES, "answer", "caption")
SYNONYMS = {"answer": "text", "caption": "text"}


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character not in "_- .")


def _names(column: str) -> tuple[str, ...]:
    """The names to match a column by: its own, and for a tar's member (``image.png``) that without the suffix."""
    stem, _, suffix = column.rpartition(".")
    of_file = stem and suffix.lower() in (*PICTURES, "txt", "cls")
    return (_plain(column), _plain(stem)) if of_file else (_plain(column),)


def is_file_name(column: str) -> bool:
    """Whether the image folder of `datasets` reads this column as names of images."""
    return _plain(column).endswith(FILE_NAMES)


def parts(column: str, available: Sequence[str]) -> list[str]:
    """The columns that a role's entry names: one, or several with commas between ("A,B,C,D")."""
    if column in available or "," not in column:
        return [column]
    return [part.strip() for part in column.split(",")]


def guess_columns(available: Sequence[str], chosen: Mapping[str, str] | None, source: str) -> dict[str, str]:
    """Role (``image``, ``question``, ``text``, ...: the keys of :data:`NAMES`) to column name.

    Several columns of one role (two images, one column per option) are separated by commas.

    Args:
        available: columns of the data set.
        chosen: columns by role, which override the guess; ``answer`` and ``caption`` mean ``text``; an empty string
            means that the data set has no such column.
        source: for messages.

    Raises:
        UnknownName: a role that does not exist.
        CalibrationError: a chosen column is not there, or nothing usable is found.
    """
    overrides = _chosen(available, chosen or {}, source)
    plain: dict[str, str] = {}  # of equal names the first is used; whole names come before parts
    for known in zip_longest(*map(_names, available)):
        for key, name in zip(known, available, strict=True):
            if key is not None:
                plain.setdefault(key, name)
    taken = {part for column in overrides.values() for part in parts(column, available)}
    found: dict[str, str] = {}
    for role, names in NAMES.items():
        if role in overrides:
            if overrides[role]:
                found[role] = overrides[role]
            continue
        asks = bool({"question", "prompt", "messages"} & found.keys())
        if (role == "prompt" and "question" in found) or (role in ("context", "choices") and not asks):
            continue
        if role in ("question", "prompt", "text", "answers") and "messages" in found:
            continue  # a chat contains these roles
        if role == "text" and asks:
            names = TARGET_NAMES
        match = [plain[_plain(n)] for n in names if plain.get(_plain(n), "") not in ("", *taken)][:1]
        match = match or _spread(role, plain, taken)
        if match:
            found[role] = ",".join(match)
            taken.update(match)
    unclear = [name for name in available if name.rpartition(".")[2].lower() in PICTURES and "." in name]
    if unclear and "image" not in found and "image" not in overrides:
        raise CalibrationError(
            f"{source} has images ({', '.join(unclear[:3])}), but none has a usual name: "
            f"name the one to use with image={unclear[0]}, or image= for none"
        )
    if not {"image", "text", "answers", "messages"} & found.keys():
        raise CalibrationError(
            f"{source}: none of its columns ({', '.join(available)}) has a usual name for an image or a text; "
            "say which ones hold them (image=..., question=..., text=...)"
        )
    return found


def other_pictures(available: Sequence[str], columns: Mapping[str, str], chosen: Mapping[str, str] | None) -> list[str]:
    """Columns with the image of a row whose image column is empty: rows of one source may have ``jpg`` or ``png``,
    ``image`` or ``image_path``. Empty if the user chose the column."""
    if "image" in (chosen or {}) or "messages" in columns or len(parts(columns.get("image", ","), available)) != 1:
        return []
    taken = {part for column in columns.values() for part in parts(column, available)}
    return [
        name for known in NAMES["image"] for name in available if _plain(known) in _names(name) and name not in taken
    ]


def _chosen(available: Sequence[str], chosen: Mapping[str, str], source: str) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for role, column in chosen.items():
        if role not in ROLES:
            raise unknown("column role", role, list(ROLES))
        overrides[SYNONYMS.get(role, role)] = column
        for part in parts(column, available) if column else ():
            if part not in available:
                raise CalibrationError(f"{source} has no column '{part}' (for {role}): it has {', '.join(available)}")
    return overrides


def _spread(role: str, plain: Mapping[str, str], taken: set[str]) -> list[str]:
    if role == "image":  # the image folder of `datasets`: any `*_file_name` names one, any `*_file_names` several
        named = [column for column in dict.fromkeys(plain.values()) if is_file_name(column) and column not in taken]
        if named:
            return named
    for names in SPREAD.get(role, ()):
        match = [plain[_plain(name)] for name in names if plain.get(_plain(name), "") not in ("", *taken)]
        if len(match) == len(names):
            return match
    return []

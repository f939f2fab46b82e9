"""Converts one row of a data set into a sample: columns, images, class names, options of multiple choice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ecoflap.data.chat import read_chat
from ecoflap.data.columns import parts
from ecoflap.data.images import BrokenSample, ImageFinder, decode
from ecoflap.data.sample import Sample
from ecoflap.data.tables import ClassNames, Row
from ecoflap.errors import CalibrationError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s+(.*)", re.DOTALL)
# Columns of options whose data sets (SIQA, WinoGrande) count the right one from 1.
COUNTED_FROM_ONE = ("answerA", "option1")


@dataclass(frozen=True)
class Choices:
    """Options and their labels ("A", "B", ... by default)."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def right(self, value: Any, first_column: str) -> str | None:
        """Text of the right option; None if the data set does not publish it (missing, empty, -1).

        Args:
            value: its text, letter, letter and text ("B. blue"), or number from 0.
            first_column: name of the (first) column of options.

        Raises:
            BrokenSample: it is none of the options.
        """
        text = str(value).strip() if value is not None and not isinstance(value, bool) else ""
        if text in ("", "-1"):
            return None
        if isinstance(value, str):
            for number, (option, label) in enumerate(zip(self.texts, self.labels, strict=True)):
                if text in (option.strip(), label, f"{label}.", f"({label})"):
                    return self.texts[number]
            if (match := LETTERED.match(text)) and match[1] in self.labels:
                return self.texts[self.labels.index(match[1])]
        if text.isdigit():
            number = int(text) - (1 if first_column in COUNTED_FROM_ONE else 0)
            if 0 <= number < len(self.texts):
                return self.texts[number]
        raise BrokenSample(f"the answer '{text[:40]}' is none of the {len(self.texts)} choices")


def read_choices(value: Any) -> Choices:
    """Options from a list of texts or of ``{"label", "text"}``, ``{"label": [...], "text": [...]}``, or lettered lines.

    Raises:
        BrokenSample: fewer than two options.
    """
    labels: Sequence[Any] = ()
    texts: Sequence[Any] = ()
    if isinstance(value, str):
        texts = _lettered(value)
    elif isinstance(value, dict) and isinstance(value.get("text"), (list, tuple)):
        texts, labels = value["text"], value.get("label", ())
    elif isinstance(value, dict):  # {"A": "red", "B": "blue"}
        texts, labels = list(value.values()), list(value)
    elif isinstance(value, (list, tuple)):
        dicts = [entry for entry in value if isinstance(entry, dict)]
        texts = [entry.get("text") for entry in dicts] if dicts else value
        labels = [entry.get("label") for entry in dicts]
    texts = [str(text) for text in texts if text not in (None, "")]
    if len(texts) < 2:
        raise BrokenSample("there are no choices")
    known = len(labels) == len(texts) and all(label is not None for label in labels)
    return Choices(tuple(texts), tuple(str(label) for label in labels) if known else tuple(LETTERS[: len(texts)]))


def _lettered(text: str) -> list[str]:
    """Options of "A. red\\nB. blue"; a line without the next letter belongs to the option before it."""
    found: list[str] = []
    for line in text.strip().splitlines():
        match = LETTERED.match(line)
        if match and len(found) < len(LETTERS) and match[1] == LETTERS[len(found)]:
            found.append(match[2].strip())
        elif found:
            found[-1] = f"{found[-1]}\n{line}".strip()
    return found


_BLANK = Image.new("RGB", (1, 1))
DEFAULT_TEMPLATE = "Question: {question} Short answer:"  # of BLIP-2 on VQAv2


class RowReader:
    """Makes samples of rows.

    Args:
        columns: the result of :func:`ecoflap.data.columns.guess_columns`.
        available: columns of the table.
        class_names: names of classes, for columns with class numbers.
        finder: finds image files.
        template: with ``{question}``; None for the default.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        available: Sequence[str],
        class_names: ClassNames,
        finder: ImageFinder,
        template: str | None,
        others: Sequence[str] = (),
    ) -> None:
        self._others = others
        self._columns, self._available, self._names = columns, available, class_names
        self._finder, self._template = finder, template
        self._only_text = not ({"image", "question", "prompt", "messages"} & columns.keys())

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of all classes in the order of their numbers, if the data set has them."""
        names = self._names.get(self._columns.get("label", ""))
        return None if names is None else tuple(names)

    def __call__(self, row: Row | BrokenSample, pictures: bool = True) -> Sample:
        """The sample of ``row``; raises BrokenSample if it cannot be used.

        Args:
            pictures: decode the images; otherwise each is replaced by one blank pixel.
        """
        if isinstance(row, BrokenSample):
            raise row
        columns = self._columns
        kind, group = (self._plain(row, role) for role in ("kind", "group"))
        label = self._label(row)
        if "messages" in columns:
            chat = read_chat(row.get(columns["messages"]), self._value(row, "image"))
            images = decode(chat.images, self._finder)
            return Sample(
                images,
                chat.prompt,
                chat.text,
                chat.question,
                kind=kind,
                label=label,
                messages=chat.messages,
                group=group,
            )
        images = ()
        if "image" in columns:
            images = decode(self._value(row, "image"), self._finder) if pictures else (_BLANK,)
        if "image" in columns and not images:
            raise BrokenSample("the image is missing")
        answers = _answers(row.get(columns["answers"])) if "answers" in columns else None
        question, prompt = self._question(row)
        choices = read_choices(self._value(row, "choices")) if "choices" in columns else None
        captions: tuple[str, ...] | None = None
        if choices is not None and "text" in columns:
            first = parts(columns["choices"], self._available)[0]
            text = choices.right(row.get(columns["text"]), first)
        elif "text" in columns and not (answers and row.get(columns["text"]) in (None, "")):
            value = self._named(row.get(columns["text"]), columns["text"])
            # In plain text, an empty row is a blank line: WikiText has them around headings.
            blank = self._only_text and isinstance(value, str) and not value.strip()
            text = value if blank else _text(value, columns["text"])
            if isinstance(value, (list, tuple)) and len(value) > 1 and question is not None and answers is None:
                answers = _answers(value)
                text = Counter(answers).most_common(1)[0][0]
            elif isinstance(value, (list, tuple)) and images and question is None:
                captions = tuple(entry for entry in value if isinstance(entry, str) and entry.strip())
        elif answers is not None:
            text = Counter(answers).most_common(1)[0][0]
        else:
            text = label
            if "label" in columns and label is None:
                raise BrokenSample(f"column '{columns['label']}' has no label")
        options = None if choices is None else choices.texts
        return Sample(images, prompt, text, question, answers, kind, captions, label, options, None, group)

    def _question(self, row: Row) -> tuple[str | None, str | None]:
        """The question, and the prompt from the template."""
        columns = self._columns
        if "question" in columns:
            question = _text(row.get(columns["question"]), columns["question"])
            context = row.get(columns["context"]) if "context" in columns else None
            if isinstance(context, str) and context.strip():
                question = f"{context.strip()}\n{question}"
            return question, (self._template or DEFAULT_TEMPLATE).format(question=question)
        if "prompt" in columns:
            question = _text(row.get(columns["prompt"]), columns["prompt"])
            return question, question if self._template is None else self._template.format(question=question)
        return None, None

    def _value(self, row: Row, role: str) -> Any:
        """The row's value for a role; a list if the role has several columns."""
        if role not in self._columns:
            return None
        names = parts(self._columns[role], self._available)
        if len(names) > 1:
            return [row.get(name) for name in names]
        value = row.get(names[0])
        if role == "image" and (value is None or value == ""):
            return next((row[name] for name in self._others if row.get(name)), value)
        return value

    def _plain(self, row: Row, role: str) -> str | None:
        value = self._value(row, role)
        return None if value is None else str(value)

    def _label(self, row: Row) -> str | None:
        value = self._named(self._value(row, "label"), self._columns.get("label", ""))
        return None if value in (None, "", -1) else str(value)

    def _named(self, value: Any, column: str) -> Any:
        """The name of a class number, if the data set has names; None for -1, an unpublished class."""
        names = self._names.get(column)
        if names is None or not isinstance(value, int) or isinstance(value, bool):
            return value
        if value >= len(names):
            raise BrokenSample(f"column '{column}' has class {value} of {len(names)}")
        return names[value] if value >= 0 else None


def check_template(template: str) -> None:
    """Raises CalibrationError unless ``template`` has ``{question}`` and no other field."""
    try:
        if template.format(question="\0").count("\0") >= 1:
            return
    except (KeyError, IndexError, ValueError):
        pass
    raise CalibrationError(f"the prompt template {template!r} must contain {{question}} and no other field")


def _text(value: Any, column: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("answer"), str):
        value = value["answer"]
    if isinstance(value, (list, tuple)):  # of several captions of one image the first, not a random one
        value = next((entry for entry in value if isinstance(entry, str) and entry.strip()), None)
    if isinstance(value, (bool, int)):
        value = str(int(value)) if isinstance(value, bool) else str(value)
    if not isinstance(value, str) or not value.strip():
        raise BrokenSample(f"column '{column}' is empty or not a text")
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """The annotators' answers: a list of strings, or of ``{"answer": ...}`` records as in VQAv2's files."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(
        str(entry["answer"] if isinstance(entry, dict) else entry) for entry in entries if entry not in (None, "")
    )
    if not found:
        raise BrokenSample("there are no answers")
    return found

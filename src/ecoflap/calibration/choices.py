"""Options of multiple-choice questions, and which one is right, in the many ways that data sets write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecoflap.calibration.images import BrokenSample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s+(.*)", re.DOTALL)
# Columns of options whose data sets (SIQA, WinoGrande) count the right one from 1.
COUNTED_FROM_ONE = ("answerA", "option1")


@dataclass(frozen=True)
class Choices:
    """Options and what the data set calls them ("A", "B", ... unless it says otherwise)."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def right(self, value: Any, first_column: str) -> str | None:
        """Text of the right option; None where the data set keeps it secret (missing, empty, -1).

        Args:
            value: its text, letter, letter and text ("B. blue"), or number from 0.
            first_column: name of the (first) column of options.

        Raises:
            BrokenSample: none of the options is meant.
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
    """Options of "A. red\\nB. blue"; a line that does not go on with the alphabet belongs to the option before it."""
    found: list[str] = []
    for line in text.strip().splitlines():
        match = LETTERED.match(line)
        if match and len(found) < len(LETTERS) and match[1] == LETTERS[len(found)]:
            found.append(match[2].strip())
        elif found:
            found[-1] = f"{found[-1]}\n{line}".strip()
    return found

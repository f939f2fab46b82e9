"""Calibration and test samples: drawn once with the seed from any local format, broken ones skipped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecoflap.calibration.columns import guess_columns
from ecoflap.calibration.images import BrokenSample, decode
from ecoflap.calibration.locate import HubStream, TextFiles, open_source
from ecoflap.calibration.sample import Sample
from ecoflap.calibration.tables import Row
from ecoflap.errors import CalibrationError

__all__ = ["Sample", "SampleReader", "SampleSet", "load_samples"]

DEFAULT_TEMPLATE = "Question: {question} Short answer:"  # published for BLIP-2 on VQAv2
BROKEN_LIMIT = 0.05  # more broken samples than this stop the run: the file, not a sample, is at fault then
CHARACTERS_PER_WINDOW = 65_536  # documents of a text data set read for each window that is asked for


@dataclass(frozen=True)
class SampleSet:
    """Samples that were drawn, and how.

    ``indices`` are rows of the source; ``skipped`` counts broken rows on the way; ``columns`` maps roles to columns.
    ``windows`` is set for plain text alone: the samples are documents then, and that many windows of the
    sequence length are to be cut from them (-1: as many as there are).
    """

    samples: tuple[Sample, ...]
    indices: tuple[int, ...]
    skipped: int
    source: str
    columns: dict[str, str]
    windows: int | None = None


class SampleReader:
    """Iterates (index, :class:`Sample`) of a source, in the seeded order, one sample in memory at a time.

    ``skipped`` and ``columns`` are up to date while iterating. Parameters and errors as :func:`load_samples`.
    """

    def __init__(
        self,
        source: str | Path | None,
        *,
        samples: int | None,
        seed: int,
        columns: Mapping[str, str] | None = None,
        prompt_template: str | None = None,
    ) -> None:
        if samples is not None and samples < 1:
            raise CalibrationError(f"samples must be at least 1, not {samples}")
        if prompt_template is not None:
            _check_template(prompt_template)
        self._table = open_source(_bundled() if source is None else source)
        self.source = "the bundled samples" if source is None else str(source)
        self.is_text = isinstance(self._table, TextFiles)
        self.columns = (
            {} if isinstance(self._table, TextFiles) else guess_columns(self._table.columns, columns, self.source)
        )
        # Text alone in a table: rows are documents to be packed, like a text file.
        self.is_text = self.is_text or not ({"image", "question", "prompt"} & self.columns.keys())
        self.skipped = 0
        self._samples, self._seed, self._template = samples, seed, prompt_template

    def __len__(self) -> int:
        """Samples that an iteration will give at most."""
        if isinstance(self._table, TextFiles):
            return len(self._table.documents)
        if isinstance(self._table, HubStream):
            return self._samples or 0
        return len(self._table) if self._samples is None else min(self._samples, len(self._table))

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        if isinstance(self._table, TextFiles):
            yield from ((i, Sample(text=text)) for i, text in enumerate(self._table.documents) if text.strip())
            return
        self.skipped, good, characters = 0, 0, 0
        for index, row in self._rows():
            try:
                sample = self._sample(row)
            except BrokenSample as error:
                self._skip(index, error)
                continue
            yield index, sample
            good += 1
            characters += len(sample.text or "")
            if self._samples is not None and (
                characters >= self._samples * CHARACTERS_PER_WINDOW if self.is_text else good == self._samples
            ):
                break
        if good == 0:
            raise CalibrationError(f"{self.source} holds no usable sample")
        if self.skipped > BROKEN_LIMIT * (good + self.skipped):
            raise CalibrationError(
                f"{self.source}: {self.skipped} of {good + self.skipped} samples are broken ({self._reason}), more "
                f"than {BROKEN_LIMIT:.0%}: repair the data"
            )
        if self._samples is not None and good < self._samples and not self.is_text:
            broken = f" and {self.skipped} broken ones" if self.skipped else ""
            raise CalibrationError(
                f"{self.source} holds {good} usable samples{broken}, {self._samples} were asked for: lower the number "
                "of samples or give more data"
            )

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(index, row): a seeded permutation when a number of samples is asked for, the file's order otherwise."""
        table = self._table
        assert not isinstance(table, TextFiles)
        if isinstance(table, HubStream):
            yield from table.draw(None if self._samples is None else self._seed)
            return
        if self._samples is None:
            order = list(range(len(table)))
        else:
            generator = torch.Generator().manual_seed(self._seed)
            order = torch.randperm(len(table), generator=generator).tolist()
        wanted = list(dict.fromkeys(self.columns.values()))
        step = 64 if self._samples is None else max(self._samples, 16)  # rows of one parquet row group are read at once
        for start in range(0, len(order), step):
            chunk = order[start : start + step]
            yield from zip(chunk, table.take(chunk, wanted), strict=True)

    def _skip(self, index: int, error: BrokenSample) -> None:
        if self.skipped == 0:
            self._reason = f"row {index}: {error}"
        self.skipped += 1
        target = len(self)
        if target and not self.is_text and self.skipped > BROKEN_LIMIT * (target + self.skipped):
            raise CalibrationError(
                f"{self.source}: more than {BROKEN_LIMIT:.0%} of the samples are broken, the first is {self._reason}"
            )

    def _sample(self, row: Row) -> Sample:
        columns = self.columns
        folder = getattr(self._table, "folder", None)
        images = (decode(row.get(columns["image"]), folder),) if "image" in columns else ()
        answers = _answers(row.get(columns["answers"])) if "answers" in columns else None
        text = _text(row.get(columns["text"]), columns["text"]) if "text" in columns else None
        if text is None and answers is not None:
            text = Counter(answers).most_common(1)[0][0]
        question = prompt = None
        if "question" in columns:
            question = _text(row.get(columns["question"]), columns["question"])
            prompt = (self._template or DEFAULT_TEMPLATE).format(question=question)
        elif "prompt" in columns:
            question = prompt = _text(row.get(columns["prompt"]), columns["prompt"])
            if self._template is not None:
                prompt = self._template.format(question=question)
        kind = row.get(columns["kind"]) if "kind" in columns else None
        return Sample(images, prompt, text, question, answers, None if kind is None else str(kind))


def load_samples(
    source: str | Path | None,
    *,
    samples: int | None,
    seed: int,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
) -> SampleSet:
    """Draw ``samples`` samples of ``source`` by a seeded permutation.

    Args:
        source: None for the bundled calibration set; a text, parquet, JSONL, JSON, CSV file; a folder of them, saved by
            ``datasets``, or of images with ``metadata.jsonl``; a hub data set id, optionally ``id:split``.
        samples: how many; None for all, in the order of the file.
        seed: of the permutation.
        columns: role to column name, over the guess (see :func:`ecoflap.calibration.columns.guess_columns`).
        prompt_template: with ``{question}``; default "Question: {question} Short answer:" for a question column, and
            the text as it is for a prompt column.

    Raises:
        CalibrationError: nothing there, unreadable, too few samples, missing columns, over 5 % broken.
    """
    reader = SampleReader(source, samples=samples, seed=seed, columns=columns, prompt_template=prompt_template)
    drawn = list(reader)
    windows = (samples if samples is not None else -1) if reader.is_text else None
    return SampleSet(
        samples=tuple(sample for _, sample in drawn),
        indices=tuple(index for index, _ in drawn),
        skipped=reader.skipped,
        source=reader.source,
        columns=dict(reader.columns),
        windows=windows,
    )


def _bundled() -> Path:
    from ecoflap import demo  # imported late: only runs on the embedded model need it

    return Path(demo.calibration_path())


def _check_template(template: str) -> None:
    try:
        if template.format(question="\0").count("\0") >= 1:
            return
    except (KeyError, IndexError, ValueError):
        pass
    raise CalibrationError(f"the prompt template {template!r} must contain {{question}} and no other field")


def _text(value: Any, column: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("answer"), str):
        value = value["answer"]
    if isinstance(value, (list, tuple)):  # several captions of one image: the first, so that nothing depends on chance
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

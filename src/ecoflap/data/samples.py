"""Draws seeded calibration and test samples from any source; skips and counts broken ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ecoflap.data.columns import guess_columns, other_pictures, parts
from ecoflap.data.formats.hub import HubStream, refuse_addresses
from ecoflap.data.formats.text import TextFiles
from ecoflap.data.images import MOST_PIXELS, BrokenSample, ImageFinder
from ecoflap.data.rows import RowReader, check_template
from ecoflap.data.sample import Sample
from ecoflap.data.sources import checked_folder, open_source, readable
from ecoflap.data.tables import Row, Table, Taken
from ecoflap.errors import CalibrationError
from ecoflap.support.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Sample", "SampleReader", "SampleSet", "load_samples"]
BROKEN_LIMIT = 0.05  # a larger share of broken samples is an error: then the whole file is at fault
CHARACTERS_PER_WINDOW = 65_536  # characters of documents to read for each requested window


@dataclass(frozen=True)
class SampleSet:
    """Samples that were drawn, and how.

    ``indices`` are rows of the source; ``skipped`` is the number of broken rows; ``columns`` maps roles to columns.
    ``windows`` is set only for plain text: the samples are documents, and that many windows of the sequence length are
    to be cut from them (-1: all). ``classes`` are the names of all classes in the order of their numbers, if the data
    set has them: folder names, or the names of a class column. ``length_reason`` is the reason for the windows' length,
    if it was left open.
    """

    samples: tuple[Sample, ...]
    indices: tuple[int, ...]
    skipped: int
    source: str
    columns: dict[str, str]
    windows: int | None = None
    classes: tuple[str, ...] | None = None
    length_reason: str = ""

    @property
    def summary(self) -> str:
        """One line for the user: number of samples, source and columns."""
        if self.windows is None:
            count = f"{len(self.samples)} sample{'' if len(self.samples) == 1 else 's'} of "
        else:
            count = f"{'all' if self.windows < 0 else self.windows} windows of the text of "
        return _summary(count, self.source, self.columns, self.skipped)

    def by_row(self) -> SampleSet:
        """The same without packing: each row of a table of texts is a sample, for classifiers.

        If there are fewer rows than requested, all are taken, with a warning.
        """
        if self.windows is None:
            return self
        count = len(self.samples) if self.windows < 0 else self.windows
        if "label" in self.columns and len(self.samples) < count:
            _warn_of_few(self.source, len(self.samples), count)
        return replace(self, samples=self.samples[:count], indices=self.indices[:count], windows=None)


class SampleReader:
    """Iterates (index, :class:`Sample`) of a source, in the seeded order, one sample in memory at a time.

    ``skipped`` and ``columns`` are up to date while iterating; ``classes`` as in :class:`SampleSet`. Parameters and
    errors as :func:`load_samples`.
    """

    def __init__(
        self,
        source: str | Path | None,
        *,
        samples: int | None,
        seed: int,
        columns: Mapping[str, str] | None = None,
        prompt_template: str | None = None,
        image_folder: str | Path | None = None,
        most_pixels: int = MOST_PIXELS,
    ) -> None:
        if samples is not None and samples < 1:
            raise CalibrationError(f"samples must be at least 1, not {samples}")
        if prompt_template is not None:
            check_template(prompt_template)
        self._table = open_source(_bundled() if source is None else source)
        self.source = "the bundled samples" if source is None else str(source)
        self.columns: dict[str, str] = {}
        self._others: list[str] = []
        self.classes: tuple[str, ...] | None = None
        if isinstance(self._table, TextFiles):
            if columns:
                raise CalibrationError(
                    f"{self.source} is plain text, which has no columns: leave out {', '.join(columns)}"
                )
        else:
            if not columns:
                refuse_addresses(self._table.columns, self.source)
            self.columns = guess_columns(self._table.columns, columns, self.source)
            finder = ImageFinder(self._table.folder, checked_folder(image_folder), most_pixels)
            self._others = other_pictures(self._table.columns, self.columns, columns)
            self._read = RowReader(
                self.columns, self._table.columns, self._table.class_names, finder, prompt_template, self._others
            )
            self.classes = self._read.classes
        # A table with only text: rows are documents to be packed, like a text file.
        self.is_text = not ({"image", "question", "prompt", "messages"} & self.columns.keys())
        self.skipped = 0
        self._samples, self._seed = samples, seed

    @property
    def summary(self) -> str:
        """One line for the user: number of samples, source and columns."""
        return _summary("", self.source, self.columns, self.skipped)

    def __len__(self) -> int:
        """Largest number of samples of an iteration."""
        if isinstance(self._table, TextFiles):
            return len(self._table)
        if isinstance(self._table, HubStream):
            return self._samples or 0
        return len(self._table) if self._samples is None else min(self._samples, len(self._table))

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        if isinstance(self._table, TextFiles):
            drawn = self._table.draw(self._samples, self._seed)
            yield from ((number, Sample(text=text)) for number, text in drawn if text.strip())
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
            reason = f" (the first broken one is {self._reason})" if self.skipped else ""
            raise CalibrationError(f"{self.source} holds no usable sample{reason}")
        if self.skipped > BROKEN_LIMIT * (good + self.skipped):
            raise CalibrationError(
                f"{self.source}: {self.skipped} of {good + self.skipped} samples are broken ({self._reason}), more "
                f"than {BROKEN_LIMIT:.0%}: repair the data"
            )
        if self._samples is not None and good < self._samples and not self.is_text:
            _warn_of_few(self.source, good, self._samples, f" and {self.skipped} broken ones" if self.skipped else "")

    def at(self, indices: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """(index, sample) of these rows of the source, in the order of ``indices``; broken ones are left out.

        A stream of the hub is read again up to the last of them, and yields them in its own order. Not for plain text.
        """
        if isinstance(self._table, TextFiles):
            return
        if isinstance(self._table, HubStream):
            wanted = set(indices)
            for index, sample in self:
                if index in wanted:
                    yield index, sample
                    wanted.remove(index)
                if not wanted:
                    return
            return
        for index, row in zip(indices, self._table.take(list(indices), self._wanted()), strict=True):
            with suppress(BrokenSample):
                yield index, self._sample(row)

    def _wanted(self) -> list[str]:
        """The columns of the table that are read."""
        known = self._table.columns if not isinstance(self._table, TextFiles) else []
        named = (name for entry in self.columns.values() for name in parts(entry, known))
        return list(dict.fromkeys((*named, *self._others)))

    def _rows(self) -> Iterator[tuple[int, Row | BrokenSample]]:
        """(index, row): a seeded permutation if a number of samples is requested, the file's order otherwise."""
        import torch  # not at the top, see ecoflap.run.checks

        table = self._table
        assert not isinstance(table, TextFiles)
        if isinstance(table, HubStream):
            yield from table.draw(None if self._samples is None else self._seed)
            return
        if self._samples is None:
            order = torch.arange(len(table))
        else:
            order = torch.randperm(len(table), generator=torch.Generator().manual_seed(self._seed))
        with readable(self.source):
            yield from self._in_order(table, order)

    def _in_order(self, table: Table, order: Tensor) -> Iterator[tuple[int, Row | BrokenSample]]:
        wanted = self._wanted()
        for chunk in order.split(self._step(getattr(table, "row_bytes", None))):  # type: ignore[no-untyped-call]
            numbers = [int(number) for number in chunk]
            rows: Taken = table.take(numbers, wanted)
            yield from zip(numbers, rows, strict=True)

    def _sample(self, row: Row | BrokenSample) -> Sample:
        """The sample of a row; raises BrokenSample if its values have wrong types."""
        try:
            return self._read(row)
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise BrokenSample(f"its values are of other types than expected ({first_line(error)})") from error

    def _step(self, row_bytes: int | None) -> int:
        """Number of rows to take at once, since rows of a row group, or of a pass over a file, are read together."""
        if self._samples is None:
            return 64 if row_bytes is None else 65_536
        if row_bytes is not None and self.is_text:
            return 2 * self._samples * CHARACTERS_PER_WINDOW // max(row_bytes, 1) + self._samples
        return max(self._samples, 16)

    def _skip(self, index: int, error: BrokenSample) -> None:
        if self.skipped == 0:
            self._reason = f"row {index}: {error}"
        self.skipped += 1
        target = len(self)
        if target and not self.is_text and self.skipped > BROKEN_LIMIT * (target + self.skipped):
            raise CalibrationError(
                f"{self.source}: more than {BROKEN_LIMIT:.0%} of the samples are broken, the first is {self._reason}"
            )


def load_samples(
    source: str | Path | None,
    *,
    samples: int | None,
    seed: int,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    image_folder: str | Path | None = None,
    most_pixels: int = MOST_PIXELS,
) -> SampleSet:
    """Draw ``samples`` samples of ``source`` by a seeded permutation.

    Args:
        source: None for the bundled calibration set; a file or folder in any format of
            :mod:`ecoflap.data.formats`, optionally with a split after a colon;
            a brace pattern of tars; the id of a hub data set.
        samples: number of samples; None for all, in the order of the file. If there are fewer, all are taken, with a
            warning.
        seed: of the permutation.
        columns: columns by role, which override the guess (see :func:`ecoflap.data.columns.guess_columns`).
        prompt_template: with ``{question}``; default "Question: {question} Short answer:" for a question column, and
            the unchanged text for a prompt column.
        image_folder: folder of the images that the data names by relative paths; by default beside the data, or one of
            the usual folders there.
        most_pixels: larger images are scaled down to this number of pixels while they are decoded.

    Raises:
        CalibrationError: the source is missing or unreadable, has no samples, lacks columns, or over 5 % are broken.
    """
    reader = SampleReader(
        source,
        samples=samples,
        seed=seed,
        columns=columns,
        prompt_template=prompt_template,
        image_folder=image_folder,
        most_pixels=most_pixels,
    )
    drawn = list(reader)
    windows = (samples if samples is not None else -1) if reader.is_text else None
    return SampleSet(
        samples=tuple(sample for _, sample in drawn),
        indices=tuple(index for index, _ in drawn),
        skipped=reader.skipped,
        source=reader.source,
        columns=dict(reader.columns),
        windows=windows,
        classes=reader.classes,
    )


def _warn_of_few(source: str, there: int, wanted: int, more: str = "") -> None:
    warnings.warn(
        f"{source} holds {there} usable samples{more}, {wanted} were asked for: all of them are taken", stacklevel=3
    )


def _summary(count: str, source: str, columns: Mapping[str, str], skipped: int) -> str:
    roles = ", ".join(f"{role}={column}" for role, column in columns.items())
    said = count + source
    said += f": {roles}" if roles else ""
    return f"{said}; {skipped} broken skipped" if skipped else said


def _bundled() -> Path:
    from ecoflap.support import embedded

    return Path(embedded.calibration_path())

"""Reads rows of a data set for training, whose images are decoded only when a batch needs them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ecoflap.data.images import BrokenSample
from ecoflap.data.sample import Sample
from ecoflap.data.samples import BROKEN_LIMIT, SampleReader
from ecoflap.data.tables import Row
from ecoflap.errors import CalibrationError


class UndecodedRows(SampleReader):
    """A reader that yields rows instead of samples, in the same seeded order.

    A row holds an image as it is stored: its file name, or its encoded bytes. So a training set with image files takes
    only the memory of its texts. Parameters as in :class:`SampleReader`.
    """

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(index, row), up to the requested number; rows that can't be parsed are skipped and counted."""
        self.skipped = 0
        found = (pair for pair in self._rows() if self._parsed(*pair))
        yield from islice(found, self._samples)

    def _parsed(self, index: int, row: Row | BrokenSample) -> bool:
        if isinstance(row, BrokenSample):
            self._skip(index, row)
            return False
        return True

    def decoded(self, row: Row, pictures: bool = True) -> Sample:
        """The sample of a row; without ``pictures``, each image is one blank pixel. Raises BrokenSample."""
        return self._read(row, pictures)

    def first(self, rows: list[tuple[int, Row]], count: int) -> list[Sample]:
        """The usable samples among the first ``count`` rows.

        Raises:
            CalibrationError: there is none, or more than 5 % are broken.
        """
        samples, reason = [], ""
        for index, row in rows[:count]:
            try:
                samples.append(self.decoded(row))
            except BrokenSample as error:
                reason = reason or f"row {index}: {error}"
        broken = len(rows[:count]) - len(samples)
        if not samples:
            raise CalibrationError(f"{self.source} holds no usable sample (the first is broken, {reason})")
        if broken > BROKEN_LIMIT * (len(samples) + broken):
            raise CalibrationError(
                f"{self.source}: {broken} of the first {len(samples) + broken} samples are broken ({reason}), more "
                f"than {BROKEN_LIMIT:.0%}: repair the data"
            )
        return samples

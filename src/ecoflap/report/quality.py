"""Reads the quality in ``metrics.json``: each task's result, and paired differences of two models."""

from __future__ import annotations

from typing import Any

from ecoflap.report.reading import Content, Count, Finite, Fraction, GroupSize


class OtherMetric(Content):
    """A further metric of a task."""

    value: Finite | None = None
    stderr: Finite | None = None


class Quality(Content):
    """The result of one task: its value, standard error, sample count, further metrics, and each group of samples.

    ``unit`` and ``better`` are those of :class:`ecoflap.evaluation.Task`; None: each metric's, by its name.
    """

    metric: str
    unit: str | None = None
    better: str | None = None
    hub_type: str | None = None
    value: Finite | None = None
    stderr: Finite | None = None
    n: Count | None = None
    by_group: dict[str, Finite | None] | None = None
    groups: dict[str, GroupSize] | None = None  # by the same names; None in older runs
    others: dict[str, OtherMetric] = {}
    settings: dict[str, Any] | None = None

    def of_group(self, name: str) -> tuple[float | None, float | None]:
        """The value of a group, and its standard error."""
        size = (self.groups or {}).get(name)
        return (self.by_group or {}).get(name), size.stderr if size else None

    def group_label(self, name: str) -> str:
        """The group's name with the number of its samples, if known."""
        size = (self.groups or {}).get(name)
        return name if size is None else f"{name} (n = {size.n:,})"


class PairedDifference(Content):
    """One model minus another on the same samples, see :class:`ecoflap.evaluation.paired.Paired`."""

    difference: Finite
    stderr: Finite | None = None
    n: Count
    better: Count
    worse: Count
    p: Fraction
    groups: dict[str, PairedDifference] = {}
    others: dict[str, PairedDifference] = {}

    @staticmethod
    def of_group(pair: PairedDifference | None, name: str) -> PairedDifference | None:
        """The difference on one group of samples."""
        return pair.groups.get(name) if pair else None

    @staticmethod
    def of_other(pair: PairedDifference | None, metric: str) -> PairedDifference | None:
        """The difference of a further metric."""
        return pair.others.get(metric) if pair else None

"""Formats numbers for readers: metrics with their unit, sparsity in percent, durations, bytes."""

from __future__ import annotations

import math
import re
from typing import Protocol

MISSING = "not measured"
# Metrics of lm-eval and of older runs that are shares of samples, shown in per cent. lm-eval names a metric "acc,none",
# with a filter after the comma.
_SHARES = re.compile(r"(.*[ _])?(accuracy|exact_match|acc|acc_norm|em|f1|recall)(,.*)?|(TR|IR|top|recall)[@-]?\d+")
_HUNDREDS = {"CIDEr", "SPICE"}  # usually shown times 100, without a unit


def metric_value(metric: str, value: float | None, stderr: float | None = None, *, unit: str | None = None) -> str:
    """A metric's value in its unit, with ``± standard error`` if it has one: "93.1 % ± 0.8".

    Args:
        unit: of the :class:`ecoflap.evaluation.Task`; None: by the metric's name.
    """
    if value is None:
        return MISSING
    if unit := unit_of(metric, unit):
        sign = " %" if unit == "%" else ""
        return f"{100 * value:.1f}{sign}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
    return significant(value, 4) + ("" if stderr is None else f" ± {significant(stderr, 2)}")


def metric_change(metric: str, dense: float | None, pruned: float | None, *, unit: str | None = None) -> str:
    """Pruned minus dense with a sign: in points for values shown times 100, else in per cent of the dense value."""
    if dense is None or pruned is None:
        return MISSING
    if unit_of(metric, unit):
        return _signed(100 * (pruned - dense), 1) + " points"
    return MISSING if dense == 0 else _signed(100 * (pruned / dense - 1), 1) + " %"


class Pair(Protocol):
    """One model minus another on the same samples, see :class:`ecoflap.evaluation.paired.Paired`."""

    @property
    def stderr(self) -> float | None: ...
    @property
    def better(self) -> int: ...
    @property
    def worse(self) -> int: ...
    @property
    def p(self) -> float: ...


def paired_change(metric: str, pair: Pair | None, other: float | None, *, unit: str | None = None) -> str:
    """The text after :func:`metric_change` for paired samples: standard error, p-value, better and worse samples."""
    points = bool(unit_of(metric, unit))
    if pair is None or other is None or not (points or other):
        return ""
    scale = 100.0 if points else 100.0 / abs(other)
    error = "" if pair.stderr is None else f" ± {significant(scale * pair.stderr, 2)}"
    chance = "p < 0.001" if pair.p < 0.001 else f"p = {significant(pair.p, 2)}"
    return f"{error}; {pair.better:,} better, {pair.worse:,} worse, {chance}"


def against_uniform(
    metric: str, pair: Pair | None, baseline: float | None, pruned: float | None, *, unit: str | None = None
) -> str:
    """The comparison of the pruned model with the uniform baseline as text; "" if there is none."""
    if baseline is None or pruned is None:
        return ""
    change = metric_change(metric, baseline, pruned, unit=unit) + paired_change(metric, pair, baseline, unit=unit)
    return f"{metric_value(metric, baseline, unit=unit)} with one sparsity for all layers; against it {change}"


def _plain(metric: str) -> str:
    return metric.partition(" (")[0]  # without a remark on the method: "CIDEr (simple words)"


def unit_of(metric: str, unit: str | None = None) -> str:
    """``%`` (a share, shown in per cent), ``points`` (shown times 100) or "" (the plain number).

    Args:
        unit: the task's; None for suites of lm-eval and for older runs, whose metrics are recognised by name.
    """
    if unit is not None:
        return unit
    if _SHARES.fullmatch(_plain(metric)):
        return "%"
    return "points" if _plain(metric) in _HUNDREDS else ""


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in per cent."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def duration(seconds: float | None) -> str:
    """Seconds as "0.42 s", "42 s", "12 min 03 s" or "1 h 40 min"."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    return clock(seconds)


def clock(seconds: float) -> str:
    """Whole seconds as "12 s", "3 min 20 s" or "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def time_unit(longest: float) -> tuple[str, float]:
    """The unit for an axis up to ``longest`` seconds, and its seconds: seconds, minutes or hours."""
    if longest < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)


def size(count: int | None) -> str:
    """Bytes with a decimal unit (1 GB = 10⁹ bytes)."""
    if count is None:
        return MISSING
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{significant(value, 3)} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def integer(count: int | None) -> str:
    """A count with thin spaces between the thousands."""
    return MISSING if count is None else f"{count:,}".replace(",", "\u2009")


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, in scientific notation only if the plain one would be long."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -4 <= exponent < 6:
        return f"{value:.{max(digits - 1 - exponent, 0)}f}"
    return f"{value:.{digits - 1}e}"


def scientific(value: float, digits: int = 2) -> str:
    """Scientific notation, for columns whose numbers span orders of magnitude."""
    return f"{value:.{digits}e}"


def task_title(task: str, metric: str) -> str:
    """A task and its metric as one heading; without the metric if the task's name ends with it."""
    return task if task.endswith(metric) else f"{task} {metric}"


def _signed(value: float, digits: int) -> str:
    rounded = round(value, digits)
    return f"{abs(rounded):.{digits}f}" if rounded == 0 else f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}"


def shortened(name: str, most: int) -> str:
    """At most ``most`` characters of a text: the end of a path, both ends of other text, such as a method's name."""
    if len(name) <= most:
        return name
    head = (most - 1) * 4 // 5 if " " in name else 0
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"

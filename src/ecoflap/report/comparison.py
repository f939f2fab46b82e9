"""Reads and checks ``compare.json``, and averages its cells over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ecoflap.errors import InvalidOption
from ecoflap.report.places import text_without_places
from ecoflap.report.quality import PairedDifference
from ecoflap.report.reading import Content, Count, Finite, Fraction, read_model
from ecoflap.run.compare.leaders import leaders
from ecoflap.run.names import COMPARISON
from ecoflap.support.formats import task_title

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Result(Content):
    """One model's result on one test of ``n`` samples."""

    value: Finite | None = None
    stderr: Finite | None = None
    n: Count | None = None


class Test(Content):
    """A test of all cells, and the dense model's result."""

    __test__ = False  # for pytest

    name: str
    task: str
    metric: str
    unit: str | None = None
    higher_is_better: bool = True
    dense: Result = Result()

    @property
    def title(self) -> str:
        """Its name with its metric."""
        return task_title(self.name, self.metric)


class Method(Content):
    """One method: its name on the command line, its title, and the keys of its papers."""

    name: str
    title: str = ""
    importance: str = ""
    criterion: str = ""
    options: dict[str, Any] = {}
    citations: list[str] = []

    @property
    def shown(self) -> str:
        """The title, or the name if there is none."""
        return text_without_places(self.title or self.name)


class Stored(Content):
    """A model in one form of its values: bytes of the prunable weights, bits of one of them, and its results."""

    bytes: Count
    bits: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    tests: dict[str, Result] = {}


class Cell(Content):
    """One method at one sparsity with one seed; if it failed, ``value`` is None and ``error`` says why."""

    method: str
    sparsity: Fraction
    seed: int = 0
    value: Finite | None = None
    stderr: Finite | None = None
    n: Count | None = None
    tests: dict[str, Result] = {}
    achieved: Fraction | None = None
    towers: dict[str, Fraction | None] = {}
    stored: dict[str, Stored] = {}
    seconds: dict[str, Seconds | None] = {}
    peak_memory_bytes: Count | None = None
    peak_cuda_bytes: Count | None = None
    error: str | None = None

    @property
    def total_seconds(self) -> float | None:
        """The sum over all stages; None if no time was measured."""
        known = [value for value in self.seconds.values() if value is not None]
        return sum(known) if known else None


class _Known(NamedTuple):
    """A known mean with its error."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Average:
    """A method at one sparsity: the mean over its seeds and its error, the number of seeds, and the failures.

    The error is the standard deviation over the seeds (n − 1); for one seed, the standard error over the samples.
    """

    mean: float | None
    error: float | None
    seeds: int
    failures: list[str]


def average_of(results: Sequence[Result], failures: list[str]) -> Average:
    """The mean of the known results."""
    found = [(result.value, result.stderr) for result in results if result.value is not None]
    if not found:
        return Average(None, None, 0, failures)
    values = [value for value, _ in found]
    return Average(fmean(values), stdev(values) if len(values) > 1 else found[0][1], len(values), failures)


@dataclass(frozen=True)
class StoredModel:
    """A method's model at one sparsity (None: the dense one) in one form: bytes, bits per weight, quality."""

    title: str
    sparsity: float | None
    form: str
    bytes: float
    bits: float
    average: Average
    pair: PairedDifference | None = None  # from the dense model as it was loaded

    @property
    def line(self) -> str:
        """Key of its line in the plot: one for all forms of the dense model, one for each method and form."""
        return "dense, quantised" if self.sparsity is None else f"{self.title}, {self.form}"


class Pairing(Content):
    """Differences of a method at one sparsity from other models, on the same samples of a test."""

    method: str
    sparsity: Fraction
    test: str
    against: dict[str, PairedDifference] = {}


class StoredPairing(Content):
    """Differences of models in one form (method and sparsity None: the dense one) from the dense model."""

    method: str | None = None
    sparsity: Fraction | None = None
    values: str
    test: str
    dense: PairedDifference


class Comparison(Content):
    """``compare.json``."""

    model: str | None = None
    task: str = ""
    metric: str = ""
    higher_is_better: bool = True
    dense: Result = Result()
    tests: list[Test] = []
    methods: list[Method]
    sparsities: list[Fraction]
    seeds: list[int] = []
    cells: list[Cell] = []
    dense_stored: dict[str, Stored] = {}
    paired: list[Pairing] = []
    stored_paired: list[StoredPairing] = []
    recipe: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    command: str | None = None

    def of(self, method: str, sparsity: float | None = None) -> list[Cell]:
        """The cells of a method, at one sparsity or at all of them."""
        return [cell for cell in self.cells if cell.method == method and sparsity in (None, cell.sparsity)]

    @property
    def each_test(self) -> list[Test]:
        """The tests; if the file has no list, the one that its own fields describe."""
        name = self.task or self.metric
        alone = Test(name=name, task=name, metric=self.metric, higher_is_better=self.higher_is_better, dense=self.dense)
        return self.tests or [alone]

    def result(self, cell: Cell, test: Test) -> Result:
        """A cell's result on a test; the result on the first test is also in the cell's own fields."""
        if test.name in cell.tests:
            return cell.tests[test.name]
        return Result(value=cell.value, stderr=cell.stderr, n=cell.n) if test == self.each_test[0] else Result()

    def average(self, method: str, sparsity: float, test: Test) -> Average:
        """The mean over the seeds of a method at one sparsity."""
        cells = self.of(method, sparsity)
        failures = [cell.error for cell in cells if cell.error]
        results = [self.result(cell, test) for cell in cells]
        return average_of(results, failures)

    def by_bytes(self, test: Test) -> list[StoredModel]:
        """Each model in each form that was measured on ``test``, sorted by method and form."""
        pairs = {(p.method, p.sparsity, p.values): p.dense for p in self.stored_paired if p.test == test.name}
        rows = [
            StoredModel(
                "dense",
                None,
                form,
                float(one.bytes),
                one.bits,
                average_of([one.tests[test.name]], []),
                pairs.get((None, None, form)),
            )
            for form, one in self.dense_stored.items()
            if test.name in one.tests
        ]
        for method in self.methods:
            for form in self.dense_stored:
                for sparsity in self.sparsities:
                    found = [cell.stored[form] for cell in self.of(method.name, sparsity) if form in cell.stored]
                    results = [one.tests[test.name] for one in found if test.name in one.tests]
                    if results:
                        size, bits = fmean(one.bytes for one in found), fmean(one.bits for one in found)
                        pair = pairs.get((method.name, sparsity, form))
                        rows.append(
                            StoredModel(method.shown, sparsity, form, size, bits, average_of(results, []), pair)
                        )
        return [row for row in rows if row.average.mean is not None]

    def against(self, method: str, sparsity: float, test: Test) -> dict[str, PairedDifference]:
        """Paired differences of a method at a sparsity, by the name of the other model."""
        places = (p.against for p in self.paired if (p.method, p.sparsity, p.test) == (method, sparsity, test.name))
        return next(places, {})

    def leaders(self, sparsity: float, test: Test) -> frozenset[str]:
        """The best method at a sparsity, and those as good within error.

        Their difference from the best is at most the standard error of the paired difference; if that is unknown,
        √(a² + b²).
        """
        found = {method.name: self.average(method.name, sparsity, test) for method in self.methods}
        column = {name: _Known(one.mean, one.error) for name, one in found.items() if one.mean is not None}
        pairs = {name: pair for name in column if (pair := self.against(name, sparsity, test).get("best"))}
        return leaders(column, test.higher_is_better, pairs)[1]

    @property
    def towers(self) -> list[str]:
        """The towers of all cells, in order."""
        return list(dict.fromkeys(tower for cell in self.cells for tower in cell.towers))

    @property
    def stages(self) -> list[str]:
        """The stages with a measured time, in order."""
        return list(dict.fromkeys(stage for cell in self.cells for stage in cell.seconds))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def read_comparison(folder: Path | str) -> Comparison:
    """Read the ``compare.json`` of a folder.

    Raises:
        InvalidOption: it is missing, or a field is wrong; the message names it.
    """
    path = Path(folder) / COMPARISON
    found = read_model(path, Comparison)
    if found is None:
        raise InvalidOption(f"{folder} holds no {COMPARISON}: give the output folder of `ecoflap compare`")
    unknown = {cell.method for cell in found.cells} - {method.name for method in found.methods}
    if unknown:
        raise InvalidOption(f"{path}: cells of {', '.join(sorted(unknown))}, which methods does not name")
    return found

"""Defines ``compare.json``: how it is written and read, and the mean figures of a method over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ecoflap.evaluation import TaskResult
from ecoflap.evaluation.paired import Paired, Samples
from ecoflap.run.compare.leaders import leaders
from ecoflap.run.compare.pairs import BEST, Pairing, StoredPairing
from ecoflap.run.compare.recipe import Place
from ecoflap.run.compare.shared import Took
from ecoflap.run.evaluations import Evaluation
from ecoflap.run.known_scores import KnownSamples
from ecoflap.run.names import COMPARISON
from ecoflap.run.provenance import Usage
from ecoflap.run.quality import quality
from ecoflap.support.reading import checked, read_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Measured(_Record):
    """A value with its standard error; either is None if it is not finite, the error also for a single observation."""

    value: float | None = None
    stderr: float | None = None


class Quality(Measured):
    """One test's result on ``n`` observations."""

    n: int = 0
    others: dict[str, Measured] = Field(default_factory=dict, description="Further metrics of the same test.")


class Test(_Record):
    """One test of all cells, and the dense model's result."""

    __test__ = False  # for pytest

    name: str
    task: str
    metric: str
    unit: str | None = Field(None, description="As in metrics.json; None: by the metric's name.")
    higher_is_better: bool
    dense: Quality


class DenseTest(Test):
    """A test in the comparison's journal, with the dense model's samples."""

    samples: KnownSamples | None = None


class Seconds(_Record):
    """Seconds of a cell's stages; ``importance`` is the one measurement that all cells with its seed share."""

    importance: float = 0.0
    allocation: float = 0.0
    pruning: float = 0.0
    evaluation: float = 0.0


class Stored(_Record):
    """A model in one stored form.

    ``bytes`` are those of all prunable weights, with masks, offsets and scales; ``bits`` is the mean of one weight.
    """

    bytes: int
    bits: float
    tests: dict[str, Quality] = Field(default_factory=dict)


class StoredFile(Stored):
    """The same in a comparison's files, with the model's scores on each sample of the tests."""

    samples: dict[str, KnownSamples] = Field(default_factory=dict)

    @property
    def plain(self) -> Stored:
        """Without the samples."""
        return Stored.model_validate(self.model_dump(exclude={"samples"}))


class MethodRecord(_Record):
    """One method; ``name`` is its form on the command line."""

    name: str
    title: str
    importance: str
    criterion: str
    options: dict[str, Any] = Field(default_factory=dict)
    citations: tuple[str, ...] = Field((), description="Keys of ecoflap.run.citations.CITATIONS.")


class Cell(_Record):
    """One method at one sparsity with one seed. With an ``error``, nothing was measured.

    ``value``, ``stderr``, ``n`` and ``others`` are those of the first test; ``tests`` has all tests by name.
    ``achieved`` is the share of zeros among the prunable weights, ``towers`` the same for each tower.
    """

    method: str
    sparsity: float
    seed: int
    value: float | None = None
    stderr: float | None = None
    n: int = 0
    others: dict[str, Measured] = Field(default_factory=dict)
    tests: dict[str, Quality] = Field(default_factory=dict)
    achieved: float | None = None
    towers: dict[str, float] = Field(default_factory=dict)
    stored: dict[str, Stored] = Field(default_factory=dict, description="By the form of its values.")
    seconds: Seconds = Seconds()
    peak_memory_bytes: int | None = None
    peak_cuda_bytes: int | None = None
    error: str | None = None


class CellFile(Cell):
    """A cell in its file, with the model's scores on each sample of the tests."""

    samples: dict[str, KnownSamples] = Field(default_factory=dict)
    stored_samples: dict[str, dict[str, KnownSamples]] = Field(default_factory=dict, description="By form and test.")


class Comparison(_Record):
    """``compare.json``. ``task``, ``metric``, ``higher_is_better`` and ``dense`` are those of the first test."""

    format: Literal[1] = 1
    model: str
    task: str
    metric: str
    higher_is_better: bool
    dense: Quality
    tests: tuple[Test, ...]
    methods: tuple[MethodRecord, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    dense_stored: dict[str, Stored] = Field(default_factory=dict, description="The dense model, by form.")
    paired: tuple[Pairing, ...] = Field(default=(), description="Differences of models on the same samples.")
    stored_paired: tuple[StoredPairing, ...] = Field(default=(), description="The same of models in stored forms.")
    recipe: dict[str, Any]
    environment: dict[str, Any]
    command: str

    def cells_of(self, method: str, sparsity: float | None = None) -> tuple[Cell, ...]:
        """The method's cells at one sparsity, or at all, in the order of the seeds."""
        return tuple(c for c in self.cells if c.method == method and sparsity in (None, c.sparsity))

    def summary(self, method: str, sparsity: float, test: str | None = None) -> Summary | None:
        """The method's figures at ``sparsity`` on ``test`` (the first one if none is named); None if there are none."""
        name = test or self.tests[0].name
        found = [cell.tests[name] for cell in self.cells_of(method, sparsity) if name in cell.tests]
        return summarise(found)

    def against(self, method: str, sparsity: float, test: str) -> dict[str, Paired]:
        """Paired differences of the method's models at ``sparsity`` on ``test``, by the name of the other model."""
        places = (p.against for p in self.paired if (p.method, p.sparsity, p.test) == (method, sparsity, test))
        return next(places, {})

    def stored_against(self, method: str | None, sparsity: float | None, form: str) -> dict[str, Paired]:
        """Differences of models in a stored form from the dense model, by test; None, None: the dense model's own."""
        places = (p for p in self.stored_paired if (p.method, p.sparsity, p.values) == (method, sparsity, form))
        return {place.test: place.dense for place in places}

    def column(self, sparsity: float, test: Test) -> dict[str, Summary]:
        """The summaries of all methods that have results at one sparsity on ``test``."""
        found = {method.name: self.summary(method.name, sparsity, test.name) for method in self.methods}
        return {name: summary for name, summary in found.items() if summary is not None}

    def leaders(self, sparsity: float, test: Test) -> frozenset[str]:
        """The best methods at one sparsity on ``test``, within error."""
        against = {method.name: self.against(method.name, sparsity, test.name) for method in self.methods}
        pairs = {name: found[BEST] for name, found in against.items() if BEST in found}
        return leaders(self.column(sparsity, test), test.higher_is_better, pairs)[1]


class Summary(_Record):
    """Mean over ``seeds`` values and their standard deviation; for one value, the standard error of its test."""

    mean: float
    error: float | None
    seeds: int


def summarise(results: Sequence[Measured]) -> Summary | None:
    """Mean ± sample standard deviation (k − 1) of the finite values; None if there are none."""
    values = [result.value for result in results if result.value is not None]
    if not values:
        return None
    if len(values) > 1:
        return Summary(mean=statistics.fmean(values), error=statistics.stdev(values), seeds=len(values))
    return Summary(mean=values[0], error=next(r.stderr for r in results if r.value is not None), seeds=1)


def read_comparison(folder: str | Path) -> Comparison:
    """The ``compare.json`` of a folder. Raises InvalidOption if it is missing or invalid."""
    path = Path(folder) / COMPARISON
    found: Comparison = checked(read_json(path, "the comparison"), Comparison, str(path))
    return found


# Words in the names of lm-eval's metrics for which less is better.
_LESS = ("perplexity", "bits_per_byte", "loss", "error", "brier", "wer", "rmse")


def higher_is_better(metric: str) -> bool:
    """Whether more of ``metric`` is better: not for perplexities, losses and errors."""
    return not any(word in metric.lower().replace(" ", "_") for word in _LESS)


def quality_of(result: TaskResult) -> Quality:
    """A task's result as a record."""
    return Quality.model_validate(quality(result))


def test_of(entry: Evaluation, dense: TaskResult) -> DenseTest:
    """One test with the dense model's result."""
    return DenseTest(
        name=entry.name,
        task=entry.task,
        metric=dense.metric,
        unit=dense.unit,
        higher_is_better=higher_is_better(dense.metric) if dense.better is None else dense.better == "more",
        dense=quality_of(dense),
        samples=Samples.of(dense),
    )


def plain_test(test: DenseTest) -> Test:
    """Without the samples."""
    return Test.model_validate(test.model_dump(exclude={"samples"}))


def plain_cell(cell: CellFile) -> Cell:
    """Without the samples."""
    return Cell.model_validate(cell.model_dump(exclude={"samples", "stored_samples"}))


def samples_of(results: Mapping[str, TaskResult]) -> dict[str, Samples]:
    """By test, the samples of those results that have them."""
    return {name: found for name, result in results.items() if (found := Samples.of(result)) is not None}


def file_of(cell: Cell, results: Mapping[str, TaskResult], stored: Mapping[str, StoredFile] | None = None) -> CellFile:
    """The cell with the samples of its results and of its stored forms."""
    of_stored = {form: one.samples for form, one in (stored or {}).items()}
    return CellFile(**dict(cell), samples=samples_of(results), stored_samples=of_stored)


def cell_of(
    place: Place,
    *,
    error: str | None = None,
    results: Mapping[str, Quality] | None = None,
    sparsity: Mapping[str, Any] | None = None,
    took: Took | None = None,
    usages: Sequence[Usage] = (),
    stored: Mapping[str, StoredFile] | None = None,
) -> Cell:
    """A finished cell.

    Args:
        error: why it can't be made; nothing else is given then.
        results: of the tests by their names, the first one first.
        sparsity: see :func:`ecoflap.run.provenance.sparsity_summary`.
        took: of the measurement of the importance, in this cell or an earlier one.
        usages: of the stages allocation, pruning and evaluation.
        stored: the cell's model in each requested form.
    """
    name, seed = place.method.name, place.seed
    if error is not None or results is None or sparsity is None:
        return Cell(method=name, sparsity=place.sparsity, seed=seed, error=error or "nothing was measured")
    took = took or Took()
    first = next(iter(results.values()))
    memory = [took.peak_memory_bytes or 0, *(usage.peak_memory_bytes for usage in usages)]
    cuda = [bytes_ for bytes_ in (took.peak_cuda_bytes, *(u.peak_cuda_bytes for u in usages)) if bytes_ is not None]
    return Cell(
        method=name,
        sparsity=place.sparsity,
        seed=seed,
        value=first.value,
        stderr=first.stderr,
        n=first.n,
        others=first.others,
        tests=dict(results),
        achieved=sparsity["prunable"],
        towers={name: tower["sparsity"] for name, tower in sparsity["towers"].items()},
        stored={form: one.plain for form, one in (stored or {}).items()},
        seconds=Seconds(importance=took.seconds, **{usage.name: usage.seconds for usage in usages}),
        peak_memory_bytes=max(memory),
        peak_cuda_bytes=max(cuda, default=None),
    )

"""Runs a grid: shared work is done once, and every finished cell is a file, so that a kill loses one cell at most."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

from ecoflap.errors import EcoflapError, InvalidOption, StorageError
from ecoflap.evaluation import TaskResult
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.kept_weights import KeptWeights
from ecoflap.run.compare.folder import CELLS, DENSE, RESULTS, GridDirectory
from ecoflap.run.compare.models import NONE, KeptModels, check_keep
from ecoflap.run.compare.pairing import with_pairs
from ecoflap.run.compare.plans import Group, Plans, group_of, plan_of, planned
from ecoflap.run.compare.recipe import Grid, Place
from ecoflap.run.compare.record import (
    Cell,
    CellFile,
    Comparison,
    DenseTest,
    MethodRecord,
    cell_of,
    file_of,
    plain_cell,
    plain_test,
    quality_of,
    read_comparison,
    test_of,
)
from ecoflap.run.compare.results import command_of, write_results
from ecoflap.run.compare.shared import SharedScores, allocated
from ecoflap.run.compare.stored import StoredForms
from ecoflap.run.compare.trained import trained, training_inputs
from ecoflap.run.evaluations import evaluate, evaluations_of, rehearse
from ecoflap.run.loading import load_checkpoint
from ecoflap.run.log import explained, logging_to
from ecoflap.run.names import JOURNAL, LOG, TRAININGS
from ecoflap.run.pipeline import pruned_to
from ecoflap.run.prepare import Prepared, naming_samples, plan_on
from ecoflap.run.provenance import Usage, environment, measured, sparsity_summary, threads_of_start
from ecoflap.run.recipe import Recipe
from ecoflap.support.memory import memory_error
from ecoflap.support.progress import Progress, Silent, Task
from ecoflap.support.reading import checked

MACHINE = f"{JOURNAL}/machine.json"
_log = logging.getLogger("ecoflap")


def run_grid(
    grid: Grid,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    low_memory: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    plans: Plans | None = None,
    keep: str = NONE,
) -> Comparison:
    """Make every cell of ``grid`` and write table, plots and page into ``output``.

    After an interruption, ``resume=True`` continues, and the table is the same except for times. A cell that can't be
    made (a sparsity out of reach, a combination that does not exist) is recorded with the reason.

    Args:
        low_memory: keep the dense weights in a file of ``output``, not in memory, meanwhile.
        say: receives one line for each choice that the recipe left open: columns of the data, objective.
        keep: which cells' models are saved: ``none``, ``all``, or the ``best`` of each sparsity by the first test.
        plans: the result of :func:`~ecoflap.run.compare.plans.planned`, if it was called already.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it; if the grid or one sample shows the fault,
            ``output`` is not touched.
        Stopped: by a signal, after the work had begun.
        RunFailed: any other failure; ``log.txt`` has the traceback.
    """
    check_keep(keep)
    with GridDirectory.examine(output, grid, overwrite=overwrite, resume=resume) as folder:
        if folder.complete:
            return read_comparison(folder.path)
        plans = plans or planned(grid)
        loader = plans.loader(group_of(next(iter(plans.recipes.values()))))
        checkpoint = load_checkpoint(grid, "compare", progress=progress)
        base = plan_on(checkpoint, folder.settled(loader) if folder.resumed else loader)
        grid = grid.model_copy(update={"compute_dtype": base.recipe.compute_dtype})
        plans.rehearse(base)
        plans.check_any()
        rehearse(checkpoint, grid)
        for line in base.choices():
            if say is not None:
                say(line)
        folder.begin(grid, fingerprint(checkpoint.model), {**_inputs(base), **training_inputs(grid)})
        began, log = threads_of_start(folder.path / MACHINE, checkpoint.model), folder.path / LOG
        with logging_to(log), explained(folder.path, log), began:
            _log.info("comparison %s in %s", "goes on" if folder.resumed else "begins", folder.path.absolute())
            _log.info("recipe: %s", grid.model_dump(mode="json", exclude_defaults=True))
            comparison = _Work(grid, folder, plans, base, progress or Silent(), low_memory, keep).all()
            with folder.manifest.writing(*RESULTS):
                write_results(folder.path, comparison)
            folder.finish()
            _log.info("complete: %s", folder.path)
        return comparison


def _inputs(plan: Prepared) -> dict[str, str]:
    """Digests of the inputs of the plan's group; their names contain the group."""
    of = f"of seed {plan.recipe.seed}, {plan.recipe.samples} samples"
    return {name if name == "device" else f"{name} {of}": value for name, value in plan.inputs().items()}


class _Work:
    """A running grid: one model, whose dense weights are restored after each cell."""

    def __init__(
        self,
        grid: Grid,
        folder: GridDirectory,
        plans: Plans,
        base: Prepared,
        progress: Progress,
        low_memory: bool,
        keep: str,
    ) -> None:
        self._grid, self._folder, self._plans, self._base, self._progress = grid, folder, plans, base, progress
        self._group: Group = group_of(base.recipe)
        self._keep = keep
        self._scores = SharedScores(folder, progress)
        self._entries = evaluations_of(grid)
        kept_in = folder.path / JOURNAL if low_memory else None
        names, model = list(dict.fromkeys(layer.parameter for layer in base.anatomy.layers)), self._checkpoint.model
        self._kept = KeptWeights(model, names, kept_in and kept_in / "dense.safetensors")
        self._stored = StoredForms(model, names, grid.values, self._results, kept_in)

    @property
    def _checkpoint(self) -> Checkpoint:
        return self._base.checkpoint

    def all(self) -> Comparison:
        """Make every cell that is not finished, and return all of them."""
        kept = self._dense()
        tests = tuple(map(plain_test, kept))
        dense_stored = self._stored.dense_kept_in(self._folder, kept, self._kept)
        places = list(self._grid.places())
        # Group by group, so that batches are loaded once; a method with its own number of samples has its own group.
        todo = sorted((p for p in places if not self._folder.whole(_file_of(p))), key=self._turn)
        with self._progress.stage("compare", total=len(places), done=len(places) - len(todo)) as task:
            for place in todo:
                self._finish(place, task)
        cells = [self._read(place) for place in places]
        comparison = Comparison(
            model=self._checkpoint.source,
            task=tests[0].task,
            metric=tests[0].metric,
            higher_is_better=tests[0].higher_is_better,
            dense=tests[0].dense,
            tests=tests,
            methods=tuple(
                MethodRecord(
                    name=method.name,
                    title=method.title,
                    importance=method.importance,
                    criterion=method.criterion,
                    options=method.options,
                    citations=method.citations,
                )
                for method in self._grid.known_methods()
            ),
            sparsities=self._grid.sparsities,
            seeds=self._grid.seeds,
            cells=tuple(map(plain_cell, cells)),
            dense_stored={form: one.plain for form, one in dense_stored.items()},
            recipe=self._grid.to_dict(),
            environment=environment(self._checkpoint),
            command=command_of(self._grid, self._folder.path),
        )
        return with_pairs(comparison, cells, kept, dense_stored)

    def _turn(self, place: Place) -> tuple[int, int]:
        recipe = self._plans.recipes.get(place)
        return self._grid.seeds.index(place.seed), 0 if recipe is None else recipe.samples

    def _read(self, place: Place) -> CellFile:
        name = _file_of(place)
        found: CellFile = checked(
            self._folder.read(name),
            CellFile,
            f"{self._folder.path / name} is damaged: remove it, and --resume makes the cell again. Fault",
        )
        return found

    def _finish(self, place: Place, task: Task) -> None:
        task.advance(0, str(place))
        _log.info("cell %s: begins", place)
        if place in self._plans.recipes:
            self._load(self._plans.recipes[place])
        recipe = self._plans.recipes.get(place)  # None if loading its samples showed that it can't be made
        try:
            with naming_samples(self._base):
                cell = self._cell(place, recipe) if recipe else cell_of(place, error=str(self._plans.errors[place]))
        except StorageError:
            raise
        except Exception as error:
            short = memory_error(error)
            if short is None and not isinstance(error, EcoflapError):
                raise
            cell = cell_of(place, error=_line(short or error))
        finally:
            self._kept.restore()
        if cell.error is not None:
            task.advance(0, str(place))  # stops here if it failed because of a signal, and is made again
            _log.warning("%s can't be made: %s", place, cell.error)
        self._folder.write(_file_of(place), cell.model_dump(mode="json"))
        _log.info("cell %s: %s", place, cell.value)
        task.advance(1, str(place))

    def _load(self, recipe: Recipe) -> None:
        """Load the calibration batches of the recipe's group."""
        if group_of(recipe) == self._group:
            return
        same = {"compute_dtype": self._grid.compute_dtype}
        self._base = plan_on(self._checkpoint, self._plans.loader(group_of(recipe)).model_copy(update=same))
        self._folder.note(_inputs(self._base))
        self._plans.rehearse(self._base)
        self._group = group_of(recipe)

    def _cell(self, place: Place, recipe: Recipe) -> Cell:
        if place.method.trains:
            return self._trained(place)
        plan, usages = plan_of(self._base, recipe), list[Usage]()
        importance, took = self._scores.of(plan)
        allocation, usage = allocated(plan, importance, self._folder, self._progress)
        usages.append(usage)
        with measured("pruning", usages):
            pruned = pruned_to(plan, allocation, self._progress)
        for name in pruned.unreached:
            _log.warning("no calibration token reached %s: pruned without its own statistics", name)
        with measured("evaluation", usages):
            answers = self._results()
        results = {name: quality_of(answer) for name, answer in answers.items()}
        sparsity = sparsity_summary(plan.anatomy, pruned.allocation)
        self._offer(place, cell_of(place, results=results, sparsity=sparsity))
        stored = self._stored.of_pruned(answers)
        cell = cell_of(place, results=results, sparsity=sparsity, took=took, usages=usages, stored=stored)
        return file_of(cell, answers, stored)

    def _trained(self, place: Place) -> Cell:
        usages = list[Usage]()
        stem = Path(_file_of(place)).stem
        with measured("pruning", usages):
            found, sparsity = trained(self._grid, place, self._folder.path / JOURNAL / TRAININGS / stem, self._progress)
        with measured("evaluation", usages):
            answers = self._results(found)
        results = {name: quality_of(answer) for name, answer in answers.items()}
        cell = cell_of(place, results=results, sparsity=sparsity, usages=usages)
        self._offer(place, cell, found)
        return file_of(cell, answers)

    def _offer(self, place: Place, cell: Cell, checkpoint: Checkpoint | None = None) -> None:
        finished = [(Path(_file_of(other)).stem, other) for other in self._grid.places() if other != place]
        known = ((name, self._read(other)) for name, other in finished if self._folder.has(_file_of(other)))
        kept = KeptModels(self._folder, checkpoint or self._checkpoint, self._keep, self._dense()[0].higher_is_better)
        kept.offer(Path(_file_of(place)).stem, cell, known)

    def _results(self, checkpoint: Checkpoint | None = None) -> dict[str, TaskResult]:
        # With the grid's seed, so that all cells use the same test samples.
        found = checkpoint or self._checkpoint
        return {entry.name: evaluate(found, entry, self._grid, self._progress) for entry in self._entries}

    def _dense(self) -> tuple[DenseTest, ...]:
        """The dense model's results, measured once."""
        if not self._folder.whole(DENSE):
            rows = [
                test_of(entry, evaluate(self._checkpoint, entry, self._grid, self._progress)) for entry in self._entries
            ]
            self._folder.write(DENSE, [row.model_dump(mode="json") for row in rows])
        where = f"{self._folder.path / DENSE} is damaged: remove it, and --resume measures it again. Fault"
        found: tuple[DenseTest, ...] = checked(self._folder.read(DENSE), tuple[DenseTest, ...], where)
        if [test.name for test in found] != [entry.name for entry in self._entries]:
            raise InvalidOption(f"{where}: it is of other tests")
        return found


def _file_of(place: Place) -> str:
    """The cell's file; a method's name that is long or has special characters is replaced by a digest."""
    name = place.method.name
    plain = re.sub(r"[^A-Za-z0-9+.=,-]+", "_", name)[:80]
    if plain != name:
        plain += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{CELLS}/{plain}_{place.sparsity!r}_seed{place.seed}.json"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

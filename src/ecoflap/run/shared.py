"""Shares a run directory between workers: the first one reads and writes, and sends the others the content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.errors import InvalidOption
from ecoflap.run.directory import RunDirectory
from ecoflap.run.journal import BlockFiles, EstimateFile, SearchFile
from ecoflap.run.names import JOURNAL, LOG
from ecoflap.run.recipe import Recipe, flag_of
from ecoflap.run.versions import versions
from ecoflap.support.files import read_sealed, write_sealed
from ecoflap.support.workers import Workers

if TYPE_CHECKING:
    from ecoflap.importance.scores import Estimate
    from ecoflap.pruning.journal import PrunedBlock


def check_same(recipe: Recipe, workers: Workers, others: Mapping[str, str]) -> None:
    """Check that all workers do the same work; all must call this.

    Args:
        others: digests and other inputs beside the recipe and the versions.

    Raises:
        InvalidOption: a worker has other options, versions or ``others`` than the first.
    """
    options = {f"option {flag_of(name)}": str(value) for name, value in recipe.to_dict().items()}
    same = {**options, **{f"version of {name}": version for name, version in versions().items()}, **others}
    given = workers.gather(same)
    for rank, other in enumerate(given):
        for name, value in given[0].items():
            if other.get(name) != value:
                raise InvalidOption(
                    f"worker {rank} has another {name} than worker 0 ({other.get(name)}, not {value}): "
                    "give all of them the same options, files and versions"
                )


class SharedRun:
    """One run of several workers. All call the same methods in the same order.

    Attributes:
        path: the folder.
        first: whether this is the first worker, which writes.
        log: this worker's log file.
        complete: whether the run is complete.
        resumed: whether the run is resumed; known once it has begun.
    """

    def __init__(self, path: Path, directory: RunDirectory | None, workers: Workers) -> None:
        self.path, self._directory, self._workers = path, directory, workers
        self.first = workers.first
        self.log = path / (LOG if self.first else f"{JOURNAL}/log-{workers.rank}.txt")
        self.complete = workers.from_first(lambda: self._own.complete)
        self.resumed = False

    @classmethod
    def examine(
        cls,
        path: str | Path,
        recipe: Recipe,
        workers: Workers,
        *,
        overwrite: bool = False,
        resume: bool = False,
        kind: type[RunDirectory] = RunDirectory,
    ) -> SharedRun:
        """:meth:`RunDirectory.examine` by the first worker, for a directory of class ``kind``."""
        path, directory = Path(path), None
        check_same(recipe, workers, {"option --output": str(path)})  # before a model is loaded
        if workers.first:
            directory = kind.examine(path, recipe, overwrite=overwrite, resume=resume)
        return cls(path, directory, workers)

    def settled(self, recipe: Recipe) -> Recipe:
        """:meth:`RunDirectory.settled` for a resumed run; the unchanged recipe for a new one."""
        own, fields = self._directory, ("importance", "criterion", "compute_dtype")

        def took() -> list[str]:
            found = own.settled(recipe) if own and own.resumed else recipe
            return [getattr(found, name) for name in fields]

        return recipe.model_copy(update=dict(zip(fields, self._workers.from_first(took), strict=True)))

    def locked(self) -> AbstractContextManager[object]:
        """Context that unlocks the folder at exit."""
        return self._directory or nullcontext()

    @property
    def _own(self) -> RunDirectory:
        assert self._directory is not None
        return self._directory

    def begin(self, recipe: Recipe, fingerprint: str, inputs: Mapping[str, str]) -> None:
        """:meth:`RunDirectory.begin` by the first worker.

        Raises:
            InvalidOption: a worker has other options, data or versions or another model than the first.
        """
        check_same(recipe, self._workers, {"model": fingerprint, **inputs})
        if self.first:
            self._own.begin(recipe, fingerprint, inputs)
        self.resumed = self._workers.from_first(
            lambda: self._own.resumed
        )  # no worker goes on before the folder is ready
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def has_result(self, name: str) -> bool:
        """:meth:`Results.has <ecoflap.run.manifest.Results.has>`."""
        return self._workers.from_first(lambda: self._own.results.has(name))

    def write_result(self, name: str, data: Any) -> None:
        if self.first:
            self._own.results.write(name, data)

    def read_sealed(self, name: str, kind: Any = Any) -> Any | None:
        """The content of a file of :meth:`write_sealed`; None if there is none or it is damaged."""
        return self._workers.from_first(lambda: read_sealed(self.path / name, kind))

    def write_sealed(self, name: str, data: Any) -> None:
        if self.first:
            write_sealed(self.path / name, data)

    def write(self, name: str, data: Any) -> None:
        if self.first:
            self._own.write(name, data)

    def writing(self, *names: str) -> AbstractContextManager[None]:
        """:meth:`Manifest.writing <ecoflap.run.manifest.Manifest.writing>` by the first worker."""
        return self._own.manifest.writing(*names) if self.first else nullcontext()

    def discard(self, name: str) -> None:
        self._own.discard(name)

    def finish(self) -> None:
        """:meth:`RunDirectory.finish` by the first worker."""
        self._own.finish()

    def estimates(self) -> SharedEstimates:
        """The journal of stage 1."""
        return SharedEstimates(self.path / JOURNAL, self._workers)

    def blocks(self) -> SharedBlocks:
        """The journal of stage 2."""
        return SharedBlocks(BlockFiles(self.path / JOURNAL / "blocks"), self._workers)

    def search(self) -> SharedSearch:
        """The journal of the search for an allocation."""
        return SharedSearch(SearchFile(self.path / JOURNAL / "search.json"), self._workers)


class SharedEstimates:
    """Estimates of stage 1: each worker writes its own file, and reads the files of all."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        def path(rank: int | str) -> Path:
            return folder / ("importance.jsonl" if rank == 0 else f"importance-{rank}.jsonl")

        self._file = EstimateFile(path(workers.rank))
        others = (file for file in sorted(folder.glob(path("*").name)) if file != path(workers.rank))
        known = workers.from_first(
            lambda: [[e.layer, e.batch, e.draw, e.value] for e in self._file.merged_with(others)]
        )
        self._known: list[Any] = known

    def estimates(self) -> Iterable[Estimate]:
        from ecoflap.importance.scores import Estimate

        return tuple(Estimate(*row) for row in self._known)

    def append(self, estimate: Estimate) -> None:
        self._file.append(estimate)

    def close(self) -> None:
        self._file.close()


class SharedBlocks:
    """Pruned blocks of stage 2: the first worker saves them, and sends the others those of an interrupted run."""

    def __init__(self, files: BlockFiles, workers: Workers) -> None:
        self._files, self._workers = files, workers
        self.folder = files.folder

    def load(self, block: str) -> PrunedBlock | None:
        from ecoflap.pruning.journal import PrunedBlock

        def read() -> Any:
            found = self._files.load(block)
            if found is None:
                return None
            return {"weights": dict(found.weights), "unreached": found.unreached, "tokens": dict(found.tokens)}

        given = self._workers.from_first(read)
        if given is None:
            return None
        return PrunedBlock(given["weights"], tuple(given["unreached"]), given["tokens"])

    def save(self, block: str, pruned: PrunedBlock) -> None:
        if self._workers.first:
            self._files.save(block, pruned)
        self._workers.gather(None)  # wait: all workers of an offloaded model read the file from now on

    def place(self, block: str) -> Path:
        """:meth:`BlockFiles.place`."""
        return self._files.place(block)

    def bytes(self) -> int:
        """:meth:`BlockFiles.bytes`."""
        return self._files.bytes()


class SharedSearch:
    """The state of the search, which the first worker stores."""

    def __init__(self, file: SearchFile, workers: Workers) -> None:
        self._file, self._workers = file, workers

    def load(self) -> dict[str, Any] | None:
        return self._workers.from_first(self._file.load)

    def save(self, state: dict[str, Any]) -> None:
        if self._workers.first:
            self._file.save(state)

"""Manages the run directory: the files of each stage, the lock, and whether a run may be resumed."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from ecoflap.errors import EcoflapError, InvalidOption, OutputExists, ResumeMismatch, StorageError
from ecoflap.importance.registry import AUTO, GRADIENT_NORM, ZEROTH_ORDER
from ecoflap.pruning.registry import BEFORE_ADMM
from ecoflap.run.differences import differences
from ecoflap.run.manifest import Manifest, Results
from ecoflap.run.names import GRID, INPUTS, JOURNAL, MANIFEST, METRICS, MODEL, OURS, RECIPE, REPORT, TRAIN, WRITTEN
from ecoflap.run.recipe import Recipe
from ecoflap.run.versions import versions
from ecoflap.support.files import PARTIAL, check_can_make, storage, write_json, write_text
from ecoflap.support.reading import read_json, read_yaml

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on; read by type checkers alone

_log = logging.getLogger("ecoflap")


class Stopped(KeyboardInterrupt):
    """A signal stopped a run, which can be resumed: ``path`` is its directory, ``signal`` the signal's name."""

    def __init__(self, path: Path, signal: str) -> None:
        super().__init__(signal)
        self.path = path


class RunFailed(EcoflapError):
    """An unexpected error that the input did not cause; the run's log has the traceback."""

    exit_code = 1


class RunDirectory:
    """One run's files: call :meth:`examine`, then :meth:`begin`; close it (or use it as a context) to unlock it.

    A subclass is for another kind of work, with the same rules for writing and resuming.

    Attributes:
        what: the kind of work, for messages.
        ours: the files in the order of removal.
        inputs: the file with digests of the run's inputs.
    """

    what: ClassVar[str] = "run"
    ours: ClassVar[tuple[str, ...]] = OURS
    inputs: ClassVar[str] = INPUTS

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resumed = False
        self.results = Results(path, path / WRITTEN)
        self.manifest = Manifest(path)
        self._lock: int | None = None
        self._asked = (False, False)  # to overwrite, to resume

    @classmethod
    def examine(cls, path: str | Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Self:
        """Check whether a run can begin or be resumed in ``path``; nothing is written yet.

        Args:
            recipe: resolved.
            overwrite: replace an earlier run; only files of a run are removed.
            resume: continue an earlier run with the same recipe; begin one if there is none.

        Raises:
            InvalidOption: both ``overwrite`` and ``resume`` are given, or an input of the recipe is a file of the run.
            OutputExists: the folder holds other files, or a run and neither option is given.
            ResumeMismatch: the recipe or a version differs; the message lists each difference.
        """
        if overwrite and resume:
            raise InvalidOption("--overwrite starts again and --resume goes on: give one of them")
        run = cls(Path(path))
        run._asked = (overwrite, resume)
        run._check_may_write(recipe)
        run._check_inputs_are_elsewhere(recipe)
        return run

    def _check_may_write(self, recipe: Recipe) -> None:
        """Check that the folder's content may be replaced or continued, as requested."""
        overwrite, resume = self._asked
        if self.path.exists() and not self.path.is_dir():
            raise OutputExists(f"{self.path} is a file, not a folder: choose another --output")
        check_can_make(self.path)
        held = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        held = {name for name in held if not self._leftover(name)}
        if held == {MANIFEST} and self.manifest.exists:
            held = set()  # the process was killed between writing the manifest and the recipe
        if held and (RECIPE not in held or not self._is_ours()):
            raise OutputExists(
                f"{self.path} holds something that is no {self.what} of ecoflap: choose another --output"
            )
        if held and not (overwrite or resume):
            raise OutputExists(
                f"{self.path} already holds a {self.what}: add --overwrite to replace it, --resume to continue it, "
                "or choose another --output"
            )
        if held and overwrite:
            self._check_all_is_ours()
        if held and resume:
            self._check_same(recipe)
        self.resumed = bool(held and resume)

    def _check_all_is_ours(self) -> None:
        if not self.manifest.exists:
            raise OutputExists(
                f"{self.path} has no complete {MANIFEST} (earlier versions wrote none), so it is unknown which of its "
                f"files ecoflap wrote: look for files of your own, remove the folder (rm -r {quote(str(self.path))}) "
                "and start again, or choose another --output"
            )
        found = list(self.manifest.foreign_files(self.ours))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise OutputExists(
                f"{self.path / found[0]}{more} was changed after ecoflap wrote it, so it is not removed: move it away "
                "first, or choose another --output"
            )

    def begin(self, recipe: Recipe, fingerprint: str, inputs: Mapping[str, str]) -> None:
        """Lock the folder; continue the run that :meth:`examine` found, or clear it and write the recipe.

        Args:
            fingerprint: of the model.
            inputs: digests of data, the kind of device, and other things that decide the result and are no options.

        Raises:
            OutputExists: another process works in it, or has written files there since :meth:`examine`.
            ResumeMismatch: the model or an input is not the one that the run began with.
            StorageError: the folder can't be made or written.
        """
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self._check_may_write(recipe)  # again: another process may have run since then
        if self.resumed:
            self._check_fingerprint(fingerprint)
            self._check_inputs(inputs)
        else:
            self._clear()
            self.manifest.begin()
            self._write_recipe(recipe, fingerprint)
        self.manifest.begin()
        self.remove_temporary_files()
        with storage(self.path):
            (self.path / JOURNAL).mkdir(exist_ok=True)
        if not self.has(self.inputs):
            self.write(self.inputs, dict(inputs))

    def _write_recipe(self, recipe: Recipe, fingerprint: str) -> None:
        data = {**recipe.to_dict(), "versions": versions(), "fingerprint": fingerprint}
        write_text(self.path / RECIPE, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))

    def _is_ours(self) -> bool:
        """Whether the recipe file is of this kind of work, or unreadable: then it may be replaced."""
        try:
            return not {GRID, TRAIN} & self.recorded().keys()
        except InvalidOption:
            return self.manifest.exists

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def lock(self) -> None:
        """Lock the folder until :meth:`close`. Raises OutputExists if another process holds the lock."""
        with storage(self.path):
            self._lock = os.open(self.path, os.O_RDONLY)  # the folder itself is locked, so that no lock file remains
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise OutputExists(
                f"another process is at work in {self.path}: wait for it, or choose another --output"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _clear(self) -> None:
        for name in self.ours:
            _remove(self.path / name)

    def _leftover(self, name: str) -> bool:
        """Whether ``name`` is a temporary file of a killed process."""
        pattern = rf"\.({'|'.join(map(re.escape, self.ours))})\.(.*{re.escape(PARTIAL)}|partial|old)"
        return re.fullmatch(pattern, name) is not None

    def remove_temporary_files(self) -> None:
        """Remove temporary files that a killed process left."""
        inner = [self.path / name for name in (*self.ours, f"{JOURNAL}/blocks") if name != MODEL]
        for folder in (self.path, *inner):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if self._leftover(entry.name) or (folder != self.path and entry.name.endswith(PARTIAL)):
                    _remove(entry)

    def recorded(self) -> dict[str, Any]:
        """The content of the run's recipe file: fields, versions, fingerprint."""
        data = read_yaml(self.path / RECIPE, "the recipe")
        if not isinstance(data, dict):
            raise InvalidOption(f"{self.path / RECIPE} is damaged: start again with --overwrite")
        return data

    def settled(self, recipe: Recipe) -> Recipe:
        """The recipe with the run's choices for open fields, such as the importance or the compute dtype."""
        before, took = self.recorded(), dict[str, Any]()
        if recipe.pruned is not None:  # its sparsity is known once the pruned model is read
            took |= {name: before.get(name) for name in ("sparsity", "max_sparsity")}
        elif recipe.importance == AUTO and before.get("importance") in (GRADIENT_NORM, ZEROTH_ORDER):
            took["importance"] = before["importance"]
        if "criterion" not in recipe.model_fields_set and before.get("criterion") == BEFORE_ADMM:
            took["criterion"] = BEFORE_ADMM  # begun by a version whose default it was
        if recipe.tokens is None:
            took["tokens"] = before.get("tokens")
        if recipe.compute_dtype == AUTO and before.get("compute_dtype") in ("native", "float32"):
            took["compute_dtype"] = before["compute_dtype"]
        return recipe.model_copy(update=took)

    def _check_same(self, recipe: Recipe) -> None:
        before, now = self.recorded(), {**self.settled(recipe).to_dict(), "versions": versions()}
        found = list(differences(before, now))
        if found:
            raise ResumeMismatch(
                f"can't resume {self.path}, the result would differ: {'; '.join(found)}. "
                "Use the same options and versions, or --overwrite"
            )

    def _check_fingerprint(self, fingerprint: str) -> None:
        known = str(self.recorded().get("fingerprint"))
        if known != fingerprint:
            raise ResumeMismatch(
                f"can't resume {self.path}: the model's weights are not those that the run began with "
                f"(fingerprint {known[:12]}… then, {fingerprint[:12]}… now). Use the same checkpoint, or --overwrite"
            )

    def _check_inputs(self, inputs: Mapping[str, str]) -> None:
        before = self.read(self.inputs) if self.has(self.inputs) else inputs
        for name, value in inputs.items():
            if before.get(name) != value:
                raise ResumeMismatch(
                    f"can't resume {self.path}: the {name} is not the one that the run began with "
                    f"({str(before.get(name))[:12]} then, {value[:12]} now). Use the same one, or --overwrite"
                )

    def _check_inputs_are_elsewhere(self, recipe: Recipe) -> None:
        home = self.path.resolve()
        for field, value in places_of(recipe):
            try:
                place = Path(value).expanduser().resolve()
                inside = home in (place, *place.parents) and place.exists()
            except (OSError, ValueError, RuntimeError):  # not a valid path; reported where it is read
                continue
            if inside:
                raise InvalidOption(
                    f"{field} {value} is part of {self.path}, which is written again: choose another --output"
                )

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def whole(self, name: str) -> bool:
        """Whether the JSON file ``name`` exists and is valid; an invalid one gives a warning and is made again."""
        if not self.has(name):
            return False
        try:
            self.read(name)
        except InvalidOption as error:
            _log.warning("%s: it is made again", error)
            return False
        return True

    def write(self, name: str, data: Any) -> None:
        """Atomically write ``name`` as JSON."""
        with nullcontext() if name.startswith(f"{JOURNAL}/") else self.manifest.writing(name):
            write_json(self.path / name, data)

    def read(self, name: str) -> Any:
        """Read a JSON file of the run. Raises InvalidOption if it is damaged."""
        return read_json(self.path / name, "the run's file")

    def discard(self, name: str) -> None:
        """Remove one of the run's files, if it is there."""
        _remove(self.path / name)

    def finish(self) -> None:
        """Remove the journal, after all files are written."""
        with suppress(StorageError, OutputExists):
            if self._lock is None:  # a complete run that was killed while it removed the journal
                self.lock()
            self.remove_temporary_files()
            self.manifest.finish_pending()
            self.discard(JOURNAL)

    @property
    def complete(self) -> bool:
        """Whether a run to be resumed is complete: the page is written last."""
        return self.resumed and self.has(METRICS) and self.has(REPORT)


def places_of(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each field that names a file or folder to read, with its value."""
    single = (
        "model", "pruned", "calibration", "test", "importance", "allocation", "image_folder", "test_image_folder",
        "train", "validation", "dense",
    )  # fmt: skip
    lists = ("classes", "class_prompts")
    for prefix, holder in (("", recipe), *((f"evaluations {e.name} ", e) for e in recipe.evaluations or ())):
        for field in single:
            if value := getattr(holder, field, None):
                yield prefix + field, value
        for field in lists:
            yield from ((prefix + field, value) for value in getattr(holder, field) or ())


def _remove(path: Path) -> None:
    with storage(path):
        if not path.name.startswith(".") and (half := path.with_name(f".{path.name}.old")).is_dir():
            shutil.rmtree(half)  # left by a removal that was killed
        if path.is_dir() and not path.is_symlink():
            # Renamed first: a folder that a kill left half-removed would look complete.
            old = path.with_name(f".{path.name}.old")
            if old.exists() and path != old:
                shutil.rmtree(old)
            shutil.rmtree(path if path.name.startswith(".") else path.rename(old))
        else:
            path.unlink(missing_ok=True)

"""The run directory: what each stage leaves behind, the journal of work under way, and what may be resumed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ecoflap.errors import InvalidOption, OutputExists, ResumeMismatch
from ecoflap.files import storage, write_atomically, write_json, write_text
from ecoflap.importance.scores import Estimate
from ecoflap.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

RECIPE, IMPORTANCE, ALLOCATION = "recipe.yaml", "importance.json", "allocation.json"
METRICS, REPORT, MODEL, LOG, JOURNAL = "metrics.json", "report.html", "model", "log.txt", "journal"
OURS = (RECIPE, IMPORTANCE, ALLOCATION, METRICS, REPORT, MODEL, LOG, JOURNAL, ".lock")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    import torch
    import transformers

    from ecoflap import __version__

    return {"ecoflap": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


class RunDirectory:
    """One run's files: :meth:`examine`, then :meth:`begin`; close it (or use it as a context) to let go of its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._resumed = False

    @classmethod
    def examine(
        cls, path: str | Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False
    ) -> RunDirectory:
        """Look whether a run can begin or go on in ``path``; nothing is written yet.

        Args:
            recipe: resolved.
            overwrite: replace the earlier run that is there; only files of a run are removed.
            resume: continue the run that is there, if its recipe is the same; begin one if there is none.

        Raises:
            OutputExists: the folder holds something else, or a run and neither option is given.
            ResumeMismatch: the recipe or a version differs; the message lists each difference.
        """
        run = cls(Path(path))
        if run.path.exists() and not run.path.is_dir():
            raise OutputExists(f"{run.path} is a file, not a folder: choose another --output")
        held = {entry.name for entry in run.path.iterdir()} - {".lock"} if run.path.is_dir() else set()
        is_run = RECIPE in held
        if held and not is_run:
            raise OutputExists(f"{run.path} holds something that is no run of ecoflap: choose another --output")
        if held and not (overwrite or resume):
            raise OutputExists(
                f"{run.path} already holds a run: add --overwrite to replace it, --resume to continue it, "
                "or choose another --output"
            )
        if is_run and resume:
            run._check_same(recipe)
            run._resumed = True
        return run

    def begin(self, recipe: Recipe, fingerprint: str) -> None:
        """Lock the folder; continue the run that :meth:`examine` found, or clear it and write the recipe.

        Raises:
            OutputExists: another process is at work in it.
            ResumeMismatch: the model is not the one that the run began with.
            StorageError: the folder can't be made or written.
        """
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self._resumed:
            self._check_fingerprint(fingerprint)
        else:
            self._clear()
            write_text(self.path / RECIPE, _yaml(recipe, fingerprint))
        with storage(self.path):
            (self.path / JOURNAL).mkdir(exist_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        with storage(self.path):
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise OutputExists(f"another process is at work in {self.path}: wait for it, or choose another") from error

    def _clear(self) -> None:
        for name in OURS:
            target = self.path / name
            with storage(target):
                if target.is_dir():
                    shutil.rmtree(target)
                elif name != ".lock":
                    target.unlink(missing_ok=True)

    def recorded(self) -> dict[str, Any]:
        """The run's recipe file as it is: fields, versions, fingerprint."""
        try:
            data = yaml.safe_load((self.path / RECIPE).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidOption(f"can't read {self.path / RECIPE}: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise InvalidOption(f"{self.path / RECIPE} is damaged: start again with --overwrite")
        return data

    def _check_same(self, recipe: Recipe) -> None:
        before = self.recorded()
        now = {**recipe.to_dict(), "versions": versions()}
        differences = [
            f"{name}: {before.get(name)!r} then, {now[name]!r} now" for name in now if before.get(name) != now[name]
        ]
        if differences:
            raise ResumeMismatch(
                f"can't resume {self.path}, the result would differ: {'; '.join(differences)}. "
                "Use the same options and versions, or --overwrite"
            )

    def _check_fingerprint(self, fingerprint: str) -> None:
        known = str(self.recorded().get("fingerprint"))
        if known != fingerprint:
            raise ResumeMismatch(
                f"can't resume {self.path}: the model's weights are not those that the run began with "
                f"(fingerprint {known[:12]}… then, {fingerprint[:12]}… now). Use the same checkpoint, or --overwrite"
            )

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def write(self, name: str, data: Any) -> None:
        """Atomically write ``name`` as JSON."""
        write_json(self.path / name, data)

    def read(self, name: str) -> Any:
        """Read a JSON file of the run; raises InvalidOption where it is damaged."""
        path = self.path / name
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InvalidOption(f"can't read {path}: {error}") from error

    def finish(self) -> None:
        """All is written: the journal is no longer needed."""
        with storage(self.path / JOURNAL):
            shutil.rmtree(self.path / JOURNAL, ignore_errors=True)

    @property
    def complete(self) -> bool:
        """The run to be resumed has nothing left to do."""
        return self._resumed and self.has(METRICS) and self.has(REPORT) and not self.has(JOURNAL)


class EstimateFile:
    """Estimates of stage 1, one JSON line each. A last line that was cut off by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: list[Estimate] = []
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    layer, batch, draw, value = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self._known.append(Estimate(layer, batch, draw, float.fromhex(value)))
                whole += len(line)
        with storage(path):
            self._file = open(path, "ab")  # noqa: SIM115 - open as long as the stage runs
            self._file.truncate(whole)

    def estimates(self) -> Iterable[Estimate]:
        return tuple(self._known)

    def append(self, estimate: Estimate) -> None:
        """Add one line. It reaches the system at once, so that a killed process loses nothing."""
        row = [estimate.layer, estimate.batch, estimate.draw, estimate.value.hex()]  # hexadecimal: every bit
        with storage(self._path):
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        with storage(self._path):
            os.fsync(self._file.fileno())
            self._file.close()


class BlockFiles:
    """Pruned blocks of stage 2, one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, block: str) -> Path:
        return self._folder / f"{block}.safetensors"

    def load(self, block: str) -> Mapping[str, Tensor] | None:
        from safetensors.torch import load_file

        path = self._path(block)
        return load_file(path) if path.exists() else None

    def save(self, block: str, weights: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        write_atomically(self._path(block), lambda temporary: save_file(tensors, temporary))


def _yaml(recipe: Recipe, fingerprint: str) -> str:
    data = {**recipe.to_dict(), "versions": versions(), "fingerprint": fingerprint}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

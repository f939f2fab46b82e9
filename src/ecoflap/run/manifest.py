"""Lists the files that a run wrote, with digests, so that ``--overwrite`` removes only these."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ecoflap.errors import OutputExists, ResumeMismatch
from ecoflap.run.names import CHECKPOINTS, JOURNAL, LOG, MANIFEST, RECIPE, SEARCH, TRAININGS
from ecoflap.support.files import PARTIAL, json_text, read_sealed, write_sealed, write_text
from ecoflap.support.reading import NO_READING, json_value, read_text

_log = logging.getLogger("ecoflap")

# Written line by line, or one file per block: recognised by their names, without digests.
_BY_NAME = (LOG, RECIPE, MANIFEST)
_OF_TRAINERS = (CHECKPOINTS, SEARCH, TRAININGS)  # folders with transformers' own files
_IN_JOURNAL = re.compile(rf"{JOURNAL}/(.*\.(json|jsonl|safetensors)|log-\d+\.txt)")
_DIGESTS = dict[str, list[str]]
_UNDER_WAY = None  # instead of a digest: the file is being written


class _Entry(BaseModel):
    sha256: str
    size: int
    time: int


class _Content(BaseModel):
    """``manifest.json``."""

    format: Literal[1]
    files: dict[str, _Entry | None]


class Manifest:
    """``manifest.json`` of a folder: the digest, size and time of each file that was written into it.

    A name is noted before its file is written and again afterwards, so that a file is known as the run's even after a
    kill in between. A name that ends in ``/`` is a folder that is written as a whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether the folder has a valid manifest, which marks it as written by ecoflap."""
        return read_sealed(self._folder / MANIFEST, _Content) is not None

    def begin(self) -> None:
        """Write an empty manifest, unless there is one."""
        if not self.exists:
            self._write({})

    def expect(self, *names: str) -> None:
        """Note that ``names`` will be written."""
        self._write({**self._read(), **dict.fromkeys(names, _UNDER_WAY)})

    def note(self, *names: str) -> None:
        """Note that ``names`` were written: files, or whole folders (``model/``)."""
        known = self._read()
        for name in names:
            if name.endswith("/"):
                known.pop(name, None)
            path = self._folder / name
            files = sorted(path.rglob("*")) if name.endswith("/") else [path]
            for file in files:
                if file.is_file() and not file.is_symlink():
                    place = file.relative_to(self._folder).as_posix()
                    known[place] = _of(file, known.get(place))
        self._write(known)

    @contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """Context that notes ``names`` before and after they are written; does nothing without a manifest.

        Raises:
            OutputExists: there is a file of that name that ecoflap did not write.
        """
        if not self.exists:
            yield
            return
        self.check_own(*names)
        self.expect(*names)
        yield
        self.note(*names)

    def check_own(self, *names: str) -> None:
        """Raises OutputExists if there is a manifest and a file of that name that ecoflap did not write."""
        if not self.exists:
            return
        known = self._read()
        for name in names:
            path = self._folder / name
            if not name.endswith("/") and name not in known and not _by_name(name) and os.path.lexists(path):
                raise OutputExists(f"{path} was not written by ecoflap, so it is not replaced: move it away first")

    def finish_pending(self) -> None:
        """Note the files that were being written when an earlier process ended."""
        under_way = [name for name, entry in self._read().items() if entry is _UNDER_WAY]
        if under_way:
            self.note(*under_way)

    def foreign_files(self, ours: Iterable[str]) -> Iterator[str]:
        """Files with names in ``ours`` that ecoflap did not write, or that were changed since."""
        known = self._read()
        whole = tuple(name for name, entry in known.items() if name.endswith("/") and entry is _UNDER_WAY)
        for name in ours:
            path = self._folder / name
            inner = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
            for file in inner:
                place = file.relative_to(self._folder).as_posix()
                if not (file.is_file() or file.is_symlink()) or _by_name(place) or place.startswith(whole):
                    continue
                if place not in known or not _same(file, known[place]):
                    yield place

    def _read(self) -> dict[str, Any]:
        found: _Content | None = read_sealed(self._folder / MANIFEST, _Content)
        return {} if found is None else found.model_dump()["files"]

    def _write(self, files: dict[str, Any]) -> None:
        write_sealed(self._folder / MANIFEST, {"format": 1, "files": files})


class Results:
    """JSON files in ``folder`` with their digests in ``ledger``.

    A digest is written before its file, so that a kill in between never leaves a file without a digest.
    """

    def __init__(self, folder: Path, ledger: Path) -> None:
        self._folder, self._ledger, self._manifest = folder, ledger, Manifest(folder)

    def write(self, name: str, data: Any) -> None:
        """Atomically write ``name`` as JSON. Raises StorageError."""
        text = json_text(data)
        known = read_sealed(self._ledger, _DIGESTS) or {}
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in known.get(name, ()):
            write_sealed(self._ledger, {**known, name: [*known.get(name, ()), digest]})
        with self._manifest.writing(name):
            write_text(self._folder / name, text)

    def has(self, name: str) -> bool:
        """Whether ``name`` exists and is unchanged; an invalid JSON file gives a warning and is made again.

        A file without a recorded digest is accepted: a complete run has no journal.

        Raises:
            ResumeMismatch: the file was edited.
        """
        path = self._folder / name
        if not path.exists():
            return False
        try:
            content = read_text(path).encode()
        except NO_READING:
            content = b""
        known = (read_sealed(self._ledger, _DIGESTS) or {}).get(name)
        if known is not None and hashlib.sha256(content).hexdigest() in known:
            return True
        try:
            json_value(content)
        except NO_READING:
            _log.warning("%s is damaged: it is made again", path)
            return False
        if known is None:
            return True
        option = Path(name).stem
        raise ResumeMismatch(
            f"can't resume {self._folder}: {name} was changed after the run wrote it. Restore it, or remove "
            f"it to make it again; to use your own file, start another run: --{option} FILE"
        )


def _by_name(place: str) -> bool:
    trainers = tuple(f"{JOURNAL}/{name}/" for name in _OF_TRAINERS)
    own = _IN_JOURNAL.fullmatch(place) is not None or place.startswith(trainers)
    return place in _BY_NAME or own or (place.rpartition("/")[2].startswith(".") and place.endswith(PARTIAL))


def _of(file: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    stat = file.stat()
    if before is not None and (before["size"], before["time"]) == (stat.st_size, stat.st_mtime_ns):
        return before
    return {"sha256": file_digest(file), "size": stat.st_size, "time": stat.st_mtime_ns}


def _same(file: Path, entry: dict[str, Any] | None) -> bool:
    """Whether a file is unchanged; if size and time are the same, it is not read."""
    if entry is _UNDER_WAY:
        return not file.is_symlink()
    if file.is_symlink():
        return False
    stat = file.stat()
    if stat.st_size != entry["size"]:
        return False
    return bool(stat.st_mtime_ns == entry["time"] or file_digest(file) == entry["sha256"])


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

"""A full disk: one line, what was there is intact, and --resume ends as if nothing had been."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from console import TEXT, Command, command, llama_and_prose, same_result

from ecoflap.errors import StorageError
from ecoflap.support import files

pytestmark = pytest.mark.usefixtures("plain_page")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    return llama_and_prose(folder)


@pytest.fixture
def prune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, made: Path) -> Command:
    monkeypatch.chdir(made)
    run = command(capfd, monkeypatch)
    return lambda *more: run(
        "prune",
        "llama",
        "--calibration",
        "prose.txt",
        *TEXT,
        "--importance",
        "zeroth-order",
        "--criterion",
        "wanda",
        *more,
    )


@contextmanager
def _no_file_beyond(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "what"), [(500, "recipe.yaml"), (2500, "importance.jsonl"), (25_000, "blocks"), (60_000, "model")]
)
def test_files_may_not_grow(prune: Command, made: Path, size: int, what: str) -> None:
    if not (made / "whole").exists():
        prune("-o", "whole", "--quiet").well()
    output = f"run{size}"
    with _no_file_beyond(size):
        outcome = prune("-o", output, "--quiet")
    line = outcome.refused(what)
    assert "free some space" in line or "File too large" in line
    left = [path.name for path in (made / output).rglob("*")]
    assert not [name for name in left if name.endswith(files.PARTIAL)]
    prune("-o", output, "--resume", "--quiet").well()
    same_result(made / "whole", made / output)


@pytest.mark.parametrize("name", ["importance.json", "allocation.json", "metrics.json", "report.html"])
def test_no_space_left(prune: Command, made: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if not (made / "whole").exists():
        prune("-o", "whole", "--quiet").well()
    output = f"run-{name}"
    with monkeypatch.context() as patch:
        replace = os.replace

        def full(source: Any, target: Any) -> None:
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        patch.setattr(os, "replace", full)
        outcome = prune("-o", output, "--quiet")
    outcome.refused(f"can't write {output}/{name}", "No space left on device", "free some space", "--resume")
    assert not (made / output / name).exists()
    prune("-o", output, "--resume", "--quiet").well()
    same_result(made / "whole", made / output)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StorageError, match="No space left on device; free some space"):
                files.write_json(path, {"a": 2})
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    assert path.read_bytes() == before


def test_no_permission_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="choose another --output"), files.storage(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        files.write_text(tmp_path / "file" / "below.txt", "x")


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640

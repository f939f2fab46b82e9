"""A full disk is one line with a remedy, also where a library writes; a training stopped by one goes on."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ecoflap.errors import StorageError
from ecoflap.run.log import explained
from ecoflap.support.full_disk import storage_error

FULL = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "free some space"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "can't use /data/x: No space left on device"),
        (OSError(errno.EMFILE, "Too many open files", "/data/x"), "ulimit -n"),
        (RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"), "ulimit -n"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing"), "free some"),
        (Exception("No space left on device (os error 28)"), "free some space"),
    ],
)
def test_words_of_libraries(error: Exception, words: str) -> None:
    assert words in str(storage_error(error))
    outer = ValueError("a checkpoint can't be written")
    outer.__cause__ = error
    assert words in str(storage_error(outer))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ (28)"), ValueError("x (os error 28)"), OSError(errno.ENOENT, "gone", "x")]
)
def test_other_errors(error: Exception) -> None:
    assert storage_error(error) is None


def test_a_run_that_a_library_can_not_write_says_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ecoflap")
    with pytest.raises(StorageError, match=r"free some space; then the same command with --resume goes on"):  # noqa: SIM117
        with explained(tmp_path, tmp_path / "log.txt"):
            raise FULL
    assert "stopped: a file can't be written" in caplog.text

"""Out of memory is one line with a remedy, whoever raised it and whatever our own code made of it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import torch
from safetensors import SafetensorError

from ecoflap.errors import CalibrationError, EcoflapError, OutOfMemory
from ecoflap.support.memory import memory_error


def _raised(job: Callable[[], object]) -> BaseException:
    try:
        job()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _wrapped() -> None:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        raise CalibrationError("the model can't take the calibration data") from error


@pytest.mark.parametrize(
    "job", [lambda: torch.empty(2**60), lambda: bytearray(2**62), _wrapped], ids=["torch", "Python", "wrapped"]
)
def test_what_really_runs_out(job: Callable[[], object]) -> None:
    found = memory_error(_raised(job))
    assert isinstance(found, OutOfMemory)
    assert "--batch-size" in str(found)


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …"), "2.50 GiB"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 3221225472 bytes."), "3.0 GiB"),
        (RuntimeError("std::bad_alloc"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "/data/x.safetensors"), None),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), None),
    ],
)
def test_words_of_libraries(error: Exception, size: str | None) -> None:
    found = memory_error(error)
    assert found is not None
    assert (size in str(found)) if size else ("GiB" not in str(found))


@pytest.mark.parametrize("error", [ValueError("a column is called out of memory"), RuntimeError("shapes differ"),
                                   EcoflapError("cannot allocate 3 zeros"), OSError(errno.ENOSPC, "full")])  # fmt: skip
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert memory_error(error) is None


def test_a_chain_of_errors_that_leads_back_to_itself_ends() -> None:
    error = ValueError("slip")
    error.__cause__ = KeyError("inner")
    error.__cause__.__cause__ = error
    assert memory_error(error) is None
    error.__cause__ = MemoryError()
    assert memory_error(error) is not None

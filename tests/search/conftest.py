"""Fixtures of the search: a pico LLaMA on disk with prose, and the command that prunes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from console import TEXT, command, llama_and_prose


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    return llama_and_prose(folder)


@pytest.fixture
def prune(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    run = command(capfd, monkeypatch)
    job = ("prune", made / "llama", "--calibration", made / "prose.txt", *TEXT, "--criterion", "wanda")
    return lambda *more: run(*job, *more)

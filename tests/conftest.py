"""Settings of every test: offline, seeded, few threads, no deadlines, Ctrl-C heard; any folder can import ``picos``."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # makes the embedded model; not in the package

import hypothesis
import pytest

if TYPE_CHECKING:  # imported below where tests run: the process that only hands them out starts without torch
    from console import Command
    from fake_hub import FakeHub

MOST = 8  # workers; each holds torch, transformers and pico models, about 1 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, up to ``MOST``; none for named files and tests, which end before workers have started.

    Without workers, ``-s`` and ``--pdb`` work, too; ``-n 2`` asks for two in any case.
    """
    if not any(Path(argument).is_dir() for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST) if cores > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    torch.set_num_threads(1)
    # A shell starts background jobs with SIGINT ignored, and processes pass that on; tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # An example may take long where the machine does other work; a test that hangs is stopped by pytest-timeout.
    hypothesis.settings.register_profile("ecoflap", deadline=None)
    hypothesis.settings.load_profile("ecoflap")
    gc.disable()  # while tests are collected: what is imported stays


def pytest_collection_finish() -> None:
    """No collection of garbage looks through torch and transformers again: a tenth of the tests' time."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: at the end, workers would wait for the one that has the last of them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and each of the thousands of flushes waits for some milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same generator state, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def pageless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no ``report.html``, half of a pico run's time: for tests that look at anything else."""
    monkeypatch.setattr("ecoflap.report.page.write_report", lambda _: None)


@pytest.fixture
def plain_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write a ``report.html`` without plots."""
    from ecoflap.support.files import write_text

    monkeypatch.setattr("ecoflap.report.page.write_report", lambda run: write_text(run / "report.html", "a page"))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command line, called from a folder of the test's own."""
    from console import command

    monkeypatch.chdir(tmp_path)
    return command(capfd, monkeypatch)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of the test's own, with a token that it takes."""
    import huggingface_hub
    from fake_hub import TOKEN, serving

    with serving() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server

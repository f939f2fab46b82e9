"""Settings of every test: offline, seeded, few threads, no deadlines, Ctrl-C heard; any folder can import ``picos``."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # makes the embedded model; not in the package

import hypothesis
import pytest
import torch
from console import Command, command


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # A shell starts background jobs with SIGINT ignored, and processes pass that on; tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # An example may take long where the machine does other work; a test that hangs is stopped by pytest-timeout.
    hypothesis.settings.register_profile("ecoflap", deadline=None)
    hypothesis.settings.load_profile("ecoflap")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same generator state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def pageless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no ``report.html``, half of a pico run's time: for tests that look at anything else."""
    monkeypatch.setattr("ecoflap.run.pipeline.write_report", lambda _: None)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command line, called from a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return command(capfd, monkeypatch)

"""An interrupted search goes on with --resume and ends with the same files to the bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from console import TEXT, Command, same_result
from forks import ecoflap, forked
from searching import JOB

from ecoflap.search import sensitivity as measure
from ecoflap.search.divergence import Divergence
from ecoflap.search.rounds import Search

pytestmark = pytest.mark.usefixtures("pageless")


class _Crash(Exception):
    pass


def _failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = iter(range(10**9))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise _Crash("lightning")
        return function(*arguments, **named)

    return wrapped


@pytest.fixture(scope="module")
def whole(made: Path) -> Path:
    """An undisturbed run."""
    from ecoflap.run.pipeline import run_recipe
    from ecoflap.run.recipe import Recipe

    recipe = Recipe(
        model=str(made / "llama"), calibration=str(made / "prose.txt"), samples=6, batch_size=2, sequence_length=12,
        importance_samples=4, importance="sensitivity", criterion="wanda", search_options={"rounds": 2, "swaps": 3},
    )  # fmt: skip
    return run_recipe(recipe, made / "whole")


@pytest.mark.parametrize(("name", "at"), [("_round", 0), ("_round", 2), ("_pair", 2)])
def test_a_crash_in_the_search(
    prune: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Search, name, _failing(getattr(Search, name), at))
        outcome = prune(*JOB, "-o", "run")
    assert outcome.code == 1
    assert "lightning" in outcome.err
    state = tmp_path / "run" / "journal" / "search.json"
    assert state.exists() == ((name, at) != ("_round", 0))
    prune(*JOB, "-o", "run", "--resume").well()
    same_result(whole, tmp_path / "run")


def test_a_crash_in_the_curves(prune: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Divergence, "value", _failing(Divergence.value, 12))
        assert prune(*JOB, "-o", "run").code == 1
    journal = (tmp_path / "run" / "journal" / "importance.jsonl").read_bytes()
    assert len(journal.splitlines()) > 20
    counted = []
    value = Divergence.value
    with monkeypatch.context() as patch:
        patch.setattr(measure, "Divergence", type("D", (Divergence,), {
            "value": lambda self, index: (counted.append(index), value(self, index))[1],
        }))  # fmt: skip
        prune(*JOB, "-o", "run", "--resume").well()
    assert len(counted) == 1 + 3 * 3  # batch 1 alone; a block that was begun is measured at all levels again
    same_result(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_in_the_search(made: Path, whole: Path) -> None:
    job = ecoflap(
        made, "prune", made / "llama", "--calibration", made / "prose.txt", *TEXT, *JOB, "--criterion", "wanda",
        "-o", "killed", "--resume", "--quiet",
    )  # fmt: skip
    with forked(job) as process:
        process.wait_until((made / "killed" / "journal" / "search.json").exists)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with forked(job) as process:
        assert process.wait() == 0, process.printed()
    same_result(whole, made / "killed")

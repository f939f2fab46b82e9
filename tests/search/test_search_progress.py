"""What a search says while it works, and where it can be stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from searching import Journal, searched, subject, uneven

from ecoflap.search.options import SearchOptions
from ecoflap.search.pruned_model import PrunedModel
from ecoflap.search.search import Found


class _Watch:
    """Progress that keeps what it hears, and interrupts at the ``stop``-th word."""

    def __init__(self, stop: int | None = None) -> None:
        self.heard, self.steps, self.total, self._stop = list[str](), 0, 0, stop

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[_Watch]:
        self.total, self.steps = total, done
        yield self

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.steps += steps
        self.heard.append(detail)
        if len(self.heard) == self._stop:
            raise KeyboardInterrupt


def _search(watch: _Watch, journal: Journal, options: dict[str, Any]) -> Found:
    it = subject("llama")
    return searched(
        it, uneven(it.anatomy), criterion="wanda",
        shares={"sparsity": 0.5, "max_sparsity": 0.8}, options=SearchOptions(rounds=3, tolerance=0.0, **options),
        progress=watch, journal=journal,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"swaps": 3}, {"by": "probes"}, {"inputs": "both"}, {"inputs": "pruned"}])
def test_each_measurement_is_announced_and_may_be_the_last(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round may take minutes. What stops in the middle of one goes on with it, and ends with the same bits."""
    watch, before = _Watch(), list[int]()  # the words heard when a measurement began
    measure = PrunedModel.measure

    def noted(self: PrunedModel, zeros: Any, *, walking: bool) -> float:
        before.append(len(watch.heard))
        return measure(self, zeros, walking=walking)

    with monkeypatch.context() as patch:
        patch.setattr(PrunedModel, "measure", noted)
        whole = _search(watch, Journal(), options)
    assert watch.steps == watch.total
    assert len(before) > 6
    assert before[0] > 0
    assert before == sorted(set(before))  # a word of its own for each
    assert any("costs" in text for text in watch.heard)
    for index, text in enumerate(watch.heard):
        if text.startswith("layer 2") and "away" in text:
            journal = Journal()
            with pytest.raises(KeyboardInterrupt):
                _search(_Watch(stop=index + 1), journal, options)
            again = _search(_Watch(), Journal(journal.saved[-1]), options)
            assert again.allocation == whole.allocation
            assert again == whole
            break
    else:
        pytest.fail("no step in the second round of matrices")


def test_the_log_has_a_line_for_each_round(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ecoflap"):
        found = _search(_Watch(), Journal(), {})
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("search:")]
    assert lines[0] == f"search: begins with loss {found.record.losses[0]:.4g}"
    assert lines[1].startswith("search: block 1: loss")
    assert lines[-1].endswith(f"to {found.record.losses[-1]:.4g}")

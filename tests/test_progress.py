"""The time left is measured: how far it is off, for stages of the shapes that there are; and what is shown of it."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ecoflap.cli import terminal
from ecoflap.cli.pace import Pace
from ecoflap.cli.terminal import Bars, Lines
from ecoflap.support.progress import LOADING


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def factors(times: Sequence[float], names: Sequence[str] = (), done: int = 0) -> list[float]:
    """How far off the time left is, as a factor: after each step from a tenth of them to nine tenths of the time."""
    clock = Clock()
    pace = Pace(done + len(times), done, clock)
    begin, end, found = clock.now, clock.now + sum(times), []
    for number, seconds in enumerate(times):
        clock.now += seconds
        pace.advance(1, names[number] if names else "")
        left = pace.left()
        assert left is not None
        if 10 * (number + 1) >= len(times) and clock.now - begin <= 0.9 * (end - begin):
            found.append(max(left / (end - clock.now), (end - clock.now) / max(left, 1e-9)))
    assert pace.left() == 0.0
    return found


def scattered(count: int, spread: float = 0.2, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (1 + spread * (2 * torch.rand(count, generator=generator) - 1)).tolist()


def probes(costs: Sequence[float], rounds: int, per_block: int = 6) -> tuple[list[float], list[str]]:
    """Seconds and names of probes with replay: each runs the model from its block on, and a head."""
    suffix = [sum(costs[number:]) + 1.0 for number in range(len(costs))]
    once = [(seconds, f"{block}.{matrix}") for block, seconds in enumerate(suffix) for matrix in range(per_block)]
    return [seconds for seconds, _ in rounds * once], [name for _, name in rounds * once]


@pytest.mark.parametrize("heavy", [0.2, 1.0, 8.0])
def test_probes_that_replay(heavy: float) -> None:
    times, names = probes([heavy] * 12 + [1.0] * 24, rounds=10)
    noisy = [a * b for a, b in zip(times, scattered(len(times)), strict=True)]
    off = factors(noisy, names)
    assert max(off[1:]) < 1.05  # the first name has come round
    assert max(factors(noisy)[1:]) > 1.15  # what names are for


def test_probes_of_a_resumed_run_come_round_from_where_it_goes_on() -> None:
    times, names = probes([1.0] * 10, rounds=10)
    begun = factors(times[100:], names[100:], done=100)
    assert max(begun[60:]) == pytest.approx(1.0)
    assert len(begun) > 300


def test_a_slow_first_step() -> None:
    assert max(factors([8.0] + [1.0] * 99)) < 1.01


def test_bursts() -> None:
    """Gradients: nothing for the time of a backward pass, then all layers at once."""
    names = [str(layer) for layer in range(210)]
    for pause in (0.0, 1e-5):
        times = ([20.0] + [pause] * 209) * 16
        assert max(factors(times[: 210 * 16], names * 16)[210:]) < 1.01
    clock = Clock()
    pace = Pace(4 * 210, 0, clock)
    clock.now += 20.0
    for name in names:
        pace.advance(1, name)
    assert pace.left() == pytest.approx(60.0)  # after the first one, when no name has come round


@pytest.mark.parametrize("names", [[""], ["a", "b", "c"]])
def test_a_machine_that_becomes_slower(names: list[str]) -> None:
    clock = Clock()
    pace = Pace(900, 0, clock)
    for number in range(600):
        clock.now += 1.0 if number < 150 else 3.0
        pace.advance(1, names[number % len(names)])
    assert pace.left() == pytest.approx(900.0)


@given(st.lists(st.floats(0.5, 20.0), min_size=2, max_size=12), st.integers(2, 9), st.integers(0, 40), st.data())
def test_exact_once_the_names_came_round(costs: list[float], rounds: int, done: int, data: st.DataObject) -> None:
    """Whatever a round's steps take: where each round is like the one before, so is what is left."""
    clock, steps = Clock(), len(costs) * rounds
    clock.now = 0.0
    pace = Pace(done + steps, done, clock)
    assert pace.left() is None
    stop = data.draw(st.integers(len(costs) + 1, steps))
    for number in range(stop):
        clock.now += costs[number % len(costs)]
        pace.advance(1, str(number % len(costs)))
    left = sum(costs[number % len(costs)] for number in range(stop, steps))
    assert pace.left() == pytest.approx(left, abs=1e-6)
    clock.now += 0.25  # between two steps, it counts down
    assert pace.left() == pytest.approx(max(left - 0.25, 0.0), abs=1e-6)


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.lists(st.floats(1.0, 20.0), min_size=3, max_size=3))
def test_exact_for_kinds_that_have_come(order: list[int], seconds: list[float]) -> None:
    clock = Clock()
    pace = Pace(7 + len(order), 7, clock)
    pace.plan([str(kind) for kind in order])
    for number, kind in enumerate(order):
        clock.now += seconds[kind]
        pace.advance(1)
        left, seen = order[number + 1 :], order[: number + 1]
        mean = sum(seconds[kind] for kind in seen) / len(seen)
        expected = sum(seconds[kind] if kind in seen else mean for kind in left)
        assert pace.left() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("heavy", [0.2, 1.0, 8.0])
def test_a_walk_whose_pruning_takes_longer_than_its_runs(heavy: float) -> None:
    """Three towers; before the second and third, all blocks of those before are run at once."""
    clock, steps = Clock(), []
    for before, blocks in ((0, 6), (6, 4), (10, 5)):
        steps += [("run", before)] if before else []
        steps += [("prune", 1), ("run", 1)] * blocks
        steps.pop()
    kinds = [kind for kind, count in steps for _ in range(count)]
    times = [count * (heavy if kind == "prune" else 1.0) for kind, count in steps]
    pace = Pace(len(kinds), 0, clock)
    pace.plan(kinds)
    for number, (_, count) in enumerate(steps):
        clock.now += times[number]
        pace.advance(count)
        if number:
            assert pace.left() == pytest.approx(sum(times[number + 1 :]))


def test_several_steps_at_once_and_more_than_there_were() -> None:
    clock = Clock()
    pace = Pace(4, 0, clock)
    clock.now += 5.0
    pace.advance(2)
    assert pace.left() == pytest.approx(5.0)
    pace.advance(0, "no step")
    assert pace.left() == pytest.approx(5.0)
    pace.advance(7)
    assert pace.left() == 0.0


def test_time_left_counts_this_process_alone() -> None:
    clock, screen = Clock(), io.StringIO()
    progress = Lines(Console(file=screen, width=200), clock)
    with progress.stage("importance", total=100, done=50) as task:
        for _ in range(10):
            clock.now += 2
            task.advance(1, "a.weight")
        clock.now += 80
        task.advance(40)
    first, *_, last = screen.getvalue().splitlines()
    assert first.startswith("importance: 58/100, 16 s, 1 min 24 s left, ")
    assert first.endswith(" GB, a.weight")
    assert last.startswith("importance: 100/100, 1 min 40 s, ")


# --- lines -----------------------------------------------------------------------------------------------------------


@given(
    st.integers(30, 200), st.text("abc .,", min_size=1, max_size=30), st.integers(0, 999_999),
    st.floats(0, 1e7), st.none() | st.floats(0, 1e7), st.sampled_from(["", "model.layers.11.mlp.up_proj.weight"]),
)  # fmt: skip
def test_a_line_fits(width: int, name: str, total: int, elapsed: float, left: float | None, detail: str) -> None:
    told = terminal.line(width, name, total // 2, total, elapsed, left, "12.3 GB", detail)
    assert len(told) <= width
    if width >= 45:
        assert f"{total // 2}/{total}" in told
        assert told.count("left ") >= 1
        assert "12.3 GB" in told


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"),
     (3900, "1 h 05 min"), (3600 * 76 + 300, "76 h 05 min")],
)  # fmt: skip
def test_times_are_in_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert terminal.clock(seconds) == text


def test_the_last_line_is_written_once() -> None:
    clock, screen = Clock(), io.StringIO()
    with Lines(Console(file=screen, width=200), clock).stage("pruning", total=2) as task:
        for _ in range(2):
            clock.now += 20
            task.advance(1, "layers.0")
    assert [line.split(",")[0] for line in screen.getvalue().splitlines()] == ["pruning: 1/2", "pruning: 2/2"]


def test_loading_is_told_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step may take minutes; a model that is there at once is no news."""
    screen = io.StringIO()
    lines = Lines(Console(file=screen, width=200), Clock())
    with lines.stage(LOADING, total=1) as task:
        task.advance(1)
    assert screen.getvalue() == ""
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.01)
    told = threading.Event()
    monkeypatch.setattr(lines, "_print", lambda line: (screen.write(line), told.set()))
    with lines.stage(LOADING, total=3) as task:
        task.advance(0, "the model")
        assert told.wait(10)
    assert screen.getvalue().startswith("loading: 0/3, 0 s, ")
    assert "the model" in screen.getvalue()


def test_what_a_line_shows() -> None:
    line = terminal.line(80, "importance", 403, 1680, 3700, 5025, "1.2 GB", "language.block.0.q.weight")
    assert line == "importance   ━·······  403/1680 left 1 h 24 min 1.2 GB language.block.0.q.weight"
    assert terminal.line(40, "importance", 403, 1680, 3700, 5025, "1.2 GB", "x" * 40) == (
        "import…  403/1680 left 1 h 24 min 1.2 GB"
    )


def test_a_stage_in_a_stage_on_a_terminal() -> None:
    clock, screen = Clock(), io.StringIO()
    bars = Bars(Console(file=screen, force_terminal=True, width=80, legacy_windows=False), clock)
    with bars.stage("compare", 4) as cells:
        with bars.stage("pruning", 2) as blocks:
            clock.now += 30
            blocks.advance(1, "layers.0")
            bars._open.refresh()  # type: ignore[union-attr] - drawn ten times a second, or now
        cells.advance(1)
    text = screen.getvalue()
    assert "pruning      ━━━━···· 1/2 left 30 s " in text
    assert "layers.0" in text
    assert "compare      ━━······ 1/4 left 1 min 30 s " in text

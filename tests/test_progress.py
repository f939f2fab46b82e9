"""The time left is honest within a factor of 1.5 after a tenth of the work, for stages of the shapes that there are."""

from __future__ import annotations

import io
from collections.abc import Sequence

import picos
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ecoflap.cli import terminal
from ecoflap.cli.terminal import Bars, Lines, Pace
from ecoflap.importance.base import ProbeContext
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.zeroth_order import ZerothOrder
from ecoflap.model.anatomy import discover
from ecoflap.model.effort import suffix_efforts, walk_efforts


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def worst(times: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The largest factor between the time left as told and as it was, from a tenth of the work to nine tenths.

    Looked at when a step begins, half-way through it, and just before its end.
    """
    clock, found = Clock(), 1.0
    pace = Pace(len(times), 0, weights, clock)
    end, work = 1000.0 + sum(times), list(weights or [1.0] * len(times))
    for number, seconds in enumerate(times):
        begin = clock.now
        for part in (0.0, 0.5, 0.99) if seconds > 1e-3 else ():
            clock.now = begin + part * seconds
            left = pace.left()
            if 0.1 <= sum(work[:number]) / sum(work) <= 0.9:
                assert left is not None
                found = max(found, left / (end - clock.now), (end - clock.now) / max(left, 1e-9))
        clock.now = begin + seconds
        pace.advance(1)
    assert pace.left() == 0.0
    return found


def scattered(count: int, spread: float = 0.2, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (1 + spread * (2 * torch.rand(count, generator=generator) - 1)).tolist()


def probes(vision: int, language: int, heavy: float, per_block: int = 6, batches: int = 2) -> list[float]:
    """Seconds of the probes of a two-tower model with replay: each runs the suffix of the model, and a head."""
    costs = [heavy] * vision + [1.0] * language
    suffix = [sum(costs[number:]) + 1.0 for number in range(len(costs))]
    return [seconds for _ in range(batches) for seconds in suffix for _ in range(per_block)]


@pytest.mark.parametrize("heavy", [0.2, 1.0, 8.0])
def test_probes_that_replay(heavy: float) -> None:
    times = probes(12, 24, heavy)
    noisy = [a * b for a, b in zip(times, scattered(len(times)), strict=True)]
    assert worst(noisy, times) < 1.2
    assert worst(noisy) > 1.5  # what the weights are for: without them, the costly first probes stand for all


def test_slow_first_steps() -> None:
    times = probes(12, 24, 2.0)
    slow = [seconds * (8.0 if number < 5 else 1.0) for number, seconds in enumerate(times)]
    assert worst(slow, times) < 1.5
    assert worst([6.0] * 3 + [1.0] * 97) < 1.5


def test_bursts() -> None:
    """First-order measures: nothing for the time of a backward pass, then all layers at once."""
    assert worst(([20.0] + [0.0] * 209) * 16) < 1.01
    assert worst(([20.0] + [1e-5] * 209) * 16) < 1.01


def test_a_machine_that_becomes_slower() -> None:
    clock = Clock()
    pace = Pace(300, 0, None, clock)
    for number in range(200):
        clock.now += 1.0 if number < 100 else 3.0
        pace.advance(1)
    left = pace.left()
    assert left is not None
    assert left == pytest.approx(300.0)


@given(st.lists(st.floats(0.5, 20.0), min_size=30, max_size=120), st.integers(0, 40), st.floats(1e-3, 1e3))
def test_exact_where_the_weights_are(weights: list[float], done: int, unit: float) -> None:
    """Whatever the weights: where each step takes its weight, so does what is left, in any unit, resumed or not."""
    clock = Clock()
    clock.now = 0.0
    pace = Pace(done + len(weights), done, [unit * weight for weight in weights], clock)
    assert pace.left() is None
    for number, weight in enumerate(weights):
        clock.now += weight
        pace.advance(1)
        assert pace.left() == pytest.approx(sum(weights[number + 1 :]), abs=1e-6)


def test_weights_that_do_not_fit_are_not_taken() -> None:
    clock = Clock()
    pace = Pace(4, 0, [1.0, 2.0], clock)
    clock.now += 5.0
    pace.advance(2)
    assert pace.left() == pytest.approx(5.0)
    pace.advance(7)  # more than there were
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
    assert first.startswith("importance: 58/100, 16 s, 84 s left, ")
    assert first.endswith(" GB, a.weight")
    assert last.startswith("importance: 100/100, 100 s, ")


# --- weights of real stages ------------------------------------------------------------------------------------------


def _counted(model: torch.nn.Module) -> tuple[list[int], list[torch.utils.hooks.RemovableHandle]]:
    """A cell with the products of all linear and convolutional modules that run, counted by hooks of our own."""
    cell = [0]

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight = module.weight
        cell[0] += output.numel() * (weight.numel() // (module.out_channels if weight.ndim > 2 else weight.shape[0]))

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return cell, [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]


class _Spy:
    """Progress that notes the weights of a stage and what was counted between its steps."""

    def __init__(self, cell: list[int]) -> None:
        self.cell, self.weights, self.found = cell, list[float](), list[int]()

    def stage(self, name: str, total: int, done: int = 0, weights: Sequence[float] | None = None) -> _Spy:
        self.weights = list(weights or ())
        return self

    def __enter__(self) -> _Spy:
        self.cell[0] = 0
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.found.append(self.cell[0])
        self.cell[0] = 0


@pytest.mark.parametrize("probe", ["matrix", "block"])
@pytest.mark.parametrize("name", ["blip2_opt", "llama", "t5"])
def test_weights_of_probes_are_what_is_computed(name: str, probe: str) -> None:
    family = picos.FAMILIES[name]
    model = family.build().eval()
    batches = family.batches(4)
    anatomy = discover(model, batches[0])
    cell, hooks = _counted(model)
    spy = _Spy(cell)
    measure_importance(model, batches, anatomy=anatomy, progress=spy, probe=probe)
    for hook in hooks:
        hook.remove()
    assert len(spy.weights) == len(spy.found) == 2 * len(anatomy.layers)
    for weight, found in zip(spy.weights, spy.found, strict=True):
        assert found == pytest.approx(weight, rel=0.05)


def test_efforts_leave_out_what_is_done() -> None:
    family = picos.FAMILIES["llama"]
    model = family.build().eval()
    batch = family.batches(2)[0]
    anatomy = discover(model, batch)
    first = anatomy.layers[0].name
    plain = ProbeContext(model, anatomy, [batch, batch], lambda m, b: m(**b).loss, 0)
    begun = ProbeContext(model, anatomy, [batch, batch], lambda m, b: m(**b).loss, 0, frozenset({(first, 0, 0)}))
    everything, rest = ZerothOrder().efforts(plain), ZerothOrder().efforts(begun)
    assert len(rest) == len(everything) - 1
    whole = sum(anatomy.products.values())
    assert rest[0] == everything[1] + whole
    assert rest[1:] == everything[2:]
    without_replay = ZerothOrder(replay=False).efforts(plain)
    assert without_replay[1] == 2 * whole
    after = suffix_efforts(anatomy)
    names = list(anatomy.replayable)
    assert sorted(names, key=after.__getitem__, reverse=True) == names
    blind = discover(model)
    assert set(suffix_efforts(blind).values()) == {1.0}
    assert len(walk_efforts(blind, blind.blocks, 4, gram=True)) == len(blind.blocks)


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


def test_what_a_line_shows() -> None:
    line = terminal.line(80, "importance", 403, 1680, 3700, 5025, "1.2 GB", "language.block.0.q.weight")
    assert (
        line == "importance   ━······· 403/1680 left 1:23:45 1.2 GB …language.block.0.q.weight"[:80] or len(line) <= 80
    )
    assert terminal.line(40, "importance", 403, 1680, 3700, 5025, "1.2 GB", "x" * 40) == (
        "importance  403/1680 left 1:23:45 1.2 GB"
    )
    assert terminal.clock(5) == "0:05"
    assert terminal.clock(3600 * 76 + 300) == "3d 04:05"


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
    assert "pruning      ━━━━···· 1/2 left 0:30 " in text
    assert "layers.0" in text
    assert "compare      ━━······ 1/4 left 1:30 " in text

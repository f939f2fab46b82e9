"""Which importance ``auto`` takes, what a run records of it, and the forecast of stage 1."""

from __future__ import annotations

import logging
import re
import signal
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from console import TEXT, Command, llama_and_prose, same_result
from picos import FAMILIES
from torch import nn

import ecoflap
from ecoflap import measure_importance
from ecoflap.cli.signals import Stops
from ecoflap.data.objectives import default_objective
from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.importance import zeroth_order
from ecoflap.importance.auto import choose
from ecoflap.importance.forecast import Forecast, hours_and_minutes
from ecoflap.importance.registry import named
from ecoflap.importance.scores import Estimate
from ecoflap.model.fingerprint import fingerprint
from ecoflap.run.recipe import Recipe
from ecoflap.support.progress import Silent


class _Backward(torch.autograd.Function):
    """The identity, whose backward pass gives what it is told."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, outcome: str) -> torch.Tensor:
        ctx.outcome = outcome
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.outcome == "nan":
            return gradient * float("nan"), None
        raise {"runtime": RuntimeError, "missing": NotImplementedError}[ctx.outcome]("no derivative of it\nmore lines")


def _behind(model: nn.Module, block: str, outcome: str) -> Any:
    """A hook after which gradients of ``block`` are cut off, NaN, or an error."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        change = (lambda x: x.detach()) if outcome == "cut" else (lambda x: _Backward.apply(x, outcome))
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return model.get_submodule(block).register_forward_hook(hook)


def _choice(name: str, outcome: str = "", dtype: torch.dtype = torch.float32) -> Any:
    family = FAMILIES[name]
    model, (batch, *_) = family.build().to(dtype), family.batches(2, 2)
    before = fingerprint(model)
    anatomy = ecoflap.inspect(model, batch)
    hook = _behind(model, anatomy.towers[0].blocks[0].name, outcome) if outcome else None
    choice = choose(model, anatomy, batch, default_objective(model))
    if hook is not None:
        hook.remove()
    assert fingerprint(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert "\n" not in str(choice)
    return choice


@pytest.mark.parametrize("name", ["llama", "blip2_t5", "clip"])
def test_gradients_where_they_can_be_taken(name: str) -> None:
    assert _choice(name).name == _choice(name, dtype=torch.bfloat16).name == "gradient-norm"


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("cut", "no graph|though it runs"),
        ("nan", "is not finite"),
        ("runtime", "no derivative"),
        ("missing", "no derivative"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "blip2_t5"])
def test_the_zeroth_order_where_they_can_not(name: str, outcome: str, words: str) -> None:
    choice = _choice(name, outcome)
    assert choice.name == "zeroth-order"
    assert re.search(words, str(choice))


def test_a_loss_that_is_not_finite_is_no_reason_to_choose() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    anatomy = ecoflap.inspect(model, batches[0])
    with pytest.raises(NonFiniteLoss):
        choose(model, anatomy, batches[0], lambda m, batch: m(**batch).loss * float("nan"))


def test_python_records_what_was_measured() -> None:
    family = FAMILIES["llama"]
    batches = family.batches(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure_importance(family.build(), batches)
    assert found.method == "gradient-norm"
    assert found.scores == measure_importance(family.build(), batches, "gradient-norm").scores
    model = family.build()
    _behind(model, "model.layers.0", "cut")
    with pytest.warns(UserWarning, match=r"importance: zeroth-order \(auto: gradients of LlamaForCausalLM can't be"):
        result = ecoflap.prune(model, batches, 0.5)
    assert result.importance is not None
    assert result.importance.method == "zeroth-order"


@pytest.mark.parametrize(
    ("importance", "options", "expected"),
    [
        ("auto", {}, "auto"),
        ("auto", {"recompute": False}, "gradient-norm"),
        ("auto", {"draws": 2}, "zeroth-order"),
        ("auto", {"probe": "block", "epsilon": 0.01}, "zeroth-order"),
        ("owl", {"multiple": 5}, "owl"),
    ],
)
def test_options_say_whose_they_are(importance: str, options: dict[str, Any], expected: str) -> None:
    assert named(importance, options) == expected
    assert Recipe(importance=importance, importance_options=options).resolved().importance == expected


def test_options_of_nothing_are_refused() -> None:
    family = FAMILIES["llama"]
    with pytest.raises(InvalidOption, match="no option 'eps'"):
        measure_importance(family.build(), family.batches(2, 2), eps=1)


def test_a_run_records_the_choice_and_goes_on_with_it(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_and_prose(tmp_path)
    job = ["prune", tmp_path / "llama", "--calibration", tmp_path / "prose.txt", *TEXT]
    told = run(*job, "-o", "chosen").well().err
    assert told.count("importance: gradient-norm (auto: LlamaForCausalLM can be differentiated;") == 1
    assert yaml.safe_load((tmp_path / "chosen" / "recipe.yaml").read_text())["importance"] == "gradient-norm"
    run(*job, "-o", "named", "--importance", "gradient-norm").well()
    same_result(tmp_path / "named", tmp_path / "chosen")
    (tmp_path / "chosen" / "report.html").unlink()
    run(*job, "-o", "chosen", "--resume").well()
    same_result(tmp_path / "named", tmp_path / "chosen")
    assert not (tmp_path / "chosen" / "journal").exists()

    # A run of a time when the zeroth order was the default.
    run(*job, "-o", "whole", "--importance", "zeroth-order").well()
    with monkeypatch.context() as patch:
        patch.setattr(zeroth_order.ZerothOrder, "projection", lambda *_: 1 / 0)
        assert run(*job, "-o", "older", "--importance", "zeroth-order").code == 1
    run(*job, "-o", "older", "--resume").well()
    same_result(tmp_path / "whole", tmp_path / "older")


class _Steps:
    def __init__(self) -> None:
        self.done = 0

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.done += steps


def _forecast(name: str, steps: int, seconds: list[float], **options: Any) -> int:
    """Advance a forecast's task by one step at each of these moments; how many steps its own task was told of."""
    now = iter([0.0, *seconds])
    inner = _Steps()
    task = Forecast(inner, name, steps, clock=lambda: next(now), **options)
    for _ in seconds:
        task.advance()
    return inner.done


def test_a_long_stage_names_a_faster_way() -> None:
    with pytest.warns(UserWarning, match="zeroth-order takes up to 43 h 24 min; --importance gradient-norm") as told:
        assert _forecast("zeroth-order", 504, [310.0, 620.0, 930.0]) == 3
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"about 1 h 0 min; fewer --importance-samples"):
        _forecast("gradient-norm", 30, [0.1, 359.0, 361.0], together=3)  # nothing is known before three are done


def test_a_long_batch_is_forecast_within_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ecoflap"):
        # 2 of 4 layers after 100 s: a quarter of the time for the forward, and half of the rest, of 3 batches
        _forecast("gradient-norm", 12, [1.0, 50.0, 100.0, 130.0], together=4, lead=0.25)
        _forecast("gradient-norm", 12, [1.0, 10.0, 20.0], together=4, lead=0.25)  # too soon within a batch
    seconds = 50.0 * 3 / (0.25 + 0.75 * 0.5)
    assert [record.message for record in caplog.records] == [
        f"importance gradient-norm takes about {hours_and_minutes(seconds)}"
    ]


def test_gradients_are_counted_layer_by_layer_within_a_batch() -> None:
    family = FAMILIES["llama"]
    model, batches, seen = family.build(), family.batches(4, 2), list[tuple[int, str]]()

    class Task:
        def advance(self, steps: int = 1, detail: str = "") -> None:
            seen.append((steps, detail))

    class Watching:
        def stage(self, name: str, total: int, done: int = 0) -> Any:
            assert total == len(names) * len(batches)
            return nullcontext(Task())

    names = [layer.name for layer in ecoflap.inspect(model).layers]
    backwards = []
    handle = model.model.layers[0].register_full_backward_hook(lambda *_: backwards.append(len(seen)))
    ecoflap.measure_importance(model, batches, "gradient-norm", progress=Watching())
    handle.remove()
    assert [steps for steps, _ in seen] == [1] * (len(names) * len(batches))
    assert sorted(detail for _, detail in seen) == sorted(names * len(batches))
    assert 0 < backwards[0] <= len(names)  # later blocks were told before the first block's gradients were there


def test_a_signal_within_a_batch_lets_it_end_and_keeps_all_of_it() -> None:
    family, stops, kept = FAMILIES["llama"], Stops(), list[Estimate]()
    model, batches = family.build(), family.batches(4, 2)
    stops.quiet = True

    class Journal:
        def estimates(self) -> tuple[Estimate, ...]:
            return tuple(kept)

        def append(self, estimate: Estimate) -> None:
            kept.append(estimate)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if stops._open and not kept:  # in the stage, not while the layers are found
            stops.handle(signal.SIGTERM)
        return default_objective(model)(model, batch)

    options: Any = {"loss": loss, "progress": stops.progress(Silent()), "journal": Journal()}
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        ecoflap.measure_importance(model, batches, "gradient-norm", **options)
    layers = [layer.name for layer in ecoflap.inspect(model).layers]
    assert sorted(estimate.layer for estimate in kept) == sorted(layers)
    assert {estimate.batch for estimate in kept} == {0}
    found = ecoflap.measure_importance(model, batches, "gradient-norm", journal=Journal())
    assert found.scores == ecoflap.measure_importance(model, batches, "gradient-norm").scores


def test_a_short_stage_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "ecoflap"):
        warnings.simplefilter("error")
        _forecast("zeroth-order", 100, [1.0, 2.0, 9.0, 12.0])
        _forecast("zeroth-order", 4, [1.0, 2.0, 3.0, 9.0])  # over before it could be told
    assert [record.message for record in caplog.records] == ["importance zeroth-order takes up to 5 min"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.0, "59 s"), (60.0, "1 min"), (3599.0, "1 h 0 min"), (157868.0, "43 h 51 min")],
)
def test_hours_and_minutes(seconds: float, text: str) -> None:
    assert hours_and_minutes(seconds) == text

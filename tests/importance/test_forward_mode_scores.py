"""Forward-mode scores against autograd and the zeroth order, and what happens where an operator has no forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from journals import Journal
from picos import FAMILIES
from torch import Tensor, nn

from ecoflap import measure_importance
from ecoflap.data.model_facts import to_device
from ecoflap.errors import InvalidOption, UnknownName
from ecoflap.importance.projections import noise
from ecoflap.model.patching import cache_disabled


def measured(model: nn.Module, batches: list[Any], name: str = "forward-mode", **options: Any) -> dict[Any, float]:
    journal = Journal()
    measure_importance(model, batches, name, journal=journal, **options)
    return journal.values()


def distance(a: dict[Any, float], b: dict[Any, float]) -> float:
    assert a.keys() == b.keys()
    x, y = (torch.tensor([values[key] for key in a], dtype=torch.float64) for values in (a, b))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_estimate_is_the_projection_of_the_gradient_on_its_noise(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build().eval(), family.batches(2 if "blip2" in name else 4, 2, padding=True)
    found = measured(model, batches, seed=3)
    layers = sorted({layer for layer, _, _ in found})
    exact = {}
    for index, batch in enumerate(batches):
        with cache_disabled(model):
            loss = model(**batch).loss
        weights = [model.get_parameter(layer) for layer in layers]
        for layer, gradient in zip(layers, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            shape = model.get_parameter(layer).shape
            z = noise(shape, torch.device("cpu"), seed=3, layer=layer, batch=index, draw=0)
            exact[layer, index, 0] = 0.0 if gradient is None else float((gradient * z).sum())
    assert distance(found, exact) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "clip"])
def test_it_is_the_limit_of_the_zeroth_order(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval().double()
    batches = [to_device(batch, model) for batch in family.batches(2, 2)]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        out = m(**batch)  # in double, so that rounding does not hide the order of the error
        if "labels" not in batch:
            return nn.functional.cross_entropy(out.logits_per_image, torch.arange(2))
        return nn.functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    with cache_disabled(model):
        exact = measured(model, batches, loss=loss)
        errors = [distance(measured(model, batches, "zeroth-order", loss=loss, epsilon=e), exact) for e in (4e-4, 1e-4)]
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 8  # a central difference: a quarter of the step, a sixteenth of the error


@pytest.mark.parametrize("name", ["t5", "clip", "gpt2"])
@pytest.mark.parametrize("probe", ["matrix", "block"])
def test_replay_changes_no_bit(name: str, probe: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(2, 2, padding=True)
    found = measured(model, batches, probe=probe, draws=2)
    assert any(found.values())
    assert found == measured(model, batches, probe=probe, draws=2, replay=False)


def test_a_block_probe_is_the_sum_of_its_matrices() -> None:
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(2, 2)
    single = measured(model, batches)
    together = measured(model, batches, probe="block")
    for block in sorted({layer.rpartition(".layer.")[0] for layer, _, _ in single}):
        sums = [sum(v for (layer, _, _), v in values.items() if layer.startswith(block + "."))
                for values in (single, together)]  # fmt: skip
        assert sums[1] == pytest.approx(sums[0], rel=1e-4, abs=1e-6)


def test_scores_survive_an_interruption_and_the_model_is_left_alone() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build().to(torch.bfloat16), family.batches(4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    for precision in ("fp32", "native"):
        whole = measure_importance(model, batches, "forward-mode", precision=precision)
        journal = Journal(stop_after=17)
        with pytest.raises(KeyboardInterrupt):
            measure_importance(model, batches, "forward-mode", precision=precision, journal=journal)
        journal.stop_after = None
        again = measure_importance(model, batches, "forward-mode", precision=precision, journal=journal)
        assert again.to_json() == whole.to_json()
        assert len(journal.kept) == len(journal.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.backends.cuda.flash_sdp_enabled()


def test_native_half_precision_does_not_drown() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build().to(torch.bfloat16), family.batches(4, 2)
    exact = measured(model, batches)
    native = measured(model, batches, precision="native")
    assert native != exact
    x, y = (torch.tensor(list(values.values())) for values in (exact, native))
    assert float(torch.corrcoef(torch.stack([x, y]))[0, 1]) > 0.99


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.5


@torch.library.custom_op("ecoflap_tests::silent", mutates_args=())
def silent(x: Tensor) -> Tensor:
    return x * 1.5


class Blocks(nn.Module):
    """Two towers, one after the other; ``middle`` comes before the last block of the first one."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vision_blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.text_blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.middle = middle
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.vision_blocks):
            x = block(self.middle(x) if index == 2 else x)
        for block in self.text_blocks:
            x = block(x)
        return x.square().mean()


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(batch["x"])
    return loss


def _towers(middle: Callable[[Tensor], Tensor]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    return Blocks(middle), [{"x": torch.randn(4, 6, generator=generator)} for _ in range(2)]


@pytest.mark.parametrize(("middle", "word"), [(WithoutForwardMode.apply, "jvp"), (silent, "drops the derivative")])
def test_towers_before_such_an_operator_are_measured_by_the_zeroth_order(
    middle: Callable[[Tensor], Tensor], word: str
) -> None:
    model, batches = _towers(middle)
    with pytest.warns(UserWarning, match="forward mode does not work for vision_blocks") as told:
        found = measure_importance(model, batches, "forward-mode", loss=_loss)
    assert len(told) == 1
    assert word in str(told[0].message)
    fallback = found.settings["fallback"]
    assert list(fallback["towers"]) == ["vision_blocks"]
    assert word in fallback["towers"]["vision_blocks"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zeroth = measure_importance(model, batches, "zeroth-order", loss=_loss)
        plain = measure_importance(_towers(lambda x: x * 1.5)[0], batches, "forward-mode", loss=_loss)
    assert "fallback" not in plain.settings
    for name, score in found.scores.items():
        assert score == (zeroth if name.startswith("vision") else plain).scores[name]


def test_an_operator_that_the_trial_did_not_meet_is_told() -> None:
    model, batches = _towers(lambda x: x if x.shape[0] == 4 else WithoutForwardMode.apply(x))
    batches[1] = {"x": torch.ones(3, 6)}
    with pytest.raises(InvalidOption, match=r"derivative of vision_blocks\.0.*--importance zeroth-order"):
        measure_importance(model, batches, "forward-mode", loss=_loss)


def test_bad_options() -> None:
    model, batches = _towers(lambda x: x)
    for options, error, words in (
        ({"precision": "fp16"}, UnknownName, "fp32, native"),
        ({"draws": 0}, InvalidOption, "draws"),
        ({"probe": "row"}, UnknownName, "matrix, block"),
        ({"epsilon": 1e-3}, InvalidOption, "no option 'epsilon'"),
    ):
        with pytest.raises(error, match=words):
            measure_importance(model, batches, "forward-mode", loss=_loss, **options)  # type: ignore[arg-type]

"""Zeroth-order scores against autograd, and what they may not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from journals import Journal
from picos import FAMILIES
from torch import nn

from ecoflap import measure_importance
from ecoflap.data.model_facts import to_device
from ecoflap.data.objectives import default_objective
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss, UnknownName
from ecoflap.importance.projections import noise, noise_key
from ecoflap.model.anatomy import discover
from ecoflap.model.patching import cache_disabled


def gradients(model: nn.Module, batch: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """By autograd, independent of the library."""
    with cache_disabled(model):
        loss = default_objective(model)(model, batch)
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names], allow_unused=True)))  # noqa: B905


def bits(model: nn.Module) -> dict[str, bytes]:
    return {n: t.detach().contiguous().view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_estimate_is_the_projection_of_the_gradient_on_its_noise(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval().double()  # so that rounding does not hide a wrong factor
    batches = [to_device(batch, model) for batch in family.batches(4, 2, padding=True)]
    journal = Journal()
    with cache_disabled(model):
        measure_importance(
            model, batches, "zeroth-order", epsilon=3e-4, seed=3, journal=journal, loss=lambda m, batch: m(**batch).loss
        )
    layers = {estimate.layer for estimate in journal.kept}
    exact, found = [], []
    for index, batch in enumerate(batches):
        by_name = gradients(model, batch, sorted(layers))
        for estimate in journal.kept:
            if estimate.batch == index:
                gradient = by_name[estimate.layer]
                weight = model.get_parameter(estimate.layer)
                z = noise(weight.shape, weight.device, seed=3, layer=estimate.layer, batch=index, draw=0)
                exact.append(0.0 if gradient is None else float((gradient * z).sum()))
                found.append(estimate.value)
    assert len(found) == 2 * len(layers)
    a, b = torch.tensor(exact, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)
    assert float((a - b).norm() / a.norm()) < 0.01  # transformers takes the loss itself in fp32


def test_the_score_estimates_the_gradient_norm_within_its_standard_error() -> None:
    """E|g| = √(2/π)·‖∇L‖: 150 draws, and the standard error that is reported is the true one."""
    family = FAMILIES["llama"]
    model, (batch,) = family.build().eval(), family.batches(2, 2)
    anatomy = discover(model, batch, exclude=["model.layers.1", "model.layers.2", "*.self_attn.*"])
    found = measure_importance(model, [batch], "zeroth-order", draws=150, anatomy=anatomy)
    exact = gradients(model, batch, [layer.name for layer in anatomy.layers])
    for name, score in found.scores.items():
        expected = math.sqrt(2 / math.pi) * float(exact[name].norm())
        assert score.n == 150
        assert abs(score.score - expected) < 4 * score.stderr
        assert score.stderr == pytest.approx(math.sqrt(math.pi / 2 - 1) * expected / math.sqrt(150), rel=0.25)


@pytest.mark.parametrize("name", ["blip2_t5", "clip", "gpt2"])
def test_a_block_probe_projects_the_gradient_of_the_whole_block(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval().double()
    (batch,) = [to_device(batch, model) for batch in family.batches(2, 2)]
    journal = Journal()
    with cache_disabled(model):
        found = measure_importance(model, [batch], "zeroth-order", epsilon=3e-4, probe="block", journal=journal)
    values = {estimate.layer: estimate.value for estimate in journal.kept}
    assert list(values) == [layer.name for layer in found.layers]
    exact = gradients(model, batch, list(values))
    blocks: dict[str, list[Any]] = {}
    for layer in found.layers:
        blocks.setdefault(layer.block, []).append(layer)
    for layers in blocks.values():
        expected = 0.0
        for layer in layers:
            gradient = exact[layer.name]
            if gradient is not None:
                z = noise(gradient.shape, gradient.device, seed=0, layer=layer.name, batch=0, draw=0)
                expected += float((gradient * z).sum())
        assert sum(values[layer.name] for layer in layers) == pytest.approx(expected, rel=0.02, abs=1e-4)
        parts = {round(values[layer.name] / layer.numel, 12) for layer in layers}
        assert len(parts) == 1  # shared out by the number of weights


def test_block_probes_go_on_in_the_middle_of_a_block() -> None:
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(4, 2)
    whole = measure_importance(model, batches, "zeroth-order", probe="block").scores
    journal = Journal(stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        measure_importance(model, batches, "zeroth-order", probe="block", journal=journal)
    journal.stop_after = None
    assert measure_importance(model, batches, "zeroth-order", probe="block", journal=journal).scores == whole
    assert len(journal.kept) == len({(e.layer, e.batch, e.draw) for e in journal.kept})


@pytest.mark.parametrize("name", ["blip2_t5", "llava", "gpt2"])
def test_replay_changes_no_bit(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(2, 2, padding=True)
    with_replay, without = Journal(), Journal()
    measure_importance(model, batches, "zeroth-order", journal=with_replay)
    measure_importance(model, batches, "zeroth-order", replay=False, journal=without)
    assert with_replay.kept == without.kept


def test_weights_the_loss_never_sees_score_zero() -> None:
    family = FAMILIES["llava"]  # features are taken one layer before the last vision block
    scores = measure_importance(family.build(), family.batches(2, 2), "zeroth-order").scores
    last = [score for name, score in scores.items() if name.startswith("model.vision_tower.encoder.layers.2.")]
    assert last
    assert {score.score for score in last} == {0.0}
    assert sum(score.score == 0 for score in scores.values()) == len(last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_bit_identical_afterwards_also_after_an_interrupt(dtype: torch.dtype) -> None:
    family = FAMILIES["t5"]
    model, batches = family.build().to(dtype).train(), family.batches(4, 2)
    before, parameters = bits(model), [id(p) for p in model.parameters()]
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    measure_importance(model, batches, "zeroth-order")
    assert bits(model) == before
    with pytest.raises(KeyboardInterrupt):
        measure_importance(model, batches, "zeroth-order", journal=Journal(stop_after=5))
    assert bits(model) == before
    assert [id(p) for p in model.parameters()] == parameters
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == kinds
    assert model.training
    assert model.config.use_cache
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_half_precision_model_is_measured_in_fp32() -> None:
    family = FAMILIES["llama"]
    batches = family.batches(4, 2)
    half = family.build().to(torch.bfloat16)
    full = family.build().to(torch.bfloat16).float()
    assert (
        measure_importance(half, batches, "zeroth-order").scores
        == measure_importance(full, batches, "zeroth-order").scores
    )


def test_scores_do_not_depend_on_order_interruption_or_company() -> None:
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(6, 2)
    whole = measure_importance(model, batches, "zeroth-order", seed=1).scores
    journal = Journal(stop_after=17)
    with pytest.raises(KeyboardInterrupt):
        measure_importance(model, batches, "zeroth-order", seed=1, journal=journal)
    journal.stop_after = None
    assert measure_importance(model, batches, "zeroth-order", seed=1, journal=journal).scores == whole
    shuffled = Journal(list(reversed(journal.kept)))
    assert measure_importance(model, batches, "zeroth-order", seed=1, journal=shuffled).scores == whole
    alone = discover(model, batches[0], exclude=["encoder.block"], run=default_objective(model))
    partial = measure_importance(model, batches, "zeroth-order", seed=1, anatomy=alone).scores
    assert partial
    assert partial == {name: whole[name] for name in partial}


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = measure_importance(model, batches, "zeroth-order", seed=0).scores
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert measure_importance(model, batches, "zeroth-order", seed=0).scores == first
    other = measure_importance(model, batches, "zeroth-order", seed=1).scores
    assert all(other[name].score != first[name].score for name in first)


def test_noise_is_keyed_by_all_four() -> None:
    keys = {noise_key(s, layer, b, d) for s in range(3) for layer in ("a", "b") for b in range(3) for d in range(3)}
    assert len(keys) == 54
    z = noise(torch.Size([200, 200]), torch.device("cpu"), seed=0, layer="a", batch=0, draw=0)
    other = noise(torch.Size([200, 200]), torch.device("cpu"), seed=0, layer="a", batch=1, draw=0)
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.std()) - 1) < 0.02
    assert abs(float((z * other).mean())) < 0.02


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(6, 2)

    def loss(m: nn.Module, batch: Any) -> torch.Tensor:
        value = m(**batch).loss
        return value * float("nan") if batch["input_ids"] is batches[1]["input_ids"] else value

    for importance in ("zeroth-order", "first-order"):
        with pytest.raises(NonFiniteLoss, match="calibration batch 1 is nan"):
            measure_importance(model, batches, importance, loss=loss)


def test_samples_takes_the_first_whole_batches() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(6, 2)
    found = measure_importance(model, batches, "zeroth-order", samples=3)
    assert found.settings["batches"] == 2
    assert found.settings["samples"] == 4
    assert found.scores == measure_importance(model, batches[:2], "zeroth-order").scores
    with pytest.warns(UserWarning, match="all 6 calibration samples are used: there are fewer than 7"):
        assert measure_importance(model, batches, "zeroth-order", samples=7).settings["samples"] == 6
    with pytest.raises(CalibrationError, match="no calibration batches"):
        measure_importance(model, [], "zeroth-order")


def test_bad_options() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    with pytest.raises(UnknownName, match="did you mean 'zeroth-order'"):
        measure_importance(model, batches, "zeroth_order")
    with pytest.raises(InvalidOption, match="no option 'eps'"):
        measure_importance(model, batches, "zeroth-order", eps=1)
    with pytest.raises(InvalidOption, match="epsilon"):
        measure_importance(model, batches, "zeroth-order", epsilon=0.0)
    with pytest.raises(InvalidOption, match="draws"):
        measure_importance(model, batches, "zeroth-order", draws=0)

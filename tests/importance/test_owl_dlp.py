"""OWL and DLP against their formulas, computed from the inputs that a plain forward shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families.moe import mixture_of_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import Journal
from picos import FAMILIES
from torch import Tensor, nn

from ecoflap import api
from ecoflap.data.objectives import default_objective
from ecoflap.errors import InvalidOption, NonFiniteLoss, UnknownName
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.outliers import lower_median, outlier_share, relative_importance
from ecoflap.importance.registry import IMPORTANCES, own_rule
from ecoflap.importance.scores import Importance
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled

NAMES = ("llama", "gpt2", "t5", "llava", "clip")


def made(name: str) -> tuple[nn.Module, list[Any], Anatomy]:
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(6, 2)
    return model, batches, discover(model, batches[0], run=default_objective(model))


def products(model: nn.Module, batches: list[Any], anatomy: Anatomy) -> dict[str, np.ndarray]:
    """|W|·‖X‖ of every layer, fp64, flat."""
    squares: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def taken(_: nn.Module, args: Any) -> None:
            x = args[0].detach().double()
            squares[name] = squares.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(0)

        return taken

    hooks = [model.get_submodule(layer.module).register_forward_pre_hook(hook(layer.name)) for layer in anatomy.layers]
    with torch.no_grad(), cache_disabled(model):
        for batch in batches:
            model(**batch)
    for one in hooks:
        one.remove()
    found = {}
    for layer in anatomy.layers:
        if layer.name in squares:
            weight = model.get_parameter(layer.name).detach().double()
            weight = weight.t() if layer.transposed else weight
            found[layer.name] = (weight.abs() * squares[layer.name].sqrt()).flatten().numpy()
    return found


def pools(anatomy: Anatomy, scope: str) -> dict[str, list[str]]:
    if scope == "layer":
        return {layer.name: [layer.name] for layer in anatomy.layers}
    return {block.name: [layer.name for layer in block.layers] for block in anatomy.blocks if block.layers}


@pytest.mark.parametrize("scope", ["block", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_owl_is_the_share_of_outliers(name: str, scope: str) -> None:
    model, batches, anatomy = made(name)
    found = measure_importance(model, batches, "owl", scope=scope, multiple=2.0, anatomy=anatomy)
    values = products(model, batches, anatomy)
    for members in pools(anatomy, scope).values():
        whole = np.concatenate([values[member] for member in members])
        expected = np.mean(whole > 2.0 * whole.mean())
        for member in members:
            # An entry at the very threshold may fall on either side of it in fp32.
            assert found.scores[member].score == pytest.approx(expected, abs=1.5 / len(whole))
            assert found.scores[member].stderr == 0
    assert len({round(score.score, 9) for score in found.scores.values()}) > 1
    assert found.settings["rule"] == "linear"
    assert found.settings["spread"] == 0.08


@pytest.mark.parametrize("scope", ["block", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_dlp_is_one_less_the_share_of_the_median(name: str, scope: str) -> None:
    model, batches, anatomy = made(name)
    found = measure_importance(model, batches, "dlp", scope=scope, anatomy=anatomy)
    values = products(model, batches, anatomy)
    medians = {}
    for pool, members in pools(anatomy, scope).items():
        whole = np.sort(np.concatenate([values[member] for member in members]))
        medians[pool] = whole[(len(whole) - 1) // 2]
    for pool, members in pools(anatomy, scope).items():
        for member in members:
            assert found.scores[member].score == pytest.approx(1 - medians[pool] / sum(medians.values()), rel=1e-5)
    highest = max(medians, key=lambda pool: medians[pool])
    least = min(found.scores.values(), key=lambda score: score.score)
    assert found.scores[pools(anatomy, scope)[highest][0]] == least
    assert (found.settings["rule"], found.settings["spread"]) == ("linear", 0.15)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60), st.floats(0.1, 9))
def test_reductions_of_any_numbers(numbers: list[float], multiple: float) -> None:
    assert lower_median(torch.tensor(numbers)) == sorted(numbers)[(len(numbers) - 1) // 2]
    x = torch.tensor(numbers)
    threshold = multiple * x.mean()
    assert outlier_share(x, multiple) == sum(bool(v > threshold) for v in x) / len(numbers)


def test_all_medians_zero() -> None:
    assert relative_importance({"a": 0.0, "b": 0.0}) == {"a": 1, "b": 1}


class FirstTwo(nn.Module):
    """A router that likes the first two experts best, whatever it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(len(x), 4)


@pytest.mark.parametrize("importance", ["owl", "dlp"])
def test_layers_that_no_token_reached(importance: str) -> None:
    model: Any = mixture_of_modules()
    model.model.layers[1].mlp.gate = FirstTwo()
    batches = FAMILIES["llama"].batches(4, 2)
    anatomy = discover(model, batches[0], run=default_objective(model))
    alone = measure_importance(model, batches, importance, scope="layer", anatomy=anatomy, **options(importance)).scores
    unreached = [name for name in alone if ".experts.2." in name or ".experts.3." in name]
    reached = [alone[name].score for name in alone if name not in unreached]
    assert unreached
    assert {alone[name].score for name in unreached} == {min(reached)}
    # In a block's pool they are not counted, and have its number.
    whole = measure_importance(model, batches, importance, anatomy=anatomy, **options(importance)).scores
    values = products(model, batches, anatomy)
    pool = [values[layer.name] for layer in anatomy.blocks[1].layers if layer.name in values]
    if importance == "owl":
        together = np.concatenate(pool)
        expected = np.mean(together > 2 * together.mean())
        assert whole[unreached[0]].score == pytest.approx(expected, abs=1.5 / len(together))
    assert len({whole[layer.name].score for layer in anatomy.blocks[1].layers}) == 1


def options(importance: str) -> dict[str, Any]:
    return {"multiple": 2.0} if importance == "owl" else {}


@pytest.mark.parametrize("importance", ["owl", "dlp", "alphapruning"])
def test_interrupted_anywhere_it_ends_the_same(importance: str) -> None:
    model, batches, anatomy = made("t5")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    journal = Journal()
    whole = measure_importance(model, batches, importance, anatomy=anatomy, journal=journal)
    assert len(journal.kept) == len(anatomy.layers)
    for kept in (0, 3, len(journal.kept)):
        again = measure_importance(model, batches, importance, anatomy=anatomy, journal=Journal(journal.kept[:kept]))
        assert again.scores == whole.scores
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert Importance.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("importance", ["owl", "dlp"])
def test_samples_that_are_not_used_do_not_matter(importance: str) -> None:
    model, batches, anatomy = made("llama")
    few = measure_importance(model, batches, importance, samples=2, anatomy=anatomy, **options(importance))
    assert (
        few.scores == measure_importance(model, batches[:1], importance, anatomy=anatomy, **options(importance)).scores
    )
    assert few.scores != measure_importance(model, batches, importance, anatomy=anatomy, **options(importance)).scores


@pytest.mark.parametrize("importance", ["owl", "dlp", "alphapruning"])
def test_a_damaged_weight_is_named(importance: str) -> None:
    model, batches, anatomy = made("llama")
    last = anatomy.layers[-1].name
    with torch.no_grad():
        model.get_parameter(last)[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=last.replace(".", r"\.")):
        measure_importance(model, batches, importance, anatomy=anatomy)


@pytest.mark.parametrize(
    ("importance", "bad", "error", "message"),
    [
        ("owl", {"multiple": 0.0}, InvalidOption, "multiple must be above 0"),
        ("owl", {"multiple": float("nan")}, InvalidOption, "multiple"),
        ("owl", {"scope": "blok"}, UnknownName, "did you mean 'block'"),
        ("owl", {"spread": 1.5}, InvalidOption, "spread must be from 0 to 1, not 1.5"),
        ("dlp", {"spread": -0.1}, InvalidOption, "spread"),
        ("dlp", {"multiple": 5}, InvalidOption, "no option 'multiple'"),
        ("alphapruning", {"spread": 1.0}, InvalidOption, "below 1"),
        ("alphapruning", {"tail": "haif"}, UnknownName, "did you mean 'half'"),
    ],
)
def test_bad_options(importance: str, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    model, batches, _ = made("llama")
    with pytest.raises(error, match=message):
        measure_importance(model, batches, importance, **bad)


@pytest.mark.parametrize("importance", ["owl", "dlp", "alphapruning"])
@pytest.mark.parametrize("name", ["llama", "blip2_t5"])
def test_prune_by_each_measure(importance: str, name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(4, 2)
    chosen = {"multiple": 2.0} if importance == "owl" else {}
    result = api.prune(
        model, batches, 0.6, importance=importance, importance_options=chosen, importance_samples=4, criterion="wanda"
    )
    assert result.importance is not None
    total = result.allocation.total_weights
    assert result.allocation.zeros == round(0.6 * total)
    assert result.sparsity == pytest.approx(result.allocation.zeros / total)
    assert result.allocation.rule == own_rule(importance)
    assert result.allocation.aggregate == "layer-mean"
    scores: dict[str, list[float]] = {}
    shares: dict[str, list[int]] = {}
    for row in result.allocation.layers:
        scores.setdefault(row.block, []).append(result.importance.scores[row.name].score)
        zeros, weights = shares.get(row.block, (0, 0))
        shares[row.block] = [zeros + row.zeros, weights + row.weights]
    means = {block: sum(values) / len(values) for block, values in scores.items()}
    sparsity = {block: zeros / weights for block, (zeros, weights) in shares.items()}
    best, worst = max(means, key=lambda b: means[b]), min(means, key=lambda b: means[b])
    assert sparsity[best] < sparsity[worst]  # higher keeps more
    spread = result.importance.settings["spread"]
    if own_rule(importance) == "linear":
        assert sparsity[worst] - sparsity[best] == pytest.approx(2 * spread, abs=2e-3)
    else:
        assert sparsity[worst] / sparsity[best] == pytest.approx((1 + spread) / (1 - spread), rel=5e-3)


def test_rule_and_spread_of_the_measure_give_way_to_the_users() -> None:
    model, batches, anatomy = made("llama")
    scores = measure_importance(model, batches, "dlp", anatomy=anatomy)
    own = api.allocate(scores, 0.5)
    assert (own.rule, own.max_sparsity) == ("linear", 1.0)
    assert own == api.allocate(scores, 0.5, rule="linear", spread=0.15)
    narrow = api.allocate(scores, 0.5, spread=0.01)
    assert max(row.sparsity for row in narrow.layers) < 0.52 < max(row.sparsity for row in own.layers)
    capped = api.allocate(scores, 0.5, max_sparsity=0.52)
    assert max(row.zeros - 0.52 * row.weights for row in capped.layers) < 1
    proportional = api.allocate(scores, 0.5, rule="proportional")
    assert (proportional.rule, proportional.max_sparsity, proportional.aggregate) == ("proportional", 0.6, "sum")
    gradients = measure_importance(model, batches, "gradient-norm", anatomy=anatomy)
    assert gradients.settings["rule"] == "proportional"
    linear = api.allocate(gradients, 0.5, rule="linear", spread=0.1)
    assert (linear.rule, linear.aggregate) == ("linear", "layer-mean")


@pytest.mark.parametrize("importance", ["owl", "dlp"])
def test_scores_of_blocks_do_not_go_with_single_layers(importance: str) -> None:
    model, batches, anatomy = made("llama")
    with pytest.raises(InvalidOption, match=r"scope=block measures whole blocks.* or scope=layer"):
        api.prune(model, batches, importance=importance, granularity="layer")
    scores = measure_importance(model, batches, importance, anatomy=anatomy)
    with pytest.raises(InvalidOption, match="scope=block"):
        api.allocate(scores, 0.5, granularity="layer")
    single = measure_importance(model, batches, importance, scope="layer", anatomy=anatomy, **options(importance))
    assert len({row.zeros / row.weights for row in api.allocate(single, 0.5, granularity="layer").layers}) > 2


def test_the_table_of_rules_agrees_with_the_measures() -> None:
    for name in IMPORTANCES:
        assert own_rule(name) == getattr(IMPORTANCES.get(name), "rule", "proportional"), name

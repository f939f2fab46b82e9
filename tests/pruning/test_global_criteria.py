"""Global magnitude and iterative gradient pruning against brute force, alone and through the Python interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from picos import FAMILIES
from torch import Tensor, nn

import ecoflap
from ecoflap.allocation import Allocation
from ecoflap.api import prune_to
from ecoflap.errors import InfeasibleAllocation, InvalidOption, NonFiniteLoss, UnknownName
from ecoflap.model.patching import cache_disabled
from ecoflap.pruning.criteria import GlobalCriterion, make_criterion
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.pruning.registry import CRITERIA, is_global, reads_data
from ecoflap.pruning.whole_model import IterativeGradient

GLOBAL = ["global-magnitude", "iterative-gradient"]


def lowest_of_all(scores: dict[str, Tensor], count: int, zero: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Masks of the ``count`` lowest of all scores, by sorting them; what is zero already comes first."""
    rows = [
        (not bool(z), float(s), i, j)
        for i, (name, score) in enumerate(scores.items())
        for j, (s, z) in enumerate(zip(score.flatten(), zero(name).flatten(), strict=True))
    ]
    masks = {name: torch.zeros(score.numel(), dtype=torch.bool) for name, score in scores.items()}
    names = list(scores)
    for _, _, i, j in sorted(rows)[:count]:
        masks[names[i]][j] = True
    return {name: mask.view_as(scores[name]) for name, mask in masks.items()}


def pools_of(anatomy: Any, budget: str, own: dict[str, float], sparsity: float) -> list[tuple[list[Any], float]]:
    if budget == "tower":
        return [(list(t.layers), own.get(t.name, own.get(t.modality, sparsity))) for t in anatomy.towers]
    pools: dict[str, tuple[list[Any], float]] = {}
    for layer in anatomy.layers:
        key = layer.tower if layer.tower in own else layer.modality if layer.modality in own else ""
        pools.setdefault(key, ([], own.get(key, sparsity)))[0].append(layer)
    return list(pools.values())


def weights_of(model: nn.Module, anatomy: Any) -> dict[str, Tensor]:
    return {layer.name: model.get_parameter(layer.name).detach().clone() for layer in anatomy.layers}


@pytest.mark.parametrize(
    ("budget", "own"), [("global", {}), ("tower", {}), ("global", {"vision": 0.2}), ("tower", {"language": 0.7})]
)
@pytest.mark.parametrize("name", ["llava", "blip2_t5", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_magnitude_is_sorting_all_weights(
    name: str, budget: str, own: dict[str, float], dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    if name == "gpt2":
        own = {key: value for key, value in own.items() if key != "vision"}
    model = family.build().to(dtype)
    anatomy = ecoflap.inspect(model, family.batches(2, 2)[0] if dtype == torch.float32 else None)
    before = weights_of(model, anatomy)
    result = ecoflap.prune(
        model, family.batches(2, 2) if dtype == torch.float32 else [], 0.43, criterion="global-magnitude",
        budget=budget, tower_sparsity=own,
    )  # fmt: skip
    total = 0
    for layers, sparsity in pools_of(anatomy, budget, own, 0.43):
        after = {layer.name: model.get_parameter(layer.name) for layer in layers}
        count = sum(int((after[layer.name] == 0).sum()) for layer in layers)
        assert abs(count - sparsity * sum(layer.numel for layer in layers)) <= 1
        total += count
        cut = lowest_of_all({n: before[n].float().abs() for n in after}, count, lambda n: before[n] == 0)
        for layer in layers:
            assert torch.equal(after[layer.name], before[layer.name].masked_fill(cut[layer.name], 0))
            assert result.allocation[layer.name].zeros == int(cut[layer.name].sum())
            assert result.allocation[layer.name].achieved == int(cut[layer.name].sum()) / layer.numel
    if not own:
        assert total == anatomy.prunable_parameters - round(0.57 * anatomy.prunable_parameters)
    assert len({row.sparsity for row in result.allocation.layers}) > 1
    assert result.importance is not None
    assert result.importance.method == "uniform"


def test_the_sign_does_not_matter() -> None:
    family = FAMILIES["llama"]
    masks = []
    for sign in (1, -1):
        model = family.build()
        for parameter in model.parameters():
            parameter.data.mul_(sign)
        result = ecoflap.prune(model, [], 0.5, criterion="global-magnitude")
        masks.append([model.get_parameter(row.name) == 0 for row in result.allocation.layers])
    assert all(map(torch.equal, *masks))


def plain_iterative_gradient(
    model: nn.Module, batches: list[Any], pools: list[tuple[list[Any], int]], rounds: int
) -> None:
    """The method in plain loops: autograd scores, sorting, zeros."""
    for number in range(1, rounds + 1):
        names = [layer.name for layers, _ in pools for layer in layers]
        sums = {name: torch.zeros(model.get_parameter(name).shape) for name in names}
        for batch in batches:
            loss = model(**batch).loss
            found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.abs()
        for layers, zeros in pools:
            size = sum(layer.numel for layer in layers)
            count = zeros if number == rounds else round(size * (zeros / size) ** (rounds / number))
            scores = {x.name: model.get_parameter(x.name).detach().abs() * sums[x.name] for x in layers}
            cut = lowest_of_all(scores, count, lambda name: model.get_parameter(name) == 0)
            for layer in layers:
                model.get_parameter(layer.name).data[cut[layer.name]] = 0


@pytest.mark.parametrize("name", ["llava", "t5", "gpt2"])
@pytest.mark.parametrize(("budget", "rounds"), [("global", 3), ("tower", 2), ("global", 1)])
def test_iterative_gradient_is_the_plain_loop(name: str, budget: str, rounds: int) -> None:
    family = FAMILIES[name]
    batches = family.batches(4, 2, padding=True)
    model, plain = family.build().eval(), family.build().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = ecoflap.prune(
        model, batches, 0.6, criterion="iterative-gradient", criterion_options={"rounds": rounds}, budget=budget
    )
    pools = [
        (layers, sum(result.allocation[layer.name].zeros for layer in layers))
        for layers, _ in pools_of(result.anatomy, budget, {}, 0.6)
    ]
    assert result.sparsity == pytest.approx(0.6, abs=1e-4)
    with cache_disabled(plain):
        plain_iterative_gradient(plain, batches, pools, rounds)
    different = sum(
        int(((model.get_parameter(x.name) == 0) != (plain.get_parameter(x.name) == 0)).sum())
        for x in result.anatomy.layers
    )
    assert different <= 4  # sums in another order round the scores at the limit differently
    prunable = {layer.name for layer in result.anatomy.layers}
    for key, value in model.state_dict().items():
        kept = value != 0 if key in prunable else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[key][kept])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_rounds_are_nested_and_their_targets_are_those_of_the_paper() -> None:
    assert IterativeGradient().targets(500, 1000) == (125, round(1000 * 0.5**1.5), 500)
    assert IterativeGradient(rounds=1).targets(7, 9) == (7,)
    assert IterativeGradient(rounds=4).targets(0, 9) == (0, 0, 0, 0)
    assert IterativeGradient(rounds=2).targets(9, 9) == (9, 9)
    for zeros in range(31):
        targets = IterativeGradient(rounds=5).targets(zeros, 30)
        assert list(targets) == sorted(targets)
        assert targets[-1] == zeros


class Rounds:
    """A journal that stops the walk once it holds ``stop_after`` rounds."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.kept: dict[str, PrunedBlock] = {}
        self.stop_after = stop_after

    def load(self, block: str) -> PrunedBlock | None:
        return self.kept.get(block)

    def save(self, block: str, pruned: PrunedBlock) -> None:
        if self.stop_after is not None and len(self.kept) >= self.stop_after:
            raise KeyboardInterrupt
        self.kept[block] = PrunedBlock({name: mask.clone() for name, mask in pruned.weights.items()})


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_walk_ends_alike(done: int) -> None:
    family = FAMILIES["t5"]
    batches = family.batches(4, 2)

    def run(journal: Rounds | None) -> tuple[Allocation, dict[str, Tensor]]:
        model = family.build().to(torch.bfloat16)
        anatomy = ecoflap.inspect(model, batches[0])
        uniform = ecoflap.allocate(ecoflap.Importance.uniform(anatomy.layers), 0.5, max_sparsity=1.0)
        found, unreached = prune_to(
            model, anatomy, uniform, batches, criterion="iterative-gradient", budget="tower", journal=journal
        )
        assert unreached == ()
        return found, model.state_dict()

    allocation, weights = run(None)
    journal = Rounds(stop_after=done)
    with pytest.raises(KeyboardInterrupt):
        run(journal)
    assert len(journal.kept) == done
    journal.stop_after = None
    for _ in range(2):  # the second time there is nothing left to do
        again, resumed = run(journal)
        assert again == allocation
        assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    zeros = [
        {name: set(mask.nonzero().flatten().tolist()) for name, mask in kept.weights.items()}
        for kept in journal.kept.values()
    ]
    assert len(zeros) == 3


def test_offloading_changes_nothing() -> None:
    family = FAMILIES["llama"]
    models = [family.build(), family.build()]
    for model, offload in zip(models, (False, True), strict=True):
        ecoflap.prune(model, family.batches(4, 2), criterion="iterative-gradient", offload_activations=offload)
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))


@pytest.mark.parametrize("criterion", GLOBAL)
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything(criterion: str, sparsity: float) -> None:
    family = FAMILIES["llama"]
    model = family.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = ecoflap.prune(model, family.batches(2, 2), sparsity, criterion=criterion)
    assert {row.achieved for row in result.allocation.layers} == {sparsity}
    if not sparsity:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", GLOBAL)
def test_weights_that_are_zero_already_come_first(criterion: str) -> None:
    family = FAMILIES["llama"]
    model = family.build()
    last = model.model.layers[2].mlp.down_proj.weight.data
    last[:20] = 0
    ecoflap.prune(model, family.batches(2, 2), 0.3, criterion=criterion)
    size = sum(layer.numel for layer in ecoflap.inspect(model).layers)
    zeros = sum(int((model.get_parameter(layer.name) == 0).sum()) for layer in ecoflap.inspect(model).layers)
    assert zeros == size - round(0.7 * size)
    assert int(torch.count_nonzero(last[:20])) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "zeroth-order"}, ["decides every layer's sparsity itself", "importance zeroth-order"]),
        ({"pattern": "2:4"}, ["pattern 2:4", "leave it out or give unstructured"]),
        ({"compare": "row"}, ["compare row"]),
        ({"max_sparsity": 0.6}, ["max_sparsity 0.6"]),
        ({"min_sparsity": 0.1}, ["min_sparsity 0.1"]),
        ({"granularity": "layer"}, ["granularity layer"]),
        ({"search": True}, ["search True"]),
        ({"importance_options": {"draws": 2}}, ["importance_options"]),
        ({"criterion_options": {"damping": 0.1}}, ["has no option 'damping'"]),
    ],
)
@pytest.mark.parametrize("criterion", GLOBAL)
def test_options_without_effect_are_refused(criterion: str, options: dict[str, Any], words: list[str]) -> None:
    family = FAMILIES["llama"]
    model = family.build()
    with pytest.raises(InvalidOption) as refused:
        ecoflap.prune(model, family.batches(2, 2), criterion=criterion, **options)
    assert all(word in str(refused.value) for word in words), refused.value
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), family.build().parameters(), strict=True))


def test_given_scores_and_allocations_are_refused() -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    scores = ecoflap.measure_importance(model, batches, "gradient-norm")
    with pytest.raises(InvalidOption, match="importance gradient-norm could change nothing"):
        ecoflap.prune(model, batches, criterion="global-magnitude", importance=scores)
    with pytest.raises(InvalidOption, match="allocation that is given"):
        ecoflap.prune(model, batches, criterion="global-magnitude", allocation=ecoflap.allocate(scores, 0.5))
    with pytest.raises(UnknownName, match="unknown tower"):
        ecoflap.prune(model, batches, criterion="global-magnitude", tower_sparsity={"vison": 0.5})
    with pytest.raises(InfeasibleAllocation):
        ecoflap.prune(model, batches, 1.0, importance="uniform", max_sparsity=0.6)


def test_broken_weights_and_losses_are_named() -> None:
    family = FAMILIES["llama"]
    for value in (torch.nan, torch.inf):
        model = family.build()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        with pytest.raises(NonFiniteLoss, match=r"layers\.1\.mlp\.up_proj"):
            ecoflap.prune(model, [], criterion="global-magnitude")

    def loss(m: nn.Module, batch: Any) -> Tensor:
        out: Tensor = m(**batch).loss
        return out if torch.equal(batch["input_ids"], batches[0]["input_ids"]) else out * torch.nan

    model, batches = family.build(), family.batches(4, 2)
    with pytest.raises(NonFiniteLoss, match="calibration batch 1"):
        ecoflap.prune(model, batches, criterion="iterative-gradient", loss=loss)
    with pytest.raises(InvalidOption, match=r"has no graph.*'global-magnitude' needs none"):
        ecoflap.prune(model, batches, criterion="iterative-gradient", loss=lambda m, batch: m(**batch).loss.detach())


def test_the_table_and_the_options() -> None:
    for name in CRITERIA:
        criterion = make_criterion(name)
        assert criterion.name == name
        assert isinstance(criterion, GlobalCriterion) == is_global(name)
        if not isinstance(criterion, GlobalCriterion):
            assert reads_data(name) == (criterion.statistics != "none")
    assert [name for name in CRITERIA if is_global(name)] == GLOBAL
    assert reads_data("iterative-gradient")
    assert not reads_data("global-magnitude")
    with pytest.raises(InvalidOption, match="rounds must be at least 1"):
        make_criterion("iterative-gradient", {"rounds": 0})
    with pytest.raises(InvalidOption, match="criterion 'wanda' has no option 'name': its options are order"):
        make_criterion("wanda", {"name": "x"})
    with pytest.raises(InvalidOption, match="its options are damping, slab"):
        make_criterion("sparsegpt", {"dampening": 0.1})
    assert vars(make_criterion("sparsegpt", {"damping": 0.1, "slab": 64})) == {
        "damping": 0.1,
        "slab": 64,
        "order": "block",
    }

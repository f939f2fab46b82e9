"""Recovery: new weights for zeros that are given, against direct least squares and plain forwards of two models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from picos import FAMILIES
from pruning.test_sequential import masks_for
from pruning.test_walk import anatomy_of, inputs_of
from torch import Tensor, nn

import ecoflap
from ecoflap.allocation.patterns import Unstructured
from ecoflap.data.objectives import default_objective
from ecoflap.errors import InvalidOption
from ecoflap.model.parts import Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.pruning.recovery import FitLayer, RecoveryOptions
from ecoflap.statistics.pair import InputPair

LLAMA_BATCHES = FAMILIES["llama"].batches(6, 2, padding=True)


def least_squares(weight: Tensor, x: Tensor, seen: Tensor, mask: Tensor, damping: float) -> Tensor:
    """Row by row: the best weights on the mask, of the damped problem with columns of length one, in float64."""
    weight, x, seen = weight.double(), x.double(), seen.double()
    scale = seen.norm(dim=0)
    best = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero().squeeze(1)
        columns = torch.cat([seen[:, kept] / scale[kept], damping**0.5 * torch.eye(len(scale))[:, kept].double()])
        target = torch.cat([x @ weight[row], damping**0.5 * weight[row] * scale])
        best[row, kept] = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution.squeeze(1) / scale[kept]
    return best


@pytest.mark.parametrize("pattern", ["random", "2:4", "a row without weights"])
def test_weights_are_those_of_least_squares_row_by_row(pattern: str) -> None:
    weight, x = torch.randn(5, 12), torch.randn(40, 12) @ torch.randn(12, 12)
    seen = x + 0.3 * torch.randn(40, 12)
    mask = torch.rand(5, 12) > 0.5
    if pattern == "2:4":
        mask = (torch.rand(15, 4).argsort(dim=1) < 2).view(5, 12)
    elif pattern == "a row without weights":
        mask[2] = False
    pair = InputPair(12)
    pair.update(seen, dense=x)
    fit = FitLayer(weight * mask, RecoveryOptions(steps=60, damping=0.01))
    found = fit(weight, pair, int((~mask).sum()), Unstructured("matrix"))
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.weight == 0, ~mask)
    torch.testing.assert_close(found.weight.double(), least_squares(weight, x, seen, mask, 0.01), rtol=2e-3, atol=2e-4)


def test_few_steps_are_better_than_none_and_more_are_better_still() -> None:
    weight, x = torch.randn(8, 16), torch.randn(60, 16) @ torch.randn(16, 16)
    seen, mask = x + 0.1 * torch.randn(60, 16), torch.rand(8, 16) > 0.6
    pair = InputPair(16)
    pair.update(seen, dense=x)
    fits = [FitLayer(weight * mask, RecoveryOptions(steps)) for steps in (1, 5, 20)]
    weights = [weight * mask, *(fit(weight, pair, 0, Unstructured()).weight for fit in fits)]
    errors = [float((x @ weight.T - seen @ w.T).square().sum()) for w in weights]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_so_do_dead_inputs_and_layers_that_nothing_reached(dtype: torch.dtype) -> None:
    weight, x = torch.randn(4, 8).to(dtype), torch.randn(30, 8)
    x[:, 3] = 0
    pruned = weight.clone()
    pruned[:, ::2] = 0
    pair = InputPair(8)
    pair.update(x, dense=x)
    found = FitLayer(pruned, RecoveryOptions())(weight, pair, 0, Unstructured())
    assert found.weight.dtype == dtype
    assert torch.equal(found.weight[:, 3], pruned[:, 3])
    assert not torch.equal(found.weight, pruned)
    assert torch.equal(found.weight == 0, pruned == 0)
    for nothing in (None, InputPair(8)):
        assert torch.equal(FitLayer(pruned, RecoveryOptions())(weight, nothing, 0, Unstructured()).weight, pruned)


def by_hand(dense: nn.Module, given: nn.Module, batches: list[Any], dampened: float) -> nn.Module:
    """Group after group of layers with one input: plain forwards of both models, then least squares."""
    model, loss = copy.deepcopy(dense), default_objective(dense)
    anatomy = anatomy_of(dense, batches[0])
    for block in anatomy.blocks:
        first = inputs_of(model, block.layers, lambda: loss(model, batches[0]))
        groups: dict[int, list[Layer]] = {}
        for name, x in first.items():
            groups.setdefault(id(x), []).append(anatomy.layer(name))
        for group in groups.values():
            rows: list[tuple[Tensor, Tensor]] = []
            for batch in batches:
                keep = masks_for(group[0], anatomy, batch, False)
                both = [
                    inputs_of(m, group, lambda m=m, batch=batch: loss(m, batch))[group[0].name] for m in (dense, model)
                ]
                rows.append(tuple(x[keep] if keep is not None else x.flatten(0, -2) for x in both))
            x, seen = (torch.cat(part) for part in zip(*rows, strict=True))
            for layer in group:
                mask = given.get_parameter(layer.name) != 0
                best = least_squares(dense.get_parameter(layer.name), x, seen, mask, dampened)
                model.get_parameter(layer.name).copy_(best)
    return model


def test_a_model_that_somebody_else_pruned_is_recovered_as_by_plain_forwards() -> None:
    dense = FAMILIES["llama"].build().eval()
    given = copy.deepcopy(dense)
    ecoflap.prune(given, LLAMA_BATCHES, 0.5, criterion="magnitude", importance="uniform")
    model = copy.deepcopy(given)
    result = ecoflap.recover(model, dense, LLAMA_BATCHES, options={"steps": 80})
    with torch.no_grad(), cache_disabled(dense):
        slow = by_hand(dense, given, LLAMA_BATCHES, 0.01)
    for layer in result.anatomy.layers:
        got = model.get_parameter(layer.name)
        assert torch.equal(got == 0, given.get_parameter(layer.name) == 0)
        torch.testing.assert_close(got, slow.get_parameter(layer.name), rtol=2e-2, atol=2e-3, msg=layer.name)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    with torch.no_grad():
        outputs = [m(**LLAMA_BATCHES[0]).logits for m in (dense, given, model)]
    assert (outputs[2] - outputs[0]).square().mean() < (outputs[1] - outputs[0]).square().mean()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude", "global-magnitude"])
def test_prune_with_recover_is_prune_and_then_recover(criterion: str) -> None:
    dense = FAMILIES["gpt2"].build().eval()
    batches = FAMILIES["gpt2"].batches(4, 2)
    importance = None if criterion == "global-magnitude" else "uniform"
    once, twice = copy.deepcopy(dense), copy.deepcopy(dense)
    found = ecoflap.prune(once, batches, 0.6, importance=importance, criterion=criterion, recover=True)
    plain = ecoflap.prune(twice, batches, 0.6, importance=importance, criterion=criterion)
    ecoflap.recover(twice, dense, batches)
    for name, weight in once.named_parameters():
        assert torch.equal(weight, twice.get_parameter(name)), name
    assert found.sparsity == plain.sparsity == pytest.approx(0.6, abs=1e-4)


def test_towers_and_layers_without_zeros_keep_every_bit() -> None:
    dense = FAMILIES["blip2_t5"].build().eval()
    batches = FAMILIES["blip2_t5"].batches(4, 2)
    model = copy.deepcopy(dense)
    ecoflap.prune(model, batches, 0.5, criterion="wanda", importance="uniform", exclude=["vision_model"])
    ecoflap.recover(model, dense, batches)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, dense.get_parameter(name))}
    assert changed
    assert not any(name.startswith("vision_model") for name in changed)


def test_what_does_not_fit_is_told_before_anything_changes() -> None:
    dense = FAMILIES["llama"].build().eval()
    pruned = copy.deepcopy(dense)
    ecoflap.prune(pruned, LLAMA_BATCHES, 0.5, criterion="magnitude", importance="uniform")
    with pytest.raises(InvalidOption, match="no more zeros in its layers than the dense model"):
        ecoflap.recover(copy.deepcopy(dense), dense, LLAMA_BATCHES)
    with pytest.raises(InvalidOption, match="no more zeros"):
        ecoflap.recover(dense, pruned, LLAMA_BATCHES)
    with pytest.raises(InvalidOption, match=r"was not pruned from the dense model: .* missing"):
        ecoflap.recover(pruned, FAMILIES["gpt2"].build(), LLAMA_BATCHES)
    trained = copy.deepcopy(pruned)
    trained.lm_head.weight.data += 1
    with pytest.raises(InvalidOption, match="differs from the dense model outside of the layers"):
        ecoflap.recover(trained, dense, LLAMA_BATCHES)
    for options, said in [({"steps": 0}, "steps must be"), ({"damping": 0.0}, "damping must be"), ({"x": 1}, "x")]:
        with pytest.raises(InvalidOption, match=said):
            ecoflap.recover(pruned, dense, LLAMA_BATCHES, options=options)
    with pytest.raises(InvalidOption, match="recover_options say how"):
        ecoflap.prune(dense, LLAMA_BATCHES, recover_options={"steps": 3})

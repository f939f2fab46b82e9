"""UPop's masks, ranking and schedule against direct formulas and brute force."""

from __future__ import annotations

import itertools
import math

import picos
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.errors import InfeasibleAllocation
from ecoflap.model.anatomy import discover
from ecoflap.model.channels import ChannelGroup, Member, channel_groups
from ecoflap.model.parts import Layer
from ecoflap.pruning.upop import ChannelMasks, choose, ratio, standardised, zero_channels


def _group(name: str, kind, width: int, inputs: int) -> ChannelGroup:
    layer = Layer(f"{name}.weight", name, "block", "tower", "text", (inputs, width))
    return ChannelGroup(name, kind, "block", "tower", "text", width, (Member(layer, False, torch.arange(width)),))


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 0.99))
def test_ratio_grows_to_the_sparsity(a, b, sparsity):
    steps = max(a, b)
    assert ratio(0, steps, sparsity) == 0
    assert ratio(steps, steps, sparsity) == pytest.approx(sparsity)
    # The half-angle form of the schedule: p · sin(π t / 2T).
    assert ratio(min(a, b), steps, sparsity) == pytest.approx(sparsity * math.sin(math.pi * min(a, b) / (2 * steps)))


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_choice_is_the_best_of_all_subsets(seed, share):
    """Among the sets that are closed under the ranking, the one that leaves nearest to the number of weights."""
    generator = torch.Generator().manual_seed(seed)
    groups = [_group("a", "attention", 3, 7), _group("b", "feed-forward", 4, 2), _group("c", "feed-forward", 2, 3)]
    scores = {group.name: torch.randn(group.width, generator=generator) for group in groups}
    units = [(group, unit, float(scores[group.name][unit])) for group in groups for unit in range(group.width)]
    free = [one for one in units if one[2] > float(scores[one[0].name].min())]
    weights = round(share * sum(group.cost for group, _, _ in free))
    best = min(
        (
            subset for count in range(len(free) + 1) for subset in itertools.combinations(free, count)
            if all(inside[2] > other[2] for inside in subset for other in free if other not in subset)
        ),
        key=lambda subset: abs(sum(group.cost for group, _, _ in subset) - weights),
    )  # fmt: skip
    kept = choose(groups, scores, weights)
    gone = {(group.name, unit) for group in groups for unit in range(group.width) if not kept[group.name][unit]}
    cost = sum(group.cost for group in groups for name, _ in gone if name == group.name)
    assert abs(cost - weights) == abs(sum(group.cost for group, _, _ in best) - weights)
    assert len(gone) in {len(best), len(best) + 1}  # two neighbours may be as near
    assert {(group.name, unit) for group, unit, _ in best} <= gone
    assert all(bool(stays.any()) for stays in kept.values())


def test_more_weights_than_channels_have_are_refused():
    groups = [_group("a", "attention", 3, 7)]
    with pytest.raises(InfeasibleAllocation, match="15 weights can't be removed: the channels have 14"):
        choose(groups, {"a": torch.zeros(3)}, 15)


def test_gradients_are_standardised_by_kind_over_all_towers():
    groups = [_group("a", "attention", 3, 7), _group("b", "feed-forward", 4, 2), _group("c", "feed-forward", 2, 3)]
    gradients = {group.name: torch.randn(group.width) * (100 if group.kind == "attention" else 1) for group in groups}
    found = standardised(groups, gradients)
    for names in (("a",), ("b", "c")):
        values = torch.cat([gradients[name] for name in names]).tolist()
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        expected = [(v - mean) / spread for v in values]
        assert torch.cat([found[name] for name in names]).tolist() == pytest.approx(expected, rel=1e-5)
    assert not standardised([groups[0]], {"a": torch.full((3,), 2.0)})["a"].any()


@pytest.mark.parametrize(("name", "step", "error"), [("vit", 1e-5, 1e-6), ("gpt2", 1e-5, 1e-6), ("llama", 3e-3, 1e-2)])
def test_masks_give_the_gradients_of_a_direct_formula(name, step, error):
    """dL/dα by central differences of a model whose weights are scaled by hand; norms of LLaMA compute in float32."""
    family = picos.FAMILIES[name]
    model = family.build(seed=3).double().eval()
    batch = {k: v.double() if k == "pixel_values" else v for k, v in family.batches(1)[0].items()}
    groups = channel_groups(model, discover(model, batch), batch)
    masks = ChannelMasks(model, groups)
    for value in masks.values.values():
        value.data = value.data.double()
        value.grad = torch.zeros_like(value)
    with masks:
        model(**batch).logits.square().mean().backward()
        model(**batch).logits.square().mean().backward()  # gradients add up
    for group in (groups[0], groups[-1]):
        unit = group.width // 2

        def scaled(alpha: float, group=group, unit=unit) -> float:
            state = {key: value.clone() for key, value in model.state_dict().items()}
            for member in group.members:
                if member.outputs != (group.kind == "attention"):
                    continue
                chosen = member.units == unit
                weight = model.get_parameter(member.layer.name).data.movedim(member.axis, 0)
                weight[chosen] *= alpha
                bias = getattr(model.get_submodule(member.layer.module), "bias", None)
                if member.outputs and bias is not None:
                    bias.data[chosen] *= alpha
            with torch.no_grad():
                loss = float(model(**batch).logits.square().mean())
            model.load_state_dict(state)
            return loss

        slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
        assert float(masks.values[group.name].grad[unit]) == pytest.approx(2 * slope, rel=error, abs=1e-8)


def test_an_update_weakens_what_is_to_leave_and_the_last_one_zeroes_it():
    """α is 1 or 1 − πₜ/p; at the end the masked model is the one whose channels are zero, and its count is exact."""
    family = picos.FAMILIES["vit"]
    model, batch = family.build(seed=3).double().eval(), family.batches(1)[0]
    batch = {k: v.double() if k == "pixel_values" else v for k, v in batch.items()}
    anatomy = discover(model, batch)
    groups, total = channel_groups(model, anatomy, batch), anatomy.prunable_parameters
    masks = ChannelMasks(model, groups)
    with masks:
        model(**batch).loss.backward()
        for step in (1, 3, 4):
            kept = masks.update(step, 4, 0.5, total)
            weak = 1 - ratio(step, 4, 0.5) / 0.5
            gone = sum(group.cost * int((~kept[group.name]).sum()) for group in groups)
            assert abs(gone - ratio(step, 4, 0.5) * total) <= max(group.cost for group in groups)
            for name, value in masks.values.items():
                assert value.tolist() == pytest.approx([1.0 if stays else weak for stays in kept[name]], abs=1e-6)
        masked = model(**batch).logits.detach()
    again = ChannelMasks(model, groups)
    again.load(masks.state())
    assert all(torch.equal(again.values[name], masks.values[name]) for name in masks.values)
    chosen = again.chosen(0.5, total)
    assert all(torch.equal(kept[name], chosen[name]) for name in kept)
    keeper = zero_channels(model, groups, kept)
    zeros = sum(int((model.get_parameter(layer.name) == 0).sum()) for layer in anatomy.layers)
    assert zeros == gone
    # Every member, and the bias of each that produces the channels.
    assert len(keeper.counts) == sum(2 * len(group.members) - 1 for group in groups)
    assert sum(count for name, count in keeper.counts.items() if name.endswith(".weight")) == gone
    assert torch.allclose(model(**batch).logits, masked, rtol=1e-12, atol=1e-12)

"""Groups of channels found in traced models, and models made narrower: against brute force, and plain transformers."""

from __future__ import annotations

import copy

import picos
import pytest
import torch
from torch import nn

from ecoflap.errors import AnatomyError
from ecoflap.model.anatomy import discover
from ecoflap.model.channels import channel_groups
from ecoflap.model.narrow import narrow
from ecoflap.pruning.upop import choose, zero_channels


def _in_float64(name: str):
    family = picos.FAMILIES[name]
    model = family.build(seed=3).double().eval()
    batch = {k: v.double() if k == "pixel_values" else v for k, v in family.batches(1)[0].items()}
    return model, batch, discover(model, batch)


def _logits(batch):
    def outputs(model):
        with torch.no_grad():
            found = model(**batch)
        return next(value for name, value in found.items() if name.startswith("logits"))

    return outputs


def _random_units(groups, share: float, anatomy):
    generator = torch.Generator().manual_seed(1)
    scores = {group.name: torch.randn(group.width, generator=generator) for group in groups}
    return choose(groups, scores, round(share * anatomy.prunable_parameters))


FAMILIES = ("llama", "blip2_opt", "gpt2", "bert", "vit", "clip", "t5", "blip2_t5")


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_what_the_output_layer_no_longer_reads(name):
    """A unit whose columns of the last layer are zero can lose its rows of values, or of W₁, without any change."""
    model, batch, anatomy = _in_float64(name)
    groups = channel_groups(model, anatomy, batch)
    kinds = {group.kind for group in groups}
    assert kinds == {"attention", "feed-forward"}
    kept = _random_units(groups, 0.4, anatomy)
    with torch.no_grad():
        for group in groups:
            last = group.members[-1]
            gone = (~kept[group.name][last.units]).nonzero().flatten()
            model.get_parameter(last.layer.name).index_fill_(last.axis, gone, 0)
    model.zero_grad()
    model(**batch).loss.backward() if "labels" in batch else model(**batch).logits_per_image.square().sum().backward()
    for group in groups:
        producers = group.members[:-1]
        # Of an attention, queries and keys feed other columns of their head; values are the last of them.
        for member in producers if group.kind == "feed-forward" else producers[-1:]:
            gradient = model.get_parameter(member.layer.name).grad.movedim(member.axis, 0)
            gone = ~kept[group.name][member.units]
            if group.kind == "attention" and len(producers) == 1:  # q, k and v in one matrix
                gone[: 2 * len(gone) // 3] = False
            assert not gradient[gone].any(), member.layer.name
            assert gradient[~gone].any(), member.layer.name


def test_units_cover_the_matrices_and_their_cost_is_a_count():
    """In the LLaMA every prunable weight is in one group, and a unit's cost is what its channels hold."""
    model, batch, anatomy = _in_float64("llama")
    groups = channel_groups(model, anatomy, batch)
    names = [member.layer.name for group in groups for member in group.members]
    assert sorted(names) == sorted(layer.name for layer in anatomy.layers)
    for group in groups:
        before = {member.layer.name: model.get_parameter(member.layer.name).clone() for member in group.members}
        kept = {group.name: torch.arange(group.width) != 1}
        zero_channels(model, [group], kept)
        assert sum(int((model.get_parameter(name) == 0).sum()) for name in before) == group.cost
        attention = group.kind == "attention"
        heads = model.config.num_attention_heads, model.config.num_key_value_heads
        hidden = model.config.hidden_size
        assert group.cost == (hidden * (2 * heads[0] + 2 * heads[1]) if attention else 3 * hidden)


class _Mixing(nn.Module):
    """A feed-forward network whose channels a norm mixes: none of them can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.norm(self.first(x)))


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Mixing(), _Mixing()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_channels_that_a_norm_mixes_are_in_no_group():
    model, batch = _Stack(), {"x": torch.randn(2, 3, 8)}
    with pytest.raises(AnatomyError, match="no channels to remove"):
        channel_groups(model, discover(model, batch), batch)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("llama", {"intermediate_size"}),  # rotary positions tie a head's channels to their numbers
        ("vit", {"intermediate_size"}),
        ("clip", {"text_config.intermediate_size", "vision_config.intermediate_size"}),
        ("t5", {"d_ff", "d_kv"}),
        ("blip2_t5", {"vision_config.intermediate_size", "text_config.d_ff", "text_config.d_kv"}),
        ("gpt2", set()),  # its configuration has no width of its own for the feed-forward network
    ],
)
def test_the_narrow_model_computes_what_the_one_with_zeros_does(name, entries, tmp_path):
    """In float64, to rounding; and again after plain transformers has saved and loaded it."""
    model, batch, anatomy = _in_float64(name)
    groups = channel_groups(model, anatomy, batch)
    kept = _random_units(groups, 0.6, anatomy)
    zero_channels(model, groups, kept)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    found = narrow(model, groups, kept, _logits(batch))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    if not entries:
        assert found is None
        return
    assert set(found.entries) == entries
    expected = _logits(batch)(model)
    assert (_logits(batch)(found.model) - expected).abs().max() <= 1e-12 * expected.abs().max()
    for path, (old, new) in found.entries.items():
        kind = "attention" if path.endswith("d_kv") else "feed-forward"
        part = {"text_config": ("text", "language"), "vision_config": ("vision",)}.get(path.partition(".")[0], ("",))
        widths = [
            int(kept[group.name].sum()) for group in groups
            if group.kind == kind and any(word in group.name for word in part)
        ]  # fmt: skip
        assert new == max(widths) < old
    found.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert (_logits(batch)(again) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())

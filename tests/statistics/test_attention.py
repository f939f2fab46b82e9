"""What the text attends to, against softmax written out with loops, for every way of saying a mask."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from families.matrix import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecoflap import api
from ecoflap.errors import InvalidOption
from ecoflap.model.block_runner import Enough
from ecoflap.statistics import tokens as choices
from ecoflap.statistics.tokens import TextAttention


def received(query: Tensor, key: Tensor, text: Tensor, allowed: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(batch, tokens): the mean over heads and text queries of the weights, query by query."""
    batch, heads, tokens, _ = query.shape
    shared = heads // key.shape[1]
    found = torch.zeros(batch, tokens, dtype=torch.float64)
    for b in range(batch):
        queries = text[b].nonzero().flatten().tolist()
        for h in range(heads):
            for q in queries:
                seen = [k for k in range(tokens) if allowed[b, h, q, k]]
                if not seen:
                    continue
                powers = [
                    float(query[b, h, q].double() @ key[b, h // shared, k].double()) * scale + float(bias[b, h, q, k])
                    for k in seen
                ]
                top = max(powers)
                total = sum(math.exp(power - top) for power in powers)
                for k, power in zip(seen, powers, strict=True):
                    found[b, k] += math.exp(power - top) / total / heads / len(queries)
    return found


@settings(deadline=None)
@given(
    seed=st.integers(0, 999), batch=st.integers(1, 3), tokens=st.integers(1, 9), groups=st.sampled_from([1, 2]),
    kind=st.sampled_from(["none", "causal", "bool", "bool of all", "bool of two axes", "float", "float per head"]),
    scale=st.sampled_from([None, 0.3]), parts=st.integers(1, 4), eager=st.booleans(),
)  # fmt: skip
def test_the_attention_that_the_text_gives(
    seed: int, batch: int, tokens: int, groups: int, kind: str, scale: float | None, parts: int, eager: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 4, tokens, 5, generator=generator)
    key = torch.randn(batch, 4 // groups, tokens, 5, generator=generator)
    text = torch.rand(batch, tokens, generator=generator) < 0.6
    leading = {"bool of all": (1, 1), "float per head": (batch, 4)}.get(kind, (batch, 1))
    allowed, bias = torch.ones(batch, 4, tokens, tokens, dtype=torch.bool), torch.zeros(batch, 4, tokens, tokens)
    mask: Tensor | None = None
    if kind == "causal":
        allowed = allowed.tril()
    elif kind.startswith("bool"):
        mask = torch.rand(*leading, tokens, tokens, generator=generator) < 0.7
        mask = mask[0, 0] if kind == "bool of two axes" else mask
        allowed = mask.expand(batch, 4, -1, -1)
    elif kind.startswith("float"):
        mask = torch.randn(*leading, tokens, tokens, generator=generator)
        bias = mask.expand(batch, 4, -1, -1)
    used = 5**-0.5 if scale is None else scale
    before, choices._QUERIES = choices._QUERIES, parts
    try:
        with TextAttention() as seen:
            seen.begin(text)
            if eager:
                scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * used + bias
                weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num()
                F.softmax(weights, dim=2)  # over queries: no map of attention
            else:
                options = {"is_causal": kind == "causal", "scale": scale, "enable_gqa": groups > 1}
                F.scaled_dot_product_attention(query, key, key, attn_mask=mask, **options)
    finally:
        choices._QUERIES = before
    (found,) = seen.received
    if not text.any():
        assert found is None or not found.any()
    else:
        assert found is not None
        torch.testing.assert_close(
            found.double(), received(query, key, text, allowed, bias, used), rtol=1e-4, atol=1e-6
        )


def test_other_attention_is_not_of_these_tokens() -> None:
    """Cross-attention, other batches, and what runs between calls."""
    text = torch.ones(2, 4, dtype=torch.bool)
    x, longer, more = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 6, 3), torch.randn(3, 2, 4, 3)
    with TextAttention() as seen:
        F.scaled_dot_product_attention(x, x, x)
        seen.begin(text)
        F.scaled_dot_product_attention(x, longer, longer)
        F.scaled_dot_product_attention(more, more, more)
        torch.softmax(torch.randn(2, 4, 4), -1)
        seen.begin(None)
        F.scaled_dot_product_attention(x, x, x)
        seen.begin(text)
        F.scaled_dot_product_attention(x, x, x)
        F.scaled_dot_product_attention(x, x, x)
    assert seen.received[:2] == [None, None]
    torch.testing.assert_close(seen.received[2].sum(1), torch.full((2,), 2.0))  # of two attentions, the sum


@pytest.mark.parametrize("attentions", [1, 2])
def test_calls_end_with_their_last_attention(attentions: int) -> None:
    """Once the first one with text has shown how many there are; and what is received is the same."""
    generator = torch.Generator().manual_seed(attentions)
    texts = [None, *(torch.rand(2, 4, generator=generator) < 0.7 for _ in range(3)), None]
    texts[2] = torch.ones(2, 4, dtype=torch.bool)
    inputs = [torch.randn(attentions, 2, 2, 4, 3, generator=generator) for _ in texts]

    def called(early: bool) -> tuple[list[Tensor | None], list[int]]:
        whole = []
        with TextAttention(early) as seen:
            for number, (text, of_call) in enumerate(zip(texts, inputs, strict=True)):
                of_call = of_call.clone()  # what comes between two calls ends nothing
                seen.begin(text)
                with suppress(Enough):
                    for x in of_call:
                        F.scaled_dot_product_attention(x, x, x)
                    whole.append(number)
        return seen.received, whole

    expected, everything = called(early=False)
    found, whole = called(early=True)
    assert everything == [0, 1, 2, 3, 4]
    assert whole == [0, 1, 4]  # those without text, and the first one with some
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["llava", "blip2_opt", "qwen2_5_vl"])
def test_the_early_end_chooses_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several batches, some of them whole only because they come first."""
    pruned = []
    for ending in (True, False):
        monkeypatch.setattr(choices, "TextAttention", lambda early, ending=ending: TextAttention(ending))
        found = case(name)
        model = found.fresh()
        batches = [*found.padded, *found.batches, *found.padded]
        assert len(batches) > 3
        api.prune(
            model, batches, 0.5, importance="uniform", criterion="wanda", tokens="text+attended",
            loss=found.loss,
        )  # fmt: skip
        pruned.append(model.state_dict())
    assert all(torch.equal(pruned[0][key], pruned[1][key]) for key in pruned[0])


def test_eager_and_fused_attention_choose_alike() -> None:
    weights = []
    for implementation in ("sdpa", "eager"):
        found = case("llava")
        model = found.fresh()
        model.set_attn_implementation(implementation)
        api.prune(
            model, found.padded, 0.5, importance="uniform", criterion="wanda", tokens="text+attended", loss=found.loss
        )
        weights.append({name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() == 2})
    same = sum(int((weights[0][name] == weights[1][name]).sum()) for name in weights[0])
    assert same > 0.999 * sum(mask.numel() for mask in weights[0].values())


def test_attention_that_cannot_be_seen_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = case("llava")
    monkeypatch.setattr(TextAttention, "_see_product", lambda *_, **__: None)
    with pytest.raises(InvalidOption, match=r"can't record the attention of .*text\+top"):
        api.prune(
            found.fresh(), found.padded, 0.5, importance="uniform", criterion="wanda", tokens="text+attended",
            loss=found.loss,
        )  # fmt: skip

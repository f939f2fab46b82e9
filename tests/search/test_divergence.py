"""Divergences by hand: torch's own KL at the positions that count, for every kind of output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from searching import quiet, random_masks, really_pruned, subject
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from ecoflap.errors import InvalidOption, NonFiniteLoss, UnknownName
from ecoflap.search.divergence import Divergence
from ecoflap.search.masked_model import MaskedModel


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.logits_per_image if "logits_per_image" in output else output.logits


def by_hand(dense: nn.Module, changed: nn.Module, batch: Any, counts: Any) -> float:
    """Mean over ``counts``, a list of index tuples into the logits' leading shape."""
    ours, theirs = logits_of(dense, batch).double(), logits_of(changed, batch).double()
    values = [kl_divergence(Categorical(logits=ours[at]), Categorical(logits=theirs[at])) for at in counts]
    return float(sum(values) / len(values))


def next_tokens(batch: Any) -> list[tuple[int, int]]:
    """Each output whose next token has a label."""
    rows, columns = batch["labels"].shape
    return [(r, c) for r in range(rows) for c in range(columns - 1) if int(batch["labels"][r, c + 1]) != -100]


def same_tokens(batch: Any) -> list[tuple[int, int]]:
    return [tuple(at) for at in (batch["labels"] != -100).nonzero().tolist()]


def rows(batch: Any) -> list[tuple[int]]:
    return [(r,) for r in range(len(batch["pixel_values"]))]


CASES = {
    "llama": next_tokens, "gpt2": next_tokens, "blip2_opt": next_tokens, "llava": next_tokens,
    "t5": same_tokens, "blip2_t5": same_tokens, "bert": same_tokens, "clip": rows, "vit": rows,
}  # fmt: skip


@pytest.mark.parametrize("metric", ["auto", "kl"])
@pytest.mark.parametrize("name", CASES)
def test_kl_at_the_positions_that_count(name: str, metric: str) -> None:
    it = subject(name)
    masks = random_masks(it.anatomy, kept=0.8)
    pruned = really_pruned(it.model, masks)
    divergence = Divergence(it.model, it.batches, it.loss, metric)
    with quiet(it.model):
        expected = [by_hand(it.model, pruned, batch, CASES[name](batch)) for batch in it.batches]
    assert min(expected) > 1e-4
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence.record()
        assert divergence.metric == "kl"
        assert len(divergence) == len(it.batches) == 2
        assert [divergence.value(index) for index in range(2)] == pytest.approx([0.0, 0.0], abs=1e-6)
        masked.set(masks)
        assert [divergence.value(index) for index in range(2)] == pytest.approx(expected, rel=1e-3)


def test_more_positions_than_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    it = subject("llama")
    masks = random_masks(it.anatomy)
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence = Divergence(it.model, it.batches, it.loss)
        divergence.record()
        masked.set(masks)
        whole = divergence.value(0)
        monkeypatch.setattr("ecoflap.model.lazy_logits._KL_NUMBERS", 200)
        assert divergence.value(0) == pytest.approx(whole, rel=1e-5)


def every_text(batch: Any, image: int | None) -> list[tuple[int, int]]:
    """Each output at a real token that is no part of a picture, and those that a label belongs to."""
    real = (
        batch["attention_mask"] != 0
        if image is None
        else (batch["attention_mask"] != 0) & (batch["input_ids"] != image)
    )
    return sorted({*(tuple(at) for at in real.nonzero().tolist()), *next_tokens(batch)})


@pytest.mark.parametrize("name", ["llama", "llava", "blip2_opt", "t5"])
def test_kl_over_the_whole_text(name: str) -> None:
    it = subject(name)
    image = getattr(it.model.config, "image_token_index", None) or getattr(it.model.config, "image_token_id", None)
    batches = []
    for batch in it.batches:  # a third is labelled, the rest is what questions and prompts are
        labels = batch["labels"].clone()
        labels[:, torch.arange(labels.shape[1]) % 3 != 0] = -100
        batches.append({**batch, "labels": batch["labels"] if name == "t5" else labels})
    masks = random_masks(it.anatomy, kept=0.8)
    pruned = really_pruned(it.model, masks)
    counted = [same_tokens(batch) if name == "t5" else every_text(batch, image) for batch in batches]
    if name != "t5":
        assert all(len(places) > len(next_tokens(batch)) for places, batch in zip(counted, batches, strict=True))
    with quiet(it.model):
        expected = [by_hand(it.model, pruned, batch, at) for batch, at in zip(batches, counted, strict=True)]
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence = Divergence(it.model, batches, it.loss, positions="text")
        divergence.record()
        masked.set(masks)
        assert [divergence.value(index) for index in range(len(batches))] == pytest.approx(expected, rel=1e-3)


def test_padding_does_not_count_where_there_are_no_labels() -> None:
    it = subject("llama")
    batch = {key: value for key, value in it.batches[0].items() if key != "labels"}
    assert int((batch["attention_mask"] == 0).sum())

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).logits.float().square().mean()

    masks = random_masks(it.anatomy)
    real = [tuple(at) for at in batch["attention_mask"].nonzero().tolist()]
    with quiet(it.model):
        expected = by_hand(it.model, really_pruned(it.model, masks), batch, real)
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence = Divergence(it.model, [batch], loss)
        divergence.record()
        masked.set(masks)
        assert divergence.value(0) == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_any_label_is_far_from_nothing() -> None:
    it = subject("llama")
    batch = {**it.batches[0], "labels": torch.full_like(it.batches[0]["labels"], -100)}
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence = Divergence(it.model, [batch], lambda model, one: model(**{**one, "labels": None}).logits.mean())
        divergence.record()
        masked.set(random_masks(it.anatomy))
        assert divergence.value(0) == 0.0


@pytest.mark.parametrize("name", ["llama", "uncalled"])
def test_the_loss_as_measure(name: str) -> None:
    it = subject(name)  # "uncalled" returns a loss and no logits
    masks = random_masks(it.anatomy)
    pruned = really_pruned(it.model, masks)
    expected = [float(it.loss_of(pruned, index)) - float(it.loss_of(it.model, index)) for index in range(2)]
    divergence = Divergence(it.model, it.batches, it.loss, "loss" if name == "llama" else "auto")
    with quiet(it.model), MaskedModel(it.model, it.anatomy) as masked:
        divergence.record()
        assert divergence.metric == "loss"
        masked.set(masks)
        assert [divergence.value(index) for index in range(2)] == pytest.approx(expected, abs=1e-6)
        assert abs(expected[0]) > 1e-3


def test_gradients_flow_where_they_are_on() -> None:
    it = subject("llama")
    with quiet(it.model):
        divergence = Divergence(it.model, it.batches, it.loss)
        divergence.record()
        weight = it.model.get_parameter(it.anatomy.layers[0].name)
        assert not divergence(0).requires_grad
        with torch.enable_grad():
            value = divergence(0)
            assert value.dtype == torch.float32
            assert value.shape == ()
            (gradient,) = torch.autograd.grad(value, [weight])
    assert float(gradient.abs().max()) < 1e-5  # the dense model is where it is least


def test_two_forwards_a_batch_are_measured_by_the_loss() -> None:
    it = subject("llama")

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss + model(**batch).loss

    with quiet(it.model):
        divergence = Divergence(it.model, it.batches, twice)
        divergence.record()
        assert divergence.metric == "loss"
        with pytest.raises(InvalidOption, match="metric=kl needs one forward of LlamaForCausalLM that gives logits"):
            Divergence(it.model, it.batches, twice, "kl").record()


def test_refusals_take_one_line() -> None:
    it = subject("uncalled")
    with quiet(it.model):
        with pytest.raises(InvalidOption) as refused:
            Divergence(it.model, it.batches, it.loss, "kl").record()
        assert "metric=kl" in str(refused.value)
        assert "metric=loss" in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1
        with pytest.raises(UnknownName, match="metric"):
            Divergence(it.model, it.batches, it.loss, "kld")


def test_a_loss_or_divergence_that_is_not_finite_names_its_batch() -> None:
    class Broken(nn.Module):
        value = 0.0

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=x * self.value, loss=x.sum() * self.value)

    model, batches = Broken(), [{"x": torch.ones(2, 3)}, {"x": torch.ones(2, 3)}]
    divergence = Divergence(model, batches, lambda m, b: m(**b).loss)
    divergence.record()
    model.value = torch.nan
    with pytest.raises(NonFiniteLoss, match="calibration batch 1 is nan"):
        divergence(1)
    with pytest.raises(NonFiniteLoss, match="calibration batch 0 is nan"):
        divergence.record()

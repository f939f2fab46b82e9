"""Logits on demand against whole ones: the same loss and gradients, and only the rows that the loss looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picos import FAMILIES, scramble
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM

from ecoflap.data.objectives import default_objective
from ecoflap.model import lazy_logits
from ecoflap.model.lazy_logits import logits_on_demand, output_heads
from ecoflap.model.patching import cache_disabled

WRITERS = ("llama", "gpt2", "llava", "t5", "blip2_t5", "blip2_opt", "bert")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_NUMBERS", "_NUMBERS_WITH_GRADIENT"):
        monkeypatch.setattr(lazy_logits, name, 3 * 64)  # three rows of the pico vocabulary at a time


class Counted:
    """Counts the rows that a head multiplies."""

    def __init__(self, head: nn.Module) -> None:
        self.rows = 0
        head.register_forward_hook(lambda *_: None)  # what other tools do
        inner = head.forward

        def forward(hidden: Tensor) -> Tensor:
            self.rows += hidden.shape[:-1].numel()
            return inner(hidden)

        head.forward = forward


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", WRITERS)
def test_loss_and_gradients_are_those_of_the_plain_forward(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    (head,) = output_heads(model)
    loss = default_objective(model)
    head.requires_grad_(False)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with cache_disabled(model):
        for batch in family.batches(4, 2, padding=True):
            plain = loss(model, batch)
            exact = torch.autograd.grad(plain, wanted, allow_unused=True)
            with logits_on_demand(model):
                found = loss(model, batch)
            assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
            for mine, theirs in zip(torch.autograd.grad(found, wanted, allow_unused=True), exact, strict=True):
                assert (mine is None) == (theirs is None)
                if theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
            with torch.no_grad(), logits_on_demand(model):
                assert float(loss(model, batch)) == pytest.approx(float(plain.detach()), rel=1e-6)
    assert "forward" not in head.__dict__


@pytest.mark.parametrize("name", WRITERS)
def test_only_labelled_rows_are_multiplied(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    (batch,) = family.batches(3, 3, padding=True)
    labels = batch["labels"].clone()
    labels[0, :] = -100
    labels[1, 3:] = -100
    batch = {**batch, "labels": labels}
    shifts = name in ("llama", "gpt2", "llava", "blip2_opt")
    counted = Counted(output_heads(model)[0])
    with torch.no_grad(), cache_disabled(model), logits_on_demand(model):
        model(**batch)
    assert counted.rows == int((labels[:, 1:] if shifts else labels).ne(-100).sum())


@pytest.mark.parametrize("name", WRITERS)
def test_only_masked_positions_are_multiplied(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    (batch,) = family.batches(3, 3, padding=True)
    batch = {key: value for key, value in batch.items() if key != "labels"} | {"labels": None}
    if name == "t5" or name == "blip2_t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and p is not output_heads(model)[0].weight]
    with cache_disabled(model):
        plain = model(**batch).logits
        mask = torch.rand(plain.shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.3
        exact = torch.autograd.grad(plain[mask].square().sum(), inner, allow_unused=True)
        counted = Counted(output_heads(model)[0])
        with logits_on_demand(model):
            logits = model(**batch).logits
        found = logits[mask]  # after the context, too
    assert type(found) is Tensor
    assert counted.rows == int(mask.sum()) > 0
    torch.testing.assert_close(found, plain[mask])
    for mine, theirs in zip(torch.autograd.grad(found.square().sum(), inner, allow_unused=True), exact, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    family = FAMILIES["llama"]
    model = family.build(tied=False).eval()
    (batch,) = family.batches(2, 2, padding=True)
    wanted = [output_heads(model)[0].weight, *(p for p in model.model.layers.parameters())]
    exact = torch.autograd.grad(model(**batch).loss, wanted)
    with logits_on_demand(model):
        found = torch.autograd.grad(model(**batch).loss, wanted)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_forward_mode_passes_through() -> None:
    family = FAMILIES["gpt2"]
    model = family.build().eval()
    (batch,) = family.batches(2, 2, padding=True)
    weight = model.transformer.ln_f._parameters["weight"]
    tangent = torch.randn_like(weight)
    found = []
    for on_demand in (False, True):
        with torch.no_grad(), forward_ad.dual_level():
            model.transformer.ln_f._parameters["weight"] = forward_ad.make_dual(weight.detach(), tangent)
            if on_demand:
                with logits_on_demand(model):
                    loss = model(**batch, use_cache=False).loss
            else:
                loss = model(**batch, use_cache=False).loss
            found.append(float(forward_ad.unpack_dual(loss).tangent))
        model.transformer.ln_f._parameters["weight"] = weight
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_scales_and_soft_caps_stay_on_demand() -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0,
    )  # fmt: skip
    model = scramble(Gemma2ForCausalLM(config)).eval()
    (batch,) = FAMILIES["llama"].batches(3, 3)
    batch["labels"][:, 4:] = -100
    plain = float(model(**batch, use_cache=False).loss.detach())
    counted = Counted(model.lm_head)
    with torch.no_grad(), logits_on_demand(model):
        assert float(model(**batch, use_cache=False).loss) == pytest.approx(plain, rel=1e-6)
    assert counted.rows == 9


class Writer(nn.Module):
    """A head, and something that is done with its logits."""

    def __init__(self, then: Callable[[Tensor, Tensor], Any], classes: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lm_head = nn.Linear(4, classes)
        with torch.no_grad():
            for parameter in self.lm_head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.then = then

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden: Tensor, labels: Tensor) -> Any:
        return self.then(self.lm_head(hidden), labels)


def _written_into(logits: Tensor, labels: Tensor) -> Tensor:
    logits[:, :, 2] = -5.0
    logits.mul_(0.5)
    return functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda logits, labels: logits.sum(),
    "softmax": lambda logits, labels: logits.softmax(-1)[..., 0],
    "sliced": lambda logits, labels: logits[:, 1:3],
    "sliced and used": lambda logits, labels: logits[:, 1:3].exp(),
    "picked": lambda logits, labels: logits[labels > 2] + 1,
    "picked by all axes": lambda logits, labels: logits[(labels > 2)[..., None].expand(logits.shape)],
    "picked by number": lambda logits, labels: logits[labels[:, 0] % 2],
    "picked samples": lambda logits, labels: logits[labels[:, 0] > 2],
    "classes first": lambda logits, labels: functional.cross_entropy(logits.transpose(1, 2), labels),
    "per row": lambda logits, labels: functional.cross_entropy(
        logits.view(-1, logits.size(-1)), labels.view(-1), reduction="none"
    ),
    "weighted": lambda logits, labels: functional.cross_entropy(
        logits.view(-1, logits.size(-1)), labels.view(-1), weight=torch.arange(1.0, logits.size(-1) + 1)
    ),
    "smoothed": lambda logits, labels: functional.cross_entropy(
        logits.reshape(-1, logits.size(-1)), labels.flatten(), label_smoothing=0.1, ignore_index=3
    ),
    "summed": lambda logits, labels: nn.CrossEntropyLoss(reduction="sum")(
        logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), labels[..., 1:].reshape(-1)
    ),
    "one sample": lambda logits, labels: functional.cross_entropy(logits[1] / 3, labels[1]),
    "laid flat": lambda logits, labels: logits.view(-1),
    "classes cut": lambda logits, labels: logits[..., 2:4],
    "beside another": lambda logits, labels: torch.cat([logits, logits * 2]),
    "written into": _written_into,
    "nothing counts": lambda logits, labels: functional.cross_entropy(
        logits.view(-1, logits.size(-1)), torch.full_like(labels, -100).view(-1)
    ),
}


@pytest.mark.parametrize("use", USES)
@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(3, 8), classes=st.sampled_from([7, 8, 11]), seed=st.integers(0, 999))
def test_whatever_is_done_with_logits_gives_what_it_gave(
    use: str, batch: int, length: int, classes: int, seed: int
) -> None:
    if use in ("one sample", "picked by number"):
        batch += 1
    model = Writer(USES[use], classes)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 4, generator=generator)
    labels = torch.randint(classes, (batch, length), generator=generator)
    plain = model(hidden, labels)
    with logits_on_demand(model):
        found = model(hidden, labels)
        found = found + 0 if found.dim() else found  # inside, as a loss function would go on
    torch.testing.assert_close(found, plain, equal_nan=True)


def test_a_head_of_a_model_inside_is_found_once() -> None:
    assert output_heads(FAMILIES["vit"].build()) == []
    assert output_heads(FAMILIES["clip"].build()) == []
    model = FAMILIES["blip2_t5"].build()
    assert output_heads(model) == [model.language_model.lm_head]

import sys
import types
from typing import Any

import pico
import pytest
import torch
from torch import nn

from ecoflap.data import (
    Sample,
    SampleSet,
    check_image_matters,
    check_loss,
    default_objective,
    make_batches,
    objective_name,
    resolve,
)
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss, UnknownName


class Toy(nn.Module):
    """Returns its squared output in the way that ``form`` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(3, 1), form

    def forward(self, x: torch.Tensor) -> Any:
        loss = self.linear(x).pow(2).mean()
        forms = {
            "tensor": loss,
            "dict": {"loss": loss},
            "object": types.SimpleNamespace(loss=loss),
            "vector": loss.repeat(3),
            "nothing": {"logits": loss},
            "attribute": types.SimpleNamespace(logits=loss),
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["tensor", "dict", "object"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_module_with_a_loss(form: str, dtype: torch.dtype) -> None:
    model, x = Toy(form).to(dtype), torch.randn(4, 3).to(dtype)
    for objective in (default_objective(model), resolve(None, model)):
        loss = objective(model, {"x": x})
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        assert torch.equal(loss, model.linear(x).pow(2).mean().float())
    loss.backward()  # first-order scores differentiate through it
    assert model.linear.weight.grad is not None


@pytest.mark.parametrize(
    ("form", "got"), [("vector", r"shape \[3\]"), ("nothing", "no loss"), ("attribute", "no loss")]
)
def test_no_loss_is_said(form: str, got: str) -> None:
    model = Toy(form)
    with pytest.raises(CalibrationError, match=got):
        default_objective(model)(model, {"x": torch.randn(4, 3)})


def test_objective_follows_the_model() -> None:
    words = pico.tokenizer()
    expected = {
        "lm": [pico.llama(len(words)), pico.llava(True)[0], pico.blip2(text="opt")[0]],
        "seq2seq": [pico.t5(len(words)), pico.blip2()[0]],
        "contrastive": [pico.clip()[0]],
        "classification": [pico.vit(["a", "b"])[0]],
        "model": [Toy("tensor")],
    }
    for name, models in expected.items():
        assert [objective_name(None, model) for model in models] == [name] * len(models)
    with pytest.raises(UnknownName, match="did you mean 'contrastive'"):
        resolve("contrastiv", Toy("tensor"))
    assert objective_name("lm", Toy("tensor")) == "lm"


def test_users_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("users_objective")
    module.twice = lambda model, batch: 2 * model(**batch)  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_objective", module)
    model, batch = Toy("tensor"), {"x": torch.randn(4, 3)}
    assert torch.equal(resolve("users_objective:twice", model)(model, batch), 2 * model(**batch))
    for name in ("users_objective:nosuch", "no_such_module:x", "users_objective:number", ":x"):
        with pytest.raises(InvalidOption, match="objective"):
            resolve(name, model)


def test_cache_is_off() -> None:
    words = pico.tokenizer()
    model = pico.llama(len(words))
    seen: list[Any] = []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("use_cache")), with_kwargs=True)
    ids = torch.arange(4, 12).view(1, 8)
    for objective in (resolve(None, model), default_objective(model)):
        objective(model, {"input_ids": ids, "labels": ids})
    assert seen == [False, False]
    with pytest.raises(CalibrationError, match="no labels"):
        resolve("lm", model)(model, {"input_ids": ids})


def test_non_finite_loss_names_the_batch() -> None:
    model = Toy("tensor")
    assert check_loss(model, {"x": torch.zeros(2, 3)}, default_objective(model)) == pytest.approx(
        float(model.linear.bias.detach() ** 2)
    )
    for value in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteLoss, match="batch 7"):
            check_loss(model, {"x": torch.full((2, 3), value)}, default_objective(model), 7)


@pytest.mark.parametrize("build", [pico.blip2, pico.clip, lambda: pico.llava(False)])
def test_image_matters(build: Any) -> None:
    model, processor = build()
    samples = tuple(Sample((pico.picture(i),), "what is", "a red circle") for i in range(2))
    (batch,) = make_batches(SampleSet(samples, (0, 1), 0, "x", {}), model, processor, batch_size=2)
    check_image_matters(model, batch, resolve(None, model))


def test_image_without_placeholders_is_noticed() -> None:
    model, processor = pico.blip2()
    samples = tuple(Sample((pico.picture(i),), "what is", "a red circle") for i in range(2))
    (batch,) = make_batches(SampleSet(samples, (0, 1), 0, "x", {}), model, processor, batch_size=2)
    blind = {**batch, "input_ids": batch["input_ids"].clone()}
    blind["input_ids"][blind["input_ids"] == model.config.image_token_index] = 5
    with pytest.raises(CalibrationError, match=r"does not depend on the image.*num_query_tokens"):
        check_image_matters(model, blind, resolve(None, model))
    words = pico.tokenizer()
    text = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, 5]])}
    check_image_matters(pico.llama(len(words)), text, resolve("lm", model))  # no image, nothing to check

"""What users hand to ``ecoflap.prune`` from Python: loaders, generators, compiled models, adapters, wrong batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families.matrix import case
from torch import nn
from torch.utils.data import DataLoader

import ecoflap
from ecoflap.errors import AnatomyError, CalibrationError


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def pruned(batches: Any, wrap: Any = lambda model: model, **options: Any) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(case("llama").model)
    ecoflap.prune(wrap(model), batches, 0.5, importance="uniform", **options)
    return weights(model)


@pytest.mark.parametrize("kind", ["loader", "generator", "tuple", "compiled"])
def test_batches_and_models_in_other_dress_give_the_same_weights(kind: str) -> None:
    batches = case("llama").batches
    wanted = pruned(batches)
    if kind == "compiled":
        found = pruned(batches, torch.compile)
    elif kind == "loader":
        found = pruned(DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    else:
        found = pruned(tuple(batches) if kind == "tuple" else (batch for batch in batches))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert any(not torch.equal(weight, case("llama").model.get_parameter(name)) for name, weight in wanted.items())


@pytest.mark.parametrize("batches", [[(torch.ones(1, 2), torch.ones(1, 2))], {"input_ids": torch.ones(1, 2)}, 3])
def test_what_is_no_list_of_mappings_is_refused_in_one_line(batches: Any) -> None:
    with pytest.raises(CalibrationError) as refused:
        pruned(batches)
    assert "\n" not in str(refused.value)


def test_batches_of_any_kind_with_a_loss_that_takes_them() -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=batch[0], **batch[1]).loss
        return found

    batches = case("llama").batches
    taken = [(batch["input_ids"], {key: batch[key] for key in batch if key != "input_ids"}) for batch in batches]
    plain = [
        {**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches
    ]  # nothing is padding
    taken = [(ids, {**rest, "attention_mask": torch.ones_like(ids)}) for ids, rest in taken]
    model = copy.deepcopy(case("llama").model)
    result = ecoflap.prune(model, (batch for batch in taken), 0.5, importance_samples=2, loss=loss)  # type: ignore[arg-type]
    other = copy.deepcopy(case("llama").model)
    ecoflap.prune(other, plain, 0.5, importance_samples=2)
    assert all(torch.equal(weight, other.get_parameter(name)) for name, weight in model.named_parameters())
    assert result.importance is not None
    assert result.importance.settings["samples"] >= 2


@pytest.mark.parametrize("batch", [{"input_ids": [[1, 2]]}, {"nosuch": torch.ones(1)}])
def test_what_the_model_raises_on_its_first_batch_is_one_line(batch: Any) -> None:
    with pytest.raises(CalibrationError, match="can't take the calibration data") as refused:
        pruned([batch])
    assert "\n" not in str(refused.value)
    with pytest.raises(CalibrationError, match="can't take"):
        ecoflap.measure_importance(copy.deepcopy(case("llama").model), iter([batch]))


def test_a_model_with_adapters_is_refused() -> None:
    model = copy.deepcopy(case("llama").model)
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    projection.lora_A, projection.lora_B = nn.ModuleDict(), nn.ModuleDict()
    before = weights(model)
    with pytest.raises(AnatomyError, match="merge"):
        ecoflap.prune(model, case("llama").batches, 0.5, importance="uniform")
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())


def test_a_result_says_in_five_lines_what_was_done() -> None:
    model = copy.deepcopy(case("llama").model)
    result = ecoflap.prune(model, case("llama").batches, 0.5, importance="uniform")
    lines = repr(result).splitlines()
    zeros = sum(int((model.get_parameter(layer.name) == 0).sum()) for layer in result.anatomy.layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert len(lines) == 5
    assert f"{zeros / result.anatomy.prunable_parameters:.2%} of the prunable weights" in lines[1]
    assert f"{zeros / total:.2%} of all" in lines[1]
    assert result._repr_html_().startswith("<pre>")

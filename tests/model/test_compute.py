"""Half precision on a CPU without units for it: stages compute in fp32, block by block; weights keep their dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
import yaml
from console import model_weights, prose
from picos import FAMILIES
from torch import nn

from ecoflap import api
from ecoflap.errors import InvalidOption, ResumeMismatch
from ecoflap.model import compute
from ecoflap.model.checkpoint import load
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {
        n: t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for n, t in model.state_dict().items()
    }


def _pair(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    half = FAMILIES[name].build().to(dtype).eval()
    return half, copy.deepcopy(half).float()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is one without units for half precision."""
    monkeypatch.setattr(compute, "half_is_slow", lambda dtype: True)


def test_auto_asks_the_cpu_for_the_weights_own_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(compute, "half_is_slow", lambda dtype: bool(asked.append(dtype)) or dtype == torch.float16)
    found = [compute.settled("auto", nn.Linear(2, 2).to(kind)) for kind in (torch.float32, torch.bfloat16, torch.half)]
    assert found == ["native", "native", "float32"]
    assert asked == [torch.bfloat16, torch.float16]
    assert compute.settled("float32", nn.Linear(2, 2)) == "float32"
    with pytest.raises(InvalidOption, match="compute_dtype 'fp32' is not one of auto, native, float32"):
        compute.settled("fp32", nn.Linear(2, 2))


@pytest.mark.parametrize(("known", "ratio", "expected"), [(True, 0.1, True), (False, 9.0, False), (None, 1.4, False),
                                                          (None, 1.6, True)])  # fmt: skip
def test_a_product_is_timed_in_doubt_alone(
    known: bool | None, ratio: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_known", lambda dtype: known)
    monkeypatch.setattr(compute, "product_ratio", lambda dtype: ratio)
    assert compute.half_is_slow.__wrapped__(torch.bfloat16) is expected


def test_packed_models_and_parts_that_cannot_run_so_stay_native(slow: None) -> None:
    packed = nn.Linear(2, 2).bfloat16()
    packed.quantization_method = "ecoflap"  # type: ignore[assignment]
    assert compute.settled("auto", packed) == "native"

    class Reads(nn.Module):
        """Multiplies by a block's weight without running the block."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 4)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.embed(ids), self.layers[0][0].weight)

    model = Reads().bfloat16()
    assert compute.settled("auto", model, lambda: model(torch.tensor([1]))) == "native"
    assert compute.settled("auto", model) == "float32"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_outputs_are_those_of_the_converted_model(name: str) -> None:
    half, whole = _pair(name)
    batch, before = FAMILIES[name].batches(2, 2)[0], _bits(half)
    with torch.no_grad():
        expected = whole(**batch).logits if hasattr(whole(**batch), "logits") else whole(**batch).loss
        with compute.computing_in(half, "float32"):
            found = half(**batch).logits if hasattr(half(**batch), "logits") else half(**batch).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert _bits(half) == before


def test_an_offloaded_model_computes_the_same_and_holds_one_block(tmp_path: Path) -> None:
    source = picos.write_checkpoint("llama", tmp_path / "llama", torch.bfloat16, max_shard_size=20_000)
    spread, whole = load(source, device="cpu", device_map="disk").model, load(source, device="cpu").model.float()
    batch = FAMILIES["llama"].batches(2, 2)[0]
    blocks = [f"model.layers.{index}" for index in range(spread.config.num_hidden_layers)]
    held: set[tuple[str, ...]] = set()

    def look(*_: Any) -> None:
        names = [f"{block}.input_layernorm.weight" for block in blocks]
        held.add(tuple(name for name in names if not spread.get_parameter(name).is_meta))

    for block in blocks:
        spread.get_submodule(f"{block}.mlp").register_forward_hook(look)
    with torch.no_grad(), compute.computing_in(spread, "float32"):
        found = spread(**batch).logits
    with torch.no_grad():
        assert torch.equal(found, whole(**batch).logits)
    assert held == {(f"{block}.input_layernorm.weight",) for block in blocks}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in spread.model.layers.parameters())


@pytest.mark.parametrize(("name", "search"), [("llama", True), ("blip2_t5", False), ("llava", True)])
def test_pruning_removes_what_it_removes_of_the_converted_model(name: str, search: bool) -> None:
    """Scores, allocation, the search's losses and the masks of the walk: all are those of fp32."""
    half, whole = _pair(name)
    batches = FAMILIES[name].batches(4, 2)
    options: dict[str, Any] = {"search_options": {"rounds": 1, "inputs": "both"}} if search else {}
    options["criterion"] = "wanda"
    a = api.prune(half, batches, 0.5, importance="zeroth-order", search=search, compute_dtype="float32", **options)
    b = api.prune(whole, batches, 0.5, importance="zeroth-order", search=search, **options)
    assert a.allocation == b.allocation
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for layer in a.anatomy.layers:
        assert torch.equal(half.get_parameter(layer.name).float(), whole.get_parameter(layer.name)), layer.name


def test_generation_is_that_of_the_converted_model() -> None:
    half, whole = _pair("llama", torch.float16)
    ids = FAMILIES["llama"].batches(2, 2)[0]["input_ids"][:, :4]
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with compute.computing_in(half, "float32"):
        found = half.generate(ids, **options)
    expected = whole.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


@pytest.mark.usefixtures("pageless", "slow")
def test_a_run_records_its_dtype_and_goes_on_with_it_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = picos.write_checkpoint("llama", tmp_path / "llama", torch.bfloat16)
    text = prose(tmp_path / "prose.txt")
    recipe = Recipe(
        model=str(model), calibration=str(text), samples=4, batch_size=2, sequence_length=16, sparsity=0.5,
        importance="uniform", test=str(text), test_samples=2,
    )  # fmt: skip
    told: list[str] = []
    run = run_recipe(recipe, tmp_path / "run", say=told.append)
    assert yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))["compute_dtype"] == "float32"
    assert any(line.startswith("computing: in fp32, block by block") for line in told)
    weights = model_weights(run / "model")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}

    monkeypatch.setattr(compute, "half_is_slow", lambda dtype: False)  # another machine
    (run / "metrics.json").unlink()  # not complete
    again = run_recipe(recipe, tmp_path / "run", resume=True)
    assert model_weights(again / "model").keys() == weights.keys()
    assert yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))["compute_dtype"] == "float32"
    with pytest.raises(ResumeMismatch, match="compute_dtype: float32 then, native now"):
        run_recipe(recipe.model_copy(update={"compute_dtype": "native"}), tmp_path / "run", resume=True)

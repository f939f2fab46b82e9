"""Half-precision models are measured in fp32 block by block: the scores of the converted model, one block at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from journals import Journal
from picos import FAMILIES
from torch import nn

from ecoflap import measure_importance
from ecoflap.model.anatomy import discover
from ecoflap.model.precision import computing_in_fp32


def _pair(family: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A half-precision model, and one with the same weights in fp32."""
    half = family.build().to(dtype)
    return half, copy.deepcopy(half).float()


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {
        n: t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize(
    ("importance", "options"),
    [("zeroth-order", {}), ("zeroth-order", {"probe": "block"}), ("forward-mode", {}), ("gradient-norm", {})],
)
@pytest.mark.filterwarnings("ignore:forward mode does not work")
def test_scores_are_those_of_the_converted_model(name: str, importance: str, options: dict[str, str]) -> None:
    half, whole = _pair(FAMILIES[name], torch.bfloat16)
    batches = FAMILIES[name].batches(2, 2)
    before = _bits(half)
    found, expected = Journal(), Journal()
    measure_importance(half, batches, importance, journal=found, **options)  # type: ignore[arg-type]
    measure_importance(whole, batches, importance, journal=expected, **options)  # type: ignore[arg-type]
    assert found.values().keys() == expected.values().keys()
    assert any(expected.values().values())
    if importance == "gradient-norm":  # what reaches a tensor from several sides is added in another order
        assert found.values() == pytest.approx(expected.values(), rel=1e-4, abs=1e-7)
    else:
        assert found.values() == expected.values()
    assert _bits(half) == before


@pytest.mark.parametrize("importance", ["zeroth-order", "gradient-norm"])
def test_one_block_is_fp32_at_a_time(importance: str) -> None:
    half, _ = _pair(FAMILIES["llama"], torch.bfloat16)
    batches = FAMILIES["llama"].batches(2, 2)
    blocks = discover(half, batches[0]).replayable
    assert len(blocks) > 1
    seen: set[tuple[str, ...]] = set()

    def look(*_: Any) -> None:
        seen.add(tuple(b for b in blocks if half.get_parameter(f"{b}.input_layernorm.weight").dtype == torch.float32))

    for block in blocks:
        for module in half.get_submodule(block).modules():
            module.register_forward_hook(look)
    measure_importance(half, batches, importance)
    # Norms are never perturbed. Hooks on the block itself run when its forward, and with it its fp32 weights, is over.
    assert seen == {(), *((block,) for block in blocks)}


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    half, _ = _pair(FAMILIES["llama"], torch.float16)
    batch = FAMILIES["llama"].batches(2, 2)[0]
    blocks = discover(half, batch).replayable
    before = _bits(half)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken off")

    handle = next(half.get_submodule(blocks[1]).children()).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"), computing_in_fp32(half, blocks), torch.no_grad():
        half(**batch)
    handle.remove()
    assert _bits(half) == before
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_what_a_block_shares_with_the_rest_is_converted_for_good() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
            self.head.weight = self.first[0].weight

    model = Tied().bfloat16()
    with computing_in_fp32(model, ["first"]):
        assert model.head.weight is model.first[0].weight
        assert model.head.weight.dtype == torch.float32
        assert model.first[1].weight.dtype == torch.bfloat16
        assert model.first(torch.ones(1, 4)).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_begins_with_a_block_is_converted_as_a_whole() -> None:
    """Its inputs are given its first parameter's dtype."""
    drawn = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)]
    half = nn.Sequential(*drawn).bfloat16()
    whole = copy.deepcopy(half).float()
    batches = [{"x": torch.randn(2, 4)} for _ in range(2)]

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).square().mean()

    found, expected = Journal(), Journal()
    measure_importance(half, batches, "zeroth-order", loss=loss, journal=found)
    measure_importance(whole, batches, "zeroth-order", loss=loss, journal=expected)
    assert found.values() == expected.values()


class Twice(nn.Module):
    """Runs its blocks on the input, and again on what came out; the last block's second run may not matter."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.into = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3))
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.into(x)
        for _ in range(2):
            first = x
            for block in self.blocks:
                x = x + block(x)
        x = x.detach() + first if self.skip else x
        return x.square().mean()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("importance", ["gradient-norm", "zeroth-order"])
def test_blocks_that_run_twice(importance: str, skip: bool) -> None:
    torch.manual_seed(3)
    half = Twice(skip).bfloat16()
    whole = copy.deepcopy(half).float()
    batches = [{"x": torch.randn(2, 6)} for _ in range(2)]
    found, expected = Journal(), Journal()

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"])

    measure_importance(half, batches, importance, loss=loss, journal=found)
    measure_importance(whole, batches, importance, loss=loss, journal=expected)
    if importance == "zeroth-order":
        assert found.values() == expected.values()
        return
    for index, batch in enumerate(batches):  # by autograd on the fp32 model
        names = [name for name, parameter in whole.named_parameters() if parameter.ndim == 2 and "blocks" in name]
        gradients = torch.autograd.grad(loss(whole, batch), [whole.get_parameter(name) for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            exact = float(gradient.norm()) * (2 / torch.pi) ** 0.5
            assert found.values()[name, index, 0] == pytest.approx(exact, rel=1e-4)
            assert expected.values()[name, index, 0] == pytest.approx(exact, rel=1e-4)


def test_a_block_without_prunable_layers_passes_gradients_on() -> None:
    half, whole = _pair(FAMILIES["llama"], torch.bfloat16)
    batches = FAMILIES["llama"].batches(2, 2)
    found, expected = Journal(), Journal()
    for model, journal in ((half, found), (whole, expected)):
        anatomy = discover(model, batches[0], exclude=["model.layers.1.*"])
        assert not anatomy.blocks[1].layers
        measure_importance(model, batches, "gradient-norm", anatomy=anatomy, journal=journal)
    assert len(found.values()) == len(expected.values()) > 0
    assert found.values() == pytest.approx(expected.values(), rel=1e-4)

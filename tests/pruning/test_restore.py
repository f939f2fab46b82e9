"""Pruning that fails part-way leaves the model as it was, or names exactly the layers that it changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import ecoflap
from ecoflap.errors import PartlyPruned
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.offload import Offloaded
from ecoflap.pruning import restore, walk

BATCHES = picos.batches("llama")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Stage 2 raises an error when the given number of layers have been pruned."""
    prune_layer = walk._Walker._prune_layer

    def fail(after: int, error: BaseException) -> None:
        left = iter(range(after, -1, -1))

        def pruned(*arguments: object) -> None:
            if not next(left):
                raise error
            prune_layer(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(walk._Walker, "_prune_layer", pruned)

    return fail


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("error", [ValueError("a worker died"), KeyboardInterrupt("")], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("after", [1, 9])
def test_prune(failing: Callable[[int, BaseException], None], criterion: str, error: BaseException, after: int) -> None:
    model = picos.llama()
    before, parameters = fingerprint(model), dict(model.named_parameters())
    failing(after, error)
    with pytest.raises(type(error)):
        ecoflap.prune(model, BATCHES, 0.5, importance="uniform", criterion=criterion)
    assert fingerprint(model) == before
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("after", [1, 9])
def test_recover(failing: Callable[[int, BaseException], None], after: int) -> None:
    dense = picos.llama()
    model = copy.deepcopy(dense)
    ecoflap.prune(model, BATCHES, 0.5, importance="uniform", criterion="magnitude")
    before = fingerprint(model)
    failing(after, ValueError("a worker died"))
    with pytest.raises(ValueError, match="a worker died"):
        ecoflap.recover(model, dense, BATCHES)
    assert fingerprint(model) == before


def _changed(dense: nn.Module, model: nn.Module) -> set[str]:
    """Names of parameters whose values differ, by plain reading."""
    ours, theirs = Offloaded(model), Offloaded(dense)
    return {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(ours.read(parameter), theirs.read(dense.get_parameter(name)))
    }


@pytest.mark.parametrize("after", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_room_the_changed_layers_are_named(
    failing: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch, after: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(restore, "SHARE", 0.0)
    model = picos.llama().to(dtype)
    dense = copy.deepcopy(model)
    failing(after, ValueError("a worker died"))
    with pytest.raises(PartlyPruned if after else ValueError, match="a worker died") as caught:
        ecoflap.prune(model, BATCHES, 0.5, importance="uniform")
    if isinstance(caught.value, PartlyPruned):
        assert set(caught.value.changed) == _changed(dense, model)
        assert len(caught.value.changed) == after
        assert f"{after} of 21 layers" in str(caught.value)
    else:
        assert not _changed(dense, model)


@pytest.mark.parametrize(
    "options", [{"device_map": "disk"}, {"device_map": "auto", "max_memory": {"cpu": "40KB"}}], ids=["disk", "both"]
)
@pytest.mark.parametrize("error", [ValueError("a worker died"), KeyboardInterrupt("")], ids=["error", "Ctrl-C"])
def test_weights_on_the_disk(
    failing: Callable[[int, BaseException], None], tmp_path: Path, options: dict[str, Any], error: BaseException
) -> None:
    """The model reads its own files again, and nothing is left of the first block, which was pruned and saved."""
    source = picos.write_checkpoint("llama", tmp_path / "llama")
    dense, model = (ecoflap.load(source, device="cpu", **options).model for _ in range(2))
    failing(9, error)  # in the second of three blocks, of which nothing is kept
    with pytest.raises(type(error)):
        ecoflap.prune(model, BATCHES, 0.5, importance="uniform")
    assert not _changed(dense, model)
    with torch.no_grad():
        assert torch.equal(model(**BATCHES[0]).loss, dense(**BATCHES[0]).loss)


def test_weights_in_memory_behind_hooks(
    failing: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's own offload keeps them in one dictionary, and pruning writes there."""
    dense = picos.llama()
    failing(9, ValueError("a worker died"))
    model = cpu_offload(copy.deepcopy(dense), execution_device=torch.device("cpu"), offload_buffers=False)
    with pytest.raises(ValueError, match="a worker died"):
        ecoflap.prune(model, BATCHES, 0.5, importance="uniform")
    assert not _changed(dense, model)
    monkeypatch.setattr(restore, "SHARE", 0.0)
    failing(9, ValueError("a worker died"))
    with pytest.raises(PartlyPruned) as caught:
        ecoflap.prune(model, BATCHES, 0.5, importance="uniform")
    assert set(caught.value.changed) == _changed(dense, model)
    assert len(caught.value.changed) == 7

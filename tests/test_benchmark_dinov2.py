"""Reading DINOv2 out of an ONNX file: a graph made by hand, with the matrices folded as exporters fold them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra bench is not installed")


@pytest.fixture
def dinov2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import dinov2

    for name, value in (("WIDTH", 8), ("BLOCKS", 2), ("HEADS", 2), ("GRID", 2)):
        monkeypatch.setattr(dinov2, name, value)
    return dinov2


def _write(model: torch.nn.Module, names: dict[str, str], file: Path, leave_out: str = "") -> None:
    """``model`` as the exporter writes it: vectors named, matrices nameless and transposed, the positions cut."""
    helper, constants, nodes = onnx.helper, [], []

    def constant(name: str, value: torch.Tensor) -> None:
        constants.append(onnx.numpy_helper.from_array(value.detach().contiguous().numpy(), name))

    for name, value in model.state_dict().items():
        old = "backbone." + name
        for exported, ours in names.items():
            old = old.replace(f".{ours}.", f".{exported}.") if not ours.startswith("layer_scale") else old
        if name == leave_out or name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            constant("onnx::Concat_1", value[:, :1])
            constant("onnx::Reshape_2", value[:, 1:])
        elif value.dim() == 2:
            number = len(nodes)
            constant(f"onnx::MatMul_{number}", value.t())
            nodes.append(helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"]))
            bias = old.removesuffix("weight") + "bias"
            nodes.append(helper.make_node("Add", [bias, f"y{number}"], [f"x{number + 2}"]))
        else:
            constant(old, value)
    graph = helper.make_graph(nodes, "g", [], [], initializer=constants)
    onnx.save(helper.make_model(graph), str(file))


def _backbone(dinov2: ModuleType) -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    size = dinov2.PATCH * dinov2.GRID
    config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=size)
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@torch.no_grad()
def test_the_model_comes_back(dinov2: ModuleType, tmp_path: Path) -> None:
    model = _backbone(dinov2)
    _write(model, dinov2.NAMES, tmp_path / "a.onnx")
    found = dinov2.build(tmp_path / "a.onnx")
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(found(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_another_graph_is_refused(dinov2: ModuleType, tmp_path: Path) -> None:
    _write(_backbone(dinov2), dinov2.NAMES, tmp_path / "a.onnx", leave_out="layernorm.weight")
    with pytest.raises(ValueError, match=r"layernorm\.weight"):
        dinov2.build(tmp_path / "a.onnx")

"""What users do with a packed model as a whole: pipelines, export, compilation, device maps, other dtypes on disk."""

import picos
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

from ecoflap.model.packed.checkpoint import pack_checkpoint
from ecoflap.model.packed.linear import PackedLinear

IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pico Llama with its tokenizer, pruned, and the same packed."""
    folder = tmp_path_factory.mktemp("whole")
    picos.write_checkpoint("llama", folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder / "plain")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.masked_fill_(torch.rand_like(module.weight) < 0.7, 0)
    model.save_pretrained(folder / "plain")
    pack_checkpoint(folder / "plain", folder / "packed")
    return folder


@pytest.fixture(scope="module")
def model(folders):
    return AutoModelForCausalLM.from_pretrained(folders / "packed").eval()


class Logits(nn.Module):
    """Tokens to logits alone, as programs are exported."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def test_a_pipeline_answers_as_the_plain_models(folders):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    packed, plain = (
        pipeline("text-generation", model=str(folders / name), device="cpu") for name in ("packed", "plain")
    )
    assert any(isinstance(module, PackedLinear) for module in packed.model.modules())
    assert packed("emma was", **options) == plain("emma was", **options)


def test_a_whole_model_is_exported(model, tmp_path):
    with torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), strict=False)
        names = [str(node.target) for node in program.graph.nodes]
        assert sum("ecoflap.packed_linear" in name for name in names) == sum(
            isinstance(module, PackedLinear) for module in model.modules()
        )
        assert torch.equal(program.module()(IDS), Logits(model)(IDS))
        torch.export.save(program, tmp_path / "model.pt2")
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(IDS), Logits(model)(IDS))


@pytest.mark.slow
def test_inductor_compiles_a_whole_model(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "packed", num_hidden_layers=1).eval()
    with torch.no_grad():
        expected = Logits(model)(IDS)
        try:
            found = torch.compile(Logits(model), fullgraph=True)(IDS)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"inductor can't compile here: {error}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(folders, model, device_map):
    placed = AutoModelForCausalLM.from_pretrained(folders / "packed", device_map=device_map)
    with torch.no_grad():
        assert torch.equal(placed(IDS).logits, model(IDS).logits.to(placed.device))


def test_another_dtype_is_saved_and_loaded(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "packed").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype is torch.bfloat16
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    dense = model.dequantize()
    plain = AutoModelForCausalLM.from_pretrained(folders / "plain").to(torch.bfloat16)
    assert all(torch.equal(p, dense.get_parameter(name)) for name, p in plain.named_parameters())

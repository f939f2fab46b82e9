"""W + M ⊙ BA: the layer computes it, merging adds it, and no zero is touched."""

from __future__ import annotations

import pytest
import torch
from picos import FAMILIES
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from tuning import recipe_of, same_zeros

from ecoflap.errors import MissingDependency
from ecoflap.model.anatomy import discover
from ecoflap.run.finetune.pipeline import run_finetune

peft = pytest.importorskip("peft")
from ecoflap.run.finetune.lora import adapted, check_peft, merged  # noqa: E402


def pruned(name, share=0.6):
    model = FAMILIES[name].build().eval()
    layers = discover(model, FAMILIES[name].batches(2, 2)[0]).layers
    with torch.no_grad():
        for layer in layers:
            weight = model.get_parameter(layer.name)
            weight.masked_fill_(torch.rand(weight.shape) < share, 0)
    return model, layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "blip2_t5"])  # gpt2's layers are Conv1D
def test_layer_and_merge_against_the_formula(name, dtype):
    model, layers = pruned(name)
    model.to(dtype)
    before = {layer.name: model.get_parameter(layer.name).detach().clone() for layer in layers}
    untouched = {n: p.detach().clone() for n, p in model.named_parameters() if n not in before}
    wrapped = adapted(model, layers, rank=3)
    expected = {}
    for layer in layers:
        module = model.get_submodule(layer.module)
        with torch.no_grad():
            module.lora_B["default"].weight.normal_()
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        update = 2.0 * (b @ a)
        weight = before[layer.name].double()
        expected[layer.name] = weight + (weight != 0) * (update.T if layer.transposed else update)
        x = torch.randn(2, 5, layer.shape[1], dtype=dtype)
        matrix = expected[layer.name] if layer.transposed else expected[layer.name].T
        bias = module.base_layer.bias
        y = x.double() @ matrix + (0 if bias is None else bias.double())
        tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(y.detach().abs().max())
        assert torch.allclose(module(x).double(), y, atol=tolerance, rtol=1e-4)
    assert merged(wrapped) is model
    for layer in layers:
        weight = model.get_parameter(layer.name)
        zeros = before[layer.name] == 0
        assert not weight[zeros].any()
        assert not torch.signbit(weight[zeros]).any()
        tolerance = 1e-5 if dtype == torch.float32 else 0.02 * float(expected[layer.name].detach().abs().max())
        assert torch.allclose(weight.double(), expected[layer.name], atol=tolerance)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in untouched.items())


def test_only_the_adapters_are_trained_and_zeros_get_no_gradient():
    model, layers = pruned("llama")
    wrapped = adapted(model, layers, rank=2)
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers)
    assert all("lora_" in n for n in trained)
    module = model.get_submodule(layers[0].module)
    x = torch.randn(4, layers[0].shape[1])
    with torch.no_grad():
        module.lora_B["default"].weight.normal_()
    module(x).square().sum().backward()
    # dL/dB of the masked product, by the chain rule written out.
    weight, mask = module.base_layer.weight.detach(), module.base_layer.weight.detach() != 0
    a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
    y = nn.functional.linear(x, weight + mask * 2.0 * (b @ a))
    outer = (2 * y).T @ x * mask
    assert torch.allclose(module.lora_B["default"].weight.grad, 2.0 * outer @ a.T, rtol=1e-4, atol=1e-4)


def test_no_matrix_is_kept_for_the_backward_pass():
    """What autograd saves of a layer is its input and the two factors, not a product of the weight's size."""
    model, layers = pruned("llama")
    adapted(model, layers, rank=2)
    module = model.get_submodule(layers[0].module)
    out, within = layers[0].shape
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        module(torch.randn(3, within, requires_grad=True)).sum()
    assert (out, within) not in [tuple(shape) for shape in kept]


def test_a_run_with_adapters(made, tmp_path, pageless):
    recipe = recipe_of(made.llama, made.prose, **made.text, tune="lora", rank=4, learning_rate=1e-2, epochs=1)
    folder = run_finetune(recipe, tmp_path / "out")
    same_zeros(made.llama, folder / "model")
    assert not (folder / "model" / "adapter_config.json").exists()


def test_without_peft(monkeypatch):
    monkeypatch.setattr("ecoflap.run.finetune.lora.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'ecoflap\[lora\]'"):
        check_peft()


def test_stacked_experts_are_no_modules_to_adapt():
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = MixtralForCausalLM(MixtralConfig(**config, **heads)).eval()
    layers = discover(model, FAMILIES["llama"].batches(2, 2)[0]).layers
    assert any(".experts." in layer.name for layer in layers)
    wrapped = adapted(model, layers, rank=2)
    names = {name.partition(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}

"""The benchmarks of stage 2 on tiny cases: the published loop in the shape that the driver expects, and the memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ecoflap.data.objectives import default_objective, on_device
from ecoflap.model.anatomy import discover

# A loop of the published shape, for this test: one sample a call, the first output of each, hooks on the linear layers.
LOOP = """
import torch
from torch import nn
from .data import get_loaders

def prune_wanda(args, model, tokenizer, device):
    samples, _ = get_loaders("c4", nsamples=args.nsamples, seed=args.seed, seqlen=model.seqlen, tokenizer=tokenizer)
    layers, inputs, given = model.model.layers, [], {}
    class Catcher(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
        def forward(self, inp, **kwargs):
            inputs.append(inp)
            given.update(kwargs)
            raise ValueError
    layers[0] = Catcher(layers[0])
    for sample in samples:
        try:
            model(sample[0].to(device))
        except ValueError:
            pass
    layers[0] = layers[0].module
    print("prose that nobody wants")
    for layer in layers:
        torch.cuda.synchronize()
        linears = [module for module in layer.modules() if type(module) is nn.Linear]
        sums = {module: 0 for module in linears}
        def add(module, inp, out):
            sums[module] = sums[module] + inp[0].float().square().sum((0, 1))
        hooks = [module.register_forward_hook(add) for module in linears]
        masks = {"attention_mask": given["attention_mask"], "position_ids": given["position_ids"]}
        for x in inputs:
            layer(x, **masks)[0]
        for hook in hooks:
            hook.remove()
        for module in linears:
            scores = module.weight.abs() * sums[module].sqrt()
            cut = scores.argsort(dim=1)[:, : int(scores.shape[1] * args.sparsity_ratio)]
            module.weight.data.scatter_(1, cut, 0)
        inputs = [layer(x, **masks)[0].reshape(1, model.seqlen, -1) for x in inputs]
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("published_loops", "stage2_memory", "lib", "lib.data", "lib.prune"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("benchmarks")
def test_a_published_loop_prunes_as_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from published_loops import published_stage2

    from ecoflap.api import allocate, prune_to
    from ecoflap.importance.scores import Importance

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prune.py").write_text(LOOP)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForCausalLM(LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )).eval())  # fmt: skip
    ids = torch.randint(32, (2, 3, 7))
    batches: list[Any] = [{"input_ids": rows, "labels": rows} for rows in ids]
    anatomy = discover(models[0], batches[0], run=on_device(default_objective(models[0])))
    layers = models[1].model.layers
    published_stage2(tmp_path, models[1], anatomy, batches, "wanda", 0.5)()
    assert models[1].model.layers is layers
    assert not hasattr(models[1], "seqlen")
    assert not capsys.readouterr().out
    allocation = allocate(Importance.uniform(anatomy.layers, anatomy.total_parameters), sparsity=0.5)
    prune_to(models[0], anatomy, allocation, batches, criterion="wanda")
    for layer in anatomy.layers:
        assert torch.equal(*(model.get_parameter(layer.name) for model in models)), layer.name


@pytest.mark.usefixtures("benchmarks")
def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    from published_loops import published_stage2

    with pytest.raises(SystemExit, match="no checkout"):
        published_stage2(tmp_path, torch.nn.Module(), None, [{"input_ids": torch.ones(1, 4)}], "wanda", 0.5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_case_of_memory(offload: str) -> None:
    from stage2_memory import Shape, one

    found = one(Shape(16, 24, 2, 2, 1, 8), "sparsegpt", offload, "cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["statistics"] == 4 * (3 * 16**2 + 24**2)
    while_run = 2 * found["statistics"] + found["forward"]
    assert found["expected"] == found["inputs"] + max(while_run, found["statistics"] + found["working"])


@pytest.mark.usefixtures("benchmarks")
def test_in_turns_each_way_begins_with_the_dense_weights() -> None:
    from stage2 import Way, in_turns

    model = torch.nn.Linear(2, 2)
    dense = {"weight": model.weight.detach().clone()}
    order: list[str] = []

    def way(name: str) -> Way:
        def prune() -> None:
            order.append(name)
            assert torch.equal(model.weight, dense["weight"])
            model.weight.data.zero_()

        return Way(prune)

    found = in_turns({"one": way("one"), "two": way("two")}, model, dense, 2)
    assert order == ["two", "one", "one", "two"]
    assert found["one"]["ratio"] == (1.0, 1.0)
    assert len(found["two"]["clock"]) == 2

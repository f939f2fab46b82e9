"""Zeros stay zeros, to the bit, whatever the optimiser, the dtype and the loop."""

from __future__ import annotations

import pytest
import torch
from picos import FAMILIES
from torch import nn
from transformers import Trainer, TrainingArguments

import ecoflap
from ecoflap.errors import AnatomyError, InvalidOption


class Tied(nn.Module):
    """An embedding whose matrix is that of the head, and two layers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(self.embedding(x)))))


def sparse(model, share=0.6, seed=1):
    """The model with this share of its matrices set to zero, and the masks by name."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "norm" not in name:
                masks[name] = torch.rand(weight.shape, generator=generator) < share
                weight.masked_fill_(masks[name], 0)
    return model, masks


def are_zero(model, masks):
    """Every masked weight has the bits of +0."""
    for name, mask in masks.items():
        values = model.get_parameter(name).detach()[mask]
        if not (torch.equal(values, torch.zeros_like(values)) and not bool(torch.signbit(values).any())):
            return False
    return True


OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-4, foreach=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_after_every_step(optimiser, dtype):
    model, masks = sparse(Tied().to(dtype))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step = OPTIMISERS[optimiser](model.parameters())
    with ecoflap.keep_zeros(model) as keeper:
        assert keeper.counts["embedding.weight" if "embedding.weight" in keeper.counts else "head.weight"] > 0
        for _ in range(4):
            for _ in range(3):  # gradients of three batches together
                x = torch.randint(0, 11, (4, 5))
                nn.functional.cross_entropy(model(x).flatten(0, 1).float(), x.flatten()).backward()
            step.step()
            step.zero_grad()
            assert are_zero(model, masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert not torch.equal(weight[~mask], before[name][~mask])  # the others are trained
    assert not torch.equal(model.up.bias, before["up.bias"])


def test_an_optimiser_that_began_before():
    """Momentum and second moments from before the context don't bring a zero back."""
    model, masks = sparse(Tied())
    step = OPTIMISERS["adamw"](model.parameters())
    x = torch.randint(0, 11, (4, 5))
    dense = [weight.detach().clone() for weight in model.parameters()]
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    step.step()
    assert not are_zero(model, masks)  # what happens without
    with torch.no_grad():
        for weight, value in zip(model.parameters(), dense, strict=True):
            weight.copy_(value)
    with ecoflap.keep_zeros(model):
        step.step()
        assert are_zero(model, masks)


def test_gradients_of_zeros_count_for_nothing():
    """The norm that clipping divides by is that of the weights that are left."""
    model, masks = sparse(Tied())
    x = torch.randint(0, 11, (4, 5))

    def gradients():
        model.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    free = gradients()
    with ecoflap.keep_zeros(model):
        kept = gradients()
    for name, gradient in kept.items():
        mask = masks.get(name, torch.zeros_like(gradient, dtype=torch.bool))
        assert torch.equal(gradient, free[name].masked_fill(mask, 0))
    assert all(torch.equal(gradient, free[name]) for name, gradient in gradients().items())  # the hooks are gone


def test_nan_and_minus_zero_become_zero():
    model, masks = sparse(Tied())
    with ecoflap.keep_zeros(model), torch.no_grad():
        model.up.weight[masks["up.weight"]] = float("nan")
        model.down.weight[masks["down.weight"]] = -0.0
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0).step()
        assert are_zero(model, masks)


def test_what_is_loaded_and_moved_inside():
    """A checkpoint's weights, another dtype, a new parameter object: the zeros are those of the beginning."""
    model, masks = sparse(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    dense = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).state_dict()
    with ecoflap.keep_zeros(model) as keeper:
        model.load_state_dict(dense, assign=True)
        model.to(torch.bfloat16)
        keeper.enforce()
        assert are_zero(model, masks)


def test_weights_that_become_zero_stay_free():
    model, masks = sparse(Tied())
    free = ~masks["up.weight"]
    with ecoflap.keep_zeros(model):
        with torch.no_grad():
            model.up.weight[free] = 0
        x = torch.randint(0, 11, (4, 5))
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert bool((model.up.weight[free] != 0).any())


def test_embeddings_norms_and_biases_are_free():
    model = nn.Sequential(nn.Embedding(4, 8, padding_idx=0), nn.Linear(8, 8), nn.LayerNorm(8))
    with torch.no_grad():
        model[1].bias.zero_()
        model[1].weight[0] = 0
    assert list(ecoflap.keep_zeros(model).counts) == ["1.weight"]


def test_adapters_are_free():
    """peft's B begins at zero, and must not stay there."""
    peft = pytest.importorskip("peft")
    model, _ = sparse(FAMILIES["llama"].build())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with ecoflap.keep_zeros(wrapped) as keeper:
        assert not [name for name in keeper.counts if "lora_" in name]
        assert [name for name in keeper.counts if "q_proj.base_layer" in name]
        step = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
        wrapped(**FAMILIES["llama"].batches(2, 2)[0]).loss.backward()
        step.step()
    moved = [weight for name, weight in wrapped.named_parameters() if "lora_B" in name]
    assert moved
    assert all(bool(weight.any()) for weight in moved)


def test_patterns():
    model, _ = sparse(Tied())
    assert list(ecoflap.keep_zeros(model, include=["*.weight"], exclude=["head.*", "up.*"]).counts) == ["down.weight"]
    with pytest.raises(AnatomyError, match="that the patterns select has a zero"):
        ecoflap.keep_zeros(model, include=["nothing"])
    with pytest.raises(AnatomyError, match=r"no matrix of Tied has a zero.*prune it first"):
        ecoflap.keep_zeros(Tied())


def test_a_weight_that_is_split_is_refused():
    model, _ = sparse(Tied())
    keeper = ecoflap.keep_zeros(model)
    model.up.weight = nn.Parameter(torch.ones(6, 8))
    with pytest.raises(InvalidOption, match="split among processes"):
        keeper.enforce()


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = FAMILIES["llama"].batches(8, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return {name: value[0] for name, value in self.rows[index].items()}


def trainer(model, folder, steps, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        gradient_accumulation_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[ecoflap.keep_zeros(model)])


def test_a_trainer_that_is_resumed(tmp_path):
    """As a callback: zeros in each checkpoint, and two halves end as the whole does, to the bit."""
    whole, masks = sparse(FAMILIES["llama"].build())
    trainer(whole, tmp_path / "whole", 4).train()
    assert are_zero(whole, masks)

    half, _ = sparse(FAMILIES["llama"].build())
    trainer(half, tmp_path / "halves", 4).train()
    again, _ = sparse(FAMILIES["llama"].build())
    saved = type(again).from_pretrained(tmp_path / "halves" / "checkpoint-2")
    assert are_zero(saved, masks)
    trainer(again, tmp_path / "halves", 4).train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    assert are_zero(again, masks)
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name


def test_hooks_of_a_training_that_failed_go_with_the_next(tmp_path):
    model, masks = sparse(FAMILIES["llama"].build())
    keeper = ecoflap.keep_zeros(model)
    keeper.on_train_begin(None, None, None)  # and no end
    with keeper:
        keeper.on_train_begin(None, None, None)
        keeper.on_train_end(None, None, None)
        assert keeper._handles
    assert not keeper._handles
    assert are_zero(model, masks)

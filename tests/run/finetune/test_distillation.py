"""The teacher's part of the loss against its formula, position by position."""

from __future__ import annotations

import pytest
import torch
from picos import FAMILIES

from ecoflap.data.objectives import resolve
from ecoflap.errors import InvalidOption
from ecoflap.model.anatomy import discover
from ecoflap.run.finetune.distillation import Distillation


def pair(name):
    family = FAMILIES[name]
    student, teacher = family.build(seed=1).eval(), family.build(seed=2).eval()
    batch = family.batches(3, 3, padding=True)[0]
    return student, teacher, batch, discover(student, batch).towers, resolve(None, student)


def logits_of(model, batch):
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output.logits_per_image


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", ["llama", "t5", "blip2_t5", "vit", "clip"])
def test_outputs(name, temperature):
    student, teacher, batch, towers, objective = pair(name)
    loss = Distillation(teacher, 0.7, temperature, 0.0, towers).loss(student, batch, objective)
    s, t = logits_of(student, batch).double(), logits_of(teacher, batch).double()
    rows = []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in s.shape[:-1])).reshape(-1, s.dim() - 1).tolist():
        if name in ("t5", "blip2_t5") and int(batch["labels"][tuple(place)]) == -100:
            continue
        if name == "llama":  # an output is about the next token
            row, column = place
            if column + 1 >= s.shape[1] or int(batch["labels"][row, column + 1]) == -100:
                continue
        p, q = ((x[tuple(place)] / temperature).softmax(-1) for x in (t, s))
        rows.append(float((p * (p.log() - q.log())).sum()))
    expected = float(objective(student, batch).detach()) + 0.7 * temperature**2 * sum(rows) / len(rows)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["llama", "blip2_t5"])
def test_hidden_states_of_real_tokens(name):
    student, teacher, batch, towers, objective = pair(name)
    loss = Distillation(teacher, 0.0, 1.0, 0.5, towers).loss(student, batch, objective)
    outputs = {}
    for which, model in (("student", student), ("teacher", teacher)):
        for tower in towers:
            for block in tower.blocks:

                def keep(_module, _args, output, key=(which, block.name)):
                    outputs[key] = (output[0] if isinstance(output, tuple) else output).detach()

                model.get_submodule(block.name).register_forward_hook(keep)
        with torch.no_grad():
            model(**batch)
    errors = []
    for tower in towers:
        for block in tower.blocks:
            s, t = outputs["student", block.name], outputs["teacher", block.name]
            masks = {tuple(batch["attention_mask"].shape): batch["attention_mask"] != 0}
            if tower.decoder:
                masks = {tuple(batch["labels"].shape): batch["labels"] != -100}
            mask = masks.get(tuple(s.shape[:-1]), torch.ones(s.shape[:-1], dtype=torch.bool))
            errors.append(float((s - t)[mask].square().sum() / t[mask].square().sum()))
    expected = float(objective(student, batch).detach()) + 0.5 * sum(errors) / len(errors)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_a_model_taught_by_itself_has_the_tasks_loss():
    student, _, batch, towers, objective = pair("blip2_t5")
    loss = Distillation(student, 1.0, 2.0, 1.0, towers).loss(student, batch, objective)
    assert float(loss.detach()) == pytest.approx(float(objective(student, batch).detach()), rel=1e-6)


def test_another_teacher_is_refused():
    student, _, batch, towers, objective = pair("llama")
    other = FAMILIES["gpt2"].build()
    other.resize_token_embeddings(7 + other.config.vocab_size)
    with pytest.raises(InvalidOption, match="--dense must be the model that was pruned"):
        Distillation(other, 1.0, 1.0, 0.0, towers).loss(student, batch, objective)

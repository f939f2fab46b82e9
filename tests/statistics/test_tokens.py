"""Choice of tokens against statistics of captured inputs with the mask applied by hand, on families that mix both."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import picos
import pytest
import torch
import torch.nn.functional as F
from families.matrix import case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ecoflap import api
from ecoflap.data.model_facts import IGNORED, placeholders, token_masks
from ecoflap.data.objectives import default_objective
from ecoflap.errors import CalibrationError, InvalidOption, UnknownName
from ecoflap.importance.allocate import flat
from ecoflap.model.anatomy import discover
from ecoflap.model.block_runner import TowerDriver
from ecoflap.model.parts import Anatomy, Block
from ecoflap.model.patching import cache_disabled
from ecoflap.model.trace import evaluating, tensors_in
from ecoflap.pruning.registry import tokens_of
from ecoflap.statistics.choice import TokenChoice
from ecoflap.statistics.dense import dense_statistics, gather
from ecoflap.statistics.gather import STATISTICS
from ecoflap.statistics.later import decoder_of, sequence_of
from ecoflap.statistics.tokens import balance, check_choice, largest

SHARED = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics2", "idefics3", "smolvlm",
    "gemma3", "paligemma", "internvl", "mistral3", "glm4v", "aya_vision", "ovis2", "florence2",
)  # fmt: skip
CHOICES = (
    TokenChoice("text"), TokenChoice("text+top", 0.4), TokenChoice("text+attended", 0.4), TokenChoice("atv"),
    TokenChoice("atv", 0.5),
)  # fmt: skip


def made(name: str) -> tuple[nn.Module, Anatomy, list[Any], Any]:
    """A model whose language tower reads visual tokens, its anatomy, padded batches and the loss."""
    if name.startswith("pico "):
        model = picos.FAMILIES[name[5:]].build()
        batches = picos.batches(name[5:], padding=True)
        loss = default_objective(model)
        with cache_disabled(model):
            return model, discover(model, batches[0], run=loss), batches, loss
    found = case(name)
    return found.fresh(), found.anatomy, found.padded, found.loss


def attention_maps(model: nn.Module, block: Block, batches: list[Any], loss: Any) -> list[Tensor]:
    """(batch, heads, tokens, tokens) of each batch, as the model's own eager attention returns them."""
    maps: list[Tensor] = []
    within = dict(model.get_submodule(block.name).named_modules())
    layers = [module for name, module in within.items() if "Attention" in type(module).__name__]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found = [one for one in tensors_in(output) if one.dim() == 4 and one.shape[-1] == one.shape[-2]]
        if found and len(maps) == runs:  # the innermost module returns first
            maps.append(found[-1])

    handles = [layer.register_forward_hook(note) for layer in layers]
    model.set_attn_implementation("eager")
    with torch.no_grad(), evaluating(model), cache_disabled(model):
        for runs, batch in enumerate(batches):  # noqa: B007  # the hook reads it
            loss(model, batch)
    model.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    assert len(maps) == len(batches)
    return maps


def by_hand(
    choice: TokenChoice,
    batches: list[Any],
    model: nn.Module,
    calls: list[tuple[Tensor, Tensor]],
    maps: list[Tensor] | None = None,
) -> list[Tensor]:
    """(batch, tokens) of each batch: the tokens that count, from what enters and leaves the block."""
    identifier = placeholders(model)[0]
    drifts = [1 - F.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in calls]
    images = [batch["input_ids"] == identifier for batch in batches]
    mean = torch.cat([drift[image] for drift, image in zip(drifts, images, strict=True)]).mean()
    kept = []
    for number, (batch, image, drift, (x, _)) in enumerate(zip(batches, images, drifts, calls, strict=True)):
        keep = (batch["attention_mask"] == 1) & ~image
        for row in range(len(image)):
            visual = image[row].nonzero().flatten().tolist()
            texts = int(keep[row].sum())
            if choice.name == "text+top":
                ranked = sorted(visual, key=lambda at: -float(x[row, at].double().norm()))
                keep[row, ranked[: round(0.4 * len(visual))]] = True
            elif choice.name == "text+attended":
                assert maps is not None
                given = maps[number][row].double().mean(0)[keep[row]].mean(0)
                ranked = sorted(visual, key=lambda at: -float(given[at]))
                keep[row, ranked[: round(0.4 * len(visual))]] = True
            elif choice.name == "atv":
                ranked = sorted(visual, key=lambda at: -float(drift[row, at]))
                keep[row, ranked[: round(min(1.0, choice.used * float(mean)) * texts)]] = True
        kept.append(keep)
    return kept


def watched(model: nn.Module, block: Block, batches: list[Any], loss: Any) -> tuple[list[Any], dict[str, list[Tensor]]]:
    """What enters and leaves the block, and what each of its layers receives, batch by batch, in plain forwards."""
    calls: list[Any] = []
    inputs: dict[str, list[Tensor]] = {layer.name: [] for layer in block.layers}
    handles = [
        model.get_submodule(block.name).register_forward_hook(
            lambda _, args, kwargs, out: calls.append((tensors_in((args, kwargs))[0].clone(), tensors_in(out)[0])),
            with_kwargs=True,
        )
    ]
    for layer in block.layers:
        handles.append(
            model.get_submodule(layer.module).register_forward_pre_hook(
                lambda _, args, name=layer.name: inputs[name].append(args[0])
            )
        )
    with torch.no_grad(), evaluating(model), cache_disabled(model):
        for batch in batches:
            loss(model, batch)
    for handle in handles:
        handle.remove()
    return calls, inputs


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.name} {choice.used:g}")
@pytest.mark.parametrize("name", ["pico llava", "pico blip2_t5", "pico blip2_opt", *SHARED])
def test_statistics_are_those_of_the_chosen_tokens(name: str, choice: TokenChoice) -> None:
    model, anatomy, batches, loss = made(name)
    tower = next(tower for tower in anatomy.towers if tower.modality == "language")
    masks = {index: token_masks(batch, False, placeholders(model)) for index, batch in enumerate(batches)}
    with evaluating(model), cache_disabled(model):
        driver = TowerDriver(model, tower, batches, loss)
        block = tower.blocks[0]
        for index in range(2):
            driver.enter(index)
            block = tower.blocks[index]
            sequence = sequence_of(tower, decoder_of(anatomy))
            gathered = gather(model, driver, index, block, STATISTICS["norm"], masks, sequence, choice)
            driver.run(index)
            calls, inputs = watched(model, block, batches, loss)
            maps = attention_maps(model, block, batches, loss) if choice.name == "text+attended" else None
            kept = by_hand(choice, batches, model, calls, maps)
            text = sum(int((batch["attention_mask"] == 1).sum()) for batch in batches)
            counted = sum(int(keep.sum()) for keep in kept)
            assert 0 < counted <= text
            assert counted < text or choice.name == "atv"
            for layer in block.layers:
                expected = sum(
                    x.double().reshape(*keep.shape, -1)[keep].square().sum(0)
                    for x, keep in zip(inputs[layer.name], kept, strict=True)
                )
                statistics = gathered.statistics(layer)
                assert statistics is not None
                assert statistics.tokens == sum(int(keep.sum()) for keep in kept)
                torch.testing.assert_close(statistics.norm.double(), expected.sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.name} {choice.used:g}")
def test_statistics_of_the_dense_model_know_the_choice(choice: TokenChoice) -> None:
    """Every block of the language tower; the vision tower's count all."""
    model, anatomy, batches, loss = made("pico llava")
    blocks = dense_statistics(model, anatomy, batches, loss, tokens=choice)
    found = {name: got for _, of_block in blocks for name, got in of_block.items()}
    for tower in anatomy.towers:
        for block in tower.blocks:
            calls, inputs = watched(model, block, batches, loss)
            language = tower.modality == "language"
            maps = attention_maps(model, block, batches, loss) if language else None
            kept = by_hand(choice, batches, model, calls, maps) if language else None
            for layer in block.layers:
                rows = [
                    x.double().reshape(-1, x.shape[-1]) if kept is None else x.double()[kept[index]]
                    for index, x in enumerate(inputs[layer.name])
                ]
                statistics = found[layer.name]
                assert statistics is not None
                expected = torch.cat(rows).square().sum(0).sqrt()
                torch.testing.assert_close(statistics.norm.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["norm", "gram"])
@pytest.mark.parametrize(
    ("choice", "amount"),
    [("weighted", 0.0), ("weighted", 0.3), ("weighted", 1.0), ("balanced", 0.3), ("balanced", 0.0), ("balanced", 9.0)],
)
def test_weighted_visual_tokens(kind: str, choice: str, amount: float) -> None:
    """Sums of the text's tokens and, with the weight, of the visual ones; the vision tower's count in full."""
    model, anatomy, batches, loss = made("pico llava")
    blocks = dense_statistics(model, anatomy, batches, loss, kind=kind, tokens=TokenChoice(choice, amount))
    found = {name: got for _, of_block in blocks for name, got in of_block.items()}
    known = placeholders(model)
    for tower in anatomy.towers:
        for block in tower.blocks:
            _, inputs = watched(model, block, batches, loss)
            for layer in block.layers:
                total = torch.zeros(layer.shape[1], dtype=torch.float64)
                for batch, x in zip(batches, inputs[layer.name], strict=True):
                    factors = torch.ones(x.shape[:-1], dtype=torch.float64)
                    weight = torch.tensor(amount, dtype=torch.float64)
                    if tower.modality == "language":
                        visual = token_masks(batch, False, known).image
                        assert visual is not None
                        if choice == "balanced":
                            pictures = visual.sum(1, keepdim=True)
                            weight = (
                                amount * (batch["attention_mask"].sum(1, keepdim=True) - pictures) / pictures
                            ).clamp(max=1)
                        factors = torch.where(visual, weight, batch["attention_mask"].double())
                    total += (x.double().square() * factors.unsqueeze(-1)).flatten(0, -2).sum(0)
                statistics = found[layer.name]
                assert statistics is not None
                torch.testing.assert_close(statistics.norm.double(), total.sqrt(), rtol=1e-4, atol=1e-6)


def test_balance() -> None:
    """Visual tokens together count as the text does; never more than one each; without a text they count in full."""
    text = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    visual = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    assert balance(text, visual, 1.0).tolist() == [0.5, 1.0, 1.0, 1.0]
    assert balance(text, visual, 0.5).tolist() == [0.25, 1.0, 1.0, 1.0]
    assert balance(text, visual, 0.2)[1] == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["pico llava", "pico blip2_t5"])
def test_only_towers_that_see_pictures_change(name: str) -> None:
    """Vision towers stay as they are, and so does what a decoder alone reads; the shared tower does not."""
    masks = []
    for choice in (TokenChoice(), TokenChoice("text")):
        model, anatomy, batches, loss = made(name)
        allocation = api.allocate(flat(anatomy), 0.5, max_sparsity=0.5)
        api.prune_to(
            model, anatomy, allocation, batches, criterion="wanda", pattern="unstructured", loss=loss, tokens=choice
        )
        masks.append({layer.name: model.get_parameter(layer.name) == 0 for layer in anatomy.layers})
    for tower in anatomy.towers:
        same = [torch.equal(masks[0][layer.name], masks[1][layer.name]) for layer in tower.layers]
        assert all(same) if tower.modality == "vision" else not all(same)


@pytest.mark.parametrize(("criterion", "expected"), [("admm", "balanced"), ("wanda", "all")])
def test_a_criterion_has_its_own_choice(criterion: str, expected: str) -> None:
    """Where none is given; a model without visual tokens is no fault then."""
    weights = {}
    for choice in (None, "all", "balanced"):
        model, anatomy, batches, loss = made("pico llava")
        for batch in batches:
            batch["attention_mask"][:, 6:] = 0  # less text than visual tokens
        api.prune(model, batches, 0.5, importance="uniform", criterion=criterion, tokens=choice, loss=loss)
        weights[choice] = torch.cat([model.get_parameter(layer.name).detach().flatten() for layer in anatomy.layers])
    assert torch.equal(weights[None], weights[expected])
    assert not torch.equal(weights["all"], weights["balanced"])
    check_choice(tokens_of(criterion), model, [{"input_ids": torch.tensor([[1, 2]])}], "pair")


def test_the_choice_reaches_sparsegpt_too() -> None:
    weights = []
    for choice in ("all", "text+top", "text+attended", "atv"):
        model, anatomy, batches, loss = made("pico llava")
        api.prune(model, batches, 0.5, importance="uniform", criterion="sparsegpt", tokens=choice, loss=loss)
        name = next(layer.name for layer in anatomy.layers if "language" in layer.name)
        weights.append(model.get_parameter(name).detach().clone())
    assert all(not torch.equal(one, other) for one, other in combinations(weights, 2))


def test_what_the_processor_says_goes_before_the_ids() -> None:
    batch = {"input_ids": torch.tensor([[5, 5, 1, 2]]), "mm_token_type_ids": torch.tensor([[0, 1, 2, 0]])}
    assert token_masks(batch, False, (5,)).image.tolist() == [[False, True, True, False]]
    del batch["mm_token_type_ids"]
    assert token_masks(batch, False, (5,)).image.tolist() == [[True, True, False, False]]
    assert token_masks(batch, False, (9,)).image is None
    assert token_masks(batch, False).image is None
    said = {"input_ids": torch.tensor([[5, 1]]), "image_embeds_position_mask": torch.tensor([[False, True]])}
    assert token_masks(said, False, (5,)).image.tolist() == [[False, True]]


def test_what_changes_nothing_is_refused() -> None:
    model, _anatomy, batches, _ = made("pico llava")
    text = [{name: value for name, value in batch.items() if name != "pixel_values"} for batch in batches]
    for batch in text:
        batch["input_ids"] = batch["input_ids"].clamp(max=placeholders(model)[0] - 1)
    with pytest.raises(CalibrationError, match="no language tower"):
        check_choice(TokenChoice("text"), model, text, "norm")
    with pytest.raises(InvalidOption, match="reads no statistics"):
        check_choice(TokenChoice("text"), model, batches, "none")
    check_choice(TokenChoice("text"), model, batches, "norm")
    check_choice(TokenChoice(), model, text, "none")
    with pytest.raises(UnknownName, match="text"):
        TokenChoice("txt")
    for name, amount in (
        ("text", 0.1),
        ("text+top", 1.5),
        ("text+top", -0.1),
        ("text+attended", 2.0),
        ("atv", -1.0),
        ("all", 0.5),
    ):
        with pytest.raises(InvalidOption, match="top_tokens"):
            TokenChoice(name, amount)
    assert IGNORED == -100


@given(st.data())
def test_the_largest_of_each_row(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    scores = torch.tensor(data.draw(st.lists(st.permutations(range(columns)), min_size=rows, max_size=rows))).float()
    among = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    )
    counts = data.draw(st.lists(st.integers(0, columns + 2), min_size=rows, max_size=rows))
    found = largest(scores, among, counts)
    for row in range(rows):
        allowed = sorted((at for at in range(columns) if among[row, at]), key=lambda at: -scores[row, at])
        assert found[row].nonzero().flatten().tolist() == sorted(allowed[: counts[row]])


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.name} {choice.used:g}")
def test_a_choice_reaches_later_uses_of_a_shared_weight(choice: TokenChoice) -> None:
    model, _, batches, loss = made("pico llava")
    layers = model.get_submodule("model.language_model.layers")
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # type: ignore[index, union-attr]
    with cache_disabled(model):
        anatomy = discover(model, batches[0], run=loss)
    tower = next(tower for tower in anatomy.towers if tower.modality == "language")
    shared = next(layer for layer in tower.blocks[0].layers if "up_proj" in layer.name)
    assert [alias.split(".mlp")[0] for alias in shared.aliases] == [tower.blocks[1].name]
    expected, tokens = torch.zeros(shared.shape[1], dtype=torch.float64), 0
    for block in tower.blocks[:2]:
        place = replace(shared, module=f"{block.name}.mlp.up_proj")
        maps = attention_maps(model, block, batches, loss) if choice.name == "text+attended" else None
        calls, inputs = watched(model, Block(block.name, block.tower, 0, (place,)), batches, loss)
        for x, keep in zip(inputs[shared.name], by_hand(choice, batches, model, calls, maps), strict=True):
            expected += x[keep].double().square().sum(dim=0)
            tokens += int(keep.sum())
    for block, found in dense_statistics(model, anatomy, batches, loss, tokens=choice):
        if block == tower.blocks[0]:
            statistic = found[shared.name]
            break
    assert statistic is not None
    assert statistic.tokens == tokens
    torch.testing.assert_close(statistic.norm.double() ** 2, expected, rtol=1e-4, atol=1e-6)

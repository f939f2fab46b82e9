"""How many real tokens each expert gets: counted by running the router by hand, in inspect and in a walk alike."""

from __future__ import annotations

import io
from pathlib import Path

import picos
import pytest
import torch
from console import prose
from families.matrix import allocation_of
from families.moe import mixture_of_modules
from families.stacked import EXPERTS, batches, build
from rich.console import Console
from torch import Tensor, nn

from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.cli.anatomy_tables import anatomy_tables, experts_tables
from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.pruning.prune import PruningOptions, prune_layers
from ecoflap.report.mixtures import mixture_rows
from ecoflap.run.commands import inspect_model
from ecoflap.run.journal import BlockFiles
from ecoflap.run.recipe import Recipe
from ecoflap.statistics.routing import by_mixture, routing
from ecoflap.support.work import Work

PATH = "model.layers.0.mlp.experts"


@torch.no_grad()
def chosen(model: nn.Module, data: list[dict[str, Tensor]]) -> list[int]:
    """How often each expert is among the two that the router of the first block likes best, padding left out."""
    received: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    for batch in data:
        model(**batch)
    handle.remove()
    tokens = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(received, data, strict=True)])
    best = (tokens @ model.model.layers[0].mlp.gate.weight.T).topk(2, dim=1).indices
    return best.flatten().bincount(minlength=EXPERTS).tolist()


def test_tokens_of_each_expert_are_those_that_its_router_sends() -> None:
    model, data = build("Mixtral"), batches(3)
    anatomy, run = discover(model, data[0]), default_objective(model)
    expected = {PATH: {f"{PATH}[{number}]": count for number, count in enumerate(chosen(model, data))}}
    assert routing(model, anatomy, data, run) == expected
    assert sum(expected[PATH].values()) == 2 * sum(int(batch["attention_mask"].sum()) for batch in data)
    walked = prune_layers(
        model, anatomy, allocation_of(anatomy, uniform=True), data, PruningOptions("wanda"), AllocationOptions(),
        Work(run),
    )  # fmt: skip
    assert by_mixture(anatomy.layers, walked.tokens) == expected  # they enter the only block, which is dense till then


def test_experts_that_are_modules_are_counted_too() -> None:
    model = mixture_of_modules()
    data = [{**batch, "input_ids": batch["input_ids"].clamp(max=60)} for batch in batches(2)]
    found = routing(model, discover(model, data[0]), data, default_objective(model))
    assert list(found) == ["model.layers.1.mlp.experts"]
    counts = found["model.layers.1.mlp.experts"]
    assert list(counts) == [f"model.layers.1.mlp.experts.{number}" for number in range(4)]
    assert sum(counts.values()) == 2 * sum(int(batch["attention_mask"].sum()) for batch in data)


def test_a_kept_block_keeps_its_tokens(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path)
    weights = {"a": torch.randn(3, 4)}
    files.save("with", PrunedBlock(weights, ("a",), {"m[0]": 7, "m[1]": 0}))
    files.save("without", PrunedBlock(weights, ()))
    found = files.load("with")
    assert found is not None
    assert (found.unreached, dict(found.tokens)) == (("a",), {"m[0]": 7, "m[1]": 0})
    assert (again := files.load("without")) is not None
    assert not again.tokens


@pytest.mark.parametrize("name", ["mixture.experts", "m"])
def test_rows_tell_shares_and_who_is_never_chosen(name: str) -> None:
    stacked = mixture_rows({name: {f"{name}[0]": 6, f"{name}[1]": 0, f"{name}[2]": 2}})[0]
    assert (stacked.experts, stacked.tokens, stacked.idle) == (3, 8, ("1",))
    assert (stacked.least, stacked.median, stacked.most) == (0, 0.25, 0.75)
    modules = mixture_rows({name: {f"{name}.0": 0, f"{name}.1": 0}})[0]
    assert (modules.tokens, modules.idle, modules.most) == (0, ("0", "1"), 0)


def test_inspect_shows_what_routers_choose(tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path / "model")
    picos.tokenizer().save_pretrained(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), calibration=str(prose(tmp_path / "prose.txt")), samples=4, batch_size=2,
        sequence_length=16,
    )  # fmt: skip
    anatomy, _, found = inspect_model(recipe)
    assert list(found) == [PATH]
    assert sum(found[PATH].values()) == 2 * 4 * 16
    assert list(experts_tables({})) == []
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(*anatomy_tables(anatomy, ""), *experts_tables(found))
    assert f"{PATH}: 4" in console.export_text()

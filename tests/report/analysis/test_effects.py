"""Block scores of estimates, exact block norms against autograd, sparsities against the allocation itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from subjects import Given

import ecoflap
from ecoflap.importance.scores import Estimate, Importance, Score
from ecoflap.model.parts import Layer
from ecoflap.report.analysis import effects
from ecoflap.report.analysis.effects import DRAWS, EPSILONS, Estimates, allocations, compute, exact_blocks
from ecoflap.report.analysis.importance import block_scores
from ecoflap.run.recipe import Recipe


def _layers() -> list[Layer]:
    sizes = {"a.0": [(4, 4), (2, 4)], "a.1": [(4, 8)], "b.0": [(2, 2), (2, 3)]}
    return [
        Layer(
            f"{block}.l{n}.weight", f"{block}.l{n}", block, block[0], {"a": "vision", "b": "language"}[block[0]], shape
        )
        for block, shapes in sizes.items()
        for n, shape in enumerate(shapes)
    ]


def test_block_scores_of_block_probes() -> None:
    journal, generator = Estimates(), np.random.default_rng(0)
    layers = _layers()
    values = {(layer.name, b, d): generator.normal() for layer in layers for b in range(3) for d in range(4)}
    for key, value in values.items():
        journal.append(Estimate(*key, value))
    for batches, draws in ((1, 1), (1, 4), (3, 2)):
        expected = []
        for block in ("a.0", "a.1", "b.0"):
            projections = [
                abs(sum(values[layer.name, b, d] for layer in layers if layer.block == block))
                for b in range(batches)
                for d in range(draws)
            ]
            expected.append(sum(projections) / len(projections))
        assert journal.blocks(layers, batches, draws) == pytest.approx(expected)


def test_exact_norms_are_autograds() -> None:
    made = Given("t5")
    journal = Estimates()
    ecoflap.measure_importance(
        made.model, made.batches, "gradient-norm", loss=made.objective, anatomy=made.anatomy, journal=journal
    )
    found = exact_blocks(journal.values, made.anatomy.layers, len(made.batches))
    norms: dict[str, list[float]] = {block.name: [] for block in made.anatomy.blocks}
    for batch in made.batches:
        made.model.zero_grad()
        made.model(**batch).loss.backward()
        for block in made.anatomy.blocks:
            gradients = [made.model.get_parameter(layer.name).grad for layer in block.layers]
            whole = torch.cat([g.flatten() for g in gradients if g is not None])
            norms[block.name].append(math.sqrt(2 / math.pi) * float(whole.norm()))
    assert found == pytest.approx([sum(values) / len(values) for values in norms.values()], rel=1e-4)


def test_sums_for_shares_of_a_budget_and_means_for_levels() -> None:
    layers = _layers()
    scores = {layer.name: Score(float(n + 1), 0.1 * (n + 1), 4) for n, layer in enumerate(layers)}
    summed = block_scores(Importance("zeroth-order", {}, tuple(layers), scores))
    assert {block: score.score for blocks in summed.values() for block, score in blocks.items()} == {
        "a.0": 3.0,
        "a.1": 3.0,
        "b.0": 9.0,
    }
    assert summed["a"]["a.0"].stderr == pytest.approx(math.hypot(0.1, 0.2))
    level = block_scores(Importance("owl", {"rule": "linear"}, tuple(layers), scores))
    assert (level["a"]["a.0"].score, level["b"]["b.0"].score) == (1.5, 4.5)
    assert level["b"]["b.0"].stderr == pytest.approx(math.hypot(0.4, 0.5) / 2)


def test_sparsities_are_those_of_the_allocation() -> None:
    layers = _layers()
    scores = {layer.name: Score(float(n + 1), 0.0, 1) for n, layer in enumerate(layers)}
    importance = Importance("zeroth-order", {}, tuple(layers), scores)
    shares = Recipe(sparsity=0.5).resolved().shares()
    found = allocations(shares, importance)
    assert list(found["granularity"]) == ["layer", "block", "tower"]
    assert list(found["cap"]) == ["0.5", "0.55", "0.6", "0.7", "0.8", "1"]
    for value, towers in found["cap"].items():
        direct = ecoflap.allocate(importance, 0.5, max_sparsity=float(value))
        for tower, sparsity in towers.items():
            rows = [row for row in direct.layers if row.tower == tower]
            assert sparsity == sum(row.zeros for row in rows) / sum(row.weights for row in rows)
    assert found["cap"]["0.5"] == {"a": 0.5, "b": 0.5}
    assert found["cap"]["1"]["b"] < found["cap"]["0.6"]["b"] < 0.5  # the tower with the high scores keeps more
    # A cap below what a tower must give is left out.
    assert "0.5" not in allocations({**shares, "tower_sparsity": {"a": 0.6}}, importance)["cap"]


def test_more_draws_come_nearer_and_exact_scores_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Given("llama")
    monkeypatch.setattr(effects, "SEEDS", 2)
    recipe = Recipe(sparsity=0.6).resolved()
    data = compute(SimpleNamespace(**vars(made), recipe=recipe, importance=None))  # type: ignore[arg-type]
    assert [row["value"] for row in data["effects"]["epsilon"]] == list(EPSILONS)
    assert [row["value"] for row in data["effects"]["draws"]] == list(DRAWS)
    assert [row["value"] for row in data["effects"]["samples"]] == [2, 4, 6]
    assert data["effects"]["epsilon"][EPSILONS.index(1e-3)] == {**data["effects"]["draws"][0], "value": 1e-3}
    draws = data["effects"]["draws"]
    assert draws[-1]["error"] < draws[0]["error"]
    for rows in data["effects"].values():
        assert all(-1 <= row["spearman"] <= 1 and row["stderr"] >= 0 and row["error"] >= 0 for row in rows)
    assert data["scores"] == "gradient-norm"  # this run measured none itself
    assert set(data["allocations"]["cap"]) >= {"0.6", "0.7", "1"}

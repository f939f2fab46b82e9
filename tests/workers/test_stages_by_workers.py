"""Both stages by several workers: scores, masks and models are those of one worker to the bit."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from families.matrix import allocation_of
from families.moe import mixture_of_modules
from families.stacked import build
from picos import FAMILIES
from together import together
from torch import nn

from ecoflap import api
from ecoflap.data.objectives import default_objective
from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.measure import measure_importance
from ecoflap.importance.scores import Estimate
from ecoflap.model.anatomy import discover
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.statistics.dense import dense_norms
from ecoflap.support.workers import ALONE, Workers

MIXTURES = {
    "experts": mixture_of_modules, "stacked": partial(build, "Mixtral"),
    "many": partial(build, "Mixtral", num_local_experts=24),  # the first batch does not reach all
}  # fmt: skip


def made(name: str, number: int = 10) -> tuple[nn.Module, Anatomy, list[Any]]:
    batches = FAMILIES[name if name in FAMILIES else "llama"].batches(number, 1, padding=True)
    model = MIXTURES[name]() if name in MIXTURES else FAMILIES[name].build()
    with cache_disabled(model):
        return model, discover(model, batches[0], run=default_objective(model)), batches


class Blocks:
    """A journal in memory."""

    def __init__(self, kept: dict[str, PrunedBlock] | None = None) -> None:
        self.kept = dict(kept or {})

    def load(self, block: str) -> PrunedBlock | None:
        return self.kept.get(block)

    def save(self, block: str, pruned: PrunedBlock) -> None:
        self.kept[block] = PrunedBlock({n: w.clone() for n, w in pruned.weights.items()}, pruned.unreached)


def pruned(workers: Workers, name: str, criterion: str, journal: Blocks | None = None, **options: Any) -> list[Any]:
    model, anatomy, batches = made(name)
    allocation, unreached = api.prune_to(
        model, anatomy, allocation_of(anatomy), batches, criterion=criterion, journal=journal, workers=workers,
        **options,
    )  # fmt: skip
    return [fingerprint(model), allocation, unreached]


@lru_cache
def by_one(name: str, criterion: str, tokens: str | None = None) -> list[Any]:
    return together(1, lambda workers: pruned(workers, name, criterion, tokens=tokens))[0]


@pytest.mark.parametrize(
    ("name", "criterion", "count"),
    [("llama", "wanda", 2), ("llama", "wanda", 9), ("llama", "sparsegpt", 3), ("llama", "sparsegpt", 4),
     ("blip2_t5", "sparsegpt", 2), ("experts", "wanda", 3), ("experts", "sparsegpt", 9), ("gpt2", "wanda", 2),
     ("llama", "admm", 2), ("blip2_t5", "admm", 4), ("experts", "admm", 9),
     ("stacked", "wanda", 3), ("stacked", "sparsegpt", 9), ("many", "admm", 2),
     ("llama", "magnitude", 2), ("llama", "iterative-gradient", 2)],
)  # fmt: skip
def test_the_pruned_model_is_that_of_one_worker(name: str, criterion: str, count: int) -> None:
    found = together(count, lambda workers: pruned(workers, name, criterion))
    assert found == [by_one(name, criterion)] * count


@pytest.mark.parametrize("name", ["llama", "blip2_t5"])
def test_the_recovered_model_is_that_of_one_worker(name: str) -> None:
    def recovered(workers: Workers) -> list[Any]:
        dense, _, batches = made(name)
        model, anatomy, _ = made(name)
        api.prune_to(model, anatomy, allocation_of(anatomy), [], criterion="magnitude")
        before = fingerprint(model)
        found = api.recover(model, dense, batches, workers=workers)
        assert fingerprint(model) != before
        return [fingerprint(model), found.allocation, found.unreached]

    one = together(1, recovered)
    assert together(2, recovered) == one * 2
    assert together(3, recovered) == one * 3


@pytest.mark.parametrize("tokens", ["text", "text+top", "text+attended", "atv"])
def test_the_choice_of_tokens_is_that_of_all_batches(tokens: str) -> None:
    found = together(3, lambda workers: pruned(workers, "llava", "wanda", tokens=tokens))
    assert found == [by_one("llava", "wanda", tokens)] * 3
    assert found[0][0] != by_one("llava", "wanda")[0]


def test_workers_go_on_from_the_blocks_of_others() -> None:
    kept = Blocks()
    whole = pruned(ALONE, "blip2_t5", "wanda", kept)
    some = dict(list(kept.kept.items())[:2])
    journals = [Blocks(some), Blocks(some)]
    assert together(2, lambda workers: pruned(workers, "blip2_t5", "wanda", journals[workers.rank])) == [whole] * 2
    for journal in journals:
        assert journal.kept.keys() == kept.kept.keys()
        for block, found in journal.kept.items():
            assert all(torch.equal(weight, kept.kept[block].weights[n]) for n, weight in found.weights.items())


def test_what_one_worker_can_not_compute_ends_all() -> None:
    def work(workers: Workers) -> None:
        model, anatomy, batches = made("llama")
        with torch.no_grad():
            model.get_input_embeddings().weight[int(batches[-1]["input_ids"][0, 1])] = torch.nan
        api.prune_to(model, anatomy, allocation_of(anatomy), batches, criterion="wanda", workers=workers)

    with pytest.raises(NonFiniteLoss, match="NaN"):
        together(2, work)


class Estimates:
    def __init__(self, kept: tuple[Estimate, ...] = ()) -> None:
        self.kept = list(kept)
        self.new: list[Estimate] = []

    def estimates(self) -> tuple[Estimate, ...]:
        return tuple(self.kept)

    def append(self, estimate: Estimate) -> None:
        self.new.append(estimate)


MEASURES: dict[str, dict[str, Any]] = {
    "zeroth-order": {},
    "zeroth-order block": {"probe": "block"},
    "gradient-norm": {},
    "first-order": {"variant": "fisher"},
    "owl": {},
    "alphapruning": {},
    "dlp": {},
    "sensitivity": {"levels": "0.4,0.6"},
}


def measured(workers: Workers, measure: str, journal: Estimates | None = None) -> Any:
    model, anatomy, batches = made("llama", 4)
    return measure_importance(
        model, batches, measure.split()[0], anatomy=anatomy, journal=journal, workers=workers, seed=3,
        **MEASURES[measure],
    ).to_json()  # fmt: skip


@pytest.mark.parametrize("measure", MEASURES)
def test_scores_are_those_of_one_worker(measure: str) -> None:
    whole = Estimates()
    one = together(1, lambda workers: measured(workers, measure, whole))[0]
    for count in (2, 3):
        journals = [Estimates() for _ in range(count)]
        assert together(count, lambda w, j=journals: measured(w, measure, j[w.rank])) == [one] * count
        written = [estimate for journal in journals for estimate in journal.new]
        assert sorted(written, key=repr) == sorted(whole.new, key=repr)  # each by one worker
        if measure in ("zeroth-order", "sensitivity"):
            assert min(len(journal.new) for journal in journals) > 0.6 * len(written) / count
    # A resumed run with another number of workers, from what some of them had written.
    some = tuple(whole.new[1::3])
    journals = [Estimates(some) for _ in range(4)]
    assert together(4, lambda w: measured(w, measure, journals[w.rank])) == [one] * 4
    assert not set(some) & {estimate for journal in journals for estimate in journal.new}


def test_dense_statistics_are_known_to_all_workers() -> None:
    def norms(workers: Workers) -> dict[str, torch.Tensor]:
        model, anatomy, batches = made("t5", 9)
        found = dense_norms(model, anatomy, batches, default_objective(model), workers=workers)
        return {name: one.norm for name, one in found.items()}

    one = together(1, norms)[0]
    for other in together(2, norms) + together(5, norms):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options", [{"criterion": "wanda"},
                {"criterion": "sparsegpt", "by": "probes", "granularity": "block", "swaps": 3, "rounds": 1},
                {"criterion": "wanda", "metric": "loss"}, {"criterion": "sparsegpt", "inputs": "both", "rounds": 1}],
)  # fmt: skip
def test_the_search_ends_with_the_allocation_of_one_worker(options: dict[str, Any]) -> None:
    chosen = {name: value for name, value in options.items() if name != "criterion"}

    def search(workers: Workers) -> list[Any]:
        model, _, batches = made("llama", 5)
        result = api.prune(
            model, batches, 0.5, importance="gradient-norm", criterion=options["criterion"], search=True,
            search_options={"rounds": 2, **chosen}, workers=workers,
        )  # fmt: skip
        assert result.importance is not None
        return [fingerprint(model), result.allocation, result.importance.to_json()]

    assert together(3, search) == together(1, search) * 3

"""Who does what: everything is done once, and sums do not depend on who makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from together import together

from ecoflap.model.parts import Layer
from ecoflap.statistics.collect import assign_layers
from ecoflap.statistics.inputs import InputGram, InputNorm
from ecoflap.support.processes import pack, unpack
from ecoflap.support.workers import GROUPS, Workers, launched, part, share_of


@given(st.integers(0, 50), st.integers(1, 12))
def test_parts_cover_all_once_in_order(count: int, parts: int) -> None:
    found = [part(count, parts, number) for number in range(parts)]
    assert [one for each in found for one in each] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(st.integers(0, 60), st.integers(1, 12))
def test_shares_are_whole_groups_that_do_not_depend_on_the_workers(batches: int, count: int) -> None:
    shares = [share_of(batches, Workers(rank, count)) for rank in range(count)]
    assert [number for share in shares for number in share.batches] == list(range(batches))
    groups = [group for share in shares for group in share.groups]
    assert tuple(groups) == share_of(batches, Workers()).groups
    assert groups == sorted(groups)
    assert len(set(groups)) == min(GROUPS, batches)
    for share in shares:
        others = [group for other in shares if other is not share for group in other.groups]
        assert not set(share.groups) & set(others)


@given(st.integers(0, 2**32), st.integers(1, 20), st.sampled_from([InputNorm, InputGram]))
def test_a_statistic_is_the_sum_of_its_groups_sums(seed: int, batches: int, kind: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(3, 5, generator=generator) * 10**number for number in range(-1, 2) for _ in range(batches)]
    share = share_of(len(inputs), Workers())
    found = kind(5)
    for x, group in zip(inputs, share.groups, strict=True):
        found.begin(group)
        found.update(x)
    found.close()
    total = None
    for group in dict.fromkeys(share.groups):
        one = kind(5)
        for x, its in zip(inputs, share.groups, strict=True):
            if its == group:
                one.update(x)
        total = one._sum if total is None else total + one._sum
    assert torch.equal(found._sum, total)
    assert found.tokens == 3 * len(inputs)
    exact = torch.cat(inputs).double().square().sum(0).sqrt()
    torch.testing.assert_close(found.norm.double(), exact, rtol=1e-5, atol=0)


def test_layers_of_one_input_have_one_keeper_and_loads_are_even() -> None:
    def layer(name: str, rows: int, columns: int) -> Layer:
        return Layer(name=name, module=name, block="b", tower="t", modality="language", shape=(rows, columns))

    layers = [layer("q", 8, 8), layer("k", 8, 8), layer("o", 8, 8), layer("up", 32, 8), layer("down", 8, 32),
              layer("lost", 4, 4)]  # fmt: skip
    owners = {"q": "q", "k": "q", "o": "o", "up": "up", "down": "down"}
    assert assign_layers(owners, layers, 1) == dict.fromkeys(["q", "k", "o", "up", "down", "lost"], 0)
    two = assign_layers(owners, layers, 2)
    assert two["q"] == two["k"]
    assert {name for name, rank in two.items() if rank == two["down"]} - {"lost"} == {"down"}  # as dear as all others
    assert two["lost"] == 0
    four = assign_layers(owners, layers, 4)
    assert len({four[name] for name in ("q", "o", "up", "down")}) == 4


def test_what_workers_tell_each_other_keeps_every_bit() -> None:
    tensors = [torch.randn(3, 2, dtype=torch.bfloat16), torch.tensor(1e-40), torch.zeros(0, 3), torch.arange(3)]
    view = torch.randn(4, 4)
    tree = {"a": [1, 2.0 / 3, -0.0, float("inf"), None, "\0tensor ö"], "b": {"c": tensors}, "d": [view, view.t()]}
    found = unpack(pack(tree))
    assert found["a"] == tree["a"]
    for one, other in zip((*tensors, view, view.t()), (*found["b"]["c"], *found["d"]), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert unpack(pack(float("nan"))) != unpack(pack(float("nan")))
    with pytest.raises(TypeError, match="strings"):
        pack({1: 2})


def test_everyone_is_told_the_same() -> None:
    def work(workers: Workers) -> list[Any]:
        return [workers.gather(workers.rank), workers.broadcast(workers.rank), workers.from_first(lambda: workers.rank),
                workers.map_parts(5, lambda number: [number, workers.count])]  # fmt: skip

    for count in (1, 2, 3):
        spaced = [[number, count] for number in range(5)]
        assert together(count, work) == [[list(range(count)), 0, 0, spaced]] * count


def test_who_this_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() is None  # a batch system's own names: nobody can be reached
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert launched() == Workers(3, 4, 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Workers(3, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert launched() is None

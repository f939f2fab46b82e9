"""The allocation as a file: what is written is read back, edits by hand count, bad ones are refused by name."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from typing import Any

import pytest

from ecoflap.allocation import Allocation, LayerSize, SearchRecord, allocate
from ecoflap.errors import InvalidOption, UnknownName


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.6, 1.0])
def test_round_trip(sparsity: float) -> None:
    rng = random.Random(0)
    sizes = [(rng.randint(1, 10**9), rng.randint(1, 30)) for _ in range(50)]
    layers = [
        LayerSize(f"l{i}", "t", f"b{i // 3}", out * columns, rng.random(), "vision", (out, columns) if i % 2 else None)
        for i, (out, columns) in enumerate(sizes)
    ]
    allocation = allocate(layers, sparsity=sparsity).with_achieved({"l0": 0.25})
    assert (allocation["l0"].achieved, allocation["l1"].achieved) == (0.25, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Allocation.from_json(json.loads(json.dumps(allocation.to_json(), allow_nan=False))) == allocation


def test_round_trip_of_a_search() -> None:
    record = SearchRecord("kl", (0.5, 0.25), ("start", "block 1"), {"a": 40, "c": 110}, {"b": -0.125})
    searched = replace(Allocation.from_json(written()), search=record)
    data = json.loads(json.dumps(searched.to_json(), allow_nan=False))
    assert data["search"] == {
        "metric": "kl",
        "losses": [0.5, 0.25],
        "rounds": ["start", "block 1"],
        "given": {"a": 40, "c": 110},
        "costs": {"b": -0.125},
    }
    assert Allocation.from_json(data) == searched


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"losses": [0.5]}, "1 losses of 2 rounds"),
        ({"losses": [], "rounds": []}, "0 losses of 0 rounds"),
        ({"losses": [0.5, "low"]}, "must be numbers"),
        ({"losses": [0.5, float("nan")]}, "must be numbers"),
        ({"costs": {"b": None}}, "must be numbers"),
        ({"given": {"a": 0.5}}, "must be numbers"),
        ({"given": {"a": -1}}, "must be numbers"),
        ({"costs": [1]}, "'costs' must be an object"),
        ({"metric": 3}, "'metric' must be a text"),
    ],
)
def test_a_broken_search_is_named(wrong: dict[str, Any], said: str) -> None:
    record = SearchRecord("kl", (0.5, 0.25), ("start", "block 1"), {"a": 40}, {"b": 0.1})
    with pytest.raises(InvalidOption, match=f"allocation: search.*{said}"):
        Allocation.from_json(written() | {"search": record.to_json() | wrong})


def test_schema() -> None:
    data = written()
    rows = data.pop("layers")
    assert data == {
        "format": 1,
        "sparsity": 0.5,
        "max_sparsity": 0.6,
        "granularity": "block",
        "aggregate": "sum",
        "pattern": "unstructured",
        "rule": "proportional",
        "total_weights": 300,
        "zeros": 150,
    }
    assert rows[0] == {
        "name": "a",
        "tower": "t",
        "modality": "vision",
        "block": "b",
        "shape": [10, 10],
        "weights": 100,
        "zeros": 50,
        "sparsity": 0.5,
        "achieved": None,
    }


def written() -> dict[str, Any]:
    layers = [
        LayerSize("a", "t", "b", 100, 1.0, "vision", (10, 10)),
        LayerSize("c", "t", "b", 200, 2.0, "vision", None),
    ]
    data: dict[str, Any] = allocate(layers, sparsity=0.5).to_json()
    return data


def test_edited_by_hand() -> None:
    data = written()
    data["layers"][0] |= {"zeros": 70, "sparsity": 0.7}
    del data["layers"][1]["zeros"]
    data["layers"][1]["sparsity"] = 0.123
    allocation = Allocation.from_json(data)
    assert (allocation["a"].zeros, allocation["c"].zeros, allocation.zeros) == (70, 25, 95)
    data["layers"][0]["zeros"] = 60
    with pytest.warns(UserWarning, match="layer 'a': 'zeros' 60 counts, 'sparsity' 0.7 is ignored"):
        assert Allocation.from_json(data)["a"].zeros == 60
    with pytest.raises(UnknownName, match="layer 'd'"):
        allocation["d"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"zeros": 101}, "layer 'a': zeros must be from 0 to its 100 weights, not 101"),
        ({"zeros": -1}, "zeros must be from 0"),
        ({"zeros": 10.5}, "'zeros' must be a whole number, not 10.5"),
        ({"zeros": None}, "'zeros' must be a whole number"),
        ({"sparsity": 1.5}, "layer 'a': sparsity must be a number from 0 to 1"),
        ({"shape": [10, 11]}, "does not have 100 weights"),
        ({"shape": 100}, "'shape' must be a list"),
        ({"weights": "100"}, "'weights' must be a whole number"),
        ({"name": "c"}, "'c' appears 2 times"),
        ({"name": None}, "layer 1: 'name'"),
    ],
)
def test_bad_edits_of_a_layer(edit: dict[str, Any], message: str) -> None:
    data = written()
    data["layers"][0] |= edit
    with pytest.raises(InvalidOption, match=message):
        Allocation.from_json(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": 2}, "'format' must be 1"),
        ({"layers": {}}, "'layers' must be a list"),
        ({"layers": [3]}, "layer 1: 'name'"),
        ({"sparsity": None}, "sparsity must be a number"),
        ({"total_weights": 301}, "total_weights is 301 but the layers have 300"),
        ({"pattern": "2:4", "sparsity": 0.5}, "layer 'c': pattern 2:4 makes 100 zeros of 200"),
    ],
)
def test_bad_edits_of_the_file(edit: dict[str, Any], message: str) -> None:
    data = written()
    data["layers"][1] |= {"zeros": 101, "sparsity": 0.505}
    data["layers"][0] |= {"zeros": 0, "sparsity": 0.0}
    with pytest.raises(InvalidOption, match=message):
        Allocation.from_json({**data, **edit})


def test_neither_zeros_nor_sparsity() -> None:
    data = written()
    del data["layers"][0]["zeros"], data["layers"][0]["sparsity"]
    with pytest.raises(InvalidOption, match="give 'zeros' or 'sparsity'"):
        Allocation.from_json(data)


def test_the_share_of_the_whole_model_where_it_is_known() -> None:
    allocation = allocate([LayerSize("a", "t", "b", 100, 1.0), LayerSize("c", "t", "d", 200, 1.0)], sparsity=0.5)
    assert "model_sparsity" not in allocation.to_json()
    known = replace(allocation, model_parameters=600)
    data = json.loads(json.dumps(known.to_json()))
    assert data["model_sparsity"] == 0.25
    assert Allocation.from_json(data) == known
    for wrong in (299, "600", 1.5):
        with pytest.raises(InvalidOption, match="model_parameters"):
            Allocation.from_json({**data, "model_parameters": wrong})

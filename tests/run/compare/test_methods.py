"""Methods, sparsities and seeds as the command line writes them."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecoflap.errors import EcoflapError, InvalidOption, UnknownName
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.pruning.registry import CRITERIA
from ecoflap.run.compare.methods import parse_method, split_methods
from ecoflap.run.compare.recipe import DEFAULT_METHODS, Grid, parse_sparsities
from ecoflap.support.registry import entry

LOCAL = ["wanda", "sparsegpt", "magnitude"]
OPTIONS = {
    "granularity": ["block", "layer", "tower"],
    "max_sparsity": ["0.9", "0.95"],
    "budget": ["global", "tower"],
    "tower_sparsity": ["vision=0.4", "language=0.6"],
    "recover": ["true", "false"],
    "importance_samples": ["4", "16"],
}


@st.composite
def written(draw: st.DrawFn) -> str:
    """A method in one of the ways that it may be written."""
    importance, criterion = draw(st.sampled_from(["zeroth-order", "owl", "uniform"])), draw(st.sampled_from(LOCAL))
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True))
    options = [f"{name}={draw(st.sampled_from(OPTIONS[name]))}" for name in names]
    core = criterion if importance == "uniform" and draw(st.booleans()) else f"{importance}+{criterion}"
    return core + (":" + ",".join(options) if options else "")


@given(written())
@settings(deadline=None)
def test_a_name_reads_back_as_itself(text: str) -> None:
    method = parse_method(text)
    assert parse_method(method.name) == method
    assert parse_method(method.name).name == method.name
    head, _, rest = text.partition(":")
    assert method.importance in ("uniform", head.partition("+")[0])
    assert method.criterion == head.rpartition("+")[2]
    assert sorted(method.name.partition(":")[2].split(",")) == sorted(rest.split(","))  # no option lost or made up


@given(st.lists(written(), min_size=1, max_size=5))
@settings(deadline=None)
def test_methods_in_one_text_are_the_same_as_one_by_one(texts: list[str]) -> None:
    assert split_methods([",".join(texts)]) == texts
    assert split_methods(texts) == texts
    assert Grid.parse({"methods": ",".join(texts)}).methods == tuple(dict.fromkeys(parse_method(t).name for t in texts))


def test_one_name_alone() -> None:
    for name in LOCAL:
        method = parse_method(name)
        assert (method.importance, method.criterion, method.name) == ("uniform", name, name)
    assert parse_method("uniform+wanda").name == "wanda"
    for name in IMPORTANCES:
        assert parse_method(name).criterion == "admm"
    assert parse_method("runs/first/importance.json+sparsegpt").importance == "runs/first/importance.json"


def test_where_an_option_belongs() -> None:
    method = parse_method("first-order+sparsegpt:variant=fisher,damping=0.1,granularity=layer,max_sparsity=0.90")
    assert method.importance_options == {"variant": "fisher"}
    assert method.criterion_options == {"damping": 0.1}
    assert method.fields == {"granularity": "layer", "max_sparsity": 0.9}
    assert method.name == "first-order+sparsegpt:damping=0.1,granularity=layer,max_sparsity=0.9,variant=fisher"
    assert method.title == "first-order + sparsegpt (damping 0.1, granularity layer, max_sparsity 0.9, variant fisher)"
    search = parse_method("uniform+wanda:search=true,search_options=rounds=2,search_options=granularity=block")
    assert search.fields == {"search": True, "search_options": {"rounds": 2, "granularity": "block"}}
    assert search.name == "wanda:search=true,search_options=rounds=2,search_options=granularity=block"
    assert parse_method(search.name) == search
    towers = parse_method("wanda:tower_sparsity=vision=0.4,tower_sparsity=language=0.6")
    assert towers.fields == {"tower_sparsity": {"vision": 0.4, "language": 0.6}}


def test_every_method_of_the_defaults_has_a_paper() -> None:
    from ecoflap.run.citations import CITATIONS

    for name in DEFAULT_METHODS:
        method = parse_method(name)
        assert method.citations
        assert all(CITATIONS[key].key == key for key in method.citations)
    assert len(parse_method("owl+sparsegpt").citations) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wnda", ["unknown method 'wnda'", "did you mean 'wanda'?"]),
        ("zeroth+wanda", ["unknown importance 'zeroth'"]),
        ("zeroth-order+wand", ["unknown criterion 'wand'", "did you mean 'wanda'?"]),
        ("wanda+owl", ["the importance comes first: owl+wanda"]),
        ("", ["IMPORTANCE+CRITERION"]),
        ("wanda:", ["missing after the colon"]),
        ("wanda:granularity", ["no NAME=VALUE"]),
        ("wanda:granularity=", ["no NAME=VALUE"]),
        ("wanda:granularity=blok", ["granularity", "'block', 'expert', 'layer' or 'tower'"]),
        ("wanda:max_sparsity=lots", ["max_sparsity", "not a number"]),
        ("wanda:tower_sparsity=0.4", ["tower_sparsity=NAME=VALUE"]),
        ("zeroth-order+wanda:drws=8", ["'drws'", "did you mean 'draws'?"]),
        ("wanda:draws=8", ["unknown option of method 'wanda'"]),
        ("wanda:seed=1", ["--seeds"]),
        ("wanda:sparsity=0.3", ["--sparsities"]),
        ("wanda:task=vqa", ["the same for all methods"]),
        ("wanda:importance=owl", ["IMPORTANCE+CRITERION"]),
    ],
)
def test_what_is_no_method(text: str, words: list[str]) -> None:
    with pytest.raises(EcoflapError) as caught:
        parse_method(text)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 40))
def test_steps_are_exact_and_have_both_ends(first: int, last: int, step: int) -> None:
    assume(first <= last)
    found = parse_sparsities([f"{Decimal(first) / 100}:{Decimal(last) / 100}:{Decimal(step) / 100}"])
    assert found == tuple(int(n) / 100 for n in range(first, last + 1, step))  # the nearest float of each decimal
    if (last - first) % step == 0:
        assert found[-1] == last / 100


def test_sparsities_as_people_write_them() -> None:
    assert parse_sparsities(["0.3:0.7:0.1"]) == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert parse_sparsities(["0.6,0.5", 0.55, "0.50"]) == (0.5, 0.55, 0.6)
    assert Grid.parse({"sparsities": [0.7, 0.1]}).sparsities == (0.1, 0.7)
    assert Grid.parse({"sparsities": 0.4}).sparsities == (0.4,)
    assert Grid.parse({"seeds": "2,0,2"}).seeds == (2, 0)
    assert Grid.parse({"seeds": [1, 5]}).seeds == (1, 5)


@pytest.mark.parametrize(
    "values",
    [
        {"sparsities": v}
        for v in ("x", "1", "-0.1", "0.5:0.6", "0.6:0.5:0.1", "0.1:0.2:0", "nan", "0.1:0.9:1e-9", "", [])
    ]
    + [{"seeds": v} for v in ("x", "-1", "1.5", "", [])]
    + [{"methods": v} for v in ([], 3, [1])],
)
def test_what_is_no_grid(values: dict[str, object]) -> None:
    (name,) = values
    with pytest.raises(InvalidOption, match=name):
        Grid.parse(values)


def test_the_recipe_of_a_cell() -> None:
    grid = Grid.parse({"methods": "owl+sparsegpt:granularity=layer", "sparsities": 0.6, "seeds": 3, "samples": 16})
    (place,) = grid.places()
    recipe = grid.recipe_of(place)
    assert (recipe.importance, recipe.criterion, recipe.granularity) == ("owl", "sparsegpt", "layer")
    assert (recipe.sparsity, recipe.seed, recipe.samples, recipe.importance_samples) == (0.6, 3, 16, 16)


def test_a_grid_reads_back_from_its_own_file() -> None:
    grid = Grid.parse(
        {"methods": "owl,wanda:granularity=layer", "sparsities": "0.3:0.5:0.1", "samples": 8, "seeds": "4"}
    )
    again = Grid.parse(grid.to_dict())
    assert again.to_dict() == grid.to_dict()
    assert [again.recipe_of(place) for place in again.places()] == [grid.recipe_of(place) for place in grid.places()]


def test_options_of_one_method_are_no_options_of_all() -> None:
    with pytest.raises(InvalidOption, match=r"belong to a method, as in zeroth-order\+admm:draws=8"):
        Grid.parse({"importance_options": {"draws": 8}})
    with pytest.raises(InvalidOption, match="makes its own allocations"):
        Grid.parse({"allocation": "allocation.json"})


def test_registries_are_asked_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName):
        parse_method("brandnew+wanda")
    monkeypatch.setitem(IMPORTANCES._entries, "brandnew", entry("ecoflap.importance.base:Uniform"))
    monkeypatch.setitem(CRITERIA._entries, "brandrule", entry("ecoflap.pruning.wanda:Wanda"))
    assert parse_method("brandnew+brandrule").name == "brandnew+brandrule"

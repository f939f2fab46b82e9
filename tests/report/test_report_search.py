"""What the page says of an allocation search, with the numbers of the file; and nothing where there was none."""

import pytest
from pages import ATTACK, Page, assert_safe, read
from synthetic import allocation, searched, write_run

from ecoflap.errors import InvalidOption
from ecoflap.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(read(write_report(write_run(tmp_path_factory.mktemp("run"), allocation=searched()))))


def test_the_losses_are_those_of_the_file(page):
    search = searched()["search"]
    line = page.figures["search0"]["data"][0]
    assert line["y"] == search["losses"]
    assert line["hovertext"][2].startswith("block 2<br>")
    assert "0.800 at the beginning, 0.241 after 4 steps" in page.words("search")


def test_each_tower_shows_its_blocks_costs(page):
    costs = searched()["search"]["costs"]
    for number, tower in enumerate(dict.fromkeys(layer["tower"] for layer in allocation()["layers"])):
        assert page.figures[f"block-cost{number}"]["data"][0]["y"] == [
            cost for block, cost in costs.items() if block.startswith(tower)
        ]
    ends = {tuple(page.figures[f"block-cost{number}"]["layout"]["yaxis"]["range"]) for number in range(3)}
    assert len(ends) == 1
    low, high = ends.pop()
    assert low <= min(costs.values()) <= max(costs.values()) <= high


def test_blocks_and_layers_say_what_they_had_before(page):
    found = searched()
    block = [layer for layer in found["layers"] if layer["block"] == "vision_model.encoder.layers.7"]
    given = sum(found["search"]["given"][layer["name"]] for layer in block) / sum(layer["weights"] for layer in block)
    bars, marks = page.figures["sparsity0"]["data"]
    assert (bars["name"], marks["name"]) == ("pruned", "before the search")
    assert marks["y"][7] == pytest.approx(given)
    assert bars["y"][7] == pytest.approx(sum(x["zeros"] for x in block) / sum(x["weights"] for x in block))
    layer = found["layers"][0]
    share = found["search"]["given"][layer["name"]] / layer["weights"]
    assert f"{100 * share:.2f} %" in page.words("layers")
    assert "Before search" in page.words("layers")


def test_a_search_that_found_nothing(tmp_path):
    found = searched(steps=1)
    found["search"]["costs"] = {}
    page = Page(read(write_report(write_run(tmp_path, allocation=found))))
    assert "and no step lowered it" in page.words("search")
    assert not any(name.startswith(("search", "block-cost")) for name in page.figures)


def test_without_a_search_nothing_is_said_of_one(tmp_path):
    page = Page(read(write_report(write_run(tmp_path))))
    assert "search" not in page.text
    assert "Before search" not in page.words("layers")
    assert len(page.figures["sparsity0"]["data"]) == 1


def test_names_in_a_search_are_text(tmp_path):
    found = searched()
    found["search"]["rounds"][1] = found["search"]["metric"] = ATTACK
    assert_safe(Page(read(write_report(write_run(tmp_path, allocation=found)))))


@pytest.mark.parametrize("wrong", [{"losses": []}, {"rounds": ["start"]}, {"costs": {"b": "much"}}])
def test_a_broken_search_is_one_line(tmp_path, wrong):
    found = searched()
    found["search"] |= wrong
    run = write_run(tmp_path, allocation=found)
    with pytest.raises(InvalidOption, match=r"allocation\.json.*search"):
        write_report(run)

from statistics import fmean, stdev

import pytest
from pages import ATTACK, Page, assert_safe, assert_self_contained, read
from synthetic import METHODS, TOWERS, comparison, write_comparison

from ecoflap.errors import InvalidOption, StorageError
from ecoflap.report import write_compare
from ecoflap.report.comparison import Comparison
from ecoflap.run.citations import CITATIONS


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return read(write_compare(write_comparison(tmp_path_factory.mktemp("compared"))))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def values(content, method, sparsity):
    cells = [c for c in content["cells"] if c["method"] == method and c["sparsity"] == sparsity]
    return [c["value"] for c in cells if c["value"] is not None]


def test_mean_and_deviation_over_the_seeds(page):
    found = values(comparison(), "owl+sparsegpt", 0.5)
    text = page.words("table")
    assert f"{100 * fmean(found):.1f} % ± {100 * stdev(found):.1f}" in text
    line = next(t for t in page.figures["quality0-0"]["data"] if t["mode"] == "lines+markers" and "OWL" in t["name"])
    assert line["x"] == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert line["y"][2] == pytest.approx(fmean(found))


def test_bands_are_as_wide_as_the_deviation(page):
    traces = page.figures["quality0-0"]["data"]
    band, line = traces[0], traces[1]
    assert band["name"] == line["name"]
    for index, sparsity in enumerate(line["x"]):
        spread = stdev(values(comparison(), "zeroth-order+wanda", sparsity))
        assert band["y"][index] == pytest.approx(line["y"][index] + spread)
        assert band["y"][-1 - index] == pytest.approx(line["y"][index] - spread)


def test_one_seed_has_the_error_over_the_samples(tmp_path):
    content = comparison(seeds=1)
    page = Page(read(write_compare(write_comparison(tmp_path, content))))
    cell = content["cells"][0]
    assert f"{100 * cell['value']:.1f} % ± 1.0" in page.words("table")


def test_dense_line_and_legend(page):
    shapes = page.figures["quality0-0"]["layout"]["shapes"]
    assert [shape["y0"] for shape in shapes] == [0.931]
    assert "dense 93.1 %" in page.words("quality")
    buttons = [found for tag, found in page.elements if tag == "button" and "data-series" in found]
    named = [found["data-series"] for found in buttons if "quality0-0" in found["data-plots"].split()]
    assert named == [title for title, *_ in METHODS.values()]
    assert all(set(found["data-plots"].split()) <= set(page.figures) for found in buttons)


def leaders_by_hand(content, sparsity):
    """The best mean, and every mean that is no further off than the two deviations together."""
    means = {name: (fmean(v), stdev(v)) for name in METHODS if (v := values(content, name, sparsity))}
    best = max(means, key=lambda name: means[name][0])
    return {
        name
        for name, (mean, spread) in means.items()
        if means[best][0] - mean <= (spread**2 + means[best][1] ** 2) ** 0.5
    }


def test_best_of_each_column_is_marked(page):
    content = comparison()
    read_back = Comparison.model_validate(content)
    marked = 0
    for sparsity in content["sparsities"]:
        expected = leaders_by_hand(content, sparsity)
        assert read_back.leaders(sparsity, read_back.each_test[0]) == expected
        marked += len(expected)
    assert page.count("td", class_="n best") == marked < 20


def test_lower_is_better_for_perplexity(tmp_path):
    content = comparison() | {"metric": "perplexity", "task": "perplexity", "higher_is_better": False}
    for cell in content["cells"]:
        cell["value"] = None if cell["value"] is None else 10 ** (4 - 3 * cell["value"])
    content["dense"] = {"value": 12.0, "stderr": 0.1, "n": 64}
    found = Comparison.model_validate(content)
    means = {name: fmean(values(content, name, 0.7)) for name in METHODS}
    assert min(means, key=lambda name: means[name]) in found.leaders(0.7, found.each_test[0])
    page = Page(read(write_compare(write_comparison(tmp_path, content))))
    axis = page.figures["quality0-0"]["layout"]["yaxis"]
    assert axis["type"] == "log"  # 12 to more than 240
    assert "lower is better" in page.text["head"]
    low = 10 ** axis["range"][0]
    assert all(value is None or value >= low * 0.999 for t in page.figures["quality0-0"]["data"] for value in t["y"])


def test_several_tests_have_a_plot_and_a_table_each(tmp_path):
    content = comparison()
    names = {"vqa": "accuracy", "text": "perplexity"}
    content["tests"] = [
        {"name": n, "task": n, "metric": m, "higher_is_better": m == "accuracy", "dense": {"value": 0.9, "n": 7}}
        for n, m in names.items()
    ]
    for cell in content["cells"]:
        if cell["value"] is not None:
            cell["tests"] = {
                "vqa": {"value": cell["value"], "stderr": 0.01, "n": 7},
                "text": {"value": 20 / cell["value"], "stderr": 0.5, "n": 7},
            }
    page = Page(read(write_compare(write_comparison(tmp_path, content))))
    assert {"quality0-0", "quality1-0"} <= set(page.figures)
    tables = [found["id"] for tag, found in page.elements if tag == "table" and "id" in found]
    assert tables == ["methods-table", "methods2-table", "cell-table"]
    first = values(comparison(), "uniform+wanda", 0.3)
    assert f"{fmean(20 / value for value in first):.2f} ±" in page.words("table")


def test_cost_per_stage_and_memory(page):
    time = page.figures["cost0"]
    assert time["layout"]["barmode"] == "stack"
    assert [trace["name"] for trace in time["data"]] == ["importance", "allocation", "pruning", "evaluation"]
    assert time["data"][0]["x"] == [40.0] * 4
    assert time["data"][2]["x"][0] == pytest.approx(9.02)
    assert page.figures["cost1"]["data"][0]["x"] == [0.7] * 4
    assert "cost2" not in page.figures  # no GPU


def test_towers_less_the_target(page):
    for index in range(len(TOWERS)):
        lines = page.figures[f"tower{index}"]["data"]
        lifts = [lift for *_, lift in METHODS.values()]
        for line, lift in zip(lines, lifts, strict=True):
            assert line["y"] == pytest.approx([lift * (1 - index)] * 5)


def test_papers_are_cited_and_linked(page):
    links = {found["href"] for tag, found in page.elements if tag == "a"}
    for key in ("wanda", "sparsegpt", "owl", "ecoflap"):
        assert CITATIONS[key].url in links
        assert CITATIONS[key].short in page.words("methods")


def test_failed_cells_are_named_and_the_rest_shown(page):
    assert "global magnitude at 70.0 %, seed 2: out of memory <at> block 3" in page.words("table")
    assert "not measured" in page.words("cells")


def test_a_column_whose_cells_all_failed(tmp_path):
    content = comparison()
    for cell in content["cells"]:
        if cell["sparsity"] == 0.7:
            cell |= {"value": None, "error": "too sparse"}
    page = Page(read(write_compare(write_comparison(tmp_path, content))))
    assert page.words("table").count("failed") == 4
    assert page.figures["quality0-0"]["data"][1]["x"] == [0.3, 0.4, 0.5, 0.6]


def test_an_unfinished_comparison_has_its_page(tmp_path):
    content = comparison() | {"cells": [], "recipe": {}, "environment": {}, "command": None}
    page = Page(read(write_compare(write_comparison(tmp_path, content))))
    assert page.figures == {}
    for section in ("quality", "table", "cost", "cells"):
        assert "not measured" in page.words(section)
    assert "not recorded" in page.words("recipe")


def test_self_contained_safe_and_the_same_again(tmp_path, html, page):
    assert_self_contained(html)
    assert_safe(page)
    path = write_compare(write_comparison(tmp_path))
    assert read(path) == html
    assert sorted(found.name for found in tmp_path.iterdir()) == ["compare.html", "compare.json"]


def test_names_are_text_never_markup(tmp_path):
    content = comparison() | {
        "model": ATTACK,
        "task": ATTACK,
        "command": ATTACK,
        "recipe": {ATTACK: ATTACK},
        "environment": {ATTACK: [ATTACK]},
    }
    for method in content["methods"]:
        method |= {"title": method["title"] + ATTACK, "options": {ATTACK: ATTACK}, "importance": ATTACK}
    for cell in content["cells"]:
        cell |= {"towers": {ATTACK: 0.5}, "seconds": {ATTACK: 1.0}}
    content["cells"][0]["error"] = ATTACK
    html = read(write_compare(write_comparison(tmp_path, content)))
    assert_safe(Page(html))
    assert ATTACK not in html


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"format": 3}, "format 3"),
        ({"methods": None}, "methods"),
        ({"sparsities": [1.5]}, r"sparsities\.0"),
        ({"cells": [{"method": "other", "sparsity": 0.5}]}, "cells of other, which methods does not name"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, change, where):
    write_comparison(tmp_path, comparison() | change)
    with pytest.raises(InvalidOption, match=where) as caught:
        write_compare(tmp_path)
    assert "compare.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_comparison(tmp_path):
    with pytest.raises(InvalidOption, match=r"holds no compare\.json"):
        write_compare(tmp_path)


def test_unwritable_page_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_compare(write_comparison(tmp_path))
    before = path.read_bytes()
    write_comparison(tmp_path, comparison(seeds=1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"compare\.html: No space left"):
        write_compare(tmp_path)
    assert path.read_bytes() == before

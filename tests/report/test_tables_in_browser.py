"""Tables of the pages in headless Chromium: sorting by pointer and keyboard, filters, CSV."""

import csv
import io
import re

from synthetic import TOWERS, allocation, importance, write_run

from ecoflap.report import write_report


def test_table_sorts_by_pointer_and_keyboard(open_tab, report):
    tab = open_tab(report)
    layers = allocation()["layers"]
    head = tab.page.locator("#layer-table thead th").nth(1)
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in tab.column("layer-table", 1)] == sorted(x["sparsity"] for x in layers)
    tab.page.keyboard.press("Enter")  # the button still has the focus
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(v) for v in tab.column("layer-table", 1)] == sorted((x["sparsity"] for x in layers), reverse=True)
    tab.page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert tab.column("layer-table", 0) == [layer["name"] for layer in layers]
    tab.page.locator("#layer-table thead th").first.locator("button").click()
    assert head.get_attribute("aria-sort") == "none"
    names = tab.column("layer-table", 0)
    vision = [name for name in names if name.startswith("vision")]
    assert [int(re.search(r"layers\.(\d+)", name)[1]) for name in vision] == sorted([*range(36), *range(36)])


def test_missing_numbers_come_last_either_way(open_tab, tmp_path):
    part = importance()
    dropped = part["layers"].pop(5)["name"]
    tab = open_tab(write_report(write_run(tmp_path, importance=part)))
    button = tab.page.locator("#layer-table thead th").nth(3).locator("button")
    for _ in range(2):
        button.click()
        assert tab.column("layer-table", 0)[-1] == dropped


def test_table_filters_by_words_and_tower(open_tab, report):
    tab = open_tab(report)
    tools = tab.page.locator(".tools")
    total = len(allocation()["layers"])
    assert tools.locator("output").inner_text() == f"{total} of {total} rows"
    tools.locator("input").fill("MLP .3")
    found = [x["name"] for x in allocation()["layers"] if "mlp" in x["name"] and ".3" in x["name"]]
    assert tab.column("layer-table", 0) == found
    assert tools.locator("output").inner_text() == f"{len(found)} of {total} rows"
    tools.locator("input").fill("")
    tools.locator("select").select_option(list(TOWERS)[2])
    assert len(tab.column("layer-table", 0)) == 8
    assert tab.page.locator("#layer-table tbody tr:visible").count() == 8


def test_csv_has_the_shown_rows_in_order_with_exact_numbers(open_tab, tmp_path):
    split = allocation()
    split["layers"][-1]["name"] = '=cmd("a"),b.wo.weight'  # a formula to a spreadsheet, with a comma and quotes
    tab = open_tab(write_report(write_run(tmp_path, allocation=split)))
    tower = list(TOWERS)[2]
    tab.page.locator(".tools select").select_option(tower)
    tab.page.locator("#layer-table thead th").nth(1).locator("button").click()
    with tab.page.expect_download() as waiting:
        tab.page.locator(".tools button").click()
    assert waiting.value.suggested_filename == "layer-table.csv"
    rows = list(csv.DictReader(io.StringIO(waiting.value.path().read_text("utf-8"))))
    wanted = sorted((x for x in split["layers"] if x["tower"] == tower), key=lambda x: x["sparsity"])
    names = [x["name"] if x["name"][0] != "=" else "'" + x["name"] for x in wanted]
    assert [row["layer"] for row in rows] == names
    assert [float(row["target"]) for row in rows] == [x["sparsity"] for x in wanted]
    assert [int(row["weights"]) for row in rows] == [x["weights"] for x in wanted]
    assert list(rows[0]) == ["layer", "target", "achieved", "score", "stderr", "weights", "shape", "modality"]


def test_six_hundred_rows_sort_at_once(open_tab, tmp_path):
    split, names = allocation(), {x["name"] for x in allocation()["layers"]}
    for copy in range(1, 8):
        split["layers"] += [x | {"name": f"copy{copy}.{x['name']}"} for x in allocation()["layers"]]
    assert len(split["layers"]) == 8 * len(names) > 600
    tab = open_tab(write_report(write_run(tmp_path, allocation=split, importance=None)))
    script = """() => { const start = performance.now();
      document.querySelector('#layer-table thead button').click(); document.body.offsetHeight;
      return performance.now() - start; }"""
    assert tab.page.evaluate(script) < 1500  # milliseconds, on a machine that does other work too

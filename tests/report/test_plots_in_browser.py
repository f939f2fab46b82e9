"""The pages in headless Chromium: no errors, plots drawn in every scheme, pictures loaded, phone and paper."""

import re

import pytest
from browsing import PHONE
from pages import ATTACK
from synthetic import (
    allocation,
    comparison,
    predictions,
    write_analyses,
    write_comparison,
    write_run,
)

from ecoflap.report import write_compare, write_report

# What each kind of plot draws for one thing of its data.
MARKS = {
    "bar": ".barlayer .point path",
    "scatter": ".scatterlayer .js-line, .scatterlayer .point",
    "heatmap": ".heatmaplayer image",
}


@pytest.mark.parametrize("which", ["report", "compared"])
def test_every_plot_is_drawn_and_none_is_empty(open_tab, request, which):
    tab = open_tab(request.getfixturevalue(which))
    tab.draw_all()
    plots = tab.page.query_selector_all(".plot")
    assert len(plots) >= 6
    for plot in plots:
        drawn = plot.evaluate(
            """(plot, marks) => {
              const live = plot.querySelector('.live');
              const shown = (mark) => [...live.querySelectorAll(mark)]
                .filter((e) => { const b = e.getBoundingClientRect(); return b.width + b.height > 0; }).length;
              return {kinds: [...new Set(live.data.map((trace) => trace.type))], height: live.clientHeight,
                      marks: Object.fromEntries(Object.entries(marks).map(([kind, mark]) => [kind, shown(mark)])),
                      still: getComputedStyle(plot.querySelector('.still')).display};
            }""",
            MARKS,
        )
        assert drawn["kinds"], plot.get_attribute("id")
        for kind in drawn["kinds"]:
            assert drawn["marks"][kind] > 0, (plot.get_attribute("id"), drawn)
        assert drawn["height"] >= 200
        assert drawn["still"] == "none"


def test_plotly_is_unpacked_for_the_first_plot_only_when_it_comes_near(open_tab, report):
    tab = open_tab(report, viewport={"width": 1280, "height": 300})
    assert tab.page.evaluate("typeof Plotly") == "undefined"
    assert tab.page.locator("#sparsity0 .still svg").count() == 1
    tab.page.locator("#sparsity0").scroll_into_view_if_needed()
    tab.page.wait_for_selector("#sparsity0 .live .main-svg")
    assert tab.page.evaluate("typeof Plotly") == "object"


def test_hover_says_which_block(open_tab, report):
    tab = open_tab(report)
    plot = tab.page.locator("#sparsity1")
    plot.scroll_into_view_if_needed()
    tab.page.wait_for_selector("#sparsity1 .live .main-svg")
    tab.page.locator("#sparsity1 .barlayer .point path").nth(2).hover(force=True)
    text = tab.page.locator("#sparsity1 .hoverlayer .hovertext")
    text.first.wait_for()
    assert "language_model.encoder.block.2" in text.first.text_content()


def test_pictures_load(open_tab, report):
    tab = open_tab(report)
    sizes = tab.page.eval_on_selector_all(".gallery img", "all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    pictured = [row for row in predictions()["tasks"]["vqa"]["rows"] if row["picture"]]
    assert sizes == [[8, 6]] * len(pictured)
    assert len(pictured) == 12


@pytest.mark.parametrize("which", ["report", "compared"])
def test_a_phone_needs_no_scrolling_sideways(open_tab, request, which):
    tab = open_tab(request.getfixturevalue(which), viewport=PHONE, is_mobile=True, has_touch=True)
    tab.draw_all()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert tab.page.evaluate("document.querySelector('#' + Object.keys(JSON.parse(figures.textContent))[0])"
                             ".querySelector('.live').layout.dragmode") is False  # fmt: skip


def test_towers_and_quality_fit_on_a_phone(open_tab, report):
    tab = open_tab(report, viewport=PHONE, is_mobile=True)
    lines = """() => [...document.querySelectorAll('.towers code')].flatMap(code => [...code.childNodes]
        .filter(part => part.nodeType === 3).map(part => { const range = document.createRange();
        range.selectNodeContents(part); return range.getClientRects().length; }))"""
    assert set(tab.page.evaluate(lines)) == {1}
    table = tab.page.locator(".towers").bounding_box()
    assert table["x"] + table["width"] <= PHONE["width"]
    cut = "tables => tables.map(table => table.parentElement.scrollWidth - table.parentElement.clientWidth)"
    assert set(tab.page.eval_on_selector_all("table.stack", cut)) == {0}  # nothing of the quality is cut off


def test_plots_follow_the_scheme(open_tab, report):
    tab = open_tab(report, color_scheme="light")
    tab.page.locator("#sparsity0").scroll_into_view_if_needed()
    bar = "#sparsity0 .live .barlayer .point path"
    tab.page.wait_for_selector(bar)
    colour = f"getComputedStyle(document.querySelector('{bar}')).fill"
    assert tab.page.evaluate(colour) == "rgb(45, 111, 180)"
    tab.page.emulate_media(color_scheme="dark")
    tab.page.wait_for_function(f"() => {colour} === 'rgb(108, 171, 236)'")
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"


def test_paper_has_the_still_drawings_and_every_row(open_tab, report):
    tab = open_tab(report, color_scheme="dark")
    tab.draw_all()
    tab.page.emulate_media(media="print")
    stills = tab.page.eval_on_selector_all(".still svg", "all => all.map(s => s.getBoundingClientRect().height)")
    assert len(stills) == len(tab.page.query_selector_all(".plot"))
    assert min(stills) > 50
    assert tab.page.locator(".live:visible").count() == 0
    assert tab.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    table = tab.page.locator("#layer-table").bounding_box()
    frame = tab.page.locator(".tall").bounding_box()
    assert frame["height"] >= table["height"] > 1500
    pdf = tab.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", pdf)) >= 5


def test_without_scripts_the_page_is_whole(open_tab, report):
    tab = open_tab(report, java_script_enabled=False)
    assert tab.page.locator(".still svg").count() == tab.page.locator(".plot").count()
    assert tab.page.locator(".still svg").first.is_visible()
    assert tab.page.locator(".tools").first.is_hidden()
    assert tab.page.locator("#layer-table tbody tr").count() == len(allocation()["layers"])


def test_legend_switches_methods_by_keyboard(open_tab, compared):
    tab = open_tab(compared)
    tab.draw_all()
    button = tab.page.locator(".legend button").first
    lines = "#quality0-0 .scatterlayer .js-line"
    before = tab.page.locator(lines).count()
    assert before == 8  # four methods, each with its band
    button.focus()
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_function(f"() => document.querySelectorAll('{lines}').length === {before - 2}")
    assert button.get_attribute("aria-pressed") == "false"
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_function(f"() => document.querySelectorAll('{lines}').length === {before}")


def test_names_run_no_script(open_tab, tmp_path):
    answers = predictions(ATTACK, pictured=0)
    for row in answers["tasks"][ATTACK]["rows"]:
        row |= {"question": ATTACK, "truth": ATTACK, "dense": ATTACK, "pruned": ATTACK}
    split = allocation()
    for layer in split["layers"]:
        layer |= {"tower": ATTACK + layer["tower"], "block": layer["block"] + "<b>", "modality": ATTACK}
    run = write_run(tmp_path / "run", allocation=split)
    dialogs = []
    slow = ("analysis/effects", "analysis/landscape", "analysis/distributions")  # drawn elsewhere
    for path in (
        write_report(write_analyses(run, predictions=answers, **dict.fromkeys(slow))),
        write_compare(write_comparison(tmp_path / "compared", hostile_comparison())),
    ):
        tab = open_tab(path)
        tab.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        tab.draw_all()
        for bar in tab.page.query_selector_all(".barlayer .point path")[:2]:
            bar.hover(force=True)
    assert dialogs == []


def hostile_comparison():
    content = comparison()
    for method in content["methods"]:
        method |= {"title": method["title"] + ATTACK + '<a href="javascript:alert(3)">', "options": {ATTACK: ATTACK}}
    return content | {"model": ATTACK, "command": ATTACK, "recipe": {ATTACK: ATTACK}, "environment": {ATTACK: ATTACK}}

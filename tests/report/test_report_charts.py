import html
import math
import re
from importlib.resources import files

import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import ATTACK
from synthetic import TOWERS, agreement, allocation, comparison, distributions, effects, landscape, searched, write_run

from ecoflap.report import analyses
from ecoflap.report.charts import analysis as analysis_charts
from ecoflap.report.charts import compare as compare_charts
from ecoflap.report.charts import run as run_charts
from ecoflap.report.charts.chart import (
    DASHES,
    HUES,
    Axis,
    Chart,
    Rule,
    Series,
    log_ticks,
    places,
    style,
    tower_styles,
)
from ecoflap.report.charts.plotly import figure
from ecoflap.report.charts.static import COLOURS, picture, save, svg
from ecoflap.report.comparison import Comparison
from ecoflap.report.data import LayerScore, read_run
from ecoflap.report.html import in_script

COLOUR = re.compile(r"var\(--([a-z0-9]+)\)( [\d.]+)?")


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    run = read_run(write_run(tmp_path_factory.mktemp("run"), allocation=searched()))
    assert run.allocation is not None
    content = Comparison.model_validate(comparison())
    quality = compare_charts.quality_chart(content, content.each_test[0])
    assert quality is not None
    return [
        *run_charts.sparsity_charts(run, run.blocks()),
        *run_charts.importance_charts(run.blocks()),
        *run_charts.layer_importance_charts(run),
        *run_charts.heat_charts(run),
        *run_charts.loss_charts(run.allocation.search),
        *run_charts.cost_charts(run.allocation.search, run.blocks()),
        *analysis_charts.distribution_charts(analyses.Distributions.model_validate(distributions())),
        analysis_charts.agreement_chart(analyses.Agreement.model_validate(agreement())),
        *analysis_charts.effect_charts(analyses.Effects.model_validate(effects())),
        *analysis_charts.share_charts(analyses.Effects.model_validate(effects())),
        *analysis_charts.landscape_charts(analyses.Landscape.model_validate(landscape())),
        quality,
        *compare_charts.cost_charts(content),
        *compare_charts.tower_charts(content),
    ]


def painted(value):
    """As the page's script does: every colour of ours becomes one that plotly knows."""
    if isinstance(value, str):
        return COLOUR.sub("rgba(1, 2, 3, 0.5)", value)
    if isinstance(value, list):
        return [painted(item) for item in value]
    return {key: painted(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_plotly_accepts_every_property(charts):
    for chart in charts:
        go.Figure(painted(figure(chart)))  # raises on a name or value that it does not know


@pytest.mark.parametrize("apart", [0.0, 0.001, -0.3])
def test_an_axis_of_differences_has_whole_per_cents_to_mark(apart):
    data = comparison()
    for cell in data["cells"]:
        cell["towers"] = dict.fromkeys(cell["towers"], max(0.0, cell["sparsity"] + apart))
    content = Comparison.model_validate(data)
    found = compare_charts.tower_charts(content)
    assert found
    differences = [max(-sparsity, apart) for sparsity in content.sparsities]
    for chart in found:
        low, high = chart.y.limits
        assert low < min(differences)
        assert max(differences) < high
        assert low <= -0.02
        assert high >= 0.02


@pytest.mark.parametrize(
    ("values", "some"), [((0.918, 0.938), "92.5%"), ((0.2, 0.9), "40%"), ((-0.01, 0.01), "\N{MINUS SIGN}0.5%")]
)
def test_marks_of_an_axis_differ_and_have_the_decimals_of_their_distance(values, some):
    line = Series("a", "line", [0.5, 0.6], list(values), style(0))
    chart = Chart("title", "what", Axis("sparsity"), Axis("accuracy", percent=True), [line])
    marks = re.findall(r">([^<>]*\d%)<", svg(chart, "x"))
    assert some in marks
    assert len(set(marks)) == len(marks) >= 3
    assert len({len(mark.partition(".")[2]) for mark in marks}) == 1
    assert figure(chart)["layout"]["yaxis"]["tickformat"] == ".3~%"


def test_still_drawings_have_no_colour_of_their_own(charts):
    for index, chart in enumerate(charts):
        drawing = svg(chart, f"p{index}")
        assert re.findall(r"#[0-9a-f]{6}\b", drawing) == []
        ids = re.findall(r'\bid="([^"]+)"', drawing)
        assert len(ids) == len(set(ids))
        assert all(name.startswith(f"p{index}-") for name in ids)


def test_both_drawings_are_the_same_for_the_same_chart(charts):
    for chart in (charts[0], charts[-1]):
        assert svg(chart, "x") == svg(chart, "x")
        assert in_script(figure(chart)) == in_script(figure(chart))


def test_every_chart_is_described(charts):
    assert all(chart.caption and chart.description.endswith(".") for chart in charts)


def test_texts_reach_plotly_escaped():
    hover = [f"{ATTACK}\n<b>two</b>"]
    series = Series(ATTACK, "line", [1.0], [2.0], style(0), hover)
    made = figure(Chart(ATTACK, ATTACK, Axis(ATTACK), Axis(ATTACK), [series], [Rule(1.0, ATTACK, 1)]))
    trace = made["data"][0]
    for text in (trace["name"], made["layout"]["xaxis"]["title"]["text"]):
        assert "<" not in text
    assert trace["hovertext"][0].count("<") == trace["hovertext"][0].count("<br>") == 1


def test_dollars_and_brackets_in_names_are_drawn_as_they_are():
    series = Series("s", "bar", ["a $x_1$ b", "<i>"], [1.0, 2.0], style(0))
    drawing = svg(Chart("c", "c.", Axis("$y$"), Axis("<b>"), [series]), "x")
    assert "a $x_1$ b" in drawing
    assert "&lt;i&gt;" in drawing
    assert "<b>" not in drawing


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_json_in_a_script_comes_back_and_cannot_end_it(text):
    import json

    embedded = str(in_script({"key": text}))
    assert not set(embedded) & set("<>&\u2028\u2029")
    assert json.loads(embedded) == {"key": text}


def test_json_in_a_script_is_finite():
    with pytest.raises(ValueError, match="JSON compliant"):
        in_script([math.nan])


def test_looks_differ_until_colours_and_dashes_are_used_up():
    count = HUES * len(DASHES)
    looks = [style(index) for index in range(count)]
    assert len({(look.colour, look.dash) for look in looks}) == count
    assert len({look.colour for look in looks[:HUES]}) == len({look.marker for look in looks[:HUES]}) == HUES
    towers = tower_styles({name: modality for name, (modality, *_) in TOWERS.items()})
    assert len({(look.colour, look.dash) for look in towers.values()}) == 3


@given(st.floats(1e-12, 1e9), st.floats(1.5, 1e12))
def test_ticks_of_a_logarithmic_axis(low, ratio):
    ticks = log_ticks((low, low * ratio))
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert len(ticks) <= 13
    if ratio >= 10:
        assert ticks


@given(st.integers(1, 500))
def test_ticks_of_blocks_are_whole_and_few(count):
    ticks = places(count)
    assert ticks[0] == 0
    assert len(ticks) <= 12
    assert all(tick == int(tick) and tick < count for tick in ticks)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(0, 1e3) | st.none()), min_size=1, max_size=6),
)
def test_error_bars_stay_on_a_logarithmic_axis(pairs):
    limits = run_charts.log_limits(pairs)
    series = Series("s", "points", range(len(pairs)), [y for y, _ in pairs], style(0), error=[e for _, e in pairs])
    below, above = series.error_lengths(Axis("y", log=True, limits=limits))
    for (value, error), down, up in zip(pairs, below, above, strict=True):
        assert limits[0] < value < limits[1]
        assert up == (error or 0.0)
        assert value - down >= limits[0] * (1 - 1e-9) - 1e-12 * value  # a difference is rounded as its terms are
        assert 0 <= down <= (error or 0.0)


def test_files_hold_every_chart_with_its_legend(charts, tmp_path):
    """Each chart as a file: the names of its series, no stand-in for a colour; the same bytes each time."""
    for number, chart in enumerate(charts):
        png, drawing = save(picture([[chart]], "a title"), tmp_path / str(number))
        text = html.unescape(drawing.read_text("utf-8"))
        assert "a title" in text
        assert all(entry.name[:20] in text for entry in chart.legend)
        assert not re.search(r"#01[0-9a-f]{2}02|var\(", text)
        assert png.read_bytes().startswith(b"\x89PNG")
    before = drawing.read_bytes(), png.read_bytes()
    save(picture([[charts[-1]]], "a title"), tmp_path / str(number))
    assert (drawing.read_bytes(), png.read_bytes()) == before


def test_files_have_the_colours_of_the_page():
    css = (files("ecoflap.report") / "templates" / "page.css").read_text("utf-8").partition("}")[0]
    page = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css))
    assert {name: page[name] for name in COLOURS} == COLOURS


def test_heat_maps_are_shown_where_matrices_of_a_block_differ(tmp_path):
    told = allocation()
    run = read_run(write_run(tmp_path / "a", allocation=told))
    assert run_charts.differs_in_blocks(run)
    for layer in told["layers"]:
        layer["achieved"] = layer["sparsity"] = 0.5
    assert not run_charts.differs_in_blocks(read_run(write_run(tmp_path / "b", allocation=told)))


def test_experts_of_one_parameter_have_one_cell_with_their_mean(tmp_path):
    told = allocation()
    first = told["layers"][0]
    slices = [
        first | {"name": f"{first['block']}.experts.up[{number}]", "weights": 10 * (number + 1), "shape": None,
                 "zeros": 4 * (number + 1), "sparsity": 0.4, "achieved": share}
        for number, share in enumerate((0.1, 0.4, 0.6))
    ]  # fmt: skip
    told["layers"] = slices + told["layers"]
    told["total_weights"] = sum(layer["weights"] for layer in told["layers"])
    run = read_run(write_run(tmp_path / "run", allocation=told))
    _, kinds = run_charts._matrices(run.allocation.layers)[first["tower"]]
    (cell,) = kinds["experts.up"]
    assert (cell.weights, cell.sparsity) == (60, pytest.approx(0.4))
    assert cell.achieved == pytest.approx((0.1 * 10 + 0.4 * 20 + 0.6 * 30) / 60)
    assert not any("[" in kind for kind in kinds)


def test_scores_of_experts_of_one_parameter_are_summed():
    names = ["b.experts.up[0]", "b.experts.up[1]", "b.q.weight"]
    rows = [LayerScore(name=name, tower="t", block="b", score=3.0 + n, stderr=3.0 + n) for n, name in enumerate(names)]
    found = run_charts._summed(rows)
    assert list(found) == ["b.experts.up", "b.q.weight"]
    assert (found["b.experts.up"].score, found["b.experts.up"].stderr) == (7, 5)
    assert found["b.q.weight"] is rows[2]

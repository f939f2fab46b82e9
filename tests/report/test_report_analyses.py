import json
import math
from itertools import pairwise

import pytest
from pages import ATTACK, Page, assert_safe, assert_self_contained, read
from synthetic import (
    TOWERS,
    agreement,
    distributions,
    effects,
    landscape,
    png,
    predictions,
    write_analyses,
    write_run,
)

from ecoflap.errors import InvalidOption
from ecoflap.report import write_report
from ecoflap.report.predictions import EXAMPLES, TaskPredictions, gallery


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return read(write_report(write_analyses(write_run(tmp_path_factory.mktemp("run")))))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_analysis_has_its_section(html, page):
    sections = {found["aria-labelledby"] for tag, found in page.elements if tag == "section"}
    assert {"answers", "distributions", "agreement", "effects", "landscape"} <= sections
    assert_self_contained(html)
    assert_safe(page)


def test_absent_analyses_are_left_out(tmp_path):
    page = Page(read(write_report(write_run(tmp_path))))
    sections = {found["aria-labelledby"] for tag, found in page.elements if tag == "section"}
    assert not {"answers", "distributions", "agreement", "effects", "landscape"} & sections
    targets = {found["href"] for tag, found in page.elements if tag == "a" and found["href"].startswith("#")}
    assert targets <= {f"#{found['id']}" for _, found in page.elements if "id" in found}


def test_distributions_of_each_tower(page):
    assert [page.figures[f"distribution{i}"]["layout"]["xaxis"]["title"]["text"] for i in range(3)] == [
        "log10 |w|",
        "log10 |g|",
        "log10 |w|·‖x‖",
    ]
    content = distributions()["towers"]
    traces = page.figures["distribution2"]["data"]
    assert [trace["name"] for trace in traces] == list(TOWERS)
    for trace, tower in zip(traces, content.values(), strict=True):
        edges = tower["local"]["log10_edges"]
        assert trace["y"] == tower["local"]["share"]
        assert trace["x"] == pytest.approx([(a + b) / 2 for a, b in pairwise(edges)])
    assert "vision_model.encoder.layers (median 0.100, 2.0 % exact zeros)" in page.words("distributions")


def test_agreement_matrix(page):
    heat = page.figures["agreement0"]["data"][0]
    assert heat["z"] == agreement()["spearman"]
    assert heat["text"][0][1] == f"{agreement()['spearman'][0][1]:.2f}"
    assert heat["text"][0][5] == "–"  # not measured
    assert heat["text"][0][3].startswith("−")
    assert (heat["zmin"], heat["zmax"]) == (-1, 1)
    assert "44 of them" in page.words("agreement")


def test_effects_of_options(page):
    figures = {name: found for name, found in page.figures.items() if name.startswith("effect")}
    assert len(figures) == 3
    epsilon = page.figures["effect0"]
    assert epsilon["layout"]["xaxis"]["type"] == "log"
    assert epsilon["data"][0]["x"] == [entry["value"] for entry in effects()["effects"]["epsilon"]]
    assert epsilon["data"][0]["error_y"]["array"] == [0.02] * 3
    assert "type" not in page.figures["effect2"]["layout"]["xaxis"]  # 8 to 32 needs no logarithm
    cap = page.figures["share1"]
    assert [trace["y"] for trace in cap["data"]] == [
        [effects()["allocations"]["cap"][value][tower] for value in ("0.5", "0.6")] for tower in TOWERS
    ]


def test_landscape_is_on_one_scale(page):
    line, dense, pruned = (page.figures[f"landscape{i}"] for i in range(3))
    content = landscape()
    assert [trace["y"] for trace in line["data"]] == [content["line"]["dense"], content["line"]["pruned"]]
    assert line["layout"]["yaxis"]["type"] == "log"  # 0.5 to 30
    for made, name in ((dense, "dense"), (pruned, "pruned")):
        heat = made["data"][0]
        assert heat["z"][3][5] == pytest.approx(math.log10(content["plane"][name][3][5]))
        assert heat["zmin"] == pytest.approx(math.log10(0.5))
        assert heat["zmax"] == pytest.approx(math.log10(60.9))
    assert pruned["data"][0]["z"][0][0] is None


def test_a_part_of_a_landscape_and_of_distributions(tmp_path):
    part = landscape() | {"plane": None}
    some = distributions()
    for tower in some["towers"].values():
        tower["gradient"] = None
    run = write_analyses(write_run(tmp_path), **{"analysis/landscape": part, "analysis/distributions": some})
    page = Page(read(write_report(run)))
    assert sum(name.startswith("landscape") for name in page.figures) == 1
    assert sum(name.startswith("distribution") for name in page.figures) == 2


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("agreement", agreement() | {"measures": ["one"]}, r"agreement\.json.*spearman should have 1 rows"),
        ("distributions", {"format": 1, "towers": {"t": {"weight": {"log10_edges": [1], "share": [1]}}}}, "weight"),
        ("landscape", {"format": 1, "line": {"alpha": [1], "dense": [], "pruned": [1]}}, "differ in length"),
        ("effects", {"format": 2}, "format 2"),
        ("effects", {"format": 1, "effects": {"epsilon": [{"value": "much"}]}}, r"effects\.epsilon\.0\.value"),
    ],
)
def test_a_broken_analysis_is_one_clear_line(tmp_path, name, content, where):
    run = write_analyses(write_run(tmp_path), **{f"analysis/{name}": content})
    with pytest.raises(InvalidOption, match=where) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    run = write_analyses(write_run(tmp_path), **{"analysis/landscape": None})
    broken = json.dumps(landscape()).replace("30.5", "NaN", 1)
    (run / "analysis" / "landscape.json").write_text(broken)
    with pytest.raises(InvalidOption, match=r"landscape\.json: line\.dense"):
        write_report(run)


def test_gallery_counts_and_examples(page):
    text = page.words("answers")
    assert "vqa, 40 samples" in text
    assert "only the dense model right" in text
    assert "Only the dense model right: 8 of 8" in text
    assert "Both right: 8 of 25" in text
    assert page.count("img") == 12
    assert "Show 6 more" in text
    assert "what colour is shape 25?" in text
    assert "a green one ✗ wrong" in text


def groups(folder, content):
    task = TaskPredictions.model_validate(content["tasks"]["vqa"])
    return {group.kind: group for group in gallery(folder, task)}


def test_gallery_shows_pictured_samples_first(tmp_path):
    content = predictions()
    for row in content["tasks"]["vqa"]["rows"]:
        row["picture"] = "pictures/late.png" if row["index"] in (20, 24) else None
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "late.png").write_bytes(png())
    found = groups(tmp_path, content)["both_right"]
    assert [example.row.index for example in found.examples] == [20, 24, 0, 1, 2, 3, 4, 5]
    assert len(found.examples) == EXAMPLES
    assert [example.picture is not None for example in found.examples[:3]] == [True, True, False]
    assert (found.count, found.share) == (25, 25 / 40)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "notes.txt", "nowhere.png", "."])
def test_only_pictures_of_the_run_are_shown(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (run / "notes.txt").write_text("no picture")
    content = predictions()
    content["tasks"]["vqa"]["rows"][0]["picture"] = name
    assert groups(run, content)["both_right"].examples[0].picture is None


def test_answers_are_text_never_markup(tmp_path):
    answers = predictions(ATTACK, pictured=0)
    for row in answers["tasks"][ATTACK]["rows"]:
        row |= {"question": ATTACK, "truth": ATTACK, "dense": ATTACK, "pruned": ATTACK, "kind": ATTACK}
    named = agreement() | {"measures": [ATTACK] * 6, "granularity": ATTACK}
    caps = effects()
    caps["effects"][ATTACK] = caps["effects"].pop("draws")
    caps["allocations"][ATTACK] = {ATTACK: {ATTACK: 0.5}}
    towers = distributions()
    towers["towers"][ATTACK] = towers["towers"].pop(next(iter(TOWERS)))
    run = write_analyses(
        write_run(tmp_path),
        predictions=answers,
        **{"analysis/agreement": named, "analysis/effects": caps, "analysis/distributions": towers},
    )
    html = read(write_report(run))
    page = Page(html)
    assert_safe(page)
    assert ATTACK not in html
    assert ATTACK in page.text["answers"]
    assert page.figures["agreement0"]["layout"]["xaxis"]["ticktext"][0].count("…") == 1


def test_a_sample_without_a_question_has_a_name(tmp_path):
    answers = predictions(pictured=0)
    for row in answers["tasks"]["vqa"]["rows"]:
        row["question"] = None
    assert "sample 25" in Page(read(write_report(write_analyses(write_run(tmp_path), predictions=answers)))).words(
        "answers"
    )

import base64
import gzip
import hashlib
import re
import shlex
from itertools import pairwise

import pytest
from pages import ATTACK, Page, assert_safe, assert_self_contained, read
from rich.console import Console
from synthetic import RECIPE, allocation, importance, metrics, write_comparison, write_run

from ecoflap.cli.tables import stages_table, summary_table
from ecoflap.errors import InvalidOption, StorageError
from ecoflap.report import rebuild, write_report
from ecoflap.report.charts.static import svg
from ecoflap.report.records import reproduce


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return read(write_report(write_run(tmp_path_factory.mktemp("run"))))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_headline_and_quality(page):
    assert "82.8 % ± 0.9" in page.text["headline"]
    assert "41.4 %" in page.text["headline"]
    assert "2 min 45 s" in page.text["headline"]
    quality = " ".join(page.text["quality"].split())
    assert "vqa accuracy, 1 280 samples" in quality
    assert "easy-vqa/color 99.1 % 94.8 % −4.3 points" in quality
    assert "26.74 ± 0.41" in quality
    assert "+84.0 %" in quality


def test_every_layer_has_a_row(page):
    layers = allocation()["layers"]
    text = page.text["layers"]
    assert all(layer["name"] in text for layer in layers)
    assert f"{importance()['layers'][0]['score']:.2e}" in text
    rows = sum(name == "tr" for name, _ in page.elements)
    assert rows > len(layers)


def test_a_panel_a_tower_with_a_bar_a_block(html, page):
    # sparsity and importance of blocks, and both of single matrices, for three towers
    assert page.count("figure") == page.count("div", class_="plot") == len(page.figures) == 12
    drawings = re.findall(r'<div class="still">(<svg.*?</svg>)', html, flags=re.DOTALL)
    assert len(drawings) == 12
    assert drawings[0].count("fill: var(--vision)") == 36
    assert "stroke-dasharray" in drawings[0]
    assert all("var(--language)" in drawing for drawing in (*drawings[1:3], *drawings[7:9]))
    assert re.findall(r"#[0-9a-f]{6}\b", "".join(drawings)) == []  # every colour is one of the page's
    assert "target 50 % cap 60 %" in page.words("sparsity")


def test_interactive_plots_hold_the_numbers_of_the_files(page):
    vision = page.figures["sparsity0"]["data"][0]
    layers = allocation()["layers"]
    block = [layer for layer in layers if layer["block"] == "vision_model.encoder.layers.7"]
    share = sum(layer["zeros"] for layer in block) / sum(layer["weights"] for layer in block)
    assert vision["y"][7] == pytest.approx(share)
    assert vision["hovertext"][7].startswith(f"vision_model.encoder.layers.7<br>{100 * share:.2f} %")
    heat = page.figures["heat1"]["data"][0]
    assert heat["z"][1][2] == pytest.approx(
        next(x["achieved"] for x in layers if x["name"] == "language_model.encoder.block.2.layer.1.wo.weight")
    )
    score = importance()["layers"][3]
    kinds = page.figures["matrix0"]["data"]
    assert kinds[1]["name"] == "mlp.fc1"
    assert kinds[1]["y"][1] == pytest.approx(score["score"])
    assert kinds[1]["error_y"]["array"][1] == pytest.approx(score["stderr"])


def test_ids_are_unique_and_references_resolve(html, page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', html)
    assert references
    assert set(references) <= set(ids)
    labels = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labels <= set(ids)


def test_nothing_is_fetched(html):
    assert_self_contained(html)


def test_only_the_scripts_of_the_page_may_run(page):
    types = {found.get("id") or "page": text for found, text in page.scripts}
    plotly = gzip.decompress(base64.b64decode(types["plotly"]))
    assert b"Plotly, Inc." in plotly[:200]
    hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in (types["page"].encode(), plotly)]
    assert page.policy["script-src"] == [f"'sha256-{value}'" for value in hashes]


def test_reads_on_a_phone_in_the_dark_and_on_paper(html):
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_same_files_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("ecoflap.report.html.svg", svg)  # each time drawn anew
    first = write_report(write_run(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_names_are_text_never_markup(tmp_path):
    hostile = metrics()
    hostile["dense"]["vqa"]["by_group"] = {ATTACK: 0.5}
    hostile["dense"][ATTACK] = {"metric": ATTACK, "value": 1.0, "stderr": None, "n": 1}
    hostile["environment"] = {ATTACK: ATTACK}
    hostile["stages"][0]["name"] = ATTACK
    split = allocation()
    scored = importance() | {"method": ATTACK}
    for layer in (*split["layers"][:4], *scored["layers"][:4]):
        layer.update(name=layer["name"] + ATTACK, tower=ATTACK, block=ATTACK, modality=ATTACK)
    recipe = RECIPE | {"model": ATTACK, "criterion": ATTACK, "columns": {ATTACK: ATTACK}, ATTACK: [ATTACK]}
    run = write_run(tmp_path, recipe=recipe, metrics=hostile, allocation=split, importance=scored)
    page = Page(read(write_report(run)))
    assert_safe(page)
    assert page.count("img") == 0
    assert ATTACK not in read(run / "report.html")
    assert ATTACK in page.text["head"]
    assert ATTACK in page.text["recipe"]


def test_characters_that_are_unseen_or_turn_the_text_round_are_shown(tmp_path):
    evil = "a\x1b[31m\u202egnp"
    scored = importance()
    scored["layers"][0].update(name=scored["layers"][0]["name"] + evil)
    text = read(write_report(write_run(tmp_path, recipe=RECIPE | {"model": evil}, importance=scored)))
    assert "a\\x1b[31m\\u202egnp" in text
    assert not set("\x1b\u202e") & set(text)
    other = read(write_report(write_run(tmp_path, recipe=RECIPE | {"model": "שלום\u200f"})))
    assert "שלום\u200f" in other  # marks that belong to a script


def test_missing_parts_are_said_to_be_missing(tmp_path):
    page = Page(read(write_report(write_run(tmp_path, importance=None, allocation=None, metrics=None))))
    for section in ("headline", "quality", "sparsity", "importance", "cost", "layers"):
        assert "not measured" in page.text[section], section
    assert page.count("figure") == 0
    assert page.figures == {}
    assert len(page.scripts) == 1  # no plot, no plotly


def test_unset_options_are_named(tmp_path):
    embedded = Page(read(write_report(write_run(tmp_path / "a", recipe=RECIPE | {"columns": {}}))))
    assert "embedded VLM" in embedded.text["recipe"]
    assert "bundled samples" in embedded.text["recipe"]
    assert "not set" in embedded.text["recipe"]
    other = Page(read(write_report(write_run(tmp_path / "b", recipe=RECIPE | {"model": "org/x"}))))
    assert "bundled" not in other.text["recipe"]


def test_without_a_recipe(tmp_path):
    page = Page(read(write_report(write_run(tmp_path, recipe=None))))
    assert "not recorded" in page.text["recipe"]


def test_only_one_side_evaluated(tmp_path):
    page = Page(read(write_report(write_run(tmp_path, metrics=metrics() | {"pruned": {}}))))
    assert "87.1 % ± 0.9" in page.text["quality"]
    assert "not measured" in page.text["quality"]


def test_zero_scores_are_counted_not_drawn(tmp_path):
    part = importance()
    for layer in part["layers"][:2]:
        layer["score"] = layer["stderr"] = 0.0
    page = Page(read(write_report(write_run(tmp_path / "a", importance=part))))
    assert "1 block has a score of zero" in page.text["importance"]
    for layer in part["layers"]:
        layer["score"] = layer["stderr"] = 0.0
    page = Page(read(write_report(write_run(tmp_path / "b", importance=part))))
    assert page.count("figure") == 6


def test_uniform_importance_is_not_measured(tmp_path):
    part = importance() | {"method": "uniform"}
    for layer in part["layers"]:
        layer.update(score=0.0, stderr=0.0, n=0)
    page = Page(read(write_report(write_run(tmp_path, importance=part))))
    assert "not measured" in page.text["importance"]
    assert "one sparsity per block" not in page.text["head"]
    assert "0.00e+00" not in page.text["layers"]


def test_what_stayed_dense_and_what_was_not_reached(tmp_path, page):
    assert "What stayed dense" not in page.text["layers"]
    more = metrics() | {"unreached": ["tower.3.wo.weight"]}
    more["dense_weights"] = [
        {"name": "shared.weight", "reason": "embedding", "weights": 3000},
        {"name": "a.norm.weight", "reason": "norm", "weights": 20},
        {"name": "b.norm.weight", "reason": "norm", "weights": 30},
    ]
    more["sparsity"] = more["sparsity"] | {"model_parameters": 10_000}
    text = " ".join(Page(read(write_report(write_run(tmp_path, metrics=more)))).text["layers"].split())
    assert "Reason Tensors Weights Of the model embedding 1 3 000 30.0 % norm 2 50 0.5 %" in text
    assert "pruned without their own statistics: tower.3.wo.weight." in text


def test_what_routers_choose_and_which_experts_are_gone(tmp_path, page):
    assert "Never chosen" not in page.text["layers"]
    experts = {"blocks.0.experts": {"blocks.0.experts[0]": 90, "blocks.0.experts[1]": 0, "blocks.0.experts[2]": 10}}
    more = metrics() | {"experts": experts, "removed_experts": ["blocks.0.experts[1]"]}
    text = " ".join(Page(read(write_report(write_run(tmp_path, metrics=more)))).text["layers"].split())
    assert "blocks.0.experts 3 100 0.00 % 10.00 % 90.00 % 1" in text
    assert "All weights of these experts are zero: blocks.0.experts[1]." in text


def test_gpu_memory_has_its_column_only_where_there_is_one(tmp_path, page):
    assert "GPU" not in page.text["cost"]
    cuda = metrics()
    cuda["stages"][1]["peak_cuda_bytes"] = 8_940_000_000
    text = Page(read(write_report(write_run(tmp_path, metrics=cuda)))).text["cost"]
    assert "Peak GPU memory" in text
    assert "8.94 GB" in text


def test_unwritable_page_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_report(write_run(tmp_path))
    before = path.read_bytes()
    write_run(tmp_path, metrics=None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"report\.html: No space left"):
        write_report(tmp_path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_no_run_directory(tmp_path):
    with pytest.raises(InvalidOption):
        write_report(tmp_path)


def test_command_survives_the_shell():
    recipe = RECIPE | {"model": "a folder/it's", "columns": {"text": "my text"}, "exclude": ["a*", "b"], "flag": True}
    words = shlex.split(reproduce(recipe).replace("\\\n", " "))
    assert words[:3] == ["ecoflap", "prune", "a folder/it's"]
    pairs = list(pairwise(words))
    for pair in [("--max-sparsity", "0.6"), ("--columns", "text=my text"), ("--exclude", "a*"), ("--exclude", "b")]:
        assert pair in pairs
    assert "--flag" in words
    assert ("--sparsity", "0.5") in pairs  # said although it is the default
    assert ("--criterion", "wanda") in pairs
    said = shlex.split(reproduce(recipe | {"criterion": "admm"}).replace("\\\n", " "))
    assert ("--criterion", "admm") in pairwise(said)  # as this default has changed once
    assert not {"--samples", "--seed"} & set(words)
    assert not {"--versions", "--fingerprint", "--calibration", "--model"} & set(words)
    assert words[-2:] == ["--output", "runs/again"]


def _printed(run):
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(run))
    console.print(stages_table(run))
    return console.export_text()


def test_summary_table(tmp_path):
    text = _printed(write_run(tmp_path))
    assert re.search(r"vqa accuracy +87\.1 % ± 0\.9 +82\.8 % ± 0\.9 +−4\.3 points", text)
    assert re.search(r"perplexity +26\.74 ± 0\.41 +49\.20 ± 0\.80 +\+84\.0 %", text)
    assert re.search(r"sparsity, whole model +41\.4 %", text)
    assert re.search(r"vision: vision_model\.encoder\.layers +50\.1 %", text)
    assert re.search(r"importance +1 min 33 s +1\.07 GB", text)
    assert re.search(r"all stages +2 min 45 s", text)


def test_summary_table_of_an_unfinished_run_and_a_bracketed_name(tmp_path):
    text = _printed(write_run(tmp_path, recipe=RECIPE | {"model": "[bold]x[/nope]"}, metrics=None))
    assert "[bold]x[/nope]" in text
    assert text.count("not measured") >= 4


def test_size_on_disk_as_saved_and_without_zeros(tmp_path, page):
    assert "Size on disk not measured" in page.words("headline").replace("disknot", "disk not")
    more = metrics()
    towers = more["sparsity"]["towers"].values()
    more["sparsity"] |= {"prunable_parameters": sum(t["weights"] for t in towers), "model_parameters": 2_000_000}
    run = write_run(tmp_path, metrics=more)
    (run / "model").mkdir()
    (run / "model" / "model-00001-of-00002.safetensors").write_bytes(bytes(3_000_000))
    (run / "model" / "model-00002-of-00002.safetensors").write_bytes(bytes(1_000_000))
    zeros = sum(t["zeros"] for t in towers)
    packed = 4_000_000 - 2 * zeros + sum(t["weights"] for t in towers) / 8  # two bytes per weight
    text = Page(read(write_report(run))).words("headline")
    assert "4.00 MB" in text
    assert f"{packed / 1e6:.2f} MB with a bit per prunable weight instead of zeros (computed)" in text


def test_rebuild_finds_out_what_a_folder_holds(tmp_path):
    assert rebuild(write_run(tmp_path / "run")) == tmp_path / "run" / "report.html"
    assert rebuild(write_comparison(tmp_path / "compared")) == tmp_path / "compared" / "compare.html"
    with pytest.raises(InvalidOption, match="no directory"):
        rebuild(tmp_path / "nowhere")

import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console
from synthetic import RECIPE, allocation, importance, metrics, write_run

from ecoflap.errors import InvalidOption, StorageError
from ecoflap.report import summary_table, write_report
from ecoflap.report.command import reproduce

VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}
ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Elements with attributes, text per section, and whether every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.section, self.text = [], [], "head", {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["aria-labelledby"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.text[self.section] += " "

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "text"):
            self.text[self.section] = self.text.get(self.section, "") + data

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def read(path):
    return path.read_text(encoding="utf-8")


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
    assert page.count("svg") == page.count("figure") == 6
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    vision = drawings[0]
    assert vision.count("fill: var(--vision)") == 36
    assert "stroke-dasharray" in vision
    assert "target 50 %" in vision
    assert "cap 60 %" in vision
    assert all("var(--language)" in drawing for drawing in (*drawings[1:3], *drawings[4:]))
    assert re.findall(r"#[0-9a-f]{6}\b", "".join(drawings)) == []  # every colour is one of the page's


def test_ids_are_unique_and_references_resolve(html, page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', html)
    assert references
    assert set(references) <= set(ids)
    labels = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labels <= set(ids)


def test_nothing_is_fetched(html, page):
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_reads_on_a_phone_in_the_dark_and_on_paper(html):
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


AA = {"ink": 4.5, "soft": 4.5, "vision": 3, "language": 3, "bridge": 3, "other": 3}


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_aa_in_each_theme(html):
    themes = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        for ground in ("paper", "card"):
            for name, least in [
                ("ink", 4.5),
                ("soft", 4.5),
                *((m, 3) for m in ("vision", "language", "bridge", "other")),
            ]:
                light, dark = sorted((_luminance(colours[ground]), _luminance(colours[name])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (ground, name)


def test_same_files_same_bytes(tmp_path):
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
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert ATTACK in page.text["head"]
    assert ATTACK in page.text["recipe"]


def test_missing_parts_are_said_to_be_missing(tmp_path):
    page = Page(read(write_report(write_run(tmp_path, importance=None, allocation=None, metrics=None))))
    for section in ("headline", "quality", "sparsity", "importance", "cost", "layers"):
        assert "not measured" in page.text[section], section
    assert page.count("svg") == 0


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
    assert page.count("svg") == 3


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
    assert "pruned by magnitude: tower.3.wo.weight." in text


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
    assert not {"--samples", "--seed", "--criterion"} & set(words)
    assert not {"--versions", "--fingerprint", "--calibration", "--model"} & set(words)
    assert words[-2:] == ["--output", "runs/again"]


def _printed(run):
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(run))
    return console.export_text()


def test_summary_table(tmp_path):
    text = _printed(write_run(tmp_path))
    assert re.search(r"vqa accuracy +87\.1 % ± 0\.9 +82\.8 % ± 0\.9 +−4\.3 points", text)
    assert re.search(r"perplexity +26\.74 ± 0\.41 +49\.20 ± 0\.80 +\+84\.0 %", text)
    assert re.search(r"sparsity, whole model +41\.4 %", text)
    assert re.search(r"vision: vision_model\.encoder\.layers +50\.1 %", text)
    assert re.search(r"time, importance +1 min 33 s +peak 1\.07 GB", text)
    assert re.search(r"time, all stages +2 min 45 s", text)


def test_summary_table_of_an_unfinished_run_and_a_bracketed_name(tmp_path):
    text = _printed(write_run(tmp_path, recipe=RECIPE | {"model": "[bold]x[/nope]"}, metrics=None))
    assert "[bold]x[/nope]" in text
    assert text.count("not measured") >= 4

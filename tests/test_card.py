"""Model cards: what they say, that it is the run's, and that no name in it marks anything up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import picos
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import ecoflap
from ecoflap.errors import InvalidOption
from ecoflap.report.card import write_card, write_model_card
from ecoflap.report.card_page import MARKER, escaped, fenced, with_repository
from ecoflap.run.directory import RunDirectory
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

EVIL = 'a|b`*_[x](http://evil.example)<script>alert(1)</script>\n# head & "quote"'


def _run(folder: Path, *, name: str = "decoder", recipe: dict[str, Any] | None = None) -> Path:
    """The files of a finished run whose tower, task, metric and data are called ``name``."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for part in ("preprocessor", "tokenizer"):
        (model / f"{part}_config.json").write_text("{}")
    fields = {"model": str(folder / "base"), "criterion": "wanda", "importance": "zeroth-order", "granularity": "block"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**fields, **(recipe or {})}))
    layer = {"name": "w", "tower": name, "block": "b", "modality": "language"}
    (folder / "importance.json").write_text(json.dumps({
        "format": 1, "method": "zeroth-order", "settings": {}, "layers": [{**layer, "score": 1.0, "n": 4}],
    }))  # fmt: skip
    result = {
        "metric": name, "value": 0.75, "stderr": 0.01, "n": 200, "settings": {"data": f"/home/someone/{name}"},
        "others": {"loss": {"value": None, "stderr": None}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps({
        "format": 1, "dense": {name: {**result, "value": 0.9}}, "pruned": {name: result},
        "sparsity": {
            "prunable": 0.5, "model": 0.4, "prunable_parameters": 1000, "model_parameters": 1250,
            "towers": {name: {"modality": "language", "weights": 1000, "zeros": 500, "sparsity": 0.5}},
        },
        "calibration": {"source": "/home/someone/prose.txt", "objective": "lm", "indices": [3, 1, 2]},
        "environment": {"ecoflap": "0.1.0", "model_class": "LlavaForConditionalGeneration", "platform": name},
    }))  # fmt: skip
    return folder


def _outside_code(text: str) -> str:
    """The card without its head and its blocks of code."""
    body = text.split("\n---\n", 1)[1]
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)


def test_says_what_the_run_says(tmp_path: Path) -> None:
    (tmp_path / "run" / "base").mkdir(parents=True)
    head = "---\nlicense: other\nlicense_name: gemma\nlicense_link: LICENSE\nlanguage: en\ntags: [x]\n---\nbase"
    (tmp_path / "run" / "base" / "README.md").write_text(head)
    path = write_card(_run(tmp_path / "run"))
    card = ModelCard.load(path)
    text = path.read_text("utf-8")
    assert card.data.library_name == "transformers"
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "gemma", None)
    assert card.data.language == ["en"]
    assert {"ecoflap", "pruning", "wanda"} <= set(card.data.tags)
    assert card.data.base_model is None
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("decoder", 0.75, "decoder")
    assert "| decoder | language | 1\u2009000 | 500 | 50.0 % |" in text
    assert "| decoder | decoder | decoder | 200 | 0.9000 ± 0.010 | 0.7500 ± 0.010 |" in text
    assert 'LlavaForConditionalGeneration.from_pretrained("path/to/this/model")' in text
    assert "AutoProcessor" in text
    assert "3 samples of prose.txt, with the loss lm" in text
    assert text.count("@inproceedings") == 3
    assert "[Sun et al. 2023](https://arxiv.org/abs/2306.11695)" in text
    assert str(tmp_path) not in text
    assert "/home/" not in text


def test_the_hub_id_is_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "README.md"
    cached.write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(cached))
    path = write_card(_run(tmp_path / "run", recipe={"model": "some-org/some-model"}))
    data = ModelCard.load(path).data
    assert data.base_model == "some-org/some-model"
    assert data.license_link == "https://huggingface.co/some-org/some-model/blob/main/LICENSE"
    snapshot = tmp_path / "hub" / "models--a-b--c" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    path = write_card(_run(tmp_path / "run2", recipe={"model": str(snapshot)}))
    assert ModelCard.load(path).data.base_model == "a-b/c"


def test_no_name_marks_anything_up(tmp_path: Path) -> None:
    recipe = {"prompt": f"```\n</details>{EVIL}", "model": str(tmp_path / EVIL.replace("/", ""))}
    path = write_card(_run(tmp_path / "run", name=EVIL, recipe=recipe))
    text = path.read_text("utf-8")
    outside = _outside_code(text)
    assert "<script" not in outside
    assert "http://evil" not in outside
    assert outside.count("<details>") == outside.count("</details>") == 2
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table
    assert [line for line in outside.splitlines() if re.match(r"#+ head", line)] == []
    data = ModelCard.load(path).data
    assert data.eval_results[0].metric_type == EVIL
    assert yaml.safe_load(re.search(r"^(`{3,})yaml\n(.*?)^\1$", text, re.M | re.S)[2])["prompt"] == recipe["prompt"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"criterion": "global-magnitude"}, "over the weights of the whole model"),
        ({"criterion": "iterative-gradient", "budget": "tower"}, "over the weights of each tower"),
        ({"allocation": "/home/me/mine.json"}, "from the file mine.json"),
        ({"tokens": "atv"}, "atv ([Li et al. 2026](https://arxiv.org/abs/2603.16001))"),
        ({"search": True}, "improved by measuring the pruned model"),
        ({}, "importance zeroth-order; groups: block; rule: proportional ([Sung et al. 2023]"),
    ],
)
def test_the_method_is_that_of_the_recipe(tmp_path: Path, recipe: dict[str, Any], said: str) -> None:
    assert said in write_card(_run(tmp_path / "run", recipe=recipe)).read_text("utf-8")


@given(st.text())
def test_code_stays_in_its_fence(text: str) -> None:
    first, *inner, last = fenced(text).split("\n")
    assert set(first) == {"`"}
    assert first == last
    assert all(first not in line for line in inner)


@given(st.text(alphabet="ab|`*_[]<>&\\\n\t#:/w.", max_size=30))
def test_plain_text_survives_escaping(text: str) -> None:
    shown = escaped(text)
    for entity, character in (("&#47;", "/"), ("&#46;", "."), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        shown = shown.replace(entity, character)
    assert re.sub(r"\\(.)", r"\1", shown) == " ".join(text.split())
    assert "\n" not in escaped(text)
    assert not re.search(r"(?<!\\)(\\\\)*[|`<>]", escaped(text))


def test_anothers_card_is_kept_and_ours_written_again(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    readme = run / "model" / "README.md"
    readme.write_text("the base's own card")
    (run / "model" / ".README.md.x1.partial").write_text("of a killed process")
    first = write_card(run).read_bytes()
    assert write_card(run).read_bytes() == first
    assert MARKER.encode() in first
    assert {path.name for path in (run / "model").iterdir() if "README" in path.name} == {
        "README.md",
        "README.base.md",
    }
    assert (run / "model" / "README.base.md").read_text() == "the base's own card"
    readme.write_text("another")
    write_card(run)
    assert (run / "model" / "README.base.md").read_text() == "the base's own card"
    assert (run / "model" / "README.base-2.md").read_text() == "another"


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(InvalidOption, match="not finished"):
        write_card(run)


def test_the_place_of_the_model_is_filled_in(tmp_path: Path) -> None:
    text = write_card(_run(tmp_path / "run")).read_text("utf-8")
    assert 'from_pretrained("me/sparse")' in with_repository(text, "me/sparse")
    assert with_repository("edited by hand", "me/sparse") == "edited by hand"


def test_at_the_end_of_a_run(tmp_path: Path) -> None:
    recipe = Recipe(criterion="magnitude", importance="uniform", samples=2, test_samples=4)
    run = run_recipe(recipe, tmp_path / "run")
    path = run / "model" / "README.md"
    first = path.read_bytes()
    card = ModelCard.load(path)
    measured = json.loads((run / "metrics.json").read_text())
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == measured["pruned"]["vqa"]["value"]
    assert "Song Han" not in card.text
    assert "Han et al. 2015" in card.text
    (run / "report.html").unlink()  # stopped before the last file
    run_recipe(recipe, run, resume=True)
    assert path.read_bytes() == first
    assert not RunDirectory.examine(run, recipe.resolved(), resume=True).path.joinpath("journal").exists()


def test_from_python(tmp_path: Path) -> None:
    folder = picos.write_checkpoint("llama", tmp_path / "dense")
    checkpoint = ecoflap.load(folder, device="cpu")
    result = ecoflap.prune(checkpoint.model, picos.batches("llama"), 0.5, importance="uniform", criterion="sparsegpt")
    ecoflap.save(checkpoint, tmp_path / "sparse")
    quality = {"perplexity": {"metric": "perplexity", "value": 12.5, "dense": 10.0, "n": 30}}
    path = write_model_card(tmp_path / "sparse", result, base="some-org/llama", criterion="sparsegpt", quality=quality)
    card = ModelCard.load(path)
    assert card.data.base_model == "some-org/llama"
    assert card.data.eval_results[0].metric_value == 12.5
    assert "| perplexity | | perplexity | 30 | 10.00 | 12.50 |" in card.text.replace("|  |", "| |")
    assert "AutoTokenizer" in card.text
    assert "LlamaForCausalLM.from_pretrained" in card.text
    with pytest.raises(InvalidOption, match="holds no model"):
        write_model_card(tmp_path, result)

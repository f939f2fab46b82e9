import io
import json
import re

import pytest
from rich.console import Console
from synthetic import RECIPE, allocation, importance, metrics, write_run

from ecoflap.cli.tables import quality_table, summary_table
from ecoflap.errors import InvalidOption
from ecoflap.report.data import read_run
from ecoflap.report.page import render


def test_blocks_sum_their_layers(tmp_path):
    run = read_run(write_run(tmp_path))
    expected = {}
    for layer, scored in zip(allocation()["layers"], importance()["layers"], strict=True):
        entry = expected.setdefault(layer["block"], [0, 0, 0.0, 0.0])
        entry[0] += layer["weights"]
        entry[1] += layer["zeros"]
        entry[2] += scored["score"]
        entry[3] += scored["stderr"] ** 2
    blocks = run.blocks()
    assert [block.name for block in blocks] == list(expected)
    for block in blocks:
        weights, zeros, score, variance = expected[block.name]
        assert block.weights == weights
        assert block.target == zeros / weights
        assert block.achieved == pytest.approx(zeros / weights)
        assert block.score == pytest.approx(score)
        assert block.stderr == pytest.approx(variance**0.5)


def test_block_without_all_scores_has_none(tmp_path):
    part = importance()
    dropped = part["layers"].pop(0)
    part["layers"][-1]["stderr"] = None
    blocks = read_run(write_run(tmp_path, importance=part)).blocks()
    assert blocks[0].name == dropped["block"]
    assert blocks[0].score is None
    assert blocks[-1].score is not None
    assert blocks[-1].stderr is None
    assert all(block.score is not None for block in blocks[1:])


def test_target_shown_until_achieved(tmp_path):
    waiting = allocation()
    waiting["layers"][0]["achieved"] = None
    run = read_run(write_run(tmp_path, allocation=waiting, metrics=None))
    assert run.blocks()[0].achieved is None
    assert run.blocks()[0].shown == run.blocks()[0].target
    assert run.tower_sparsity() == {}


def test_tower_sparsity_from_metrics_equals_that_from_achieved(tmp_path):
    measured = read_run(write_run(tmp_path / "a")).tower_sparsity()
    derived = read_run(write_run(tmp_path / "b", metrics=None)).tower_sparsity()
    assert list(measured) == list(derived)
    for name, tower in measured.items():
        assert (derived[name].weights, derived[name].zeros) == (tower.weights, tower.zeros)
        assert derived[name].sparsity == pytest.approx(tower.sparsity)


def test_empty_model_is_the_embedded_one(tmp_path):
    assert read_run(write_run(tmp_path / "a")).model == "embedded VLM"
    assert read_run(write_run(tmp_path / "b", recipe=RECIPE | {"model": "org/x"})).model == "org/x"


@pytest.mark.parametrize("files", [["recipe"], ["importance"], ["allocation"], ["metrics"]])
def test_any_file_alone_is_a_run(tmp_path, files):
    absent = dict.fromkeys({"recipe", "importance", "allocation", "metrics"} - set(files))
    run = read_run(write_run(tmp_path, **absent))
    assert [name for name in ("recipe", "importance", "allocation", "metrics") if getattr(run, name)] == files


def test_no_run_directory(tmp_path):
    with pytest.raises(InvalidOption, match=r"holds none of recipe\.yaml"):
        read_run(tmp_path)
    with pytest.raises(InvalidOption, match="no directory"):
        read_run(tmp_path / "absent")


def _broken(name, change):
    content = {"importance": importance, "allocation": allocation, "metrics": metrics}[name]()
    change(content)
    return {name: content}


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            _broken("allocation", lambda c: c["layers"][3].update(sparsity=1.5)),
            r"allocation\.json: layers\.3\.sparsity",
        ),
        (_broken("allocation", lambda c: c["layers"][3].pop("weights")), r"allocation\.json: layers\.3\.weights"),
        (_broken("importance", lambda c: c["layers"][0].update(score=float("nan"))), r"layers\.0\.score"),
        (_broken("metrics", lambda c: c["stages"][0].update(seconds="long")), r"stages\.0\.seconds"),
        (_broken("metrics", lambda c: c.update(format=2)), "format 2; this version of ecoflap reads format 1"),
        ({"importance": [1, 2]}, "format None"),
        ({"recipe": ["a"]}, "holds list"),
    ],
)
def test_broken_content_names_file_and_field(tmp_path, replace, message):
    with pytest.raises(InvalidOption, match=message) as caught:
        read_run(write_run(tmp_path, **replace))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("metrics.json", '{"format": 1,'), ("recipe.yaml", "a: [1\nb: }")])
def test_unparsable_file_is_one_line(tmp_path, name, text):
    write_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidOption, match="can't read") as caught:
        read_run(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipe_cannot_construct_objects(tmp_path):
    write_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(InvalidOption, match="can't read the recipe"):
        read_run(tmp_path)


def test_fields_of_later_versions_are_ignored(tmp_path):
    later = metrics()
    later["extra"] = {"a": 1}
    later["dense"]["vqa"]["settings"] = {"prompt": "x"}
    assert read_run(write_run(tmp_path, metrics=json.loads(json.dumps(later)))).metrics is not None


def with_others(dense, pruned):
    quality = {"metric": "TR@1", "value": 0.5, "stderr": 0.1, "n": 26, "by_group": {"a": None}, "settings": {}}
    return metrics() | {
        when: {"retrieval": quality | {"others": others}} for when, others in (("dense", dense), ("pruned", pruned))
    }


def test_further_metrics_are_shown_on_the_page_and_the_terminal(tmp_path):
    dense = {"TR@5": {"value": 0.75, "stderr": 0.05}, "IR@1": {"value": None, "stderr": None}}
    folder = write_run(tmp_path, metrics=with_others(dense, {"TR@5": {"value": 0.625, "stderr": None}}))
    page = re.sub(r"<[^>]+>", "|", render(read_run(folder)))
    assert re.search(r"TR@5\|+75\.0 % ± 5\.0\|+62\.5 %\|+−12\.5 points", page)
    assert re.search(r"IR@1\|+not measured\|+not measured", page)
    console = Console(width=120, file=io.StringIO())
    console.print(summary_table(folder))
    assert re.search(r"TR@5 +75\.0 % ± 5\.0 +62\.5 % +−12\.5 points", console.file.getvalue())


def test_further_metrics_in_the_listing():
    console = Console(width=120, file=io.StringIO())
    console.print(quality_table(with_others({"TR@5": {"value": 0.75, "stderr": 0.05}}, {})["dense"]))
    assert re.search(r"retrieval TR@1 +50\.0 % ± 10\.0 +26 *\n +TR@5 +75\.0 % ± 5\.0", console.file.getvalue())

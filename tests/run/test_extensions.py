"""A criterion, an importance, a task and a format of another package: registered at run time, and by entry points."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from console import Command, prose

import ecoflap
from ecoflap.errors import BrokenPlugin, InvalidOption, UnknownName
from ecoflap.evaluation import TestData
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.pruning.registry import CRITERIA, is_global, reads_data
from ecoflap.run.citations import citations, paper
from ecoflap.run.extensions import KINDS, installed, register

MODULE = '''
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ecoflap.data.registry import Format
from ecoflap.data.tables import RowTable
from ecoflap.evaluation import Task, TaskResult
from ecoflap.importance.base import ImportanceMeasure
from ecoflap.importance.scores import Estimate
from ecoflap.pruning.criteria import zero_out
from ecoflap.support.citations import Citation

PAPER = Citation("plain", "Plain <Things>", ("Ada Lovelace",), 2024, arxiv="2401.00001")


@dataclass(frozen=True)
class First:
    """Zeroes the first weights of a matrix, whatever they are."""

    flip: bool = False
    name: ClassVar[str] = "first"
    statistics: ClassVar[str] = "none"
    default_compare: ClassVar[str] = "matrix"
    order: ClassVar[str] = "block"
    reads_data: ClassVar[bool] = False
    cites: ClassVar[tuple] = (PAPER,)

    def __call__(self, weight, statistics, zeros, pattern):
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[:zeros] = False
        return zero_out(weight, (mask.flip(0) if self.flip else mask).view(weight.shape))


@dataclass(frozen=True)
class Position(ImportanceMeasure):
    """Later layers count more."""

    start: float = 1.0
    blockwise: ClassVar[bool] = True
    noisy: ClassVar[bool] = False
    cites: ClassVar[tuple] = ("owl", PAPER)

    def steps(self, context) -> int:
        return len(context.layers)

    def estimates(self, context) -> Iterator[Estimate]:
        for number, layer in enumerate(context.layers):
            if (layer.name, 0, 0) not in context.done:
                yield Estimate(layer.name, 0, 0, self.start + number)


@dataclass(frozen=True)
class Zeros(Task):
    """The share of weights that are zero: known without data."""

    unit: ClassVar[str] = "%"
    better: ClassVar[str] = "less"
    hub_type: ClassVar[str] = "other"
    scale: float = 1.0

    def run(self, model, processor, test) -> TaskResult:
        weights = [p for p in model.parameters() if p.dim() == 2]
        share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        return TaskResult("zeros", "emptiness", self.scale * share, None, test.batch_size)


def open_shout(place):
    lines = place.path.read_text("utf-8").splitlines()
    if lines[:1] != ["SHOUT"]:
        return None
    return RowTable([{"text": line.lower()} for line in lines[1:]], place.source, place.path.parent)


SHOUT = Format((".shout",), open_shout)
'''
DATACLASS = "from dataclasses import dataclass\n@dataclass\n"
NAMES = {"criterion": "First", "importance": "Position", "task": "Zeros", "format": "SHOUT"}


def install(folder: Path, entry_points: str, name: str = "Dummy.Things", module: str | None = MODULE) -> None:
    """What ``pip install`` leaves behind: a module, and the distribution's own folder."""
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", "utf-8")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points), "utf-8")
    if module is not None:
        (folder / "dummy_things.py").write_text(module, "utf-8")


ENTRY_POINTS = """
    [ecoflap.criteria]
    first = dummy_things:First
    [ecoflap.importances]
    position = dummy_things:Position
    [ecoflap.tasks]
    zeros = dummy_things:Zeros
    [ecoflap.formats]
    shout = dummy_things:SHOUT
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from, here and in processes that are started."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    sys.modules.pop("dummy_things", None)


@pytest.fixture
def installed_things(site: Path) -> Path:
    install(site, ENTRY_POINTS)
    return site


@pytest.fixture
def registered(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each once as an object, once by its place."""
    (site / "dummy_things.py").write_text(MODULE, "utf-8")
    import dummy_things  # type: ignore[import-not-found]

    for registry in KINDS.values():
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for kind, attribute in NAMES.items():
        register(kind, f"run-{attribute.lower()}", getattr(dummy_things, attribute))
        ecoflap.register(kind, f"late-{attribute.lower()}", f"dummy_things:{attribute}")
    return site


def model_and_text(folder: Path) -> tuple[Path, Path]:
    text = folder / "data.shout"
    prose(folder / "prose.txt")
    words = (folder / "prose.txt").read_text("utf-8").split()
    lines = [" ".join(words[i : i + 40]).upper() for i in range(0, len(words), 40)]
    text.write_text("\n".join(["SHOUT", *lines]), "utf-8")
    return picos.write_checkpoint("llama", folder / "llama"), text


def test_names_are_listed_without_an_import(installed_things: Path) -> None:
    assert installed("criterion") == ["first"]
    assert (installed("importance"), installed("task"), installed("calibration")) == (
        ["position"],
        ["zeros"],
        ["shout"],
    )
    assert installed("sparsity") == []
    with pytest.raises(UnknownName, match="did you mean 'first'"):
        CRITERIA.check("frist")
    assert "dummy_things" not in sys.modules
    assert CRITERIA.names()[0] == "wanda"
    assert not is_global("first")
    assert not reads_data("first")
    assert [one.key for one in citations("position", "first")] == ["owl", "plain"]
    assert paper("plain") is not None
    assert IMPORTANCES.fact("position", "blockwise", False) is True


def test_from_the_command_line(installed_things: Path, run: Command, tmp_path: Path) -> None:
    """Each of them in one run, its page and card; in a comparison; in ``--help``."""
    model, text = model_and_text(tmp_path)
    shown = " ".join(run("prune", "--help").well().out.split())
    for words in ("Of other packages: first.", "Of other packages: position.", "Of other packages: zeros."):
        assert words in shown
    job = ("--calibration", text, "--samples", 4, "--sequence-length", 16, "--sparsity", 0.5)
    method = ("--importance", "position", "--importance-options", "start=2", "--criterion", "first")
    run("prune", model, *job, *method, "--criterion-options", "flip=true", "--task", "zeros",
        "--task-option", "scale=0.5", "-o", "out").well()  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    scores = json.loads((tmp_path / "out" / "importance.json").read_text("utf-8"))
    assert (scores["method"], scores["settings"]["start"]) == ("position", 2.0)
    found = metrics["pruned"]["zeros"]
    assert (found["unit"], found["better"], found["hub_type"]) == ("%", "less", "other")
    assert 0 < found["value"] <= 0.25
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    percent = f"{100 * found['value']:.1f} %"
    assert percent in page
    assert "Plain &lt;Things&gt;" in page
    card = (tmp_path / "out" / "model" / "README.md").read_text("utf-8")
    assert percent in card
    assert "type: other" in card
    assert "2401.00001" in card
    run("compare", model, *job[:-2], "--methods", "position+first,wanda", "--sparsities", "0.5", "--task", "zeros",
        "-o", "grid").well()  # fmt: skip
    record = json.loads((tmp_path / "grid" / "compare.json").read_text("utf-8"))
    assert record["methods"][0]["citations"] == ["owl", "plain"]
    assert record["tests"][0]["higher_is_better"] is False
    assert record["tests"][0]["unit"] == "%"
    assert all(cell["error"] is None for cell in record["cells"])
    assert "2401.00001" in (tmp_path / "grid" / "compare.html").read_text("utf-8")
    run("prune", model, *job, "--criterion", "frist", "-o", "no").refused("did you mean 'first'")


@pytest.mark.parametrize("way", ["run", "late"])
def test_from_python(registered: Path, way: str, tmp_path: Path) -> None:
    model, text = model_and_text(tmp_path)
    loaded = ecoflap.load(str(model))
    batches = [dict.fromkeys(("input_ids", "labels"), torch.arange(16).view(2, 8) % 7)]
    result = ecoflap.prune(loaded.model, batches, importance=f"{way}-position", criterion=f"{way}-first")
    assert result.importance is not None
    scores = [result.importance.scores[layer.name].score for layer in result.anatomy.layers]
    assert scores == [float(number + 1) for number in range(len(scores))]
    for layer in result.anatomy.layers:
        weight = loaded.model.get_parameter(layer.name).flatten()
        zeros = int((weight == 0).sum())
        assert not weight[:zeros].any(), "the first weights are the zeros"
    from ecoflap.data import load_samples

    assert load_samples(text, samples=2, seed=0).source
    found = ecoflap.compare(
        str(model), f"{way}-position+{way}-first", [0.5], output=tmp_path / "grid", calibration=str(text), samples=4,
        sequence_length=16, task=f"{way}-zeros",
    )  # fmt: skip
    (cell,) = found.cells
    assert cell.error is None
    assert cell.value is not None
    assert 0 < cell.value <= 0.5
    assert f"{100 * cell.value:.1f} %" in (tmp_path / "grid" / "compare.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("value", "module", "words"),
    [
        ("nowhere_at_all:First", None, "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("dummy_things:Frist", MODULE, "AttributeError"),
        ("dummy_things:First", "raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("dummy_things:First", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("dummy_things:First", "def First(): ...", "must be a dataclass"),
        ("dummy_things:First", f"{DATACLASS}class First: ...", "must have name"),
        ("dummy_things:First", f"{DATACLASS}class First:\n    depth: int", "also depth"),
        ("dummy_things:First", f"{DATACLASS}class First:\n    is_global = True", "must say is_global = True"),
    ],
)
def test_a_broken_package(value: str, module: str | None, words: str, site: Path, run: Command, tmp_path: Path) -> None:
    """Who does not ask for what it adds is not troubled; who does reads one line with the distribution's name."""
    install(site, f"[ecoflap.criteria]\nfirst = {value}\n", module=module)
    model, _ = model_and_text(tmp_path)
    job = (model, "--calibration", tmp_path / "prose.txt", "--samples", 2, "--sequence-length", 16, "-o", "out")
    assert "Of other packages: first." in " ".join(run("prune", "--help").well().out.split())
    run("prune", *job, "--criterion", "first").refused("criterion 'first' of Dummy.Things 1.5", words)
    run("prune", *job, "--criterion", "magnitude", "--importance", "uniform").well()


def test_entry_points_that_cannot_be_used(site: Path, tmp_path: Path) -> None:
    install(site, "[ecoflap.tasks]\na+b = dummy_things:Zeros\nfine = dummy_things:Zeros\n")
    install(site, "[ecoflap.tasks]\nfine = dummy_things:Zeros\n", name="Zweite", module=None)
    install(site, "[ecoflap.tasks]\nno equals sign here\n", name="Unlesbar", module=None)
    with pytest.warns(UserWarning) as told:  # noqa: PT030
        assert KINDS["task"].outside() == ["fine"]
    messages = " ".join(str(one.message) for one in told)
    for words in (
        "'a+b'",
        "Dummy.Things 1.5 and Zweite 1.5 both give ecoflap.tasks 'fine'",
        "Unlesbar 1.5 can't be read",
    ):
        assert words in messages


def test_our_own_names_stay_ours(site: Path) -> None:
    install(site, "[ecoflap.criteria]\nwanda = dummy_things:First\n")
    assert CRITERIA.outside() == []
    assert CRITERIA.get("wanda").__module__ == "ecoflap.pruning.wanda"


def test_what_register_refuses(registered: Path) -> None:
    with pytest.raises(UnknownName, match="unknown kind 'criteria': did you mean 'criterion'"):
        register("criteria", "x", "a:b")
    for name in ("wanda", "run-first", "a+b", "", "x,y", "a/b"):
        with pytest.raises(InvalidOption):
            register("criterion", name, "dummy_things:First")
    with pytest.raises(InvalidOption, match=r"no 'package\.module:attribute'"):
        register("task", "x", "dummy_things")
    wrong: list[tuple[str, Any]] = [("importance", object()), ("task", dict), ("format", 3), ("criterion", int)]
    for kind, target in wrong:
        with pytest.raises(BrokenPlugin, match="must be"):
            register(kind, "x", target)
    assert "x" not in CRITERIA


def test_the_tables_say_what_the_classes_say() -> None:
    for name in IMPORTANCES.own():
        measure: Any = IMPORTANCES.get(name)
        assert IMPORTANCES.fact(name, "rule", "proportional") == measure.rule, name
    for name in CRITERIA.own():
        criterion: Any = CRITERIA.get(name)
        assert is_global(name) == callable(getattr(criterion, "targets", None)), name


def test_the_documents_examples(registered: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "site" / "document_of_extending.py").write_text("\n".join(blocks), "utf-8")
    import document_of_extending  # type: ignore[import-not-found]  # noqa: F401

    assert {"random", "depth", "parameters", "shout"} <= {name for kind in KINDS.values() for name in kind.outside()}
    model, _ = model_and_text(tmp_path)
    loaded = ecoflap.load(str(model))
    batches = [dict.fromkeys(("input_ids", "labels"), torch.arange(16).view(2, 8) % 7)]
    result = ecoflap.prune(loaded.model, batches, importance="depth", criterion="random", criterion_options={"seed": 3})
    assert result.allocation.zeros == sum(
        int((loaded.model.get_parameter(layer.name) == 0).sum()) for layer in result.anatomy.layers
    )
    found = KINDS["task"].get("parameters")().run(loaded.model, None, TestData())
    assert found.value == sum(int((p != 0).sum()) for p in loaded.model.parameters())

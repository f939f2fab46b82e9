"""What the commands print: tables, JSON alone, nothing with --quiet, help that fits; and what starts without torch."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import picos
import pytest
from console import TEXT, Command, prose, questions
from rich.console import Console

import ecoflap
from ecoflap.cli.terminal import Bars, Lines, messages, progress_on
from ecoflap.errors import StorageError
from ecoflap.run.recipe import FILE_ONLY, Recipe, flag_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("made")
    return SimpleNamespace(
        llama=picos.write_checkpoint("llama", folder / "llama"),
        blip2=picos.write_checkpoint("blip2_t5", folder / "blip2"),
        prose=prose(folder / "prose.txt"),
        questions=questions(folder / "vqa"),
    )


COMMANDS = (
    "prune", "recover", "finetune", "upop", "inspect", "importance", "allocate", "compare", "evaluate", "analyse",
    "report", "push", "pack", "unpack", "bench",
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help(run: Command, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in COMMANDS:
        outcome = run(name, "--help").well()
        text, _, examples = outcome.out.partition("Examples:\n")
        assert text.startswith("Usage: ecoflap " + name)
        assert examples.strip().startswith(f"ecoflap {name}")
        assert "…" not in text
        assert max(map(len, text.splitlines())) < width
        assert outcome.err == ""


def test_help_says_every_option_once_under_a_heading(run: Command) -> None:
    text = run("prune", "--help").well().out
    for field in Recipe.model_fields:
        if field not in ("model", *FILE_ONLY):
            flag = flag_of(field)
            assert text.count(f"  {flag} ") + text.count(f"  {flag}\n") == 1
    for heading in ("Model", "Sparsity", "Importance (stage 1)", "Pruning (stage 2)", "Calibration", "Evaluation"):
        assert f"\n{heading}:\n" in text
    assert text.index("Calibration:") < text.index("Run and output:")


def test_the_examples_of_the_help_are_understood(run: Command) -> None:
    """Each example's options exist: with --help at its end, the command line is accepted."""
    for name in COMMANDS:
        examples = run(name, "--help").out.partition("Examples:\n")[2].strip().splitlines()
        for line in examples:
            words = line.split()
            options = [word for word in words if word.startswith("-")]
            text = run(words[1], "--help").out
            assert words[:2] == ["ecoflap", name]
            assert all(option in text for option in options), line


def test_the_documentation_names_every_option_and_no_other(run: Command) -> None:
    text = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text("utf-8")
    helps = {name: run(name, "--help").out for name in COMMANDS}
    known = {option for page in helps.values() for option in re.findall(r"--[a-z][a-z-]+", page)}
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    assert known - named <= {"--help", "--examples"}
    assert named - known <= {"--help"}
    for line in re.findall(r"^ecoflap .*", text, re.MULTILINE):
        words = line.partition(" #")[0].split()
        for option in (word for word in words if word.startswith("-")):
            assert option in helps[words[1]], line


def test_bare_command_and_version(run: Command) -> None:
    text = run().well().out
    assert all(name in text for name in COMMANDS)
    assert run("--version").well().out == f"ecoflap {ecoflap.__version__}\n"


def test_prune_json_is_json_alone(run: Command, made: SimpleNamespace) -> None:
    outcome = run("prune", made.llama, "--calibration", made.prose, *TEXT, "-o", "run", "--json").well()
    assert outcome.err == ""
    data = json.loads(outcome.out)
    assert data["run"] == "run"
    assert data["sparsity"]["prunable"] == 0.5


def test_prune_quiet_is_quiet(run: Command, made: SimpleNamespace) -> None:
    outcome = run("prune", made.llama, "--calibration", made.prose, *TEXT, "-o", "run", "--quiet").well()
    assert outcome.out == outcome.err == ""


def test_prune_without_a_terminal(run: Command, made: SimpleNamespace) -> None:
    job = ("prune", made.blip2, "--calibration", made.questions, "--samples", 4, "--importance-samples", 2)
    outcome = run(*job, "--test", made.questions, "-o", "run").well()
    assert [line.partition(":")[0] for line in outcome.err.splitlines()] == [
        "calibration", "objective", "importance", "vqa, dense", "importance", "pruning", "saving", "vqa, pruned",
    ]  # fmt: skip
    for word in ("vqa accuracy", "sparsity, prunable weights", "language", "vision", "run/model", "run/report.html"):
        assert word in outcome.out
    assert "\x1b" not in outcome.out + outcome.err


def test_inspect(run: Command, made: SimpleNamespace) -> None:
    plain = run("inspect", made.blip2).well()
    for word in ("Blip2ForConditionalGeneration", "vision_model.encoder.layers", "order of definition", "of the model"):
        assert word in plain.out
    watched = run("inspect", made.blip2, "--calibration", made.questions).well()
    assert "order of a forward" in watched.out
    data = json.loads(run("inspect", made.blip2, "--calibration", made.questions, "--json").well().out)
    assert data["traced"] is True
    model = picos.FAMILIES["blip2_t5"].build()
    assert data["total_parameters"] == sum(p.numel() for p in model.parameters())
    listed = {
        layer["name"]: layer["shape"]
        for tower in data["towers"] for block in tower["blocks"] for layer in block["layers"]
    }  # fmt: skip
    assert data["prunable_parameters"] == sum(rows * columns for rows, columns in listed.values())
    for name, shape in listed.items():
        assert list(model.get_parameter(name).shape) == shape
    assert any("bridge" in entry["reason"] for entry in data["dense"])
    more = json.loads(run("inspect", made.blip2, "--json", "--include", "qformer").well().out)
    assert more["prunable_parameters"] > data["prunable_parameters"]


def test_importance_and_allocate(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    outcome = run("importance", made.llama, "--calibration", made.prose, *TEXT, "--json").well()
    assert json.loads(outcome.out) == json.loads((tmp_path / "importance.json").read_text("utf-8"))
    run("importance", made.llama, "--calibration", made.prose, *TEXT).refused("importance.json", "--overwrite")
    quiet = run("importance", made.llama, "--calibration", made.prose, *TEXT, "--overwrite", "--quiet").well()
    assert quiet.out == quiet.err == ""
    table = run("allocate", "importance.json", "--sparsity", "0.6").well()
    assert "60.0 %" in table.out
    assert "allocation.json" in table.out
    data = json.loads(run("allocate", "importance.json", "--json", "--overwrite").well().out)
    assert data == json.loads((tmp_path / "allocation.json").read_text("utf-8"))
    assert run("allocate", "importance.json", "-o", "q.json", "--quiet").well().out == ""


def test_evaluate(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    text = run("evaluate", made.llama, "--test", made.prose, "--sequence-length", 16, "--test-samples", 4).well()
    assert "perplexity" in text.out
    vqa = run("evaluate", made.blip2, "--task", "vqa", "--test", made.questions, "--json", "-o", "v.json").well()
    results = json.loads(vqa.out)
    assert vqa.err == ""
    assert results["vqa"]["n"] == 12
    written = json.loads((tmp_path / "v.json").read_text("utf-8"))["results"]
    samples = written["vqa"].pop("samples")
    assert written == results
    assert sum(samples["scores"]) / 12 == results["vqa"]["value"]


def test_results_are_shown_where_their_file_can_not_be_written(
    run: Command, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("v.json can't be written (No space left on device)")

    monkeypatch.setattr("ecoflap.support.files.write_json", full)
    options = ("--test", made.prose, "--sequence-length", 16, "--test-samples", 2, "--json", "-o", "v.json")
    ended = run("evaluate", made.llama, *options)
    assert ended.code == StorageError.exit_code
    assert json.loads(ended.out)["perplexity"]["n"] > 0
    assert "No space left" in ended.err


def test_report_again(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    run("prune", made.llama, "--calibration", made.prose, *TEXT, "-o", "run", "--quiet").well()
    before = (tmp_path / "run" / "report.html").read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    assert "run/report.html" in run("report", "run").well().out
    assert (tmp_path / "run" / "report.html").read_bytes() == before
    assert run("report", "run", "--quiet").well().out == ""


def test_warnings_of_the_checkpoint_are_seen(run: Command, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = picos.write_checkpoint("vit", tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    weights["left.over"] = weights["classifier.bias"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    job = ("prune", folder, "--criterion", "magnitude", "--importance", "uniform")
    outcome = run(*job, "-o", "run").well()
    told = [line for line in outcome.err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert told[0].startswith("ecoflap: warning: ")
    assert "left.over" in told[0]
    assert "left.over" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert run(*job, "-o", "second", "--quiet").well().err == ""


def test_warnings_of_others_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    with messages, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = messages._warning
        warnings.warn_explicit("for programmers", UserWarning, "/lib/torch/nn.py", 1)
        warnings.warn_explicit("for you", UserWarning, "/lib/ecoflap/allocation.py", 1)
        logging.getLogger("ecoflap.model").warning("two\nlines")
        logging.getLogger("ecoflap").info("a detail")
    assert capfd.readouterr().err == "ecoflap: warning: for you\necoflap: warning: two lines\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_bars(width: int) -> None:
    screen = io.StringIO()
    progress = progress_on(Console(file=screen, force_terminal=True, width=width, legacy_windows=False))
    assert isinstance(progress, Bars)
    with progress.stage("importance", total=1000, done=400) as task:
        task.advance(3, "language_model.encoder.block.0.layer.0.SelfAttention.q.weight")
        while " 403/1000 " not in screen.getvalue():  # the screen is drawn ten times a second
            time.sleep(0.01)
        task.advance(597, "brackets [red] in a name")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "importance" in text
    assert " 403/1000 " in text  # never squeezed by a long name
    assert "1000/1000" in text
    if width == 80:
        assert "…" in text
        assert ".q.weight" in text
    assert re.search(r"left 0 s \d+\.\d GB", text)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= width
    if width == 120:
        assert "SelfAttention.q.weight" in text


def test_lines() -> None:
    screen = io.StringIO()
    progress = progress_on(Console(file=screen, force_terminal=False, width=200))
    assert isinstance(progress, Lines)
    with progress.stage("pruning", total=6, done=2) as task:
        task.advance(4, "model.layers.0")
    assert re.fullmatch(r"pruning: 6/6, 0 s, \d+\.\d GB\n", screen.getvalue())
    assert screen.getvalue().count("\n") == 1


def test_allocate_needs_no_torch(run: Command, made: SimpleNamespace, tmp_path: Path) -> None:
    run("importance", made.llama, "--calibration", made.prose, *TEXT, "--quiet").well()
    code = (
        "import sys; sys.argv = ['ecoflap', 'allocate', 'importance.json', '--sparsity', '0.6']\n"
        "from ecoflap.cli import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'jinja2', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "60.0 %" in ended.stdout


def test_a_wrong_option_is_told_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['ecoflap', 'prune', 'm', '--sparsity', '2']\n"
        "from ecoflap.cli import main\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert left.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.slow
def test_python_dash_m(made: SimpleNamespace, tmp_path: Path) -> None:
    """A whole run in a process of its own: nothing on standard error but our lines, whatever transformers says."""
    job = ["prune", str(made.llama), "--calibration", str(made.prose), *TEXT, "-o", "run", "--json"]
    ended = subprocess.run(
        [sys.executable, "-m", "ecoflap", *job], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert json.loads(ended.stdout)["format"] == 1

"""Code that comes with a checkpoint, a run or a recipe: it runs only where the user says so on the command line."""

from __future__ import annotations

import builtins
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import picos
import pytest
import yaml
from console import Command, llama_and_prose

from ecoflap.errors import CheckpointError, EcoflapError, InvalidOption
from ecoflap.model.checkpoint import load
from ecoflap.report.records import reproduce
from ecoflap.run.recipe import Recipe

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({mark!r}).write_text("the checkpoint's code ran")
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): config_class = Config
class Tokens(PreTrainedTokenizerFast): pass
"""
MAP = {
    "AutoConfig": "own.Config",
    "AutoModel": "own.Model",
    "AutoModelForCausalLM": "own.Model",
    "AutoTokenizer": ["own.Tokens", "own.Tokens"],
    "AutoProcessor": "own.Tokens",
    "AutoImageProcessor": "own.Tokens",
}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose every file names code of its own, and a terminal on which all questions are answered yes."""
    folder = picos.write_checkpoint("llama", tmp_path / "evil")
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), "auto_map": MAP}))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": ["AutoModel"], "model_type": "never-heard-of"},
        {"architectures": None, "auto_map": {}},
        {"architectures": ["pipeline", "Trainer", "own.Model"]},
    ],
)
def test_code_of_a_checkpoint_does_not_run_and_nobody_is_asked(
    evil: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = evil / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with suppress(CheckpointError):
        load(evil, device="cpu")
    assert not (tmp_path / "ran").exists()


def _file(folder: Path, **fields: object) -> Path:
    path = folder / "stranger.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "flag", "allowed"),
    [
        ({"trust_remote_code": True}, "--trust-remote-code", {"trust_remote_code": True}),
        ({"objective": "evil:loss"}, "--objective evil:loss", {"objective": "evil:loss"}),
        (
            {"task_options": {"include_path": "tasks"}},
            "--task-option include_path=tasks",
            {"task_options": {"include_path": "tasks"}},
        ),
        (
            {"evaluations": [{"task": "vqa", "options": {"include_path": "tasks"}}]},
            "--task-option include_path=tasks",
            {"task_options": {"include_path": "tasks"}},
        ),
    ],
)
def test_a_recipe_file_records_code_and_does_not_allow_it(
    tmp_path: Path, fields: dict[str, Any], flag: str, allowed: dict[str, Any]
) -> None:
    path = _file(tmp_path, **fields)
    for more in ([], [_file(tmp_path / "..", sparsity=0.3)]):  # a later file allows nothing, either
        with pytest.raises(InvalidOption, match="asks to run code") as caught:
            Recipe.load([path, *more])
        assert flag in str(caught.value)
    with pytest.raises(InvalidOption, match="asks to run code"):
        Recipe.load(path, {"sparsity": 0.4})
    assert Recipe.load(path, allowed).to_dict().items() >= allowed.items()


def test_what_the_user_says_otherwise_holds(tmp_path: Path) -> None:
    assert not Recipe.load(_file(tmp_path, trust_remote_code=True), {"trust_remote_code": False}).trust_remote_code
    assert Recipe.load(_file(tmp_path, objective="evil:loss"), {"objective": "lm"}).objective == "lm"
    assert Recipe.load(_file(tmp_path, objective="lm")).objective == "lm"
    assert not Recipe.load(_file(tmp_path, trust_remote_code=False)).trust_remote_code


def test_every_command_asks_for_the_users_own_flag(run: Command, tmp_path: Path) -> None:
    recipe = _file(tmp_path, trust_remote_code=True, objective="evil:loss")
    (tmp_path / "evil.py").write_text("open('ran', 'w').write('the recipe ran code')")
    for command in ("prune", "inspect", "importance", "evaluate", "compare"):
        run(command, "--recipe", recipe).refused("stranger.yaml", "asks to run code")
    run("inspect", "--recipe", recipe, "--trust-remote-code").refused("--objective evil:loss")
    assert not (tmp_path / "ran").exists()


def test_an_analysis_does_not_run_what_a_strangers_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ecoflap.report.analysis.subject import Subject

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('the run ran code')")
    llama_and_prose(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text("{}")
    fields = {"model": str(tmp_path / "llama"), "calibration": str(tmp_path / "prose.txt"), "objective": "evil:loss"}
    _file(tmp_path, **fields).rename(run / "recipe.yaml")
    with pytest.raises(InvalidOption, match="--objective evil:loss"):
        _ = Subject(run).anatomy
    with pytest.raises(InvalidOption, match="an analysis must use the run's own"):
        _ = Subject(run, code={"objective": "lm"}).anatomy
    assert not (tmp_path / "ran").exists()
    with pytest.raises(EcoflapError, match="cannot be imported"):  # it ran, and has no such function
        _ = Subject(run, code={"objective": "evil:loss"}).anatomy
    assert (tmp_path / "ran").exists()


def test_the_command_that_repeats_a_run_says_what_code_it_runs() -> None:
    told = reproduce({"evaluations": [{"task": "vqa"}], "trust_remote_code": True, "objective": "own:loss"})
    assert "--trust-remote-code" in told
    assert "--objective own:loss" in told

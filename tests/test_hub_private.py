"""What an upload never sends, and what it refuses before the Hub is asked: the server here must hear nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from console import Command
from fake_hub import FakeHub
from safetensors.torch import save_file

from ecoflap.errors import CheckpointError, EcoflapError, HubError, InvalidOption
from ecoflap.report.hub import check_account, push


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model's: nothing of an upload loads it."""
    folder = tmp_path / "somebody" / "secret project" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "README.md").write_text("# A card\n")
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    return folder


def _link(name: str, target: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model.parent / "private.txt").write_text("a secret")
        (model.parent / "private").mkdir()
        (model / name).symlink_to(target)

    return make


def _write(name: str, content: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model / name).write_text(content)

    return make


def _lose_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _cut_weights(model: Path) -> None:
    os.truncate(model / "model.safetensors", 40)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (_link("notes.txt", "../private.txt"), InvalidOption, "notes.txt is a link to a place outside"),
        (_link("more", "../private"), InvalidOption, "more is a link to a place outside"),
        (_link("round.json", "round.json"), InvalidOption, "round.json is a link"),
        (_link("gone.json", "/nowhere/at/all.json"), InvalidOption, "gone.json is a link to a place outside"),
        (_write("config.json", json.dumps({"api_key": "x"})), InvalidOption, "not a model's configuration"),
        (_write("config.json", "[" * 100_000), CheckpointError, "config.json"),
        (_lose_weights, CheckpointError, "no weights"),
        (_cut_weights, CheckpointError, "broken or incomplete"),
    ],
)
def test_what_is_refused_before_the_hub_is_asked(
    hub: FakeHub, model: Path, change: Callable[[Path], None], kind: type[EcoflapError], words: str
) -> None:
    change(model)
    with pytest.raises(kind) as caught:
        push(model, "me/sparse")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json"])
def test_a_folder_of_this_machine_in_a_text(hub: FakeHub, model: Path, name: str) -> None:
    place = f"{model.parent}/llama"
    (model / name).write_text(json.dumps({"model_type": "llama", "_name_or_path": place}))
    with pytest.raises(InvalidOption, match="names a folder of this machine"):
        push(model, "me/sparse")
    assert hub.requests == []


def test_only_a_checkpoint_s_files_are_sent(hub: FakeHub, model: Path) -> None:
    for name in ("diary.pdf", "training_args.bin", "optimizer.pt", ".env", "LICENSE", "modeling_own.py"):
        (model / name).write_text("x")
    (model / ".git").mkdir()
    (model / ".git" / "config.json").write_text("{}")
    (model / "chat_template.jinja").symlink_to("README.md")  # within the folder
    os.mkfifo(model / "pipe.json")
    with pytest.warns(UserWarning, match=r"diary.pdf, optimizer.pt, pipe.json, training_args.bin: no part"):
        push(model, "me/sparse")
    assert sorted(hub.files("me/sparse")) == [
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "model.safetensors", "modeling_own.py"
    ]  # fmt: skip


def test_runs_without_a_model_of_their_own(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("sparsity: 0.5\n")
    with pytest.raises(InvalidOption, match="not finished: the command that began it, with --resume"):
        push(run, "me/sparse")
    (run / "metrics.json").write_text("{}")
    (run / "model").symlink_to(model)
    with pytest.raises(InvalidOption, match="a link to a folder outside of the run"):
        push(run, "me/sparse")
    (run / "compare.json").write_text("{}")
    with pytest.raises(InvalidOption, match="--keep-models"):
        push(run, "me/sparse")
    (run / "models").mkdir()
    with pytest.raises(InvalidOption, match=r"run/models/NAME"):
        push(run, "me/sparse")
    assert hub.requests == []


@pytest.mark.parametrize("branch", ["", " ", "a b", "-x", "a..b", "/a", "a/", "a.lock", "a\nb", "ä", "a~1", "@"])
def test_branches_that_are_none(hub: FakeHub, model: Path, branch: str) -> None:
    with pytest.raises(InvalidOption, match="no name of a branch"):
        push(model, "me/sparse", revision=branch)
    assert hub.requests == []


def test_the_token_is_not_shown(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_se\x01cret")  # the client quotes such a header
    with pytest.raises(HubError) as caught:
        check_account()
    assert "cret" not in str(caught.value)


def test_answers_that_say_nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ([], {"name": 5}, {"auth": {"accessToken": {"role": "write"}}}, {"name": "me", "auth": "x"}):
        monkeypatch.setattr(hub, "answer", lambda *_, answer=answer: (200, answer))
        with pytest.raises(HubError, match="the answer of the Hub"):
            check_account()
    monkeypatch.setattr(hub, "answer", lambda *_: (500, {"error": "x" * 100_000}))
    with pytest.raises(HubError, match="500") as caught:
        check_account()
    assert len(str(caught.value)) < 500


def test_the_command_says_it_in_one_line(hub: FakeHub, run: Command, model: Path) -> None:
    run("push", model, "me/my model").refused("no name of a repository")
    run("push", model.parent, "me/sparse").refused("neither a run directory")
    run("push", model / "config.json", "me/sparse").refused("neither a run directory")
    run("push", "no\0where", "me/sparse").refused("null byte")
    hub.role = "read"
    failed = run("push", model, "me/sparse")
    assert (failed.code, len(failed.err.splitlines())) == (1, 1)
    assert "may only read" in failed.err

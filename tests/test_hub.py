"""Uploads, by the real client of the Hub against a server on this machine; what it refuses is said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import console
import huggingface_hub
import pytest
import yaml
from console import Command
from fake_hub import TOKEN, FakeHub
from safetensors.torch import load

import ecoflap
from ecoflap.errors import HubError, InvalidOption
from ecoflap.report.hub import check_account, push
from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

FAST = {"criterion": "magnitude", "importance": "uniform", "samples": 2, "test_samples": 2}
OPTIONS = ("--criterion", "magnitude", "--importance", "uniform", "--samples", 2, "--test-samples", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(Recipe(**FAST), tmp_path_factory.mktemp("hub") / "my run")


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return console.command(capfd, monkeypatch)


def test_the_whole_model_arrives(hub: FakeHub, run: Path) -> None:
    address = push(run, "me/sparse")
    assert address.startswith(f"{hub.endpoint}/me/sparse/commit/")
    sent = hub.files("me/sparse")
    local = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert sent.keys() == local.keys()
    assert {name: data for name, data in sent.items() if name != "README.md"} == {
        name: data for name, data in local.items() if name != "README.md"
    }
    assert sent["README.md"] == local["README.md"].replace(b"path/to/this/model", b"me/sparse")
    assert sent["README.md"] != local["README.md"]
    assert load(sent["model.safetensors"])
    assert hub.repositories["me/sparse"]["private"] is False
    assert not any("wsgi" in request or "xet" in request for request in hub.requests)


def test_what_is_there_is_not_sent_again(hub: FakeHub, run: Path) -> None:
    push(run, "me/sparse")
    first = sum(request.startswith("PUT") for request in hub.requests)
    push(run / "model", "sparse")  # the folder of the model does as well, and one's own name may be left out
    assert first == 1
    assert sum(request.startswith("PUT") for request in hub.requests) == first
    assert list(hub.repositories) == ["me/sparse"]


def test_private_and_another_branch(hub: FakeHub, run: Path) -> None:
    push(run, "me/secret", private=True, revision="p50")
    assert hub.repositories["me/secret"]["private"] is True
    assert hub.files("me/secret") == {}
    assert "model.safetensors" in hub.files("me/secret", "p50")
    push(run, "me/open")
    hub.requests.clear()
    with pytest.raises(InvalidOption, match="public"):
        push(run, "me/open", private=True)
    assert not any("commit" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("POST /api/repos/create", 401, "does not accept the token"),
        ("POST /api/repos/create", 403, "may not write to me/sparse (the reason)"),
        ("POST /api/models/me/sparse/preupload", 403, "may not write"),
        ("POST /api/models/me/sparse/commit", 409, "409 (the reason)"),
        ("PUT /objects", 400, "400"),
        ("POST /api/models/me/sparse/commit", 404, "check the name"),
    ],
)
def test_refusals(hub: FakeHub, run: Path, route: str, status: int, words: str) -> None:
    hub.refuse[route] = (status, "the reason")
    with pytest.raises(HubError) as caught:
        push(run, "me/sparse")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_is_logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_account() == "me"
    hub.role = "read"
    with pytest.raises(HubError, match="may only read"):
        check_account()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept the token"):
        check_account()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        check_account()


def test_nobody_answers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127.0.0.1:9 can't be reached"):
        check_account()


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "me/my model", "-x", "me/x.git", ""])
def test_names_that_are_none(run: Path, name: str) -> None:
    with pytest.raises(InvalidOption, match="no name of a repository"):
        push(run, name)


def test_what_can_not_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="neither a run directory nor a folder with a model"):
        push(tmp_path, "me/x")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sparsity": 0.5}))
    with pytest.raises(InvalidOption, match="not finished"):
        ecoflap.push(tmp_path, "me/x")


def test_the_option_of_prune(hub: FakeHub, shell: Command) -> None:
    done = shell("prune", *OPTIONS, "--output", "r", "--push-to-hub", "sparse", "--private").well()
    assert f"{hub.endpoint}/me/sparse" in done.out
    assert hub.repositories["me/sparse"]["private"] is True
    again = shell("prune", *OPTIONS, "--output", "r", "--resume", "--push-to-hub", "sparse", "--json").well()
    assert json.loads(again.out)["pushed"].startswith(f"{hub.endpoint}/me/sparse/commit/")


def test_a_wrong_account_is_told_before_anything_is_done(hub: FakeHub, shell: Command) -> None:
    for name, words in (("a/b/c", "no name of a repository"), ("me/sparse", "may only read")):
        hub.role = "read"
        refused = shell("prune", *OPTIONS, "--output", "r", "--push-to-hub", name)
        assert refused.code in (1, 2)
        assert words in refused.err
        assert len(refused.err.splitlines()) == 1
        assert not Path("r").exists()
    shell("prune", *OPTIONS, "--output", "r", "--private").refused("--push-to-hub")


def test_a_failed_upload_leaves_the_run_whole(hub: FakeHub, shell: Command) -> None:
    hub.refuse["POST /api/repos/create"] = (403, "not yours")
    failed = shell("prune", *OPTIONS, "--output", "my run", "--push-to-hub", "other/sparse", "--json")
    assert failed.code == 1
    assert "ecoflap push 'my run' other/sparse" in failed.err
    assert "not yours" in failed.err
    assert json.loads(failed.out)["pushed"] is None
    hub.refuse.clear()
    done = shell("push", "my run", "other/sparse").well()
    assert "other/sparse" in done.out
    assert "README.md" in hub.files("other/sparse")


def test_by_the_environment_alone(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    job = [sys.executable, "-m", "ecoflap", "push", str(run), "me/sparse", "--revision", "v1", "--json"]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"].startswith(hub.endpoint)
    assert "config.json" in hub.files("me/sparse", "v1")
    offline = subprocess.run(
        job, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False, timeout=120
    )
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE" in offline.stderr
    assert len(offline.stderr.splitlines()) == 1

"""Files of strangers: whatever bytes they hold, they are read, or one line says what is wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from console import Command
from hypothesis import given, settings
from hypothesis import strategies as st

from ecoflap.allocation.parts import read_allocation
from ecoflap.data.class_names import class_names
from ecoflap.data.sources import check_source
from ecoflap.errors import CalibrationError, CheckpointError, EcoflapError, InvalidOption
from ecoflap.importance.scores import Importance
from ecoflap.model.files import locate, read_config
from ecoflap.report.card import _of_run
from ecoflap.report.data import Metrics, RunData
from ecoflap.report.predictions import Predictions, gallery
from ecoflap.report.reading import read_mapping, read_model
from ecoflap.report.records import options
from ecoflap.run.compare.record import Comparison
from ecoflap.run.directory import RunFailed
from ecoflap.run.recipe import Recipe
from ecoflap.support.reading import checked, json_value, read_json, read_yaml, yaml_value

DEEP = 200_000
LAYER = {"name": "b.w", "block": "b", "tower": "t", "modality": "language", "shape": [4, 4], "score": 1.0, "n": 2}
IMPORTANCE = {"format": 1, "method": "owl", "settings": {}, "layers": [LAYER], "curves": {}}
ALLOCATED = {"name": "b.w", "block": "b", "tower": "t", "group": "b", "shape": [4, 4], "weights": 16, "zeros": 8}
ALLOCATION = {"format": 1, "sparsity": 0.5, "max_sparsity": 0.6, "rule": "proportional", "layers": [ALLOCATED]}


def _importance(path: Path) -> None:
    Importance.load(path)


def _recipe(path: Path) -> None:
    Recipe.load(path)


def _metrics(path: Path) -> None:
    read_model(path, Metrics)


def _predictions(path: Path) -> None:
    for task in (read_model(path, Predictions) or Predictions()).tasks.values():
        gallery(path.parent, task)


def _comparison(path: Path) -> None:
    checked(read_json(path, "the comparison"), Comparison, str(path))


def _card(path: Path) -> None:
    """The page and the card show a recipe of any version, so they take fields that ``Recipe`` refuses."""
    found = RunData(path.parent, read_mapping(path), None, None, Metrics())
    _of_run(found, None)
    list(options(found.recipe or {}))


def _config(path: Path) -> None:
    path.with_name("config.json").write_bytes(path.read_bytes())
    read_config(path.parent)


ANSWER = {"index": 1, "truth": "a", "dense": "b", "pruned": 2, "dense_score": 0.1, "pruned_score": 1, "picture": "x/y"}
COUNTS = {"both_right": 0, "only_dense": 0, "only_pruned": 1, "both_wrong": 0}
QUALITY = {"metric": "accuracy", "value": 0.5, "stderr": None, "n": 4, "settings": {"data": "/data/x"}}
TESTED = {"name": "vqa", "task": "vqa", "metric": "accuracy", "higher_is_better": True, "dense": QUALITY}
CELL = {"method": "wanda", "sparsity": 0.5, "seed": 0, "tests": {"vqa": QUALITY}, "seconds": {"pruning": 1.0}}
COMPARISON: dict[str, Any] = {
    **{"model": "m", "task": "vqa", "metric": "accuracy", "higher_is_better": True, "dense": QUALITY},
    **{"tests": [TESTED], "methods": [], "sparsities": [0.5], "seeds": [0], "cells": [CELL]},
    **{"recipe": {}, "environment": {}, "command": ""},
}
RECIPE = {"model": "m", "sparsity": 0.5, "samples": 4, "columns": {"question": "q"}, "seed": 1}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": {"quant_method": "x"}}

READERS: dict[str, tuple[Callable[[Path], object], Any]] = {
    "metrics": (_metrics, {"format": 1, "dense": {"vqa": QUALITY}, "stages": [{"name": "saving", "seconds": 1.0}]}),
    "predictions": (_predictions, {"format": 1, "tasks": {"vqa": {"rows": [ANSWER], "counts": COUNTS}}}),
    "comparison": (_comparison, COMPARISON),
    "card": (_card, {**RECIPE, "evaluations": [{"name": "vqa", "task": "vqa"}], "criterion": "wanda"}),
    "config": (_config, CONFIG),
    "importance": (_importance, IMPORTANCE),
    "allocation": (read_allocation, ALLOCATION),
    "recipe": (_recipe, RECIPE),
}


GIVEN = ("importance", "allocation", "recipe")  # files that users name
BROKEN = (  # of no kind of file
    "[" * DEEP,
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    '{"sparsity": ' + "9" * 5000 + "}",
    "\0",
    "\ud800",
    "",
    "null",
    "5",
)
WRONG = (  # fields of other types; what a kind of file does not know it may pass over
    '{"layers": [5], "tasks": [5], "dense": 5, "architectures": 5, "model": [], "format": 1}',
    '{"layers": [{"shape": [Infinity, 1e999]}]}',
    json.dumps({**IMPORTANCE, "layers": [{**LAYER, "shape": [1e300, 2]}]}),
    json.dumps(IMPORTANCE).replace("[4, 4]", "[1e999, 4]"),
    json.dumps({**IMPORTANCE, "settings": [1], "curves": [2]}),
    '{"architectures": ["A"], "quantization_config": "int4"}',
)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", [*BROKEN, *WRONG], ids=range(len(BROKEN) + len(WRONG)))
def test_a_hostile_file_is_one_line(tmp_path: Path, read: str, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    told: list[EcoflapError] = []
    try:
        READERS[read][0](path)
    except EcoflapError as error:
        told.append(error)
    assert told or (content in WRONG and read not in GIVEN)
    assert all(error.exit_code == 2 and len(str(error).splitlines()) == 1 for error in told)


@pytest.mark.parametrize("read", GIVEN)
def test_a_name_that_is_no_file_is_one_line(tmp_path: Path, read: str) -> None:
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for path in (loop, tmp_path, tmp_path / "nowhere", tmp_path / ("n" * 300), Path("nul\0byte.json")):
        with pytest.raises(EcoflapError, match=r"can't read"):
            READERS[read][0](path)


KEYS = st.sampled_from(
    [
        "layers",
        "evaluations",
        "model",
        "name",
        "shape",
        "zeros",
        "settings",
        "curves",
        "score",
        "search",
        "columns",
        "x",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def _changed(value: Any, path: list[int], new: Any) -> Any:
    """``value`` with ``new`` in place of what the steps ``path`` lead to."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, list):
        at = path[0] % len(value)
        return [_changed(item, path[1:], new) if number == at else item for number, item in enumerate(value)]
    chosen = list(value)[path[0] % len(value)]
    return {key: _changed(item, path[1:], new) if key == chosen else item for key, item in value.items()}


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=60)
@given(steps=st.lists(st.integers(0, 9), max_size=4), new=VALUES)
def test_any_value_in_any_field_is_read_or_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, read: str, steps: list[int], new: Any
) -> None:
    reader, whole = READERS[read]
    path = tmp_path_factory.getbasetemp() / f"field-{read}.json"
    path.write_text(json.dumps(_changed(whole, steps, new)), "utf-8")
    with suppress(EcoflapError):  # any other error fails
        reader(path)


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=60)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_flipped_bytes_are_read_or_are_one_line(
    tmp_path_factory: pytest.TempPathFactory, read: str, flips: list[tuple[int, int]]
) -> None:
    reader, whole = READERS[read]
    data = bytearray(json.dumps(whole).encode())
    for place, byte in flips:
        data[place % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / f"bytes-{read}.json"
    path.write_bytes(data)
    with suppress(EcoflapError):  # any other error fails
        reader(path)


@given(VALUES)
def test_what_is_whole_is_read_as_it_is(value: Any) -> None:
    finite = "NaN" not in json.dumps(value) and "Infinity" not in json.dumps(value)
    if finite:
        assert json_value(json.dumps(value)) == value
    else:
        with pytest.raises(ValueError, match="is no number"):
            json_value(json.dumps(value))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {seed: 1, seed: 2}", "- {1: a, 1: b}"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(InvalidOption, match=r"appears twice \(line \d\)"):
        read_yaml(tmp_path / "twice.yaml", "the recipe")


def test_yaml_is_read_as_pyyaml_does_otherwise() -> None:
    text = "a: &x {b: [1, 2.5, null, true], c: 'd'}\ne: *x\nf: {<<: *x, g: 2020-01-01}\n"
    assert yaml_value(text) == yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        yaml_value("!!python/object/apply:os.system [true]")


def test_a_device_without_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecoflap.support.reading.MOST_BYTES", 1000)
    with pytest.raises(InvalidOption, match="more than 1000 bytes"):
        read_json("/dev/zero", "the allocation")


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(InvalidOption, match="no whole JSON file"):
        read_json(pipe, "the allocation")
    with pytest.raises(InvalidOption, match="at least two class names"):
        class_names([str(pipe)])
    with pytest.raises(CalibrationError, match="a pipe or a device"):
        check_source(pipe)
    reader, writer = os.pipe()  # one with a writer, as the shell makes for <(command), is read to its end
    os.write(writer, b"[1]")
    os.close(writer)
    assert read_json(f"/dev/fd/{reader}", "the allocation") == [1]
    os.close(reader)


def test_a_model_folder_holds_plain_files_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"tokenizer.json' is no file"):
        locate(tmp_path)


def test_infinities_are_of_configurations_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert math.isinf(read_json(path, "the configuration", CheckpointError, finite=False)["time_step_limit"][1])
    with pytest.raises(InvalidOption, match="Infinity is no number"):
        read_json(path, "the allocation")


@pytest.mark.parametrize("content", ["[" * DEEP, "5", "null", '{"a": ' + "9" * 5000 + "}", "\0"])
def test_a_hostile_configuration_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_surroundings_are_looked_at(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    run("inspect").refused("current folder")


def test_what_nobody_foresaw_of_files_and_memory_is_one_line(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: BaseException) -> Callable[..., None]:
        def inspect_model(*_: object) -> None:
            raise error

        return inspect_model

    for error, code, words in (
        (OSError(24, "Too many open files", "/data/x.png"), 2, "/data/x.png"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (MemoryError(), 2, "out of memory"),
        (RecursionError("maximum depth"), 2, "nested too deep"),
    ):
        monkeypatch.setattr("ecoflap.run.commands.inspect_model", failing(error))
        found = run("inspect")
        assert (found.code, len(found.err.splitlines())) == (code, 1)
        assert words in found.err


def test_a_signal_while_modules_are_read_is_one_line() -> None:
    # The import of the command line is where the signal comes; a second process, as the handler ends its own at once.
    code = (
        "import sys, os, signal, types\n"
        "class Late:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'ecoflap.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Late())\n"
        "from ecoflap.__main__ import start\n"
        "start()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode == 130
    assert ended.stderr == "ecoflap: stopped; nothing was written\n"


def test_a_signal_before_the_command_begins_is_one_line(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt("")

    monkeypatch.setattr("ecoflap.cli.app", interrupted)
    found = run("inspect")
    assert (found.code, found.err) == (130, "ecoflap: stopped; nothing was written\n")


@pytest.mark.parametrize("inside", [False, True])
def test_a_signal_of_which_a_library_makes_another_error(
    run: Command, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    def inspect_model(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise (RunFailed if inside else ValueError)("could not determine the shape") from None

    monkeypatch.setattr("ecoflap.run.commands.inspect_model", inspect_model)
    found = run("inspect")
    told = "the same command with --resume goes on from here" if inside else "nothing was written"
    assert (found.code, found.err) == (143, f"ecoflap: stopped; {told}\n")


def test_a_signal_while_it_begins_to_listen_is_one_line(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Thread):
        def start(self) -> None:
            signal.raise_signal(signal.SIGINT)

    of_module = SimpleNamespace(Thread=Interrupted, Lock=threading.Lock, Event=threading.Event)
    monkeypatch.setattr("ecoflap.cli.signals.threading", of_module)
    found = run("inspect")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a process that ends, it is not heard any more
    assert (found.code, found.err) == (130, "ecoflap: stopped; nothing was written\n")


def test_the_handler_of_signals_is_there_before_anything_heavy() -> None:
    heavy = {"collections", "enum", "importlib.util", "logging", "re", "typer", "typing"}
    code = f"import sys, ecoflap.__main__; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert found.stdout.split() == []

"""Multiple-choice questions in the formats of MMLU, ARC, CommonsenseQA, OpenBookQA, PIQA, SIQA and WinoGrande."""

import string
from pathlib import Path
from typing import Any

import made
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.data import load_samples
from ecoflap.data.images import BrokenSample
from ecoflap.data.rows import read_choices

OPTIONS = ("red", "blue", "green")
LETTERED = "A. red\nB. blue\nC. green"

FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "mmlu": ({"choices": [*OPTIONS], "answer": 1, "subject": "art"}, "choices"),
    "arc": ({"choices": {"text": [*OPTIONS], "label": ["1", "2", "3"]}, "answerKey": "2"}, "choices"),
    "csqa": ({"choices": {"text": [*OPTIONS], "label": ["A", "B", "C"]}, "answerKey": "B"}, "choices"),
    "records": (
        {"choices": [{"label": x, "text": t} for x, t in zip("ABC", OPTIONS, strict=True)], "answer": "B"},
        "choices",
    ),
    "lettered": ({"options": LETTERED, "answer": "B. blue"}, "options"),
    "lettered, blank first": ({"options": "\n" + LETTERED, "answer": "B"}, "options"),
    "by text": ({"options": [*OPTIONS], "answer": "blue"}, "options"),
    "by key": ({"options": {"A": "red", "B": "blue", "C": "green"}, "answer": "B"}, "options"),
    "columns": ({"A": "red", "B": "blue", "C": "green", "answer": "B"}, "A,B,C"),
    "siqa": (
        {"context": "", "answerA": "red", "answerB": "blue", "answerC": "green", "label": "2"},
        "answerA,answerB,answerC",
    ),
    "number as text": ({"options": [*OPTIONS], "answer": "1"}, "options"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    record, column = FORMATS[name]
    drawn = load_samples(made.write_lines(tmp_path / "a.jsonl", [{"question": "q", **record}]), samples=1, seed=0)
    assert drawn.columns["choices"] == column
    sample = drawn.samples[0]
    assert (sample.choices, sample.text) == (OPTIONS, "blue")
    assert sample.kind == record.get("subject")


def test_two_ways_to_end(tmp_path: Path) -> None:
    piqa = {"goal": "How?", "sol1": "so", "sol2": "otherwise", "label": 0}
    sample = load_samples(made.write_lines(tmp_path / "a.jsonl", [piqa]), samples=1, seed=0).samples[0]
    assert (sample.question, sample.choices, sample.text) == ("How?", ("so", "otherwise"), "so")
    record = {
        "question": "The _ was small.",
        "option1": "box",
        "option2": "bag",
        "answer": "1",
    }  # WinoGrande counts from 1
    sample = load_samples(made.write_lines(tmp_path / "b.jsonl", [record]), samples=1, seed=0).samples[0]
    assert sample.text == "box"


def test_a_secret_answer_is_none(tmp_path: Path) -> None:
    record = {"question": "q", "choices": [*OPTIONS], "answer": -1}
    sample = load_samples(made.write_lines(tmp_path / "a.jsonl", [record]), samples=1, seed=0).samples[0]
    assert (sample.choices, sample.text) == (OPTIONS, None)


def test_a_passage_goes_before_the_question(tmp_path: Path) -> None:
    record = {"passage": " Tracy went home. ", "question": "Who?", "options": "A. Tracy\nB. Bo", "answer": "A. Tracy"}
    sample = load_samples(made.write_lines(tmp_path / "a.jsonl", [record]), samples=1, seed=0).samples[0]
    assert sample.question == "Tracy went home.\nWho?"


@pytest.mark.parametrize("answer", ["D", "3", "purple", 3])
def test_an_answer_that_is_no_choice_is_broken(answer: str | int) -> None:
    with pytest.raises(BrokenSample, match="is none of the 3 choices"):
        read_choices([*OPTIONS]).right(answer, "choices")


@pytest.mark.parametrize("value", [None, [], ["one"], "no letters", {"text": ["x"], "label": ["A"]}])
def test_no_choices(value: Any) -> None:
    with pytest.raises(BrokenSample, match="no choices"):
        read_choices(value)


TEXT = st.text(alphabet="ab .)C1", min_size=1, max_size=8).map(str.strip).filter(lambda t: t and t[0].islower())


@given(st.lists(TEXT, min_size=2, max_size=6, unique=True), st.data())
def test_lettered_lines_give_back_what_was_written(options: list[str], data: st.DataObject) -> None:
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
    choices = read_choices(lines)
    assert list(choices.texts) == options
    number = data.draw(st.integers(0, len(options) - 1))
    assert choices.right(string.ascii_uppercase[number], "x") == options[number]
    assert choices.right(f"{string.ascii_uppercase[number]}. {options[number]}", "x") == options[number]
    assert choices.right(number, "x") == options[number]

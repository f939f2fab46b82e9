"""Chats with pictures: LLaVA's conversations, OpenAI's and transformers' messages."""

import base64
from pathlib import Path
from typing import Any

import made
import pytest

from ecoflap.data import Sample, load_samples
from ecoflap.data.chat import read_chat
from ecoflap.data.images import BrokenSample
from ecoflap.errors import CalibrationError

LLAVA: list[dict[str, Any]] = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors?"},
            {"from": "gpt", "value": "White and red."},
            {"from": "human", "value": "Is it full?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": "text",
        "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}],
    },
]
PICTURE = {"type": "image"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def one(folder: Path, record: dict[str, Any], **options: Any) -> Sample:
    return load_samples(made.write_lines(folder / "a.jsonl", [record]), samples=1, seed=0, **options).samples[0]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_llava(form: str, tmp_path: Path) -> None:
    made.pictures(tmp_path, ["coco/train2017/000000033471.jpg"])
    write = made.write_json if form == "json" else made.write_lines
    drawn = load_samples(write(tmp_path / f"llava.{form}", LLAVA), samples=None, seed=0)
    assert drawn.columns == {"messages": "conversations", "image": "image"}
    assert drawn.windows is None
    first, second = drawn.samples
    assert first.messages == (
        {"role": "user", "content": [PICTURE, said("What are the colors?")]},
        {"role": "assistant", "content": [said("White and red.")]},
        {"role": "user", "content": [said("Is it full?")]},
    )
    assert (first.text, first.question) == ("Yes.", "Is it full?")
    assert first.prompt == "What are the colors?\nWhite and red.\nIs it full?"
    assert made.shows(first, 0)
    assert (second.images, second.text, second.prompt) == ((), "Hi.", "Say hi.")


def test_two_markers_take_the_pictures_in_order(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["a.png", "b.png"])
    record = {
        "images": ["b.png", "a.png"],
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "First <image> and then <image>: same?"},
            {"role": "assistant", "content": "No."},
        ],
    }
    sample = one(tmp_path, record)
    assert sample.messages == (
        {"role": "system", "content": [said("Be short.")]},
        {"role": "user", "content": [said("First"), PICTURE, said("and then"), PICTURE, said(": same?")]},
    )
    assert made.shows(sample, 1, 0)


def test_pictures_without_a_marker_come_first(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["a.png"])
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "x"},
    ]
    sample = one(tmp_path, {"image": "a.png", "messages": turns})
    assert sample.messages is not None
    assert sample.messages[1]["content"] == [PICTURE, said("What?")]
    assert made.shows(sample, 0)


def test_openai_parts(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["a.png"])
    coded = "data:image/png;base64," + base64.b64encode(made.png(7)).decode()
    content = [
        {"type": "text", "text": "Which?"},
        {"type": "image_url", "image_url": {"url": coded}},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [said("That."), said("It is.")]}]
    sample = one(tmp_path, {"messages": turns})
    assert sample.messages == ({"role": "user", "content": [said("Which?"), PICTURE, PICTURE]},)
    assert sample.text == "That.\nIt is."
    assert made.shows(sample, 7, 0)
    content[1] = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(CalibrationError, match="address on the network"):
        one(tmp_path, {"messages": turns})


def test_transformers_parts_refer_to_the_column(tmp_path: Path) -> None:
    """As `datasets` stores them: every part has all keys, most of them None."""
    made.pictures(tmp_path, ["a.png"])
    user = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    answer = [{"type": "text", "text": "A dog.", "index": None}]
    record = {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
    }
    sample = one(tmp_path, record)
    assert sample.messages == ({"role": "user", "content": [PICTURE, said("What?")]},)
    assert made.shows(sample, 0)


def test_what_follows_the_last_answer_is_left_out() -> None:
    turns = [{"role": r, "content": r[0]} for r in ("user", "assistant", "user", "assistant", "user")]
    chat = read_chat(turns, None)
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant", "user"]
    assert chat.text == "a"


USER = {"role": "user", "content": "<image> q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ("text", None, "not a list of turns"),
        ([USER], ["x"], "no answer"),
        ([USER, {"role": "assistant", "content": " "}], ["x"], "no answer"),
        ([ANSWER], None, "no question of the user"),
        ([USER, ANSWER], None, "places for 1 images, but there are 0"),
        ([USER, ANSWER], ["x", "y"], "places for 1 images, but there are 2"),
        ([{"role": "tool", "content": "x"}, ANSWER], None, "a turn of unknown role 'tool'"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}, ANSWER], None, "holds video"),
    ],
)
def test_broken_chats(turns: Any, images: Any, reason: str) -> None:
    with pytest.raises(BrokenSample, match=reason):
        read_chat(turns, images)

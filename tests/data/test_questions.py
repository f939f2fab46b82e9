"""Questions about pictures in the formats that VQAv2, OK-VQA, GQA and NLVR2 are published in."""

from pathlib import Path
from typing import Any

import made
import pytest

from ecoflap.data import load_samples
from ecoflap.errors import CalibrationError

YES = [{"answer": "yes", "answer_confidence": "yes", "answer_id": k} for k in range(1, 8)]
NO = [{"answer": "no", "answer_confidence": "maybe", "answer_id": k} for k in range(8, 11)]


def vqa(root: Path, prefix: str, split: str = "train2014") -> tuple[Path, Path]:
    made.pictures(root / split, [f"COCO_{split}_{number:012d}.jpg" for number in (458752, 262146)])
    asked = [
        {"image_id": 458752, "question": "Is it red?", "question_id": 458752000},
        {"image_id": 262146, "question": "How many?", "question_id": 262146001},
        {"image_id": 262146, "question": "Is it big?", "question_id": 262146002},
    ]
    head = {"info": {"description": "v2"}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": split}
    questions = made.write_json(root / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {**head, "questions": asked})
    notes: list[dict[str, Any]] = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "question_type": "is it",
            "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": NO + YES,
        }
        for question in reversed(asked)  # the join is by id, not by place
    ]
    notes[1] |= {"answer_type": "number", "answers": [{"answer": "3", "raw_answer": "3"}] * 10}
    notes[1]["multiple_choice_answer"] = "3"
    if not prefix:
        for note in notes:  # OK-VQA's have none
            del note["multiple_choice_answer"]
    annotations = made.write_json(root / f"{prefix}mscoco_{split}_annotations.json", {**head, "annotations": notes})
    return questions, annotations


@pytest.mark.parametrize("prefix", ["v2_", ""])
def test_vqa(prefix: str, tmp_path: Path) -> None:
    questions, annotations = vqa(tmp_path, prefix)
    for source in (questions, annotations, tmp_path, f"{tmp_path}:train2014"):
        drawn = load_samples(source, samples=None, seed=0)
        first, second, third = drawn.samples
        assert (first.question, first.kind, first.group) == ("Is it red?", "yes/no", "458752")
        assert first.answers == ("no",) * 3 + ("yes",) * 7
        assert (second.question, second.text, second.kind) == ("How many?", "3", "number")
        assert (first.text, third.text) == ("yes", "yes")
        assert first.prompt == "Question: Is it red? Short answer:"
        assert made.shows(first, 0)
        assert made.shows(second, 1)
        assert made.shows(third, 1)


def test_vqa_pictures_under_their_names_since_2017(tmp_path: Path) -> None:
    questions, _ = vqa(tmp_path, "v2_")
    (tmp_path / "train2014").rename(tmp_path / "old")
    made.pictures(tmp_path / "train2017", ["000000458752.jpg", "000000262146.jpg"])
    assert made.shows(load_samples(questions, samples=None, seed=0).samples[1], 1)


def test_vqa_halves_that_do_not_fit(tmp_path: Path) -> None:
    questions, annotations = vqa(tmp_path, "v2_")
    made.write_json(annotations, {"annotations": [{"question_id": 1, "image_id": 1, "answers": YES}]})
    with pytest.raises(CalibrationError, match="question 458752000 has no annotation: the files are of two splits"):
        load_samples(questions, samples=1, seed=0)
    questions.unlink()
    with pytest.raises(
        CalibrationError, match=r"the questions are not beside it .*v2_OpenEnded_mscoco_train2014_quest"
    ):
        load_samples(annotations, samples=1, seed=0)


def test_vqa_test_set_has_no_answers(tmp_path: Path) -> None:
    questions, annotations = vqa(tmp_path, "v2_", "test2015")
    annotations.unlink()
    drawn = load_samples(questions, samples=None, seed=0)
    assert [sample.text for sample in drawn.samples] == [None] * 3
    assert "answers" not in drawn.columns


def test_gqa(tmp_path: Path) -> None:
    made.pictures(tmp_path / "images", ["2354786.jpg", "n161313.jpg"])
    file = made.write_json(
        tmp_path / "testdev_balanced_questions.json",
        {
            "02930152": {
                "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
                "question": "Is the sky dark?",
                "imageId": "2354786",
                "isBalanced": True,
                "groups": {"global": None},
                "answer": "yes",
                "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
                "fullAnswer": "Yes, the sky is {dark}.",
            },
            "x": {"question": 'What "is" it?', "imageId": "n161313", "answer": "pipe", "types": None},
        },
    )
    for source in (file, tmp_path):
        first, second = load_samples(source, samples=None, seed=0).samples
        assert (first.question, first.text, first.kind, first.group) == ("Is the sky dark?", "yes", "verify", "2354786")
        assert (second.question, second.text, second.kind) == ('What "is" it?', "pipe", None)
        assert made.shows(second, 1)


@pytest.mark.parametrize("split", ["test1", "train"])
def test_nlvr2(split: str, tmp_path: Path) -> None:
    folder = f"{split}/34/" if split == "train" else f"{split}/"
    made.pictures(tmp_path / "images", [f"{folder}{split}-0-1-img{i}.png" for i in range(2)])
    more = {"directory": 34} if split == "train" else {}
    records = [
        {"validation": {"1": "True"}, "sentence": "There are two dogs.", "identifier": f"{split}-0-1-{k}",
         "label": label, "left_url": "http://x/0.jpg", "right_url": "http://x/1.jpg", "synset": "dog", **more}
        for k, label in enumerate(["True", "False"])
    ]  # fmt: skip
    drawn = load_samples(made.write_lines(tmp_path / f"{split}.json", records), samples=None, seed=0)
    assert [(s.text, s.label, s.group) for s in drawn.samples] == [(x, x, f"{split}-0-1") for x in ("True", "False")]
    assert all(sample.question == "There are two dogs." and made.shows(sample, 0, 1) for sample in drawn.samples)
    one = load_samples(
        made.write_lines(tmp_path / "one.json", records[:1]), samples=None, seed=0
    )  # one line, as a document
    assert one.samples[0].label == "True"


def test_lavis_questions(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["a.jpg"])
    file = made.write_json(
        tmp_path / "vqa_train.json",
        [{"question_id": 1, "question": "Q?", "answer": ["net", "net", "racket"], "image": "a.jpg", "dataset": "vqa"}],
    )
    sample = load_samples(file, samples=1, seed=0, columns={"answers": "answer"}).samples[0]
    assert (sample.answers, sample.text) == (("net", "net", "racket"), "net")
    sample = load_samples(file, samples=1, seed=0).samples[0]  # also without being told: a list answers a question
    assert (sample.answers, sample.text) == (("net", "net", "racket"), "net")


def test_two_pictures_in_two_columns(tmp_path: Path) -> None:
    made.pictures(tmp_path, ["a.jpg", "b.jpg"])
    record = {"left_image": "a.jpg", "right_image": "b.jpg", "question": "Same?", "answer": True}
    drawn = load_samples(made.write_lines(tmp_path / "a.jsonl", [record]), samples=1, seed=0)
    assert drawn.columns["image"] == "left_image,right_image"
    assert made.shows(drawn.samples[0], 0, 1)
    swapped = load_samples(tmp_path / "a.jsonl", samples=1, seed=0, columns={"image": "right_image,left_image"})
    assert made.shows(swapped.samples[0], 1, 0)

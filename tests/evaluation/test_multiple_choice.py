"""Multiple choice against log-likelihoods that the test computes token by token, without batch or padding."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import choices
import pico
import picos
import pytest
import torch
from tasks import run_task

from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.likelihood import Scorer


def run(model: Any, processor: Any, data: Path, **options: Any) -> Any:
    settings = {"samples": None, "batch_size": 3, **options}
    return run_task("multiple-choice", model, processor, data=data, **settings)


@torch.no_grad()
def likelihood(model: Any, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of the continuation's tokens, one forward a token."""
    words = choices.tokenizer()
    total = 0.0
    if model.config.is_encoder_decoder:
        source = torch.tensor([words(context)["input_ids"]])
        told = [0]
        for token in words(continuation, add_special_tokens=False)["input_ids"]:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([told]), use_cache=False).logits
            total += float(torch.log_softmax(logits[0, -1].double(), -1)[token])
            told.append(token)
        return total
    before, whole = words(context)["input_ids"], words(context + continuation)["input_ids"]
    assert whole[: len(before)] == before
    for end in range(len(before), len(whole)):
        logits = model(input_ids=torch.tensor([whole[:end]]), use_cache=False).logits
        total += float(torch.log_softmax(logits[0, -1].double(), -1)[whole[end]])
    return total


def mmlu(row: dict[str, Any], answer: bool) -> str:
    lines = [row["question"], *(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))]
    return "\n".join([*lines, "Answer:" + (" " + "ABCD"[row["answer"]] if answer else "")])


MODELS = {"llama": choices.llama, "t5": choices.t5}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shots", [0, 2])
def test_letters(name: str, shots: int, tmp_path: Path) -> None:
    model = MODELS[name]()
    data, dev = choices.questions(tmp_path / "test.jsonl"), choices.questions(tmp_path / "dev.jsonl", seed=1)
    result = run(model, choices.tokenizer(), data, shots=shots, shots_source=str(dev))
    hits: dict[str, list[float]] = {}
    for row, record in zip(choices.read(data), result.predictions, strict=True):
        examples = [mmlu(other, True) for other in choices.read(dev) if other["subject"] == row["subject"]][:shots]
        about = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        prompt = head + "\n\n".join([*examples, mmlu(row, False)])
        expected = [likelihood(model, prompt, f" {letter}") for letter in "ABCD"]
        assert record["loglikelihoods"] == pytest.approx(expected, abs=2e-4)
        assert record["prediction"] == row["choices"][expected.index(max(expected))]
        hits.setdefault(row["subject"], []).append(float(expected.index(max(expected)) == row["answer"]))
    assert result.n == 12
    assert result.value == pytest.approx(statistics.fmean(hit for each in hits.values() for hit in each))
    assert result.by_group == {name: pytest.approx(statistics.fmean(each)) for name, each in hits.items()}
    macro = result.others["macro_accuracy"]
    assert macro.value == pytest.approx(statistics.fmean(statistics.fmean(each) for each in hits.values()))
    errors = [statistics.stdev(each) / len(each) ** 0.5 for each in hits.values()]
    assert macro.stderr == pytest.approx(sum(e**2 for e in errors) ** 0.5 / 2)
    json.dumps({"settings": result.settings, "predictions": result.predictions}, allow_nan=False)


@pytest.mark.parametrize("name", MODELS)
def test_text(name: str, tmp_path: Path) -> None:
    model = MODELS[name](seed=3)
    data = choices.questions(tmp_path / "test.jsonl", subjects=False)
    result = run(model, choices.tokenizer(), data, style="text")
    plain, normed = [], []
    for row, record in zip(choices.read(data), result.predictions, strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        expected = [likelihood(model, prompt, f" {choice}") for choice in row["choices"]]
        assert record["loglikelihoods"] == pytest.approx(expected, rel=1e-4, abs=2e-4)
        by_byte = [e / len(c.encode()) for e, c in zip(expected, row["choices"], strict=True)]
        plain.append(float(expected.index(max(expected)) == row["answer"]))
        normed.append(float(by_byte.index(max(by_byte)) == row["answer"]))
    assert result.value == pytest.approx(statistics.fmean(plain))
    assert result.others["acc_norm"].value == pytest.approx(statistics.fmean(normed))
    assert result.by_group is None
    shot = run(model, choices.tokenizer(), data, style="text", shots=1, prompt_template="{question} =>")
    rows = choices.read(data)
    prompt = f"{rows[0]['question']} => {rows[0]['choices'][rows[0]['answer']]}\n\n{rows[5]['question']} =>"
    assert shot.predictions[5]["loglikelihoods"][2] == pytest.approx(
        likelihood(model, prompt, f" {rows[5]['choices'][2]}"), rel=1e-4, abs=2e-4
    )


@pytest.mark.parametrize(
    ("name", "style"), [("llama", "letters"), ("llama", "text"), ("t5", "letters"), ("gpt2", "text"), ("opt", "text")]
)
def test_the_batch_size_changes_nothing(name: str, style: str, tmp_path: Path) -> None:
    if name in MODELS:
        model, words = MODELS[name](), choices.tokenizer()
    else:
        model, words = (picos.gpt2() if name == "gpt2" else picos.blip2_opt().language_model), picos.tokenizer()
    data = choices.questions(tmp_path / "test.jsonl", count=5)
    found = [run(model, words, data, style=style, batch_size=size) for size in (1, 4, 64)]
    for other in found[1:]:
        for one, two in zip(found[0].predictions, other.predictions, strict=True):
            assert one["loglikelihoods"] == pytest.approx(two["loglikelihoods"], rel=1e-5, abs=1e-4)


def test_a_shot_is_never_the_question_itself(tmp_path: Path) -> None:
    data = choices.questions(tmp_path / "test.jsonl", count=6)
    rows, model = choices.read(data), choices.llama()
    result = run(model, choices.tokenizer(), data, shots=1)
    head = "The following are multiple choice questions (with answers) about high school biology.\n\n"
    for index, shot in ((0, 2), (2, 0), (4, 0)):
        prompt = head + mmlu(rows[shot], True) + "\n\n" + mmlu(rows[index], False)
        expected = likelihood(model, prompt, " B")
        assert result.predictions[index]["loglikelihoods"][1] == pytest.approx(expected, abs=2e-4)


def test_long_questions_get_fewer_shots(tmp_path: Path) -> None:
    data, words = choices.questions(tmp_path / "test.jsonl", count=6, subjects=False), choices.tokenizer()
    rows = choices.read(data)
    head = "The following are multiple choice questions (with answers).\n\n"
    alone = max(len(words(head + mmlu(row, False))["input_ids"]) for row in rows)
    model = choices.llama()
    result = run(model, words, data, shots=3, sequence_length=alone)
    assert result.settings["shortened"] == 6
    plain = run(model, words, data)
    longest = max(range(6), key=lambda i: len(words(mmlu(rows[i], False))["input_ids"]))
    assert result.predictions[longest]["loglikelihoods"] == plain.predictions[longest]["loglikelihoods"]
    assert plain.settings["shortened"] == 0
    with pytest.raises(CalibrationError, match="more than the 5 that"):
        run(model, words, data, sequence_length=5)


def test_tokens_at_the_seam() -> None:
    words = choices.tokenizer(eos=True)
    scorer = Scorer(choices.llama(), words)
    for context, continuation in (("Answer:", " A"), ("Answer: ", "A"), ("a bone", " is hard")):
        request = scorer.encode(context, continuation)
        assert words.decode(request.continuation) == " " + continuation.strip()
        assert words.decode(request.context) == "<s>" + context.rstrip()
    glued = scorer.encode("oxy", "gen")  # the joined word has tokens of its own: none of its letters is left out
    assert words.decode((*glued.context, *glued.continuation)) == "<s>oxygen"


def test_formats_of_published_files(tmp_path: Path) -> None:
    """The same question as MMLU, ARC, PIQA and lettered lines write it, and as a class kept secret."""
    text = ["a cell", "the bone", "red blood", "oxygen"]
    rows = {
        "mmlu": {"question": "hard?", "choices": text, "answer": 1},
        "arc": {"question": "hard?", "choices": {"text": text, "label": list("ABCD")}, "answerKey": "B"},
        "lines": {
            "question": "hard?",
            "options": "A. a cell\nB. the bone\nC. red blood\nD. oxygen",
            "answer": "B. the bone",
        },
        "openbook": {"question_stem": "hard?", "choices": {"text": text, "label": list("1234")}, "answerKey": "2"},
    }
    model, found = choices.llama(), []
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        result = run(model, choices.tokenizer(), tmp_path / f"{name}.jsonl")
        assert result.predictions[0]["truth"] == "the bone"
        found.append(result.predictions[0]["loglikelihoods"])
    assert all(each == found[0] for each in found)
    piqa = {"goal": "hard?", "sol1": "the bone", "sol2": "a cell", "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(piqa) + "\n")
    assert run(model, choices.tokenizer(), tmp_path / "piqa.jsonl", style="text").predictions[0]["truth"] == "the bone"


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    data, words, model = choices.questions(tmp_path / "test.jsonl", count=4), choices.tokenizer(), choices.llama()
    for other, processor in ((picos.bert(), picos.tokenizer()), pico.blip2(), pico.clip(), (model, None)):
        with pytest.raises(InvalidOption, match="needs a language model with a tokenizer"):
            run(other, processor, data)
    with pytest.raises(CalibrationError, match=r"has 1 examples about .* for 5 shots"):
        run(model, words, data, shots=5)
    with pytest.raises(InvalidOption, match="shots must be 0 or more"):
        run(model, words, data, shots=-1)
    with pytest.raises(InvalidOption, match="needs data"):
        run(model, words, None)
    (tmp_path / "plain.jsonl").write_text('{"question": "what", "answer": "bone"}\n')
    with pytest.raises(CalibrationError, match="needs columns with a question, its choices"):
        run(model, words, tmp_path / "plain.jsonl")
    (tmp_path / "secret.jsonl").write_text('{"question": "what", "choices": ["a", "b"], "answer": -1}\n')
    with pytest.raises(CalibrationError, match="question 0 has no answer"):
        run(model, words, tmp_path / "secret.jsonl")

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pairs
import pico
import pytest
import torch
from tasks import run_task

from ecoflap.data import load_samples
from ecoflap.data.prompts import Prompter
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError, InvalidOption, UnknownName
from ecoflap.evaluation.generate import generate
from ecoflap.support.progress import Silent

QUESTIONS = ["what color is the circle", "what shape", "is there a big square on the left", "how many", "what is it"]


def questions_file(folder: Path, answers: list[Any], column: str = "answer", images: bool = True) -> Path:
    records: dict[str, list[Any]] = {
        "question": QUESTIONS,
        column: answers,
        "kind": ["color", "shape", "yes/no", "count", "shape"],
    }
    if images:
        streams = [io.BytesIO() for _ in QUESTIONS]
        for i, stream in enumerate(streams):
            pico.picture(i).save(stream, "PNG")
        records["image"] = [{"bytes": stream.getvalue()} for stream in streams]
    dataset = datasets.Dataset.from_dict(records)
    if images:
        dataset = dataset.cast_column("image", datasets.Image())
    dataset.to_parquet(str(folder / "test.parquet"))
    return folder / "test.parquet"


def text_only() -> tuple[Any, Any]:
    words = pico.tokenizer(pad=False, bos=True)
    return pico.llama(len(words)), words


def run(model: Any, processor: Any, data: Path, **options: Any) -> Any:
    settings = {"samples": None, "batch_size": 2, "sequence_length": None, "seed": 0, "progress": Silent(), **options}
    return run_task("vqa", model, processor, data=data, **settings)


@torch.no_grad()
def greedy(model: Any, processor: Any, question: str, image: Any, steps: int) -> str:
    """One answer by repeated full forwards, without generate, batch or padding."""
    words = getattr(processor, "tokenizer", processor)
    prompt = f"Question: {question} Short answer:"
    if words is processor:
        inputs = dict(words([prompt], return_tensors="pt"))
    else:
        text = prompt
        if type(processor).__name__ == "LlavaProcessor":
            text = f"USER: <image> {prompt} ASSISTANT:" if processor.chat_template else f"<image>\n{prompt}"
        inputs = dict(processor(images=[image], text=[text], return_tensors="pt"))
    said: list[int] = []
    for _ in range(steps):
        if model.config.is_encoder_decoder:
            logits = model(**inputs, decoder_input_ids=torch.tensor([[0, *said]]), use_cache=False).logits
        else:
            ids = torch.cat([inputs["input_ids"], torch.tensor([said], dtype=torch.long)], 1)
            logits = model(
                **{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False
            ).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == 1:
            break
    return words.decode(said, skip_special_tokens=True).strip()


BUILDS = {
    "blip2-t5": lambda: pico.blip2(),
    "blip2-opt": lambda: pico.blip2(text="opt"),
    "llava": lambda: pico.llava(chat=False),
    "llava-chat": lambda: pico.llava(chat=True),
    "llama": text_only,
}


@pytest.mark.parametrize("name", BUILDS)
def test_answers_equal_step_by_step_decoding(name: str, tmp_path: Path) -> None:
    model, processor = BUILDS[name]()
    model.train()
    data = questions_file(tmp_path, ["red"] * 5)
    result = run(model, processor, data, batch_size=5)
    assert model.training  # as it was
    model.eval()
    for record in result.predictions:
        image = pico.picture(record["index"])
        steps = result.settings["max_new_tokens"]
        assert record["prediction"] == greedy(model, processor, record["question"], image, steps)
    small = run(model, processor, data, batch_size=1)
    assert [r["prediction"] for r in small.predictions] == [r["prediction"] for r in result.predictions]


def test_accuracy_and_groups(tmp_path: Path) -> None:
    model, processor = pico.llava(chat=False)
    said = [r["prediction"] for r in run(model, processor, questions_file(tmp_path, ["red"] * 5)).predictions]
    assert all(said)
    truth = [said[0].upper() + " .", "wrong", said[2], "wrong", said[4]]
    result = run(model, processor, questions_file(tmp_path, truth))
    assert (result.task, result.metric, result.n) == ("vqa", "accuracy", 5)
    assert result.value == pytest.approx(3 / 5)
    assert result.stderr == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert result.by_group == {"color": 1.0, "shape": 0.5, "yes/no": 1.0, "count": 0.0}
    assert [r["truth"] for r in result.predictions] == truth
    json.dumps({"settings": result.settings, "predictions": result.predictions}, allow_nan=False)


def test_annotators_are_averaged(tmp_path: Path) -> None:
    model, processor = pico.llava(chat=False)
    said = [r["prediction"] for r in run(model, processor, questions_file(tmp_path, ["red"] * 5)).predictions]
    answers = [[s] * (2 * i) + ["other words"] * (10 - 2 * i) for i, s in enumerate(said)]
    result = run(model, processor, questions_file(tmp_path, answers, "answers"))
    assert result.value == pytest.approx((0.0 + 0.6 + 1.0 + 1.0 + 1.0) / 5)


def test_a_sample_of_the_questions(tmp_path: Path) -> None:
    model, processor = pico.blip2()
    data = questions_file(tmp_path, ["red"] * 5)
    result = run(model, processor, data, samples=3, seed=4)
    assert [r["index"] for r in result.predictions] == list(load_samples(data, samples=3, seed=4).indices)


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    model, processor = pico.blip2()
    data = questions_file(tmp_path, ["red"] * 5)
    clip, clip_processor = pico.clip()
    with pytest.raises(InvalidOption, match="generates text"):
        run(clip, clip_processor, data)
    with pytest.raises(InvalidOption, match="processor"):
        run(model, None, data)
    with pytest.raises(CalibrationError, match="more than the sequence length of 4"):
        run(model, processor, data, sequence_length=4)
    with pytest.raises(CalibrationError, match="needs images"):
        run(model, processor, questions_file(tmp_path, ["red"] * 5, images=False))
    (tmp_path / "captions.jsonl").write_text('{"text": "a circle"}\n')
    with pytest.raises(CalibrationError, match="questions and with answers"):
        run(model, processor, tmp_path / "captions.jsonl")


def test_rules(tmp_path: Path) -> None:
    model, processor = pico.llava(chat=False)
    said = [r["prediction"] for r in run(model, processor, questions_file(tmp_path, ["red"] * 5)).predictions]
    truth = [f" {said[0].upper()} ", said[1] + "!", "the " + said[2], "wrong", said[4]]
    data = questions_file(tmp_path, truth)
    scores = {
        rule: [r["score"] for r in run(model, processor, data, rule=rule).predictions]
        for rule in ("auto", "normalised", "exact")
    }
    assert scores["exact"] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert scores["auto"] == scores["normalised"] == [1.0, 1.0, 1.0, 0.0, 1.0]
    with pytest.raises(CalibrationError, match="annotators"):
        run(model, processor, data, rule="soft")
    with pytest.raises(UnknownName, match="did you mean 'exact'"):
        run(model, processor, data, rule="exakt")
    # With annotators, the rule decides whether their agreement counts or the commonest answer alone.
    data = questions_file(tmp_path, [[s, s, "x", "y"] for s in said], "answers")
    assert run(model, processor, data).value == pytest.approx((2 * (1 / 3) + 2 * (2 / 3)) / 4)
    exact = run(model, processor, data, rule="exact")
    assert (exact.value, exact.settings["rule"]) == (1.0, "exact match, case aside")


def test_blip_is_asked_the_bare_question(tmp_path: Path) -> None:
    model, processor = pairs.blip("questions")
    data = questions_file(tmp_path, ["red"] * 5)
    result = run(model, processor, data, batch_size=5, new_tokens=4)
    bare = generate(
        model,
        Prompter(model, processor),
        [Sample((pico.picture(i),), question) for i, question in enumerate(QUESTIONS)],
        new_tokens=4,
    )
    assert [r["prediction"] for r in result.predictions] == bare
    other = run(model, processor, data, prompt_template="what is the {question} of the", new_tokens=4)
    assert [r["prediction"] for r in other.predictions] != bare


def test_a_chat_is_asked_as_it_stands(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what shape"}, {"role": "assistant", "content": "star"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(2)), "utf-8")
    model, words = text_only()
    result = run(model, words, file)
    assert [(one["question"], one["truth"]) for one in result.predictions] == [("what shape", "star")] * 2
    (sample, _) = load_samples(file, samples=None, seed=0).samples
    said = generate(model, Prompter(model, words), [sample], new_tokens=10)
    assert [one["prediction"] for one in result.predictions] == said * 2
    with pytest.raises(CalibrationError, match="has no image in row 0"):
        run(*pico.blip2(), file)

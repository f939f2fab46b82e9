import math
from pathlib import Path
from typing import Any

import pairs
import pico
import pytest
import test_vqa_task
import torch
from picos import scramble
from tasks import run_task

from ecoflap.data import load_samples
from ecoflap.errors import CalibrationError, InvalidOption, NonFiniteLoss

ANSWERS = ["red", "big circle", "no", "two", "blue star"]


def run(model: Any, processor: Any, data: Path | None, **options: Any) -> Any:
    return run_task("answer-perplexity", model, processor, data=data, **{"samples": None, "batch_size": 2, **options})


@torch.no_grad()
def one_by_one(model: Any, processor: Any, data: Path) -> list[tuple[float, int]]:
    """log p and tokens of each answer, token by token, without batch, padding or labels."""
    words = getattr(processor, "tokenizer", processor)
    found = []
    for sample in load_samples(data, samples=None, seed=0).samples:
        prompt = f"Question: {sample.question} Short answer:"
        if words is processor:
            inputs = dict(words([prompt], return_tensors="pt"))
        else:
            text = f"<image>\n{prompt}" if type(processor).__name__ == "LlavaProcessor" else prompt
            inputs = dict(processor(images=[sample.image], text=[text], return_tensors="pt"))
        tokens = [*words(sample.text, add_special_tokens=False)["input_ids"], words.eos_token_id]
        total = 0.0
        for number, token in enumerate(tokens):
            if model.config.is_encoder_decoder:
                told = {"decoder_input_ids": torch.tensor([[0, *tokens[:number]]])}
            else:
                ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:number]], dtype=torch.long)], 1)
                told = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**{**inputs, **told}, use_cache=False).logits[0, -1].double()
            total += float(logits[token] - logits.logsumexp(0))
        found.append((total, len(tokens)))
    return found


BUILDS = {
    "blip2-t5": lambda: pico.blip2(),
    "blip2-opt": lambda: pico.blip2(text="opt"),
    "llava": lambda: pico.llava(chat=False),
    "text": test_vqa_task.text_only,
}


@pytest.mark.parametrize("build", BUILDS)
def test_it_is_that_of_the_answers_one_by_one(build: str, tmp_path: Path) -> None:
    model, processor = BUILDS[build]()
    scramble(model, 3)
    data = test_vqa_task.questions_file(tmp_path, ANSWERS, images=build != "text")
    wanted = one_by_one(model.eval(), processor, data)
    result = run(model, processor, data)
    tokens = sum(number for _, number in wanted)
    mean = -sum(total for total, _ in wanted) / tokens
    assert (result.task, result.metric, result.n) == ("answer-perplexity", "perplexity", tokens)
    assert tokens == sum(len(answer.split()) + 1 for answer in ANSWERS)
    assert result.value == pytest.approx(math.exp(mean), rel=1e-5)
    kind = [wanted[1], wanted[4]]
    of_kind = math.exp(-sum(total for total, _ in kind) / sum(number for _, number in kind))
    assert result.by_group["shape"] == pytest.approx(of_kind, rel=1e-5)
    assert set(result.by_group) == {"color", "shape", "yes/no", "count"}
    # The standard error: by leaving one answer out at a time, which agrees with the delta method for large samples.
    assert result.stderr == pytest.approx(jackknife(wanted), rel=0.5)
    for other in (1, 5):
        assert run(model, processor, data, batch_size=other).value == pytest.approx(result.value, rel=1e-5)


def jackknife(answers: list[tuple[float, int]]) -> float:
    def value(of: list[tuple[float, int]]) -> float:
        return math.exp(-sum(total for total, _ in of) / sum(number for _, number in of))

    without = [value([a for j, a in enumerate(answers) if j != i]) for i in range(len(answers))]
    mean = sum(without) / len(without)
    return math.sqrt((len(without) - 1) / len(without) * sum((one - mean) ** 2 for one in without))


def test_the_standard_error_is_the_spread_over_samples_of_answers() -> None:
    from ecoflap.evaluation.answer_perplexity import perplexity_of

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 6, (4000, 200), generator=generator)
    logs = -tokens * 0.7 - torch.randn(4000, 200, generator=generator).abs() * tokens.sqrt()
    values, errors = zip(
        *(perplexity_of(list(zip(a.tolist(), n.tolist(), strict=True))) for a, n in zip(logs, tokens, strict=True)),
        strict=True,
    )
    spread = torch.tensor(values).std()
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(spread), rel=0.05)
    assert perplexity_of([(-2.0, 4)]) == (pytest.approx(math.exp(0.5)), None)


def test_what_it_refuses(tmp_path: Path) -> None:
    rows = [{"image": pairs.picture_file(tmp_path, i), "question": "what shape"} for i in range(2)]
    with pytest.raises(CalibrationError, match="row 0 has no answer"):
        run(*pico.llava(chat=False), pairs.write_rows(tmp_path, rows))
    model, processor = test_vqa_task.text_only()
    lines = tmp_path / "captions.jsonl"
    lines.write_text('{"text": "red"}\n{"text": "blue"}\n')
    with pytest.raises(CalibrationError, match=r"row 0 has no question.*--test-prompt"):
        run(model, processor, lines)
    with pytest.raises(InvalidOption, match="and its processor"):
        run(model, None, lines)


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    model, processor = test_vqa_task.text_only()
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    data = test_vqa_task.questions_file(tmp_path, ANSWERS, images=False)
    with pytest.raises(NonFiniteLoss, match="log-likelihood of an answer"):
        run(model, processor, data)

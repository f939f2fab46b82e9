import json
import math
import statistics
from pathlib import Path
from typing import Any

import choices
import pico
import picos
import pytest
import torch
from tasks import run_task

from ecoflap.errors import CalibrationError, EcoflapError, InvalidOption, NonFiniteLoss
from ecoflap.evaluation import perplexity
from ecoflap.support.progress import Silent


def prose(folder: Path, words: int = 150) -> Path:
    choice = torch.randint(len(pico.WORDS), (words,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "prose.txt").write_text(" ".join(pico.WORDS[i] for i in choice))
    return folder / "prose.txt"


def run(model: Any, words: Any, data: Path | None, **options: Any) -> Any:
    settings = {"samples": None, "batch_size": 4, "sequence_length": 16, "seed": 0, "progress": Silent(), **options}
    return run_task("perplexity", model, words, data=data, **settings)


@torch.no_grad()
def window_means(model: Any, words: Any, data: Path, length: int, each: bool = False) -> list[float]:
    """Mean negative log-likelihood of each window, one token at a time from the text before it.

    Args:
        each: whether the text's first token, BOS, begins each window.
    """
    ids = words(data.read_text())["input_ids"]
    before, room = (ids[:1], length - 1) if each else ([], length)
    ids = ids[len(before) :]
    means = []
    for start in range(0, len(ids) - room + 1, room):
        window = before + ids[start : start + room]
        nll = []
        for i in range(1, length):
            logits = model(input_ids=torch.tensor([window[:i]]), use_cache=False).logits[0, -1].double()
            nll.append(-float(torch.log_softmax(logits, -1)[window[i]]))
        means.append(statistics.fmean(nll))
    return means


@pytest.mark.parametrize(("bos", "start"), [(False, "each"), (False, "once"), (True, "each"), (True, "once")])
@pytest.mark.parametrize("length", [16, 7])
def test_equals_a_loop_over_tokens(
    bos: bool, start: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = pico.tokenizer(bos=bos)
    model, data = pico.llama(len(words)), prose(tmp_path)
    each = bos and start == "each"
    means = window_means(model, words, data, length, each)
    result = run(model, words, data, sequence_length=length, window_start=start)
    value = math.exp(statistics.fmean(means))
    assert result.value == pytest.approx(value, rel=1e-5)
    assert result.stderr == pytest.approx(value * statistics.stdev(means) / len(means) ** 0.5, rel=1e-4)
    assert result.n == len(means) * (length - 1)
    assert result.settings["windows"] == len(means) == (150 // (length - 1) if each else (150 + bos) // length)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 5 * len(words))  # the loss in pieces of 5 tokens
    pieces = run(model, words, data, sequence_length=length, batch_size=1, window_start=start)
    assert pieces.value == pytest.approx(result.value, rel=1e-6)


def test_samples_are_the_first_windows(tmp_path: Path) -> None:
    words = pico.tokenizer()
    model, data = pico.llama(len(words)), prose(tmp_path)
    means = window_means(model, words, data, 16)
    assert run(model, words, data, samples=3).value == pytest.approx(math.exp(statistics.fmean(means[:3])), rel=1e-5)
    one = run(model, words, data, samples=1)
    assert one.stderr is None
    assert one.n == 15


def test_rows_of_a_table_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    """WikiText: a row a paragraph, and rows without text around headings, which count as blank lines."""
    rows = ["circle red\nblue", "", " \n", "a square with a circle", "two left"]
    table = tmp_path / "wiki.jsonl"
    table.write_text("".join(json.dumps({"page": row, "title": "red"}) + "\n" for row in rows))
    joined = tmp_path / "joined.txt"
    joined.write_text("\n\n".join(rows))
    words, model = choices.tokenizer(), choices.llama()  # bytes: a blank line is seen
    means = window_means(model, words, joined, 4, each=True)
    result = run(model, words, table, sequence_length=4, columns={"text": "page"})
    assert result.settings["windows"] == len(means) > 2
    assert result.value == pytest.approx(math.exp(statistics.fmean(means)), rel=1e-5)


def test_low_precision_and_vision_language_models(tmp_path: Path) -> None:
    words = pico.tokenizer()
    model, data = pico.llama(len(words)), prose(tmp_path)
    full = run(model, words, data).value
    assert run(model.to(torch.bfloat16), words, data).value == pytest.approx(full, rel=0.02)
    llava, processor = pico.llava(chat=True)
    text = run(llava, processor, data)  # the language model alone
    ids = torch.tensor([processor.tokenizer(data.read_text())["input_ids"][:16]])
    with torch.no_grad():
        first = float(llava(input_ids=ids, labels=ids).loss)
    assert run(llava, processor, data, samples=1).value == pytest.approx(math.exp(first), rel=1e-5)
    assert text.n > 15


def test_default_length_is_the_models(tmp_path: Path) -> None:
    words = pico.tokenizer()
    settings = run(pico.llama(len(words), 32), words, prose(tmp_path), sequence_length=None).settings
    assert (settings["sequence_length"], settings["length_reason"]) == (32, "the model's longest")


def test_errors(tmp_path: Path) -> None:
    words = pico.tokenizer()
    model, data = pico.llama(len(words)), prose(tmp_path)
    table = tmp_path / "vqa.jsonl"
    table.write_text('{"question": "what", "answer": "yes"}\n')
    cases: list[tuple[Any, Any, Path | None, dict[str, Any], type[EcoflapError], str]] = [
        (model, words, None, {}, InvalidOption, "needs a text"),
        (pico.t5(len(words)), words, data, {}, InvalidOption, "causal"),
        (pico.vit(["a"])[0], pico.vit(["a"])[1], data, {}, InvalidOption, "causal"),
        (picos.bert(), words, data, {}, InvalidOption, "causal language model with a tokenizer, not BertForMaskedLM"),
        (model, words, data, {"sequence_length": 65}, CalibrationError, "64 positions"),
        (model, words, prose(tmp_path, 10), {}, CalibrationError, "has 10 tokens, less than one window of 16"),
        (model, words, table, {}, CalibrationError, "not plain text"),
        (model, words, data, {"batch_size": 0}, InvalidOption, "at least 1"),
    ]
    for network, tokenizer, source, options, kind, message in cases:
        if source == data:
            prose(tmp_path, 10 if "less than" in message else 150)
        with pytest.raises(kind, match=message):
            run(network, tokenizer, source, **options)
    prose(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[words.convert_tokens_to_ids("circle")] = float("nan")
    with pytest.raises(NonFiniteLoss, match="window"):
        run(model, words, data)

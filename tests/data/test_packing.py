import pico
import pytest
import torch

from ecoflap.data import Sample, SampleSet, make_batches, token_masks
from ecoflap.data.packing import draw_windows, tokenize_corpus, window_length
from ecoflap.errors import CalibrationError


def corpus(words: int, windows: int, seed: int = 0) -> SampleSet:
    choice = torch.randint(len(pico.WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    text = " ".join(pico.WORDS[i] for i in choice)
    half = len(text) // 2 + text[len(text) // 2 :].index(" ")
    documents = (Sample(text=text[:half]), Sample(text=text[half:]))
    return SampleSet(documents, (0, 1), 0, "prose.txt", {}, windows)


@pytest.mark.parametrize(("length", "count"), [(8, 5), (7, 14), (100, 1)])
def test_every_window_is_a_slice_of_the_corpus(length: int, count: int) -> None:
    tokens = torch.arange(100)  # each token names its position
    windows = draw_windows(tokens, length, count, 3, "x")
    assert windows.shape == (count, length)
    for window in windows:
        assert torch.equal(window, torch.arange(int(window[0]), int(window[0]) + length))
    assert windows.unique().numel() == count * length  # none overlaps another
    assert torch.equal(windows, draw_windows(tokens, length, count, 3, "x"))
    if count < 100 // length:
        assert not torch.equal(windows, draw_windows(tokens, length, count, 4, "x"))


def test_the_seed_moves_the_offset_too() -> None:
    tokens = torch.arange(27)  # two windows of ten leave seven positions to start at
    offsets = {int(draw_windows(tokens, 10, 2, seed, "x").min()) for seed in range(100)}
    assert offsets == set(range(8))


def test_batches_of_a_causal_model() -> None:
    words = pico.tokenizer()
    model = pico.llama(len(words), positions=32)
    data = corpus(210, 6)
    tokens = tokenize_corpus(data, words).tolist()
    batches = make_batches(data, model, words, batch_size=4, sequence_length=None, seed=1)
    assert [b["input_ids"].shape for b in batches] == [(4, 32), (2, 32)]
    for batch in batches:
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["labels"] is not batch["input_ids"]
        assert token_masks(batch, False).encoder is None
        for row in batch["input_ids"].tolist():
            assert any(tokens[i : i + 32] == row for i in range(len(tokens) - 31))
    whole = torch.cat([b["input_ids"] for b in batches])
    other = torch.cat(
        [b["input_ids"] for b in make_batches(data, model, words, batch_size=5, sequence_length=32, seed=1)]
    )
    assert torch.equal(whole, other)  # the batch size does not change the samples


def test_encoder_decoder_gets_prefix_and_suffix() -> None:
    words = pico.tokenizer()
    data = corpus(120, 3)
    tokens = tokenize_corpus(data, words).tolist()
    (batch,) = make_batches(data, pico.t5(len(words)), words, batch_size=3, sequence_length=20, seed=1)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 10)
    assert batch["labels"].is_contiguous()
    assert batch["input_ids"].is_contiguous()
    for prefix, suffix in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert any(tokens[i : i + 20] == prefix + suffix for i in range(len(tokens) - 19))


def test_all_windows_when_no_number_is_asked_for() -> None:
    words = pico.tokenizer()
    batches = make_batches(corpus(100, -1), pico.llama(len(words)), words, batch_size=64, sequence_length=16, seed=0)
    assert batches[0]["input_ids"].shape == (6, 16)


def test_window_length() -> None:
    words = pico.tokenizer()
    model = pico.llama(len(words), positions=64)
    assert window_length(model, words, None) == 64
    assert window_length(pico.llama(len(words), positions=4096), words, None) == 2048
    assert window_length(model, words, 33) == 33
    with pytest.raises(CalibrationError, match="more than the model's 64 positions"):
        window_length(model, words, 65)
    with pytest.raises(CalibrationError, match="at least 2"):
        window_length(model, words, 1)


def test_short_text_says_how_many_windows_it_gives() -> None:
    words = pico.tokenizer()
    with pytest.raises(CalibrationError, match=r"prose.txt gives 3 windows of 32 tokens \(100 tokens in all\), 4 were"):
        make_batches(corpus(100, 4), pico.llama(len(words)), words, batch_size=2, sequence_length=32, seed=0)


def test_text_for_a_model_that_needs_images() -> None:
    model, processor = pico.blip2()
    with pytest.raises(CalibrationError, match="plain text, but Blip2ForConditionalGeneration needs images"):
        make_batches(corpus(100, 4), model, processor, batch_size=2, sequence_length=8, seed=0)

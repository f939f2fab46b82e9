from pathlib import Path
from types import SimpleNamespace

import pico
import pytest
import torch

from ecoflap.data import Sample, SampleSet, make_batches
from ecoflap.data import window_length as module
from ecoflap.data.window_length import activation_bytes, default_length, memory_of

AMPLE = 10**15


@pytest.mark.parametrize(
    ("positions", "tokens", "windows", "length", "reason"),
    [
        (32, 10**6, 4, 32, "the model's longest"),
        (131_072, 10**6, 4, 512, "the default on a CPU"),
        (131_072, 2048, 4, 512, "the default on a CPU"),
        (131_072, 2047, 4, 256, "for 4 windows of the text"),
        (131_072, 100, 128, 64, "for 128 windows of the text"),  # no window becomes shorter than this
        (100, 5, 1, 100, "the model's longest"),
    ],
)
def test_model_machine_and_text(positions: int, tokens: int, windows: int, length: int, reason: str) -> None:
    words = pico.tokenizer()
    found = default_length(pico.llama(len(words), positions=positions), words, tokens, windows, memory=AMPLE)
    assert (found.tokens, found.reason) == (length, reason)


@pytest.mark.parametrize("kept", [True, False])
def test_windows_become_shorter_until_a_quarter_of_the_memory_holds_them(kept: bool) -> None:
    words, windows, batch = pico.tokenizer(), 9, 5
    model = pico.llama(len(words), positions=4096)  # 2 blocks of hidden size 16, inner size 32, 2 heads

    def by_hand(length: int) -> int:
        rows = batch * length
        of_a_batch = 2 * rows * 16 + rows * (8 * 16 + 3 * 32) + 2 * batch * length**2
        return 4 * (of_a_batch + (2 * windows * length * 16 if kept else rows * len(words)))

    for length in (64, 128, 256, 512):
        assert activation_bytes(model, length, windows, batch, kept=kept) == by_hand(length)
        found = default_length(model, words, 10**6, windows, batch, kept=kept, memory=4 * by_hand(length))
        assert found.tokens == length
        reason = found.reason
        less = default_length(model, words, 10**6, windows, batch, kept=kept, memory=4 * by_hand(length) - 4)
        assert less.tokens == max(length // 2, 64)
        assert less.reason == (f"for {(4 * by_hand(length) - 4) / 1e9:.1f} GB of memory" if length > 64 else reason)


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, none, limit = tmp_path / "none", tmp_path / "max", tmp_path / "limit"
    none.write_text("max\n")
    limit.write_text("123456789\n")
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**10))
    for files, expected in (((whole, none), 10**10), ((none, limit), 123_456_789)):
        monkeypatch.setattr(module, "_LIMITS", files)
        assert memory_of(torch.device("cpu")) == expected


def test_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = pico.tokenizer()
    text = SampleSet((Sample(text="a star is red . " * 999),), (0,), 0, "prose.txt", {}, windows=3)
    model, told = pico.llama(len(words), positions=4096), list[str]()
    monkeypatch.setattr(module, "memory_of", lambda _: 4 * activation_bytes(model, 128, 3, 2, kept=True))
    batches = make_batches(text, model, words, batch_size=2, told=told.append)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 128), (1, 128)]
    assert told == ["for 0.0 GB of memory"]
    make_batches(text, model, words, batch_size=2, sequence_length=32, told=told.append)
    assert len(told) == 1

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ecoflap.data import Sample, SampleSet, make_batches
from ecoflap.data import window_length as module
from ecoflap.data.computing import first_run
from ecoflap.data.objectives import default_objective, on_device
from ecoflap.data.window_length import Shape, Work, activation_bytes, default_length, memory_of

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


@pytest.mark.parametrize("work", ["calibration", "test", "training"])
def test_windows_become_shorter_until_a_quarter_of_the_memory_holds_them(work: Work) -> None:
    words, windows, batch = pico.tokenizer(), 9, 5
    model = pico.llama(len(words), positions=4096)  # 2 blocks: hidden 16, inner 32, 2 heads of 8, keys of one

    def by_hand(length: int) -> int:
        rows = batch * length
        forward = rows * (4 * 16 + 16 + 2 * 8 + 3 * 32)
        if work == "test":
            return 4 * (forward + rows * len(words))
        graph = 6 * 16 + 2 * 16 + 2 * 8 + 4 * 32
        gradients = rows * (2 * 16 + graph + 2 * 16 + 3 * 32)
        if work == "training":
            return 4 * (gradients + rows * (2 * graph + 3 * len(words)))
        return 4 * max(gradients, forward + windows * length * (2 * 16 + 3 * 16 + 32))

    for length in (64, 128, 256, 512):
        assert activation_bytes(model, length, windows, batch, work) == by_hand(length)
        found = default_length(model, words, 10**6, windows, batch, work=work, memory=4 * by_hand(length))
        assert found.tokens == length
        reason = found.reason
        less = default_length(model, words, 10**6, windows, batch, work=work, memory=4 * by_hand(length) - 4)
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
    monkeypatch.setattr(module, "memory_of", lambda _: 4 * activation_bytes(model, 128, 3, 2, "calibration"))
    batches = make_batches(text, model, words, batch_size=2, told=told.append)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 128), (1, 128)]
    assert told == ["for 0.0 GB of memory"]
    make_batches(text, model, words, batch_size=2, sequence_length=32, told=told.append)
    assert len(told) == 1


def test_a_batch_has_no_more_windows_than_the_text() -> None:
    words = pico.tokenizer()
    model = pico.llama(len(words), positions=4096)
    memory = 4 * activation_bytes(model, 512, 9, 9, "calibration")
    found = default_length(model, words, 9 * 512, 9, batch_size=10**9, memory=memory)
    assert found.tokens == 512
    assert default_length(model, words, 9 * 512, 9, batch_size=10**9, memory=memory - 4).tokens == 256


def test_the_graph_of_a_block_is_as_large_as_reckoned() -> None:
    """What torch saves for the backward pass of a block, in which the weights stay out, is counted number by number."""
    model = pico.llama(50, positions=512).eval()
    block, ids, kept = model.model.layers[0], torch.randint(50, (3, 128)), dict[int, int]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return own(*args, **kwargs)

    own, block.forward = block.forward, forward
    held = model(input_ids=ids, use_cache=False).logits  # its graph keeps the tensors, so that no place is used twice
    assert held.requires_grad
    assert sum(kept.values()) == pytest.approx(4 * ids.numel() * Shape.of(model).graph, rel=0.1)


class _Widest(TorchDispatchMode):
    """The most rows of a product with 53 columns."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and found.shape[-1] == 53:
            self.rows = max(self.rows, len(found))
        return found


def test_the_first_forward_makes_no_table_of_all_logits() -> None:
    model, ids = pico.llama(53), torch.randint(50, (2, 16))
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    loss, batch = default_objective(model), {"input_ids": ids, "labels": labels}
    with torch.no_grad(), _Widest() as first:
        found = first_run(loss)(model, batch)
    with torch.no_grad(), _Widest() as plain:
        torch.testing.assert_close(found, on_device(loss)(model, batch))
    assert (first.rows, plain.rows) == (6, 32)

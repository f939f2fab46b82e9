"""The Python interface: any module with blocks, the pico families, exceptions in the middle, and the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import picos
import pytest
import torch
from torch import Tensor, nn

import ecoflap
from ecoflap.errors import (
    AnatomyError,
    CalibrationError,
    InfeasibleAllocation,
    InvalidOption,
    NonFiniteLoss,
    UnknownName,
)
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.model.fingerprint import fingerprint
from ecoflap.pruning.registry import CRITERIA

DOCUMENT = Path(__file__).parents[1] / "docs" / "python-api.md"


class Attention(nn.Module):
    """One block of a small transformer: single-head attention and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) * scale, -1)
        x = x + self.o(weights @ self.v(x))
        return x + self.down(torch.relu(self.up(x)))


class Small(nn.Module):
    """Returns its loss as a scalar, a dictionary or not at all."""

    def __init__(self, returns: str = "scalar", width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.returns = returns
        self.stack = nn.ModuleList(Attention(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        for block in self.stack:
            x = block(x, scale=0.3)
        logits = self.head(x.mean(1))
        if self.returns == "logits":
            return logits
        loss = nn.functional.cross_entropy(logits, y)
        return loss if self.returns == "scalar" else {"loss": loss, "logits": logits}


def batches(n: int = 3, size: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {"x": torch.randn(size, 6, 12, generator=generator), "y": torch.randint(3, (size,), generator=generator)}
        for _ in range(n)
    ]


def zeros_of(model: nn.Module, result: ecoflap.PruneResult) -> dict[str, int]:
    return {row.name: int((model.get_parameter(row.name) == 0).sum()) for row in result.allocation.layers}


@pytest.mark.parametrize("returns", ["scalar", "dict", "logits"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "magnitude"])
def test_a_plain_module(returns: str, criterion: str) -> None:
    model = Small(returns).train()
    loss = None
    if returns == "logits":
        loss = lambda m, b: nn.functional.cross_entropy(m(**b), b["y"])  # noqa: E731
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    result = ecoflap.prune(model, batches(), sparsity=0.4, criterion=criterion, loss=loss)
    assert result.model is model
    assert model.training
    counts = zeros_of(model, result)
    assert counts == {row.name: row.zeros for row in result.allocation.layers}
    assert sum(counts.values()) == round(0.4 * result.allocation.total_weights)
    assert len(counts) == 18
    assert result.sparsity == pytest.approx(0.4, abs=1e-3)
    assert result.unreached == ()
    assert result.importance is not None
    assert result.importance.scores["stack.0.q.weight"].n == 3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    assert changed <= set(counts)


def test_the_loss_by_hand_is_the_model_s_own() -> None:
    own = ecoflap.measure_importance(Small("dict").requires_grad_(False), batches(), seed=1)
    torch.manual_seed(0)
    model = Small("dict")
    again = ecoflap.measure_importance(model, batches(), seed=1, loss=lambda m, b: m(**b)["loss"])
    torch.manual_seed(0)
    scalar = ecoflap.measure_importance(Small("scalar"), batches(), seed=1)
    assert again.scores == scalar.scores
    assert set(own.scores) == set(again.scores)


@pytest.mark.parametrize("name", picos.FAMILIES)
def test_families(name: str) -> None:
    family = picos.FAMILIES[name]
    model = family.build()
    given = family.batches(4, 2, padding=name != "vit")
    result = ecoflap.prune(model, given, sparsity=0.5, importance="first-order")
    assert sum(zeros_of(model, result).values()) == round(0.5 * result.allocation.total_weights)
    assert result.unreached == ()
    loss = model(**given[0]).loss
    assert torch.isfinite(loss)


def test_pieces_give_what_the_whole_gives() -> None:
    torch.manual_seed(3)
    first = Small()
    second = Small()
    second.load_state_dict(first.state_dict())
    whole = ecoflap.prune(first, batches(), sparsity=0.6, importance_samples=8, seed=4, granularity="layer")
    importance = ecoflap.measure_importance(second, batches(), samples=8, seed=4)
    assert importance.scores == whole.importance.scores  # type: ignore[union-attr]
    allocation = ecoflap.allocate(importance, sparsity=0.6, granularity="layer")
    ecoflap.prune(second, batches(), allocation=allocation)
    assert fingerprint(first) == fingerprint(second)
    torch.manual_seed(3)
    third = Small()
    ecoflap.prune(third, batches(), sparsity=0.6, importance=importance, granularity="layer")
    assert fingerprint(first) == fingerprint(third)


@pytest.mark.parametrize("importance", ["zeroth-order", "first-order", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_changes_nothing(importance: str, dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    model.stack[1].q.weight.requires_grad_(False)
    if dtype == torch.float32:
        model.stack[0].q.weight.grad = torch.ones_like(model.stack[0].q.weight)
    before, flags = fingerprint(model), [p.requires_grad for p in model.parameters()]
    given = [{**batch, "x": batch["x"].to(dtype)} for batch in batches()]
    ecoflap.measure_importance(model, given, importance)
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    if dtype == torch.float32:
        assert torch.equal(model.stack[0].q.weight.grad, torch.ones_like(model.stack[0].q.weight))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("importance", ["zeroth-order", "first-order"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_an_exception_in_the_middle_changes_nothing(importance: str, error: type[BaseException], at: int) -> None:
    model = Small()
    before = fingerprint(model)
    calls = 0

    def loss(module: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value: Tensor = module(**batch)
        if calls > at:
            raise error("now")
        return value

    with pytest.raises(error):
        ecoflap.measure_importance(model, batches(8), importance, loss=loss)
    assert calls == at + 1
    assert fingerprint(model) == before
    assert model(**batches()[0]).isfinite()
    assert not [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_no_data_where_none_is_needed() -> None:
    model = Small()
    result = ecoflap.prune(model, [], sparsity=0.5, criterion="magnitude", importance="uniform")
    assert sum(zeros_of(model, result).values()) == result.allocation.total_weights // 2
    for name in zeros_of(model, result):
        weight = model.get_parameter(name)
        assert weight[weight != 0].abs().min() > 0
    for options in ({}, {"importance": "uniform"}, {"criterion": "magnitude"}):
        with pytest.raises(CalibrationError, match="at least one"):
            ecoflap.prune(Small(), [], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.5}, InvalidOption, "sparsity must be a number from 0 to 1"),
        ({"criterion": "wandb"}, UnknownName, "did you mean 'wanda'"),
        ({"importance": "zero-order"}, UnknownName, "did you mean 'zeroth-order'"),
        ({"importance_options": {"eps": 1}}, InvalidOption, "no option 'eps'"),
        ({"pattern": "2:4", "importance": "owl"}, InvalidOption, "use importance 'uniform'"),
        ({"pattern": "2:5", "importance": "uniform", "sparsity": 0.6}, InvalidOption, "does not divide"),
        ({"max_sparsity": 0.4}, InfeasibleAllocation, "out of reach"),
        ({"tower_sparsity": {"vision": 0.3}}, UnknownName, "stack"),
        ({"granularity": "row"}, UnknownName, "choose from"),
        ({"include": ["head2"]}, AnatomyError, "selects no layer"),
        ({"towers": ["nope"]}, AnatomyError, "no list of blocks"),
    ],
)
def test_refused_before_anything_is_measured(
    options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("stage 1 has begun")

    model = Small()
    before = fingerprint(model)
    monkeypatch.setattr("ecoflap.importance.measure.measure_importance", never)
    with pytest.raises(error, match=message):
        ecoflap.prune(model, batches(), **options)
    assert fingerprint(model) == before


def test_another_model_s_allocation_or_scores() -> None:
    importance = ecoflap.measure_importance(Small(depth=2), batches(), "first-order")
    allocation = ecoflap.allocate(importance, sparsity=0.5)
    with pytest.raises(InvalidOption, match=r"allocation is of another model.*stack\.2"):
        ecoflap.prune(Small(), batches(), allocation=allocation)
    with pytest.raises(InvalidOption, match=r"importance is of another model.*stack\.2"):
        ecoflap.prune(Small(), batches(), importance=importance)


def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    given = batches()
    given[1]["x"][0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteLoss, match="batch 1"):
        ecoflap.measure_importance(Small(), given)


def test_importing_is_light() -> None:
    code = "import sys, ecoflap; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules); ecoflap.allocate"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


def test_every_public_name_exists() -> None:
    for name in ecoflap.__all__:
        assert getattr(ecoflap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        ecoflap.prun  # noqa: B018


def test_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCUMENT.read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert "blocks" in capsys.readouterr().out


def _options(factory: Any) -> set[str]:
    return {field.name for field in fields(factory)}


def test_the_documentation_names_every_measure_and_criterion_with_its_options() -> None:
    folder = DOCUMENT.parent
    table = {
        row[0].strip(" `"): row[1]
        for row in (line.strip("|").split("|", 1) for line in DOCUMENT.read_text("utf-8").splitlines())
        if len(row) == 2
    }
    for name in IMPORTANCES.names():
        options = _options(IMPORTANCES.get(name))
        assert all(f"`{option}`" in table[name] for option in options), name
    line = next(
        row for row in (folder / "command-line.md").read_text("utf-8").splitlines() if "criterion-options" in row
    )
    for name in CRITERIA.names():
        (told,) = re.findall(rf"(?:^|[ ;]){name}: ([^;|]*)", line) or [""]
        assert set(re.findall(r"`(\w+)`", told)) == _options(CRITERIA.get(name)), name


def test_the_documentation_s_runs_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that need a checkpoint, on a pico one."""
    from console import prose

    monkeypatch.chdir(tmp_path)
    picos.write_checkpoint("llama", tmp_path / "path" / "to" / "llama")
    prose(tmp_path / "prose.txt", 9000)
    prose(tmp_path / "held-out.txt", 500)
    blocks = re.findall(r"^```python no-run\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        code = block.replace("2048", "16").replace("samples=128", "samples=32")
        code = code.replace("[0, 1, 2]", "[0], samples=32")  # and fewer cells
        exec(compile(code, str(DOCUMENT), "exec"), {"__name__": "documentation"})
    assert (tmp_path / "pruned" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "llama" / "report.html").exists()
    assert (tmp_path / "ecoflap-compare" / "compare.html").exists()


def test_a_pattern_needs_no_importance() -> None:
    """As on the command line: N:M fixes every layer's sparsity, so there is nothing to measure."""
    batches = picos.FAMILIES["llama"].batches(2, 2)
    model, other = (picos.FAMILIES["llama"].build() for _ in range(2))
    found = ecoflap.prune(model, batches, pattern="2:4")
    expected = ecoflap.prune(other, batches, pattern="2:4", importance="uniform")
    assert found.allocation == expected.allocation
    for layer in found.anatomy.layers:
        weight = model.get_parameter(layer.name)
        assert torch.equal(weight, other.get_parameter(layer.name))
        assert ((weight.reshape(-1, 4) == 0).sum(dim=1) == 2).all()

"""A block whose runs go on where they were cut gives what whole runs give, and computes nothing twice."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecoflap.model.block_runner import Enough
from ecoflap.model.resumed import ResumedCalls

WIDTH = 6


class Block(nn.Module):
    """Attention in small, with what operations may do: views, pairs of results, writing in place, reading a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("shift", torch.randn(WIDTH))

    def attend(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return (q @ k.transpose(-1, -2)).div_(q.shape[-1] ** 0.5).softmax(-1) @ x

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x) + self.shift
        y = y.to(x.dtype) if mask is None else y * mask
        x = x + self.o(self.attend(y))
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(gate.sigmoid().mul_(up))


class ReadsWeightsEarly(Block):
    def attend(self, x: Tensor) -> Tensor:
        return super().attend(x) * self.o.weight.mean()  # which is pruned later


class OwnTensor(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((WIDTH,), 2.0)

    def attend(self, x: Tensor) -> Tensor:
        return super().attend(x) * self.scale


class Iterates(Block):
    def attend(self, x: Tensor) -> Tensor:
        return torch.stack([row * 2 for row in super().attend(x)])


class WritesAfterTheCut(Block):
    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.k(x.mul_(2)) + q  # the cut is before q


class Remembers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def attend(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().attend(x) if self.seen % 2 else super().attend(x.abs()).abs()


GROUPS = (("q", "k"), ("o",), ("up",), ("down",))
FOLLOWED = (Block, Iterates)
NOT_FOLLOWED = (ReadsWeightsEarly, OwnTensor, WritesAfterTheCut)


class Products(TorchFunctionMode):
    """Counts the products with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is nn.functional.linear
        return func(*args, **(kwargs or {}))


def up_to_each_group(block: nn.Module, batches: list[tuple[Tensor, Tensor | None]], resume: bool) -> list[Tensor]:
    """What each group's layers receive for all batches, where the groups before it are changed; then the outputs."""
    layers = {name: block.get_submodule(name) for group in GROUPS for name in group}
    calls = ResumedCalls(block, [layer.weight for layer in layers.values()])
    found: list[Tensor] = []
    with torch.no_grad():
        for group in GROUPS:
            for number, (x, mask) in enumerate(batches):
                fed: list[Tensor] = []

                def feed(module: nn.Module, args: Any, fed: list[Tensor] = fed, group: tuple[str, ...] = group) -> None:
                    if not fed:
                        calls.cut()
                    fed.append(args[0].clone())
                    if len(fed) == len(group):
                        raise Enough

                hooks = [layers[name].register_forward_pre_hook(feed) for name in group]
                with suppress(Enough):
                    calls.run(number, (x,), {"mask": mask}) if resume else block(x, mask=mask)
                for hook in hooks:
                    hook.remove()
                found += fed
            for name in group:
                layers[name].weight.mul_(0.5)
            calls.settle(layers[name].weight for name in group)
        for number, (x, mask) in enumerate(batches):
            found.append(calls.run(number, (x,), {"mask": mask}) if resume else block(x, mask=mask))
            calls.forget(number)
    return found


def batches_of(seed: int) -> list[tuple[Tensor, Tensor | None]]:
    torch.manual_seed(seed)
    return [(torch.randn(2, 3, WIDTH), None), (torch.randn(1, 5, WIDTH), torch.rand(1, 5, 1).round())]


@pytest.mark.parametrize("kind", [*FOLLOWED, *NOT_FOLLOWED, Remembers])
def test_the_same_as_whole_runs(kind: type[nn.Module]) -> None:
    batches = batches_of(0)
    block = kind().eval()
    twin = copy.deepcopy(block)
    whole, resumed = up_to_each_group(twin, batches, False), up_to_each_group(block, batches, True)
    if kind is Remembers:  # whole runs and those that begin anew count alike only up to there
        whole, resumed = whole[:4], resumed[:4]
    assert len(whole) == len(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("kind", FOLLOWED)
def test_each_product_is_computed_once(kind: type[nn.Module]) -> None:
    batches, counts = batches_of(1), []
    for resume in (False, True):
        with Products() as products:
            up_to_each_group(kind().eval(), batches, resume)
        counts.append(products.count)
    # Whole: up to k, o, up and down, and to the end. Resumed: all five, and q once more, which was run before its group
    # was pruned.
    assert counts == [len(batches) * (1 + 2 + 3 + 4 + 5), len(batches) * (5 + 1)]


@pytest.mark.parametrize("kind", NOT_FOLLOWED)
def test_what_cannot_be_followed_is_run_whole(kind: type[nn.Module]) -> None:
    with Products() as products:
        up_to_each_group(kind().eval(), batches_of(2)[:1], True)
    assert products.count > 6


def test_what_no_later_operation_uses_is_not_kept() -> None:
    block = Block().eval()
    calls = ResumedCalls(block, [block.down.weight])
    seen: list[Any] = []

    def feed(module: nn.Module, args: Any) -> None:
        calls.cut()
        raise Enough

    block.norm.register_forward_hook(lambda module, args, output: seen.append(output.data_ptr()))
    block.down.register_forward_pre_hook(feed)
    with torch.no_grad(), suppress(Enough):
        calls.run(0, (torch.randn(2, 3, WIDTH),), {})
    kept = {value.data_ptr() for value in calls._calls[0].values.values()}
    assert seen
    assert kept.isdisjoint(seen)
    # What the block's variables hold: y, the residual, the pair's halves; and what down receives.
    assert len(calls._calls[0].values) == 5


def test_an_error_of_the_block_passes() -> None:
    block = Block().eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        ResumedCalls(block, []).run(0, (torch.randn(2, 3, WIDTH),), {"mask": torch.ones(7)})

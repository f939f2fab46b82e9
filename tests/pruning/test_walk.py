"""The walk against a slow one that runs the whole model for each block, and what masks may not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picos import FAMILIES
from torch import Tensor, nn

from ecoflap import api
from ecoflap.allocation import Allocation, LayerSize, allocate
from ecoflap.allocation.patterns import parse_pattern, with_default
from ecoflap.data.model_facts import is_encoder_decoder, token_masks
from ecoflap.data.objectives import default_objective
from ecoflap.model.anatomy import discover
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.model.patching import cache_disabled
from ecoflap.model.trace import evaluating
from ecoflap.pruning.journal import PrunedBlock
from ecoflap.pruning.registry import CRITERIA
from ecoflap.pruning.walk import walk
from ecoflap.statistics.gather import Gatherer
from ecoflap.statistics.inputs import InputGram, InputNorm


def anatomy_of(model: nn.Module, batch: Any) -> Anatomy:
    return discover(model, batch, run=default_objective(model))


def some_allocation(anatomy: Anatomy, seed: int = 0, sparsity: float = 0.5) -> Allocation:
    """Another sparsity for every block."""
    generator = torch.Generator().manual_seed(seed)
    return allocate(
        [
            LayerSize(one.name, one.tower, one.block, one.numel, float(torch.rand(1, generator=generator)) + 0.1,
                      one.modality, one.shape)
            for one in anatomy.layers
        ],
        sparsity=sparsity, max_sparsity=0.8, granularity="block",
    )  # fmt: skip


def pruned(name: str, batches: list[Any], criterion: str = "wanda", pattern: str = "unstructured", **options: Any):  # type: ignore[no-untyped-def]
    model = FAMILIES[name].build()
    anatomy = anatomy_of(model, batches[0])
    allocation = options.pop("allocation", None) or some_allocation(anatomy)
    result = api.prune_to(model, anatomy, allocation, batches, criterion=criterion, pattern=pattern, **options)
    return model, anatomy, result


def zeros_of(model: nn.Module, anatomy: Anatomy) -> dict[str, Tensor]:
    return {layer.name: model.get_parameter(layer.name) == 0 for layer in anatomy.layers}


def inputs_of(model: nn.Module, layers: tuple[Layer, ...], run: Any) -> dict[str, Tensor]:
    """What each layer receives in a plain forward."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer.module).register_forward_pre_hook(
            lambda module, args, layer=layer: seen.__setitem__(layer.name, args[0])
        )
        for layer in layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def slow_wanda(model: nn.Module, anatomy: Anatomy, allocation: Allocation, batches: list[Any]) -> None:
    """Every block: plain forwards of the whole model, norms of the real tokens, rows cut by a sort."""
    loss, seq2seq = default_objective(model), is_encoder_decoder(model)
    language = [tower.name for tower in anatomy.towers if tower.modality == "language"]
    for block in anatomy.blocks:
        squares: dict[str, Tensor] = {}
        for batch in batches:
            masks = token_masks(batch, seq2seq)
            seen = inputs_of(model, block.layers, lambda batch=batch: loss(model, batch))
            for layer in block.layers:
                x = seen[layer.name]
                mask = None
                if block.tower in language:
                    in_decoder = seq2seq and block.tower == language[-1]
                    crosses = "EncDecAttention.k" in layer.name or "EncDecAttention.v" in layer.name
                    mask = masks.decoder if in_decoder and not crosses else masks.encoder
                flat = x.reshape(-1, x.shape[-1])
                real = flat if mask is None else flat[mask.reshape(-1)]
                squares[layer.name] = squares.get(layer.name, torch.zeros(x.shape[-1])) + real.float().square().sum(0)
        for layer in block.layers:
            parameter = model.get_parameter(layer.name)
            weight = parameter.T if layer.transposed else parameter
            scores = weight.abs() * squares[layer.name].sqrt()
            zeros = allocation[layer.name].zeros
            each, extra = divmod(zeros, len(weight))
            order = scores.argsort(dim=1, stable=True)
            cheapest = sorted(range(len(weight)), key=lambda row: float(scores[row, order[row, each]]))[:extra]
            for row in range(len(weight)):
                weight[row, order[row, : each + (row in cheapest)]] = 0


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_wanda_is_that_of_plain_forwards_of_the_whole_model(name: str, padding: bool) -> None:
    batches = FAMILIES[name].batches(6, 2, padding=padding)
    model, anatomy, (allocation, unreached) = pruned(name, batches)
    slow = FAMILIES[name].build().eval()
    with torch.no_grad(), cache_disabled(slow):
        slow_wanda(slow, anatomy, allocation, batches)
    for layer in anatomy.layers:
        assert torch.equal(model.get_parameter(layer.name), slow.get_parameter(layer.name)), layer.name
    assert not unreached
    assert all(row.achieved == row.sparsity for row in allocation.layers)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm", "magnitude"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_counts_everywhere_and_nothing_else_touched(name: str, criterion: str) -> None:
    batches = FAMILIES[name].batches(4, 2, padding=True)
    model, anatomy, (allocation, _) = pruned(name, batches, criterion)
    before = FAMILIES[name].build().state_dict()
    layers = {alias for layer in anatomy.layers for alias in (layer.name, *layer.aliases)}
    for key, tensor in model.state_dict().items():
        if key not in layers:
            assert torch.equal(tensor, before[key]), key
    for layer in anatomy.layers:
        weight = model.get_parameter(layer.name)
        assert int((weight == 0).sum()) == allocation[layer.name].zeros
        if criterion not in ("sparsegpt", "admm"):
            kept = weight != 0
            assert torch.equal(weight[kept], before[layer.name][kept])


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["t5", "llama", "blip2_opt", "bert"])
def test_padding_does_not_change_masks(name: str, criterion: str) -> None:
    """A padded batch against the same samples one by one, cut to their own lengths."""
    padded = FAMILIES[name].batches(6, 3, padding=True)
    assert any((batch["attention_mask"] == 0).any() for batch in padded)
    alone = []
    for batch in padded:
        for i in range(len(batch["input_ids"])):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            real = one["attention_mask"][0].bool()
            for key in ("input_ids", "attention_mask"):
                one[key] = one[key][:, real]
            labels = one["labels"]
            one["labels"] = labels[:, real] if labels.shape[1] == len(real) else labels[:, labels[0] != -100]
            alone.append(one)
    first, anatomy, _ = pruned(name, padded, criterion)
    second, _, _ = pruned(name, alone, criterion)
    ours, theirs = zeros_of(first, anatomy), zeros_of(second, anatomy)
    differing = sum(int((ours[key] != theirs[key]).sum()) for key in ours)
    assert differing <= 4 if criterion == "sparsegpt" else differing == 0  # a swap of two near-equal scores


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_batch_size_does_not_change_masks(criterion: str) -> None:
    family = FAMILIES["llava"]
    singles = family.batches(6, 1)
    pairs = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(singles[::2], singles[1::2], strict=True)]
    first, anatomy, _ = pruned("llava", singles, criterion)
    second, _, _ = pruned("llava", pairs, criterion)
    ours, theirs = zeros_of(first, anatomy), zeros_of(second, anatomy)
    differing = sum(int((ours[key] != theirs[key]).sum()) for key in ours)
    assert differing <= 4 if criterion == "sparsegpt" else differing == 0


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_n_of_m_holds_in_every_group(criterion: str, pattern: str) -> None:
    kept, group = (int(part) for part in pattern.split(":"))
    family = FAMILIES["t5"]
    model, batches = family.build(), family.batches(4, 2)
    result = api.prune(model, batches, 1 - kept / group, importance="uniform", criterion=criterion, pattern=pattern)
    for layer in result.anatomy.layers:
        groups = model.get_parameter(layer.name).reshape(-1, group)
        assert ((groups != 0).sum(1) == kept).all()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_shared_inputs_are_counted_once_and_change_nothing(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = FAMILIES["t5"].batches(4, 2, padding=True)
    updates: list[int] = []
    for kind in (InputNorm, InputGram):
        original = kind.update
        monkeypatch.setattr(
            kind, "update", lambda self, *a, original=original, **k: (updates.append(1), original(self, *a, **k))[1]
        )
    shared, anatomy, _ = pruned("t5", batches, criterion)
    with_sharing = len(updates)
    updates.clear()
    create = Gatherer.__init__
    monkeypatch.setattr(Gatherer, "__init__", lambda self, *a, share, **k: create(self, *a, share=False, **k))
    separate, _, _ = pruned("t5", batches, criterion)
    for layer in anatomy.layers:
        assert torch.equal(shared.get_parameter(layer.name), separate.get_parameter(layer.name))
    # Of the matrices of a T5 block q, k, v share an input, so do the cross attention's k, v, and wi_0, wi_1.
    assert len(updates) == 2 * len(anatomy.layers)
    encoder, decoder = anatomy.towers
    distinct = {len(encoder.blocks[0].layers): 4, len(decoder.blocks[0].layers): 7}
    assert with_sharing == 2 * sum(distinct[len(block.layers)] for block in anatomy.blocks)


class Journal:
    def __init__(self, stop_after: int | None = None) -> None:
        self.blocks: dict[str, PrunedBlock] = {}
        self.stop_after = stop_after

    def load(self, block: str) -> PrunedBlock | None:
        return self.blocks.get(block)

    def save(self, block: str, pruned: PrunedBlock) -> None:
        if self.stop_after is not None and len(self.blocks) >= self.stop_after:
            raise KeyboardInterrupt
        self.blocks[block] = PrunedBlock({n: w.clone() for n, w in pruned.weights.items()}, pruned.unreached)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "admm", "magnitude"])
def test_a_walk_stopped_anywhere_goes_on_to_the_same_bits(criterion: str) -> None:
    batches = FAMILIES["blip2_t5"].batches(4, 2, padding=True)
    whole, anatomy, _ = pruned("blip2_t5", batches, criterion)
    for stop in range(len(anatomy.blocks)):
        journal = Journal(stop)
        with pytest.raises(KeyboardInterrupt):
            pruned("blip2_t5", batches, criterion, journal=journal)
        journal.stop_after = None
        resumed, _, _ = pruned("blip2_t5", batches, criterion, journal=journal)
        for layer in anatomy.layers:
            assert torch.equal(resumed.get_parameter(layer.name), whole.get_parameter(layer.name)), (stop, layer.name)


def test_another_allocation_gives_other_masks() -> None:
    batches = FAMILIES["clip"].batches(4, 2)
    anatomy = anatomy_of(FAMILIES["clip"].build(), batches[0])
    one, _, _ = pruned("clip", batches, allocation=some_allocation(anatomy, 1))
    other, _, _ = pruned("clip", batches, allocation=some_allocation(anatomy, 2))
    ours, theirs = zeros_of(one, anatomy), zeros_of(other, anatomy)
    changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert len(changed) > len(ours) / 2
    assert sum(int(m.sum()) for m in ours.values()) == sum(int(m.sum()) for m in theirs.values())


@pytest.mark.parametrize("where", [True, "cpu", "disk"])
def test_offloaded_activations_change_nothing(where: bool | str) -> None:
    batches = FAMILIES["t5"].batches(4, 2, padding=True)
    kept, anatomy, _ = pruned("t5", batches)
    offloaded, _, _ = pruned("t5", batches, offload_activations=where)
    for layer in anatomy.layers:
        assert torch.equal(kept.get_parameter(layer.name), offloaded.get_parameter(layer.name))


def test_a_call_that_gathers_ends_at_the_last_input() -> None:
    """Only the first one is run to its end; then all run once more, pruned, for the next block."""
    batches = FAMILIES["clip"].batches(6, 2)
    model = FAMILIES["clip"].build()
    anatomy = anatomy_of(model, batches[0])
    first, second = anatomy.towers[0].blocks[:2]
    runs: dict[str, int] = {}
    for layer in (*first.layers, *second.layers):
        model.get_submodule(layer.module).register_forward_hook(
            lambda module, args, output, name=layer.name: runs.__setitem__(name, runs.get(name, 0) + 1)
        )
    api.prune_to(model, anatomy, some_allocation(anatomy), batches, criterion="wanda")
    assert [runs[layer.name] - runs[first.layers[-1].name] for layer in first.layers[:-1]] == [2] * (
        len(first.layers) - 1
    )


class Router(nn.Module):
    """A block with an expert that only some batches reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6, bias=False)
        self.gate = nn.Linear(6, 6, bias=False)
        self.idle = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor, use: bool = False, idle: bool = False) -> Tensor:
        y = self.up(x)
        if use:
            y = y * self.gate(x)
        if idle:
            y = y + self.idle(x)
        return x + y


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Router() for _ in range(2))

    def forward(self, x: Tensor, use: Tensor, idle: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, bool(use), bool(idle))
        return x.square().mean()


def test_a_layer_called_less_often_than_its_neighbour_gets_its_own_statistics_and_an_idle_one_magnitude() -> None:
    torch.manual_seed(0)
    model = Routed()
    twin = Routed()
    twin.load_state_dict(model.state_dict())
    everything = {"x": torch.randn(2, 6), "use": torch.tensor(1), "idle": torch.tensor(1)}
    batches = [
        {"x": torch.randn(3, 6) * torch.rand(6), "use": torch.tensor(i % 2), "idle": torch.tensor(0)} for i in range(4)
    ]
    anatomy = anatomy_of(model, everything)
    allocation = some_allocation(anatomy)
    criterion = CRITERIA.get("wanda")()
    pattern = with_default(parse_pattern("unstructured"), "row")
    journal, loss = Journal(), default_objective(model)
    result = walk(model, anatomy, allocation, batches, criterion, pattern, run=loss, journal=journal)
    assert result.unreached == ("blocks.0.idle.weight", "blocks.1.idle.weight")
    again = walk(model, anatomy, allocation, batches, criterion, pattern, run=loss, journal=journal)
    assert again.unreached == result.unreached  # also when the blocks come from the journal

    used = torch.cat([batch["x"] for batch in batches if batch["use"]])
    for layer, inputs in (("up", torch.cat([b["x"] for b in batches])), ("gate", used), ("idle", torch.ones(1, 6))):
        name = f"blocks.0.{layer}.weight"
        weight = twin.get_parameter(name)
        expected = criterion(weight.data, statistics_of(inputs), allocation[name].zeros, pattern).weight
        assert torch.equal(model.get_parameter(name).data, expected), layer


def statistics_of(inputs: Tensor) -> InputNorm:
    statistics = InputNorm(inputs.shape[-1])
    statistics.update(inputs)
    return statistics


def test_modes_and_caches_are_restored() -> None:
    batches = FAMILIES["llama"].batches(2, 2)
    model = FAMILIES["llama"].build().train()
    anatomy = anatomy_of(model, batches[0])
    api.prune_to(model, anatomy, some_allocation(anatomy), batches, criterion="wanda", pattern="unstructured")
    assert model.training
    assert model.config.use_cache
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    with evaluating(model):
        assert not model.training
    assert model.training


class _Count:
    """Progress that notes a stage's steps, and how many blocks ran before each."""

    def __init__(self, runs: list[str]) -> None:
        self.runs, self.steps, self.total, self.done = runs, list[tuple[int, int]](), 0, 0

    def stage(self, name: str, total: int, done: int = 0) -> _Count:
        self.total, self.done = total, done
        return self

    def __enter__(self) -> _Count:
        self.runs.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.steps.append((steps, len(self.runs)))
        self.runs.clear()


class _Some:
    """A journal that holds some blocks, and keeps what is pruned."""

    folder = None

    def __init__(self, blocks: dict[str, PrunedBlock]) -> None:
        self.blocks, self.saved = blocks, dict[str, PrunedBlock]()

    def load(self, block: str) -> PrunedBlock | None:
        return self.blocks.get(block)

    def save(self, block: str, pruned: PrunedBlock) -> None:
        self.saved[block] = PrunedBlock({name: weight.clone() for name, weight in pruned.weights.items()})


@pytest.mark.parametrize("name", ["blip2_opt", "llama", "t5"])
def test_steps_are_runs_of_blocks(name: str) -> None:
    """Counted by hooks: the walk's steps are the blocks that ran, on all batches; resumed, those that are left."""
    batches = FAMILIES[name].batches(4)
    saved: dict[str, PrunedBlock] = {}
    for resumed in range(4):
        model = FAMILIES[name].build()
        anatomy = anatomy_of(model, batches[0])
        runs: list[str] = []
        for (
            block
        ) in anatomy.replayable:  # a block's own forward is replaced while it is passed over; its layers' are not
            layer = next(part for part in model.get_submodule(block).modules() if isinstance(part, nn.Linear))
            layer.register_forward_hook(lambda *_, block=block, runs=runs: runs.append(block))
        progress = _Count(runs)
        journal = _Some({block.name: saved[block.name] for block in anatomy.blocks[:resumed]})
        api.prune_to(
            model, anatomy, some_allocation(anatomy), batches, criterion="wanda", progress=progress, journal=journal
        )
        saved = saved or journal.saved
        assert progress.done + sum(steps for steps, _ in progress.steps) == progress.total
        assert [ran for _, ran in progress.steps] == [len(batches) * steps for steps, _ in progress.steps]
        assert (progress.done > 0) == (resumed > 0)

"""Groups the layers of a block that are pruned together, and runs the dense model beside the pruned one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ecoflap.model.activation_store import Offload, offload_kind
from ecoflap.model.block_runner import BlockCall, Run, TowerDriver, tower_entries
from ecoflap.model.parts import Anatomy, Block, Layer, Tower
from ecoflap.model.resumed import ResumedCalls
from ecoflap.statistics.dense_inputs import DenseInputs
from ecoflap.statistics.watching import inputs_watched
from ecoflap.support.workers import Workers


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a block that are pruned at the same time.

    Attributes:
        once: the first call of the block called each of them exactly once.
        products: multiplications of a weight and an input in the first call of the block.
    """

    layers: tuple[Layer, ...]
    once: bool = False
    products: int = 0


class FirstCall:
    """Records which layers the first call of a block calls.

    Attributes:
        owners: each layer in the order of the calls, with the first layer that reads the same input.
        times: how often each was called.
        products: multiplications of a weight and an input, by layer.
    """

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.times: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self._inputs: list[tuple[Tensor, str]] = []  # distinct ones, each with its owner

    def record(self, layer: Layer, x: Tensor) -> None:
        """Record that ``layer`` is called with ``x``."""
        self.times[layer.name] += 1
        self.products[layer.name] += x.numel() * layer.shape[0]
        owner = next((owner for tensor, owner in self._inputs if tensor is x), None)
        if owner is None:
            self._inputs.append((x, owner := layer.name))
        self.owners.setdefault(layer.name, owner)

    def close(self) -> None:
        """Free the inputs."""
        self._inputs.clear()


def layer_groups(
    model: nn.Module, driver: TowerDriver, index: int, block: Block, workers: Workers, first: FirstCall | None = None
) -> list[LayerGroup]:
    """The groups of a block's layers that read the same input, in the order of a forward.

    The same matrix of all experts of a mixture is in one group: no expert reads another expert's output. Layers that
    the first call of the block does not reach come last.

    Args:
        driver: holds the block's inputs; the first worker runs the block on the first of them.
        first: the dense model's first call, if known. It is used, and the block is not run, if there are no experts:
            the order of the layers is the same then.
    """
    if first is None or any(layer.expert for layer in block.layers):
        first = FirstCall()
        if workers.rank == 0:
            with inputs_watched(model, block.layers, first.record):
                driver.observe(index, lambda call: None, calls=1)
    first.close()
    owners: Mapping[str, str]
    owners, times, products = workers.gather((first.owners, first.times, first.products))[0]
    layers = {layer.name: layer for layer in block.layers}
    order: list[str] = []
    group_of: dict[str, str] = {}
    for name, owner in owners.items():
        group = _place(layers[owner])
        group_of.setdefault(_place(layers[name]), group)
        if group not in order:
            order.append(group)
    last = ""
    groups = {
        group: tuple(layer for layer in block.layers if group_of.get(_place(layer), last) == group)
        for group in (*order, last)
    }
    return [
        LayerGroup(
            members,
            all(times.get(layer.name) == 1 for layer in members),
            sum(products.get(layer.name, 0) for layer in members),
        )
        for members in groups.values()
        if members
    ]


WORTH_RESUMING = 1e9  # multiplications of a block's call from which recording its operations saves time


def resumed_calls(
    model: nn.Module, block: Block, groups: Sequence[LayerGroup], driver: TowerDriver
) -> ResumedCalls | None:
    """Runs of the block that each go on from the group before; None if each run has to begin at the beginning.

    It is None for small blocks, for blocks with experts or with layers that are called several times or without their
    module, and if the driver offloads tensors: then there is no memory for more of them.
    """
    layers = [layer for group in groups for layer in group.layers]
    plain = not any(layer.expert or layer.stacked or layer.uncalled for layer in layers)
    small = sum(group.products for group in groups) < WORTH_RESUMING
    if small or len(groups) == 1 or not plain or not all(group.once for group in groups) or driver.offloads:
        return None
    return ResumedCalls(model.get_submodule(block.name), [model.get_parameter(layer.parameter) for layer in layers])


EXPERTS_ROOM = 2 << 30  # bytes of the statistics of a mixture's experts at a time
# Statistics of an expert: its own and, if it gets few tokens, those on all tokens, in total and of the current batch.
COPIES = 3


def within_room(groups: Sequence[LayerGroup], numbers: Callable[[int], int], room: int) -> list[LayerGroup]:
    """The groups, where one whose experts need more than ``room`` is split into several with fewer experts each.

    The parts are pruned one after the other, on statistics of the same inputs: no expert reads another's output. Other
    layers of the group come last, so that they don't change the experts' inputs.

    Args:
        numbers: the fp32 numbers that a layer's statistics take, from its columns.
        room: in bytes; a single expert may take more.
    """
    found: list[LayerGroup] = []
    for group in groups:
        sizes: dict[str, int] = {}
        for layer in group.layers:
            if layer.expert:
                sizes[layer.expert] = sizes.get(layer.expert, 0) + COPIES * 4 * numbers(layer.shape[1])
        if sum(sizes.values()) <= room:
            found.append(group)
            continue
        together: list[set[str]] = [set()]
        taken = 0
        for expert, size in sizes.items():
            if together[-1] and taken + size > room:
                together.append(set())
                taken = 0
            together[-1].add(expert)
            taken += size
        for some in [*together, {""}]:
            layers = tuple(layer for layer in group.layers if layer.expert in some)
            if layers:
                found.append(replace(group, layers=layers))
    return found


def _place(layer: Layer) -> str:
    """The layer's name; the same for this matrix of all experts of a mixture."""
    if not layer.expert:
        return layer.name
    return layer.parameter if layer.stacked else f"{layer.mixture}.*{layer.name[len(layer.expert) :]}"


class DenseModel:
    """Runs the calibration samples through the dense model, beside the walk that prunes it.

    It takes each tower's inputs before anything is pruned. Then it runs each block while its weights are still dense.

    Args:
        model: still dense.
        towers: those with blocks to be pruned.
        batches: of this worker.
        run: runs the model on a batch.
        offload, folder: as of :class:`~ecoflap.model.block_runner.TowerDriver`.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        towers: Sequence[Tower],
        batches: Sequence[Any],
        run: Run,
        *,
        offload: bool | str = False,
        folder: Path | None = None,
    ) -> None:
        self._model = model
        self._store = Offload(offload_kind(offload), folder)
        entries = tower_entries(model, towers, batches, run, self._store)
        self._drivers = {
            tower.name: TowerDriver(
                model, tower, batches, run, offload=offload, folder=folder, entries=entries[tower.name]
            )
            for tower in towers
        }
        # A weight that several blocks share is pruned with the first of them.
        self._shared = {
            name: model.get_parameter(name).detach().clone()
            for name in dict.fromkeys(layer.parameter for layer in anatomy.layers if layer.aliases)
        }

    def skip(self, tower: Tower, index: int) -> None:
        """Run a block that is still dense, for its outputs alone.

        The same hooks as in :meth:`inputs` are set: they change how mixtures compute, and a resumed walk must get the
        same outputs to the bit.
        """
        driver = self._drivers[tower.name]
        driver.enter(index)
        with self._dense_weights(), inputs_watched(self._model, tower.blocks[index].layers, lambda layer, x: None):
            driver.run(index, last=True)

    def inputs(self, tower: Tower, index: int) -> tuple[DenseInputs, FirstCall]:
        """Run a block that is still dense, and keep the inputs of its layers."""
        driver, block = self._drivers[tower.name], tower.blocks[index]
        driver.enter(index)
        found, numbers, first, current = DenseInputs(self._store), count(), FirstCall(), 0

        def begin(call: BlockCall) -> None:
            nonlocal current
            found.begin(current := next(numbers))

        def record(layer: Layer, x: Tensor) -> None:
            found.note(layer, x)
            if current == 0:
                first.record(layer, x)

        with self._dense_weights(), inputs_watched(self._model, block.layers, record):
            driver.run(index, begin, last=True)
        return found, first

    def finish_tower(self, tower: Tower) -> None:
        """Free what is kept for a tower."""
        del self._drivers[tower.name]

    @contextmanager
    def _dense_weights(self) -> Iterator[None]:
        pruned = {name: self._model.get_parameter(name).data for name in self._shared}
        try:
            for name, weight in self._shared.items():
                self._model.get_parameter(name).data = weight
            yield
        finally:
            for name, weight in pruned.items():
                self._model.get_parameter(name).data = weight

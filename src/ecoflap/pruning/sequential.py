"""Groups a block's layers that are pruned together; keeps the dense model's inputs beside the pruned one's."""

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
        products: of a weight and an input, in the first call of the block.
    """

    layers: tuple[Layer, ...]
    once: bool = False
    products: int = 0


class FirstCall:
    """What the first call of a block shows of its layers.

    Attributes:
        owners: each layer in the order of the calls, with the first layer that reads the same input.
        times: how often each was called.
        products: of a weight and an input, by layer.
    """

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self.times: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self._inputs: list[tuple[Tensor, str]] = []  # distinct ones, each with its owner

    def note(self, layer: Layer, x: Tensor) -> None:
        """``layer`` is called with ``x``."""
        self.times[layer.name] += 1
        self.products[layer.name] += x.numel() * layer.shape[0]
        owner = next((owner for tensor, owner in self._inputs if tensor is x), None)
        if owner is None:
            self._inputs.append((x, owner := layer.name))
        self.owners.setdefault(layer.name, owner)

    def close(self) -> None:
        """Let go of the inputs."""
        self._inputs.clear()


def layer_groups(
    model: nn.Module, driver: TowerDriver, index: int, block: Block, workers: Workers, first: FirstCall | None = None
) -> list[LayerGroup]:
    """The layers of a block that can be pruned at the same time: those that read one input, in the order of a forward.

    What the experts of a mixture read goes together: no expert reads what another one gives. Layers that the first
    call of the block does not reach come last.

    Args:
        driver: has taken the block's inputs; the first worker runs the block on the first of them.
        first: that call in the dense model, which is as good where no router chooses: nothing is run then.
    """
    if first is None or any(layer.expert for layer in block.layers):
        first = FirstCall()
        if workers.rank == 0:
            with inputs_watched(model, block.layers, first.note):
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
            all(times.get(layer.name) == 1 for layer in members),  # plain dictionaries, from another process
            sum(products.get(layer.name, 0) for layer in members),
        )
        for members in groups.values()
        if members
    ]


WORTH_RESUMING = 1e9  # products of a block's call from which following its operations takes less time than it saves


def resumed_calls(
    model: nn.Module, block: Block, groups: Sequence[LayerGroup], driver: TowerDriver
) -> ResumedCalls | None:
    """What lets the block run on from one group to the next; None where each run has to begin at the beginning.

    So it is with experts, with layers that are called several times or by no module of their own, where the driver
    keeps tensors elsewhere than on their device, because there is no room for more of them, and in small blocks.
    """
    layers = [layer for group in groups for layer in group.layers]
    plain = not any(layer.expert or layer.stacked or layer.uncalled for layer in layers)
    small = sum(group.products for group in groups) < WORTH_RESUMING
    if small or len(groups) == 1 or not plain or not all(group.once for group in groups) or driver.offloads:
        return None
    return ResumedCalls(model.get_submodule(block.name), [model.get_parameter(layer.parameter) for layer in layers])


EXPERTS_ROOM = 2 << 30  # bytes of what is gathered for a mixture's experts at a time
# Of an expert's statistics: its own; where it gets few tokens, those of all, so far and of the batch at hand.
COPIES = 3


def within_room(groups: Sequence[LayerGroup], numbers: Callable[[int], int], room: int) -> list[LayerGroup]:
    """The groups, and in the place of one whose experts need more than ``room``, several with some experts each.

    Those are pruned one after the other, on statistics that the same inputs give: no expert reads another's output.
    The group's other layers come last, so that they change nothing of what the experts receive.

    Args:
        numbers: of a layer's columns, gives how many fp32 numbers its statistics take.
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
    """The layer's name, which is that of all its like in the experts of a mixture."""
    if not layer.expert:
        return layer.name
    return layer.parameter if layer.stacked else f"{layer.mixture}.*{layer.name[len(layer.expert) :]}"


class DenseModel:
    """The calibration samples on their way through the dense model, beside the walk that prunes it.

    It takes each tower's inputs before anything is pruned. Then, block by block, it runs a block while its weights are
    still the dense ones.

    Args:
        model: dense as yet.
        towers: those that have blocks to be pruned.
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
        """Run a block, whose weights are the dense ones, for its outputs alone.

        It is watched as in :meth:`inputs`, so that a resumed walk gets the same to the bit: mixtures compute otherwise.
        """
        driver = self._drivers[tower.name]
        driver.enter(index)
        with self._dense_weights(), inputs_watched(self._model, tower.blocks[index].layers, lambda layer, x: None):
            driver.run(index, last=True)

    def inputs(self, tower: Tower, index: int) -> tuple[DenseInputs, FirstCall]:
        """Run a block, whose weights are the dense ones, and keep what its layers receive."""
        driver, block = self._drivers[tower.name], tower.blocks[index]
        driver.enter(index)
        found, numbers, first, current = DenseInputs(self._store), count(), FirstCall(), 0

        def begin(call: BlockCall) -> None:
            nonlocal current
            found.begin(current := next(numbers))

        def note(layer: Layer, x: Tensor) -> None:
            found.note(layer, x)
            if current == 0:
                first.note(layer, x)

        with self._dense_weights(), inputs_watched(self._model, block.layers, note):
            driver.run(index, begin, last=True)
        return found, first

    def finish_tower(self, tower: Tower) -> None:
        """Ends the tower, and frees what is kept of it."""
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

"""Towers, blocks and prunable layers of any model, read from the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from ecoflap.errors import AnatomyError
from ecoflap.network.lists import BlockList, block_lists
from ecoflap.network.modality import modality_of
from ecoflap.network.trace import Run, Trace, plain_forward, trace


@dataclass(frozen=True)
class Layer:
    """One prunable weight matrix.

    Attributes:
        name: its parameter name in the state dict.
        module: path of the module that owns it.
        shape: (output, input) features, also for ``Conv1D``, whose stored weight is transposed.
        transposed: the stored weight is (input, output).
        aliases: other parameter names of the same tensor inside the blocks (shared weights).
    """

    name: str
    module: str
    block: str
    tower: str
    modality: str
    shape: tuple[int, int]
    transposed: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of every module that holds this matrix."""
        return (self.module, *(alias.rpartition(".")[0] for alias in self.aliases))


@dataclass(frozen=True)
class Block:
    """One transformer block with its prunable layers (none if they were excluded)."""

    name: str
    tower: str
    index: int
    layers: tuple[Layer, ...]

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)


@dataclass(frozen=True)
class Tower:
    """A stack of like blocks.

    Attributes:
        name: path of the ``ModuleList``.
        driver: path of the module whose forward calls the blocks ("" is the model itself).
        calls: how often that forward runs in one forward of the model.
    """

    name: str
    modality: str
    blocks: tuple[Block, ...]
    driver: str
    calls: int = 1

    @property
    def numel(self) -> int:
        return sum(block.numel for block in self.blocks)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for block in self.blocks for layer in block.layers)


@dataclass(frozen=True)
class Unprunable:
    """Weights inside blocks that stay dense, and why."""

    name: str
    reason: str
    numel: int


@dataclass(frozen=True)
class Anatomy:
    """A model as towers of blocks of layers.

    Attributes:
        towers: in the order in which a forward calls them; only those with prunable layers.
        replayable: paths of all repeated blocks, of excluded towers too, in order.
        traced: whether a forward was watched (else the order is that of definition).
    """

    towers: tuple[Tower, ...]
    unprunable: tuple[Unprunable, ...]
    replayable: tuple[str, ...]
    total_parameters: int
    traced: bool

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for tower in self.towers for block in tower.blocks)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def prunable_parameters(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> Layer:
        """The layer with this parameter name; KeyError if there is none."""
        return self._by_name[name]


def discover(
    model: nn.Module,
    batch: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
    run: Run = plain_forward,
) -> Anatomy:
    """Find the towers, blocks and prunable layers of ``model``.

    Args:
        model: any module.
        batch: one batch; with it a forward is watched, which gives the true order and leaves out what never runs.
        include: patterns (``*``, ``?``) of layers or towers to prune although they are left out by default (bridges
            such as the Q-Former).
        exclude: patterns of layers or towers to leave dense; wins over ``include``.
        towers: patterns of paths of module lists; only these become towers.
        run: how one batch is run (a loss function, say); by default ``model(**batch)``.

    Raises:
        AnatomyError: nothing to prune was found, or a pattern selects nothing.
    """
    lists = block_lists(model, None)
    traced: Trace | None = None
    if batch is not None:
        traced = trace(model, batch, {path for found in lists for path in found.elements}, run)
        lists = block_lists(model, traced)
    if towers is not None:
        lists = [found for found in lists if _matches(found.path, towers)]
        if not lists:
            raise AnatomyError(
                f"towers={list(towers)}: no list of blocks has such a path; 'ecoflap inspect' shows them"
            )
    reader = _Reader(model, traced, include, exclude)
    found_towers = [reader.tower(found) for found in lists]
    for pattern in (*include, *exclude):
        if pattern not in reader.used_patterns:
            raise AnatomyError(f"pattern '{pattern}' selects no layer or tower; 'ecoflap inspect' shows their names")
    anatomy = Anatomy(
        towers=tuple(tower for tower in found_towers if tower.numel),
        unprunable=tuple(reader.unprunable),
        replayable=tuple(path for found in lists for path in found.elements),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        traced=traced is not None,
    )
    if not anatomy.towers:
        reasons = sorted({entry.reason for entry in anatomy.unprunable})
        why = f" ({'; '.join(reasons)})" if reasons else ": no list of repeated blocks with linear layers"
        raise AnatomyError(f"nothing to prune in {type(model).__name__}{why}")
    return anatomy


def _matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that selects ``name``: equal, a parent path, or a glob."""
    for pattern in patterns:
        if name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern):
            return pattern
    return None


class _Reader:
    """Reads layers out of blocks, keeping track of shared weights and of what stays dense."""

    def __init__(self, model: nn.Module, traced: Trace | None, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.model, self.traced, self.include, self.exclude = model, traced, include, exclude
        self.unprunable: list[Unprunable] = []
        self.used_patterns: set[str] = set()
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.seen: set[int] = set()

    def tower(self, found: BlockList) -> Tower:
        modality = modality_of(found.path, getattr(self.model, "config", None))
        blocks = tuple(
            Block(path, found.path, index, tuple(self._layers(path, found.path, modality)))
            for index, path in enumerate(found.elements)
        )
        return Tower(found.path, modality, blocks, found.driver, found.calls)

    def _layers(self, block: str, tower: str, modality: str) -> Iterable[Layer]:
        prefix_done: list[str] = []
        for path, module in self.model.get_submodule(block).named_modules(prefix=block):
            if any(path.startswith(done + ".") for done in prefix_done):
                continue
            if isinstance(module, nn.MultiheadAttention):
                prefix_done.append(path)
                self._dense(path, "packed nn.MultiheadAttention", sum(p.numel() for p in module.parameters()))
                continue
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{name}"
                if id(parameter) in self.seen:
                    continue
                if not (is_linear and name == "weight" and parameter.dim() == 2):
                    if parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
                        self._dense(full, f"{parameter.dim()}-D weight of {type(module).__name__}", parameter.numel())
                    continue
                self.seen.add(id(parameter))
                reason = self._reason_to_skip(full, path, tower, modality, parameter)
                if reason:
                    self._dense(full, reason, parameter.numel())
                    continue
                transposed = not isinstance(module, nn.Linear)
                rows, columns = parameter.shape
                yield Layer(
                    name=full,
                    module=path,
                    block=block,
                    tower=tower,
                    modality=modality,
                    shape=(columns, rows) if transposed else (rows, columns),
                    transposed=transposed,
                    aliases=tuple(other for other in self.names[id(parameter)] if other != full),
                )

    def _reason_to_skip(self, name: str, module: str, tower: str, modality: str, weight: nn.Parameter) -> str | None:
        included = _matches(name, self.include) or _matches(tower, self.include)
        excluded = _matches(name, self.exclude) or _matches(tower, self.exclude)
        self.used_patterns.update(pattern for pattern in (included, excluded) if pattern)
        if excluded:
            return "excluded"
        if not weight.is_floating_point():
            return f"quantised ({str(weight.dtype).removeprefix('torch.')})"
        for other in self.names[id(weight)]:
            if isinstance(self.model.get_submodule(other.rpartition(".")[0]), nn.Embedding):
                return f"shared with the embedding {other}"
        if self.traced is not None and module not in self.traced.calls:
            return "not reached by the traced forward"
        if modality == "bridge" and not included:
            return "bridge between towers, dense by default (--include)"
        return None

    def _dense(self, name: str, reason: str, numel: int) -> None:
        self.unprunable.append(Unprunable(name, reason, numel))

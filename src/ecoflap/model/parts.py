"""Defines the parts of a network as data: towers of blocks of layers. Imports no torch, so that files are read fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


def parameter_of(name: str) -> str:
    """The name of the matrix's parameter: without the index of a slice (``…gate_up_proj[3]``)."""
    return name.rpartition("[")[0] if name.endswith("]") else name


@dataclass(frozen=True)
class Layer:
    """One prunable weight matrix: a parameter, or one expert's slice of a parameter that stacks them.

    Attributes:
        name: its parameter name in the state dict; for a slice with its index, ``…experts.gate_up_proj[3]``.
        module: path of the module that owns it.
        shape: (output, input) features, also for ``Conv1D``, whose stored weight is transposed.
        transposed: the stored weight is (input, output).
        aliases: other parameter names of the same tensor inside the blocks (shared weights).
        uncalled: its module is never called: the parent multiplies by the weight itself (EVA's and BEiT's qkv).
        expert: path of its expert, which receives only a part of the tokens; "" outside of mixtures. For a slice, the
            path of its mixture with the slice's index, ``…experts[3]``.
    """

    name: str
    module: str
    block: str
    tower: str
    modality: str
    shape: tuple[int, int]
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    expert: str = ""
    uncalled: bool = False

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """Name of its parameter."""
        return parameter_of(self.name)

    @property
    def stacked(self) -> bool:
        """Whether it is a slice of a parameter."""
        return self.name.endswith("]")

    @property
    def kind(self) -> str:
        """Its name inside its block; the same for all slices of a parameter."""
        whole = self.parameter if self.expert else self.name
        return whole.removeprefix(f"{self.block}.")

    @property
    def mixture(self) -> str:
        """Path of the list or module of experts that it belongs to; "" outside of mixtures."""
        return self.expert.rpartition("[" if self.stacked else ".")[0]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of all modules that own this matrix."""
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
    """A stack of equal blocks.

    Attributes:
        name: path of the ``ModuleList``.
        driver: path of the module whose forward calls the blocks ("" is the model itself).
        calls: how often that forward runs in one forward of the model.
        repeats: that forward calls a block more than once (ALBERT).
        decoder: it is the decoder of an encoder-decoder.
    """

    name: str
    modality: str
    blocks: tuple[Block, ...]
    driver: str
    calls: int = 1
    decoder: bool = False
    repeats: bool = False

    @property
    def numel(self) -> int:
        return sum(block.numel for block in self.blocks)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for block in self.blocks for layer in block.layers)


@dataclass(frozen=True)
class Unprunable:
    """Weights that stay dense, and the reason."""

    name: str
    reason: str
    numel: int


@dataclass(frozen=True)
class Anatomy:
    """A model as towers of blocks of layers.

    Attributes:
        towers: in the order in which a forward calls them; only those with prunable layers.
        unprunable: weights inside blocks, and in lists that are no towers, that stay dense.
        outside: matrices outside of all lists of blocks (embeddings, heads, projectors), and slices of experts that no
            block multiplies by. Each matrix of the model is in exactly one of ``layers``, ``unprunable`` and this.
        replayable: paths of all blocks in order, also of excluded towers.
        traced: whether a forward was traced (otherwise the order is that of definition).
    """

    towers: tuple[Tower, ...]
    unprunable: tuple[Unprunable, ...]
    replayable: tuple[str, ...]
    total_parameters: int
    traced: bool
    outside: tuple[Unprunable, ...] = ()

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

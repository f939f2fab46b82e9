"""Defines the probes of measures that project the loss gradient on noise, their order and their noise.

Noise is a function of (seed, layer, batch, draw), so that scores don't depend on the order, the workers or a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ecoflap.importance.base import Key, ProbeContext
from ecoflap.importance.scores import Estimate
from ecoflap.model.parts import Layer
from ecoflap.model.replay import Replay
from ecoflap.model.slices import stored_matrix
from ecoflap.model.swapping import layers_swapped
from ecoflap.support.ranges import check_count
from ecoflap.support.registry import unknown


def noise_key(seed: int, layer: str, batch: int, draw: int) -> int:
    """A 63-bit generator seed from the four values (BLAKE2b of their text)."""
    text = f"{seed}\x00{layer}\x00{batch}\x00{draw}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def noise(shape: torch.Size, device: torch.device, *, seed: int, layer: str, batch: int, draw: int) -> Tensor:
    """Standard normal fp32 noise of ``shape`` for one probe, from its own generator on ``device``.

    CPU and CUDA generators give different numbers for the same key.
    """
    generator = torch.Generator(device=device).manual_seed(noise_key(seed, layer, batch, draw))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


PROBES = ("matrix", "block")
PRECISIONS = ("fp32", "native")


@dataclass(frozen=True)
class Probe:
    """One direction in the space of weights: noise for each matrix of ``unit``, keyed by (seed, layer, batch, draw).

    Attributes:
        unit: the matrices that change together.
        batch: index of the calibration batch.
        draw: index of the noise direction.
    """

    context: ProbeContext
    unit: Sequence[Layer]
    batch: int
    draw: int

    @property
    def name(self) -> str:
        """Name of the matrix, or of the block, for messages."""
        return self.unit[0].name if len(self.unit) == 1 else self.unit[0].block

    def weights(self) -> list[Tensor]:
        """The unit's matrices in the dtype of the computation, detached; don't write to them."""
        stored = [stored_matrix(self.context.model, layer.name) for layer in self.unit]
        upcast = self.context.upcast
        return [w.float() if layer.block in upcast else w for layer, w in zip(self.unit, stored, strict=True)]

    def noises(self) -> list[Tensor]:
        """z ~ N(0, I) of each matrix, in its shape, device and dtype (drawn in fp32)."""
        context, found = self.context, []
        for layer in self.unit:
            weight = stored_matrix(context.model, layer.name)
            drawn = noise(
                weight.shape, weight.device, seed=context.seed, layer=layer.name, batch=self.batch, draw=self.draw
            )
            found.append(drawn if layer.block in context.upcast else drawn.to(weight.dtype))
        return found

    @contextmanager
    def using(self, tensors: Sequence[Tensor], replay: Replay) -> Iterator[None]:
        """Context in which the model uses ``tensors`` instead of the unit's matrices, and replays unchanged blocks."""
        forced = dict.fromkeys(block for layer in self.unit for block in self.context.blocks_of(layer))
        with replay.forcing(*forced), layers_swapped(self.context.model, zip(self.unit, tensors, strict=True)):
            yield


def check_probes(draws: int, probe: str, precision: str) -> None:
    """Raises InvalidOption or UnknownName for invalid options of :func:`projections`."""
    check_count("draws", draws)
    if probe not in PROBES:
        raise unknown("probe", probe, list(PROBES))
    if precision not in PRECISIONS:
        raise unknown("precision", precision, list(PRECISIONS))


def _units(context: ProbeContext, probe: str) -> list[Sequence[Layer]]:
    """The groups of layers that change together in one probe."""
    blocks = (block.layers for block in context.anatomy.blocks if block.layers)
    return list(blocks) if probe == "block" else [(layer,) for layer in context.layers]


def probes(context: ProbeContext, *, draws: int, probe: str) -> Iterator[tuple[Key, ...]]:
    """The keys of each probe's estimates, in the order of :func:`projections`."""
    for index in range(len(context.batches)):
        for unit in _units(context, probe):
            for draw in range(draws):
                yield tuple((layer.name, index, draw) for layer in unit)


def projections(
    context: ProbeContext, project: Callable[[Probe, Replay], float], *, draws: int, probe: str, replay: bool
) -> Iterator[Estimate]:
    """Projections of the gradient on noise, batch by batch and unit by unit, without those in ``context.done``.

    Args:
        project: gives ⟨z, ∇L⟩ for one probe, summed over the matrices of its unit.
        draws: number of noise directions for each (unit, batch).
        probe: ``matrix``: one matrix at a time; ``block``: all matrices of a block at once, each with its own noise.
            The value is then divided among them in proportion to their numbers of weights.
        replay: reuse the outputs of unchanged blocks.
    """
    units = _units(context, probe)
    with torch.no_grad(), Replay(context.model, context.blocks if replay else ()) as memory:
        for index in range(len(context.batches)):
            todo = [
                Probe(context, unit, index, draw)
                for unit in units
                for draw in range(draws)
                if any((layer.name, index, draw) not in context.done for layer in unit)
            ]
            if not todo:
                continue
            memory.reset()
            context.loss(index)  # records the blocks, and raises if the loss is not finite
            for one in todo:
                value = project(one, memory)
                total = sum(layer.numel for layer in one.unit)
                for layer in one.unit:
                    if (layer.name, index, one.draw) not in context.done:
                        yield Estimate(layer.name, index, one.draw, value * (layer.numel / total))

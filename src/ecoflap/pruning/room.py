"""Warns before stage 2 if the machine has less memory than the criterion needs for the widest layer."""

from __future__ import annotations

from collections.abc import Sequence

from ecoflap.model.parts import Layer

_ABOUT = {  # criteria to choose instead, and what they need
    "pair": (("sparsegpt", "gram"), ("wanda", "norm")),
    "gram": (("wanda", "norm"),),
}


def least_bytes(layer: Layer, statistics: str) -> int:
    """Least memory for the statistics of one layer's input, and for the copies while it is pruned (docs/memory.md).

    Without the inputs of the blocks, and without the statistics of the block's other layers.
    """
    rows, columns = layer.shape
    square = columns**2
    if statistics == "pair":
        return max(16 * square, 8 * square + max(16 * square, 8 * square + 29 * rows * columns))
    if statistics == "gram":
        return max(8 * square, 4 * square + max(13 * square, 4 * square + 12 * rows * columns))
    return 12 * rows * columns


def too_little(layers: Sequence[Layer], criterion: str, statistics: str, model: int, memory: int) -> str:
    """A warning if ``memory`` is less than the model and ``criterion`` need; else "".

    Args:
        model: bytes of the weights that are in memory.
        memory: total bytes of the machine.
    """
    if statistics not in _ABOUT or not layers:
        return ""
    widest = max(layers, key=lambda layer: least_bytes(layer, statistics))
    needed = model + least_bytes(widest, statistics)
    if needed <= memory:
        return ""
    smaller = ", ".join(
        f"{name} {_gigabytes(model + max(least_bytes(layer, needs) for layer in layers))}"
        for name, needs in _ABOUT[statistics]
    )
    return (
        f"memory: criterion {criterion} needs at least {_gigabytes(needed)} ({widest.name}, with the weights in "
        f"memory), and there are {_gigabytes(memory)}: choose another --criterion ({smaller})"
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"

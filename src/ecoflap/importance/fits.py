"""Checks that an allocation, or scores read from a file, belong to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecoflap.allocation.parts import Allocation, LayerAllocation
from ecoflap.allocation.patterns import check_fits, parse_pattern
from ecoflap.errors import InvalidOption

if TYPE_CHECKING:
    from ecoflap.importance.scores import Importance
    from ecoflap.model.parts import Anatomy


def check_same_layers(anatomy: Anatomy, given: Allocation | Importance) -> None:
    """Check that ``given`` has the layers and sizes of this model. Raises InvalidOption with the first difference."""
    kind = "allocation" if isinstance(given, Allocation) else "importance"
    sizes = {layer.name: layer.numel for layer in anatomy.layers}
    theirs = {row.name: row.weights if isinstance(row, LayerAllocation) else row.numel for row in given.layers}
    for name in (*sizes, *theirs):
        if sizes.get(name) != theirs.get(name):
            in_model = f"{sizes[name]} weights" if name in sizes else "no prunable layer of that name"
            in_file = f"{theirs[name]} weights" if name in theirs else "no entry"
            raise InvalidOption(
                f"the {kind} is of another model, or made with other include or exclude patterns: {name}: "
                f"{in_model} in the model, {in_file} in the {kind}"
            )


def check_allocation(anatomy: Anatomy, allocation: Allocation, pattern: str) -> None:
    """Raises InvalidOption if the allocation belongs to another model, or does not fit the pattern."""
    check_same_layers(anatomy, allocation)
    parsed = parse_pattern(pattern)
    for layer in anatomy.layers:
        try:
            check_fits(parsed, layer.shape, allocation[layer.name].zeros)
        except InvalidOption as error:
            raise InvalidOption(f"layer {layer.name}: {error}") from error

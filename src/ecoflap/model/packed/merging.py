"""Stacks experts that the files of a checkpoint hold one by one, with transformers' conversions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Merge:
    """One stack of experts that the files hold in pieces.

    Attributes:
        stack: name of the parameter in the model.
        pieces: names in the files, each with the pattern that transformers matches it with.
        converter: of transformers, which makes the stack from the pieces.
    """

    stack: str
    pieces: tuple[tuple[str, str], ...]
    converter: Any

    def read(self, tensor_of: Callable[[str], Tensor], model: Any) -> Tensor:
        """The stack; ``tensor_of`` reads a piece by its name."""
        converter = deepcopy(self.converter)
        for name, pattern in self.pieces:
            converter.add_tensor(self.stack, name, pattern, tensor_of(name))
        found = converter.convert(self.stack, model=model, config=model.config)[self.stack]
        whole: Tensor = found[0] if isinstance(found, list) else found
        return whole


def merges(model: nn.Module, stacks: Collection[str], names: Iterable[str]) -> list[Merge]:
    """The conversions from tensors in the files to those of the ``stacks`` that the files hold in pieces.

    Args:
        model: may be on the meta device.
        names: of all tensors in the files.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # another version of transformers
        return []
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    empty = {name: torch.empty(0, device="meta") for name in stacks}
    pieces: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, getattr(model, "base_model_prefix", ""), empty)
        if pattern is not None and target in empty:
            pieces.setdefault(target, []).append((name, pattern))
    return [Merge(stack, tuple(found), of_pattern[found[0][1]]) for stack, found in pieces.items()]

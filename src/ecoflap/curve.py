"""What pruning a part of a model costs, as a curve over sparsity: measured by stage 1, solved for by the allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ecoflap.errors import InvalidOption


@dataclass(frozen=True)
class Curve:
    """What pruning one group costs: predicted loss over sparsity, both from 0 at sparsity 0.

    Attributes:
        levels: sparsities, ascending, above 0 and at most 1.
        losses: the loss added at each level, in any unit that is the same for all groups.

    Raises:
        InvalidOption: the levels or losses are not as said.
    """

    levels: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.losses):
            raise InvalidOption(f"a curve of {len(self.levels)} levels and {len(self.losses)} losses: give one a level")
        if not all(math.isfinite(loss) for loss in self.losses):
            raise InvalidOption(f"a curve's losses must be finite numbers, not {list(self.losses)}")
        if not (self.levels[0] > 0 and self.levels[-1] <= 1 and all(a < b for a, b in pairwise(self.levels))):
            raise InvalidOption(f"a curve's levels must rise, above 0 and up to 1 at most, not {list(self.levels)}")

    def to_json(self) -> dict[str, Any]:
        return {"levels": list(self.levels), "losses": list(self.losses)}

    @classmethod
    def from_json(cls, data: Any) -> Curve:
        """Read what :meth:`to_json` wrote. Raises InvalidOption."""
        try:
            levels, losses = (tuple(float(value) for value in data[key]) for key in ("levels", "losses"))
        except (TypeError, KeyError, ValueError) as error:
            raise InvalidOption(f"a curve needs lists of numbers 'levels' and 'losses', not {data!r}") from error
        return cls(levels, losses)

    def monotone(self) -> Curve:
        """The nearest curve (least squares) that never falls and is nowhere below 0: noise can make it dip."""
        blocks: list[tuple[float, int]] = []  # means and lengths, pooled where they would fall
        for loss in self.losses:
            mean, length = loss, 1
            while blocks and blocks[-1][0] >= mean:
                before, others = blocks.pop()
                mean, length = (mean * length + before * others) / (length + others), length + others
            blocks.append((mean, length))
        losses = tuple(max(0.0, mean) for mean, length in blocks for _ in range(length))
        return Curve(self.levels, losses)

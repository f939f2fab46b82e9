"""Defines the choices of tokens, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ecoflap.errors import InvalidOption
from ecoflap.support.registry import unknown

EXPERT_TOKENS = 128  # default of the least number of tokens of an expert
# Choices of visual tokens, with the default of their amount.
AMOUNTS: Mapping[str, float | None] = {
    "all": None, "text": None, "balanced": 1.0, "weighted": 0.2, "text+top": 0.2, "text+attended": 0.2, "atv": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class TokenChoice:
    """How the tokens of a shared tower are chosen, block by block.

    Attributes:
        name: "all"; "text": no visual token; "weighted": all, but the square of a visual token enters the sums with a
            weight; "balanced": the same with the weight min(1, β · text tokens / visual tokens) of each sample, so that
            its visual tokens together count at most as much as its text (β = 1); "text+top": text and, for each sample,
            the visual tokens whose vectors are longest at the input of the block; "text+attended": text and, for each
            sample, the visual tokens that the text attends to most in the block (mean over heads and queries; after
            FastV, Chen et al. 2024, arXiv 2403.06764); "atv": text and the visual tokens whose direction the block
            changes most; their number is proportional to the mean change (ATV-Pruning, Li et al. 2026, arXiv
            2603.16001).
        amount: for "weighted" the weight of visual tokens; for "balanced" its factor β; for "text+top" and
            "text+attended" the share of a sample's visual tokens; for "atv" its factor α. None: 0.2, and 1 for α and β.
        experts: least number m of tokens of an expert. If its router sends n < m, the missing m − n are average tokens
            of all that enter the mixture: XᵀX + (m − n) · X₀ᵀX₀ / n₀.
        required: whether to raise an error if no tower sees visual tokens; False for a criterion's default choice.

    Raises:
        UnknownName, InvalidOption: in the constructor, for an unknown name or an amount out of range.
    """

    name: str = "all"
    amount: float | None = None
    experts: int = EXPERT_TOKENS
    required: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        if self.experts < 0:
            raise InvalidOption(f"expert_tokens must be 0 or more, not {self.experts}")
        if self.name not in AMOUNTS:
            raise unknown("choice of tokens", self.name, list(AMOUNTS))
        if self.amount is not None and AMOUNTS[self.name] is None:
            raise InvalidOption(f"top_tokens {self.amount:g} says how many visual tokens count: tokens '{self.name}' "
                                "has none to count, take another choice")  # fmt: skip
        most = float("inf") if self.name in ("atv", "balanced") else 1.0
        if self.amount is not None and not 0 <= self.amount <= most:
            raise InvalidOption(f"top_tokens {self.amount:g} of tokens '{self.name}' must be 0 to {most:g}")

    @property
    def used(self) -> float:
        """The amount, or its default."""
        return float(self.amount if self.amount is not None else AMOUNTS[self.name] or 0.0)


ALL = TokenChoice()

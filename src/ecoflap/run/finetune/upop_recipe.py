"""The recipe of UPop: that of a fine-tuning, with the search that comes before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from ecoflap.errors import InvalidOption
from ecoflap.run.finetune.recipe import EMBEDDED, MOST_EPOCHS, NOT_HERE, RATES, Finetune, run_of

if TYPE_CHECKING:  # a recipe is read without torch
    from torch import nn

    from ecoflap.data.objectives import Objective
    from ecoflap.model.channels import ChannelGroup
    from ecoflap.model.parts import Anatomy
    from ecoflap.run.finetune.channels import Channels
    from ecoflap.run.finetune.data import TrainingData

UPDATES = 50  # of the masks in a search, where the recipe does not set how often
HIDDEN = frozenset({"tune", "rank", "dense"})  # fields of a fine-tuning that have one value here


# Options that a method of a comparison may set.
OF_METHOD = (
    "train_samples", "held_out", "epochs", "search_epochs", "update_every", "learning_rate", "weight_decay", "warmup",
    "accumulate", "evaluate_every", "patience", "distill", "distill_hidden", "temperature",
)  # fmt: skip


class UPop(Finetune):
    """All that decides the result of ``ecoflap upop``."""

    title: ClassVar[str] = "upop"
    left_out: ClassVar[frozenset[str]] = NOT_HERE - {"sparsity"}

    model: str | None = Field(None, description="Dense model: hub id or folder. Default: the embedded model.")
    sparsity: float = Field(0.5, gt=0.0, lt=1.0, description="Fraction of the prunable weights to remove.")
    search_epochs: float | None = Field(
        None, gt=0.0, le=MOST_EPOCHS, description="Passes over the training data in the search. Default: as --epochs."
    )
    update_every: int | None = Field(
        None, ge=1, description=f"Steps between two rankings of the channels. Default: {UPDATES} rankings in total."
    )

    @model_validator(mode="after")
    def _of_upop(self) -> UPop:
        if self.tune != "full":
            raise InvalidOption(f"tune {self.tune}: UPop trains all weights: leave it out")
        return self

    def resolved(self) -> UPop:
        """The same recipe with unset fields filled in from other fields.

        Raises:
            InvalidOption: there is no training data, or the model is a run of ecoflap.
        """
        if self.train is None:
            raise InvalidOption("upop needs training data: give --train FILE")
        if self.model is not None and run_of(self.model) is not None:
            raise InvalidOption(f"{self.model} is a run, whose model is pruned already: give the dense model")
        changes = {
            "learning_rate": self.learning_rate or RATES["full"],
            "search_epochs": self.search_epochs or self.epochs,
            "dense": self.model or EMBEDDED,
        }
        if self.model is None and not (self.task or self.evaluations):
            changes["task"] = ("vqa",)
        return UPop.parse({**self.given(), **changes})

    @property
    def source(self) -> str | None:
        """Where the dense weights are; None: in the package."""
        return self.model

    def check_model(self, model: nn.Module) -> None:
        """Any dense model can be trained."""

    def channel_groups(
        self, model: nn.Module, anatomy: Anatomy, data: TrainingData, objective: Objective
    ) -> tuple[ChannelGroup, ...]:
        """The channels that can leave, found on the first samples."""
        from ecoflap.run.finetune.upop import find_groups  # imports torch

        return find_groups(model, anatomy, data, objective, self.sparsity)

    def channels(self, groups: tuple[ChannelGroup, ...], journal: Path) -> Channels:
        """UPop's search among ``groups``."""
        from ecoflap.run.finetune.channels import Channels  # imports torch

        return Channels(self, groups, journal)

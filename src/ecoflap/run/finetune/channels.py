"""The stages of UPop around the fine-tuning: the search before it, and the smaller model after it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ecoflap.data.objectives import Objective
from ecoflap.model.channels import ChannelGroup
from ecoflap.model.parts import Anatomy
from ecoflap.pruning.keep_zeros import ZeroKeeper
from ecoflap.pruning.upop import Kept, zero_channels
from ecoflap.run.finetune.data import TrainingData
from ecoflap.run.finetune.distillation import Distillation
from ecoflap.run.finetune.upop import channels_record, narrowed, search
from ecoflap.run.finetune.upop_recipe import UPop
from ecoflap.run.names import SEARCH
from ecoflap.support.files import read_sealed, write_sealed, write_tensors
from ecoflap.support.progress import Progress

WEIGHTS, FOUND = "searched.safetensors", "search.json"  # in the journal
_log = logging.getLogger("ecoflap")


@dataclass
class Channels:
    """The channels of one UPop.

    Attributes:
        recipe: says how to search.
        groups: the channels that can be removed.
        journal: the folder of the run's journal.
        kept: which units of each group stay; None before the search has ended.
        losses: of the search.
    """

    recipe: UPop
    groups: tuple[ChannelGroup, ...]
    journal: Path
    kept: Kept | None = None
    losses: Sequence[tuple[int, float]] = ()

    @property
    def searched(self) -> bool:
        """Whether the search has ended, also in an interrupted run."""
        return read_sealed(self.journal / FOUND) is not None and (self.journal / WEIGHTS).is_file()

    def search(
        self, model: nn.Module, anatomy: Anatomy, data: TrainingData, objective: Objective,
        distillation: Distillation | None, progress: Progress,
    ) -> None:  # fmt: skip
        """Train with masks, rank the channels and store the result in the journal."""
        folder = self.journal / SEARCH
        found = search(model, anatomy, self.groups, data, self.recipe, objective, distillation, str(folder), progress)
        zero_channels(model, self.groups, found.kept)
        write_tensors(self.journal / WEIGHTS, dict(model.named_parameters()))
        kept = {name: stays.tolist() for name, stays in found.kept.items()}
        write_sealed(self.journal / FOUND, {"kept": kept, "losses": found.losses})
        shutil.rmtree(folder, ignore_errors=True)

    def restore(self, model: nn.Module) -> None:
        """Load the weights at the end of the search into the model."""
        known = read_sealed(self.journal / FOUND)
        assert known is not None
        self.kept = {name: torch.tensor(stays) for name, stays in known["kept"].items()}
        self.losses = [(int(step), float(loss)) for step, loss in known["losses"]]
        with torch.no_grad():
            for name, tensor in load_file(self.journal / WEIGHTS).items():
                model.get_parameter(name).copy_(tensor)

    def keeper(self, model: nn.Module) -> ZeroKeeper:
        """The object that keeps removed channels at zero."""
        assert self.kept is not None
        return zero_channels(model, self.groups, self.kept)

    def smaller(
        self, model: nn.Module, anatomy: Anatomy, data: TrainingData, objective: Objective
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model to save, and its channels for ``metrics.json``."""
        assert self.kept is not None
        found = narrowed(model, anatomy, self.groups, self.kept, data, objective)
        saved = model if found is None else found.model
        before, after = (sum(p.numel() for p in one.parameters()) for one in (model, saved))
        record = channels_record(self.groups, self.kept, found, before, after)
        for entry, (old, new) in record["config"].items():
            _log.info("channels: %s is %d, was %d", entry, new, old)
        return saved, {**record, "search": [list(pair) for pair in self.losses]}

"""A pico model as analyses see a run: model, batches, anatomy, objective."""

from __future__ import annotations

import picos

from ecoflap.api import inspect
from ecoflap.data.objectives import default_objective, on_device
from ecoflap.model.parts import Anatomy
from ecoflap.support.progress import Silent


class Given:
    """What an analysis asks of a run."""

    def __init__(self, name: str, padding: bool = False) -> None:
        family = picos.FAMILIES[name]
        self.model = family.build()
        self.batches = family.batches(n=6, batch_size=2, padding=padding)
        self.anatomy: Anatomy = inspect(self.model, self.batches[0])
        self.objective = on_device(default_objective(self.model))
        self.progress, self.measured_on = Silent(), 6
        self.checkpoint = self

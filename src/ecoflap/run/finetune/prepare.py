"""Loads and checks all inputs of a fine-tuning before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ecoflap.data.objectives import Objective, objective_name, resolve
from ecoflap.errors import InvalidOption
from ecoflap.model.channels import ChannelGroup
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.model.compute import settled
from ecoflap.model.files import is_open_clip, locate
from ecoflap.model.parts import Anatomy
from ecoflap.run.evaluations import evaluations_of, rehearse
from ecoflap.run.finetune.checks import check_finetune
from ecoflap.run.finetune.data import TrainingData, described, digests, training_data
from ecoflap.run.finetune.lora import check_peft
from ecoflap.run.finetune.options import check_training_options
from ecoflap.run.finetune.recipe import EMBEDDED, Finetune
from ecoflap.run.loading import load_checkpoint
from ecoflap.run.prepare import find_layers
from ecoflap.run.provenance import source_digest


@dataclass(frozen=True)
class Plan:
    """The inputs of the stages."""

    recipe: Finetune
    checkpoint: Checkpoint
    anatomy: Anatomy
    data: TrainingData
    objective: Objective
    objective_name: str
    groups: tuple[ChannelGroup, ...] | None = None  # of UPop

    def choices(self) -> Iterator[str]:
        guessed = self.data.samples.columns and not self.recipe.columns
        yield described(self.data) + (" (columns guessed; --columns sets them)" if guessed else "")
        chosen = "" if self.recipe.objective else " (by the model's class; --objective sets it)"
        yield f"objective: {self.objective_name}{chosen}"

    def inputs(self) -> dict[str, str]:
        tests = {f"test data of {entry.name}": entry.test for entry in evaluations_of(self.recipe)}
        known = {what: digest for what, source in tests.items() if source and (digest := source_digest(source))}
        return {**digests(self.recipe, self.data), **known, "device": self.checkpoint.model.device.type}


def prepare_finetune(recipe: Finetune) -> Plan:
    """Load and check all inputs of a resolved recipe, so that none can stop the run half-way.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    if recipe.tune == "lora":
        check_peft()
    if (recipe.distill or recipe.distill_hidden) and recipe.dense is None:
        raise InvalidOption("distilling needs the dense model: give --dense MODEL")
    check_training_options(recipe)
    check_finetune(recipe)
    if recipe.dense_is_asked and recipe.dense not in (None, EMBEDDED) and not is_open_clip(recipe.dense):
        locate(str(recipe.dense), trust_remote_code=recipe.trust_remote_code)  # from the Hub, too
    checkpoint = load_checkpoint(weights_of(recipe), recipe.title)
    recipe.check_model(checkpoint.model)
    recipe = recipe.model_copy(update={"compute_dtype": settled(recipe.compute_dtype, checkpoint.model)})
    name = objective_name(recipe.objective, checkpoint.model)
    objective = resolve(name, checkpoint.model)
    data = training_data(recipe, checkpoint)
    anatomy = find_layers(recipe, checkpoint.model, [data.first(recipe.batch_size)], objective)
    groups = recipe.channel_groups(checkpoint.model, anatomy, data, objective)
    rehearse(checkpoint, recipe)
    return Plan(recipe, checkpoint, anatomy, data, objective, name, groups)


def weights_of(recipe: Finetune) -> Finetune:
    """The recipe with the folder of the weights as its model, in the checkpoint's dtype."""
    return recipe.model_copy(update={"model": recipe.source, "dtype": "auto"})

"""Translates a recipe into transformers' ``TrainingArguments``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ecoflap.errors import InvalidOption
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.support.text import first_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ecoflap.run.finetune.data import TrainingData

EVALUATIONS = 10  # on the held-out data in a training, unless the recipe sets the interval
# Arguments that the recipe's own fields set.
_OWN = {
    "learning_rate": "--learning-rate", "weight_decay": "--weight-decay", "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size", "per_device_eval_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate", "warmup_steps": "--warmup", "seed": "--seed",
    "eval_steps": "--evaluate-every", "save_steps": "--evaluate-every", "use_cpu": "--device",
}  # fmt: skip
_FIXED = (
    "dataloader_drop_last",
    "output_dir", "eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "remove_unused_columns", "dataloader_num_workers", "report_to", "disable_tqdm",
    "prediction_loss_only", "eval_on_start", "save_total_limit", "save_only_model", "push_to_hub", "deepspeed", "fsdp",
    "fsdp_config", "data_seed", "full_determinism", "label_names", "max_steps", "logging_strategy", "logging_steps",
)  # fmt: skip


def check_training_options(recipe: Finetune) -> None:
    """Checks ``training_options`` before a model is loaded.

    Raises:
        InvalidOption: transformers has no such argument, or the recipe has a field for it.
    """
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments) if field.init}
    for name in recipe.training_options:
        if name in _OWN:
            raise InvalidOption(f"training_options {name}: that is {_OWN[name]} here")
        if name in _FIXED:
            raise InvalidOption(f"training_options {name}: {recipe.title} sets it itself")
        if name not in known:
            near = get_close_matches(name, known - {*_OWN, *_FIXED}, n=1, cutoff=0.5)
            hint = f": did you mean '{near[0]}'?" if near else ""
            raise InvalidOption(f"training_options: transformers' TrainingArguments have no '{name}'{hint}")
    _built(recipe, "checkpoints", {"use_cpu": True})


@contextmanager
def blaming_options(recipe: Finetune) -> Iterator[None]:
    """Context that turns the trainer's errors into InvalidOption if ``training_options`` are given: it checks their
    values only when it uses them."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        if not recipe.training_options:
            raise
        raise InvalidOption(
            f"training fails with training_options {', '.join(recipe.training_options)} ({first_line(error)}): "
            "change them, or leave them out"
        ) from error


def total_steps(recipe: Finetune, samples: int, paired: bool) -> int:
    """Steps of the optimiser in the whole training."""
    batches = samples // recipe.batch_size if paired else math.ceil(samples / recipe.batch_size)
    return max(1, math.ceil(recipe.epochs * max(1, math.ceil(max(1, batches) / recipe.accumulate))))


def training_arguments(
    recipe: Finetune, folder: str, steps: int, data: TrainingData, *, on_cpu: bool, resumed: bool
) -> TrainingArguments:
    """The trainer's arguments.

    Args:
        folder: for its checkpoints.
        steps: of the whole training.
        resumed: training continues from a checkpoint, so that the evaluation before the first step is done already.
    """
    every = recipe.evaluate_every or max(1, steps // EVALUATIONS)
    return _built(recipe, folder, {
        **_batches(recipe, data),
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": min(every, steps),
        "save_steps": min(every, steps),
        "logging_steps": max(1, min(every, steps) // 5),
        "eval_on_start": not resumed,
        "use_cpu": on_cpu,
    })  # fmt: skip


def search_arguments(
    recipe: Finetune, folder: str, steps: int, data: TrainingData, *, on_cpu: bool
) -> TrainingArguments:
    """The trainer's arguments for a search: constant rate after the warm-up, no evaluation."""
    return _built(recipe, folder, {
        **_batches(recipe, data),
        "lr_scheduler_type": "constant_with_warmup",
        "save_strategy": "steps",
        "save_steps": min(recipe.evaluate_every or max(1, steps // EVALUATIONS), steps),
        "logging_steps": max(1, steps // (5 * EVALUATIONS)),
        "use_cpu": on_cpu,
    })  # fmt: skip


def _batches(recipe: Finetune, data: TrainingData) -> dict[str, object]:
    def rows(samples: Sized) -> int:  # torch makes a list of this length for a batch, even with fewer samples
        return max(1, min(recipe.batch_size, len(samples)))

    return {
        "per_device_train_batch_size": rows(data.train),
        "per_device_eval_batch_size": rows(data.held_out),
        "dataloader_drop_last": data.paired,  # a batch of one sample has no contrast
    }


def _built(recipe: Finetune, folder: str, more: dict[str, object]) -> TrainingArguments:
    from transformers import TrainingArguments

    asked = {
        "output_dir": folder,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "warmup_steps": recipe.warmup,  # below 1: a share
        "num_train_epochs": recipe.epochs,
        "gradient_accumulation_steps": recipe.accumulate,
        "seed": recipe.seed,
        "save_total_limit": 1,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "report_to": [],
        "disable_tqdm": True,  # the command's own progress shows the steps
        **more,
    }
    if more.keys() >= {"eval_steps"}:
        asked |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    try:
        arguments = TrainingArguments(**{**asked, **recipe.training_options})
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidOption(f"transformers refuses these training options: {first_line(error)}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # the model's own GPU; DataParallel would copy it to all of them
    return arguments

"""Training and held-out samples: drawn as for calibration, and made into batches when they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ecoflap.data.batches import make_batches, make_collator
from ecoflap.data.class_names import class_names, class_templates
from ecoflap.data.collate import PAIRED, collating_objective, unpacked
from ecoflap.data.model_facts import Batch
from ecoflap.data.samples import SampleSet, load_samples
from ecoflap.errors import CalibrationError
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.run.provenance import source_digest

Row = tuple[int, Any]  # a number that seeds the cuts of captions, and the sample (or the window's tensors)


class Rows(Dataset[Row]):
    """Samples with their numbers; pictures stay as they were read until a batch is made of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, and what is held out.

    Attributes:
        collate: makes a batch, on the CPU, of rows of either.
        samples: what was drawn for training, for the record.
        paired: the loss contrasts the samples of a batch, so a batch of one sample has no meaning.
    """

    train: Rows
    held_out: Rows
    collate: Callable[[Sequence[Row]], Batch]
    samples: SampleSet
    paired: bool

    def first(self, count: int) -> Batch:
        """The first training samples as a batch."""
        return self.collate([self.train[index] for index in range(min(count, len(self.train)))])


def training_data(recipe: Finetune, checkpoint: Checkpoint) -> TrainingData:
    """The data of a resolved recipe, split by its seed where no held-out data is named.

    Raises:
        CalibrationError: as :func:`~ecoflap.data.samples.load_samples` and
            :func:`~ecoflap.data.batches.make_batches`; or there are too few samples to hold some out.
    """
    drawn = _drawn(recipe, recipe.train, recipe.train_samples)
    rows, collate = _rows(recipe, drawn, checkpoint)
    if recipe.validation is not None:
        train, held_out = rows, _rows(recipe, _drawn(recipe, recipe.validation, None), checkpoint)[0]
    else:
        count = max(1, round(recipe.held_out * len(rows)))
        if count >= len(rows):
            raise CalibrationError(f"{recipe.train} has {len(rows)} samples: too few to hold some out of training")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        train, held_out = [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]
    paired = collating_objective(recipe.objective, checkpoint.model) in PAIRED
    if paired and min(len(train), len(held_out), recipe.batch_size) < 2:
        raise CalibrationError("a contrastive loss needs at least 2 samples in a batch, and to be held out")
    return TrainingData(Rows(train), Rows(held_out), collate, drawn, paired)


def _drawn(recipe: Finetune, source: str | None, samples: int | None) -> SampleSet:
    return load_samples(
        source,
        samples=samples,
        seed=recipe.seed,
        columns=recipe.columns,
        prompt_template=recipe.prompt,
        image_folder=recipe.image_folder,
    )


def _rows(
    recipe: Finetune, drawn: SampleSet, checkpoint: Checkpoint
) -> tuple[list[Row], Callable[[Sequence[Row]], Batch]]:
    model, processor = checkpoint.model, checkpoint.processor
    named = {"classes": class_names(recipe.classes), "class_prompts": class_templates(recipe.class_prompts)}
    if processor is not None:
        drawn = unpacked(drawn, collating_objective(recipe.objective, model), processor)
    if drawn.windows is not None:
        windows = make_batches(
            drawn, model, processor, batch_size=1, sequence_length=recipe.sequence_length, seed=recipe.seed,
            objective=recipe.objective, window_start=recipe.window_start, **named,
        )  # fmt: skip
        return list(enumerate(windows)), _stack
    collate = make_collator(
        drawn, model, processor, sequence_length=recipe.sequence_length, seed=recipe.seed,
        objective=recipe.objective, **named,
    )  # fmt: skip
    return list(enumerate(drawn.samples)), lambda rows: _made(collate, rows, model)


def _stack(rows: Sequence[Row]) -> Batch:
    return {name: torch.cat([window[name] for _, window in rows]) for name in rows[0][1]}


def _made(collate: Any, rows: Sequence[Row], model: nn.Module) -> Batch:
    training = model.training
    model.eval()  # some objectives ask the model itself for hard partners
    try:
        with torch.no_grad():
            found: Batch = collate([sample for _, sample in rows], rows[0][0])
        return found
    finally:
        model.train(training)


def digests(recipe: Finetune, data: TrainingData) -> dict[str, str]:
    """What decides the training beside recipe and model: what is in the files, and which rows were drawn."""
    named = {"training data": recipe.train, "held-out data": recipe.validation}
    found = {what: digest for what, source in named.items() if source and (digest := source_digest(source))}
    rows = hashlib.sha256(repr((data.samples.indices, len(data.train), len(data.held_out))).encode())
    return {**found, "choice of samples": rows.hexdigest()}


def described(data: TrainingData) -> str:
    """One line for people: how much of what is trained on."""
    whole = replace(data.samples, windows=None) if data.samples.windows is not None else data.samples
    columns = ", ".join(f"{role}={column}" for role, column in whole.columns.items())
    source = f"{whole.source} ({columns})" if columns else whole.source
    return f"training: {len(data.train)} samples of {source}; {len(data.held_out)} held out"

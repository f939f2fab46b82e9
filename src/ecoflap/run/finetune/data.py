"""Draws training and held-out samples as for calibration, and makes batches of them when they are needed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ecoflap.data.batches import make_batches, make_collator
from ecoflap.data.class_names import class_names, class_templates
from ecoflap.data.collate import PAIRED, collating_objective, unpacked
from ecoflap.data.images import BrokenSample
from ecoflap.data.model_facts import Batch, is_encoder_decoder
from ecoflap.data.sample import Sample
from ecoflap.data.samples import SampleSet, load_samples
from ecoflap.data.undecoded import UndecodedRows
from ecoflap.errors import CalibrationError
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.run.finetune.recipe import MOST, SHARE, Finetune
from ecoflap.run.provenance import source_digest

PROBED = 64  # samples that are decoded before training, to find faults of the data
# Losses whose batches depend on the classes of all samples.
_OF_ALL_CLASSES = ("zero-shot", "supervised-contrastive", "classification")
Row = tuple[int, Any]  # a seed for the cuts of captions, and the row as stored (or the window's tensors)
Collate = Callable[[Sequence[Row]], Batch]


class Rows(Dataset[Row]):
    """Rows with their numbers; images are decoded only when a batch is made."""

    def __init__(self, rows: Sequence[Row], collate: Collate) -> None:
        self._rows, self._collate = rows, collate

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Row, Collate]:  # type: ignore[override]
        return self._rows[index], self._collate


def collate(rows: Sequence[tuple[Row, Collate]]) -> Batch:
    """A batch on the CPU, from items of one data set."""
    return rows[0][1]([row for row, _ in rows])


@dataclass(frozen=True)
class TrainingData:
    """Training and held-out data.

    Attributes:
        samples: the drawn samples, for the record; only the first ones have images.
        paired: the loss contrasts the samples of a batch, so that a batch of one sample is useless.
        tokens: per window of plain text; None for other samples.
    """

    train: Rows
    held_out: Rows
    samples: SampleSet
    paired: bool
    tokens: int | None = None

    def first(self, count: int) -> Batch:
        """The first training samples as a batch."""
        return collate([self.train[index] for index in range(min(count, len(self.train)))])


def training_data(recipe: Finetune, checkpoint: Checkpoint) -> TrainingData:
    """The data of a resolved recipe, split by its seed if no held-out data is named.

    Raises:
        CalibrationError: as :func:`~ecoflap.data.samples.load_samples` and
            :func:`~ecoflap.data.batches.make_batches`; or there are too few samples to hold some out.
    """
    drawn, rows, make = _drawn(recipe, recipe.train, recipe.train_samples, checkpoint)
    if recipe.validation is not None:
        _, other, make_other = _drawn(recipe, recipe.validation, None, checkpoint)
        train, held_out = Rows(rows, make), Rows(other, make_other)
    else:
        share = min(SHARE, MOST / max(len(rows), 1)) if recipe.held_out is None else recipe.held_out
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise CalibrationError(f"{recipe.train} has {len(rows)} samples: too few to hold some out of training")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        train = Rows([rows[i] for i in sorted(order[count:])], make)
        held_out = Rows([rows[i] for i in sorted(order[:count])], make)
    paired = collating_objective(recipe.objective, checkpoint.model) in PAIRED
    if paired and min(len(train), len(held_out), recipe.batch_size) < 2:
        raise CalibrationError("a contrastive loss needs at least 2 samples in a batch, and to be held out")
    return TrainingData(train, held_out, drawn, paired, _window(train, drawn, checkpoint.model))


def _window(train: Rows, drawn: SampleSet, model: nn.Module) -> int | None:
    if drawn.windows is None:
        return None
    batch = collate([train[0]])
    return int(batch["input_ids"].shape[1] + (batch["labels"].shape[1] if is_encoder_decoder(model) else 0))


def _drawn(
    recipe: Finetune, source: str | None, samples: int | None, checkpoint: Checkpoint
) -> tuple[SampleSet, list[Row], Collate]:
    """Samples for the record, the rows, and the function that makes a batch of rows."""
    asked: dict[str, Any] = {
        "samples": samples,
        "seed": recipe.seed,
        "columns": recipe.columns,
        "prompt_template": recipe.prompt,
        "image_folder": recipe.image_folder,
    }
    model, processor = checkpoint.model, checkpoint.processor
    objective = collating_objective(recipe.objective, model)
    named = {"classes": class_names(recipe.classes), "class_prompts": class_templates(recipe.class_prompts)}
    options: dict[str, Any] = {
        "sequence_length": recipe.sequence_length, "seed": recipe.seed, "objective": recipe.objective, **named,
    }  # fmt: skip
    reader = UndecodedRows(source, **asked)
    if not reader.is_text:
        rows = list(reader.rows())
        known = reader.first(rows, PROBED)
        if objective in _OF_ALL_CLASSES:
            known += _without_pictures(reader, rows[PROBED:])
        indices = tuple(index for index, _ in rows)
        drawn = SampleSet(
            tuple(known), indices, reader.skipped, reader.source, dict(reader.columns), classes=reader.classes
        )
        make = make_collator(drawn, model, processor, **options)
        return (
            drawn,
            [(number, row) for number, (_, row) in enumerate(rows)],
            lambda part: _made(make, reader, part, model),
        )
    drawn = load_samples(source, **asked)
    if processor is not None:
        drawn = unpacked(drawn, objective, processor)
    if drawn.windows is None:  # a classifier of texts
        make = make_collator(drawn, model, processor, **options)
        return drawn, list(enumerate(drawn.samples)), lambda part: make([s for _, s in part], part[0][0])
    reasons: list[str] = []
    batches = make_batches(
        drawn, model, processor, batch_size=recipe.batch_size, window_start=recipe.window_start, told=reasons.append,
        trained=True, **options,
    )  # fmt: skip
    windows = [{name: row[None] for name, row in zip(batch, rows, strict=True)}
               for batch in batches for rows in zip(*batch.values(), strict=True)]  # fmt: skip
    return replace(drawn, length_reason="".join(reasons)), list(enumerate(windows)), _stack


def _without_pictures(reader: UndecodedRows, rows: Sequence[tuple[int, Any]]) -> Iterator[Sample]:
    for _, row in rows:
        with suppress(BrokenSample):  # counted when its batch is made
            yield reader.decoded(row, pictures=False)


def _stack(rows: Sequence[Row]) -> Batch:
    return {name: torch.cat([window[name] for _, window in rows]) for name in rows[0][1]}


def _made(make: Any, reader: UndecodedRows, rows: Sequence[Row], model: nn.Module) -> Batch:
    """A batch of the valid rows; others are left out with a warning."""
    samples = []
    for number, row in rows:
        try:
            samples.append(reader.decoded(row))
        except BrokenSample as error:
            warnings.warn(f"{reader.source}: sample {number} is left out: {error}", stacklevel=2)
    if not samples:
        raise CalibrationError(f"{reader.source}: no sample of a batch can be used: repair the data")
    training = model.training
    model.eval()  # some objectives mine hard negatives with the model
    try:
        with torch.no_grad():
            found: Batch = make(samples, rows[0][0])
        return found
    finally:
        model.train(training)


def digests(recipe: Finetune, data: TrainingData) -> dict[str, str]:
    """Digests of the data files and of the choice of rows."""
    named = {"training data": recipe.train, "held-out data": recipe.validation}
    found = {what: digest for what, source in named.items() if source and (digest := source_digest(source))}
    rows = hashlib.sha256(repr((data.samples.indices, len(data.train), len(data.held_out))).encode())
    return {**found, "choice of samples": rows.hexdigest()}


def described(data: TrainingData) -> str:
    """One line for the user: the number of samples and their source."""
    whole = replace(data.samples, windows=None) if data.samples.windows is not None else data.samples
    columns = ", ".join(f"{role}={column}" for role, column in whole.columns.items())
    source = f"{whole.source} ({columns})" if columns else whole.source
    told = f"training: {len(data.train)} samples of {source}; {len(data.held_out)} held out"
    if data.tokens is None:
        return told
    why = f" ({data.samples.length_reason}; --sequence-length sets it)" if data.samples.length_reason else ""
    return f"{told}, {data.tokens} tokens each{why}"

"""Trains with transformers' Trainer, our objective and our batches, and keeps the zeros."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

from ecoflap.data.model_facts import to_device
from ecoflap.data.objectives import Objective, on_device
from ecoflap.errors import NonFiniteLoss
from ecoflap.model.files import quiet
from ecoflap.model.offload import home_of
from ecoflap.model.patching import cache_disabled
from ecoflap.pruning.keep_zeros import ZeroKeeper
from ecoflap.run.finetune.data import TrainingData, collate
from ecoflap.run.finetune.distillation import Distillation
from ecoflap.run.finetune.options import blaming_options, total_steps, training_arguments
from ecoflap.run.finetune.recipe import Finetune
from ecoflap.run.manifest import file_digest
from ecoflap.support.files import read_sealed, write_sealed
from ecoflap.support.progress import Progress, Task

_log = logging.getLogger("ecoflap")
DIGESTS = "digests.json"  # of a checkpoint's files, beside them


@dataclass(frozen=True)
class Training:
    """The outcome of a training.

    Attributes:
        steps: number of optimiser steps.
        planned: their number without an early stop.
        best: the step with the lowest held-out loss; 0 is the model before training, which is kept then.
        losses: (step, mean training loss since the entry before).
        held_out: (step, held-out loss of the task); step 0 is the model before training.
    """

    steps: int
    planned: int
    best: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def stopped_early(self) -> bool:
        return self.steps < self.planned


class LossTrainer(Trainer):  # type: ignore[misc]
    """Trains with our objective, and evaluates held-out data with the task's loss, without distillation."""

    def __init__(
        self, *, objective: Objective, distillation: Distillation | None, inner: nn.Module, **options: Any
    ) -> None:
        super().__init__(**options)
        self._objective, self._distillation, self._inner = objective, distillation, inner
        self._fixed = on_device(objective)
        self.model_accepts_loss_kwargs = False  # our losses are means over a batch

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor:
        batch = to_device(inputs, self._inner)
        with self.accelerator.autocast():
            if self._distillation is None:
                loss = self._objective(self._inner, batch)
            else:
                loss = self._distillation.loss(self._inner, batch, self._objective)
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteLoss(
                f"the training loss is {float(loss.detach())} at step {self.state.global_step}: lower --learning-rate, "
                "or check the samples"
            )
        return loss

    def prediction_step(self, model: nn.Module, inputs: Mapping[str, Any], *_: Any, **__: Any) -> tuple[Any, ...]:
        with torch.no_grad(), self.accelerator.autocast():
            loss = self._fixed(self._inner, dict(inputs))
        if not math.isfinite(float(loss)):
            raise NonFiniteLoss(
                f"the held-out loss is {float(loss)} at step {self.state.global_step}: lower --learning-rate, or check "
                "the samples"
            )
        return loss.detach(), None, None


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reports each step, and ends the training with a checkpoint if the process is to stop."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.stop: KeyboardInterrupt | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        try:
            self._task.advance(1, f"held-out loss {known[-1]:.4f}" if known else "")
        except KeyboardInterrupt as stop:
            self.stop = stop
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_sealed(folder / DIGESTS, _digests(folder))  # last of all: it is whole

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        rest = f", training loss {losses[-1]:.4f}" if losses else ""
        _log.info("step %d of %d: held-out loss %.4f%s", state.global_step, state.max_steps, metrics["eval_loss"], rest)


def train(
    model: nn.Module,
    inner: nn.Module,
    data: TrainingData,
    recipe: Finetune,
    objective: Objective,
    keeper: ZeroKeeper | None,
    distillation: Distillation | None,
    folder: str,
    progress: Progress,
) -> Training:
    """Train in place; at the end ``model`` has the weights with the lowest held-out loss.

    If no evaluation was better than the one before the first step, ``best`` is 0, and the caller discards the weights.

    Args:
        model: the module that is trained and saved in checkpoints: the model, or the model with adapters.
        inner: the model that the objective is called with.
        keeper: of the zeros; None if the weights with zeros are not trained.
        folder: for checkpoints; training continues from the last one there.

    Raises:
        NonFiniteLoss: a training loss is NaN or infinite.
        KeyboardInterrupt: the process was asked to stop; a checkpoint is written.
    """
    steps = total_steps(recipe, len(data.train), data.paired)
    last = last_checkpoint(Path(folder))
    arguments = training_arguments(
        recipe, folder, steps, data, on_cpu=home_of(inner).type == "cpu", resumed=last is not None
    )  # fmt: skip

    def trainer(watch: Watch) -> LossTrainer:
        callbacks: list[Any] = [watch]
        if keeper is not None:
            callbacks.append(keeper)
        if recipe.patience:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=recipe.patience))
        return LossTrainer(
            objective=objective, distillation=distillation, inner=inner, model=model, args=arguments,
            train_dataset=data.train, eval_dataset=data.held_out, data_collator=collate, callbacks=callbacks,
        )  # fmt: skip

    state = trained(trainer, recipe, inner, "fine-tuning", steps, last, progress)
    model.eval()
    return _outcome(state)


def trained(
    make: Callable[[Watch], LossTrainer],
    recipe: Finetune,
    inner: nn.Module,
    stage: str,
    steps: int,
    last: str | None,
    progress: Progress,
) -> Any:
    """Train with the trainer that ``make`` builds, in one process on the device of ``inner``; return its state.

    Args:
        stage: name for the progress, with ``steps`` steps.
        last: the checkpoint to continue from.

    Raises:
        KeyboardInterrupt: the process was asked to stop; a checkpoint is written.
    """
    device, done = home_of(inner), 0 if last is None else int(last.rpartition("-")[2])
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # the trainer uses the current one
    with (
        quiet(),
        on_gpu,
        blaming_options(recipe),
        progress.stage(stage, total=steps, done=done) as task,
        cache_disabled(inner),
    ):
        watch = Watch(task)
        trainer = make(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
        if watch.stop is not None:
            raise watch.stop
    return trainer.state


def losses_of(state: Any) -> list[tuple[int, float]]:
    """(step, mean training loss since the entry before) from a trainer's state."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry]


def last_checkpoint(folder: Path) -> str | None:
    """The whole checkpoint with the most steps; one that a kill left half-written is removed.

    If another one is not as it was written, all are removed, with a warning: the training would end with the best of
    them, so it begins again.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    for path in found.values():
        if (path / DIGESTS).is_file() and read_sealed(path / DIGESTS, dict[str, str]) != _digests(path):
            _log.warning("%s is damaged: the training begins again", path)
            shutil.rmtree(folder)
            return None
    for step in sorted(found, reverse=True):
        if (found[step] / DIGESTS).is_file():
            return str(found[step])
        shutil.rmtree(found[step])
    return None


def _digests(checkpoint: Path) -> dict[str, str]:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != DIGESTS]
    return {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files}


def _outcome(state: Any) -> Training:
    evaluations = [(int(e["step"]), float(e["eval_loss"])) for e in state.log_history if "eval_loss" in e]
    start = min((loss for step, loss in evaluations if step == 0), default=math.inf)
    later = [(loss, step) for step, loss in evaluations if step > 0]
    best = min(later, default=(math.inf, 0))
    kept = best[1] if best[0] < start else 0
    return Training(int(state.global_step), int(state.max_steps), kept, losses_of(state), evaluations)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Convert the weights to ``dtype``; the returned function converts each back to its former dtype.

    Half precision would round small steps away, so training in float32 helps. Buffers are converted only to float32:
    those that a half-precision model keeps in float32 (rotary frequencies) need it.
    """
    dtypes = {name: tensor.dtype for name, tensor in _floating(model)}
    for _, tensor in _floating(model):
        if dtype == torch.float32 or isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(dtype)

    def back() -> None:
        for name, tensor in _floating(model):
            tensor.data = tensor.data.to(dtypes[name])

    return back


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()]

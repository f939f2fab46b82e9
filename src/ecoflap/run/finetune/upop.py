"""Runs UPop's search with transformers' Trainer: trains weights and masks, and ranks the channels meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from ecoflap.data.objectives import Objective, on_device
from ecoflap.errors import InfeasibleAllocation
from ecoflap.model.channels import ChannelGroup, channel_groups
from ecoflap.model.narrow import Narrowed, narrow
from ecoflap.model.offload import home_of
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.pruning.upop import ChannelMasks, Kept
from ecoflap.run.finetune.data import TrainingData, collate
from ecoflap.run.finetune.distillation import Distillation
from ecoflap.run.finetune.options import search_arguments, total_steps
from ecoflap.run.finetune.train import LossTrainer, Watch, last_checkpoint, losses_of, trained
from ecoflap.run.finetune.upop_recipe import UPDATES, UPop
from ecoflap.support.files import write_tensors
from ecoflap.support.progress import Progress

MASKS = "masks.safetensors"  # beside the weights in each of the search's checkpoints
_SAMPLES = 4  # for finding groups, and for comparing the narrow model with the masked one


@dataclass(frozen=True)
class Search:
    """The outcome of a search.

    Attributes:
        kept: which units of each group stay.
        steps: number of optimiser steps.
        losses: (step, mean training loss since the entry before).
    """

    kept: Kept
    steps: int
    losses: list[tuple[int, float]]


class _SearchTrainer(LossTrainer):
    """Keeps the masks in its checkpoints, beside the weights."""

    def __init__(self, *, masks: ChannelMasks, **options: Any) -> None:
        super().__init__(**options)
        self._masks = masks

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # Before the trainer's own state, which is written last in a complete checkpoint.
        write_tensors(Path(output_dir or self.args.output_dir) / MASKS, self._masks.state())


class _Ranking(TrainerCallback):  # type: ignore[misc]
    """Updates the masks after every ``every`` steps, and after the last."""

    def __init__(self, masks: ChannelMasks, every: int, sparsity: float, total: int) -> None:
        self._masks, self._every, self._sparsity, self._total = masks, every, sparsity, total

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._masks.update(state.global_step, state.max_steps, self._sparsity, self._total)


def find_groups(
    model: nn.Module, anatomy: Anatomy, data: TrainingData, objective: Objective, sparsity: float
) -> tuple[ChannelGroup, ...]:
    """The channels that can be removed, found on the first samples.

    Raises:
        AnatomyError: there are none.
        InfeasibleAllocation: they have fewer weights than are to be removed.
    """
    groups = channel_groups(model, anatomy, data.first(_SAMPLES), on_device(objective))
    most = sum(group.cost * (group.width - 1) for group in groups) / anatomy.prunable_parameters
    if sparsity > most:
        raise InfeasibleAllocation(
            f"sparsity {sparsity:g}: the channels of this model hold at most {most:.4f} of its prunable weights, "
            "without the one that each attention and feed-forward network keeps: give at most that"
        )
    return groups


def search(
    model: nn.Module,
    anatomy: Anatomy,
    groups: Sequence[ChannelGroup],
    data: TrainingData,
    recipe: UPop,
    objective: Objective,
    distillation: Distillation | None,
    folder: str,
    progress: Progress,
) -> Search:
    """Train the model in place with its masks, and rank the channels; no weight is set to zero yet.

    Args:
        folder: for checkpoints; the search continues from the last one there.

    Raises:
        NonFiniteLoss: a training loss is NaN or infinite.
        KeyboardInterrupt: the process was asked to stop; a checkpoint is written.
    """
    own = UPop.parse({**recipe.given(), "epochs": recipe.search_epochs})
    steps = total_steps(own, len(data.train), data.paired)
    last = last_checkpoint(Path(folder))
    arguments = search_arguments(own, folder, steps, data, on_cpu=home_of(model).type == "cpu")
    masks = ChannelMasks(model, groups)
    if last is not None:
        masks.load(load_file(Path(last) / MASKS))
    every = recipe.update_every or max(1, steps // UPDATES)

    def trainer(watch: Watch) -> LossTrainer:
        return _SearchTrainer(
            masks=masks, objective=objective, distillation=distillation, inner=model, model=model, args=arguments,
            train_dataset=data.train, data_collator=collate,
            callbacks=[_Ranking(masks, every, recipe.sparsity, anatomy.prunable_parameters), watch],
        )  # fmt: skip

    with masks:
        state = trained(trainer, recipe, model, "search", steps, last, progress)
    model.eval()
    kept = masks.chosen(recipe.sparsity, anatomy.prunable_parameters)
    return Search(kept, int(state.global_step), losses_of(state))


def narrowed(
    model: nn.Module,
    anatomy: Anatomy,
    groups: Sequence[ChannelGroup],
    kept: Kept,
    data: TrainingData,
    objective: Objective,
) -> Narrowed | None:
    """The smaller model; None if its configuration can't express the sizes. Outputs of each tower are compared."""
    batch, run = data.first(_SAMPLES), on_device(objective)

    def outputs(one: nn.Module) -> torch.Tensor:
        seen: dict[str, torch.Tensor] = {}

        def hook(tower: str) -> Any:
            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                seen[tower] = hidden.detach().float().flatten()

            return keep

        with ExitStack() as stack, torch.no_grad(), cache_disabled(one):
            for tower in anatomy.towers:
                handle = one.get_submodule(tower.blocks[-1].name).register_forward_hook(hook(tower.name))
                stack.callback(handle.remove)
            run(one.eval(), batch)
        return torch.cat([seen[tower] for tower in sorted(seen)])

    return narrow(model, groups, kept, outputs)


def channels_record(
    groups: Sequence[ChannelGroup], kept: Kept, smaller: Narrowed | None, before: int, after: int
) -> dict[str, Any]:
    """The channels' part of ``metrics.json``.

    Args:
        before, after: number of parameters of the dense model and of the saved one.
    """
    rows = [
        {"name": group.name, "tower": group.tower, "kind": group.kind, "width": group.width,
         "kept": int(kept[group.name].sum())}
        for group in groups
    ]  # fmt: skip
    entries: Mapping[str, tuple[int, int]] = {} if smaller is None else smaller.entries
    sizes = {name: list(sizes) for name, sizes in entries.items()}
    return {"groups": rows, "config": sizes, "parameters": {"dense": before, "saved": after}}

"""The recipe of a fine-tuning: a run's recipe with fields for the training instead of the pruning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from ecoflap.errors import InvalidOption
from ecoflap.run.names import COMPARISON, MODEL, RECIPE, TRAIN
from ecoflap.run.recipe import Recipe
from ecoflap.run.trust import refuse_code
from ecoflap.support.ranges import LARGEST, MOST_ROUNDS, SMALLEST
from ecoflap.support.reading import read_yaml

if TYPE_CHECKING:  # a recipe is read without torch
    from torch import nn

    from ecoflap.data.objectives import Objective
    from ecoflap.model.channels import ChannelGroup
    from ecoflap.model.parts import Anatomy
    from ecoflap.run.finetune.channels import Channels
    from ecoflap.run.finetune.data import TrainingData

# Fields of a run's recipe that are used here; the others are about pruning and calibration.
_SHARED = (
    "model", "columns", "prompt", "objective", "image_folder", "classes", "class_prompts", "batch_size",
    "sequence_length", "window_start", "include", "exclude", "towers", "evaluations", "task", "task_options", "test",
    "test_columns", "test_prompt", "test_image_folder", "test_samples", "test_batch_size", "seed", "device", "dtype",
    "trust_remote_code",
)  # fmt: skip
NOT_HERE = frozenset(Recipe.model_fields) - {*_SHARED}
_TESTS = ("evaluations", "task", "task_options", "test", "test_columns", "test_prompt", "test_image_folder")
_OF_THE_RUN = ("prompt", "objective", "classes", "class_prompts", "sequence_length", "window_start")
RATES = {"full": 5e-5, "lora": 2e-4}  # transformers' default, and a usual rate for adapters
SHARE, MOST = 0.1, 1000  # of the training data that is held out
MOST_EPOCHS, MOST_DECAY = 10_000, 1000.0  # more is a typing error
EMBEDDED = "embedded"  # value of the field ``dense`` for the embedded VLM, which has no path


class Finetune(Recipe):
    """All fields that decide the result of a fine-tuning.

    Attributes:
        title: the command.
        left_out: fields of a run's recipe that are not used here.
    """

    title: ClassVar[str] = "finetune"
    left_out: ClassVar[frozenset[str]] = NOT_HERE

    _dense_is_asked: bool | None = PrivateAttr(default=None)  # None until it may be filled in from the run

    model: str | None = Field(None, description="The run whose model is trained further, or a pruned model.")
    train: str | None = Field(None, description="Training data: file, folder or dataset id, as --calibration of prune.")
    train_samples: int | None = Field(None, ge=2, description="Number of training samples. Default: all.")
    validation: str | None = Field(None, description="Held-out data. Default: a part of the training data.")
    held_out: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description=f"Share of the training data that is held out. Default: {SHARE:g}, but {MOST:,} samples at most.",
    )
    tune: Literal["full", "lora"] = Field(
        "full", description="Train all weights, or a low-rank update of the pruned layers (extra 'lora')."
    )
    rank: int = Field(16, ge=1, le=2**20, description="Rank of the low-rank update.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of the samples and of the adapters.")
    epochs: float = Field(3.0, gt=0.0, le=MOST_EPOCHS, description="Largest number of passes over the training data.")
    learning_rate: float | None = Field(
        None,
        ge=SMALLEST,
        description=f"Peak learning rate. Default: {RATES['full']:g}, with --tune lora {RATES['lora']:g}.",
    )
    weight_decay: float = Field(0.01, ge=0.0, le=MOST_DECAY, description="Weight decay of AdamW.")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="Share of the steps in which the learning rate rises.")
    accumulate: int = Field(
        1, ge=1, le=MOST_ROUNDS, description="Number of batches whose gradients are summed for one step."
    )
    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between two evaluations on the held-out data. Default: ten evaluations in total."
    )
    patience: int = Field(
        3, ge=0, description="Evaluations without a lower held-out loss before training stops; 0: never."
    )
    dense: str | None = Field(
        None, description="The dense model, for comparison and as the teacher. Default: that of the run."
    )
    distill: float = Field(
        0.0,
        ge=0.0,
        le=LARGEST,
        description="Weight of the distance to the dense model's outputs in the loss, such as 0.5 or 1.",
    )
    distill_hidden: float = Field(
        0.0,
        ge=0.0,
        le=LARGEST,
        description="Weight of the distance to the dense model's hidden states in the loss.",
    )
    temperature: float = Field(
        1.0, ge=0.01, le=1000.0, description="Temperature that softens both models' outputs for --distill."
    )
    training_options: dict[str, float | int | bool | str] = Field(
        default_factory=dict,
        description="Further arguments of transformers' TrainingArguments: lr_scheduler_type=cosine.",
    )

    @model_validator(mode="after")
    def _fit(self) -> Finetune:
        if self.dtype == "float16":
            raise InvalidOption("dtype float16: it is too coarse for AdamW: use float32 or bfloat16")
        if self.validation is not None and self.held_out is not None:
            raise InvalidOption("validation and held_out are both given: give the held-out data, or a share")
        return self

    def resolved(self) -> Finetune:
        """The same recipe with unset fields filled in from the run and from other fields.

        Raises:
            InvalidOption: there is no model or no training data, or the run's recipe can't be read or would run code.
        """
        if self.model is None:
            raise InvalidOption("what to train? give a run or a pruned model: 'ecoflap finetune RUN --train DATA'")
        if self.train is None:
            raise InvalidOption("finetune needs training data: give --train FILE")
        changes: dict[str, Any] = {"learning_rate": self.learning_rate or RATES[self.tune]}
        run = run_of(self.model)
        if run is not None:
            changes |= self._of_run(run)
        found = Finetune.parse({**self.given(), **changes})
        found._dense_is_asked = self.dense is not None if self._dense_is_asked is None else self._dense_is_asked
        return found

    @property
    def dense_is_asked(self) -> bool:
        """Whether the user named the dense model; one that only a run names may be missing."""
        return bool(self._dense_is_asked)

    def given(self) -> dict[str, Any]:
        """The fields that were set."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def _of_run(self, run: Path) -> dict[str, Any]:
        """Fields taken from the run's recipe if this one leaves them open: dense model, tests, prompt, objective."""
        recorded = read_yaml(run / RECIPE, "the run's recipe")
        if not isinstance(recorded, dict):
            raise InvalidOption(f"{run / RECIPE} is damaged: give the run's model itself, {run / MODEL}")
        names = list(_OF_THE_RUN)
        if not any(getattr(self, name) for name in _TESTS):
            names += (*_TESTS, "test_samples")
        found = {name: recorded[name] for name in names if recorded.get(name) and name not in self.model_fields_set}
        refuse_code(found, self.given(), f"run {run}")
        if self.dense is None:
            found["dense"] = recorded.get("dense") if TRAIN in recorded else recorded.get("model") or EMBEDDED
        if recorded.get("model") is None and not any(found.get(name) or getattr(self, name) for name in _TESTS):
            found["task"] = ("vqa",)  # of the embedded model, as in its run
        return {name: value for name, value in found.items() if value is not None}

    @property
    def source(self) -> str | None:
        """The folder of the weights: the run's model, or the named model."""
        run = run_of(str(self.model))
        return str(self.model if run is None else run / MODEL)

    def check_model(self, model: nn.Module) -> None:
        """Check that ``model`` can be trained. Raises AnatomyError if it has no zeros to keep."""
        from ecoflap.pruning.keep_zeros import keep_zeros  # imports torch, which reading a recipe does not need

        keep_zeros(model)

    def channel_groups(
        self, model: nn.Module, anatomy: Anatomy, data: TrainingData, objective: Objective
    ) -> tuple[ChannelGroup, ...] | None:
        """The channels that can be removed during the training; None if all stay.

        Raises:
            AnatomyError: there are none.
            InfeasibleAllocation: they have fewer weights than are to be removed.
        """
        return None

    def channels(self, groups: tuple[ChannelGroup, ...], journal: Path) -> Channels | None:
        """The search among ``groups`` with its state in the folder ``journal``; None if there is no search."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """All fields that decide something, as plain YAML and JSON types."""
        return {name: value for name, value in super().to_dict().items() if name not in self.left_out}


def run_of(model: str) -> Path | None:
    """The run directory that ``model`` names; None if it is none.

    Raises:
        InvalidOption: it is a comparison, or a run without its model.
    """
    path = Path(model).expanduser()
    if (path / COMPARISON).is_file():
        raise InvalidOption(f"{path} is a comparison, which keeps no models: give a run or a pruned model")
    if not (path / RECIPE).is_file():
        return None
    if not (path / MODEL / "config.json").is_file():
        raise InvalidOption(f"the run in {path} has no model yet: 'ecoflap prune --resume' with its options ends it")
    return path

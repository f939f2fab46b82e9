"""Prepares a run before it writes anything: loads model and data, finds layers, refuses impossible recipes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ecoflap.allocation import Allocation
from ecoflap.allocation.parts import read_allocation
from ecoflap.data.batches import batch_size_of, make_batches
from ecoflap.data.class_names import class_names, class_templates
from ecoflap.data.collate import collating_objective, unpacked
from ecoflap.data.computing import computed_in, first_run, taking
from ecoflap.data.model_facts import Batch, is_encoder_decoder
from ecoflap.data.objectives import Objective, check_image_matters, check_loss, objective_name, resolve
from ecoflap.data.prompts import pixels_used, tokenizer_of
from ecoflap.data.samples import SampleSet, load_samples
from ecoflap.data.window_length import memory_of
from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.registry import AUTO
from ecoflap.importance.scores import Importance
from ecoflap.model import compute
from ecoflap.model.anatomy import discover
from ecoflap.model.checkpoint import Checkpoint
from ecoflap.model.lazy_logits import logits_on_demand
from ecoflap.model.offload import home_of, is_offloaded
from ecoflap.model.parts import Anatomy
from ecoflap.model.patching import cache_disabled
from ecoflap.model.read_elsewhere import with_weights
from ecoflap.model.save import stored_bytes
from ecoflap.pruning.criteria import make_criterion
from ecoflap.pruning.room import too_little
from ecoflap.run.checks import check_data, check_recipe, drawn, is_measured
from ecoflap.run.evaluations import rehearse
from ecoflap.run.loading import load_checkpoint
from ecoflap.run.provenance import digests_of
from ecoflap.run.recipe import Recipe
from ecoflap.statistics.dense import SharedNorms
from ecoflap.statistics.tokens import sees_visual_tokens
from ecoflap.support.progress import LOADING, Progress, Silent
from ecoflap.support.work import Work
from ecoflap.support.workers import ALONE, Workers

if TYPE_CHECKING:
    from torch import Tensor, nn


_IN_FP32 = (
    "computing: in fp32, block by block (auto: half precision is slow on this CPU; --compute-dtype native keeps it)"
)


@dataclass(frozen=True)
class Prepared:
    """The inputs of the stages.

    Attributes:
        samples: the calibration samples; None if none are needed.
        batches: the same as batches on the CPU.
        importance: read from the recipe's file; None if it names none.
        allocation: read from the recipe's file; None if it names none.
        pruned: the weights whose zeros are kept, if the recipe names a pruned model; ``anatomy`` and ``allocation``
            then contain only the layers with zeros.
        chosen: a line that says which importance was chosen, and why, if the recipe leaves it open.
        computes: a line that says in which dtype the model computes, if that differs from its weights.
        norms: of the dense model's inputs; a comparison keeps them for the cells that share the batches.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    anatomy: Anatomy
    samples: SampleSet | None
    batches: Sequence[Batch]
    objective: Objective
    objective_name: str
    importance: Importance | None = None
    allocation: Allocation | None = None
    pruned: Mapping[str, Tensor] | None = field(default=None, compare=False)
    norms: SharedNorms = field(default_factory=SharedNorms, compare=False)
    chosen: str = ""
    computes: str = ""

    @property
    def parts(self) -> tuple[nn.Module, Anatomy, Sequence[Batch]]:
        """Model, layers and batches, the first arguments of every stage."""
        return self.checkpoint.model, self.anatomy, self.batches

    def work(self, progress: Progress, workers: Workers = ALONE) -> Work:
        """The options that all stages share."""
        return Work(self.objective, self.recipe.seed, progress, workers, self.recipe.compute_dtype)

    @property
    def given(self) -> Importance | Allocation | None:
        """The allocation or the scores that the recipe names, if any."""
        return self.allocation if self.allocation is not None else self.importance

    def inputs(self) -> dict[str, str]:
        """Digests of the inputs beside recipe and model: the batches and the kind of device."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name, value in sorted(batch.items()):
                digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        device = home_of(self.checkpoint.model).type
        return {"calibration data": digest.hexdigest(), **digests_of(self.recipe), "device": device}

    @property
    def window_length(self) -> int | None:
        """Tokens in a window if the samples are cut from plain text; None for other samples."""
        if self.samples is None or self.samples.windows is None:
            return None
        ids, labels = self.batches[0]["input_ids"], self.batches[0]["labels"]
        return int(ids.shape[1] + (labels.shape[1] if is_encoder_decoder(self.checkpoint.model) else 0))

    def place_of(self, batch: int) -> str:
        """The place of a batch's samples in the source: rows, or the first words of its windows of text."""
        if self.samples is None:
            return ""
        sizes = [batch_size_of(one) for one in self.batches]
        first, size = sum(sizes[:batch]), sizes[batch]
        if self.samples.windows is None:
            rows = self.samples.indices[first : first + size]
            return f"rows {', '.join(map(str, rows))} of {self.samples.source}"
        tokenizer = tokenizer_of(self.checkpoint.processor)
        ids = self.batches[batch].get("input_ids")
        begins = [] if tokenizer is None or ids is None else [tokenizer.decode(row[:8]) for row in ids]
        begin = "; ".join(f"“{' '.join(text.split())} …”" for text in begins)
        return f"windows {first} to {first + size - 1} of the text of {self.samples.source}, which begin {begin}"

    def choices(self) -> Iterator[str]:
        """Lines about the choices that the recipe left open: columns of the data, and the objective."""
        if self.computes:
            yield self.computes
        if self.samples is None:
            return
        drawn, length = self.samples, self.window_length
        if length is not None:
            drawn = replace(drawn, windows=sum(batch_size_of(one) for one in self.batches))
        why = f" ({drawn.length_reason}; --sequence-length sets it)" if drawn.length_reason else ""
        tokens = "" if length is None else f", {length} tokens each{why}"
        guessed = self.samples.columns and not self.recipe.columns
        yield f"calibration: {drawn.summary}{' (guessed; --columns sets them)' if guessed else ''}{tokens}"
        chosen = "" if self.recipe.objective else " (by the model's class; --objective sets it)"
        yield f"objective: {self.objective_name}{chosen}"
        if self.chosen:
            yield self.chosen

    def shortage(self) -> Iterator[str]:
        """A warning if the machine has too little memory for the criterion, which might fail only after hours."""
        if self.pruned is not None:
            return
        model, name = self.checkpoint.model, self.recipe.criterion
        needs = getattr(make_criterion(name, self.recipe.criterion_options), "statistics", "none")
        held = 0 if is_offloaded(model) else stored_bytes(model)
        if line := too_little(self.anatomy.layers, name, needs, held, memory_of(home_of(model))):
            yield line


def by_options(asked: Recipe, recipe: Recipe) -> Iterator[str]:
    """A line where ``auto`` became the importance that the given options belong to.

    Args:
        asked: as the user gave it.
        recipe: the same, resolved.
    """
    if asked.importance == AUTO != recipe.importance and asked.importance_options and is_measured(recipe):
        options = ", ".join(asked.importance_options)
        yield f"importance: {recipe.importance} (auto: it has the option {options}; --importance names another)"


@contextmanager
def naming_samples(plan: Prepared) -> Iterator[None]:
    """Context that adds to an error about a calibration batch which samples are in it."""
    try:
        yield
    except NonFiniteLoss as error:
        if error.batch is None or not (place := plan.place_of(error.batch)):
            raise
        raise NonFiniteLoss(f"{error} ({place})", error.batch) from error


def prepare(
    recipe: Recipe, workers: Workers = ALONE, progress: Progress | None = None, data_checked: bool = False
) -> Prepared:
    """Load and check all inputs of ``recipe``, so that none can stop a run half-way.

    Args:
        recipe: resolved.
        progress: where to report.
        data_checked: :func:`ecoflap.run.checks.check_data` was called already.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    check_recipe(recipe)
    if not data_checked:
        check_data(recipe)
    given = None if recipe.allocation is None else read_allocation(recipe.allocation)
    scores = Importance.load(recipe.importance) if recipe.importance.endswith(".json") and given is None else None
    with (progress or Silent()).stage(LOADING, total=3) as task:
        task.advance(0, "the model")
        checkpoint = load_checkpoint(recipe, workers=workers)
        task.advance(1, "calibration data, layers")
        plan = plan_on(checkpoint, recipe, scores, given, workers)
        check_plan(plan)
        task.advance(1, "one sample of each test")
        rehearse(plan.checkpoint, plan.recipe)
        plan = settled(plan)
        task.advance(1)
    return plan


def settled(plan: Prepared) -> Prepared:
    """The plan with the importance that ``auto`` chooses for its model, for the run's record.

    Raises:
        InvalidOption: the model is not in memory, and its gradients can't be taken.
    """
    model, anatomy, batches = plan.parts
    if not is_measured(plan.recipe):
        return plan
    options, choice = plan.recipe.method().importance.chosen(model, anatomy, batches, plan.objective)
    if choice is None:
        return plan
    recipe = plan.recipe.model_copy(update={"importance": options.name})
    return replace(plan, recipe=recipe, chosen=str(choice))


def plan_on(
    checkpoint: Checkpoint,
    recipe: Recipe,
    scores: Importance | None = None,
    given: Allocation | None = None,
    workers: Workers = ALONE,
) -> Prepared:
    """The plan of ``recipe`` on a loaded model: calibration, objective, layers. :func:`check_plan` checks it.

    Args:
        scores: read from the recipe's file, if it names one.
        given: the allocation read from the recipe's file, if it names one.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    samples: SampleSet | None = None
    batches: list[Batch] = []
    if recipe.calibration is not None or recipe.model is None:
        samples, batches = calibration_batches(recipe, checkpoint)
    name = objective_name(recipe.objective, checkpoint.model)
    objective = resolve(name, checkpoint.model)
    takes = computed_in(checkpoint.model, recipe.compute_dtype, batches, objective, workers)
    told = _IN_FP32 if recipe.compute_dtype == compute.AUTO and takes == compute.FLOAT32 else ""
    recipe = recipe.model_copy(update={"compute_dtype": takes, "tokens": _tokens(recipe, checkpoint.model, batches)})
    anatomy = find_layers(recipe, checkpoint.model, batches, objective)
    return Prepared(recipe, checkpoint, anatomy, samples, batches, objective, name, scores, given, computes=told)


def _tokens(recipe: Recipe, model: nn.Module, batches: Sequence[Batch]) -> str:
    """The choice of tokens for the run's record; the default becomes "all" if the model sees no visual tokens."""
    choice = recipe.token_choice()
    return choice.name if choice.required or sees_visual_tokens(model, batches) else "all"


def check_plan(plan: Prepared) -> None:
    """Check that the plan's samples, scores and allocation fit each other and its model.

    Raises:
        EcoflapError: as :meth:`~ecoflap.search.method.Method.check` and ``check_layers``.
    """
    method = plan.recipe.method()
    method.check(plan.checkpoint.model, plan.batches)
    method.check_layers(plan.anatomy, plan.given)


def calibration_batches(recipe: Recipe, checkpoint: Checkpoint) -> tuple[SampleSet, list[Batch]]:
    """The fixed calibration samples of a recipe, and their batches on the CPU."""
    sample_set = load_samples(recipe.calibration, **drawn(recipe), most_pixels=pixels_used(checkpoint.processor))
    wanted = collating_objective(recipe.objective, checkpoint.model)
    sample_set = unpacked(sample_set, wanted, checkpoint.processor)  # as make_batches does: for the record
    reasons: list[str] = []
    batches = make_batches(
        sample_set,
        checkpoint.model,
        checkpoint.processor,
        batch_size=recipe.batch_size,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        objective=recipe.objective,
        classes=class_names(recipe.classes),
        class_prompts=class_templates(recipe.class_prompts),
        window_start=recipe.window_start,
        told=reasons.append,
    )
    return replace(sample_set, length_reason="".join(reasons)), batches


def find_layers(recipe: Recipe, model: nn.Module, batches: Sequence[Batch], objective: Objective) -> Anatomy:
    """The anatomy from a trace of the first batch's forward, whose loss is checked; without batches, as defined.

    Raises:
        NonFiniteLoss: the first batch's loss is NaN or infinite.
        CalibrationError: the loss does not depend on the image, or the model can't take the batch.
        AnatomyError: nothing to prune, or a pattern selects nothing.
    """
    dtype = computed_in(model, recipe.compute_dtype, batches, objective)
    with cache_disabled(model), compute.computing_in(model, dtype):
        if batches:
            with taking(model), logits_on_demand(model):
                with_weights(model, lambda: check_loss(model, batches[0], objective))
                with_weights(model, lambda: check_image_matters(model, batches[0], objective))
        return discover(
            model,
            batches[0] if batches else None,
            include=recipe.include,
            exclude=recipe.exclude,
            towers=recipe.towers,
            run=first_run(objective),
        )

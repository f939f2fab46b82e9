"""The whole job on one page: quality before, training with zeros kept, saved model, quality after, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ecoflap.errors import CheckpointError
from ecoflap.model.checkpoint import DTYPES, Checkpoint, load
from ecoflap.model.fingerprint import fingerprint
from ecoflap.model.parts import Anatomy
from ecoflap.model.save import save, stored_bytes
from ecoflap.pruning.keep_zeros import keep_zeros
from ecoflap.run import names as files
from ecoflap.run.evaluations import Evaluation, evaluate, evaluations_of
from ecoflap.run.finetune.channels import Channels
from ecoflap.run.finetune.distillation import Distillation
from ecoflap.run.finetune.folder import TRAINING, FinetuneDirectory
from ecoflap.run.finetune.lora import adapted, merged
from ecoflap.run.finetune.prepare import Plan, prepare_finetune, weights_of
from ecoflap.run.finetune.recipe import EMBEDDED, Finetune
from ecoflap.run.finetune.train import Training, in_dtype, train
from ecoflap.run.loading import load_checkpoint
from ecoflap.run.log import explained, logging_to
from ecoflap.run.pages import PAGES
from ecoflap.run.pipeline import MACHINE, STAGES
from ecoflap.run.provenance import Usage, environment, measured, sparsity_of, threads_of_start
from ecoflap.run.quality import paired_results, record
from ecoflap.support.files import check_room, read_sealed, write_sealed
from ecoflap.support.progress import Labelled, Progress, Silent

_log = logging.getLogger("ecoflap")
_Results = dict[str, dict[str, Any]]  # by evaluation: its "result" and, if it has any, its "samples"


@dataclass
class _Job:
    """A running fine-tuning."""

    plan: Plan
    run: FinetuneDirectory
    progress: Progress
    usages: list[Usage]
    channels: Channels | None = None  # of UPop

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure time and memory of a stage, and store them for a resumed run."""
        _log.info("%s: begins", name)
        with measured(name, self.usages):
            yield
        write_sealed(self.run.path / STAGES, [usage.to_json() for usage in self.usages])


def run_finetune(
    recipe: Finetune,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Train the recipe's sparse model further and write model, metrics and page into ``output``; return the folder.

    After an interruption, ``resume=True`` continues from the trainer's last checkpoint.

    Args:
        say: receives one line for each choice that the recipe left open.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it; if the recipe or one sample shows the fault,
            ``output`` is not touched.
        Stopped: by a signal, after the work had begun.
        RunFailed: any other failure; the log has the traceback.
    """
    recipe = recipe.resolved()
    with FinetuneDirectory.examine(output, recipe, overwrite=overwrite, resume=resume) as run:
        if run.complete:
            run.finish()
            return run.path
        plan = prepare_finetune(recipe)
        for line in plan.choices():
            if say is not None:
                say(line)
        run.begin(recipe, fingerprint(plan.checkpoint.model), plan.inputs())
        log, began = run.path / files.LOG, threads_of_start(run.path / MACHINE, plan.checkpoint.model)
        with logging_to(log), explained(run.path, log), began:
            _log.info("%s %s in %s", recipe.title, "goes on" if run.resumed else "begins", run.path.absolute())
            _log.info("recipe: %s", recipe.model_dump(mode="json", exclude_defaults=True))
            for line in plan.choices():
                _log.info("%s", line)
            usages = [Usage(**row) for row in read_sealed(run.path / STAGES) or ()]
            _stages(_Job(plan, run, progress or Silent(), usages, _channels(plan, run)))
        return run.path


def _stages(job: _Job) -> None:
    run, plan = job.run, job.plan
    entries = evaluations_of(plan.recipe)
    teacher = _teacher(job)
    dense = {} if teacher is None else _evaluated(job, entries, "dense", teacher)
    _search(job, teacher)
    pruned = _evaluated(job, entries, "pruned", plan.checkpoint)
    checkpoint, training, zeros, channels = _trained(job, teacher)
    tuned = _evaluated(job, entries, "fine-tuned", checkpoint)
    run.discard(files.REPORT)  # of an older state: metrics and a page mark a complete run
    run.write(files.METRICS, {
        "format": 1,
        "dense": {name: kept["result"] for name, kept in dense.items()},
        "pruned": {name: kept["result"] for name, kept in pruned.items()},
        "finetuned": {name: kept["result"] for name, kept in tuned.items()},
        "paired": paired_results(tuned, {"dense": dense, "pruned": pruned}),
        "compute_dtype": plan.recipe.compute_dtype,
        "sparsity": sparsity_of(plan.anatomy, zeros),
        **({"channels": channels} if channels else {}),
        "training": {
            **asdict(training),
            "objective": plan.objective_name,
            "source": plan.data.samples.source,
            "columns": plan.data.samples.columns,
            "samples": len(plan.data.train),
            "held_out_samples": len(plan.data.held_out),
        },
        "stages": [usage.to_json() for usage in job.usages],
        "environment": environment(checkpoint),
    })  # fmt: skip
    with run.manifest.writing(f"{files.MODEL}/"):
        PAGES.get("card")(run.path)  # into the model's folder
    PAGES.get("finetune")(run.path)
    run.finish()
    _log.info("complete: %s", run.path)


def _channels(plan: Plan, run: FinetuneDirectory) -> Channels | None:
    return None if plan.groups is None else plan.recipe.channels(plan.groups, run.path / files.JOURNAL)


def _search(job: _Job, teacher: Checkpoint | None) -> None:
    """Run UPop's search in place, if the recipe has one; a finished one is read from the journal."""
    plan, channels = job.plan, job.channels
    if channels is None or (read_sealed(job.run.path / TRAINING) is not None and not channels.searched):
        return
    model = plan.checkpoint.model
    if not channels.searched:
        check_room(job.run.path, 7 * sum(p.numel() * 4 for p in model.parameters()), "the checkpoints")
        with job.stage("search"):
            back = _in_training_dtype(plan)
            channels.search(model, plan.anatomy, plan.data, plan.objective, _distillation(job, teacher), job.progress)
            back()
    channels.restore(model)


def _zeros(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, int]:
    return {layer.name: int((checkpoint.model.get_parameter(layer.name) == 0).sum()) for layer in anatomy.layers}


def _teacher(job: _Job) -> Checkpoint | None:
    """The dense model, if one is known; it may be missing if only the run names it."""
    recipe = job.plan.recipe
    if recipe.dense is None:
        return None
    try:
        found = load(
            None if recipe.dense == EMBEDDED else recipe.dense,
            device=str(job.plan.checkpoint.model.device),
            trust_remote_code=recipe.trust_remote_code,
        )
    except CheckpointError as error:
        if recipe.distill or recipe.distill_hidden or recipe.dense_is_asked or recipe.source == recipe.model:
            raise
        _log.warning("no results of the dense model: %s", error)
        return None
    found.model.requires_grad_(False)
    return found


def _evaluated(job: _Job, entries: Sequence[Evaluation], when: str, checkpoint: Checkpoint) -> _Results:
    """Results of all evaluations by name; finished ones of an interrupted run come from its journal."""
    path = job.run.path / job.run.result(when)
    kept: _Results = read_sealed(path) or {}
    todo = [entry for entry in entries if entry.name not in kept]
    with job.stage(f"evaluation, {when}") if todo else nullcontext():
        for entry in todo:
            found = evaluate(checkpoint, entry, job.plan.recipe, Labelled(job.progress, when))
            _log.info("%s, %s: %s %s", entry.name, when, found.metric, found.value)
            kept[entry.name] = record(found)
            write_sealed(path, kept)
    return kept


def _trained(
    job: _Job, teacher: Checkpoint | None
) -> tuple[Checkpoint, Training, dict[str, int], dict[str, Any] | None]:
    """The fine-tuned model, saved; the outcome of its training; zeros by layer; the record of UPop's channels."""
    run, plan = job.run, job.plan
    place = run.path / files.MODEL
    known = read_sealed(run.path / TRAINING)
    if known is not None and place.exists():
        saved = load_checkpoint(plan.recipe.model_copy(update={"model": str(place), "dtype": "auto"}))
        return saved, _training(known), known["zeros"], known["channels"]
    model = plan.checkpoint.model
    # A checkpoint has the weights and both moments in float32, and two exist while one replaces the other.
    check_room(run.path, 7 * sum(p.numel() * 4 for p in model.parameters()) + stored_bytes(model), "the checkpoints")
    before = _zeros(plan.checkpoint, plan.anatomy)
    with job.stage("fine-tuning"):
        training = _tuned(job, teacher)
    if training.best == 0:
        _log.warning("no evaluation had a lower held-out loss than the pruned model, so its weights are kept")
        if job.channels is None:
            model = load_checkpoint(weights_of(plan.recipe)).model
        else:
            job.channels.restore(model)
    checkpoint = replace(plan.checkpoint, model=model.eval())
    zeros, channels = _zeros(checkpoint, plan.anatomy), None
    lost = [name for name, count in zeros.items() if count < before[name]]
    if lost:
        raise RuntimeError(f"{len(lost)} layers have lost zeros ({lost[0]}): nothing is saved")
    with job.stage("saving"), run.manifest.writing(f"{files.MODEL}/"):
        if job.channels is not None:
            model, channels = job.channels.smaller(checkpoint.model, plan.anatomy, plan.data, plan.objective)
            checkpoint = replace(checkpoint, model=model)
        write_sealed(run.path / TRAINING, {**asdict(training), "zeros": zeros, "channels": channels})
        save(checkpoint, place)
    return checkpoint, training, zeros, channels


def _training(known: Mapping[str, Any]) -> Training:
    pairs = {name: [(int(step), float(loss)) for step, loss in known[name]] for name in ("losses", "held_out")}
    return Training(known["steps"], known["planned"], known["best"], **pairs)


def _in_training_dtype(plan: Plan) -> Callable[[], None]:
    dtype = plan.recipe.dtype
    return in_dtype(plan.checkpoint.model, torch.float32 if dtype == "auto" else DTYPES[dtype])


def _distillation(job: _Job, teacher: Checkpoint | None) -> Distillation | None:
    recipe = job.plan.recipe
    if not (recipe.distill or recipe.distill_hidden):
        return None
    assert teacher is not None
    towers = job.plan.anatomy.towers
    return Distillation(teacher.model, recipe.distill, recipe.temperature, recipe.distill_hidden, towers)


def _tuned(job: _Job, teacher: Checkpoint | None) -> Training:
    """Train the plan's model in place, in the recipe's dtype."""
    recipe, model = job.plan.recipe, job.plan.checkpoint.model
    back, distillation = _in_training_dtype(job.plan), _distillation(job, teacher)
    torch.manual_seed(recipe.seed)  # of the adapters
    trained: Any = model
    if recipe.tune == "lora":
        pruned = [layer for layer in job.plan.anatomy.layers if bool((model.get_parameter(layer.name) == 0).any())]
        trained = adapted(model, pruned, recipe.rank)
    keeper = None
    if recipe.tune == "full":
        keeper = keep_zeros(model) if job.channels is None else job.channels.keeper(model)
    with keeper or nullcontext():
        training = train(
            trained, model, job.plan.data, recipe, job.plan.objective, keeper, distillation, job.run.checkpoints,
            job.progress,
        )  # fmt: skip
    if recipe.tune == "lora":
        merged(trained)
    back()
    return training

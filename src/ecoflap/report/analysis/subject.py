"""Reads a run for analyses: its files, its dense and sparse model, its data; each at its first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecoflap.errors import EcoflapError, InvalidOption
from ecoflap.importance.scores import Importance
from ecoflap.report.analysis.registry import NotApplicable
from ecoflap.run import names as files
from ecoflap.run.directory import RunDirectory
from ecoflap.run.recipe import Recipe
from ecoflap.support.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import nn

    from ecoflap.allocation import Allocation
    from ecoflap.data.model_facts import Batch
    from ecoflap.data.objectives import Objective
    from ecoflap.model.checkpoint import Checkpoint
    from ecoflap.model.parts import Anatomy

FULL_SAMPLES_UP_TO = 50_000_000  # parameters of a model that gets all samples of stage 1


class Subject:
    """The run to analyse.

    Args:
        path: the run directory.
        samples: number of calibration samples; None: that of the run's stage 1, and proportionally fewer for models of
            more than :data:`FULL_SAMPLES_UP_TO` parameters.
        code: fields that run code (``trust_remote_code``, ``objective``) and that the user allows.

    Raises:
        InvalidOption: ``path`` is no run or not complete, or ``samples`` is below 1.
    """

    def __init__(
        self,
        path: str | Path,
        samples: int | None = None,
        progress: Progress | None = None,
        code: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.progress, self._samples, self._code = Path(path), progress or Silent(), samples, code or {}
        if not (self.path / files.RECIPE).is_file():
            raise InvalidOption(f"{self.path} is no run directory: it has no {files.RECIPE}")
        if files.GRID in RunDirectory(self.path).recorded():
            raise InvalidOption(f"{self.path} is a comparison of several models: give a run of 'ecoflap prune'")
        if not (self.path / files.METRICS).is_file():
            raise InvalidOption(
                f"{self.path} has no {files.METRICS}, so its run has not ended: finish it with 'ecoflap prune --resume'"
            )
        if samples is not None and samples < 1:
            raise InvalidOption(f"--samples must be at least 1, not {samples}")

    @cached_property
    def recipe(self) -> Recipe:
        """The run's.

        Raises:
            InvalidOption: it can't be read, or runs other code than the user allowed.
        """
        found = Recipe.load(self.path / files.RECIPE, dict(self._code))
        recorded = RunDirectory(self.path).recorded()
        for field, value in self._code.items():
            if recorded.get(field) != value:
                raise InvalidOption(
                    f"{field} of {self.path} is {recorded.get(field)}, not {value}: an analysis must use the run's own"
                )
        return found

    @property
    def folder(self) -> Path:
        """The folder of the analyses."""
        return self.path / files.ANALYSIS

    @cached_property
    def importance(self) -> Importance | None:
        """The run's scores; None if nothing was measured."""
        path = self.path / files.IMPORTANCE
        found = Importance.load(path) if path.is_file() else None
        return found if found is not None and any(score.n for score in found.scores.values()) else None

    @cached_property
    def allocation(self) -> Allocation:
        from ecoflap.allocation.parts import read_allocation

        return read_allocation(self.path / files.ALLOCATION)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The dense model.

        Raises:
            EcoflapError: it can't be loaded, or is not the model of the run.
        """
        from ecoflap.model.fingerprint import fingerprint
        from ecoflap.run.loading import load_checkpoint

        with self._of_the_run("model"):
            found = load_checkpoint(self.recipe, "analyse")
        known = RunDirectory(self.path).recorded().get("fingerprint")
        if known not in (None, fingerprint(found.model)):
            raise InvalidOption(
                f"{self.path}: the model {self.recipe.model or ''} has changed since the run: its fingerprint is not "
                "the one in recipe.yaml"
            )
        return found

    @cached_property
    def pruned(self) -> nn.Module:
        """The sparse model that the run saved."""
        from ecoflap.run.loading import load_checkpoint

        with self._of_the_run("sparse model"):
            pruned = self.recipe.model_copy(update={"model": str(self.path / files.MODEL)})
            found = load_checkpoint(pruned, "analyse")
        model: nn.Module = found.model
        return model

    @cached_property
    def objective(self) -> Objective:
        from ecoflap.data.objectives import on_device, resolve

        return on_device(resolve(self.recipe.objective, self.checkpoint.model))

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """The first batches of the run's calibration data, with :attr:`samples` samples or a few more."""
        from ecoflap.data.batches import first_samples, warn_if_fewer
        from ecoflap.run.prepare import calibration_batches

        if self.recipe.calibration is None and self.recipe.model is not None:
            raise NotApplicable("the run has no calibration data")
        with self._of_the_run("calibration data"):
            batches = calibration_batches(self.recipe, self.checkpoint)[1]
        warn_if_fewer(batches, self.samples)
        return first_samples(batches, self.samples)

    @cached_property
    def samples(self) -> int:
        """Requested number of calibration samples."""
        if self._samples is not None:
            return self._samples
        parameters: int = sum(parameter.numel() for parameter in self.checkpoint.model.parameters())
        most = min(self.recipe.importance_samples, self.recipe.samples)
        return max(1, round(most * min(1.0, FULL_SAMPLES_UP_TO / parameters)))

    @property
    def measured_on(self) -> int:
        """Number of samples in :attr:`batches`."""
        from ecoflap.data.batches import batch_size_of

        return sum(batch_size_of(batch) for batch in self.batches)

    @cached_property
    def anatomy(self) -> Anatomy:
        from ecoflap.run.prepare import find_layers

        return find_layers(self.recipe, self.checkpoint.model, self.batches, self.objective)

    @contextmanager
    def _of_the_run(self, what: str) -> Iterator[None]:
        """Context that adds the run's path to errors of reading its model or data."""
        try:
            yield
        except EcoflapError as error:
            hint = "; paths in its recipe.yaml start where the run was started" if self._has_relative_paths() else ""
            raise type(error)(f"the {what} of {self.path} can't be read: {error}{hint}") from error

    def _has_relative_paths(self) -> bool:
        named = (self.recipe.model, self.recipe.calibration)
        return any(name is not None and not Path(name).expanduser().is_absolute() for name in named)


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Context with eval mode, no KV cache, fp32, and without the user's gradients; all are restored at exit."""
    from ecoflap.model.patching import cache_disabled, gradients_set_aside
    from ecoflap.model.precision import computing_in_fp32
    from ecoflap.model.trace import evaluating

    with ExitStack() as state:
        for manager in (evaluating(model), cache_disabled(model), gradients_set_aside(model), computing_in_fp32(model)):
            state.enter_context(manager)
        yield

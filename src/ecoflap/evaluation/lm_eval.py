"""Runs suites of the lm-eval package as tasks: ``lm_eval:NAME`` is its task or group NAME, on the model in memory.

Adapts lm-eval's wrappers: adds our progress, and images to requests that have them. Imported only with lm-eval.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from torch import nn

from ecoflap.data.model_facts import is_encoder_decoder
from ecoflap.data.prompts import image_processor_of, padding_token, tokenizer_of
from ecoflap.errors import CalibrationError, InvalidOption, MissingDependency
from ecoflap.evaluation.lm_eval_samples import leaves_of, logged
from ecoflap.evaluation.task import Better, Group, Measured, Task, TaskResult, TestData, Unit
from ecoflap.support.progress import Progress
from ecoflap.support.progress import Task as Bar
from ecoflap.support.registry import unknown

PREFIX = "lm_eval:"
_NAMES = {"acc": "accuracy"}  # our names of metrics by lm-eval's


@dataclass(frozen=True)
class Suite(Task):
    """A task or group of lm-eval; its first metric is the result, further ones are ``others``.

    A suite has its own data. Samples: number of questions of each task, the first ones. Sequence length: lm-eval cuts
    longer ones on the left; default the model's. The seed is for the choice of examples.

    Attributes:
        name: of the task or group.
        num_fewshot: number of examples before each question; default the suite's.
        include_path: a folder with your own task files (YAML), which are used before lm-eval's.
        apply_chat_template: use the model's chat format.
    """

    name: ClassVar[str]
    unit: ClassVar[Unit | None] = None  # each metric's, by its name
    better: ClassVar[Better | None] = None

    num_fewshot: int | None = None
    include_path: str | None = None
    apply_chat_template: bool = False

    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            MissingDependency: lm-eval is not installed.
            UnknownName: it has no such task.
            CalibrationError: the suite's data can't be loaded.
            InvalidOption: the model can't run the suite.
        """
        name = self.name
        tokenizer = tokenizer_of(processor)
        if tokenizer is None or not callable(getattr(model, "generate", None)):
            raise InvalidOption(f"{PREFIX}{name} needs a language model with a tokenizer, not {type(model).__name__}")
        with _library(), _generators_kept():
            pass

            screen = Screen(PREFIX + name, test.progress)
            was_training = model.training
            model.eval()
            try:
                with screen.silenced(), padding_token(tokenizer):
                    manager = _find(name, self.include_path)
                    judge = wrapped_for_lm_eval(
                        model, processor, batch_size=test.batch_size, length=test.sequence_length, screen=screen
                    )
                    found = _evaluate(
                        judge, name, manager, num_fewshot=self.num_fewshot, limit=test.samples, seed=test.seed,
                        chat=self.apply_chat_template,
                    )  # fmt: skip
            finally:
                model.train(was_training)
        settings = {
            "suite": name,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "version": found.get("versions", {}).get(name),
            "num_fewshot": found.get("n-shot", {}).get(name, self.num_fewshot),
            "chat_template": self.apply_chat_template,
            "samples": test.samples,
            "seed": test.seed,
            "batch_size": test.batch_size,
            "sequence_length": test.sequence_length,
        }
        return result_of(name, found, settings)


def suite(name: str) -> type[Suite]:
    """The task ``lm_eval:NAME``."""
    return type("Suite", (Suite,), {"name": name})


@contextlib.contextmanager
def _library() -> Iterator[None]:
    try:
        import lm_eval
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"tasks {PREFIX}NAME need the package lm-eval ({error}): pip install 'ecoflap[lm-eval]'"
        ) from error
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Context that restores the state of the global random generators, which lm-eval seeds."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


@lru_cache(maxsize=4)
def _task_manager(include_path: str | None, defaults: bool) -> Any:
    """lm-eval's index of tasks, cached, since reading its 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _find(name: str, include_path: str | None) -> Any:
    """An index of tasks with ``name``: only the user's own, if it contains the task."""
    if include_path is not None and not Path(include_path).is_dir():
        raise InvalidOption(f"task option include_path={include_path}: there is no such folder")
    manager = None
    if include_path is not None:
        manager = _task_manager(include_path, False)
    if manager is None or name not in manager.all_tasks:
        manager = _task_manager(include_path, True)
    if name not in manager.all_tasks:
        error = unknown("task of lm-eval", name, list(manager.all_tasks))
        short = str(error).partition("choose from")[0]
        raise type(error)(f"{short}'lm-eval ls tasks' lists them all")
    return manager


def _evaluate(
    judge: Any, name: str, manager: Any, *, num_fewshot: int | None, limit: int | None, seed: int, chat: bool
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    # It runs git in the current folder, which prints an error outside of a repository.
    no_git = patch("lm_eval.evaluator.get_git_commit_hash", lambda: None, create=True)
    try:
        with no_git:
            found: Mapping[str, Any] = simple_evaluate(
                judge, tasks=[name], num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=True,
                apply_chat_template=chat, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed,
            )  # fmt: skip
    except OSError as error:  # what datasets raises for a hub out of reach, and for a missing file
        raise CalibrationError(
            f"the data of {PREFIX}{name} can't be loaded ({type(error).__name__}: {_line(error)}): it comes from the "
            "hub; load it once with a connection, or give your own task files by include_path"
        ) from error
    except (NotImplementedError, ValueError, TypeError, AssertionError) as error:
        raise InvalidOption(f"lm-eval can't run {PREFIX}{name} on this model: {_line(error)}") from error
    return found


def result_of(name: str, found: Mapping[str, Any], settings: dict[str, Any]) -> TaskResult:
    """lm-eval's result as ours: the first metric, its standard error, all others; groups by their members.

    Raises:
        CalibrationError: it has no number.
    """
    row = found["results"].get(name) or found.get("groups", {}).get(name) or {}
    metrics = _metrics(row)
    members = [member for member in found.get("group_subtasks", {}).get(name, []) if member != name]
    by_group: dict[str, float] = {}
    groups: dict[str, Group] = {}
    counts = found.get("n-samples", {})
    for member in members:
        inner = _metrics(found["results"].get(member, {}))
        if inner:
            first_of = next(iter(inner.values()))
            by_group[member] = first_of.value
            if member in counts:
                groups[member] = Group(int(counts[member]["effective"]), first_of.stderr)
    if not metrics and by_group:  # a group without its own value: the mean of its members
        metrics = {"mean": Measured(sum(by_group.values()) / len(by_group))}
    if not metrics:
        raise CalibrationError(f"{PREFIX}{name} gave no number: choose one of its members")
    leaves = [name] if name in counts else list(counts)
    first, *rest = metrics.items()
    places = leaves_of(found, name)
    samples = {one: logged(found, places, *_key(one, row)) for one in metrics}
    others = {
        one: replace(value, scores=own.scores) if (own := samples[one]) and not own.tokens else value
        for one, value in rest
    }
    own = samples[first[0]]
    return TaskResult(
        PREFIX + name, first[0], first[1].value, first[1].stderr,
        sum(int(counts[leaf]["effective"]) for leaf in leaves),
        settings, by_group or None, None, others, groups=groups or None,
        losses=own.scores if own and own.tokens else None, tokens=(own and own.tokens) or None,
        scores=own.scores if own and not own.tokens else None, kinds=list((own and own.kinds) or ()) or None,
    )  # fmt: skip


def _key(name: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """lm-eval's metric and filter for our name of a metric; two empty strings if it has none."""
    pairs = (key.partition(",")[::2] for key in row if "," in key)
    return next((pair for pair in pairs if _named(*pair) == name), ("", ""))


def _named(metric: str, kind: str) -> str:
    return _NAMES.get(metric, metric) + ("" if kind == "none" else f" ({kind})")


def _metrics(row: Mapping[str, Any]) -> dict[str, Measured]:
    """``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` as ``{"accuracy": Measured(0.5, 0.1)}``."""
    found: dict[str, Measured] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        found[_named(metric, kind)] = Measured(float(value), float(error) if isinstance(error, int | float) else None)
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


class Screen:
    """Hides lm-eval's progress bars, and shows ours while the model runs."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress, self._error = name, progress, sys.stderr
        self._stage: Bar | None = None

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        self._error = sys.stderr
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield

    def responses_to(self, method: Callable[..., Any], requests: list[Any]) -> Any:
        """The result of ``method`` for ``requests``, with a progress bar."""
        with contextlib.redirect_stderr(self._error), self._progress.stage(self._name, len(requests)) as self._stage:
            return method(requests, disable_tqdm=True)

    def advance(self, rows: int) -> None:
        if self._stage is not None:
            self._stage.advance(rows)


class _Shown(HFLM):  # type: ignore[misc]
    """Reports progress for each call of the model."""

    screen: Screen

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.screen.advance(len(inps))
        return logits

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        output = super()._model_generate(context, *args, **kwargs)
        self.screen.advance(len(context))
        return output


class TextModel(_Shown):
    """A language model."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.responses_to(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.responses_to(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.responses_to(super().generate_until, requests)


class SeeingModel(HFMultimodalLM):  # type: ignore[misc]
    """A vision-language model; requests without images (a third argument) are handled as for language models."""

    screen: Screen

    def __init__(self, processor: Any, **options: Any) -> None:
        self._ours = processor
        super().__init__(**options)

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        self.processor, self.tokenizer = self._ours, tokenizer_of(self._ours)

    def _kind_of_requests(self, name: str, requests: list[Any]) -> Callable[..., Any]:
        seen = not requests or len(requests[0].args) > 2
        owner = HFMultimodalLM if seen else HFLM
        return getattr(owner, name).__get__(self)  # type: ignore[no-any-return]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.responses_to(self._kind_of_requests("loglikelihood", requests), requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.responses_to(HFLM.loglikelihood_rolling.__get__(self), requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self.screen.responses_to(self._kind_of_requests("generate_until", requests), requests)


def wrapped_for_lm_eval(
    model: nn.Module, processor: Any, *, batch_size: int, length: int | None, screen: Screen
) -> HFLM:
    """The model in lm-eval's wrapper."""
    options: dict[str, Any] = {
        "pretrained": model,
        "backend": "seq2seq" if is_encoder_decoder(model) else "causal",
        "batch_size": batch_size,
        "max_length": length,
    }
    sees = image_processor_of(processor) is not None
    found = SeeingModel(processor, **options) if sees else TextModel(tokenizer=tokenizer_of(processor), **options)
    found.screen = screen
    return found

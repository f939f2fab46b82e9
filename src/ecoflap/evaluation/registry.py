"""Registers the tasks: a new one is one file and one line here. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ecoflap.support.registry import Registry, dataclass_complaint, unknown

if TYPE_CHECKING:
    from ecoflap.evaluation.task import Task

SUITES = "lm_eval:"  # prefix of the suites of the lm-eval package


class _Tasks(Registry["Callable[..., Task]"]):
    """Our own tasks, and any suite of lm-eval as ``lm_eval:NAME``."""

    def check(self, name: str) -> str:
        if name.startswith(SUITES) and name != SUITES:
            return name
        if name not in self:
            raise unknown(self.kind, name, [*self.names(), SUITES + "NAME"])
        return name

    def get(self, name: str) -> Callable[..., Task]:
        if not name.startswith(SUITES):
            return super().get(name)
        from ecoflap.evaluation.lm_eval import suite

        found: Callable[..., Task] = suite(self.check(name).removeprefix(SUITES))
        return found


def _complaint(made: Any) -> str | None:
    from ecoflap.evaluation.task import Task

    return dataclass_complaint(made, Task)


TASKS = _Tasks(
    "task",
    {
        "vqa": "ecoflap.evaluation.vqa:Vqa",
        "captioning": "ecoflap.evaluation.captioning:Captioning",
        "retrieval": "ecoflap.evaluation.retrieval:Retrieval",
        "zero-shot": "ecoflap.evaluation.zero_shot:ZeroShot",
        "image-classification": "ecoflap.evaluation.image_classification:ImageClassification",
        "knn": "ecoflap.evaluation.knn:Knn",
        "nlvr2": "ecoflap.evaluation.nlvr2:Nlvr2",
        "perplexity": "ecoflap.evaluation.perplexity:Perplexity",
        "answer-perplexity": "ecoflap.evaluation.answer_perplexity:AnswerPerplexity",
        "multiple-choice": "ecoflap.evaluation.multiple_choice:MultipleChoice",
    },
    group="ecoflap.tasks",
    complaint=_complaint,
)

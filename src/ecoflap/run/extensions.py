"""Loads the criteria, importances, tasks and data formats that a user's program or package adds."""

from __future__ import annotations

from typing import Any

from ecoflap.data.registry import FORMATS
from ecoflap.evaluation.registry import TASKS
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.pruning.registry import CRITERIA
from ecoflap.support.registry import Registry, unknown

KINDS: dict[str, Registry[Any]] = {
    "criterion": CRITERIA,
    "importance": IMPORTANCES,
    "task": TASKS,
    "format": FORMATS,
}
# Fields of a recipe that name one; --help lists the installed ones beside ours.
FIELDS = {"criterion": "criterion", "importance": "importance", "task": "task", "calibration": "format"}


def register(kind: str, name: str, target: Any) -> None:
    """Add a criterion, importance, task or data format under ``name``, for this process.

    A package adds its own permanently with entry points: ``ecoflap.criteria``, ``ecoflap.importances``,
    ``ecoflap.tasks``, ``ecoflap.formats``.

    Args:
        kind: ``criterion``, ``importance``, ``task`` or ``format``.
        target: the class (for a format, the :class:`ecoflap.data.registry.Format`), or ``"package.module:attribute"``,
            which is imported at its first use.

    Raises:
        UnknownName: no such kind.
        InvalidOption: the name is taken, or has characters that are not allowed.
        BrokenPlugin: the object lacks an attribute or method of its kind.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, list(KINDS))
    KINDS[kind].add(name, target)


def installed(field: str) -> list[str]:
    """Names that other packages add for a field of the recipe; none of the packages is imported."""
    return KINDS[FIELDS[field]].outside() if field in FIELDS else []

"""Lists the papers to cite for a measure, a criterion, a rule or a choice of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from ecoflap.allocation.rules import RULES
from ecoflap.errors import BrokenPlugin
from ecoflap.importance.registry import IMPORTANCES
from ecoflap.pruning.registry import CRITERIA
from ecoflap.support.citations import PAPERS, Citation
from ecoflap.support.registry import Registry

_BY_KEY = {paper.key: paper for paper in PAPERS}

# Papers of choices within a method; importances, criteria and rules name theirs where they are registered (``cites``).
_CHOICES = {"fisher": ("obd",), "text": ("atv-pruning",), "atv": ("atv-pruning",)}
RECOVERY_PAPERS = ("gptaq", "alps")  # its targets, its solver
_REGISTRIES: tuple[Registry[Any], ...] = (IMPORTANCES, CRITERIA, RULES)


def _cited(name: str) -> tuple[Citation, ...]:
    """The papers that the method ``name`` cites; none if it is unknown or its package can't be imported."""
    keys: tuple[str | Citation, ...] = _CHOICES.get(name, ())
    for registry in _REGISTRIES:
        with suppress(BrokenPlugin):  # the page of a run must not need the package
            keys += tuple(registry.fact(name, "cites", ()))
    papers = [key if isinstance(key, Citation) else _BY_KEY.get(key) for key in keys or (name,)]
    return tuple(paper for paper in papers if paper is not None)


def citations(*names: str | None) -> tuple[Citation, ...]:
    """The papers of the methods ``names``, without repetition, in the order of the names."""
    found = {paper.key: paper for name in names if name is not None for paper in _cited(name)}
    return tuple(found.values())


def paper(key: str) -> Citation | None:
    """The paper of a key: of :data:`PAPERS`, or added by another package; None if it is unknown."""
    if key in _BY_KEY:
        return _BY_KEY[key]
    added = (each for registry in _REGISTRIES for name in registry.outside() for each in _cited(name))
    return next((each for each in added if each.key == key), None)


CITATIONS: Mapping[str, Citation] = MappingProxyType(
    {name: papers[0] for registry in _REGISTRIES for name in registry.own() if (papers := _cited(name))}
    | {name: _BY_KEY[keys[0]] for name, keys in _CHOICES.items()}
    | _BY_KEY
)
"""The first paper of each method, by its name in recipes ("zeroth-order", "wanda", "owl") or by a paper's key."""

"""Citations: each method names its paper, in a form that can be pasted."""

from __future__ import annotations

import re

import pytest

from ecoflap.importance.registry import IMPORTANCES
from ecoflap.pruning.registry import CRITERIA
from ecoflap.run.citations import CITATIONS, citations
from ecoflap.support.citations import PAPERS

OURS = {"uniform", "sensitivity"}  # no paper of others to name


def test_every_method_has_its_paper() -> None:
    for name in {*IMPORTANCES, *CRITERIA} - OURS:
        assert name in CITATIONS, f"{name} has no citation"
        assert citations(name), name


def test_short_forms() -> None:
    assert CITATIONS["wanda"].short == "Sun et al. 2023, arXiv 2306.11695"
    assert CITATIONS["sparsegpt"].short == "Frantar & Alistarh 2023, arXiv 2301.00774"
    assert CITATIONS["iterative-gradient"].short == "LeCun et al. 1989, NeurIPS 1989"
    assert CITATIONS["wanda"].url == "https://arxiv.org/abs/2306.11695"


def test_papers_of_a_recipe_are_named_once_in_order() -> None:
    assert [paper.key for paper in citations("zeroth-order", "proportional", "wanda", None, "uniform")] == [
        "ecoflap",
        "mezo",
        "wanda",
    ]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.key)
def test_entries_are_whole(paper: object) -> None:
    paper = CITATIONS[paper.key]  # type: ignore[attr-defined]
    assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert paper.arxiv is None or int(paper.arxiv[:2]) == paper.year % 100, "the year is that of the arXiv entry"
    assert paper.url.startswith("https://")
    entry = paper.bibtex
    assert entry.count("{") == entry.count("}")
    head, *fields, end = entry.splitlines()
    assert re.fullmatch(r"@(inproceedings|misc)\{[a-z0-9]+,", head)
    assert end == "}"
    assert all(re.fullmatch(r"  \w+ = \{.+\},", field) for field in fields)
    author = next(field for field in fields if field.startswith("  author"))
    assert author.count(" and ") == len(paper.authors) - 1


def test_entry_names_are_unique() -> None:
    heads = [paper.bibtex.splitlines()[0] for paper in PAPERS]
    assert len(set(heads)) == len(heads)

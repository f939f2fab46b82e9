"""The page of a model card: what it says, as one object, and that as Markdown with the Hub's head of YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ecoflap.base_model import README, BaseModel
from ecoflap.citations import Citation
from ecoflap.files import PARTIAL, storage, write_text
from ecoflap.markdown import Raw, escaped, fenced
from ecoflap.report import command, formats

KEPT = "README.base.md"  # a card that lay in the folder already and is not ours
MARKER = Raw("<!-- model card by ecoflap -->")
PLACE = "path/to/this/model"  # what the usage loads; an upload puts the repository's name there


@dataclass(frozen=True)
class Step:
    """One part of the method: what was decided, how, and whose idea that is."""

    what: str
    how: str
    papers: tuple[Citation, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of the quality table, formatted."""

    task: str
    data: str
    metric: str
    n: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        sparsity: as :func:`ecoflap.summary.sparsity_summary` makes it.
        steps: of the method, in their order.
        rows: of the quality table; ``results`` the same for the card's head, of the pruned model alone.
        recipe: fields to values, places shortened; empty where there was none.
        processor: the class of transformers that loads the processor, or None.
    """

    title: str
    base: BaseModel
    model_class: str
    processor: str | None
    sparsity: Mapping[str, Any]
    steps: Sequence[Step]
    tags: Sequence[str]
    rows: Sequence[Row] = ()
    results: Sequence[EvalResult] = ()
    calibration: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def papers(self) -> tuple[Citation, ...]:
        """Each paper of the steps once."""
        return tuple(dict.fromkeys(paper for step in self.steps for paper in step.papers))


def render(card: Card) -> str:
    """The whole file: YAML between two lines of dashes, then Markdown, with every name and value escaped."""
    environment = Environment(
        loader=PackageLoader("ecoflap"),
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sparsity = card.sparsity
    body = environment.get_template("card.md.j2").render(
        card=card,
        marker=MARKER,
        zeros=sum(tower["zeros"] for tower in sparsity["towers"].values()),
        version=card.environment.get("ecoflap", ""),
        usage=fenced(_usage(card), "python"),
        bibtex=fenced("\n\n".join(paper.bibtex for paper in card.papers), "bibtex"),
        command=fenced(command.reproduce(card.recipe), "sh") if card.recipe else "",
        recipe=fenced(yaml.safe_dump(dict(card.recipe), sort_keys=False, allow_unicode=True), "yaml"),
        percent=formats.percent,
        integer=formats.integer,
        hub=lambda name: Raw(f"https://huggingface.co/{name}"),
        cited=_cited,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return str(ModelCard(f"---\n{_head(card).to_yaml()}\n---\n\n{body}\n").content)


def _cited(papers: Sequence[Citation]) -> Raw:
    links = "; ".join(f"[{escaped(paper.names)} {paper.year}]({paper.url})" for paper in papers)
    return Raw(f" ({links})" if links else "")


def _head(card: Card) -> ModelCardData:
    name = card.title if card.results else None  # the head's model-index needs one
    return ModelCardData(
        base_model=card.base.hub_id,
        library_name="transformers",
        tags=list(card.tags),
        model_name=name,
        eval_results=list(card.results) or None,
        **card.base.card,
    )


def _usage(card: Card) -> str:
    classes = sorted({card.model_class, card.processor} - {None}, key=str)
    lines = [f"from transformers import {', '.join(map(str, classes))}", ""]
    lines.append(f'model = {card.model_class}.from_pretrained("{PLACE}")')
    if card.processor:
        lines.append(f'processor = {card.processor}.from_pretrained("{PLACE}")')
    return "\n".join(lines)


def addressed(text: str, repo_id: str) -> str:
    """A card whose usage loads ``repo_id`` where it says so of no place yet."""
    return text.replace(f'"{PLACE}"', f'"{repo_id}"')


def processor_class(folder: Path) -> str | None:
    """The class of transformers that loads the processor saved in ``folder``; None without one."""
    has = {name: (folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor", "tokenizer")}
    if has["processor"] or (has["preprocessor"] and has["tokenizer"]):
        return "AutoProcessor"
    return "AutoTokenizer" if has["tokenizer"] else "AutoImageProcessor" if has["preprocessor"] else None


def put(folder: Path, card: Card) -> Path:
    """Write ``card`` as README.md of ``folder`` in one step; a README that is not of ours is kept beside it.

    Returns:
        The card's path.

    Raises:
        StorageError: it can't be written; what was there is as it was.
    """
    path = folder / README
    with storage(path):
        for left in folder.glob(f".{README}.*{PARTIAL}"):  # by a process that was killed
            left.unlink()
        if path.is_file() and MARKER not in path.read_text("utf-8", errors="replace"):
            path.rename(_free(folder))
    write_text(path, render(card))
    return path


def _free(folder: Path) -> Path:
    names = [KEPT, *(f"README.base-{number}.md" for number in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())

"""Defines the content of a model card, and renders it as Markdown with the Hub's YAML head; escapes all text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ecoflap.report import records
from ecoflap.report.places import cached_id
from ecoflap.support import formats
from ecoflap.support.citations import Citation
from ecoflap.support.files import PARTIAL, storage, write_text

README = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TEXTS = ("license", "license_name", "license_link", "pipeline_tag")


@dataclass(frozen=True)
class BaseModel:
    """The dense model in a card.

    Attributes:
        name: for readers; only the last part of a local path, since a card may be published.
        hub_id: on the Hub, or None.
        card: fields of its own card's head that also apply to the pruned model: licence, task, language.
    """

    name: str
    hub_id: str | None = None
    card: dict[str, Any] = field(default_factory=dict)


def base_model(source: str | None) -> BaseModel:
    """The model that a recipe's ``model`` names: a local folder or file, a Hub id, or None for the embedded model.

    Nothing is downloaded: for a Hub id, the snapshot in the cache is read.
    """
    if source is None:
        from ecoflap.support import embedded

        return BaseModel("embedded VLM of ecoflap", None, _readme_head(Path(embedded.model_path()) / README))
    path = Path(source).expanduser()
    if path.exists() or path.is_absolute() or not _HUB_ID.fullmatch(source):
        folder = path.parent if path.suffix == ".gguf" else path
        hub_id = cached_id(str(path.absolute()))
        return BaseModel(hub_id or path.absolute().name, hub_id, _licence_at(_readme_head(folder / README), hub_id))
    cached = huggingface_hub.try_to_load_from_cache(source, README)
    head = _readme_head(Path(cached)) if isinstance(cached, str) else {}
    return BaseModel(source, source, _licence_at(head, source))


def _readme_head(path: Path) -> dict[str, Any]:
    """The fields of a card's head for the new card; none if there is no readable card."""
    try:
        found = huggingface_hub.metadata_load(path) if path.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(found, dict):
        return {}
    card: dict[str, Any] = {name: found[name] for name in _TEXTS if isinstance(found.get(name), str)}
    language = found.get("language")
    languages = [language] if isinstance(language, str) else language
    if isinstance(languages, list) and languages and all(isinstance(entry, str) for entry in languages):
        card["language"] = languages
    return card


def _licence_at(card: dict[str, Any], hub_id: str | None) -> dict[str, Any]:
    """Replace a relative link to the base model's licence file by its address, or remove it."""
    link = card.get("license_link")
    if link is None or re.match(r"https?://", link):
        return card
    rest = {name: value for name, value in card.items() if name != "license_link"}
    return {**rest, "license_link": f"https://huggingface.co/{hub_id}/blob/main/{link}"} if hub_id else rest


# Characters of markup inside a line. Lists and headings are markup only at the beginning of a line.
_MARKS = re.compile(r"([\\`*_{}\[\]#|~$@])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029]")


class Raw(str):
    """Markdown that is not escaped again."""

    __slots__ = ()


def escaped(value: Any) -> Raw:
    """``value`` as one line of plain text, without markup, HTML, cell borders and links."""
    if isinstance(value, Raw):
        return value
    text = _MARKS.sub(r"\\\1", re.sub(r"[ \t\n]+", " ", _CONTROLS.sub(" ", str(value))).strip(" "))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Raw(text.replace("://", ":&#47;/").replace("www.", "www&#46;"))  # bare addresses would become links


def fenced(text: str, language: str = "") -> Raw:
    """``text`` as a code block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = _CONTROLS.sub("�", text.replace("\r\n", "\n")).rstrip("\n")
    return Raw(f"{fence}{language}\n{body}\n{fence}")


KEPT = "README.base.md"  # new name of an existing card that ecoflap did not write
MARKER = Raw("<!-- model card by ecoflap -->")
PLACE = "path/to/this/model"  # in the usage; an upload replaces it by the repository's name


@dataclass(frozen=True)
class Step:
    """One step of the method: its name, a description, and its papers."""

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
    change: str = ""
    uniform: str = ""


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        sparsity: from :func:`ecoflap.run.provenance.sparsity_summary`.
        steps: of the method, in order.
        rows: of the quality table; ``results`` are the pruned model's for the card's head.
        recipe: values by field, with shortened paths; empty if there was none.
        processor: the class of transformers that loads the processor, or None.
        trained: the model was fine-tuned after pruning.
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
    trained: bool = False

    @property
    def papers(self) -> tuple[Citation, ...]:
        """The papers of all steps, without repetition."""
        return tuple(dict.fromkeys(paper for step in self.steps for paper in step.papers))


@cache
def _template() -> Template:
    """The card's template with every value escaped as Markdown, compiled once."""
    environment = Environment(
        loader=PackageLoader("ecoflap.report"),
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("card.md.j2")


def render(card: Card) -> str:
    """The whole file: YAML between two lines of dashes, then Markdown, with every name and value escaped."""
    sparsity = card.sparsity
    body = _template().render(
        card=card,
        marker=MARKER,
        zeros=sum(tower["zeros"] for tower in sparsity["towers"].values()),
        version=card.environment.get("ecoflap", ""),
        usage=fenced(_usage(card), "python"),
        bibtex=fenced("\n\n".join(paper.bibtex for paper in card.papers), "bibtex"),
        command=fenced(records.reproduce(card.recipe), "sh") if card.recipe else "",
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


def with_repository(text: str, repo_id: str) -> str:
    """The card with ``repo_id`` in its usage instead of :data:`PLACE`."""
    return text.replace(f'"{PLACE}"', f'"{repo_id}"')


def processor_class(folder: Path) -> str | None:
    """The class of transformers that loads the processor in ``folder``; None if there is none."""
    has = {name: (folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor", "tokenizer")}
    if has["processor"] or (has["preprocessor"] and has["tokenizer"]):
        return "AutoProcessor"
    return "AutoTokenizer" if has["tokenizer"] else "AutoImageProcessor" if has["preprocessor"] else None


def write_readme(folder: Path, card: Card) -> Path:
    """Atomically write ``card`` as README.md of ``folder``, and return its path; a foreign README is renamed.

    Raises:
        StorageError: it can't be written; an earlier file is unchanged.
    """
    path = folder / README
    with storage(path):
        for left in folder.glob(f".{README}.*{PARTIAL}"):  # left by a process that was killed
            left.unlink()
        if path.is_file() and MARKER not in path.read_text("utf-8", errors="replace"):
            path.rename(_free(folder))
    write_text(path, render(card))
    return path


def _free(folder: Path) -> Path:
    names = [KEPT, *(f"README.base-{number}.md" for number in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())

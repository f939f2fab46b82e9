"""The model that a pruned one comes from: its name, its place on the Hub, and what its own card says of its licence."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

README = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_TEXTS = ("license", "license_name", "license_link", "pipeline_tag")


@dataclass(frozen=True)
class BaseModel:
    """What is known of the dense model.

    Attributes:
        name: for readers; of a local folder its last part alone, since a card is made to be published.
        hub_id: on the Hub, or None.
        card: the fields of its own card's head that hold for the pruned model too: licence, task, language.
    """

    name: str
    hub_id: str | None = None
    card: dict[str, Any] = field(default_factory=dict)


def base_model(source: str | None) -> BaseModel:
    """What a recipe's ``model`` names: a local folder or file, a Hub id, or None for the embedded model.

    Nothing is downloaded: of a Hub id the snapshot in the cache is read.
    """
    if source is None:
        from ecoflap import demo

        return BaseModel("embedded VLM of ecoflap", None, _head(Path(demo.model_path()) / README))
    path = Path(source).expanduser()
    if path.exists() or path.is_absolute() or not _HUB_ID.fullmatch(source):
        folder = path.parent if path.suffix == ".gguf" else path
        snapshot = _SNAPSHOT.search(f"{path.absolute()}/")
        hub_id = "/".join(snapshot.groups()) if snapshot else None
        return BaseModel(hub_id or path.absolute().name, hub_id, _licence_at(_head(folder / README), hub_id))
    cached = huggingface_hub.try_to_load_from_cache(source, README)
    head = _head(Path(cached)) if isinstance(cached, str) else {}
    return BaseModel(source, source, _licence_at(head, source))


def _head(path: Path) -> dict[str, Any]:
    """The fields of a card's head that are passed on; none where there is no card, or one that can't be read."""
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
    """A licence file that is named by its place beside the base is named by its address, or not at all."""
    link = card.get("license_link")
    if link is None or re.match(r"https?://", link):
        return card
    rest = {name: value for name, value in card.items() if name != "license_link"}
    return {**rest, "license_link": f"https://huggingface.co/{hub_id}/blob/main/{link}"} if hub_id else rest

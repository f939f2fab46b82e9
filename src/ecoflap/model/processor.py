"""Loads a checkpoint's processor, without the video processor if torchvision is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin

from ecoflap.errors import CheckpointError
from ecoflap.model.files import Files
from ecoflap.support.reading import read_json
from ecoflap.support.text import first_line

_log = logging.getLogger(__name__)

_SETTINGS = (
    "video_preprocessor_config.json",
    "preprocessor_config.json",
)  # files that may have the video processor's settings


class NoVideo(VideoProcessorMixin):  # type: ignore[misc]
    """Replaces a video processor: keeps its settings, so that they are saved unchanged, and processes no video."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("_settings", {})
        if name in settings or name in VideosKwargs.__annotations__:
            return settings.get(name)
        raise AttributeError(f"this processor's video processor was not loaded, so it has no {name}")

    def __call__(self, *videos: Any, **options: Any) -> Any:
        raise NotImplementedError("this processor's video processor was not loaded: pip install torchvision")

    def to_dict(self) -> dict[str, Any]:
        return dict(self._settings)


def without_video(processor_class: Any) -> Any:
    """A subclass with the same name that accepts a :class:`NoVideo`."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideo):
            return NoVideo
        return processor_class.check_argument_for_proper_class(self, name, argument)

    body = {"check_argument_for_proper_class": check, "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), body)


def load_without_video(folder: Path, options: dict[str, Any]) -> Any | None:
    """The processor that ``folder`` describes, with a :class:`NoVideo`; None if its class has no video processor.

    Args:
        options: of ``from_pretrained``.
    """
    found = _read(folder / "processor_config.json")
    name = found.get("processor_class") or next(
        (
            values["processor_class"]
            for file in (*_SETTINGS, "tokenizer_config.json")
            if (values := _read(folder / file)).get("processor_class")
        ),
        None,
    )
    processor_class = getattr(transformers, str(name), None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
        return None
    settings, _ = processor_class.get_processor_dict(folder, **options)
    video = settings.get("video_processor") or next((v for file in _SETTINGS if (v := _read(folder / file))), {})
    halves = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    arguments = [
        NoVideo(video) if half == "video_processor" else halves[half].from_pretrained(folder, **options)
        for half in processor_class.get_attributes()
    ]
    return without_video(processor_class).from_args_and_dict(arguments, settings)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    values = read_json(file, "the processor's file", CheckpointError, finite=False)
    return values if isinstance(values, dict) else {}


_PROCESSORS = ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json",
                    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # fmt: skip


def load_processor(files: Files, trust_remote_code: bool) -> tuple[Any | None, list[str]]:
    """The first of processor, tokenizer, image processor that can be loaded, and a line if it is not the processor."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    kinds: tuple[str, ...] = _PROCESSORS
    if files.gguf_file is not None:
        options["gguf_file"] = files.gguf_file
        kinds = ("AutoTokenizer",)
    elif not any((files.folder / name).is_file() for name in _PROCESSOR_FILES):
        return None, []
    reasons: list[str] = []
    for kind in kinds:
        try:
            found = getattr(transformers, kind).from_pretrained(files.folder, **options)
        except Exception as error:  # the folder has another kind
            reasons.append(first_line(error))
            if kind == "AutoProcessor" and (found := _without_video(files.folder, options)) is not None:
                why = reasons[0].partition(". ")[0]  # without the instructions for installing, which have several lines
                return found, [f"the processor in '{files.folder}' reads no videos here ({why}); images it does"]
            continue
        return found, [f"only a {kind[4:].lower()} could be loaded: {reason}" for reason in reasons[:1]]
    return None, [f"the processor in '{files.folder}' cannot be loaded ({reasons[0]}): texts and images need one"]


def _without_video(folder: Path, options: dict[str, Any]) -> Any | None:
    """The processor without its video processor; None if it has none, or if something else failed."""
    try:
        return load_without_video(folder, options)
    except Exception:  # the first error is reported
        return None

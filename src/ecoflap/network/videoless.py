"""A checkpoint's processor without its video half, for pictures where what reads videos (torchvision) is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin

_SETTINGS = ("video_preprocessor_config.json", "preprocessor_config.json")  # where the video half's settings may stand


class NoVideo(VideoProcessorMixin):  # type: ignore[misc]
    """Stands where a video processor should: keeps its settings, to be saved as they came, and reads no video."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = dict(settings)

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("_settings", {})
        if name in settings or name in VideosKwargs.__annotations__:
            return settings.get(name)
        raise AttributeError(f"the video half of this processor was not loaded, so it has no {name}")

    def __call__(self, *videos: Any, **options: Any) -> Any:
        raise NotImplementedError("the video half of this processor was not loaded: pip install torchvision")

    def to_dict(self) -> dict[str, Any]:
        return dict(self._settings)


def without_video(processor_class: Any) -> Any:
    """The same class, of the same name, that takes a :class:`NoVideo`."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideo):
            return NoVideo
        return processor_class.check_argument_for_proper_class(self, name, argument)

    body = {"check_argument_for_proper_class": check, "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), body)


def load_without_video(folder: Path, options: dict[str, Any]) -> Any | None:
    """The processor that ``folder`` describes with a :class:`NoVideo`; None if its class has no video half.

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
    values = json.loads(file.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}

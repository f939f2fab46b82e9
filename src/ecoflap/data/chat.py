"""Reads chats (transformers' ``messages``, LLaVA's ``conversations``) and turns them into chat-template input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ecoflap.data.images import BrokenSample
from ecoflap.data.sample import Sample

ROLES = {
    "user": "user", "human": "user", "system": "system", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip

MARKER = "<image>"


@dataclass(frozen=True)
class Chat:
    """A chat up to its last answer.

    Attributes:
        messages: the turns before the answer, in transformers' format with content parts.
        text: the last answer.
        question: the last message of the user.
        prompt: all text before the answer, for models without a chat template.
        images: the data set's value for each ``{"type": "image"}`` part, in order.
    """

    messages: tuple[Mapping[str, Any], ...]
    text: str
    question: str
    prompt: str
    images: tuple[Any, ...]


def read_chat(turns: Any, images: Any) -> Chat:
    """The chat of one row.

    Args:
        turns: a list of ``{"role", "content"}`` or ``{"from", "value"}``; content is text with ``<image>`` at the place
            of an image, or a list of parts.
        images: the row's image or list of images, or None. They are put at the marked places in order; if there are no
            such places, before the first text of the user.

    Raises:
        BrokenSample: there is no answer, an unknown role, or another number of images than of places.
    """
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise BrokenSample("the chat is not a list of turns")
    held = [] if images is None or images == "" else list(images) if isinstance(images, (list, tuple)) else [images]
    read = [(_role(turn), list(_parts(turn))) for turn in turns]
    last = max((number for number, (role, _) in enumerate(read) if role == "assistant"), default=-1)
    answer = _text_of_parts(read[last][1]) if last >= 0 else ""
    if not answer:
        raise BrokenSample("the chat has no answer")
    before = read[:last]
    asked = next((parts for role, parts in before if role == "user"), None)
    if asked is None:
        raise BrokenSample("the chat has no question of the user")
    if not any(part["type"] == "image" for _, parts in before for part in parts):
        asked[:0] = [{"type": "image", "held": None} for _ in held]
    pictures: list[Any] = []
    unused = iter(held)
    for part in (part for _, parts in before for part in parts if part["type"] == "image"):
        picture = part.pop("held")
        pictures.append(next(unused, None) if picture is None else picture)
    if any(picture is None for picture in pictures) or next(unused, None) is not None:
        raise BrokenSample(f"the chat has places for {len(pictures)} images, but there are {len(held)}")
    return Chat(
        messages=tuple({"role": role, "content": parts} for role, parts in before),
        text=answer,
        question=next(_text_of_parts(parts) for role, parts in reversed(before) if role == "user"),
        prompt="\n".join(text for _, parts in before if (text := _text_of_parts(parts))),
        images=tuple(pictures),
    )


def _role(turn: Mapping[str, Any]) -> str:
    name = str(turn.get("role") or turn.get("from"))
    if name.lower() not in ROLES:
        raise BrokenSample(f"the chat has a turn of unknown role '{name}'")
    return ROLES[name.lower()]


def _parts(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    for part in content if isinstance(content, (list, tuple)) else [content]:
        if isinstance(part, str):
            yield from _marked(part)
        elif isinstance(part, dict) and "text" in str(part.get("type")):  # text, input_text
            yield from _text(str(part.get("text") or ""))
        elif isinstance(part, dict) and "image" in str(part.get("type")):  # image, image_url, input_image
            yield {"type": "image", "held": _picture_of_part(part)}
        elif part is not None:
            raise BrokenSample(f"the chat holds {part.get('type') if isinstance(part, dict) else type(part).__name__}")


def _picture_of_part(part: Mapping[str, Any]) -> Any:
    """The part's own reference to its image; None if the image is in a column of the row."""
    held = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
    return held.get("url") if isinstance(held, dict) and "url" in held else held


def _marked(text: str) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(text.split(MARKER)):
        if number:
            yield {"type": "image", "held": None}
        yield from _text(piece)


def _text(text: str) -> Iterator[dict[str, Any]]:
    if text.strip():
        yield {"type": "text", "text": text.strip()}


def _text_of_parts(parts: list[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


Turn = dict[str, Any]


def turns_of(sample: Sample, *, parts: bool) -> list[Turn]:
    """The turns before the answer: the sample's own ``messages``, or one turn of the user with images and prompt.

    Args:
        parts: give each content as a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``, for the
            templates of processors; otherwise as a string, for the templates of tokenizers.
    """
    if sample.messages:
        turns = [{**turn, "content": _turn_parts(turn.get("content"))} for turn in sample.messages]
    else:
        content = [{"type": "image"} for _ in sample.images]
        content += [{"type": "text", "text": sample.prompt}] if sample.prompt else []
        turns = [{"role": "user", "content": content}]
    return turns if parts else [{**turn, "content": words_of(turn["content"])} for turn in turns]


def answer_turn(answer: str, *, parts: bool) -> Turn:
    """The turn in which the model says ``answer``."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}] if parts else answer}


def plain_prompt(sample: Sample) -> str:
    """The prompt of a model without a chat template: all text, one line per turn."""
    if not sample.messages:
        return sample.prompt or ""
    return "\n".join(words_of(_turn_parts(turn.get("content"))) for turn in sample.messages)


def words_of(content: Sequence[Mapping[str, Any]]) -> str:
    """The text parts of a content, in a line."""
    return " ".join(str(part["text"]) for part in content if part.get("type") == "text")


def _turn_parts(content: Any) -> list[dict[str, Any]]:
    """A content as parts; images lose their addresses, since they are passed separately."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    found = [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in content or ()]
    return [{"type": "image"} if part.get("type") in ("image", "image_url") else part for part in found]

"""Turns of a conversation as chat templates take them: parts for a processor, plain text for a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ecoflap.calibration.sample import Sample

Turn = dict[str, Any]


def turns_of(sample: Sample, *, parts: bool) -> list[Turn]:
    """What comes before the answer: the sample's own ``messages``, or one turn of the user with pictures and prompt.

    Args:
        parts: each content as a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``, which processors'
            templates want; otherwise as a string, which tokenizers' templates want.
    """
    if sample.messages:
        turns = [{**turn, "content": _parts(turn.get("content"))} for turn in sample.messages]
    else:
        content = [{"type": "image"} for _ in sample.images]
        content += [{"type": "text", "text": sample.prompt}] if sample.prompt else []
        turns = [{"role": "user", "content": content}]
    return turns if parts else [{**turn, "content": words_of(turn["content"])} for turn in turns]


def answer_turn(answer: str, *, parts: bool) -> Turn:
    """The turn in which the model says ``answer``."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}] if parts else answer}


def plain_prompt(sample: Sample) -> str:
    """The prompt of a model without a chat template: all that was said, a line each turn."""
    if not sample.messages:
        return sample.prompt or ""
    return "\n".join(words_of(_parts(turn.get("content"))) for turn in sample.messages)


def words_of(content: Sequence[Mapping[str, Any]]) -> str:
    """The text parts of a content, in a line."""
    return " ".join(str(part["text"]) for part in content if part.get("type") == "text")


def _parts(content: Any) -> list[dict[str, Any]]:
    """A content as parts; pictures lose their addresses, since they are handed over beside the text."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    found = [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in content or ()]
    return [{"type": "image"} if part.get("type") in ("image", "image_url") else part for part in found]

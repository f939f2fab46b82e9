"""Computes embeddings of images and texts, and the matching scores of models with a matching head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ecoflap.data.encode import encode_pairs, encode_texts
from ecoflap.data.model_facts import is_dual_tower, parameters_of, to_device
from ecoflap.data.objectives.matching import SCORES, matching_argument
from ecoflap.data.prompts import image_processor_of, tokenizer_of
from ecoflap.data.sample import Sample
from ecoflap.errors import InvalidOption
from ecoflap.evaluation.task import image_inputs
from ecoflap.model.patching import Forward, forward_replaced

# Methods that embed an image and a text: transformers' name, and that of OpenAI's and EVA's implementations.
METHODS = (("get_image_features", "get_text_features"), ("encode_image", "encode_text"))
# Projections of the first token of image and text in retrieval models without embeddings in their output.
PROJECTIONS = ("vision_proj", "text_proj")


class Embedder(Protocol):
    """Embeds images and texts into one space; rows have length 1, in fp32 on the CPU."""

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """``[B, D]``, or ``[B, Q, D]`` for a model with Q queries, the best of which counts."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """``[B, D]``."""


def embedder_of(model: nn.Module, processor: Any, task: str) -> TwoTowers | Matcher:
    """The embedder for this model.

    Raises:
        InvalidOption: the model has neither two towers nor a retrieval head, or its processor is incomplete.
    """
    if image_processor_of(processor) is None or tokenizer_of(processor) is None:
        raise InvalidOption(f"task '{task}' needs a processor with both an image processor and a tokenizer")
    if matching_argument(model) is not None:
        return Matcher(model, processor)
    for picture, text in METHODS:
        both = callable(getattr(model, picture, None)) and callable(getattr(model, text, None))
        if both and (is_dual_tower(model) or picture == "encode_image"):
            return TwoTowers(model, processor, getattr(model, picture), getattr(model, text), task)
    raise InvalidOption(
        f"task '{task}' needs a model that compares images with texts (CLIP, SigLIP, BLIP for retrieval), "
        f"not {type(model).__name__}"
    )


def similarity(pictures: Tensor, texts: Tensor) -> Tensor:
    """Cosines ``[B images, T texts]``; for an image with several queries, the largest (BLIP-2)."""
    if pictures.ndim == 2:
        return pictures @ texts.t()
    best = pictures[:, 0] @ texts.t()
    for query in range(1, pictures.shape[1]):
        best = torch.maximum(best, pictures[:, query] @ texts.t())
    return best


class TwoTowers:
    """A model with a method for images and one for texts (CLIP, SigLIP, EVA-CLIP)."""

    def __init__(
        self, model: nn.Module, processor: Any, picture: Callable[..., Any], text: Callable[..., Any], task: str
    ) -> None:
        self._model, self._processor, self._task = model, processor, task
        self._picture, self._text = picture, text

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        return self._embed(self._picture, image_inputs(self._processor, images, self._task), "pixel_values")

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self._embed(self._text, encode_texts(texts, self._model, self._processor), "input_ids")

    def _embed(self, method: Callable[..., Any], inputs: dict[str, Any], main: str) -> Tensor:
        placed = to_device(inputs, self._model)
        wanted = inspect.signature(method).parameters
        output = method(placed.pop(main), **{name: value for name, value in placed.items() if name in wanted})
        if not isinstance(
            output, Tensor
        ):  # newer versions give the tower's output with the projected vector as pooler_output
            output = output.pooler_output
        return normalize(output.float(), dim=-1).cpu()


class Matcher:
    """A retrieval model whose forward either compares embeddings (ITC) or takes image and text together (ITM).

    With ``keep`` the encoded images are stored on the CPU in the model's dtype, so that :meth:`match` does not encode
    them again for each text.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._argument = str(matching_argument(model))
        self._blank = Image.new("RGB", (32, 32))
        encoders = [child for child in model.children() if "pixel_values" in parameters_of(child)]
        self._encoder = encoders[0]
        self.keep = False
        self._kept: list[Tensor] = []

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        seen: list[Tensor] = []
        inputs = encode_pairs([Sample((image,)) for image in images], ["a"], self._model, self._processor)
        with forward_replaced(self._encoder, lambda forward: _heard(forward, seen)):
            output = self._model(**to_device(inputs, self._model), **{self._argument: False})
        if self.keep:
            self._kept += list(seen[0].cpu())
        return self._vectors(output, "image_embeds", "last_hidden_state", PROJECTIONS[0])

    def texts(self, texts: Sequence[str]) -> Tensor:
        output = self._model(**self._read(texts), **{self._argument: False})
        return self._vectors(output, "text_embeds", "question_embeds", PROJECTIONS[1])

    def match(self, pictures: Sequence[int], texts: Sequence[str]) -> Tensor:
        """Logits ``[B]`` that ``texts[i]`` matches the image that was embedded as number ``pictures[i]``."""
        inputs = self._read(texts)
        device = inputs["input_ids"].device
        seen = torch.stack([self._kept[i] for i in pictures]).to(device)

        def recall(forward: Forward) -> Forward:
            return lambda *args, **kwargs: BaseModelOutputWithPooling(last_hidden_state=seen)

        with forward_replaced(self._encoder, recall):
            output = self._model(**inputs, **{self._argument: True})
        scores: Tensor = next(
            getattr(output, name) for name in SCORES if isinstance(getattr(output, name, None), Tensor)
        )
        return scores[:, 1].float().cpu()

    def _read(self, texts: Sequence[str]) -> dict[str, Any]:
        """Inputs of texts with a blank image: the processor may put image tokens before the texts."""
        return to_device(encode_pairs([Sample((self._blank,))], texts, self._model, self._processor), self._model)

    def _vectors(self, output: Any, embeddings: str, hidden: str, projection: str) -> Tensor:
        found = getattr(output, embeddings, None)
        if not isinstance(found, Tensor):
            found = getattr(self._model, projection)(getattr(output, hidden)[:, 0])
        return normalize(found.float(), dim=-1).cpu()


def _heard(forward: Forward, seen: list[Tensor]) -> Forward:
    def encode(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output[0])
        return output

    return encode

"""Weighted nearest neighbours: measures how well the features of a backbone without a head separate classes.

Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, with the
setting of Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021: each of the k
nearest training images votes for its class with weight exp(cosine / 0.07).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ecoflap.data.encode import encode_texts, sentence_of
from ecoflap.data.model_facts import parameters_of, takes_images, to_device
from ecoflap.data.objectives.supervised_contrastive import mean_over_tokens
from ecoflap.data.prompts import tokenizer_of
from ecoflap.errors import CalibrationError, InvalidOption
from ecoflap.evaluation.classes import TopClasses, check_classes, label_names
from ecoflap.evaluation.embeddings import embedder_of
from ecoflap.evaluation.task import (
    Chunk,
    Shared,
    Task,
    TaskResult,
    TestData,
    Unit,
    check_finite,
    common_settings,
    image_inputs,
    in_chunks,
    open_data,
    pictures,
)
from ecoflap.model.trace import evaluating
from ecoflap.support.registry import unknown

POOLS = ("cls", "mean")
Embed = Callable[[Chunk, str], Tensor]  # samples and their source -> [B, D], rows of length 1, fp32 on the CPU


@dataclass(frozen=True)
class Knn(Task):
    """Top-1 and top-5 accuracy by the nearest labelled images, or texts for a text model.

    Data: test images or texts with a class each; columns and image folder are for both data sets. The sequence length
    has no effect.

    Attributes:
        train: source of the labelled samples.
        train_samples: number of labelled samples, drawn with the seed; None for all.
        k: number of neighbours that vote.
        temperature: of the weights exp(cosine / temperature).
        layer: index of the hidden state (0: the embeddings, -1: the last block's); None for the model's last one,
            normalised. Two-tower models give their image embedding.
        pool: ``cls``, the first token; ``mean``, the mean over all tokens (or positions of a feature map); default
            ``cls`` for images and ``mean`` for texts.
    """

    unit: ClassVar[Unit] = "%"
    hub_type: ClassVar[str] = "image-feature-extraction"
    takes: ClassVar[tuple[str, ...]] = ("columns", "image_folder")

    train: str | None = None
    train_samples: int | None = None
    k: int = 20
    temperature: float = 0.07
    layer: int | None = None
    pool: str | None = None

    @torch.no_grad()
    def run(self, model: nn.Module, processor: Any, test: TestData) -> TaskResult:
        """As :meth:`Task.run`.

        Raises:
            InvalidOption: there are no labelled samples, a number is out of range, or there is no such layer.
            UnknownName: no such pool.
            CalibrationError: there are no images or labels.
            NonFiniteLoss: a feature is NaN or infinite.
        """
        k, temperature, layer = self.k, self.temperature, self.layer
        if not self.train:
            raise InvalidOption("task 'knn' needs labelled samples that vote: give --task-option train=SOURCE")
        if k < 1 or temperature <= 0:
            raise InvalidOption(f"k must be at least 1 and the temperature above 0, not {k} and {temperature}")
        if self.pool is not None and self.pool not in POOLS:
            raise unknown("pool", self.pool, list(POOLS))
        pool = self.pool or ("cls" if takes_images(model) else "mean")
        embed = _embedding(model, processor, layer, pool)
        reader = open_data("knn", test)
        voters = open_data("knn", replace(test, data=self.train, samples=self.train_samples))
        names: list[str] = []  # in order of occurrence; a class without labelled samples is never predicted
        numbers: dict[str, int] = {}

        def classes_of(part: Chunk, source: str) -> Tensor:
            for label in label_names(part, "knn", source):
                if numbers.setdefault(label.lower(), len(names)) == len(names):
                    names.append(label)
            return torch.tensor([numbers[label.lower()] for label in label_names(part, "knn", source)])

        found = TopClasses("knn", names)
        classes: list[Tensor] = []
        known: Shared[Tensor] = Shared(test.workers)

        def scores(part: Chunk) -> Tensor:
            seen = embed(part, reader.source)
            check_finite(seen, "a feature", reader.source)
            return weighted_votes(seen @ features.t(), votes, len(names), k, temperature)

        with evaluating(model):
            for part in in_chunks(voters, test.batch_size, test.progress, "knn, training samples"):
                classes.append(classes_of(part, voters.source))
                known.add(partial(embed, part, voters.source))
            features, votes = torch.cat(known.all()), torch.cat(classes)
            check_finite(features, "a feature", voters.source)
            check_classes(names, "knn", voters.source)
            found.classify(reader, test, lambda part: classes_of(part, reader.source), scores)
        settings = {"train": voters.source, "train_samples": self.train_samples, "k": k, "temperature": temperature}
        more: dict[str, Any] = {"voters": len(votes), "layer": layer, "pool": pool}
        return found.result(common_settings(reader, test, **settings, **more))


def weighted_votes(cosines: Tensor, classes: Tensor, count: int, k: int, temperature: float) -> Tensor:
    """Votes for each class ``[B, C]`` from cosines ``[B, N]`` with N images of ``classes`` ``[N]``.

    Weights are divided by that of the nearest image, so that they never overflow; the order is the same.
    """
    near = cosines.topk(min(k, cosines.shape[1]), dim=1)
    weights = ((near.values - near.values[:, :1]) / temperature).exp()
    votes = torch.zeros(len(cosines), count)
    return votes.scatter_add_(1, classes[near.indices], weights)


def _embedding(model: nn.Module, processor: Any, layer: int | None, pool: str) -> Embed:
    parameters = parameters_of(model)
    if "pixel_values" in parameters and "input_ids" not in parameters:
        return partial(_pictures, model, processor, layer, pool)
    if "input_ids" in parameters and not takes_images(model):
        return partial(_texts, model, processor, layer, pool)
    if layer is not None:
        raise InvalidOption(f"{type(model).__name__} is no backbone of one tower: its image embedding has no layers")
    embed = embedder_of(model, processor, "knn").pictures
    return lambda part, source: embed(pictures(part, "knn", source))


def _pictures(model: nn.Module, processor: Any, layer: int | None, pool: str, part: Chunk, source: str) -> Tensor:
    images = pictures(part, "knn", source)
    state = _state(model, layer, to_device(image_inputs(processor, images, "knn"), model))
    if state.ndim == 4:  # a feature map, channels first
        state = state.flatten(2).transpose(1, 2)
    return normalize((state[:, 0] if pool == "cls" else state.float().mean(dim=1)).float(), dim=-1).cpu()


def _texts(model: nn.Module, processor: Any, layer: int | None, pool: str, part: Chunk, source: str) -> Tensor:
    texts = [sentence_of(sample) for _, sample in part]
    known = [text for text in texts if text is not None]
    if len(known) != len(texts) or tokenizer_of(processor) is None:
        raise CalibrationError(f"{source}: {type(model).__name__} needs a tokenizer, and samples with a text")
    inputs = to_device(encode_texts(known, model, processor), model)
    state = _state(model, layer, inputs).float()
    vector = state[:, 0] if pool == "cls" else mean_over_tokens(state, inputs.get("attention_mask"))
    return normalize(vector, dim=-1).cpu()


def _state(model: nn.Module, layer: int | None, inputs: dict[str, Any]) -> Tensor:
    """The hidden state number ``layer``; None for the model's last one, normalised if the model does so."""
    output = model(**inputs, output_hidden_states=True)
    states, state = output.hidden_states, getattr(output, "last_hidden_state", None)
    if layer is None and isinstance(state, Tensor):
        return state
    chosen = -1 if layer is None else layer
    if not -len(states) <= chosen < len(states):
        raise InvalidOption(f"there is no layer {layer}: {type(model).__name__} has 0 to {len(states) - 1}")
    found: Tensor = states[chosen]
    return found

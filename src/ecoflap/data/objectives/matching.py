"""Image-text matching with hard negatives plus image-text contrast (ITM + ITC), and image-text contrast by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from ecoflap.data.model_facts import Batch, is_dual_tower, parameters_of, to_device
from ecoflap.data.objectives.losses import scalar_loss
from ecoflap.data.sample import Sample
from ecoflap.errors import CalibrationError
from ecoflap.model.patching import forward_replaced
from ecoflap.model.trace import evaluating

# Argument that selects a retrieval model's matching head (true) or its similarities (false).
MATCHING_ARGUMENTS = ("use_itm_head", "use_image_text_matching_head")
SCORES = ("itm_score", "logits_per_image")  # output fields with either
# Initial value of the learned temperature in ALBEF and BLIP (arXiv 2107.07651). The checkpoints of transformers'
# retrieval classes have none, since only training needs it.
TEMPERATURE = 0.07


def matching_argument(model: nn.Module) -> str | None:
    """Name of the argument that chooses between matching and similarities; None if the model has no such choice."""
    parameters = parameters_of(model)
    return next((name for name in MATCHING_ARGUMENTS if name in parameters), None)


def contrastive(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Contrastive loss over all pairs of the batch.

    A model with such a loss computes it, with its own temperature: symmetric cross-entropy (CLIP, arXiv 2103.00020) or
    the pairwise sigmoid loss (SigLIP, arXiv 2303.15343, algorithm 1). For a model with only similarities, it is the
    symmetric cross-entropy at :data:`TEMPERATURE`.
    """
    if is_dual_tower(model):
        return scalar_loss(model(**{**batch, "return_loss": True}), "contrastive")
    return _symmetric(similarities(model, batch))


def itm_itc(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Matching plus contrastive loss, an approximation of the training loss of ALBEF and BLIP.

    ITM is the cross-entropy of the matching head over ``3·B`` pairs: the B true ones, each image with its hardest
    negative text, each text with its hardest negative image (``negative_texts``, ``negative_images``, both ``[B]``,
    from :func:`with_negatives`). ITC is the symmetric cross-entropy of the similarities at :data:`TEMPERATURE`. The
    training also used a momentum teacher with soft labels, queues of old features, and negatives drawn by similarity.
    Images are encoded once.

    Args:
        batch: ``pixel_values``, ``input_ids`` and so on of B true pairs, and the negatives.
    """
    argument = matching_argument(model)
    if argument is None or batch.get("negative_texts") is None:
        raise CalibrationError(
            "objective 'itm-itc' needs an image-text retrieval model and batches made for it (objective='itm-itc')"
        )
    inputs = {name: value for name, value in batch.items() if not name.startswith("negative_")}
    count = len(inputs["input_ids"])
    own = torch.arange(count, device=inputs["input_ids"].device)
    images = torch.cat([own, own, batch["negative_images"]])
    texts = torch.cat([own, batch["negative_texts"], own])
    matches = (torch.arange(len(images), device=own.device) < count).long()
    pairs: dict[str, Any] = {
        name: value.index_select(0, images if name.startswith("pixel") else texts) for name, value in inputs.items()
    }
    scores, logits = _with_pictures_encoded_once(
        model, lambda: similarities(model, inputs), lambda: _scores(model(**pairs, **{argument: True})), images
    )
    return functional.cross_entropy(logits.float(), matches) + _symmetric(scores)


def similarities(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cosine of every image with every text of the batch, fp32 ``[B images, B texts]``."""
    argument = matching_argument(model)
    if argument is None:
        raise CalibrationError(
            f"{type(model).__name__} has neither a contrastive loss nor image-text similarities: choose another "
            "objective"
        )
    return _scores(model(**batch, **{argument: False})).float()


@torch.no_grad()
def with_negatives(model: nn.Module, batch: Batch, samples: Sequence[Sample]) -> Batch:
    """The batch with the hardest negative text of each image and the hardest negative image of each text.

    They are chosen once, by the dense model's similarities: stage 1 must compare losses of the same pairs. Texts of the
    same image (``Sample.group``) and equal texts are no negatives.

    Raises:
        CalibrationError: an image has no negative text in its batch.
    """
    with evaluating(model):
        scores = similarities(model, to_device(batch, model)).cpu()
    right = torch.tensor(
        [[i == j or a.text == b.text or (a.group is not None and a.group == b.group) for j, b in enumerate(samples)]
         for i, a in enumerate(samples)]
    )  # fmt: skip
    if bool(right.all(dim=1).any()):
        raise CalibrationError(
            "a calibration batch holds only texts of one image, so it has no negative pairs: raise "
            "the batch size, or give one text per image"
        )
    scores = scores.masked_fill(right, -torch.inf)
    return {**batch, "negative_texts": scores.argmax(dim=1), "negative_images": scores.argmax(dim=0)}


def _symmetric(scores: torch.Tensor) -> torch.Tensor:
    own = torch.arange(len(scores), device=scores.device)
    logits = scores / TEMPERATURE
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.t(), own)) / 2


def _scores(output: Any) -> torch.Tensor:
    for name in SCORES:
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found
    raise CalibrationError(f"the model returns none of {', '.join(SCORES)}: give an objective module:function")


def _with_pictures_encoded_once(
    model: nn.Module, first: Callable[[], torch.Tensor], then: Callable[[], torch.Tensor], rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of two forwards, the second on the images ``rows`` of the first, whose encodings it reuses.

    Encoding the images again would multiply the work of the largest tower by three, and images that are often chosen
    would count more in the statistics of stage 2.
    """
    encoders = [child for child in model.children() if "pixel_values" in parameters_of(child)]
    if len(encoders) != 1:
        return first(), then()
    kept: list[Any] = []

    def remembering(forward: Callable[..., Any]) -> Callable[..., Any]:
        def encode(*args: Any, **kwargs: Any) -> Any:
            if kept:
                return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.index_select(0, rows), kept[0])
            kept.append(forward(*args, **kwargs))
            return kept[0]

        return encode

    with forward_replaced(encoders[0], remembering):
        return first(), then()

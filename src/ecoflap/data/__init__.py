"""Turns samples into batches and a loss: data formats, prompts, collation, objectives.

Imports ``model`` and what stands below it. The names in ``__all__`` are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecoflap.support.lazy import lazily

if TYPE_CHECKING:
    from ecoflap.data.batches import batch_size_of, make_batches
    from ecoflap.data.model_facts import Batch, TokenMasks, is_encoder_decoder, to_device, token_masks
    from ecoflap.data.objectives import (
        OBJECTIVES,
        Objective,
        check_image_matters,
        check_loss,
        default_objective,
        objective_name,
        resolve,
    )
    from ecoflap.data.sample import Sample
    from ecoflap.data.samples import SampleReader, SampleSet, load_samples

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "Sample",
    "SampleReader",
    "SampleSet",
    "TokenMasks",
    "batch_size_of",
    "check_image_matters",
    "check_loss",
    "default_objective",
    "is_encoder_decoder",
    "load_samples",
    "make_batches",
    "objective_name",
    "resolve",
    "to_device",
    "token_masks",
]

_OBJECTIVES = "OBJECTIVES Objective check_image_matters check_loss default_objective objective_name resolve"
__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("batch_size_of", "make_batches"), "ecoflap.data.batches"),
        **dict.fromkeys(
            ["Batch", "TokenMasks", "is_encoder_decoder", "to_device", "token_masks"], "ecoflap.data.model_facts"
        ),
        **dict.fromkeys(_OBJECTIVES.split(), "ecoflap.data.objectives"),
        **dict.fromkeys(("SampleReader", "SampleSet", "load_samples"), "ecoflap.data.samples"),
        "Sample": "ecoflap.data.sample",
    },
)

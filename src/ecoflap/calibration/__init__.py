"""Samples to batches to a loss."""

from ecoflap.calibration.batches import batch_size_of, make_batches
from ecoflap.calibration.models import Batch, is_encoder_decoder, to_device
from ecoflap.calibration.objectives import (
    OBJECTIVES,
    Objective,
    check_image_matters,
    check_loss,
    default_objective,
    objective_name,
    resolve,
)
from ecoflap.calibration.padding import TokenMasks, token_masks
from ecoflap.calibration.sample import Sample
from ecoflap.calibration.sources import SampleReader, SampleSet, load_samples

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

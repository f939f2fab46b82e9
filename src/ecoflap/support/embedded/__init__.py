"""The embedded VLM and its data: a small BLIP-2 inside the package, with calibration and test questions.

Importing this loads nothing heavy. ``PYTHONPATH=tools python -m embedded_vlm.train`` makes the model again.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["calibration_path", "model_path", "test_path"]

_ASSETS = Path(__file__).parent / "assets"


def model_path() -> Path:
    """The folder of the model: config, generation config, processor, tokenizer, ``model.safetensors``, model card."""
    return _ASSETS / "model"


def calibration_path() -> Path:
    """Parquet with 256 samples from the train splits: ``image``, ``question``, ``answer``, ``kind``."""
    return _ASSETS / "calibration.parquet"


def test_path() -> Path:
    """Parquet with 1,530 questions from the test splits, columns as in the calibration file."""
    return _ASSETS / "test.parquet"

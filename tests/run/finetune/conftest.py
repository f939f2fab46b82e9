"""Sparse pico models with training data, and a trained run that no test changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import picos
import pytest
from console import prose, questions
from tuning import recipe_of, sparse_checkpoint

from ecoflap.run.finetune.pipeline import run_finetune


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models and data: a sparse LLaMA with a text, a sparse BLIP-2 with questions."""
    folder = tmp_path_factory.mktemp("finetune")
    text = prose(folder / "prose.txt", 800)
    return SimpleNamespace(
        llama=sparse_checkpoint("llama", folder / "llama"),
        dense=picos.write_checkpoint("llama", folder / "dense", seed=3),
        blip2=sparse_checkpoint("blip2_t5", folder / "blip2"),
        prose=text,
        held_out=prose(folder / "held-out.txt", 200, seed=1),
        questions=questions(folder / "vqa", 24),
        text={"sequence_length": 12, "task": ["perplexity"], "test": str(text), "test_samples": 4},
    )


@pytest.fixture(scope="session")
def trained(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning of the LLaMA that is complete, with its dense model."""
    fields = {**made.text, "dense": str(made.dense), "distill": 0.5, "distill_hidden": 0.1, "temperature": 2.0}
    return run_finetune(recipe_of(made.llama, made.prose, **fields), tmp_path_factory.mktemp("out") / "trained")

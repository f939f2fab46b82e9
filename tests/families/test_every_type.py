"""Every type of transformers' image-text-to-text list, and text mixtures: what is found in a model that never runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from family_sweep.__main__ import END, START
from family_sweep.configs import MIXTURES, NOT_BUILT, architectures
from family_sweep.pico import shrunk
from family_sweep.trial import names_each_matrix_once
from transformers.models.auto import modeling_auto

from ecoflap.model.anatomy import discover

KNOWN = architectures()
# What may stay dense in blocks: whole bridges by default, and what is no matrix that something is multiplied by.
LEFT_OUT = ("bridge", "convolution", "state-space")
LATER = "calibration data show how they lie"  # stacks of which only a forward can tell
LESS = {
    "recurrent_gemma": 0.94,  # the gates of its recurrence
    "inkling2": 0.73,  # tables of relative positions, large beside pico blocks
}


@pytest.mark.parametrize("kind", [kind for kind in KNOWN if kind not in NOT_BUILT])
def test_each_matrix_is_prunable_or_named(kind: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, KNOWN[kind])(shrunk(kind))
    anatomy = discover(model)
    names_each_matrix_once(model, anatomy)
    prunable = anatomy.prunable_parameters + sum(e.numel for e in anatomy.unprunable if LATER in e.reason)
    whole = anatomy.prunable_parameters + sum(
        entry.numel for entry in anatomy.unprunable if not entry.reason.startswith(LEFT_OUT)
    )
    assert LESS.get(kind, 0.95) <= prunable / whole < (1.01 if kind not in LESS else LESS[kind] + 0.05)


def test_the_list_is_whole() -> None:
    assert modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() | set(MIXTURES) <= KNOWN.keys()
    assert NOT_BUILT.keys() <= KNOWN.keys()
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text("utf-8")
    rows = page.split(START)[1].split(END)[0]
    assert [kind for kind in KNOWN if f"| `{kind}` |" not in rows] == []

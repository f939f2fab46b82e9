"""Drives the published pruning functions of a checkout of locuslab/wanda on today's decoder models.

None of their code is here. Their ``lib/prune.py`` is imported, and its ``prune_wanda`` and ``prune_sparsegpt`` are
called as they stand. What they expect of transformers 4.28 is supplied around them:

- a decoder block was given its mask and positions and returned a tuple; today it is given rotary embeddings too and
  returns a tensor. ``_Block`` wraps each block to translate.
- they load their text themselves; the module that does is replaced by one that hands out our samples.
- they wait for the GPU at the end of each matrix; without one, there is nothing to wait for.

One sample a forward, statistics by hooks for every matrix on its own, and a second forward are theirs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ecoflap.model.offload import home_of
from ecoflap.model.parts import Anatomy


class _Block(nn.Module):
    """Today's block under yesterday's call; weights are found in it as before."""

    def __init__(self, block: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.rotary = [rotary]  # in a list: not a submodule

    def forward(self, hidden: Tensor, attention_mask: Any = None, position_ids: Any = None, **ignored: Any) -> Any:
        embeddings = self.rotary[0](hidden, position_ids)
        output = self.block(
            hidden, attention_mask=attention_mask, position_ids=position_ids, position_embeddings=embeddings
        )
        return output if isinstance(output, tuple) else (output,)


@contextmanager
def _as_they_expect(model: nn.Module, blocks: int) -> Iterator[None]:
    decoder: Any = model.model
    layers = decoder.layers
    count, decoder.config.num_hidden_layers = decoder.config.num_hidden_layers, blocks
    decoder.layers = nn.ModuleList(_Block(block, decoder.rotary_emb) for block in layers[:blocks])
    try:
        yield
    finally:
        decoder.layers, decoder.config.num_hidden_layers = layers, count


def published_stage2(
    folder: Path, model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], criterion: str, sparsity: float
) -> Callable[[], None]:
    """Their whole stage 2 on ``model`` (with ``model.layers`` and rotary embeddings), to be called.

    Args:
        folder: the checkout.
        anatomy: as many of the first blocks are pruned as it has.
        batches: with ``input_ids`` of one length and without padding.
        criterion: ``wanda`` or ``sparsegpt``.
    """
    device = home_of(model)
    samples = [(row.unsqueeze(0).to(device), None) for batch in batches for row in batch["input_ids"]]
    length = samples[0][0].shape[1]
    if any(ids.shape[1] != length for ids, _ in samples):
        raise SystemExit("the published loop takes samples of one length: give --sequence-length and plain text")
    functions = _functions(folder)
    prune = getattr(functions, f"prune_{criterion}")
    arguments = SimpleNamespace(nsamples=len(samples), seed=0, sparsity_ratio=sparsity, use_variant=False)

    def run() -> None:
        with (
            _as_they_expect(model, len(anatomy.blocks)),
            mock.patch.object(functions, "get_loaders", return_value=(samples, None)),
            nullcontext() if torch.cuda.is_available() else mock.patch.object(torch.cuda, "synchronize"),
            mock.patch.object(model, "hf_device_map", {}, create=True),
            mock.patch.object(model, "seqlen", length, create=True),
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere),
            torch.no_grad(),
        ):
            model.eval()
            prune(arguments, model, None, device)

    return run


def _functions(folder: Path) -> ModuleType:
    """Their module ``lib.prune``, imported without what loads their data sets."""
    if not (folder / "lib" / "prune.py").exists():
        raise SystemExit(f"{folder} is no checkout of github.com/locuslab/wanda: there is no lib/prune.py")
    data = ModuleType("lib.data")
    data.get_loaders = None  # type: ignore[attr-defined]
    sys.modules.setdefault("lib.data", data)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("lib.prune")
    except ImportError as error:
        raise SystemExit(f"{folder}: lib/prune.py can't be imported here: {error}") from error
    finally:
        sys.path.remove(str(folder))

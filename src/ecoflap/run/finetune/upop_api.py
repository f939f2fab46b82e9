"""Runs ``ecoflap.upop``: channels that leave while a model is trained, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecoflap.support.progress import Progress


def upop(
    model: str | None = None,
    *,
    train: str,
    sparsity: float = 0.5,
    output: str | Path = "ecoflap-upop",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **fields: Any,
) -> Path:
    """Remove attention and feed-forward channels while a dense model is trained, then train what stays (UPop).

    After Shi et al., "UPop: Unified and Progressive Pruning for Compressing Vision-Language Transformers", ICML 2023
    (arXiv 2301.13741).

    Args:
        model: a hub id or folder of a dense model; None for the embedded model.
        train: training data: a file, folder or dataset id.
        sparsity: the fraction of the prunable weights to remove: 0.5 is 2×, 0.75 is 4×.
        output: the folder to write: ``model/``, ``metrics.json``, ``report.html``.
        overwrite: replace the training that is there.
        resume: go on from the last checkpoint of the one that is there.
        progress: where to report.
        fields: any other option of ``ecoflap upop``: ``epochs=``, ``learning_rate=``, ``batch_size=``, ``test=``, …

    Returns:
        The folder.

    Raises:
        EcoflapError: a subclass says what is wrong and how to fix it.
    """
    from ecoflap.run.finetune.pipeline import run_finetune
    from ecoflap.run.finetune.upop_recipe import UPop

    given = {"train": train, "sparsity": sparsity, **fields, **({} if model is None else {"model": model})}
    return run_finetune(UPop.parse(given), output, overwrite=overwrite, resume=resume, progress=progress)

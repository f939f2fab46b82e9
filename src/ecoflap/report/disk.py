"""How large a run's sparse model is on disk, and how large it would be without its zeros."""

from __future__ import annotations

from dataclasses import dataclass

from ecoflap.report.data import RunData

_MODEL = "model"


@dataclass(frozen=True)
class OnDisk:
    """Bytes of the weight files as saved, and computed: without the zeros, None where their number is not known."""

    saved: int
    packed: int | None


def on_disk(run: RunData) -> OnDisk | None:
    """Sizes of the saved model's ``*.safetensors`` files; None where there are none.

    The files hold every zero, so they are as large as the dense model's. Without the zeros it would take a bit for each
    prunable weight, that says whether it stays, and the values of those that do:
    ``packed = saved − zeros · bytes per weight + prunable weights / 8``, with the bytes per weight of the whole file.
    """
    saved = sum(path.stat().st_size for path in sorted((run.path / _MODEL).glob("*.safetensors")))
    if not saved:
        return None
    sparsity = run.metrics.sparsity if run.metrics else None
    if not sparsity or not sparsity.model_parameters or not sparsity.prunable_parameters or not sparsity.towers:
        return OnDisk(saved, None)
    zeros = sum(tower.zeros for tower in sparsity.towers.values())
    packed = saved - zeros * saved / sparsity.model_parameters + sparsity.prunable_parameters / 8
    return OnDisk(saved, round(packed))

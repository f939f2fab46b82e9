"""ECoFLaP: coarse-to-fine layer-wise pruning of vision-language models."""

from __future__ import annotations

from ecoflap.model.packed.register import register as register_packed
from ecoflap.support.lazy import lazily

TYPE_CHECKING = False  # typing is not imported: see _HOMES
if TYPE_CHECKING:
    from ecoflap.api import PruneResult, inspect, prune, recover
    from ecoflap.importance.allocate import allocate
    from ecoflap.importance.measure import measure_importance
    from ecoflap.importance.scores import Importance, Score
    from ecoflap.model.checkpoint import load
    from ecoflap.model.packed.convert import pack
    from ecoflap.model.save import save
    from ecoflap.pruning.keep_zeros import keep_zeros
    from ecoflap.report.analysis.run import analyse
    from ecoflap.report.card import write_model_card
    from ecoflap.report.hub import push
    from ecoflap.run.compare.compare import compare
    from ecoflap.run.extensions import register
    from ecoflap.run.finetune.upop_api import upop
    from ecoflap.run.recipe import Recipe
    from ecoflap.support.processes import joined
    from ecoflap.support.version import __version__ as __version__

__all__ = [
    "Importance",
    "PruneResult",
    "Recipe",
    "Score",
    "allocate",
    "analyse",
    "compare",
    "inspect",
    "joined",
    "keep_zeros",
    "load",
    "measure_importance",
    "pack",
    "prune",
    "push",
    "recover",
    "register",
    "save",
    "upop",
    "write_model_card",
]

# Imported at the first use: work without a model (the allocation, --help) must not wait for torch, and the command line
# must set its signal handler quickly.
_HOMES = {
    "Importance": "ecoflap.importance.scores",
    "PruneResult": "ecoflap.api",
    "Recipe": "ecoflap.run.recipe",
    "Score": "ecoflap.importance.scores",
    "allocate": "ecoflap.importance.allocate",
    "analyse": "ecoflap.report.analysis.run",
    "compare": "ecoflap.run.compare.compare",
    "inspect": "ecoflap.api",
    "joined": "ecoflap.support.processes",
    "keep_zeros": "ecoflap.pruning.keep_zeros",
    "load": "ecoflap.model.checkpoint",
    "measure_importance": "ecoflap.importance.measure",
    "pack": "ecoflap.model.packed.convert",
    "prune": "ecoflap.api",
    "push": "ecoflap.report.hub",
    "recover": "ecoflap.api",
    "register": "ecoflap.run.extensions",
    "save": "ecoflap.model.save",
    "upop": "ecoflap.run.finetune.upop_api",
    "write_model_card": "ecoflap.report.card",
    "__version__": "ecoflap.support.version",
}

register_packed()  # so that transformers loads packed checkpoints; imports nothing
__getattr__ = lazily(__name__, _HOMES)

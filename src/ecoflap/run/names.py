"""Names the files of a run and of a comparison."""

from __future__ import annotations

from pathlib import Path

RECIPE, IMPORTANCE, ALLOCATION = "recipe.yaml", "importance.json", "allocation.json"
METRICS, REPORT, MODEL, LOG, JOURNAL = "metrics.json", "report.html", "model", "log.txt", "journal"
PREDICTIONS, PICTURES, ANALYSIS = "predictions.json", "pictures", "analysis"
PACKED, BENCH = "packed", "bench.json"
COMPARISON, MANIFEST = "compare.json", "manifest.json"
# In the order of removal: the files that mark a complete run first, those that mark the folder as a run's last. The
# journal is removed after the results that were made with it: it holds the digests of their data.
OURS = (
    METRICS, REPORT, ANALYSIS, PREDICTIONS, PICTURES, BENCH, PACKED, MODEL, ALLOCATION, IMPORTANCE, JOURNAL, LOG,
    RECIPE, MANIFEST,
)  # fmt: skip
INPUTS = f"{JOURNAL}/inputs.json"
WRITTEN = f"{JOURNAL}/written.json"
CHECKPOINTS = "checkpoints"  # of a training, in the journal
SEARCH = "search"  # checkpoints of UPop's search
TRAININGS = "trainings"  # folders of a comparison's trained cells, in its journal
TRAIN = "train"  # a recipe file with this field is a fine-tuning's
GRID = "methods"  # a recipe file with this field is a comparison's


def is_compare(folder: str | Path) -> bool:
    """Whether ``folder`` holds the result of ``ecoflap compare``."""
    return (Path(folder) / COMPARISON).is_file()


def is_finetune(folder: str | Path) -> bool:
    """Whether ``folder`` holds a fine-tuning: its recipe file names training data."""
    path = Path(folder) / RECIPE
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    named = {line.partition(":")[0] for line in lines}
    return TRAIN in named and GRID not in named

"""Names the files of a run and of a comparison."""

from __future__ import annotations

from pathlib import Path

RECIPE, IMPORTANCE, ALLOCATION = "recipe.yaml", "importance.json", "allocation.json"
METRICS, REPORT, MODEL, LOG, JOURNAL = "metrics.json", "report.html", "model", "log.txt", "journal"
PREDICTIONS, PICTURES, ANALYSIS = "predictions.json", "pictures", "analysis"
PACKED, BENCH = "packed", "bench.json"
COMPARISON, MANIFEST = "compare.json", "manifest.json"
# In the order of removal: what says that a run is complete goes first, what says that a folder is ours goes last.
# The journal outlives what was made under it: it says of which data that is.
OURS = (
    METRICS, REPORT, ANALYSIS, PREDICTIONS, PICTURES, BENCH, PACKED, MODEL, ALLOCATION, IMPORTANCE, JOURNAL, LOG,
    RECIPE, MANIFEST,
)  # fmt: skip
INPUTS = f"{JOURNAL}/inputs.json"
WRITTEN = f"{JOURNAL}/written.json"
CHECKPOINTS = "checkpoints"  # of a training, in the journal
SEARCH = "search"  # those of UPop's search
TRAININGS = "trainings"  # whole trainings of a comparison's cells, in its journal
TRAIN = "train"  # the field of a recipe file that makes its folder a fine-tuning's
GRID = "methods"  # the field of a recipe file that makes its folder a comparison's, not a run's


def is_compare(folder: str | Path) -> bool:
    """Whether ``folder`` holds the result of ``ecoflap compare``."""
    return (Path(folder) / COMPARISON).is_file()


def is_finetune(folder: str | Path) -> bool:
    """Whether ``folder`` holds a fine-tuning: its recipe, as written, has a line that names the training data."""
    path = Path(folder) / RECIPE
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    named = {line.partition(":")[0] for line in lines}
    return TRAIN in named and GRID not in named

"""Shows a finished run or comparison: page, charts, analyses, model card, upload.

Imports everything but ``cli``. The names in ``__all__`` are imported at their first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ecoflap.run.names import is_compare, is_finetune
from ecoflap.support.lazy import lazily

if TYPE_CHECKING:
    from ecoflap.report.compare_page import write_compare
    from ecoflap.report.data import RunData, read_run
    from ecoflap.report.page import write_report

__all__ = ["RunData", "read_run", "rebuild", "write_compare", "write_report"]

__getattr__ = lazily(
    __name__,
    {
        "RunData": "ecoflap.report.data",
        "read_run": "ecoflap.report.data",
        "write_compare": "ecoflap.report.compare_page",
        "write_report": "ecoflap.report.page",
    },
)


def rebuild(folder: Path | str) -> Path:
    """Write the page of a folder again: ``compare.html`` of a comparison, else ``report.html`` of a run or fine-tuning.

    Raises:
        InvalidOption: the folder is none of them, or a file in it is broken.
        StorageError: the page could not be written; an older page is unchanged.
    """
    from ecoflap.report.compare_page import write_compare
    from ecoflap.report.finetune_page import write_finetune
    from ecoflap.report.page import write_report

    if is_compare(folder):
        return write_compare(folder)
    return write_finetune(folder) if is_finetune(folder) else write_report(folder)

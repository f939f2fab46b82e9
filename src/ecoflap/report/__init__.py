"""The last room: the files of a run or of a comparison become a page and, for a run, a table on the terminal."""

from __future__ import annotations

from pathlib import Path

from ecoflap.report.compare_page import write_compare
from ecoflap.report.comparison import FILE as COMPARISON
from ecoflap.report.data import RunData, read_run
from ecoflap.report.page import write_report
from ecoflap.report.tables import summary_table

__all__ = ["RunData", "read_run", "rebuild", "summary_table", "write_compare", "write_report"]


def rebuild(folder: Path | str) -> Path:
    """Write the page of a folder anew: ``compare.html`` beside a ``compare.json``, else ``report.html`` of a run.

    Raises:
        InvalidOption: the folder holds neither, or a file in it is broken.
        StorageError: the page could not be written; an older page stays as it was.
    """
    return write_compare(folder) if (Path(folder) / COMPARISON).is_file() else write_report(folder)

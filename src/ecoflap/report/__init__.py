"""The last room: a run directory's files become a page (``report.html``) and a table on the terminal."""

from __future__ import annotations

from ecoflap.report.data import RunData, read_run
from ecoflap.report.page import write_report
from ecoflap.report.tables import summary_table

__all__ = ["RunData", "read_run", "summary_table", "write_report"]

"""What a study says, for people: an offline HTML page, figures for papers, a table for the terminal.

Draws only from `store` and `forecast`; computes no science of its own beyond grouping runs by size, arm and rate.
"""

from __future__ import annotations

from aftershock.report.numbers import study_numbers
from aftershock.report.page import ReportPaths, write_report

__all__ = ["ReportPaths", "study_numbers", "write_report"]

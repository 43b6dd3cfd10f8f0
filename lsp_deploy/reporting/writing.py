"""The report on disk."""

from __future__ import annotations

from pathlib import Path

from lsp_deploy.files import write_text
from lsp_deploy.plan import Plan
from lsp_deploy.reporting.page import render_page
from lsp_deploy.reporting.report import Report

__all__ = ["write_report"]


def write_report(report: Report, plan: Plan, directory: Path) -> None:
    """Write report.json and report.html into `directory`, each atomically.

    Args:
        report: the account of the run.
        plan: its masks are drawn in the page.
        directory: an existing folder.

    Raises:
        UserError: the folder cannot be written to.
    """
    page = render_page(report, plan)
    write_text(directory / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(directory / "report.html", page)

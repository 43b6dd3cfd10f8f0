"""Write the JSON schemas of the tool's files into docs/."""

from __future__ import annotations

from pathlib import Path

from lsp_deploy.files import write_text
from lsp_deploy.plan import plan_schema
from lsp_deploy.reporting.report import report_schema

DOCS = Path(__file__).resolve().parent.parent / "docs"

if __name__ == "__main__":
    write_text(DOCS / "plan.schema.json", plan_schema())
    write_text(DOCS / "report.schema.json", report_schema())

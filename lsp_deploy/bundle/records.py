"""Plan, recipe and report of a run, as they go into its bundle."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lsp_deploy import console
from lsp_deploy.bundle.anonymity import PathRemover
from lsp_deploy.files import write_text
from lsp_deploy.plan import Plan, load_plan

if TYPE_CHECKING:
    from lsp_deploy.reporting.report import Report

__all__ = ["Records", "read_records", "write_records"]


@dataclass(frozen=True)
class Records:
    """What a run wrote beside its model, without paths of the machine that it ran on."""

    plan: Plan
    report: Report | None


def read_records(folder: Path) -> Records | None:
    """Return the records in an output folder of `compress`, or None where it has no plan.

    A report of another version is left out, and the user told: a device needs the model, not the account of it.

    Raises:
        UserError: a plan that cannot be read.
    """
    from lsp_deploy.reporting.report import Report

    if not (path := folder / "plan.json").is_file():
        return None
    plan, report = load_plan(path), None
    if (written := folder / "report.json").is_file():
        try:
            report = Report.model_validate_json(written.read_bytes())
        except ValidationError as error:
            wrong = f"{written} is not a report of this version ({error.error_count()} fields differ)"
            console.warn(f"{wrong}: the bundle is made without it; compress again to have it in")
    command = report.command if report is not None else ""
    folders = (folder.resolve(), Path.cwd(), Path.home(), Path(tempfile.gettempdir()))
    remove = PathRemover(plan.recipe, command, folders)
    return Records(
        plan=plan.model_copy(update={"recipe": remove(plan.recipe)}),
        report=None
        if report is None
        else Report.model_validate_json(json.dumps(remove(report.model_dump(mode="json")))),
    )


def write_records(records: Records, folder: Path) -> None:
    """Write plan.json, recipe.toml and the report into a new `folder`.

    plan.safetensors stays behind: it is as large as a model, and serves to compress again.
    """
    import tomli_w

    from lsp_deploy.reporting.writing import write_report

    folder.mkdir()
    write_text(folder / "plan.json", records.plan.model_dump_json(indent=1) + "\n")
    given = {key: value for key, value in records.plan.recipe.items() if value is not None}
    write_text(folder / "recipe.toml", tomli_w.dumps(given))
    if records.report is not None:
        write_report(records.report, records.plan, folder)

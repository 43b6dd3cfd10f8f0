"""The folder that a run writes to: its names, and whose result may be replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of

if TYPE_CHECKING:
    from lsp_deploy.plan import Plan
    from lsp_deploy.reporting.report import Report

__all__ = ["OutputFolder"]


@dataclass(frozen=True)
class OutputFolder:
    """Where a run's files go."""

    path: Path

    @property
    def model(self) -> Path:
        """The compressed model."""
        return self.path / "model.onnx"

    @property
    def plan(self) -> Path:
        """The decisions; plan.safetensors lies beside it."""
        return self.path / "plan.json"

    def engine(self, backend: str, target: str) -> Path:
        """Return the path of an engine; its sidecar has `.json` appended."""
        return self.path / "engines" / f"{backend}-{target}.engine"

    def write_report(self, report: Report, plan: Plan) -> None:
        """Write report.json and report.html."""
        from lsp_deploy.reporting.writing import write_report

        write_report(report, plan, self.path)

    @classmethod
    def check(cls, path: Path, model: Path, recipe: Mapping[str, Any], *, force: bool) -> OutputFolder:
        """Take a folder that is new, empty or holds the result of the same model and recipe; makes nothing yet.

        `recipe` holds the keys that were given, as a plan records them.

        Raises:
            UserError: it cannot be written to, holds the input model, or holds another recipe's result.
        """
        folder = cls(path)
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise UserError(f"the output folder {path} cannot be made: {existing} is a file; choose another -o")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to the output folder {path}: permission denied; choose another -o")
        if folder.model.exists() and model.exists() and folder.model.samefile(model):
            raise UserError(f"the output folder {path} holds the input model under model.onnx; choose another -o")
        if not force and existing == path and any(path.iterdir()) and not folder._holds_result_of(model, recipe):
            raise UserError(f"{path} holds something else than this recipe's result; choose another -o, or use --force")
        return folder

    def make(self) -> None:
        """Make the folder, without what an earlier run left of a model that is about to be replaced.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for old in (*self.path.glob("engines/*.engine*"), *self.path.glob("report.*")):
                old.unlink()
        except OSError as error:
            raise UserError(
                f"cannot make the output folder {self.path}: {error.strerror}; choose another -o"
            ) from error

    def _holds_result_of(self, model: Path, recipe: Mapping[str, Any]) -> bool:
        """Whether plan.json is of the same model and recipe; an interrupted first run left no plan and is resumed."""
        if not self.plan.exists():
            return all(entry.name in _OWN_NAMES for entry in self.path.iterdir())
        try:
            plan = json.loads(self.plan.read_text())
        except (OSError, ValueError):
            return False
        same_recipe = isinstance(plan, dict) and plan.get("recipe") == recipe
        return same_recipe and model.is_file() and plan.get("model_sha256") == sha256_of(model)


_OWN_NAMES = frozenset({"model.onnx", "model.onnx.data", "plan.json", "plan.safetensors", "engines"})

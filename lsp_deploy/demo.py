"""The embedded model, its data and its recipe, copied to where a user can work with them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from lsp_deploy.errors import UserError
from lsp_deploy.files import write_bytes

__all__ = ["DEMO_FILES", "DEMO_MODEL", "copy_demo"]

DEMO_MODEL = "digits_vit.onnx"
DEMO_FILES = (
    DEMO_MODEL,
    "lsp-deploy.toml",
    "calibration.npz",
    "calibration_labels.csv",
    "evaluation.npz",
    "evaluation_labels.csv",
)


def copy_demo(directory: Path) -> Path:
    """Copy the embedded model, its data and its recipe to a new or empty folder; return the model's path.

    Raises:
        UserError: the folder holds files, or cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        taken = any(directory.iterdir())
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another -o folder") from error
    if taken:
        raise UserError(f"{directory} is not empty; choose a new folder with -o")
    assets = files("lsp_deploy") / "assets"
    for name in DEMO_FILES:
        write_bytes(directory / name, (assets / name).read_bytes())
    return directory / DEMO_MODEL

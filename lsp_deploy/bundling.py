"""The verb `bundle`: a model with everything that its device needs to build and measure an engine itself."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsp_deploy import __version__, console
from lsp_deploy.building import has_two_four, model_in, shapes_for
from lsp_deploy.errors import UserError
from lsp_deploy.files import make_folder, write_text

if TYPE_CHECKING:
    from lsp_deploy.bundle.content import Content
    from lsp_deploy.hardware.target import Target

__all__ = ["Bundle", "bundle_model"]

_NOT_NEEDED = frozenset({"emulation", "__pycache__"})
"""Folders of the plugin that only tests use."""


@dataclass(frozen=True)
class Bundle:
    """What was packed."""

    path: Path
    target: str
    size_bytes: int
    files: list[str]
    plugin: bool
    """Whether the plugin's sources are in it."""

    def lines(self) -> list[str]:
        """Return what `bundle` prints."""
        name, folder = self.path.name, self.path.name.split(".", 1)[0]
        quoted, into = shlex.quote(name), shlex.quote(folder)
        plugin = ", with the plugin's sources" if self.plugin else ""
        return [
            f"{self.path}: {self.size_bytes / 1e6:.1f} MB, {len(self.files)} files for {self.target}{plugin}",
            f"on the device: mkdir {into} && tar -xf {quoted} -C {into} && cd {into} && ./build.sh && ./profile.sh",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the same for `--json`."""
        return {
            "bundle": str(self.path),
            "target": self.target,
            "size_bytes": self.size_bytes,
            "files": self.files,
            "plugin": self.plugin,
        }


def bundle_model(source: Path, target_name: str, output: Path, shapes: Mapping[str, str | None]) -> Bundle:
    """Pack `source`, an output folder of `compress` or an ONNX file, for a device that builds its own engines.

    Args:
        source: what to pack; of an output folder its plan and report go along, without the paths in them.
        target_name: name or TOML file of the device.
        output: archive to write: .tar.zst or .tar.gz.
        shapes: min_shapes, opt_shapes and max_shapes, each as x:1x3x224x224; without, those of `compress`.

    Raises:
        UserError: no usable model, a target that does not build its own engines, or one that cannot take the model.
    """
    from lsp_deploy.bundle.archive import check_suffix, write_archive, write_sums
    from lsp_deploy.hardware.target import load_target

    check_suffix(output)
    target = load_target(target_name)
    if not target.build_on_device or target.kind != "gpu":
        raise UserError(
            f"a bundle is for devices that alone can build their engines, such as agx-orin; for {target.name}: "
            f"lsp-deploy build {shlex.quote(str(source))} --target {shlex.quote(target_name)}"
        )
    content = _content(source, target, shapes)
    make_folder(output.parent)
    with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as name:
        folder = Path(name)
        _fill(folder, content)
        write_sums(folder)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_archive(folder, output)
    return Bundle(output, target.name, output.stat().st_size, files, content.plugin)


def _content(source: Path, target: Target, given: Mapping[str, str | None]) -> Content:
    from lsp_deploy.bundle.content import Content
    from lsp_deploy.bundle.device_model import for_device
    from lsp_deploy.bundle.records import read_records
    from lsp_deploy.model import load_model
    from lsp_deploy.plugins.operators import operator_nodes

    path = model_in(source)
    records = read_records(path.parent) if path.name == "model.onnx" else None
    if records is not None and records.plan.target != target.name:
        console.warn(f"{path} was compressed for {records.plan.target}: what pays there need not pay on {target.name}")
    model = load_model(path)
    shapes = shapes_for(path, model, given)
    two_four = has_two_four(path, shapes)
    model = for_device(model, path, target)
    return Content(model, target, shapes, two_four, bool(operator_nodes(model)), records)


def _fill(folder: Path, content: Content) -> None:
    """Write everything but the sums into `folder`."""
    from lsp_deploy.bundle.records import write_records
    from lsp_deploy.bundle.scripts import write_scripts
    from lsp_deploy.engines.power import ina3221
    from lsp_deploy.model import save_model

    save_model(content.model, folder / "model.onnx")
    write_scripts(content, folder)
    shutil.copyfile(ina3221.__file__, folder / "ina3221.py")
    if content.plugin:
        _copy_plugin(folder / "plugin")
    if content.records is not None:
        write_records(content.records, folder / "report")
    write_text(folder / "bundle.json", json.dumps(_description(content), indent=1) + "\n")


def _copy_plugin(folder: Path) -> None:
    """Copy the plugin's sources as they were installed with this package."""
    from lsp_deploy import plugins

    installed = Path(plugins.__file__).parent
    if not (installed / "tensorrt" / "CMakeLists.txt").is_file():
        raise UserError("the sources of the TensorRT plugin are not beside the installed lsp-deploy; install it again")
    for part in ("cuda", "tensorrt"):
        for path in sorted((installed / part).rglob("*")):
            place = path.relative_to(installed)
            source = path.is_file() and path.suffix != ".py" and not path.name.startswith(".")
            if source and not _NOT_NEEDED.intersection(place.parts):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / place)


def _description(content: Content) -> dict[str, Any]:
    shapes, target = content.shapes, content.target
    return {
        "format": "lsp-deploy.bundle.v1",
        "tool_version": __version__,
        "target": {"name": target.name, "title": target.title, "compute_capability": target.compute_capability},
        "model": "model.onnx",
        "opset": content.model.opset_imports[""],
        "shapes": {"min": shapes.min, "opt": shapes.opt, "max": shapes.max},
        "two_four_weights": content.two_four,
        "plugin": content.plugin,
    }

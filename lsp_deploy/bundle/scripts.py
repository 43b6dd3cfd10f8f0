"""The scripts and the page that a bundle's device is given."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lsp_deploy import __version__
from lsp_deploy.bundle.content import Content
from lsp_deploy.files import write_text

__all__ = ["write_scripts"]

_ON_DEVICE = Path(__file__).parent / "on_device"
_RENDERED = ("build.sh", "profile.sh", "README.md")
_PLUGIN = "build/liblsp_block_sparse.so"
# Of the plugin: what its CMake files ask for.
_CMAKE, _CUDA = "3.22", "12.6"


def write_scripts(content: Content, folder: Path) -> None:
    """Write what runs on the device, and what a person there reads, into `folder`, where the model lies already."""
    environment = Environment(
        loader=FileSystemLoader(_ON_DEVICE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = _values(content, folder)
    for name in _RENDERED:
        write_text(folder / name, environment.get_template(f"{name}.jinja").render(values))
    shutil.copyfile(_ON_DEVICE / "measure.py", folder / "measure.py")


def _values(content: Content, folder: Path) -> dict[str, Any]:
    """Return what the templates are filled with; flags are quoted for the shell."""
    target, report = content.target, content.records.report if content.records is not None else None
    calibration = report.data.calibration if report is not None else None
    return {
        "model": "model.onnx",
        "title": target.title,
        "quoted_title": shlex.quote(target.title),
        "tensorrt": target.tensorrt or "of its JetPack",
        "architecture": str(target.compute_capability).replace(".", ""),
        "plugin": content.plugin,
        "records": content.records is not None,
        "external": (folder / "model.onnx.data").exists(),
        "opset": content.model.opset_imports[""],
        "borders": list(_borders(content.model)),
        "preprocess": calibration.preprocess if calibration is not None else None,
        "batches": _batches(content),
        "batch": next(iter(content.shapes.opt.values()))[0],
        "build_flags": _build_flags(content),
        "run_flags": _run_flags(content),
        "cmake": _CMAKE,
        "cuda": _CUDA,
        "version": __version__,
    }


def _build_flags(content: Content) -> list[str]:
    flags = ["--onnx=model.onnx", "--saveEngine=model.engine", "--skipInference", "--stronglyTyped"]
    if content.two_four:
        flags.append("--sparsity=enable")
    if content.plugin:
        flags.append(f"--dynamicPlugins={_PLUGIN}")
    shapes = content.shapes
    if content.dynamic:
        bounds = {"min": shapes.min, "opt": shapes.opt, "max": shapes.max}
        flags += [f"--{bound}Shapes={_shapes_text(sizes)}" for bound, sizes in bounds.items()]
    flags += ["--timingCacheFile=build/timing.cache", "--profilingVerbosity=detailed"]
    return [shlex.quote(flag) for flag in [*flags, "--exportLayerInfo=build/layers.json"]]


def _run_flags(content: Content) -> list[str]:
    flags = ["--loadEngine=model.engine", "--useCudaGraph", "--useSpinWait"]
    if content.plugin:
        flags.append(f"--dynamicPlugins={_PLUGIN}")
    quoted = [shlex.quote(flag) for flag in flags]
    if content.dynamic:
        parts = [f"{shlex.quote(name)}:{_batched(content, name)}" for name in content.shapes.opt]
        quoted.append(f"--shapes={','.join(parts)}")
    return quoted


def _batched(content: Content, name: str) -> str:
    """Return the shape that an input is measured at, with the shell's $batch where its batch may vary."""
    shape = content.shapes.opt[name]
    varies = content.shapes.min[name][0] != content.shapes.max[name][0]
    return "x".join(['"$batch"' if varies else str(shape[0]), *map(str, shape[1:])])


def _batches(content: Content) -> dict[str, int] | None:
    """Return the batches that an engine takes, or None where there is one only."""
    shapes = content.shapes
    varying = [name for name in shapes.opt if shapes.min[name][0] != shapes.max[name][0]]
    if not varying:
        return None
    least, most = max(shapes.min[name][0] for name in varying), min(shapes.max[name][0] for name in varying)
    return {"least": least, "tuned": shapes.opt[varying[0]][0], "most": most}


def _borders(model: ir.Model) -> Iterator[tuple[str, str, str, str]]:
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if not value.is_initializer():
                shape = "?" if value.shape is None else " × ".join(str(size) for size in value.shape)
                yield kind, str(value.name), "?" if value.dtype is None else value.dtype.numpy().name, shape


def _shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())

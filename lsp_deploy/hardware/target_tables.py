"""What `lsp-deploy targets` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

from lsp_deploy.hardware.target import Target

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = ["target_details", "target_table"]

_BUILDER_TITLES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime"}


def target_table(targets: Sequence[Target]) -> Table:
    """Return the overview that `lsp-deploy targets` prints."""
    from rich.table import Table

    table = Table("target", "device", "element types", "fp16 / int8 peak", "memory", "engines from", box=None)
    table.columns[0].no_wrap = True
    for target in targets:
        peaks = [f"{target.peak[unit].dense:g}" for unit in ("fp16", "int8") if unit in target.peak]
        table.add_row(
            target.name,
            target.title,
            " ".join(target.types),
            f"{' / '.join(peaks)} T" if peaks else "-",
            f"{target.memory_gb:g} GB" if target.memory_gb else "-",
            " or ".join(_BUILDER_TITLES[builder] for builder in target.builders)
            + (", on the device" if target.build_on_device else ""),
        )
    return table


def target_details(target: Target) -> Group:
    """Return everything that one target says, as `lsp-deploy targets show` prints it."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table("field", "value", "meaning", box=None)
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"
    for name, value, meaning in _fields(target):
        if name.startswith("kernels.") and not target.peak:
            continue  # nothing is estimated from them
        table.add_row(name, escape(value), f"[dim]{escape(meaning)}[/dim]")
    table.add_row("sha256", target.sha256, "[dim]of all that the target says; reports name it[/dim]")
    if "tensorrt" not in target.builders:
        return Group(table)
    only = ", the only place where that can be done" if target.build_on_device else ""
    heading = f"\nTo build and time an engine with TensorRT on the device{only}:"
    return Group(table, heading, Text(target.commands_on_device()))


def _fields(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in type(model).model_fields.items():
        value, meaning = getattr(model, name), field.description or ""
        if isinstance(value, BaseModel):
            yield from _fields(value, f"{prefix}{name}.")
        elif name == "peak":
            for unit, peak in value.items():
                sparse = f", {peak.sparse24:g} with 2:4" if peak.sparse24 else ""
                energy = f", {peak.pj_per_flop:g} pJ a FLOP" if peak.pj_per_flop else ""
                yield f"peak.{unit}", f"{peak.dense:g}{sparse}{energy}", "peak rate, TFLOP/s or TOP/s"
        elif value not in (None, "", []) and name != "device_commands":
            yield prefix + name, _shown(value), meaning


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)

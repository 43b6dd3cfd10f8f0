"""Arguments that several verbs take, and how they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lsp_deploy.errors import UserError

ModelArgument = Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
ShapesOption = Annotated[str | None, typer.Option("--shapes", help="Input shapes, as x:1x3x224x224.")]
RateOption = Annotated[
    float | None,
    typer.Option("--rate", min=0.01, max=1e6, help="Requests a second, at fixed moments.  [default: back-to-back]"),
]
TargetOption = Annotated[
    str, typer.Option("--target", help="Target's name or TOML file; `lsp-deploy targets` lists them.")
]
MinShapesOption = Annotated[
    str | None, typer.Option("--min-shapes", help="Smallest input shapes.  [default: those of compress, or batch 1]")
]
OptShapesOption = Annotated[
    str | None, typer.Option("--opt-shapes", help="Shapes to tune for.  [default: those of compress, or batch 8]")
]
MaxShapesOption = Annotated[
    str | None, typer.Option("--max-shapes", help="Largest input shapes.  [default: those of compress, or batch 32]")
]
PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", exists=True, dir_okay=False, help="Plugin library of a GPU's engine; repeat for several."),
]
PowerOption = Annotated[
    bool | None, typer.Option("--power/--no-power", help="Measure power and energy.  [default: where there is a meter]")
]


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def shapes_of(text: str | None) -> dict[str, tuple[int, ...]] | None:
    """Return the value of --shapes by input name.

    Raises:
        UserError: it is no list of shapes.
    """
    from lsp_deploy.recipe import parse_shapes

    if text is None:
        return None
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise UserError(f"--shapes {error}") from error

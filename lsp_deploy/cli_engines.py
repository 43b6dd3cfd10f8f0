"""The verbs that build and run engines: argument handling only."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lsp_deploy import console
from lsp_deploy.cli_options import (
    JsonOption,
    MaxShapesOption,
    MinShapesOption,
    ModelArgument,
    OptShapesOption,
    PluginOption,
    PowerOption,
    RateOption,
    ShapesOption,
    TargetOption,
    available_cores,
    shapes_of,
)

__all__ = ["build", "bundle", "calibrate_target", "compare", "profile"]


class Builder(str, Enum):
    """What builds engines."""

    TENSORRT_RTX = "tensorrt_rtx"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = "onnxruntime"


class Compatibility(str, Enum):
    """Which other GPUs may run an engine of TensorRT."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME = "same-compute-capability"


def profile(
    model: ModelArgument,
    target: Annotated[str, typer.Option("--target", help="Device to run on: cpu, or the GPU that is here.")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Batch size; repeat for several.")] = None,
    shapes: ShapesOption = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Threads.  [default: all cores]")] = None,
    duration: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds of measuring a batch size.")] = 3.0,
    warm_up: Annotated[float, typer.Option("--warm-up", min=0, help="Seconds of warm-up a batch size.")] = 0.5,
    plugin: PluginOption = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            exists=True,
            dir_okay=False,
            help="ONNX file whose weights a GPU's engine takes: one that is refittable, or was built without.",
        ),
    ] = None,
    rate: RateOption = None,
    power: PowerOption = None,
    json: JsonOption = False,
) -> None:
    """Measure MODEL's latency, throughput and power on this machine."""
    from lsp_deploy.comparing import profile_model
    from lsp_deploy.measurement_tables import profile_tables

    console.configure(json=json)
    result = profile_model(
        model,
        target,
        batches=batch,
        shapes=shapes_of(shapes),
        threads=jobs or available_cores(),
        duration=duration,
        warm_up=warm_up,
        plugins=plugin or (),
        weights=weights,
        rate_per_s=rate,
        power=power,
    )
    if json:
        console.print_json({"profiles": [one.model_dump(mode="json") for one in result]})
    else:
        for renderable in profile_tables(result):
            console.show(renderable)


def compare(
    dense: Annotated[Path, typer.Argument(help="ONNX file to compare with.", show_default=False)],
    compressed: Annotated[Path, typer.Argument(help="ONNX file to judge.", show_default=False)],
    data: Annotated[
        str, typer.Option("--data", help="Images or arrays to compare on; or synthetic, random.")
    ] = "synthetic",
    labels: Annotated[str | None, typer.Option("--labels", help="CSV with filename,class_index.")] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", help="Column instead of class_index.")] = None,
    preprocess: Annotated[str | None, typer.Option("--preprocess", help="Preset or TOML file.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images to use.  [default: all]")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size to time.  [default: 1, 8]")
    ] = None,
    target: Annotated[str, typer.Option("--target", help="Device to run on: cpu, or the GPU that is here.")] = "cpu",
    shapes: ShapesOption = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also measure the SQNR of every linear layer.")] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Threads.  [default: all cores]")] = None,
    plugin: PluginOption = None,
    rate: RateOption = None,
    power: PowerOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two models: fidelity on images, latency and power in one run."""
    from lsp_deploy.comparing import compare_models
    from lsp_deploy.measurement_tables import comparison_tables

    console.configure(json=json)
    result = compare_models(
        dense,
        compressed,
        data=data,
        labels=labels,
        label_column=label_column,
        preprocess=preprocess,
        samples=samples,
        batches=batch,
        shapes=shapes_of(shapes),
        layers=layers,
        threads=jobs or available_cores(),
        target=target,
        plugins=plugin or (),
        rate_per_s=rate,
        power=power,
    )
    if json:
        console.print_json(result.model_dump(mode="json"))
    else:
        for table in comparison_tables(result):
            console.show(table)


def build(
    model: Annotated[Path, typer.Argument(help="ONNX file, or output folder of compress.", show_default=False)],
    target: TargetOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Engine to write.  [default: in the output folder, or where you are]"),
    ] = None,
    builder: Annotated[
        Builder | None, typer.Option("--builder", help="Builder to use.  [default: the first of the target's]")
    ] = None,
    min_shapes: MinShapesOption = None,
    opt_shapes: OptShapesOption = None,
    max_shapes: MaxShapesOption = None,
    sparse_weights: Annotated[
        bool | None,
        typer.Option("--sparse-weights/--no-sparse-weights", help="2:4 kernels.  [default: where a weight is 2:4]"),
    ] = None,
    workspace_mb: Annotated[int | None, typer.Option("--workspace-mb", min=1, help="Builder's memory, MiB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option("--optimization-level", min=0, max=5, help="TensorRT's.  [default: its own]")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option("--timing-cache", help="File of TensorRT's kernel timings, read and written.")
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            "--plugin",
            exists=True,
            dir_okay=False,
            help="Plugin library to put into the engine; repeat for several.",
        ),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later TensorRT releases run the engine.")
    ] = False,
    hardware_compatible: Annotated[
        Compatibility, typer.Option("--hardware-compatible", help="Which other GPUs may run the engine.")
    ] = Compatibility.NONE,
    refittable: Annotated[bool, typer.Option("--refittable", help="Let other weights be put in later.")] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights out; they come from MODEL again.")
    ] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that a build may take.")] = 3600.0,
    json: JsonOption = False,
) -> None:
    """Build MODEL's engine for a target, or say what to run where; exits 1 where there is no engine."""
    from lsp_deploy.building import BuildRequest, build_model, built_json, built_lines
    from lsp_deploy.engines.protocol import BuildOptions

    console.configure(json=json)
    options = BuildOptions(
        workspace_mb=workspace_mb,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        plugins=tuple(plugin or ()),
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatible.value,
        refittable=refittable,
        strip_weights=strip_weights,
        timeout_seconds=timeout,
    )
    shapes = {"min_shapes": min_shapes, "opt_shapes": opt_shapes, "max_shapes": max_shapes}
    named = None if builder is None else builder.value
    built = build_model(model, BuildRequest(target, output, named, shapes, sparse_weights, options))
    for warning in built.info.warnings if built.info is not None else ():
        console.warn(warning)
    for line in built_lines(built, model, target):
        console.say(line)
    if json:
        console.print_json(built_json(built, target))
    if built.info is None:
        raise typer.Exit(1)


def bundle(
    model: Annotated[Path, typer.Argument(help="Output folder of compress, or ONNX file.", show_default=False)],
    target: TargetOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Archive to write: .tar.zst or .tar.gz.")],
    min_shapes: MinShapesOption = None,
    opt_shapes: OptShapesOption = None,
    max_shapes: MaxShapesOption = None,
    json: JsonOption = False,
) -> None:
    """Pack MODEL with all that its device needs to build and measure an engine itself."""
    from lsp_deploy.bundling import bundle_model

    console.configure(json=json)
    shapes = {"min_shapes": min_shapes, "opt_shapes": opt_shapes, "max_shapes": max_shapes}
    packed = bundle_model(model, target, output, shapes)
    for line in packed.lines():
        console.say(line)
    if json:
        console.print_json(packed.to_json())


def calibrate_target(
    target: Annotated[str, typer.Argument(help="Name, alias or TOML file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Target file to write, a .toml.")],
    plugin: PluginOption = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 8,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure from where on zeros pay on the GPU here; write TARGET so."""
    from lsp_deploy.calibrating import calibrate_target as run
    from lsp_deploy.calibrating import calibration_table

    console.configure(json=json)
    calibration = run(target, output, plugin or (), batch=batch, force=force)
    if json:
        console.print_json({"output": str(output), "target": calibration.target.model_dump(mode="json")})
    else:
        console.show(calibration_table(calibration))
        console.say(f"{output}: {calibration.source}; use it with --target {output}")

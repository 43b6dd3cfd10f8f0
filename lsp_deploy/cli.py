"""The command line: one verb, one short function; nothing but argument handling.

Heavy modules are imported inside the verbs, so that `lsp-deploy --help` answers at once.
"""

from __future__ import annotations

import json as json_format
import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lsp_deploy import __version__, console
from lsp_deploy.errors import CheckFailedError, UserError
from lsp_deploy.recipe_flags import with_recipe_flags

if TYPE_CHECKING:
    from lsp_deploy.reporting.report import Report

__all__ = ["app", "main"]

# typer carries a click of its own; the base of all its usage errors is reached through one that it exports.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]

DONE, CHECK_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="lsp-deploy",
    help="Make a vision transformer in ONNX smaller and faster for a named device, and say what it cost.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's takes longer to import than everything else together
    # Users come from tools that write --calibration_data and from tools that write --calibration-data.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)

ModelArgument = Annotated[Path, typer.Argument(help="ONNX file.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
ShapesOption = Annotated[str | None, typer.Option("--shapes", help="Input shapes, as x:1x3x224x224.")]
RateOption = Annotated[
    float | None,
    typer.Option("--rate", min=0.01, help="Requests a second, at fixed moments.  [default: back-to-back]"),
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
    list[Path] | None, typer.Option("--plugin", help="Plugin library of a GPU's engine; repeat for several.")
]
PowerOption = Annotated[
    bool | None, typer.Option("--power/--no-power", help="Measure power and energy.  [default: where there is a meter]")
]


class Exporter(str, Enum):
    """PyTorch's two ways to ONNX."""

    TORCHSCRIPT = "torchscript"
    DYNAMO = "dynamo"


class LoweredForm(str, Enum):
    """How `lower` writes a block-sparse layer."""

    MATMUL = "matmul"
    GATHER = "gather"


class Objective(str, Enum):
    """What `sensitivity` differentiates."""

    LOSS = "loss"
    TOP1 = "top1"
    PSEUDO = "pseudo"
    OUTPUT = "output"


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


class Device(str, Enum):
    """Where torch computes."""

    CPU = "cpu"
    CUDA = "cuda"


def main() -> None:
    """Run the command line and exit with 0 done, 1 check failed, 2 usage or bad input, 130 interrupted."""
    try:
        # Not standalone: errors come here, so that each is one line.
        result = typer.main.get_command(app).main(standalone_mode=False)
    except _ClickError as error:
        _fail(error.format_message(), USAGE)  # type: ignore[attr-defined]
    except UserError as error:
        _fail(str(error), USAGE)
    except CheckFailedError as error:
        _fail(str(error), CHECK_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    if result == INTERRUPTED:  # typer catches Ctrl-C itself
        _fail("interrupted; files that are written are whole, run the same command again", INTERRUPTED)
    sys.exit(result if isinstance(result, int) else DONE)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"lsp-deploy {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(USAGE)


@app.command()
@with_recipe_flags
def compress(
    model: ModelArgument,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="TOML file with the flags' names as keys.")] = None,
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Write the recipe to a TOML file.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Carry out a plan.json instead of deciding.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output folder.  [default: ./<model stem>-<target>/]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    no_build: Annotated[bool, typer.Option("--no-build", help="Build no engine.")] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Threads.  [default: all cores]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another recipe's result in the folder.")] = False,
    plugin: PluginOption = None,
    json: JsonOption = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Prune and quantize MODEL for a target, build and measure it."""
    from lsp_deploy.compress import RunOptions, check_replay_flags
    from lsp_deploy.compress import compress as run
    from lsp_deploy.compress import dry_run as plan_only
    from lsp_deploy.recipe import merge_recipe, save_recipe_file

    console.configure(json=json)
    if plan is not None:
        check_replay_flags(flags)
    merged = merge_recipe(flags, recipe, model)
    if save_recipe is not None:
        save_recipe_file(merged, save_recipe)
    command = shlex.join(sys.argv[1:])
    options = RunOptions(
        output, not no_build, jobs or available_cores(), force, plan, command, plugins=tuple(plugin or ())
    )
    if dry_run:
        decided, pruning = plan_only(model, merged, options)
        if json:
            _print_json(decided.model_dump(mode="json"))
        else:
            from lsp_deploy.reporting.plan_table import plan_table

            console.show(plan_table(decided, pruning))
        return
    outcome = run(model, merged, options)
    _show(outcome.report, json)
    for failure in outcome.failures:
        console.warn(failure)
    if outcome.failures:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to work in.")] = Path("lsp-deploy-demo"),
    copy_only: Annotated[
        bool, typer.Option("--copy-only", help="Copy model, data and recipe; do not compress.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Compress the embedded model, a ViT for digits, for an A100."""
    from lsp_deploy.compress import RunOptions
    from lsp_deploy.compress import compress as run
    from lsp_deploy.demo import copy_demo
    from lsp_deploy.recipe import merge_recipe

    console.configure(json=json)
    model = copy_demo(output)
    command = f"compress {model} --target a100"
    console.say(f"copied the demo to {output}; the command is: lsp-deploy {command}")
    if copy_only:
        if json:
            _print_json({"model": str(model)})
        return
    options = RunOptions(output=output / f"{model.stem}-a100", threads=available_cores(), command=command)
    outcome = run(model, merge_recipe({"target": "a100"}, None, model), options)
    _show(outcome.report, json)
    if outcome.failures:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def inspect(model: ModelArgument, shapes: ShapesOption = None, json: JsonOption = False) -> None:
    """Show MODEL's linear layers, zeros, Q/DQ, sizes and FLOPs."""
    from lsp_deploy.inspection import inspect_model, inspection_table

    console.configure(json=json)
    inspection = inspect_model(model, _shapes(shapes))
    if json:
        _print_json(inspection.to_json())
    else:
        for renderable in inspection_table(inspection):
            console.show(renderable)


@app.command()
def profile(
    model: ModelArgument,
    target: Annotated[str, typer.Option("--target", help="Device to run on: cpu, or the GPU that is here.")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Batch size; repeat for several.")] = None,
    shapes: ShapesOption = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Threads.  [default: all cores]")] = None,
    duration: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds of measuring a batch size.")] = 3.0,
    warm_up: Annotated[float, typer.Option("--warm-up", min=0, help="Seconds of warm-up a batch size.")] = 0.5,
    plugin: PluginOption = None,
    rate: RateOption = None,
    power: PowerOption = None,
    json: JsonOption = False,
) -> None:
    """Measure MODEL's latency, throughput and power on this machine."""
    from lsp_deploy.comparing import profile_model, profile_table
    from lsp_deploy.power_tables import power_tables

    console.configure(json=json)
    result = profile_model(
        model,
        target,
        batches=batch,
        shapes=_shapes(shapes),
        threads=jobs or available_cores(),
        duration=duration,
        warm_up=warm_up,
        plugins=plugin or (),
        rate_per_s=rate,
        power=power,
    )
    if json:
        _print_json({"profiles": [one.model_dump(mode="json") for one in result]})
    else:
        for renderable in (profile_table(result), *power_tables(result)):
            console.show(renderable)


@app.command()
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
    from lsp_deploy.comparing import compare_models, comparison_tables

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
        shapes=_shapes(shapes),
        layers=layers,
        threads=jobs or available_cores(),
        target=target,
        plugins=plugin or (),
        rate_per_s=rate,
        power=power,
    )
    if json:
        _print_json(result.model_dump(mode="json"))
    else:
        for table in comparison_tables(result):
            console.show(table)


@app.command()
def sensitivity(
    model: ModelArgument,
    calibration_data: Annotated[
        str,
        typer.Option("--calibration-data", help="Folder, .tar, .tar.gz, .npz or .npy of images; or synthetic, random."),
    ],
    block: Annotated[str, typer.Option("--block", help="Block shape block_k x block_n on W [K, N].")] = "32x32",
    labels: Annotated[str | None, typer.Option("--labels", help="CSV with filename,class_index.")] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", help="Column instead of class_index.")] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            "--objective", help="What is differentiated.  [default: loss with labels, top1 or output without]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output folder.  [default: ./<model stem>-sensitivity/]")
    ] = None,
    preprocess: Annotated[str | None, typer.Option("--preprocess", help="Preset or TOML file.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images to use.  [default: all]")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that draws.")] = 0,
    shapes: ShapesOption = None,
    kappa: Annotated[
        float | None, typer.Option("--kappa", help="Ridge of the Fisher matrix.  [default: 1 % of its diagonal]")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Samples a pass.  [default: by memory]")] = None,
    device: Annotated[Device, typer.Option("--device", help="Where gradients are computed.")] = Device.CPU,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder for gradients.  [default: the user's cache]")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Threads.  [default: all cores]")] = None,
    json: JsonOption = False,
) -> None:
    """Measure what removing blocks of each layer of MODEL would cost."""
    from lsp_deploy.analysing import SensitivityRequest, analyse_model, sensitivity_table

    console.configure(json=json)
    request = SensitivityRequest(
        block=block,
        calibration_data=calibration_data,
        labels=labels,
        label_column=label_column,
        objective=None if objective is None else objective.value,
        preprocess=preprocess,
        samples=samples,
        seed=seed,
        shapes=_shapes(shapes),
        kappa=kappa,
        batch=batch,
        device=device.value,
        cache=cache,
        jobs=jobs,
    )
    result = analyse_model(model, request, output)
    if result is None:  # not the first process of torchrun
        return
    if json:
        _print_json(result)
    else:
        console.show(sensitivity_table(result))


@app.command()
def lower(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    form: Annotated[
        LoweredForm, typer.Option("--form", help="matmul: whole weights; gather: MatMuls that skip zero blocks.")
    ] = LoweredForm.MATMUL,
    json: JsonOption = False,
) -> None:
    """Turn MODEL back into stock ONNX operators."""
    from lsp_deploy.lowering import lower_model

    console.configure(json=json)
    replaced = lower_model(model, output, form.value)
    counts = ", ".join(f"{count} {name}" for name, count in replaced.items())
    console.say(f"{output}: {counts or 'no operators of ours'} replaced by stock ONNX operators")
    if json:
        _print_json({"output": str(output), "form": form.value, "replaced": replaced})


@app.command()
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
        list[Path] | None, typer.Option("--plugin", help="Plugin library to put into the engine; repeat for several.")
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
        _print_json(built_json(built, target))
    if built.info is None:
        raise typer.Exit(CHECK_FAILED)


@app.command()
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
        _print_json(packed.to_json())


@app.command()
def export(
    spec: Annotated[
        str, typer.Argument(help="timm:NAME, for example timm:deit_small_patch16_224.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download trained weights.")] = False,
    opset: Annotated[int, typer.Option("--opset", min=13, max=23, help="ONNX opset.")] = 17,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Pixels a side.")] = None,
    num_classes: Annotated[int | None, typer.Option("--num-classes", min=1, help="Classes of the head.")] = None,
    exporter: Annotated[Exporter, typer.Option("--exporter", help="PyTorch's exporter.")] = Exporter.TORCHSCRIPT,
    seed: Annotated[int, typer.Option("--seed", help="Seed of random weights.")] = 0,
    json: JsonOption = False,
) -> None:
    """Export a timm classifier to ONNX, preprocessing included."""
    from lsp_deploy.export import export_model

    console.configure(json=json)
    result = export_model(
        spec,
        output,
        pretrained=pretrained,
        opset=opset,
        image_size=image_size,
        num_classes=num_classes,
        exporter=exporter.value,
        seed=seed,
    )
    console.say(f"{result.path}: {result.name}, opset {result.opset}, {result.parameters:,} parameters")
    if json:
        _print_json(result.to_json())


targets_app = typer.Typer(help="List the targets, or show one.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(targets_app, name="targets")


@targets_app.callback()
def targets(context: typer.Context, json: JsonOption = False) -> None:
    """List the targets, or show one."""
    from lsp_deploy.hardware.target import list_targets, target_table

    if context.invoked_subcommand is not None:
        return
    console.configure(json=json)
    if json:
        _print_json({"targets": [target.model_dump(mode="json") for target in list_targets()]})
    else:
        console.show(target_table(list_targets()))


@targets_app.command("show")
def targets_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name, alias or TOML file.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Show one target: types, peaks, bandwidth, from which zeros a layer pays, and the sources."""
    from lsp_deploy.hardware.target import load_target, target_details

    json = json or bool(context.parent and context.parent.params["json"])
    console.configure(json=json)
    target = load_target(name)
    if json:
        _print_json(target.model_dump(mode="json"))
    else:
        console.show(target_details(target))


@app.command("calibrate-target")
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
        _print_json({"output": str(output), "target": calibration.target.model_dump(mode="json")})
    else:
        console.show(calibration_table(calibration))
        console.say(f"{output}: {calibration.source}; use it with --target {output}")


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what is usable here, and what to install for the rest."""
    from lsp_deploy.doctor import diagnose, diagnosis_table

    console.configure(json=json)
    diagnosis = diagnose()
    if json:
        _print_json(diagnosis.model_dump(mode="json"))
    else:
        console.show(diagnosis_table(diagnosis))


def _show(report: Report, json: bool) -> None:
    if json:
        _print_json(report.model_dump(mode="json"))
        return
    from lsp_deploy.reporting.summary import summary_renderables

    for renderable in summary_renderables(report):
        console.show(renderable)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _shapes(text: str | None) -> dict[str, tuple[int, ...]] | None:
    from lsp_deploy.recipe import parse_shapes

    if text is None:
        return None
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise UserError(f"--shapes {error}") from error


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}" if code != INTERRUPTED else message, file=sys.stderr)
    sys.exit(code)


def _print_json(value: Any) -> None:
    print(json_format.dumps(value, indent=1))

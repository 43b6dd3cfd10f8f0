"""The command line: one verb, one short function; nothing but argument handling. Verbs of engines: cli_engines.py.

Heavy modules are imported inside the verbs, so that `lsp-deploy --help` answers at once.
"""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lsp_deploy import __version__, cli_engines, console
from lsp_deploy.cli_options import JsonOption, ModelArgument, PluginOption, ShapesOption, available_cores, shapes_of
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
            console.print_json(decided.model_dump(mode="json"))
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
            console.print_json({"model": str(model)})
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
    inspection = inspect_model(model, shapes_of(shapes))
    if json:
        console.print_json(inspection.to_json())
    else:
        for renderable in inspection_table(inspection):
            console.show(renderable)


for _verb in (cli_engines.profile, cli_engines.compare, cli_engines.build, cli_engines.bundle):
    app.command()(_verb)
app.command("calibrate-target")(cli_engines.calibrate_target)


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
        shapes=shapes_of(shapes),
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
        console.print_json(result)
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
        console.print_json({"output": str(output), "form": form.value, "replaced": replaced})


@app.command()
def export(
    spec: Annotated[
        str, typer.Argument(help="timm:NAME, for example timm:deit_small_patch16_224.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download trained weights.")] = False,
    opset: Annotated[
        int | None, typer.Option("--opset", min=13, max=23, help="ONNX opset.", show_default="17; dynamo 18")
    ] = None,
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
        console.print_json(result.to_json())


targets_app = typer.Typer(help="List the targets, or show one.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(targets_app, name="targets")


@targets_app.callback()
def targets(context: typer.Context, json: JsonOption = False) -> None:
    """List the targets, or show one."""
    from lsp_deploy.hardware.target import list_targets
    from lsp_deploy.hardware.target_tables import target_table

    if context.invoked_subcommand is not None:
        return
    console.configure(json=json)
    if json:
        console.print_json({"targets": [target.model_dump(mode="json") for target in list_targets()]})
    else:
        console.show(target_table(list_targets()))


@targets_app.command("show")
def targets_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name, alias or TOML file.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Show one target: types, peaks, bandwidth, from which zeros a layer pays, and the sources."""
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.hardware.target_tables import target_details

    json = json or bool(context.parent and context.parent.params["json"])
    console.configure(json=json)
    target = load_target(name)
    if json:
        console.print_json(target.model_dump(mode="json"))
    else:
        console.show(target_details(target))


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what is usable here, and what to install for the rest."""
    from lsp_deploy.doctor import diagnose, diagnosis_table

    console.configure(json=json)
    diagnosis = diagnose()
    if json:
        console.print_json(diagnosis.model_dump(mode="json"))
    else:
        console.show(diagnosis_table(diagnosis))


def _show(report: Report, json: bool) -> None:
    if json:
        console.print_json(report.model_dump(mode="json"))
        return
    from lsp_deploy.reporting.summary import summary_renderables

    for renderable in summary_renderables(report):
        console.show(renderable)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}" if code != INTERRUPTED else message, file=sys.stderr)
    sys.exit(code)

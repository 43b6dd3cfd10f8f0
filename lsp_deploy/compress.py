"""The pipeline, top to bottom: load, analyse, decide, apply, build, measure, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy import console
from lsp_deploy.errors import UserError
from lsp_deploy.plan import Plan, load_plan, save_plan
from lsp_deploy.recipe import AMOUNTS, Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.allocation.pruning import Pruning
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.reporting.report import Report
    from lsp_deploy.steps.calibration import CalibrationData
    from lsp_deploy.steps.evaluation import Evaluator
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["Outcome", "RunOptions", "compress", "dry_run"]


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about its work; nothing here changes the compressed model."""

    output: Path | None = None
    build: bool = True
    threads: int = 1
    force: bool = False
    plan: Path | None = None
    command: str = ""
    plugins: tuple[Path, ...] = ()
    """Libraries with operators for TensorRT, where layers are timed or an engine is built on the target's GPU."""


@dataclass
class Outcome:
    """What a run gives back: the report, where the files are, and the checks that were not met."""

    report: Report
    plan: Plan
    output: Path
    failures: list[str] = field(default_factory=list)


@dataclass
class _Stages:
    """Wall-clock seconds of each stage, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


def compress(model: Path, recipe: Recipe, options: RunOptions) -> Outcome:
    """Compress `model` as `recipe` says and write model, plan, engine and report into the output folder.

    Raises:
        UserError: input that cannot be worked with; nothing is left half-written.
    """
    from lsp_deploy.data import METADATA_KEY
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.model import save_model
    from lsp_deploy.passes.validate_target import ValidateTargetPass
    from lsp_deploy.reporting.assemble import assemble
    from lsp_deploy.steps.apply import apply_plan
    from lsp_deploy.steps.attention_maps import attention_maps
    from lsp_deploy.steps.building import build_engine
    from lsp_deploy.steps.measuring import measure
    from lsp_deploy.steps.output_folder import OutputFolder
    from lsp_deploy.steps.preparation import prepare
    from lsp_deploy.steps.pruning import missed_budget

    stages = _Stages()
    target = load_target(recipe.target)
    decided = None if options.plan is None else load_plan(options.plan)
    asked = recipe.typed() if decided is None else decided.recipe
    output = OutputFolder.check(options.output or default_output(model, target), model, asked, force=options.force)
    recipe = _with_precision_of(decided, recipe)
    with stages.time("load"):
        prepared = prepare(model, recipe, target)
        _check_measurable(prepared, recipe)
    with stages.time("data"):
        data = _data(prepared, recipe)
    if decided is not None:
        data.notes[:] = [f"carries out {options.plan}; the data named serves to measure, not to decide"]
    for note in data.notes:
        console.say(note)
    with stages.time("analyse and decide"):
        evaluator = _evaluator(prepared, data, options)
        plan, pruning = _plan(prepared, data, evaluator, recipe, target, options, decided)
    with stages.time("apply"):
        shapes = prepared.shapes.opt
        applied = apply_plan(prepared.canonical, plan, prepared.original_io, shapes, kind=target.kind)
        compressed, removed = applied.model, applied.structure
        if plan.preprocess is not None:  # whoever measures the model later prepares images the same way
            compressed.metadata_props[METADATA_KEY] = plan.preprocess.model_dump_json()
        ValidateTargetPass(target.rules())(compressed)
    with stages.time("write"):
        output.make()
        save_model(compressed, output.model)
        save_plan(plan, output.plan)
    with stages.time("build"):
        built = build_engine(output, target, plan, prepared.shapes, wanted=options.build, plugins=options.plugins)
    with stages.time("measure"):
        measured = measure(prepared, compressed, evaluator, target, options.threads)
        attention = None
        if plan.masks:
            first = evaluator.held_out.batch(evaluator.batch if prepared.fixed_batch else 1)
            shown = _with_attention_weights(compressed, prepared, plan, target)
            attention = attention_maps(prepared.canonical, shown, first, threads=options.threads)
    report = assemble(
        *(prepared, data, plan, removed, target, recipe, built, measured, stages.seconds, output, options.command),
        pruning=pruning,
        attention=attention,
    )
    output.write_report(report, plan)
    failures = [*built.failures, *_missed_budgets(report, recipe)]
    if (missed := missed_budget(plan, recipe, target, prepared.attention_flops)) is not None:
        failures.append(missed)
    return Outcome(report, plan, output.path, failures)


def dry_run(model: Path, recipe: Recipe, options: RunOptions) -> tuple[Plan, Pruning | None]:
    """Return the plan that `compress` would carry out, and how its zeros were found; writes no output."""
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.steps.preparation import prepare

    target = load_target(recipe.target)
    decided = None if options.plan is None else load_plan(options.plan)
    recipe = _with_precision_of(decided, recipe)
    prepared = prepare(model, recipe, target)
    _check_measurable(prepared, recipe)
    data = _data(prepared, recipe)
    for note in data.notes:
        console.say(note)
    return _plan(prepared, data, _evaluator(prepared, data, options), recipe, target, options, decided)


def default_output(model: Path, target: Target) -> Path:
    """Return the folder that a run writes to when none is named: ./<model stem>-<target>."""
    return Path(f"{model.stem}-{target.name}")


def _with_precision_of(plan: Plan | None, recipe: Recipe) -> Recipe:
    """Return `recipe` with the precision that a replayed plan was made for: compute type and opset follow from it."""
    if plan is None:
        return recipe
    int8 = any(layer.precision.dtype == "int8" for layer in plan.layers)
    return recipe.model_copy(update={"precision": "int8" if int8 else plan.recipe.get("precision", "auto")})


def _check_measurable(prepared: PreparedModel, recipe: Recipe) -> None:
    from lsp_deploy.graph.class_scores import class_output

    if recipe.max_drop is not None and class_output(prepared.canonical) is None:
        raise UserError("--max-drop is in points of top-1, and the model has no class output; leave it out")


def _data(prepared: PreparedModel, recipe: Recipe) -> CalibrationData:
    from lsp_deploy.steps.calibration import open_data

    return open_data(prepared, recipe)


def _evaluator(prepared: PreparedModel, data: CalibrationData, options: RunOptions) -> Evaluator:
    from lsp_deploy.steps.evaluation import Evaluator
    from lsp_deploy.steps.planning import batch_size

    batch = batch_size(prepared)
    return Evaluator(prepared.original, prepared.canonical, data.held_out, batch=batch, threads=options.threads)


def _plan(
    prepared: PreparedModel,
    data: CalibrationData,
    evaluator: Evaluator,
    recipe: Recipe,
    target: Target,
    options: RunOptions,
    decided: Plan | None,
) -> tuple[Plan, Pruning | None]:
    from lsp_deploy.data import image_size, load_preprocess
    from lsp_deploy.steps.planning import make_plan
    from lsp_deploy.steps.replaying import replay_plan

    if decided is not None and options.plan is not None:
        return replay_plan(decided, prepared, target, options.plan), None
    plan, pruning = make_plan(prepared, data, evaluator, recipe, target, options.threads, options.plugins)
    if recipe.preprocess is not None:
        plan.preprocess, _ = load_preprocess(recipe.preprocess, {}, image_size(prepared.shapes.opt))
    return plan, pruning


def _with_attention_weights(compressed: ir.Model, prepared: PreparedModel, plan: Plan, target: Target) -> ir.Model:
    """Return the compressed model with attention as exported: the operator that computes it whole shows no weights."""
    from lsp_deploy.plan import AttentionDecision
    from lsp_deploy.steps.apply import apply_plan

    if plan.attention.kernel == "engine":
        return compressed
    exported = plan.branch()
    exported.attention = AttentionDecision()
    shapes = prepared.shapes.opt
    return apply_plan(prepared.canonical, exported, prepared.original_io, shapes, kind=target.kind).model


def _missed_budgets(report: Report, recipe: Recipe) -> list[str]:
    missed = []
    budget = report.budget
    if recipe.max_drop is not None and budget is not None and budget.met is False:
        missed.append(
            f"--max-drop {recipe.max_drop:g} was not met: {budget.drop_points:.2f} points lost ({budget.measure})"
        )
    if recipe.flops is not None:
        left = (
            report.flops.linear_remaining_fraction
            if recipe.flops_of == "linear"
            else report.flops.model_remaining_fraction
        )
        if left > recipe.flops * 1.005 + 1e-9:
            missed.append(f"--flops {recipe.flops:g} was not met: {left:.3f} of the FLOPs remain")
    return missed


def check_replay_flags(recipe_flags: dict[str, object]) -> None:
    """Refuse flags that a replayed plan would leave without effect.

    Raises:
        UserError: naming the flag.
    """
    fixed = (
        *("precision", "sparsity", "block", *AMOUNTS, "flops_of", "samples", "seed", "recover", "io_types"),
        *("objective", "allocator", "power_weight", "search", "min_density", "exclude", "prefer_structure", "basis"),
    )
    for name in fixed:
        if recipe_flags.get(name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} and --plan contradict each other: the plan holds the decisions"
            )

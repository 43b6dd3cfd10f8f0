"""A plan made from measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lsp_deploy.allocation.decide import decide
from lsp_deploy.allocation.question import Question
from lsp_deploy.plan import Plan
from lsp_deploy.sensitivity.activations import ActivationStatistics, collect_activations
from lsp_deploy.steps.apply import apply_decisions
from lsp_deploy.steps.evaluation import Evaluator

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.allocation.pruning import Pruning
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.calibration import CalibrationData
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["batch_size", "make_plan"]


def make_plan(
    prepared: PreparedModel,
    data: CalibrationData,
    evaluator: Evaluator,
    recipe: Recipe,
    target: Target,
    threads: int,
    plugins: Sequence[Path] = (),
) -> tuple[Plan, Pruning | None]:
    """Measure the model on the calibration data and decide every layer; also returns how its zeros were found.

    Where the target is this machine's CPU or GPU, what its layers take is measured, too; `plugins` are for the GPU.
    """
    from lsp_deploy.steps.gpu_timing import time_gpu_layers
    from lsp_deploy.steps.pruning import choose_pruner
    from lsp_deploy.steps.timing import time_layers

    timings = time_layers(prepared, recipe, target, threads) if target.kind == "cpu" else None
    gpu_timings = time_gpu_layers(prepared, recipe, target, plugins) if target.kind == "gpu" else None
    choice = choose_pruner(prepared, data, recipe, target, threads, timings, gpu_timings)

    def statistics(plan: Plan) -> dict[str, ActivationStatistics]:
        unquantized = plan.branch()
        for layer in unquantized.layers:
            layer.precision.dtype = plan.compute_type
        return _statistics(apply_decisions(prepared.canonical, unquantized), prepared, data, threads)

    plan, pruning = decide(
        Question(
            recipe=recipe,
            target=target,
            model_sha256=prepared.sha256,
            opset=prepared.opset,
            compute_type=prepared.compute_type,
            layers=prepared.layers,
            weights=prepared.weights,
            statistics=statistics,
            attention_flops=prepared.attention_flops,
            real_images=data.real,
            held_out=len(data.held_out),
            recover=choice.recover,
            pruner=choice.pruner,
            why_no_pruner=choice.why_not,
            loss=evaluator.loss if evaluator.is_classifier else None,
            timings=timings,
            gpu_timings=gpu_timings,
        )
    )
    if pruning is not None:
        pruning.notes += choice.notes
    if choice.pruner is not None:
        choice.pruner.finish()
    return plan, pruning


def batch_size(prepared: PreparedModel) -> int:
    """Return how many samples a calibration run takes: enough to be fast, few enough for memory."""
    widest = max(layer.K for layer in prepared.layers)
    tokens = max(layer.M for layer in prepared.layers) / max(1, _batch(prepared))
    values = tokens * widest * len(prepared.layers)
    return _batch(prepared) if prepared.fixed_batch else int(np.clip(2e8 / values, 1, 8))


def _batch(prepared: PreparedModel) -> int:
    return next(iter(prepared.shapes.opt.values()))[0]


def _statistics(
    model: ir.Model, prepared: PreparedModel, data: CalibrationData, threads: int
) -> dict[str, ActivationStatistics]:
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine

    inputs = sorted(set(_input_names(prepared).values()))
    with OnnxRuntimeEngine.from_model(model, threads=threads, extra_outputs=inputs) as engine:
        return collect_activations(engine, prepared.layers, data.calibration, batch_size=batch_size(prepared))


def _input_names(prepared: PreparedModel) -> dict[str, str]:
    return {layer.name: str(layer.x.name) for layer in prepared.layers}

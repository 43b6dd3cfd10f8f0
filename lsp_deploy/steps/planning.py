"""A plan made from measurements, or taken from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.allocation.decide import decide
from lsp_deploy.allocation.masks import block_mask, magnitude_score, two_four_mask
from lsp_deploy.allocation.question import Question, set_weight_scales
from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan, Plan, RecoveryDecision
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

__all__ = ["batch_size", "make_plan", "replay_plan"]


def make_plan(
    prepared: PreparedModel, data: CalibrationData, evaluator: Evaluator, recipe: Recipe, target: Target, threads: int
) -> tuple[Plan, Pruning | None]:
    """Measure the model on the calibration data and decide every layer; also returns how its zeros were found."""
    from lsp_deploy.steps.pruning import choose_pruner

    choice = choose_pruner(prepared, data, recipe, target, threads)

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
            recover=choice.recover,
            pruner=choice.pruner,
            why_no_pruner=choice.why_not,
            loss=evaluator.loss if evaluator.is_classifier else None,
        )
    )
    if pruning is not None:
        pruning.notes += choice.notes
    if choice.pruner is not None:
        choice.pruner.finish()
    return plan, pruning


def replay_plan(plan: Plan, prepared: PreparedModel, target: Target, path: Path) -> Plan:
    """Return `plan` ready to be applied to `prepared`: the same bytes as the run that wrote it, without any data.

    Without plan.safetensors the decisions are applied again to the dense weights: masks by magnitude, weight scales
    by their maximum, nothing refitted; the user is told what is missing.

    Raises:
        UserError: the plan is of another model or target, or names layers that the model does not have.
    """
    if plan.model_sha256 != prepared.sha256:
        console.warn(f"{path} was made for another file than {prepared.path}; its decisions are applied by layer name")
    if plan.target != target.name:
        raise UserError(f"{path} is a plan for --target {plan.target}, not for {target.name}")
    if plan.compute_type != prepared.compute_type:
        raise UserError(f"{path} computes in {plan.compute_type}, this run in {prepared.compute_type}")
    layers = {layer.name: layer for layer in prepared.layers}
    for decided in plan.layers:
        found = layers.get(decided.name)
        if found is None or (found.K, found.N) != (decided.K, decided.N):
            raise UserError(f"{path}: layer {decided.name} ({decided.K} × {decided.N}) is not in {prepared.path}")
        if decided.precision.dtype == "int8" and decided.precision.activation_scale is None:
            raise UserError(f"{path}: layer {decided.name} is int8 but has no activation_scale")
    missing = [layer for layer in plan.layers if layer.sparsity.pattern != "dense" and layer.name not in plan.masks]
    for layer in missing:
        plan.masks[layer.name] = _magnitude_mask(layer, plan, prepared.weights[layer.name])
    refitted = [layer for layer in plan.layers if layer.recovery.method != "none" and layer.name not in plan.weights]
    for layer in refitted:
        layer.recovery = RecoveryDecision(reason="the refitted weights are missing: the dense ones stay")
    if missing or refitted:
        lost = [f"masks of {len(missing)} layers are chosen again, by magnitude"] if missing else []
        lost += [f"refitted weights of {len(refitted)} layers are the dense ones again"] if refitted else []
        console.warn(
            f"{path.with_suffix('.safetensors').name} is missing: {', '.join(lost)}; "
            "the result may differ from the one that was measured"
        )
    for name in [name for name in plan.masks if plan.layer(name).sparsity.pattern == "dense"]:
        del plan.masks[name]  # the json was edited: its decisions win
    scales = dict(plan.weight_scales)
    set_weight_scales(plan, prepared.weights)
    plan.weight_scales.update({name: scale for name, scale in scales.items() if name in plan.weight_scales})
    return plan


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


def _magnitude_mask(layer: LayerPlan, plan: Plan, weight: NDArray[np.float32]) -> NDArray[np.bool_]:
    score = magnitude_score(weight)
    if layer.sparsity.pattern == "2:4":
        return two_four_mask(score)
    return block_mask(score, plan.block_shape or (32, 32), 1 - layer.sparsity.zeros)

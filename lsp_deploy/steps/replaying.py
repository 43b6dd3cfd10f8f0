"""A plan taken from a file, with whatever was edited in it, made ready to be carried out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.allocation.gpu_execution import operator_cannot_run
from lsp_deploy.allocation.masks import block_mask, magnitude_score, two_four_mask
from lsp_deploy.allocation.question import set_weight_scales
from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan, Plan, RecoveryDecision

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["replay_plan"]


def replay_plan(plan: Plan, prepared: PreparedModel, target: Target, path: Path) -> Plan:
    """Return `plan` ready to be applied to `prepared`: the same bytes as the run that wrote it, without any data.

    Where the json was edited its decisions win, and masks that no longer fit them are chosen again. Without
    plan.safetensors the decisions are applied again to the dense weights: masks by magnitude, weight scales by their
    maximum, nothing refitted. The user is told of both.

    Args:
        plan: as it was read.
        prepared: the model.
        target: what it is carried out for.
        path: of the plan, for messages.

    Raises:
        UserError: the plan is of another model or target, names layers that the model does not have, or asks for what
            its weights no longer allow.
    """
    _check(plan, prepared, target, path)
    for layer in [layer for layer in plan.layers if layer.sparsity.pattern == "dense" and layer.name in plan.masks]:
        if layer.name in plan.weights:
            raise UserError(
                f"{path}: layer {layer.name} cannot become dense again, its weights are those that were found with "
                "its zeros; leave it out in a new run, with --exclude"
            )
        del plan.masks[layer.name]
    unfit = [layer for layer in plan.layers if layer.sparsity.pattern != "dense" and not _has_its_mask(layer, plan)]
    for layer in unfit:
        dense = plan.weights.get(layer.name, prepared.weights[layer.name])
        plan.masks[layer.name] = _magnitude_mask(layer, plan, dense, path)
        layer.sparsity.zeros = float(1 - plan.masks[layer.name].mean())
        layer.sparsity.method = "magnitude"
    refitted = [layer for layer in plan.layers if layer.recovery.method != "none" and layer.name not in plan.weights]
    for layer in refitted:
        layer.recovery = RecoveryDecision(reason="the refitted weights are missing: the dense ones stay")
    _tell(path, masks=len(unfit), weights=len(refitted))
    scales = dict(plan.weight_scales)
    set_weight_scales(plan, prepared.weights)
    chosen_again = {layer.name for layer in unfit}
    plan.weight_scales.update(
        {name: scale for name, scale in scales.items() if name in plan.weight_scales and name not in chosen_again}
    )
    return plan


def _check(plan: Plan, prepared: PreparedModel, target: Target, path: Path) -> None:
    if plan.model_sha256 != prepared.sha256:
        console.warn(f"{path} was made for another file than {prepared.path}; its decisions are applied by layer name")
    if plan.target != target.name:
        raise UserError(f"{path} is a plan for --target {plan.target}, not for {target.name}")
    if plan.compute_type != prepared.compute_type:
        raise UserError(f"{path} computes in {plan.compute_type}, this run in {prepared.compute_type}")
    if plan.attention.kernel != "engine" and target.kind != "cpu":
        raise UserError(f"{path}: attention.kernel lsp is not in engines for {target.name}: write engine")
    layers = {layer.name: layer for layer in prepared.layers}
    for decided in plan.layers:
        found = layers.get(decided.name)
        if found is None or (found.K, found.N) != (decided.K, decided.N):
            raise UserError(f"{path}: layer {decided.name} ({decided.K} × {decided.N}) is not in {prepared.path}")
        if decided.precision.dtype == "int8" and decided.precision.activation_scale is None:
            raise UserError(f"{path}: layer {decided.name} is int8 but has no activation_scale")
        if (wrong := _cannot_run(decided, found, _block_shape(plan), target)) is not None:
            raise UserError(f"{path}: layer {decided.name} {wrong}")


def _cannot_run(decided: LayerPlan, layer: LinearLayer, block: tuple[int, int], target: Target) -> str | None:
    """Return why a layer cannot be run the way its decision says, or None."""
    kernel, dtype = decided.execution.kernel, decided.precision.dtype
    if kernel in ("qgemm", "gather") and target.kind != "cpu":
        return f"has execution.kernel {kernel}, which engines for {target.name} do not have: write engine"
    if kernel == "block_sparse" and target.kind != "cpu":
        why_not = operator_cannot_run(decided, layer, block, target)
        return None if why_not is None else f"has execution.kernel block_sparse, but that {why_not}: write engine"
    if kernel == "qgemm" and dtype != "int8":
        return f"is {dtype}, and execution.kernel qgemm is for int8: write engine or block_sparse"
    if kernel == "gather" and dtype != "fp32":
        return f"is {dtype}, and execution.kernel gather is for fp32: write block_sparse"
    if kernel in ("block_sparse", "gather") and layer.node.op_type == "Conv":
        return f"is a convolution, which execution.kernel {kernel} does not do: write engine"
    if target.kind == "cpu" and dtype == "bf16" and kernel != "block_sparse":
        return (
            f"is bf16, which on a CPU the operator alone computes in: write execution.kernel block_sparse, not {kernel}"
        )
    return None


def _has_its_mask(layer: LayerPlan, plan: Plan) -> bool:
    """Whether the plan has a mask for a layer, of the pattern and with the zeros that its decision says."""
    mask = plan.masks.get(layer.name)
    if mask is None or abs(1 - float(mask.mean()) - layer.sparsity.zeros) > 1e-6:
        return False
    if layer.sparsity.pattern == "2:4":
        return layer.K % 4 == 0 and bool((mask.reshape(layer.K // 4, 4, layer.N).sum(axis=1) <= 2).all())
    block_k, block_n = _block_shape(plan)
    whole = np.repeat(np.repeat(mask[::block_k, ::block_n], block_k, axis=0), block_n, axis=1)
    return np.array_equal(mask, whole[: layer.K, : layer.N])


def _magnitude_mask(layer: LayerPlan, plan: Plan, weight: NDArray[np.float32], path: Path) -> NDArray[np.bool_]:
    score = magnitude_score(weight)
    if layer.sparsity.pattern == "block":
        return block_mask(score, _block_shape(plan), 1 - layer.sparsity.zeros)
    if layer.K % 4:
        raise UserError(f"{path}: layer {layer.name} cannot be 2:4, its K = {layer.K} is not a multiple of 4")
    return two_four_mask(score)


def _block_shape(plan: Plan) -> tuple[int, int]:
    return plan.block_shape or (32, 32)


def _tell(path: Path, *, masks: int, weights: int) -> None:
    """Warn of what is not as it was in the run that wrote the plan."""
    lost = [f"masks of {masks} layers are chosen again, by magnitude"] if masks else []
    lost += [f"refitted weights of {weights} layers are the dense ones again"] if weights else []
    if lost:
        tensors = path.with_suffix(".safetensors")
        why = f"{path.name} was edited" if tensors.exists() else f"{tensors.name} is missing"
        console.warn(f"{why}: {', '.join(lost)}; the result may differ from the one that was measured")

"""What a run prunes with: the graph in torch where zeros are to be found, and whether weights are won back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lsp_deploy import console
from lsp_deploy.allocation.execution import expected_type
from lsp_deploy.allocation.precision import COMPRESSIBLE_ROLES
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    from lsp_deploy.allocation.pruning import Pruner
    from lsp_deploy.hardware.cpu_timings import CpuTimings
    from lsp_deploy.hardware.gpu_timings import GpuTimings
    from lsp_deploy.hardware.target import ElementType, Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.plan import Plan
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.calibration import CalibrationData
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["PrunerChoice", "choose_pruner", "missed_budget"]

_INSTALL = "PyTorch is not installed; pip install 'lsp-deploy[torch]'"


@dataclass(frozen=True)
class PrunerChoice:
    """The means to prune with."""

    pruner: Pruner | None
    recover: bool
    """Whether surviving weights are reconstructed."""
    why_not: str
    """Why there is no pruner."""
    notes: list[str] = field(default_factory=list)
    """For the report."""


def choose_pruner(
    prepared: PreparedModel,
    data: CalibrationData,
    recipe: Recipe,
    target: Target,
    threads: int,
    timings: CpuTimings | None = None,
    gpu_timings: GpuTimings | None = None,
) -> PrunerChoice:
    """Return what the recipe's zeros are found with; nothing is analysed yet.

    Weights are reconstructed by default where the calibration data is real. Without PyTorch nothing can be
    differentiated: 2:4 then falls back to masks by |W|·‖x‖, and the user is told. `timings` of this machine's CPU or
    GPU are what a latency budget counts there.

    Raises:
        UserError: reconstruction was typed, and PyTorch is not installed.
    """
    if recipe.sparsity == "none":
        return PrunerChoice(None, False, "--sparsity none")
    wanted = recipe.recover or ("reconstruct" if data.real else "none")
    notes = []
    if recipe.recover is None and wanted == "none":
        notes.append("weights were not reconstructed: the calibration data is not real")
    if find_spec("torch") is None:
        if recipe.recover == "reconstruct":
            raise UserError(f"--recover reconstruct: {_INSTALL}")
        if recipe.sparsity == "2:4" and wanted == "reconstruct":
            note = f"2:4 masks are by |W|·‖x‖, without reconstruction: {_INSTALL}"
            console.warn(note)
            notes.append(note)
        return PrunerChoice(None, False, _INSTALL, notes)
    recover = wanted == "reconstruct"
    if recipe.sparsity == "2:4" and not recover:
        return PrunerChoice(None, False, "2:4 masks are by |W|·‖x‖", notes)

    # Threads that spin while they wait make a busy machine ten times slower; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from lsp_deploy.search.measure import measure_of
    from lsp_deploy.search.pruner import NetworkPruner, PruningTask

    torch.set_num_threads(threads)
    dtypes = {layer.name: _expected_type(layer, prepared, recipe, target, timings) for layer in prepared.layers}
    convolutions = [layer.name for layer in prepared.layers if layer.node.op_type == "Conv"]
    measure, budget = measure_of(
        recipe,
        target,
        dtypes,
        prepared.attention_flops,
        timings or gpu_timings,
        dense_only=convolutions if target.kind == "gpu" else (),  # the operator's kernels do none
    )
    task = PruningTask(
        model=prepared.canonical,
        model_sha256=prepared.sha256,
        shapes=prepared.shapes.opt,
        calibration=data.calibration,
        fixed_batch=prepared.fixed_batch,
        recipe=recipe,
        recover=recover,
        change_bases=recover if recipe.basis is None else recipe.basis == "change",
        measure=measure,
        budget=budget,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return PrunerChoice(NetworkPruner(task), recover, "", notes)


def _expected_type(
    layer: LinearLayer, prepared: PreparedModel, recipe: Recipe, target: Target, timings: CpuTimings | None
) -> ElementType:
    """Return the type that a layer's weights are going to have unless the loss forbids it."""
    int8 = "int8" in target.types and recipe.precision in ("auto", "int8") and layer.role in COMPRESSIBLE_ROLES
    if timings is None:
        return "int8" if int8 else prepared.compute_type
    times = timings.layers[layer.name]
    allowed: list[ElementType] = ["fp32"]
    if recipe.precision == "auto":
        allowed += ["bf16", "int8"] if int8 else ["bf16"]
    elif int8:
        allowed = ["int8"]
    elif recipe.precision == "bf16" and times.usable("bf16"):
        allowed = ["bf16"]
    return expected_type(times, allowed)


def missed_budget(plan: Plan, recipe: Recipe, target: Target, attention_flops: int) -> str | None:
    """Return in words that a latency, energy or size budget does not hold for what was decided in the end, or None."""
    from lsp_deploy.search.measure import measure_of, planned_cost

    fields = ("max_latency_ms", "max_energy_mj", "max_size_mb")
    field = next((name for name in fields if getattr(recipe, name) is not None), None)
    if field is None:
        return None
    dtypes: dict[str, ElementType] = {layer.name: layer.precision.dtype for layer in plan.layers}
    measure, budget = measure_of(recipe, target, dtypes, attention_flops)
    assert budget is not None  # the field says so
    flag = f"--{field.replace('_', '-')}"
    asked = getattr(recipe, field)
    try:
        cost = planned_cost(measure, plan)
    except UserError as error:
        return f"{flag} {asked:g} was not checked: {error}"
    if cost <= budget * 1.005:
        return None
    is_measured = measure.kind == "latency_us" and any(layer.execution.times_us for layer in plan.layers)
    how = "in its linear layers (measured, shape by shape)" if is_measured else "by the cost model (estimated)"
    found = f"{asked * cost / budget:.4g} {how}, with the element types as decided"
    return f"{flag} {asked:g} was not met: {found}"

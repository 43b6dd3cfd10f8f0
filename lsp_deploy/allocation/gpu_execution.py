"""What runs each layer on a GPU: its engine, or lsp::BlockSparseLinear where a layer has lost blocks.

The engine times its own kernels, and the operator's among themselves, but not the one against the other: that is what
the kernel in the plan decides. Blocks are removed on a GPU only where they were asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsp_deploy.allocation.execution import block_density
from lsp_deploy.allocation.question import Question
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cost_model import estimate_layer
from lsp_deploy.plan import ExecutionDecision, LayerPlan, Plan
from lsp_deploy.plugins.block_sparse.operator import BSL16_BLOCKS

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["decide_gpu_execution", "operator_cannot_run"]

_MIN_CAPABILITY = (8, 0)
Block = tuple[int, int]


def decide_gpu_execution(question: Question, plan: Plan) -> Plan:
    """Return the plan with the operator for every layer that has lost blocks and that its kernels can run."""
    decided = plan.branch()
    for layer, of_model in zip(decided.layers, question.layers, strict=True):
        density = block_density(decided, layer)
        if density == 1 or decided.block_shape is None:
            continue
        why_not = operator_cannot_run(layer, of_model, decided.block_shape, question.target)
        if why_not is not None:
            layer.execution.reason = f"left to the engine, at the dense speed: the operator {why_not}"
            continue
        layer.execution = ExecutionDecision(
            kernel="block_sparse",
            reason=f"block_sparse: {density:.0%} of the blocks survive; "
            + _expected(layer, density, decided.block_shape, question.target),
        )
    return decided


def operator_cannot_run(layer: LayerPlan, of_model: LinearLayer, block: Block, target: Target) -> str | None:
    """Return why the operator's kernels for GPUs cannot run a layer with blocks of this shape, or None."""
    if of_model.node.op_type == "Conv":
        return "does no convolutions"
    if layer.precision.dtype == "fp32":
        return "computes in fp16, bf16 and int8 on a GPU"
    if not set(block) <= set(BSL16_BLOCKS):
        return f"has no blocks of {block[0]}x{block[1]} on a GPU, but of {', '.join(map(str, BSL16_BLOCKS))}"
    capability = target.compute_capability
    if capability is not None and tuple(map(int, capability.split("."))) < _MIN_CAPABILITY:
        return f"needs compute capability 8.0, {target.name} has {capability}"
    return None


def _expected(layer: LayerPlan, density: float, block: Block, target: Target) -> str:
    """Say what the cost model expects of the operator."""
    try:
        estimate = estimate_layer(
            target, layer.M, layer.K, layer.N, layer.precision.dtype, pattern="block", density=density, block=block
        )
    except UserError as error:
        return f"its speed is not estimated: {error}"
    faster = "faster than" if estimate.runs_as == "block" else "no faster than"
    return f"{faster} the dense layer ({estimate.source})"

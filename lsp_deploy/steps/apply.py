"""A plan carried out: the passes that turn the canonical model into the compressed one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan, Plan

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.passes.remove_dead_structure import DeadStructure

__all__ = ["Applied", "apply_decisions", "apply_plan"]


@dataclass(frozen=True)
class Applied:
    """The compressed model, and the neurons, heads and layers that left it for good."""

    model: ir.Model
    structure: DeadStructure


def apply_plan(
    model: ir.Model,
    plan: Plan,
    original_io: Mapping[str, ir.DataType],
    shapes: Mapping[str, Sequence[int]],
    *,
    kind: Literal["gpu", "cpu"],
) -> Applied:
    """Return the compressed model: masks, what they leave dead removed, operators, Q/DQ, types, inputs and outputs.

    Args:
        model: canonical, float32; it is not changed.
        plan: the decisions.
        original_io: element types of the user's floating-point inputs and outputs, by name.
        shapes: concrete input shapes, by name.
        kind: of the target. TensorRT's engines, on a gpu, and ONNX Runtime, on a cpu, want some patterns written in a
            form of their own.

    Raises:
        UserError: the plan does not belong to this model, or cannot be carried out.
    """
    import onnx_ir as ir

    from lsp_deploy.passes.bsl16_blocks import Bsl16BlocksPass
    from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
    from lsp_deploy.passes.quantize_operator_inputs import QuantizeOperatorInputsPass
    from lsp_deploy.passes.set_io_types import SetIoTypesPass
    from lsp_deploy.passes.split_qkv import SplitQkvPass

    compressed = _with_plan_weights(model, plan)
    structure, rest = _remove_dead_structure(compressed, plan, shapes)
    if rest.attention.kernel == "lsp":
        _fuse_attention(compressed, rest)
    rest = _insert_operators(compressed, rest)
    if kind == "cpu":
        rest = _write_qgemms(compressed, rest)
    _check_types(rest)
    _quantize(compressed, rest)
    compute_type = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
    if plan.compute_type != "fp32":
        CastComputeTypePass(plan.compute_type, keep_io=False)(compressed)
    wanted = dict(original_io)
    if plan.io_types == "target":
        wanted = dict.fromkeys(original_io, compute_type[plan.compute_type])
    if kind == "gpu":
        SplitQkvPass()(compressed)
        QuantizeOperatorInputsPass()(compressed)
        Bsl16BlocksPass()(compressed)
    SetIoTypesPass(wanted)(compressed)
    return Applied(compressed, structure)


def apply_decisions(model: ir.Model, plan: Plan) -> ir.Model:
    """Return a copy of the canonical float32 `model` with the plan's weights, masks and Q/DQ, still in float32.

    Every layer keeps its name and its K and N, zeros included, so that it can be measured beside the dense one. What
    the plan computes in bf16 while the rest stays float32 is there as the operators that do so.
    """
    compressed = _with_plan_weights(model, plan)
    if plan.attention.kernel == "lsp" and plan.attention.compute == "bf16":
        _fuse_attention(compressed, plan)
    rounding = {layer.name for layer in plan.layers if _in_bf16_operator(plan, layer)}
    _insert_operators(compressed, _of_layers(plan, rounding))
    _quantize(compressed, _of_layers(plan, {layer.name for layer in plan.layers} - rounding))
    return compressed


def _with_plan_weights(model: ir.Model, plan: Plan) -> ir.Model:
    from lsp_deploy.passes.apply_masks import ApplyMasksPass
    from lsp_deploy.passes.replace_parameters import ReplaceParametersPass

    compressed = model.clone()
    ReplaceParametersPass(plan)(compressed)
    ApplyMasksPass(plan)(compressed)
    return compressed


def _remove_dead_structure(
    model: ir.Model, plan: Plan, shapes: Mapping[str, Sequence[int]]
) -> tuple[DeadStructure, Plan]:
    """Make the matrices of `model` smaller; return what went and the plan for the rest."""
    from lsp_deploy.passes.remove_dead_structure import DeadStructure, RemoveDeadStructurePass
    from lsp_deploy.passes.smaller_plan import smaller_plan

    if not plan.masks:
        return DeadStructure([], []), plan
    two_four = [layer.name for layer in plan.layers if layer.sparsity.pattern == "2:4"]
    removal = RemoveDeadStructurePass(_at_batch_of_two(model, shapes), rows_in_fours=two_four)
    removal(model)
    return removal.found, smaller_plan(plan, removal.found)


def _at_batch_of_two(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return the shapes with a dynamic batch of 2: with one of 1 a batch cannot be told from what broadcasts."""
    from lsp_deploy.model import input_shapes

    declared = input_shapes(model)
    return {
        name: shape if not declared[name] or isinstance(declared[name][0], int) else (2, *shape[1:])
        for name, shape in shapes.items()
    }


def _fuse_attention(model: ir.Model, plan: Plan) -> None:
    from lsp_deploy.passes.fuse_attention import FuseAttentionPass

    FuseAttentionPass("bfloat16" if plan.attention.compute == "bf16" else "float32")(model)


def _insert_operators(model: ir.Model, plan: Plan) -> Plan:
    """Run layers by lsp::BlockSparseLinear, or by what it is lowered to; return the plan for the others."""
    from lsp_deploy.passes.chain_int8 import ChainInt8Pass
    from lsp_deploy.passes.insert_block_sparse import InsertBlockSparsePass
    from lsp_deploy.passes.lower_operators import LowerOperatorsPass

    InsertBlockSparsePass(plan)(model)
    gathers = {layer.name for layer in plan.layers if layer.execution.kernel == "gather"}
    LowerOperatorsPass("gather", gathers.__contains__)(model)
    ChainInt8Pass()(model)
    rest = {layer.name for layer in plan.layers if layer.execution.kernel not in ("block_sparse", "gather")}
    return _of_layers(plan, rest)


def _write_qgemms(model: ir.Model, plan: Plan) -> Plan:
    """Give int8 layers the form that ONNX Runtime runs in int8; return the plan for the others: convolutions.

    That is the form of ONNX Runtime's own int8 kernels, so it is also that of layers left to the engine.
    """
    from lsp_deploy.passes.qgemm_form import QgemmFormPass

    convolutions = {node.name for node in model.graph if node.op_type == "Conv"}
    products = {
        layer.name for layer in plan.layers if layer.precision.dtype == "int8" and layer.name not in convolutions
    }
    qgemms = _of_layers(plan, products)
    for layer in qgemms.layers:
        layer.execution.kernel = "qgemm"
    QgemmFormPass(qgemms)(model)
    return _of_layers(plan, {layer.name for layer in plan.layers} - products)


def _in_bf16_operator(plan: Plan, layer: LayerPlan) -> bool:
    kernel, dtype = layer.execution.kernel, layer.precision.dtype
    return plan.compute_type == "fp32" and dtype == "bf16" and kernel == "block_sparse"


def _of_layers(plan: Plan, names: Collection[str]) -> Plan:
    """Return the plan with these layers alone."""
    part = plan.branch()
    part.layers = [layer for layer in part.layers if layer.name in names]
    return part


def _check_types(plan: Plan) -> None:
    """Refuse layers that an engine of float32 would not compute in what the plan says."""
    for layer in plan.layers:
        if plan.compute_type == "fp32" and layer.precision.dtype not in ("fp32", "int8"):
            raise UserError(
                f"the plan makes layer {layer.name} {layer.precision.dtype}, which its engine does not compute in; "
                "give it the execution.kernel block_sparse, or fp32"
            )


def _quantize(model: ir.Model, plan: Plan) -> None:
    from lsp_deploy.passes.center_activations import CenterActivationsPass
    from lsp_deploy.passes.insert_qdq import InsertQdqPass

    CenterActivationsPass(plan)(model)
    InsertQdqPass(plan)(model)

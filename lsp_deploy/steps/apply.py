"""A plan carried out: the passes that turn the canonical model into the compressed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lsp_deploy.plan import Plan

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["apply_decisions", "apply_plan"]


def apply_plan(model: ir.Model, plan: Plan, original_io: Mapping[str, ir.DataType], *, tensorrt: bool) -> ir.Model:
    """Return the compressed model: masks, Q/DQ, the plan's compute type, the inputs and outputs asked for.

    Args:
        model: canonical, float32; it is not changed.
        plan: the decisions.
        original_io: element types of the user's floating-point inputs and outputs, by name.
        tensorrt: whether the target's engines are TensorRT's, which want some patterns written in a form of their own.
    """
    import onnx_ir as ir

    from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
    from lsp_deploy.passes.set_io_types import SetIoTypesPass
    from lsp_deploy.passes.split_qkv import SplitQkvPass

    compressed = apply_decisions(model, plan)
    compute_type = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
    if plan.compute_type != "fp32":
        CastComputeTypePass(plan.compute_type, keep_io=False)(compressed)
    wanted = dict(original_io)
    if plan.io_types == "target":
        wanted = dict.fromkeys(original_io, compute_type[plan.compute_type])
    if tensorrt:
        SplitQkvPass()(compressed)
    SetIoTypesPass(wanted)(compressed)
    return compressed


def apply_decisions(model: ir.Model, plan: Plan) -> ir.Model:
    """Return a copy of the canonical float32 `model` with the plan's weights, masks and Q/DQ, still in float32."""
    from lsp_deploy.passes.apply_masks import ApplyMasksPass
    from lsp_deploy.passes.center_activations import CenterActivationsPass
    from lsp_deploy.passes.insert_qdq import InsertQdqPass
    from lsp_deploy.passes.replace_parameters import ReplaceParametersPass

    compressed = model.clone()
    ReplaceParametersPass(plan)(compressed)
    ApplyMasksPass(plan)(compressed)
    CenterActivationsPass(plan)(compressed)
    InsertQdqPass(plan)(compressed)
    return compressed

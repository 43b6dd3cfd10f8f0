"""A plan carried out: the passes that turn the canonical model into the compressed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsp_deploy.plan import Plan

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
    tensorrt: bool,
) -> Applied:
    """Return the compressed model: masks, what they leave dead removed, Q/DQ, compute type, the inputs and outputs.

    Args:
        model: canonical, float32; it is not changed.
        plan: the decisions.
        original_io: element types of the user's floating-point inputs and outputs, by name.
        shapes: concrete input shapes, by name.
        tensorrt: whether the target's engines are TensorRT's, which want some patterns written in a form of their own.
    """
    import onnx_ir as ir

    from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
    from lsp_deploy.passes.set_io_types import SetIoTypesPass
    from lsp_deploy.passes.split_qkv import SplitQkvPass

    compressed = _with_plan_weights(model, plan)
    structure, rest = _remove_dead_structure(compressed, plan, shapes)
    _quantize(compressed, rest)
    compute_type = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
    if plan.compute_type != "fp32":
        CastComputeTypePass(plan.compute_type, keep_io=False)(compressed)
    wanted = dict(original_io)
    if plan.io_types == "target":
        wanted = dict.fromkeys(original_io, compute_type[plan.compute_type])
    if tensorrt:
        SplitQkvPass()(compressed)
    SetIoTypesPass(wanted)(compressed)
    return Applied(compressed, structure)


def apply_decisions(model: ir.Model, plan: Plan) -> ir.Model:
    """Return a copy of the canonical float32 `model` with the plan's weights, masks and Q/DQ, still in float32.

    Every layer keeps its name and its K and N, zeros included, so that it can be measured beside the dense one.
    """
    compressed = _with_plan_weights(model, plan)
    _quantize(compressed, plan)
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


def _quantize(model: ir.Model, plan: Plan) -> None:
    from lsp_deploy.passes.center_activations import CenterActivationsPass
    from lsp_deploy.passes.insert_qdq import InsertQdqPass

    CenterActivationsPass(plan)(model)
    InsertQdqPass(plan)(model)

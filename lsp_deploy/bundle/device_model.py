"""The model as the device's TensorRT takes it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from lsp_deploy import console
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import Target
from lsp_deploy.passes.bsl16_blocks import Bsl16BlocksPass
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.validate_target import ValidateTargetPass
from lsp_deploy.plugins.attention.operator import OP_TYPE as ATTENTION
from lsp_deploy.plugins.operators import operator_nodes

__all__ = ["for_device"]


def for_device(model: ir.Model, path: Path, target: Target) -> ir.Model:
    """Bring `model` into the opset and form that `target` takes, in place, and return it.

    What exporters write beside the graph, such as the source lines of each node, is left out; the model's own metadata
    stay.

    Raises:
        UserError: the target cannot take the model, or it holds operators that have no plugin.
    """
    operators = operator_nodes(model)
    for node in operators:
        values = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type == ATTENTION or values is None or values.dtype == ir.DataType.FLOAT:
            raise UserError(
                f"{path} is made for a CPU: {node.name} is an operator that TensorRT has no plugin for; "
                f"compress the dense model with --target {target.name}"
            )
    ClearMetadataAndDocStringPass()(model)
    opset = model.opset_imports.get("", 0)
    if opset > target.max_opset and not operators:
        canonicalize(model, max_opset=target.max_opset)
        console.say(f"{path.name}: opset {opset} became {model.opset_imports['']}, {target.name} takes no later one")
    Bsl16BlocksPass()(model)
    ValidateTargetPass(target.rules())(model)
    return model

"""Activations that lie to one side of zero, moved so that symmetric int8 covers them with half the step."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.passes.insertion import insert_after
from lsp_deploy.passes.layer_bias import add_to_bias
from lsp_deploy.passes.layer_weights import add_initializer, layer_nodes, output_axis, stored, weight_value
from lsp_deploy.plan import LayerPlan, Plan

__all__ = ["CenterActivationsPass"]


class CenterActivationsPass(ir.passes.InPlacePass):
    """x @ W + b becomes (x - c) @ W + (b + c · 1 @ Ŵ), where the plan gives an int8 layer an activation_offset c.

    Runs before the Q/DQ are inserted: Ŵ is W as int8 will hold it, so that the shift itself costs no accuracy. GELU is
    never below -0.17: centered, it needs half the scale, 6 dB less noise, on engines that take no zero points. The
    subtraction joins the elementwise kernel that gives x.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan whose activation offsets are carried out."""
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the subtractions and correct the biases."""
        layers = [
            layer
            for layer in self.plan.layers
            if layer.precision.dtype == "int8" and layer.precision.activation_offset != 0
        ]
        nodes = layer_nodes(model.graph, layers)
        centered: dict[ir.Value, tuple[LayerPlan, ir.Value]] = {}
        for layer in layers:
            node = nodes[layer.name]
            x = node.inputs[0]
            assert x is not None
            if x not in centered:
                centered[x] = layer, _subtract(model.graph, x, layer)
            first, shifted = centered[x]
            if first.precision.activation_offset != layer.precision.activation_offset:
                raise UserError(
                    f"layers {first.name} and {layer.name} read the same tensor, but the plan gives it two offsets; "
                    "give both the same activation_offset"
                )
            add_to_bias(model.graph, node, _correction(node, layer, self.plan.weight_scales[layer.name]))
            node.replace_input_with(0, shifted)
        return ir.passes.PassResult(model, modified=bool(layers))


def _subtract(graph: ir.Graph, x: ir.Value, layer: LayerPlan) -> ir.Value:
    offset = np.array(layer.precision.activation_offset, np.float32)
    value = add_initializer(graph, f"{layer.name}/x_offset", offset)
    subtract = ir.Node("", "Sub", [x, value], name=f"{layer.name}/x/Sub")
    result = subtract.outputs[0]
    result.name, result.shape, result.type = f"{layer.name}/x_centered", x.shape, x.type
    insert_after(graph, x, subtract)
    return result


def _correction(node: ir.Node, layer: LayerPlan, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return c · 1 @ Ŵ, float32 [N]."""
    tensor = weight_value(node).const_value
    assert tensor is not None  # layer_nodes sees to it
    alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    weight = tensor.numpy().astype(np.float32) * np.float32(alpha)
    steps = stored(np.broadcast_to(scale, (layer.K, layer.N)), node, weight.shape)
    held = np.clip(np.rint(weight / steps), -127, 127) * steps
    axis = output_axis(node, held.ndim)
    sums = np.moveaxis(held, axis, 0).reshape(layer.N, layer.K).sum(axis=1, dtype=np.float64)
    return np.asarray(sums * layer.precision.activation_offset, np.float32)

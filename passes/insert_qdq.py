"""INT8 linear layers, written as QuantizeLinear and DequantizeLinear around the operands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.passes.insertion import insert_after
from lsp_deploy.passes.int8_scales import activation_scale, int8_weight, weight_scale
from lsp_deploy.passes.layer_weights import add_initializer, layer_nodes, output_axis, stored, weight_value
from lsp_deploy.plan import LayerPlan, Plan

__all__ = ["InsertQdqPass"]

MIN_OPSET = 13  # DequantizeLinear along an axis


class InsertQdqPass(ir.passes.InPlacePass):
    """x @ W becomes DequantizeLinear(QuantizeLinear(x)) @ DequantizeLinear(W int8), where the plan says int8.

    Symmetric: zero points are 0, written out. Activations have one scale a tensor, and layers that read the same
    tensor read one pair; weights have one scale an output channel. W int8 = clip(round half even(W / scale), ±127), so
    that zeros stay exactly zero. Scales are float32; biases stay as they are.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan whose precisions and scales are carried out."""
        super().__init__()
        self.plan = plan

    def requires(self, model: ir.Model) -> None:
        """Check that the opset has per-channel DequantizeLinear."""
        if (opset := model.opset_imports.get("", 0)) < MIN_OPSET:
            raise ir.passes.PreconditionError(f"Q/DQ along an axis needs opset {MIN_OPSET}, the model has {opset}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs.

        Raises:
            UserError: the plan does not belong to this model, lacks a scale, or gives one tensor two scales.
        """
        layers = [layer for layer in self.plan.layers if layer.precision.dtype == "int8"]
        nodes = layer_nodes(model.graph, layers)
        quantizer = _Quantizer(model.graph)
        for layer in layers:
            quantizer.quantize_activation(nodes[layer.name], layer)
            quantizer.quantize_weight(nodes[layer.name], layer, weight_scale(self.plan, layer))
        quantizer.remove_replaced_weights()
        return ir.passes.PassResult(model, modified=bool(layers))


@dataclass(frozen=True)
class _SharedWeight:
    """An int8 weight and what it was made from, so that layers that share one go on sharing it."""

    source: ir.Value
    alpha: float
    axis: int
    scale: ir.Value
    quantized: ir.Value


class _Quantizer:
    """Inserts the pairs into one graph; remembers what layers share."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.activations: dict[ir.Value, tuple[LayerPlan, ir.Value]] = {}
        self.weights: list[_SharedWeight] = []

    def quantize_activation(self, node: ir.Node, layer: LayerPlan) -> None:
        """Let `node` read its activation through the tensor's one Q/DQ pair."""
        x = node.inputs[0]
        assert x is not None
        producer = x.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            return
        scale = activation_scale(layer)
        if x not in self.activations:
            self.activations[x] = (layer, self._insert_pair(x, layer.name, scale))
        first, dequantized = self.activations[x]
        if first.precision.activation_scale != scale:
            raise UserError(
                f"layers {first.name} and {layer.name} read the same tensor, but the plan gives it two scales, "
                f"{first.precision.activation_scale:g} and {scale:g}; give both the same activation_scale"
            )
        node.replace_input_with(0, dequantized)

    def quantize_weight(self, node: ir.Node, layer: LayerPlan, scale: NDArray[np.float32]) -> None:
        """Let `node` read an int8 weight through a DequantizeLinear of its own."""
        source = weight_value(node)
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
        shared = self._int8_weight(node, layer, source, alpha, scale)
        if alpha != 1.0:
            node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)  # it is in the weight now, as it is in the scale
        # One zero point a layer: ONNX Runtime's x64quantprecision cannot take one that several weights share.
        zero = add_initializer(self.graph, f"{layer.name}/weight_zero_point", np.zeros(layer.N, np.int8))
        dequantize = ir.Node(
            "",
            "DequantizeLinear",
            [shared.quantized, shared.scale, zero],
            [ir.AttrInt64("axis", shared.axis)],
            name=f"{layer.name}/weight/DequantizeLinear",
        )
        _describe(dequantize.outputs[0], f"{layer.name}/weight_dq", source.shape, ir.DataType.FLOAT)
        self.graph.insert_before(node, dequantize)
        node.replace_input_with(1, dequantize.outputs[0])

    def remove_replaced_weights(self) -> None:
        """Drop the float weights that nothing reads any more."""
        for source in {weight.source for weight in self.weights}:
            if not source.uses() and not source.is_graph_output():
                del self.graph.initializers[str(source.name)]

    def _insert_pair(self, x: ir.Value, layer: str, scale: float) -> ir.Value:
        scale_value = add_initializer(self.graph, f"{layer}/x_scale", np.array(scale, np.float32))
        zero = add_initializer(self.graph, f"{layer}/x_zero_point", np.array(0, np.int8))
        quantize = ir.Node("", "QuantizeLinear", [x, scale_value, zero], name=f"{layer}/x/QuantizeLinear")
        _describe(quantize.outputs[0], f"{layer}/x_q", x.shape, ir.DataType.INT8)
        operands = [quantize.outputs[0], scale_value, zero]
        dequantize = ir.Node("", "DequantizeLinear", operands, name=f"{layer}/x/DequantizeLinear")
        _describe(dequantize.outputs[0], f"{layer}/x_dq", x.shape, ir.DataType.FLOAT)
        insert_after(self.graph, x, [quantize, dequantize])
        return dequantize.outputs[0]

    def _int8_weight(
        self, node: ir.Node, layer: LayerPlan, source: ir.Value, alpha: float, scale: NDArray[np.float32]
    ) -> _SharedWeight:
        tensor = source.const_value
        assert tensor is not None  # layer_nodes sees to it
        weight = tensor.numpy()
        axis = output_axis(node, weight.ndim)
        for shared in self.weights:
            if (shared.source, shared.alpha, shared.axis) == (source, alpha, axis):
                assert shared.scale.const_value is not None
                if np.array_equal(shared.scale.const_value.numpy(), scale):
                    return shared
        steps = stored(np.broadcast_to(scale, (layer.K, layer.N)), node, weight.shape)
        quantized = int8_weight(weight.astype(np.float32) * np.float32(alpha), steps)
        shared = _SharedWeight(
            source=source,
            alpha=alpha,
            axis=axis,
            scale=add_initializer(self.graph, f"{layer.name}/weight_scale", scale.astype(np.float32)),
            quantized=add_initializer(self.graph, f"{layer.name}/weight_q", quantized),
        )
        self.weights.append(shared)
        return shared


def _describe(value: ir.Value, name: str, shape: ir.Shape | None, dtype: ir.DataType) -> None:
    value.name, value.shape, value.type = name, shape, ir.TensorType(dtype)

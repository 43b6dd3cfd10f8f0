"""Weights, biases and other constants that were found for a network, in place of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.graph.layer_surroundings import find_bias
from lsp_deploy.passes.layer_weights import add_initializer, layer_nodes, stored, weight_value
from lsp_deploy.plan import Plan

__all__ = ["ReplaceParametersPass"]


class ReplaceParametersPass(ir.passes.InPlacePass):
    """x @ W + b becomes x @ W' + b', f(x, c) becomes f(x, c'), where the plan holds a weight, bias or constant.

    A tensor that other nodes read too stays as it is for them.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan whose `weights` (float32 [K, N]), `biases` (float32 [N]) and `constants` are put in."""
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the constants.

        Raises:
            UserError: the plan does not belong to this model.
        """
        plan = self.plan
        changed = [layer for layer in plan.layers if layer.name in plan.weights or layer.name in plan.biases]
        for name, node in layer_nodes(model.graph, changed).items():
            if (weight := plan.weights.get(name)) is not None:
                _replace_weight(model.graph, name, node, weight)
            if (bias := plan.biases.get(name)) is not None:
                _replace_bias(model.graph, name, node, bias)
        for place, array in sorted(plan.constants.items()):
            _replace_constant(model.graph, place, array)
        return ir.passes.PassResult(model, modified=bool(changed or plan.constants))


def _replace_constant(graph: ir.Graph, place: str, array: NDArray[np.float32]) -> None:
    name, _, index = place.rpartition(":")
    node = next((node for node in graph if node.name == name), None)
    known = node is not None and index.isdigit() and int(index) < len(node.inputs)
    old = node.inputs[int(index)] if node is not None and known else None
    if node is None or old is None or old.const_value is None or old.const_value.size != array.size:
        raise UserError(
            f"the plan holds a constant for {place}, which this model does not have; is it of another model?"
        )
    like = old.const_value.numpy()
    _swap(graph, node, int(index), f"{name}/constant_{index}", array.reshape(like.shape).astype(like.dtype))


def _replace_weight(graph: ir.Graph, name: str, node: ir.Node, weight: NDArray[np.float32]) -> None:
    old = weight_value(node)
    tensor = old.const_value
    assert tensor is not None  # layer_nodes sees to it
    like = tensor.numpy()
    alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    array = stored(weight, node, like.shape) / np.float32(alpha)
    _swap(graph, node, 1, f"{name}/weight", np.ascontiguousarray(array).astype(like.dtype))


def _replace_bias(graph: ir.Graph, name: str, node: ir.Node, bias: NDArray[np.float32]) -> None:
    old, adder = find_bias(node, bias.size)
    if old is None or adder is None or old.const_value is None:
        raise UserError(f"the plan holds a bias for layer {name}, which has none in this model")
    like = old.const_value.numpy()
    beta = adder.attributes.get_float("beta", 1.0) if adder is node else 1.0
    array = (bias / np.float32(beta)).reshape(like.shape).astype(like.dtype)
    index = next(index for index, value in enumerate(adder.inputs) if value is old)
    _swap(graph, adder, index, f"{name}/bias", array)


def _swap(graph: ir.Graph, node: ir.Node, index: int, name: str, array: NDArray[Any]) -> None:
    old = node.inputs[index]
    assert old is not None
    node.replace_input_with(index, add_initializer(graph, name, array))
    if not old.uses() and not old.is_graph_output():
        del graph.initializers[str(old.name)]

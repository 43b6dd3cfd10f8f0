"""What surrounds a linear layer: the bias, activation and residual Add that follow it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from lsp_deploy.graph.constants import evaluate, is_constant, operators
from lsp_deploy.graph.dataflow import NONLINEAR, DataFlow, data_inputs

__all__ = ["find_activation", "find_bias", "find_residual"]

_PASSING = operators(
    "Cast DequantizeLinear Dropout Flatten Identity QuantizeLinear Reshape Squeeze Transpose Unsqueeze"
)
_NEVER_BEFORE_RESIDUAL = operators(
    "Conv GroupNormalization InstanceNormalization LayerNormalization LpNormalization RMSNormalization ReduceL2 "
    "ReduceMean ReduceSum SimplifiedLayerNormalization Softmax"
)
_ELEMENTWISE = NONLINEAR | {"Add", "Div", "Mul", "Pow", "Sub"}
_NAMES = {"BiasGelu": "gelu", "FastGelu": "gelu_tanh", "QuickGelu": "quick_gelu", "Swish": "silu"}
_LONGEST = 16  # nodes of a decomposed activation


def find_bias(node: ir.Node, n: int) -> tuple[ir.Value | None, ir.Node | None]:
    """Return a layer's constant bias of `n` entries and the node that adds it: `node` itself, or an Add after it."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return (node.inputs[2], node) if _is_bias(node.inputs[2], n) else (None, None)
    y = node.outputs[0]
    consumers = y.consumers()
    if len(consumers) != 1 or consumers[0].op_type != "Add" or y.is_graph_output() or node.op_type == "Conv":
        return None, None
    add = consumers[0]
    other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
    return (other, add) if _is_bias(other, n) else (None, None)


def find_activation(y: ir.Value, flow: DataFlow) -> tuple[ir.Node | None, str | None]:
    """Return the node that gives the activation of `y`, and what it is, where all of `y` is activated.

    A decomposed activation is a group of elementwise nodes that reads nothing but `y` and constants; the node returned
    is its last. None where `y` is also used before the activation, or is gated by another layer.
    """
    group: list[ir.Node] = []
    inside, live = {y}, {y}
    while len(live) > 1 or not any(node.op_type in NONLINEAR for node in group):
        if any(value.is_graph_output() for value in live) or len(group) == _LONGEST:
            return None, None
        waiting = {node for value in live for node in value.consumers()}.difference(group)
        if not waiting or any(node not in flow.position for node in waiting):
            return None, None
        node = min(waiting, key=flow.position.__getitem__)
        if not _belongs(node, inside, flow):
            return None, None
        group.append(node)
        inside.update(node.outputs)
        live = {value for value in inside if any(user not in group for user in value.consumers())}
        live.update(value for value in inside if value.is_graph_output())
    if not live:
        return None, None
    kind = _kind(group)
    if kind in ("gelu", "gelu_tanh") and len(group) > 1:
        group += _trailing_factor(next(iter(live)), flow)
    return group[-1], kind


def find_residual(x: ir.Value, y: ir.Value, flow: DataFlow) -> ir.Node | None:
    """Return the Add that joins `y`, after bias, activation, scaling and reordering, with what `x` is computed from."""
    joined: set[ir.Value] = {y}
    for node in flow.users_of(flow.reach(y).values):
        inner = [value for value in data_inputs(node) if value in joined]
        outer = [value for value in data_inputs(node) if value not in joined and value not in flow.constants]
        if not inner or node in flow.linear or node.op_type in _NEVER_BEFORE_RESIDUAL:
            continue
        if node.op_type == "Add" and outer and flow.is_ancestor(outer[0], x):
            return node
        if not any(value in flow.after_linear for value in outer):
            joined.update(node.outputs)
    return None


def _is_bias(value: ir.Value | None, n: int) -> bool:
    if value is None or not is_constant(value):
        return False
    shape = evaluate(value).shape
    return len(shape) > 0 and shape[-1] == n == int(np.prod(shape))


def _belongs(node: ir.Node, inside: set[ir.Value], flow: DataFlow) -> bool:
    if node.op_type in _PASSING:
        return node.inputs[0] in inside
    return node.op_type in _ELEMENTWISE and all(
        value is None or value in inside or value in flow.constants for value in node.inputs
    )


def _kind(group: Sequence[ir.Node]) -> str:
    ops = {node.op_type: node for node in group}
    products = [node for node in group if node.op_type == "Mul" and not any(is_constant(v) for v in node.inputs)]
    if "Gelu" in ops:
        return "gelu_tanh" if ops["Gelu"].attributes.get_string("approximate", "none") == "tanh" else "gelu"
    if "Erf" in ops:
        return "gelu"
    if "Tanh" in ops and products:
        return "gelu_tanh"
    if "Sigmoid" in ops and products:
        return "quick_gelu" if any(abs(factor - 1.702) < 1e-2 for factor in _factors(group)) else "silu"
    if "HardSigmoid" in ops and products:
        return "hardswish"
    nonlinear = next(op for op in ops if op in NONLINEAR)
    return _NAMES.get(nonlinear, nonlinear.lower())


def _factors(group: Iterable[ir.Node]) -> Iterator[float]:
    for node in group:
        for value in node.inputs if node.op_type == "Mul" else ():
            if value is not None and is_constant(value) and (array := evaluate(value)).size == 1:
                yield float(array.reshape(()))


def _trailing_factor(value: ir.Value, flow: DataFlow) -> list[ir.Node]:
    """Return the Mul by one half that ends a decomposed GELU, where it comes last."""
    consumers = value.consumers()
    if len(consumers) != 1 or consumers[0].op_type not in ("Mul", "Div") or value.is_graph_output():
        return []
    factor = next((operand for operand in consumers[0].inputs if operand in flow.constants), None)
    return [consumers[0]] if factor is not None and evaluate(factor).size == 1 else []

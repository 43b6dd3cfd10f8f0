"""GELU written out in elementary operators."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from lsp_deploy.passes.constant_inputs import constant_scalar
from lsp_deploy.passes.node_names import name_beside

__all__ = ["DecomposedGelu", "FuseGeluPass", "find_gelus"]

# A polynomial in x and the function f that GELU holds, by the powers of both.
_Polynomial = dict[tuple[int, int], float]
_Powers = tuple[int, int]

_X, _F = (1, 0), (0, 1)

# GELU(x) = x/2 + x/2 · f, where f is erf or tanh of one of these.
_GELU: _Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_INNER: dict[str, _Polynomial] = {
    "Erf": {(1, 0): math.sqrt(1 / 2)},
    "Tanh": {(1, 0): math.sqrt(2 / math.pi), (3, 0): math.sqrt(2 / math.pi) * 0.044715},
}

# How far a constant may be off: by the digits that people write (1.4142), or by the type it is stored in.
_TOLERANCE = {ir.DataType.FLOAT: 2e-5, ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1e-2}

# No way of writing GELU needs more nodes between x and f, or between f and the result.
_MAX_NODES = 8


@dataclass(frozen=True)
class DecomposedGelu:
    """A GELU in elementary operators."""

    x: ir.Value
    y: ir.Value
    approximate: Literal["none", "tanh"]
    function: ir.Node
    """The Erf or Tanh."""
    nodes: frozenset[ir.Node]
    """All that compute y from x; nothing else uses what is between."""


class FuseGeluPass(ir.passes.InPlacePass):
    """x/2 (1 + erf(x/√2)), or the same with tanh(√(2/π) (x + 0.044715 x³)), becomes Gelu(x).

    In whatever order the products and sums are written. QuickGELU, x σ(1.702 x), is another function and stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every GELU of the main graph."""
        gelus = list(find_gelus(model.graph))
        for gelu in gelus:
            _fuse(model.graph, gelu)
        if gelus:
            NameFixPass()(model)
        return ir.passes.PassResult(model, modified=bool(gelus))

    def requires(self, model: ir.Model) -> None:
        """Check that the opset has Gelu, which came with 20."""
        if model.opset_imports[""] < 20:
            raise ir.passes.PreconditionError(f"Gelu needs opset 20, not {model.opset_imports['']}")


def find_gelus(graph: ir.Graph) -> Iterator[DecomposedGelu]:
    """Find the decomposed GELUs of a graph, in graph order.

    A group of nodes is a GELU if it computes the same polynomial of x and f, where f is erf or tanh of the right
    polynomial of x. So no list of orderings is needed.
    """
    for node in graph:
        if node.op_type in _INNER and node.domain == "":
            gelu = _gelu_around(node)
            if gelu is not None:
                yield gelu


def _gelu_around(function: ir.Node) -> DecomposedGelu | None:
    inner, f = function.inputs[0], function.outputs[0]
    tolerance = _TOLERANCE.get(f.dtype) if f.dtype is not None else None
    if inner is None or tolerance is None:
        return None
    for x in _candidates(inner):
        nodes = {function}
        if not _is_close(_polynomial(inner, {x: _X}, nodes), _INNER[function.op_type], tolerance):
            continue
        for y in _results(f):
            computing = set(nodes)
            result = _polynomial(y, {x: _X, f: _F}, computing)
            if _is_close(result, _GELU, tolerance) and _is_alike(x, y) and _is_closed(computing, y):
                kind: Literal["none", "tanh"] = "none" if function.op_type == "Erf" else "tanh"
                return DecomposedGelu(x, y, kind, function, frozenset(computing))
    return None


def _candidates(value: ir.Value) -> Iterator[ir.Value]:
    """Go from the argument of f up through the arithmetic: one of these values is x."""
    queue, seen = [value], {value}
    for candidate in queue:
        yield candidate
        node = candidate.producer()
        if node is None or node.op_type not in _ARITHMETIC or len(seen) > _MAX_NODES:
            continue
        for operand in node.inputs:
            if operand is not None and operand not in seen and constant_scalar(operand) is None:
                seen.add(operand)
                queue.append(operand)


def _results(value: ir.Value) -> Iterator[ir.Value]:
    """Go from f down to the value that is computed from it alone and x: one of these values is y."""
    for _ in range(_MAX_NODES):
        consumers = {node for node, _ in value.uses()}
        if len(consumers) != 1:
            return
        (node,) = consumers
        if node.op_type not in _ARITHMETIC or node.domain:
            return
        value = node.outputs[0]
        yield value


def _is_alike(x: ir.Value, y: ir.Value) -> bool:
    """Return whether no constant adds dimensions."""
    return x.dtype == y.dtype and x.shape is not None and y.shape is not None and len(x.shape) == len(y.shape)


def _is_closed(nodes: set[ir.Node], y: ir.Value) -> bool:
    """Return whether nothing outside `nodes` uses what they compute, `y` aside."""
    inside = [output for node in nodes for output in node.outputs if output is not y]
    return not any(
        value.is_graph_output() or any(consumer not in nodes for consumer, _ in value.uses()) for value in inside
    )


def _fuse(graph: ir.Graph, gelu: DecomposedGelu) -> None:
    y, last = gelu.y, gelu.y.producer()
    assert last is not None
    attributes = {"approximate": "tanh"} if gelu.approximate == "tanh" else {}
    fused = ir.node("Gelu", [gelu.x], attributes, name=name_beside(gelu.function, "Gelu"))
    output = fused.outputs[0]
    output.name, output.shape, output.type = y.name, y.shape, y.type
    graph.insert_before(last, fused)
    ir.convenience.replace_all_uses_with(y, output, replace_graph_outputs=True)
    graph.remove(gelu.nodes, safe=True)


def _polynomial(value: ir.Value, symbols: Mapping[ir.Value, _Powers], nodes: set[ir.Node]) -> _Polynomial | None:
    """Return `value` as a polynomial in the symbols, None if it is none; add the nodes that compute it to `nodes`."""
    if value in symbols:
        return {symbols[value]: 1.0}
    number = constant_scalar(value)
    if number is not None:
        return {(0, 0): number}
    node = value.producer()
    rule = None if node is None or node.domain else _ARITHMETIC.get(node.op_type)
    if node is None or rule is None or len(nodes) > 2 * _MAX_NODES:
        return None
    nodes.add(node)
    operands = []
    for operand in node.inputs:
        polynomial = None if operand is None else _polynomial(operand, symbols, nodes)
        if polynomial is None:
            return None
        operands.append(polynomial)
    return rule(*operands)


def _add(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    return {powers: a.get(powers, 0.0) + b.get(powers, 0.0) for powers in {**a, **b}}


def _subtract(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    return _add(a, {powers: -factor for powers, factor in b.items()})


def _multiply(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    product: defaultdict[_Powers, float] = defaultdict(float)
    for (x, f), factor in a.items():
        for (x_too, f_too), factor_too in b.items():
            product[x + x_too, f + f_too] += factor * factor_too
    return dict(product)


def _divide(a: _Polynomial, b: _Polynomial) -> _Polynomial | None:
    return _multiply(a, {(0, 0): 1 / b[0, 0]}) if set(b) == {(0, 0)} and b[0, 0] else None


def _power(a: _Polynomial, b: _Polynomial) -> _Polynomial | None:
    if set(b) != {(0, 0)} or b[0, 0] not in (1, 2, 3):
        return None
    power = a
    for _ in range(int(b[0, 0]) - 1):
        power = _multiply(power, a)
    return power


_ARITHMETIC: dict[str, Callable[..., _Polynomial | None]] = {
    "Add": _add,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Pow": _power,
}


def _is_close(polynomial: _Polynomial | None, expected: _Polynomial, tolerance: float) -> bool:
    return (
        polynomial is not None
        and {powers for powers, factor in polynomial.items() if factor} == set(expected)
        and all(math.isclose(polynomial[powers], expected[powers], rel_tol=tolerance) for powers in expected)
    )

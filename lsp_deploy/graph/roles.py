"""What each linear layer is for: its role and transformer block, found by data flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from lsp_deploy.graph.dataflow import DataFlow, Reach, data_inputs

__all__ = ["Role", "assign_blocks", "assign_roles"]

Role = Literal["qkv", "proj", "fc1", "fc2", "patch", "head", "other"]


def assign_roles(flow: DataFlow, rows: Mapping[ir.Node, int], residual: Mapping[ir.Node, ir.Node | None]) -> list[Role]:
    """Return the role of each linear layer, in the order of `rows`.

    qkv feeds a product of two activations and proj is fed by one; patch reads the image; nothing linear comes after
    head; fc1 feeds another layer of as many rows, fc2, through a nonlinearity or a gate; the rest is other.

    Args:
        flow: of the graph.
        rows: by linear node: rows M of its input.
        residual: by linear node: the residual Add that follows.
    """
    nodes = list(rows)
    products = flow.attention_products()
    reached_from = {node: flow.reach(node.outputs[0]) for node in nodes}
    feeds_product = {node for node in nodes if any(product in reached_from[node].stops for product in products)}
    # What else comes from queries, keys and values joins the product before proj: a depthwise convolution of v, say.
    attended = _values([reached_from[node] for node in feeds_product])
    product_values = _values([flow.reach(*node.outputs, beside=attended) for node in products])
    softmax_values = _values([flow.reach(*node.outputs) for node in flow.graph if node.op_type == "Softmax"])
    image_values = _values([flow.reach(value) for value in flow.graph.inputs if _may_be_image(value)])
    fc1, fc2 = _mlps(flow, rows, reached_from)

    def role(node: ir.Node) -> Role:
        x, reach = _data_input(node), reached_from[node]
        feeds_softmax = any(stop.op_type == "Softmax" for stop in reach.stops)
        if (x in softmax_values and node in feeds_product) or (
            x in product_values and feeds_softmax and _leads_on(flow, node)
        ):
            return "other"  # mixes attention scores between heads
        if node in feeds_product:
            return "qkv"
        if x in product_values:
            return "proj"
        if x in image_values and (node.op_type == "Conv" or (_leads_on(flow, node) and node not in fc1)):
            return "patch"
        if not _leads_on(flow, node) and residual[node] is None:
            return "head"
        if node in fc1:
            return "fc1"
        return "fc2" if node in fc2 else "other"

    return [role(node) for node in nodes]


def assign_blocks(roles: Sequence[Role]) -> list[int | None]:
    """Return the transformer block of each layer, given the roles in graph order.

    A block starts at the qkv layers of an attention, or, without attention, at the fc1 layers of an MLP.
    """
    blocks: list[int | None] = []
    block, in_tail, after_fc2 = -1, True, True
    for role in roles:
        if role in ("patch", "head", "other"):
            blocks.append(None)
            continue
        if (role == "qkv" and in_tail) or (role == "fc1" and after_fc2) or block < 0:
            block, after_fc2 = block + 1, False
        in_tail = role != "qkv"
        after_fc2 = after_fc2 or role == "fc2"
        blocks.append(block)
    return blocks


def _mlps(
    flow: DataFlow, rows: Mapping[ir.Node, int], reached_from: Mapping[ir.Node, Reach]
) -> tuple[set[ir.Node], set[ir.Node]]:
    """Return the layers before and after a nonlinearity; a gate's other branch is a layer before it as well."""
    activated = {value for reach in reached_from.values() for value, nonlinear in reach.values.items() if nonlinear}
    fc1, fc2 = set(), set()
    for first, reach in reached_from.items():
        for second in reach.stops:
            if rows.get(second) != rows[first] or _data_input(second) not in activated:
                continue
            if not _gates_own_input(flow, second, reached_from[second]):
                fc1.add(first)
                fc2.add(second)
    return fc1, fc2


def _gates_own_input(flow: DataFlow, node: ir.Node, reach: Reach) -> bool:
    """Return whether a layer's output scales what its input is computed from: squeeze-and-excitation, not an MLP."""
    return any(
        user.op_type == "Mul" and value not in reach.values and flow.is_ancestor(value, _data_input(node))
        for user in flow.users_of(reach.values)
        for value in data_inputs(user)
        if value not in flow.constants
    )


def _leads_on(flow: DataFlow, node: ir.Node) -> bool:
    return node.outputs[0] in flow.before_linear


def _may_be_image(value: ir.Value) -> bool:
    return not value.is_initializer() and value.shape is not None and len(value.shape) >= 3


def _values(reaches: Sequence[Reach]) -> set[ir.Value]:
    return {value for reach in reaches for value in reach.values}


def _data_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value

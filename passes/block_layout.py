"""The layout of block-sparse weights in a graph."""

from __future__ import annotations

import onnx_ir as ir

from lsp_deploy.errors import UserError
from lsp_deploy.passes.layer_weights import SharedInitializers
from lsp_deploy.plugins.block_sparse.operator import OP_TYPE, Layout, constant_inputs, from_node
from lsp_deploy.plugins.block_sparse.weights import values_in_layout
from lsp_deploy.plugins.operators import operator_nodes

__all__ = ["relayout", "relayout_node"]


def relayout(model: ir.Model, layout: Layout) -> bool:
    """Store the values of every lsp::BlockSparseLinear in `layout`; return whether any were in another.

    Raises:
        UserError: a node that is not valid, or whose values the layout cannot hold.
    """
    shared: dict[ir.Graph, SharedInitializers] = {}
    changed = [relayout_node(node, layout, shared) for node in operator_nodes(model) if node.op_type == OP_TYPE]
    return any(changed)


def relayout_node(node: ir.Node, layout: Layout, shared: dict[ir.Graph, SharedInitializers] | None = None) -> bool:
    """Store the values of one lsp::BlockSparseLinear in `layout`; return whether they were in another.

    Args:
        node: the operator.
        layout: wanted.
        shared: what was stored before, by graph: equal values are stored once.

    Raises:
        UserError: the node is not valid, or the layout cannot hold its values.
    """
    operator, old, graph = from_node(node), node.inputs[1], node.graph
    if operator.layout == layout:
        return False
    assert old is not None and isinstance(graph, ir.Graph)
    try:
        values = values_in_layout(operator, constant_inputs(node)[0], layout)
    except ValueError as error:
        raise UserError(f"{node.name} cannot be stored for TensorRT: {error}") from None
    known = {} if shared is None else shared
    node.replace_input_with(1, known.setdefault(graph, SharedInitializers(graph)).add(f"{old.name}", values))
    node.attributes["layout"] = ir.AttrString("layout", layout)
    if old.is_initializer() and old.graph is not None and not old.uses() and not old.is_graph_output():
        del old.graph.initializers[str(old.name)]
    return True

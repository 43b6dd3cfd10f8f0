"""Nodes that hand their input on unchanged."""

from __future__ import annotations

import onnx_ir as ir

from lsp_deploy.passes.constant_inputs import constant_array

__all__ = ["EliminateIdentityPass"]


class EliminateIdentityPass(ir.passes.InPlacePass):
    """Identity(x), Dropout(x) at inference and Cast(x) to the type that x has become x.

    torch stores one of several equal parameters and hands it to the others through Identity nodes; without them every
    node reads its weight directly. A node stays where the graph needs it: between an output and an input, an
    initializer or another output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the nodes."""
        modified = False
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if _hands_on(node) and _is_removable(node):
                _remove(node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _hands_on(node: ir.Node) -> bool:
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        return node.inputs[0].dtype is not None and node.attributes["to"].as_int() == node.inputs[0].dtype
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        mode = constant_array(training)
        return training is None or (mode is not None and not mode.any())
    return False


def _is_removable(node: ir.Node) -> bool:
    x, y, *others = node.inputs[0], *node.outputs
    assert x is not None
    if any(other.uses() or other.is_graph_output() for other in others):
        return False
    if not y.is_graph_output():
        return True
    producer = x.producer()
    return producer is not None and producer.graph is node.graph and not x.is_graph_output()


def _remove(node: ir.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None and node.graph is not None
    is_output = y.is_graph_output()
    if is_output or x.shape is None:
        x.shape = y.shape if y.shape is not None else x.shape
    if x.type is None:
        x.type = y.type
    ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    if is_output:
        x.name = y.name

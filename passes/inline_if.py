"""Branches that are always or never taken."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from lsp_deploy.passes.constant_inputs import constant_scalar

__all__ = ["InlineIfPass"]


class InlineIfPass(ir.passes.InPlacePass):
    """If(constant) becomes the nodes of the branch that is taken.

    TorchScript exports squeeze and the like as an If on sizes that constant folding knows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline the branches, those of the innermost graphs last."""
        modified = False
        for node in model.graph:
            if node.op_type == "If" and node.domain == "" and constant_scalar(node.inputs[0]) is not None:
                _inline(model.graph, node)
                modified = True
        if modified:
            # A name of the branch may be taken in the graph.
            NameFixPass()(model)
        return ir.passes.PassResult(model, modified=modified)


def _inline(graph: ir.Graph, node: ir.Node) -> None:
    taken = "then_branch" if constant_scalar(node.inputs[0]) else "else_branch"
    branch = node.attributes[taken].as_graph()
    results = list(branch.outputs)
    branch.outputs.clear()
    nodes = list(branch)
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for name in list(branch.initializers):
        value = branch.initializers.pop(name)
        while value.name in graph.initializers:
            value.name = f"{value.name}_{taken}"
        graph.register_initializer(value)
    for result, output in zip(results, node.outputs, strict=True):
        # The Identity keeps the name of a graph output; `EliminateIdentityPass` removes it where it can.
        identity = ir.node("Identity", [result], name=f"{node.name}/{output.name}")
        graph.insert_before(node, identity)
        identity.outputs[0].name = output.name
        identity.outputs[0].shape, identity.outputs[0].type = output.shape, output.type
        ir.convenience.replace_all_uses_with(output, identity.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)

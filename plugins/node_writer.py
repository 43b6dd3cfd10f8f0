"""Standard nodes in the place of one of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["NodeWriter"]


class NodeWriter:
    """Inserts nodes in front of the one that they replace, and names them after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        """Take the node and the graph it is in."""
        self._graph, self._node, self._taken = graph, node, set[str]()

    def insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        *,
        dtype: ir.DataType | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """Insert a node and return its output.

        The output has type `dtype`, or that of the first input; the node is called /node/op_type without a `name`.
        """
        assert inputs[0] is not None
        name = self._unique(name or f"{self._node.name}/{op_type}")
        node = ir.Node("", op_type, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name = f"{name}_output"
        output.type = inputs[0].type if dtype is None else ir.TensorType(dtype)
        self._graph.insert_before(self._node, node)
        return output

    def constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        """Return a new initializer, called /node/what."""
        return add_initializer(self._graph, f"{self._node.name}/{what}", array)

    def replace(self, y: ir.Value) -> None:
        """Let `y` take the place and the name of the node's output; drop the node and the constants it alone read."""
        old, constants = self._node.outputs[0], {value for value in self._node.inputs if value is not None}
        y.shape, y.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)
        y.name = old.name
        for value in constants:
            graph = value.graph
            if value.is_initializer() and graph is not None and not value.uses() and not value.is_graph_output():
                del graph.initializers[str(value.name)]

    def _unique(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        return unique

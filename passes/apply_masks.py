"""Zeros where the plan's masks are False."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.passes.layer_weights import add_initializer, layer_nodes, stored, weight_value
from lsp_deploy.plan import Plan

__all__ = ["ApplyMasksPass"]


class ApplyMasksPass(ir.passes.InPlacePass):
    """x @ W becomes x @ (W * mask).

    Layers that share a weight go on sharing it where their masked weights are equal.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan whose masks (bool [K, N], True survives) are applied."""
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Zero the weights.

        Raises:
            UserError: the plan does not belong to this model.
        """
        outcomes = self._masked_weights(model.graph)
        for value, variants in outcomes.items():
            _replace(model.graph, value, variants)
        return ir.passes.PassResult(model, modified=bool(outcomes))

    def _masked_weights(self, graph: ir.Graph) -> dict[ir.Value, list[_Variant]]:
        """Return what each weight becomes, one variant for each distinct content."""
        layers = [layer for layer in self.plan.layers if layer.name in self.plan.masks]
        outcomes: dict[ir.Value, list[_Variant]] = {}
        for name, node in layer_nodes(graph, layers).items():
            value = weight_value(node)
            tensor = value.const_value
            assert tensor is not None  # layer_nodes sees to it
            weight = tensor.numpy()
            mask = self.plan.masks[name]
            if mask.size != weight.size:
                raise UserError(f"the plan's mask of layer {name} is {mask.shape}, which does not fit its weight")
            masked = np.where(stored(mask, node, weight.shape), weight, np.zeros((), weight.dtype))
            if np.array_equal(masked, weight):
                continue
            variants = outcomes.setdefault(value, [])
            for content, nodes in variants:
                if np.array_equal(content, masked):
                    nodes.append(node)
                    break
            else:
                variants.append((masked, [node]))
        return outcomes


_Variant = tuple[NDArray[Any], list[ir.Node]]


def _replace(graph: ir.Graph, value: ir.Value, variants: list[_Variant]) -> None:
    replaced = sum(len(nodes) for _, nodes in variants)
    if len(variants) == 1 and replaced == len(value.uses()) and not value.is_graph_output():
        value.const_value = ir.tensor(variants[0][0], name=value.name)
        return
    for content, nodes in variants:
        own = add_initializer(graph, f"{nodes[0].name}/weight", content)
        for node in nodes:
            node.replace_input_with(1, own)
    if not value.uses() and not value.is_graph_output():
        del graph.initializers[str(value.name)]

"""Linear layers, with what follows them, as one lsp::BlockSparseLinear each."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.passes.fuse_gelu import find_gelus
from lsp_deploy.passes.int8_scales import activation_scale, int8_weight, weight_scale
from lsp_deploy.passes.layer_weights import SharedInitializers, add_initializer, layer_nodes
from lsp_deploy.passes.linear_node import LinearNode, read_linear_node, replace_nodes
from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.plugins.block_sparse.operator import DOMAIN, VERSION, Activation, BlockSparseLinear, to_node
from lsp_deploy.plugins.block_sparse.packing import pack

__all__ = ["DEFAULT_BLOCK", "InsertBlockSparsePass"]

DEFAULT_BLOCK = (32, 32)
"""Of layers in a plan that asks for no blocks; CPU kernels run all sizes about equally fast."""

_FLOATS: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}


class _Operands(NamedTuple):
    """What depends on the type that a layer computes in."""

    values: NDArray[Any]
    """[K, N]"""
    bias: NDArray[np.float32]
    scale: NDArray[np.float32]
    x_scale: float
    x_offset: float


class InsertBlockSparsePass(ir.passes.InPlacePass):
    """act(x @ W + b) + r becomes one lsp::BlockSparseLinear, where the plan's kernel is block_sparse, or gather.

    Bias, activation (GELU in both forms, ReLU) and residual are taken in as far as nothing else reads what lies
    between. Blocks that are zero throughout are left out. Int8 layers quantize x inside: each for itself, also where
    several read one tensor. Runs on the float32 graph, before Q/DQ are inserted for the other layers.
    `LowerOperatorsPass` makes gathers of those that the plan wants so.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan whose layers are replaced."""
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the layers.

        Raises:
            UserError: the plan does not belong to this model, lacks a scale, or asks for what the operator cannot do.
        """
        layers = [layer for layer in self.plan.layers if layer.execution.kernel in ("block_sparse", "gather")]
        nodes = layer_nodes(model.graph, layers)
        shared = SharedInitializers(model.graph)
        for layer in layers:
            self._replace(model.graph, nodes[layer.name], layer, shared)
        if layers:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified=bool(layers))

    def _replace(self, graph: ir.Graph, node: ir.Node, layer: LayerPlan, shared: SharedInitializers) -> None:
        linear = read_linear_node(graph, node)
        activation, activated, activating = _activation(graph, linear.y)
        residual, y, adding = _residual(activated)
        operands = self._operands(layer, linear)
        block_k, block_n = self.plan.block_shape or DEFAULT_BLOCK
        blocks = pack(operands.values, None, (block_k, block_n))
        operator = BlockSparseLinear(
            K=layer.K,
            N=layer.N,
            block_k=block_k,
            block_n=block_n,
            col_ptr=blocks.col_ptr,
            k_idx=blocks.k_idx,
            activation=activation,
            x_scale=operands.x_scale,
            x_offset=operands.x_offset,
        )
        values = shared.add(f"{layer.name}/values", blocks.values)
        arrays = {"bias": operands.bias, "scale": operands.scale}
        bias, scale = (add_initializer(graph, f"{layer.name}/{name}", array) for name, array in arrays.items())
        new = to_node(operator, linear.x, values, bias, scale, residual, name=layer.name)
        replace_nodes(graph, (*linear.nodes, *activating, *adding), y, [new], new.outputs[0])

    def _operands(self, layer: LayerPlan, linear: LinearNode) -> _Operands:
        dtype = layer.precision.dtype
        # CastComputeTypePass rounds what the whole graph computes in.
        floats = {**_FLOATS, self.plan.compute_type: np.float32}
        if dtype in floats:
            return _Operands(linear.weight.astype(floats[dtype]), linear.bias, np.ones(layer.N, np.float32), 0.0, 0.0)
        if dtype != "int8":
            raise UserError(
                f"the plan has layer {layer.name} run by lsp::BlockSparseLinear in {dtype}; in a graph of "
                f"{self.plan.compute_type} its kernels compute in {', '.join(floats)} and int8"
            )
        x_scale, scale = np.float32(activation_scale(layer)), weight_scale(self.plan, layer)
        offset = layer.precision.activation_offset
        values = int8_weight(linear.weight, scale)
        # (x - c) @ Ŵ + b + c · 1 @ Ŵ, with Ŵ as int8 holds it
        shift = offset * (values.sum(axis=0, dtype=np.int64) * scale.astype(np.float64))
        bias = (linear.bias + shift).astype(np.float32)
        return _Operands(values, bias, x_scale * scale, float(x_scale), offset)


def _activation(graph: ir.Graph, y: ir.Value) -> tuple[Activation, ir.Value, tuple[ir.Node, ...]]:
    """Return which activation follows `y`, what it gives, and its nodes."""
    readers = y.consumers()
    if not y.is_graph_output() and len(readers) == 1 and (kind := _kind(readers[0])) is not None:
        return kind, readers[0].outputs[0], (readers[0],)
    for gelu in find_gelus(graph):
        if gelu.x is y and not y.is_graph_output() and gelu.nodes.issuperset(readers):
            return "gelu_tanh" if gelu.approximate == "tanh" else "gelu", gelu.y, tuple(gelu.nodes)
    return "none", y, ()


def _kind(node: ir.Node) -> Activation | None:
    if node.domain == "" and node.op_type == "Relu":
        return "relu"
    if node.domain == "" and node.op_type == "Gelu":
        return "gelu_tanh" if node.attributes.get_string("approximate", "none") == "tanh" else "gelu"
    return None


def _residual(y: ir.Value) -> tuple[ir.Value | None, ir.Value, tuple[ir.Node, ...]]:
    """Return what is added to `y`, the sum, and the Add; nothing is taken in that would have to be broadcast."""
    uses = tuple(y.uses())
    if y.is_graph_output() or len(uses) != 1:
        return None, y, ()
    add, index = uses[0]
    other = add.inputs[1 - index] if add.op_type == "Add" and add.domain == "" else None
    if other is None or other.dtype != ir.DataType.FLOAT or not _same_shape(other.shape, y.shape):
        return None, y, ()
    return other, add.outputs[0], (add,)


def _same_shape(first: ir.Shape | None, second: ir.Shape | None) -> bool:
    """Return whether two shapes are known to be equal: sizes or names of dimensions."""
    if first is None or second is None or len(first) != len(second):
        return False
    sizes = [dim if isinstance(dim, int) else dim.value for dim in first]
    return None not in sizes and sizes == [dim if isinstance(dim, int) else dim.value for dim in second]

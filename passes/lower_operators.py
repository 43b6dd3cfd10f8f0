"""Our operators in standard ones, for runtimes that know no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.plugins.attention import lowering as attention
from lsp_deploy.plugins.attention.operator import OP_TYPE as ATTENTION
from lsp_deploy.plugins.block_sparse import lowering as block_sparse
from lsp_deploy.plugins.block_sparse.lowering import Form
from lsp_deploy.plugins.operators import DOMAIN, operator_nodes

__all__ = ["Form", "LowerOperatorsPass"]

MIN_OPSET = 13  # DequantizeLinear along an axis


class LowerOperatorsPass(ir.passes.InPlacePass):
    """lsp::BlockSparseLinear becomes MatMul, bias, activation and residual; lsp::Attention becomes MatMul and Softmax.

    In form `gather` MatMuls skip what is zero in a weight (plugins/block_sparse/lowering.py). int8 becomes Q/DQ in
    either form. Names of inputs and outputs stay, and a model without operators no longer imports the domain.
    """

    def __init__(self, form: Form = "matmul", selected: Callable[[str], bool] | None = None) -> None:
        """Take the form of linear layers, and which operators to replace: all, or those of a selected name."""
        super().__init__()
        self.form: Form = form
        self.selected = selected
        self.lowered: Counter[str] = Counter()
        """How many operators were replaced, by name."""

    def requires(self, model: ir.Model) -> None:
        """Check that the opset has per-channel DequantizeLinear."""
        if (opset := model.opset_imports.get("", 0)) < MIN_OPSET:
            raise ir.passes.PreconditionError(f"Q/DQ along an axis needs opset {MIN_OPSET}, the model has {opset}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the operators in all graphs of the model.

        Raises:
            UserError: an operator that is not valid or of a later version.
        """
        self.lowered.clear()
        found = operator_nodes(model)
        nodes = [node for node in found if self.selected is None or self.selected(str(node.name))]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        InferShapesPass()(model)
        for node in nodes:
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            if node.op_type == ATTENTION:
                attention.lower(graph, node)
            else:
                block_sparse.lower(graph, node, self.form, model.opset_imports[""])
            self.lowered[node.op_type] += 1
        if len(nodes) == len(found):
            del model.opset_imports[DOMAIN]
        NameFixPass()(model)
        InferShapesPass()(model)
        return ir.passes.PassResult(model, modified=True)

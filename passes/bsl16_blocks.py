"""Block-sparse weights as the TensorRT plugin reads them."""

from __future__ import annotations

import onnx_ir as ir

from lsp_deploy.passes.block_layout import relayout

__all__ = ["Bsl16BlocksPass"]


class Bsl16BlocksPass(ir.passes.InPlacePass):
    """The values of every lsp::BlockSparseLinear get layout bsl16.v1: the order of tensor cores, bit for bit.

    The last pass for a TensorRT target: its plugin never sees constants while an engine is built, so it cannot do this.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rearrange the values of all graphs of the model.

        Raises:
            UserError: a node that is not valid, or that has float32 values or a block shape the layout does not have.
        """
        return ir.passes.PassResult(model, modified=relayout(model, "bsl16.v1"))

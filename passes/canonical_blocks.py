"""Block-sparse weights as ONNX Runtime reads them."""

from __future__ import annotations

import onnx_ir as ir

from lsp_deploy.passes.block_layout import relayout

__all__ = ["CanonicalBlocksPass"]


class CanonicalBlocksPass(ir.passes.InPlacePass):
    """The values of every lsp::BlockSparseLinear get layout canonical: whole blocks, bit for bit what they were."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rearrange the values of all graphs of the model.

        Raises:
            UserError: a node that is not valid.
        """
        return ir.passes.PassResult(model, modified=relayout(model, "canonical"))

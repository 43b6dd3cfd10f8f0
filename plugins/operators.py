"""The operators of the domain lsp that a model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from lsp_deploy.errors import UserError
from lsp_deploy.plugins.attention import operator as attention
from lsp_deploy.plugins.block_sparse import operator as block_sparse

__all__ = ["DOMAIN", "describe_output", "operator_nodes", "refuse_operators"]

DOMAIN, VERSION = block_sparse.DOMAIN, block_sparse.VERSION

_DESCRIBE: dict[str, Callable[[ir.Node], None]] = {
    attention.OP_TYPE: attention.describe_output,
    block_sparse.OP_TYPE: block_sparse.describe_output,
}


def operator_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of the domain in all graphs of the model, in graph order; they are not checked yet.

    Raises:
        UserError: an operator, or a version of the domain, that this version of lsp-deploy does not know.
    """
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    if not nodes:
        return []
    version = model.opset_imports.get(DOMAIN)
    for node in nodes:
        if node.op_type not in _DESCRIBE or version != VERSION:
            raise UserError(
                f"{node.name} is {DOMAIN}::{node.op_type} of version {version}, which this version of lsp-deploy does "
                f"not know; it knows {', '.join(_DESCRIBE)} of version {VERSION}"
            )
    return nodes


def refuse_operators(model: ir.Model, path: Path) -> None:
    """Raise UserError if `model`, which is to be analysed, holds operators of ours: its zeros are decided already."""
    if count := len(operator_nodes(model)):
        raise UserError(
            f"{path} is compressed already, it holds {count} operators of lsp-deploy; take the dense model, or turn it "
            f"back into standard operators: lsp-deploy lower {path} -o {path.stem}-stock.onnx"
        )


def describe_output(node: ir.Node) -> None:
    """Set type and shape of what a node of the domain gives; another operator's are left as they are."""
    if node.domain == DOMAIN and node.op_type in _DESCRIBE:
        _DESCRIBE[node.op_type](node)

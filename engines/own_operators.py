"""Our operators in the form that ONNX Runtime takes on this machine."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

from lsp_deploy.plugins import library
from lsp_deploy.plugins.operators import DOMAIN, operator_nodes

__all__ = ["imports_operators", "with_runnable_operators"]


def imports_operators(model: Path | bytes) -> bool:
    """Return whether a file, or its content, says that it holds operators of the domain lsp.

    What cannot be read holds none; the session that is made of it says what is wrong.
    """
    try:
        content = model if isinstance(model, bytes) else model.read_bytes()
        return any(opset.domain == DOMAIN for opset in onnx.ModelProto.FromString(content).opset_import)
    except (OSError, DecodeError):
        return False


def with_runnable_operators(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """Return `model` in a form that runs here, and what the user has to know of it; itself where it holds none of ours.

    The native library reads canonical weights. Where it is missing, standard operators take the place of ours.

    Raises:
        UserError: an operator that is not valid or of a later version.
    """
    nodes = operator_nodes(model)
    if not nodes:
        return model, []
    from lsp_deploy.passes.canonical_blocks import CanonicalBlocksPass
    from lsp_deploy.passes.lower_operators import LowerOperatorsPass

    copy, native = model.clone(), library()
    if native.path is not None:
        CanonicalBlocksPass()(copy)
        return copy, []
    LowerOperatorsPass("gather")(copy)
    return copy, [f"operators of lsp-deploy ({len(nodes)}) run as standard ones, which is slower: {native.why}"]

"""The form that every analysis and pass works on."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common

from lsp_deploy.errors import UserError
from lsp_deploy.passes.decompose_attention import DecomposeAttentionPass
from lsp_deploy.passes.eliminate_identity import EliminateIdentityPass
from lsp_deploy.passes.fold_constants import FoldConstantsPass
from lsp_deploy.passes.fuse_gelu import FuseGeluPass, find_gelus
from lsp_deploy.passes.fuse_layer_norm import FuseLayerNormPass
from lsp_deploy.passes.inline_if import InlineIfPass
from lsp_deploy.passes.lower_opset import LowerOpsetPass
from lsp_deploy.passes.merge_initializers import MergeInitializersPass
from lsp_deploy.passes.raise_opset import RaiseOpsetPass
from lsp_deploy.passes.remove_void_masks import RemoveVoidMasksPass

__all__ = ["ATTENTION_OPSET", "GELU_OPSET", "LAYER_NORM_OPSET", "canonicalize"]

LAYER_NORM_OPSET = 17
GELU_OPSET = 20
ATTENTION_OPSET = 23


def canonicalize(model: ir.Model, *, max_opset: int, needed_opset: int = LAYER_NORM_OPSET) -> ir.Model:
    """Bring `model` into canonical form, in place, and return it.

    The graph then computes the same and has the same inputs and outputs (an initializer is no longer an input that may
    be overridden), but

    - every constant is an initializer, no two of which are equal, and whatever depends on constants alone is one: the
      weight of a linear layer is a direct input of its node;
    - values have types and shapes; sizes that follow from them are constants;
    - LayerNorm and GELU are single nodes; GELU stays in elementary operators where `max_opset` is below 20, and
      Attention is written in them where it is below 23, without masks that mask nothing;
    - no Identity, unused or repeated node is left, nodes are sorted, and node and value names are unique;
    - the opset is as low as this allows, but at least `needed_opset` and at most `max_opset`.

    A second call changes nothing.

    Args:
        model: functions inlined, opset 13 or later, as `lsp_deploy.model.load_model` returns it.
        max_opset: the newest opset that the target's parser takes.
        needed_opset: the oldest opset that later steps can work with: 19 for 16-bit scales, 21 for INT4.

    Raises:
        UserError: `needed_opset` is above `max_opset`, or a node has no form in `max_opset`.
    """
    needed_opset = max(needed_opset, LAYER_NORM_OPSET)
    if needed_opset > max_opset:
        raise UserError(
            f"the model has to be in opset {needed_opset} or later, but the target takes at most {max_opset}; "
            "choose another --precision or --target"
        )
    # Initializers had to be inputs before IR version 4; opset 17 came with version 8.
    model.ir_version = max(model.ir_version, 8)
    _run(model, [common.TopologicalSortPass(), common.RemoveInitializersFromInputsPass()])
    _simplify(model)
    if max_opset < ATTENTION_OPSET:
        _run(model, [DecomposeAttentionPass()])
    _run(model, [LowerOpsetPass(max_opset), RaiseOpsetPass(needed_opset), RemoveVoidMasksPass(), FuseLayerNormPass()])
    if max_opset >= GELU_OPSET and any(find_gelus(model.graph)):
        _run(model, [RaiseOpsetPass(GELU_OPSET), FuseGeluPass()])
    _simplify(model)
    return model


def _simplify(model: ir.Model) -> None:
    _run(model, [common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), common.NameFixPass()])
    _run(model, [EliminateIdentityPass(), FoldConstantsPass()])
    while InlineIfPass()(model).modified:
        _run(model, [EliminateIdentityPass(), FoldConstantsPass()])
    # Element types are inferred by now: casts to the type a value has are found.
    _run(model, [EliminateIdentityPass(), MergeInitializersPass(), common.CommonSubexpressionEliminationPass()])
    _run(model, [common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass()])
    _run(model, [common.TopologicalSortPass(), common.NameFixPass()])


def _run(model: ir.Model, passes: Iterable[ir.passes.PassBase]) -> None:
    # Not ir.passes.Sequential, which would wrap a UserError.
    for each in passes:
        each(model)

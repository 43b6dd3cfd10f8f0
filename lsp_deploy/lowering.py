"""A model of ours back in stock ONNX operators, for runtimes that know no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    from lsp_deploy.plugins.block_sparse.lowering import Form

__all__ = ["lower_model"]


def lower_model(model: Path, output: Path, form: Form = "matmul") -> dict[str, int]:
    """Write `model` to `output` with every operator of the `lsp` domain replaced; returns how many there were, by name.

    Args:
        model: ONNX file, weights in either layout.
        output: ONNX file to write; without operators of ours it is the model as it was.
        form: `matmul`, whole weights with their zeros; `gather`, MatMuls that skip zero blocks where that is faster.

    Raises:
        UserError: `output` is the input, or an operator is not valid or of a later version.
    """
    from lsp_deploy.model import load_model, save_model
    from lsp_deploy.passes.lower_operators import LowerOperatorsPass

    if output.exists() and model.exists() and output.samefile(model):
        raise UserError(f"{output} is the input model; choose another -o")
    loaded = load_model(model)
    lowering = LowerOperatorsPass(form)
    lowering(loaded)
    save_model(loaded, output)
    return dict(lowering.lowered)

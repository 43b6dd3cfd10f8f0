"""A model of ours back in stock ONNX operators, for runtimes that know no other."""

from __future__ import annotations

from pathlib import Path

from lsp_deploy.errors import UserError

__all__ = ["lower_model"]

DOMAIN = "lsp"


def lower_model(model: Path, output: Path) -> int:
    """Write `model` to `output` with every operator of the `lsp` domain replaced; returns how many there were.

    No operator of that domain is defined yet: a model of this version holds stock operators only and is written as
    it is.

    Raises:
        UserError: `output` is the input, or the model holds an operator that this version cannot replace.
    """
    from lsp_deploy.model import load_model, save_model

    if output.exists() and model.exists() and output.samefile(model):
        raise UserError(f"{output} is the input model; choose another -o")
    loaded = load_model(model)
    ours = [node for node in loaded.graph.all_nodes() if node.domain == DOMAIN]
    if ours:
        raise UserError(f"{model}: {ours[0].op_type} ({ours[0].name}) is of a later version of lsp-deploy")
    save_model(loaded, output)
    return 0

"""Newer operator sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.version_converter import ConvertVersionPass

from lsp_deploy.errors import UserError
from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["RaiseOpsetPass"]

# onnxscript converts from here on.
_FIRST_OF_ONNXSCRIPT = 18


class RaiseOpsetPass(ir.passes.InPlacePass):
    """A model of an older opset becomes the same model in opset `version`; a newer one stays as it is.

    Of the operators that opsets 14 to 18 changed, these need a change in the graph: RoiAlign (16), reductions and Split
    (18). The rest kept their meaning. The IR version is raised to the one that introduced the opset.
    """

    def __init__(self, version: int) -> None:
        """Take the opset to raise to."""
        super().__init__()
        self.version = version

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert node by node, then set the version."""
        present = model.opset_imports[""]
        if present >= self.version:
            return ir.passes.PassResult(model, modified=False)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain == "":
                _convert(node, present, self.version)
        model.opset_imports[""] = min(self.version, max(present, _FIRST_OF_ONNXSCRIPT))
        if model.opset_imports[""] < self.version:
            ConvertVersionPass(self.version)(model)
        model.ir_version = max(model.ir_version, onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", self.version])
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """Check that the opset is 13 or later."""
        if model.opset_imports[""] < 13:
            raise ir.passes.PreconditionError(f"opset {model.opset_imports['']} is older than 13")

    def ensures(self, model: ir.Model) -> None:
        """Check that the opset is at least the one asked for."""
        if model.opset_imports[""] < self.version:
            raise ir.passes.PostconditionError(f"opset {model.opset_imports['']} is older than {self.version}")


def _convert(node: ir.Node, present: int, version: int) -> None:
    for changed in range(present + 1, version + 1):
        adapter = _ADAPTERS.get((node.op_type, changed))
        if adapter is not None:
            adapter(node)


def _round_boxes_as_before(node: ir.Node) -> None:
    """RoiAlign: half a pixel is subtracted from the boxes unless told otherwise, since opset 16."""
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


def _axes_to_input(node: ir.Node) -> None:
    """Reductions: the axes are an input, since opset 18."""
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    assert isinstance(node.graph, ir.Graph)
    array = np.array(axes.as_ints(), dtype=np.int64)
    node.resize_inputs(2)
    node.replace_input_with(1, add_initializer(node.graph, f"{node.outputs[0].name}_axes", array))


def _count_outputs(node: ir.Node) -> None:
    """Split: the number of outputs is an attribute where no sizes are given, since opset 18."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


def _check_channels(node: ir.Node) -> None:
    """GroupNormalization: scale and bias are by channel since opset 21; onnxscript has to know how many."""
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if shape is None or not isinstance(shape[1], int):
        raise UserError(
            f"node {node.name}: GroupNormalization changed in opset 21 and its number of channels is not known; "
            "export the model with opset 21 or later"
        )


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

# By operator and the opset that changed it.
_ADAPTERS: dict[tuple[str, int], Callable[[ir.Node], None]] = {
    ("RoiAlign", 16): _round_boxes_as_before,
    **{(f"Reduce{kind}", 18): _axes_to_input for kind in _REDUCTIONS},
    ("Split", 18): _count_outputs,
    ("GroupNormalization", 21): _check_channels,
}

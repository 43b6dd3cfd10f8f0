"""Older operator sets, for parsers that stop there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from lsp_deploy.errors import UserError
from lsp_deploy.passes.constant_inputs import constant_array
from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["LowerOpsetPass"]


class LowerOpsetPass(ir.passes.InPlacePass):
    """A model of a newer opset becomes the same model in opset `version`; an older one stays as it is.

    A node stays as it is where the older definition of its operator takes it: the same inputs, types and attributes,
    but for attributes that say what the older operator does anyway. Reductions, Split and GridSample are rewritten.
    """

    def __init__(self, version: int) -> None:
        """Take the opset to lower to, 17 or later."""
        super().__init__()
        self.version = version

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite node by node, then set the version.

        Raises:
            UserError: a node cannot be expressed in the older opset.
        """
        present = model.opset_imports[""]
        if present <= self.version:
            return ir.passes.PassResult(model, modified=False)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain == "":
                _lower(node, present, self.version)
        model.opset_imports[""] = self.version
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """Check that the opset asked for is 17 or later."""
        if self.version < 17:
            raise ir.passes.PreconditionError(f"opset {self.version} is older than 17")


def _lower(node: ir.Node, present: int, version: int) -> None:
    if not onnx.defs.has(node.op_type, version):
        raise _refusal(node, version, "the operator is newer")
    newer, older = (onnx.defs.get_schema(node.op_type, opset) for opset in (present, version))
    if newer.since_version == older.since_version:
        return
    for changed in range(present, version, -1):
        adapter = _ADAPTERS.get((node.op_type, changed))
        if adapter is not None:
            adapter(node, version)
    _drop_defaults(node, newer, older, version)
    if len(node.inputs) > older.max_input:
        raise _refusal(node, version, "it has a newer input")
    for values, parameters in ((node.inputs, older.inputs), (node.outputs, older.outputs)):
        _check_types(node, values, parameters, version)
    if any(attribute.value in _NEWER_VALUES.get((node.op_type, version), ()) for attribute in node.attributes.values()):
        raise _refusal(node, version, "it has a newer mode")


def _drop_defaults(node: ir.Node, newer: onnx.defs.OpSchema, older: onnx.defs.OpSchema, version: int) -> None:
    for name in [name for name in node.attributes if name not in older.attributes]:
        definition = newer.attributes.get(name)
        if definition is None or node.attributes[name] != ir.serde.deserialize_attribute(definition.default_value):
            raise _refusal(node, version, f"it has the newer attribute {name}")
        del node.attributes[name]


def _check_types(
    node: ir.Node,
    values: Iterable[ir.Value | None],
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter],
    version: int,
) -> None:
    for index, value in enumerate(values):
        dtype = None if value is None else value.dtype
        allowed = parameters[min(index, len(parameters) - 1)].types
        if dtype is not None and f"tensor({dtype.name.lower()})" not in allowed:
            raise _refusal(node, version, f"it computes in {dtype.name.lower()}")


def _refusal(node: ir.Node, version: int, reason: str) -> UserError:
    return UserError(
        f"node {node.name}: {node.op_type} cannot be expressed in opset {version}, the newest that the target takes "
        f"({reason}); export the model with opset {version} or older"
    )


def _axes_to_attribute(node: ir.Node, version: int) -> None:
    """Reductions: the axes are an attribute up to opset 17."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return
    axes = constant_array(node.inputs[1])
    if axes is None or axes.size == 0:
        raise _refusal(node, version, "its axes are computed" if axes is None else "it has no axes")
    node.resize_inputs(1)
    node.attributes.add(ir.AttrInt64s("axes", axes.tolist()))


def _sizes_to_input(node: ir.Node, version: int) -> None:
    """Split: up to opset 17 no attribute counts the outputs, and without sizes all parts are equal."""
    count = node.attributes.pop("num_outputs", None)
    if count is None:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    size = None if shape is None else shape[axis]
    if not isinstance(size, int) or not isinstance(node.graph, ir.Graph):
        raise _refusal(node, version, "the size it splits is not known")
    part = -(-size // count.as_int())
    sizes = np.array([part] * (count.as_int() - 1) + [size - part * (count.as_int() - 1)], dtype=np.int64)
    node.resize_inputs(2)
    node.replace_input_with(1, add_initializer(node.graph, f"{node.outputs[0].name}_split", sizes))


def _rename_mode(node: ir.Node, version: int) -> None:
    """GridSample: linear and cubic are called bilinear and bicubic up to opset 19."""
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "linear"
    names = {"linear": "bilinear", "cubic": "bicubic"}
    node.attributes.add(ir.AttrString("mode", names.get(mode, mode)))


def _refuse(node: ir.Node, version: int) -> None:
    raise _refusal(node, version, "its meaning changed")


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

# By operator and the opset that changed it.
_ADAPTERS: dict[tuple[str, int], Callable[[ir.Node, int], None]] = {
    **{(f"Reduce{kind}", 18): _axes_to_attribute for kind in _REDUCTIONS},
    ("Split", 18): _sizes_to_input,
    ("GridSample", 20): _rename_mode,
    ("DFT", 20): _refuse,
    ("GroupNormalization", 21): _refuse,
}

# Attribute values that an operator of that opset does not know.
_NEWER_VALUES = {
    **{("Pad", opset): ("wrap",) for opset in (17, 18)},
    **{("Resize", opset): ("half_pixel_symmetric",) for opset in (17, 18)},
}

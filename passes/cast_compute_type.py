"""A float32 graph made to compute in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from lsp_deploy.errors import UserError
from lsp_deploy.passes.float32_uses import TYPED_BY_ATTRIBUTE, float32_uses
from lsp_deploy.passes.insertion import insert_after
from lsp_deploy.passes.layer_weights import add_initializer
from lsp_deploy.passes.round_constants import round_constant
from lsp_deploy.passes.set_io_types import SetIoTypesPass, io_types

__all__ = ["CastComputeTypePass"]

_DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MIN_OPSET_OF_16_BIT_SCALES = 19
# Their statistics are computed in the type that `stash_type` names, whatever the type of x.
_FUSED_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})

_Uses = Sequence[tuple[ir.Node, int]]


class CastComputeTypePass(ir.passes.InPlacePass):
    """Every float32 tensor becomes float16 or bfloat16, but where a node must compute in float32.

    Those nodes (see `nodes_kept_in_float32`, and operators whose schema has no such type) stand between Casts.
    `LayerNormalization` keeps float32 statistics inside. Finite attention masks and bounds outside the type's range
    become its largest finite value; infinities stay. Integer tensors, int8 weights among them, are not touched; the
    scales of Q/DQ become 16-bit. What subgraphs hold stays float32.
    """

    def __init__(self, dtype: Literal["fp16", "bf16"], *, keep_io: bool = True) -> None:
        """Take the type to compute in.

        Args:
            dtype: "fp16" or "bf16".
            keep_io: inputs and outputs stay float32, with Casts inside; otherwise they become 16-bit too.
        """
        super().__init__()
        self.dtype = _DTYPES[dtype]
        self.keep_io = keep_io

    def requires(self, model: ir.Model) -> None:
        """Check that nothing is 16-bit yet, and that the opset has 16-bit scales if there is Q/DQ."""
        for value in _computed(model.graph):
            if value.dtype in _DTYPES.values():
                raise ir.passes.PreconditionError(f"{value.name} is 16-bit already; ToFloat32Pass comes first")
        opset = model.opset_imports.get("", 0)
        if opset < _MIN_OPSET_OF_16_BIT_SCALES and any(node.op_type in _QDQ for node in model.graph):
            raise ir.passes.PreconditionError(
                f"16-bit scales need opset {_MIN_OPSET_OF_16_BIT_SCALES}, the model has {opset}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cast the graph.

        Raises:
            UserError: a weight that the type cannot hold, a scale that it holds too coarsely, or an operator of which
                not even the element type of its result is known.
        """
        _infer_missing_types(model)
        original = io_types(model)
        # As initializers, constants are read as they are or rounded once, never rounded and widened again.
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        modified = _cast_graph(model, self.dtype)
        if self.keep_io:
            SetIoTypesPass(original)(model)
        return ir.passes.PassResult(model, modified=modified)


def _infer_missing_types(model: ir.Model) -> None:
    if all(value.type is not None for value in _computed(model.graph)):
        return
    ShapeInferencePass()(model)
    for value in _computed(model.graph):
        if value.type is None:
            node = value.producer()
            operator = "input" if node is None else f"{node.domain or 'ai.onnx'}::{node.op_type} {node.name}"
            raise UserError(
                f"the element type of {value.name} ({operator}) is not known, so that the model cannot be made 16-bit; "
                "export it with standard operators or use --precision fp32"
            )


def _computed(graph: ir.Graph) -> list[ir.Value]:
    """Return the graph's inputs and all node outputs that have a name."""
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    return inputs + [value for node in graph for value in node.outputs if value.name]


def _cast_graph(model: ir.Model, dtype: ir.DataType) -> bool:
    """Cast the main graph; return whether there was anything to cast."""
    graph = model.graph
    float32_inputs, float32_outputs = float32_uses(model, dtype)
    constants = [value for value in graph.initializers.values() if _is_float(value)]
    computed = [value for value in _computed(graph) if _is_float(value)]
    for value in constants:
        wide, narrow = _split(value, float32_inputs)
        _round_initializer(graph, value, dtype, wide, narrow)
    for value in computed:
        wide, narrow = _split(value, float32_inputs)
        if value in float32_outputs:
            _insert_cast(graph, value, dtype, narrow)
        else:
            _set_type(value, dtype)
            _insert_cast(graph, value, ir.DataType.FLOAT, wide)
    for node in graph:
        if node.op_type in _FUSED_NORMS:
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", ir.DataType.FLOAT.value)
    return bool(constants or computed)


def _split(value: ir.Value, float32_inputs: set[tuple[ir.Node, int]]) -> tuple[_Uses, _Uses]:
    """Return the uses of a value that must read float32, and the others."""
    uses = [(use.node, use.idx) for use in value.uses()]
    return [use for use in uses if use in float32_inputs], [use for use in uses if use not in float32_inputs]


def _round_initializer(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, wide: _Uses, narrow: _Uses) -> None:
    """Round an initializer, or a copy of it where some of its readers keep float32."""
    if wide and not narrow and not value.is_graph_output():
        return
    tensor = value.const_value
    assert tensor is not None  # an initializer has a value
    rounded = round_constant(tensor.numpy(), dtype, value.name, narrow)
    if wide:
        copy = add_initializer(graph, f"{value.name}_as_{dtype.name.lower()}", rounded)
        for node, index in narrow:
            node.replace_input_with(index, copy)
    else:
        value.const_value = ir.Tensor(rounded, dtype, name=value.name)
        value.type = ir.TensorType(dtype)  # never its `dtype`: clones share the type object


def _set_type(value: ir.Value, dtype: ir.DataType) -> None:
    """Make a value 16-bit, and its producer's attribute say so where it has one."""
    value.type = ir.TensorType(dtype)
    node = value.producer()
    name = None if node is None else TYPED_BY_ATTRIBUTE.get(node.op_type)
    if node is None or name is None:
        return
    if node.op_type == "ConstantOfShape":
        fill = node.attributes[name].as_tensor().numpy() if name in node.attributes else np.zeros(1, np.float32)
        rounded = round_constant(fill, dtype, node.name, [(use.node, use.idx) for use in value.uses()])
        node.attributes[name] = ir.AttrTensor(name, ir.Tensor(rounded, dtype))
    elif name in node.attributes and node.attributes[name].as_int() == ir.DataType.FLOAT:
        node.attributes[name] = ir.AttrInt64(name, dtype.value)


def _insert_cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, uses: _Uses) -> None:
    """Let `uses` read `value` through one Cast to `dtype`; a 16-bit Cast takes its place as graph output too."""
    replaces_output = value.is_graph_output() and dtype != ir.DataType.FLOAT
    if not uses and not replaces_output:
        return
    cast = ir.Node(
        "", "Cast", [value], [ir.AttrInt64("to", dtype.value)], name=f"{value.name}/Cast_{dtype.name.lower()}"
    )
    output = cast.outputs[0]
    output.name, output.shape, output.type = f"{value.name}_as_{dtype.name.lower()}", value.shape, ir.TensorType(dtype)
    for node, index in uses:
        node.replace_input_with(index, output)
    insert_after(graph, value, cast)
    if replaces_output:
        value.name, output.name = f"{value.name}_as_float", value.name
        for index, graph_output in enumerate(graph.outputs):
            if graph_output is value:
                graph.outputs[index] = output


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT

"""The plugin in Python, as far as an engine is built: types, shapes, formats and what the engine stores.

TensorRT-RTX builds engines on machines without a GPU, and there is no C++ plugin where TensorRT's headers are not. What
this one stores in an engine is what the C++ plugin stores, so an engine that is built with it runs with that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.plugins.block_sparse.bsl16 import bsl16_shape
from lsp_deploy.plugins.block_sparse.operator import OP_TYPE, BlockSparseLinear

__all__ = ["is_known", "register"]

_NAMESPACE, _VERSION = "lsp", "1"

_INT32, _FLOAT32, _CHAR = "INT32", "FLOAT32", "CHAR"
# In the order in which the C++ plugin stores them.
_FIELDS = {
    "K": _INT32,
    "N": _INT32,
    "block_k": _INT32,
    "block_n": _INT32,
    "col_ptr": _INT32,
    "k_idx": _INT32,
    "activation": _CHAR,
    "layout": _CHAR,
    "x_scale": _FLOAT32,
    "x_offset": _FLOAT32,
    "out_type": _INT32,
    "out_scale": _FLOAT32,
    "out_offset": _FLOAT32,
}
_TYPES = ("values_type", "residual_type")
_LISTS = ("col_ptr", "k_idx")
_NUMPY: Mapping[str, Any] = {_INT32: np.int32, _FLOAT32: np.float32, _CHAR: np.int8}
_X, _VALUES, _BIAS, _SCALE, _RESIDUAL = range(5)
_ONNX_TYPES = {"FLOAT": 1, "INT8": 3, "HALF": 10, "BF16": 16}


def is_known(trt: Any) -> bool:
    """Return whether a TensorRT, the module tensorrt or tensorrt_rtx, has a plugin for the operator."""
    # Asking for the one plugin would put an error into the log where there is none.
    creators = trt.get_plugin_registry().all_creators
    return any((one.name, one.plugin_namespace) == (OP_TYPE, _NAMESPACE) for one in creators)


def register(trt: Any) -> Any:
    """Make the plugin known to a TensorRT that has none for the operator.

    Args:
        trt: the module, tensorrt or tensorrt_rtx.

    Returns:
        The creator, which must live as long as engines are built.
    """
    creator = _creator_class(trt)()
    trt.get_plugin_registry().register_creator(creator, _NAMESPACE)
    return creator


def _plugin_class(trt: Any) -> Any:
    """Return the class; its bases are those of the module."""
    onnx_type = {getattr(trt.DataType, name): number for name, number in _ONNX_TYPES.items()}
    trt_type = {number: dtype for dtype, number in onnx_type.items()}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc, unused-ignore]
        def __init__(self, operator: BlockSparseLinear, types: Mapping[str, int]) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = OP_TYPE, _NAMESPACE, _VERSION
            self.num_outputs = 1
            self.timing_cache_id = sha256(repr(operator).encode()).hexdigest()[:16]
            self.operator, self.types = operator, dict(types)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.operator, self.types)

        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return [trt_type[self.operator.out_type.value]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            x = inputs[_X]
            y = trt.DimsExprs(len(x))
            for axis in range(len(x) - 1):
                y[axis] = x[axis]
            y[len(x) - 1] = builder.constant(self.operator.N)
            return [y]

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            here = tensors[position].desc
            types = [onnx_type.get(tensor.desc.type, 0) for tensor in tensors[: position + 1]]
            return here.format == trt.TensorFormat.LINEAR and _takes(self.operator, position, types, inputs)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            self.types = {
                "values_type": onnx_type[inputs[_VALUES].desc.type],
                "residual_type": onnx_type[inputs[_RESIDUAL].desc.type] if len(inputs) > _RESIDUAL else 0,
            }
            shapes = [tuple(tensor.desc.dims) for tensor in inputs]
            if (wrong := _wrong_shape(self.operator, shapes, self.types["values_type"])) is not None:
                raise ValueError(wrong)

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Nothing depends on the number of rows."""

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0

        def get_valid_tactics(self) -> list[int]:
            """None: which kernel is the fastest is a question to a GPU."""
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is the default one only."""

        def get_fields_to_serialize(self) -> Any:
            self._fields = _collection(trt, {**_attributes(self.operator), **self.types})
            return self._fields

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(self, *arguments: Any) -> None:
            raise UserError(f"{OP_TYPE} in Python builds engines only; load liblsp_block_sparse.so to run them")

    return Plugin


def _creator_class(trt: Any) -> Any:
    plugin_class = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = OP_TYPE, _NAMESPACE, _VERSION
            # TensorRT hands over only what is named here.
            self.field_names = _collection(trt, {name: np.zeros(1, _NUMPY[kind]) for name, kind in _FIELDS.items()})

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {field.name: np.array(field.data) for field in fields}
            types = {key: int(found[key][0]) for key in _TYPES if key in found}
            return plugin_class(_operator(found), types)

    return Creator


def _operator(found: Mapping[str, NDArray[Any]]) -> BlockSparseLinear:
    """Return the attributes in some fields, checked.

    Raises:
        ValueError: they contradict each other, or are not for a GPU.
    """
    attributes: dict[str, Any] = {}
    for name, kind in _FIELDS.items():
        if name not in found:
            continue
        if name in _LISTS:
            attributes[name] = tuple(int(entry) for entry in found[name])
        elif kind == _CHAR:
            attributes[name] = found[name].tobytes().split(b"\0")[0].decode()
        else:
            attributes[name] = found[name].reshape(-1)[0].item()
    attributes["out_type"] = ir.DataType(attributes.get("out_type", 1))
    operator = BlockSparseLinear(**attributes)
    if operator.layout != "bsl16.v1":
        raise ValueError(f"its values are in layout {operator.layout}, the plugin reads bsl16.v1")
    return operator


def _attributes(operator: BlockSparseLinear) -> dict[str, NDArray[Any]]:
    """Return the attributes as fields hold them."""
    fields = {}
    for name, kind in _FIELDS.items():
        value = getattr(operator, name)
        if kind == _CHAR:
            value = list(value.encode() + b"\0")
        fields[name] = np.atleast_1d(np.array(value.value if name == "out_type" else value, _NUMPY[kind]))
    return fields


def _collection(trt: Any, fields: Mapping[str, Any]) -> Any:
    """Return a collection of plugin fields; empty ones are left out."""
    made = []
    for name, value in fields.items():
        kind = _FIELDS.get(name, _INT32)
        data = np.atleast_1d(np.asarray(value, _NUMPY[kind]))
        if data.size:
            made.append(trt.PluginField(name, data, getattr(trt.PluginFieldType, kind)))
    return trt.PluginFieldCollection(made)


def _takes(operator: BlockSparseLinear, position: int, types: list[int], inputs: int) -> bool:
    """Return whether the last of some types is one that the input, or after the inputs the output, may have."""
    here, x, out, int8 = types[-1], types[_X], operator.out_type.value, _ONNX_TYPES["INT8"]
    sixteen_bits = (_ONNX_TYPES["HALF"], _ONNX_TYPES["BF16"])
    if position == inputs:
        return here == out
    if position == _X:
        return here == int8 if operator.x_scale > 0 else here in sixteen_bits
    if position == _VALUES:
        return here == x
    if position in (_BIAS, _SCALE):
        return here == _ONNX_TYPES["FLOAT"]
    if out != int8:
        return here == out
    return here in sixteen_bits if x == int8 else here == x


def _wrong_shape(operator: BlockSparseLinear, shapes: list[tuple[int, ...]], values_type: int) -> str | None:
    """Return what is wrong with the inputs' shapes, in which -1 is not known yet."""
    values = bsl16_shape(operator, 1 if values_type == _ONNX_TYPES["INT8"] else 2)
    if shapes[_X][-1] not in (-1, operator.K):
        return "its x does not end in K"
    if shapes[_VALUES] != values:
        return f"its values are {list(shapes[_VALUES])}, not {list(values)}"
    if shapes[_BIAS] != (operator.N,) or shapes[_SCALE] != (operator.N,):
        return "its bias or its scale does not have N entries"
    if len(shapes) > _RESIDUAL and shapes[_RESIDUAL][-1] not in (-1, operator.N):
        return "its residual does not end in N"
    return None

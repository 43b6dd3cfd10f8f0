"""What is in a model file: linear layers, sparsity patterns, quantization, sizes and FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lsp_deploy.files import sha256_of
from lsp_deploy.graph.constants import is_constant, root_of
from lsp_deploy.graph.weight_patterns import find_pattern
from lsp_deploy.linear_layers import LinearLayer, attention_flops, linear_layers
from lsp_deploy.model import input_shapes, load_model, resolve_shapes
from lsp_deploy.passes.lower_operators import LowerOperatorsPass

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Inspection", "LayerInspection", "ValueInspection", "inspect_model", "inspection_table"]

_TYPE_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
# Rounding to so few levels makes zeros of its own.
_DENSE_BELOW = {"int4": 0.4, "uint4": 0.4}


@dataclass(frozen=True)
class ValueInspection:
    """One input or output of the graph."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class LayerInspection:
    """One linear layer: y [M, N] = x [M, K] @ W [K, N]."""

    name: str
    role: str
    block: int | None
    M: int
    K: int
    N: int
    flops: int
    dtype: str
    """Of the weight as stored."""
    weight_bits: int | None
    """Bits of a quantized weight."""
    activation_bits: int | None
    """Bits of a quantized input."""
    zeros: float
    pattern: str
    """dense, 2:4, block or unstructured."""
    zero_block_shape: list[int] | None
    """block_k × block_n, where the pattern is block."""
    zero_blocks: float | None
    """Fraction of such blocks that are zero."""


@dataclass(frozen=True)
class Inspection:
    """What is in a model file."""

    path: str
    sha256: str
    file_bytes: int
    external_bytes: int
    opset: int
    opsets: dict[str, int]
    """By domain; the standard one is ""."""
    producer: str
    inputs: list[ValueInspection]
    outputs: list[ValueInspection]
    input_shapes: dict[str, list[int]]
    """At which M and FLOPs are given."""
    parameters: int
    linear_flops: int
    attention_flops: int
    quantize_nodes: int
    dequantize_nodes: int
    node_types: dict[str, int]
    layers: list[LayerInspection]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def inspect_model(path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> Inspection:
    """Look into a model file; nothing is changed.

    Args:
        path: ONNX file.
        shapes: input shapes for M and FLOPs; a dynamic batch is 1 if not given.

    Raises:
        UserError: not a usable model, or a dynamic dimension is not given.
    """
    model = load_model(path)
    declared, concrete = input_shapes(model), resolve_shapes(model, shapes, batch=1)
    stock = model.clone()
    LowerOperatorsPass()(stock)  # operators of ours are shown as the linear layers that they are
    layers = linear_layers(stock, concrete)
    types = Counter(_operator(node) for node in model.graph.all_nodes())
    return Inspection(
        path=str(path),
        sha256=sha256_of(path),
        file_bytes=path.stat().st_size,
        external_bytes=_external_bytes(model),
        opset=model.opset_imports[""],
        opsets=dict(model.opset_imports),
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=[
            ValueInspection(str(value.name), _type_name(value.dtype), list(shape))
            for value in model.graph.inputs
            if (shape := declared.get(str(value.name))) is not None
        ],
        outputs=[_inspect_value(value) for value in model.graph.outputs],
        input_shapes={name: list(shape) for name, shape in concrete.items()},
        parameters=_parameters(model),
        linear_flops=sum(layer.flops for layer in layers),
        attention_flops=attention_flops(stock, concrete),
        quantize_nodes=types["QuantizeLinear"],
        dequantize_nodes=types["DequantizeLinear"],
        node_types=dict(types.most_common()),
        layers=[_inspect_layer(layer) for layer in layers],
    )


def inspection_table(inspection: Inspection) -> list[RenderableType]:
    """Return what a terminal shows: the facts of the file, and a row for each layer."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for fact in _facts(inspection):
        facts.add_row(*map(Text, fact))
    if not inspection.layers:
        return [facts, "no linear layers: no MatMul, Gemm or patch-wise Conv with a constant matrix"]
    table = Table(title=f"{len(inspection.layers)} linear layers", box=SIMPLE_HEAD, padding=0, title_justify="left")
    table.add_column("layer", overflow="fold", min_width=24)
    table.add_column("role")
    for name in ("block", "M×K×N", "MFLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("type")
    table.add_column("zeros", justify="right")
    table.add_column("pattern")
    for layer in inspection.layers:
        cells = (
            layer.name,
            layer.role,
            "" if layer.block is None else str(layer.block),
            f"{layer.M}×{layer.K}×{layer.N}",
            f"{layer.flops / 1e6:.1f}",
            layer.dtype if layer.activation_bits is None else f"{layer.dtype}, x int{layer.activation_bits}",
            f"{layer.zeros:.1%}",
            _pattern(layer),
        )
        table.add_row(*map(Text, cells))
    return [facts, table]


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    size = f"{inspection.file_bytes / 1e6:.1f} MB"
    if inspection.external_bytes:
        size += f" + {inspection.external_bytes / 1e6:.1f} MB external data"
    at = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in inspection.input_shapes.items())
    quantized = sum(layer.activation_bits is not None and layer.weight_bits is not None for layer in inspection.layers)
    weights = sum(layer.weight_bits is not None for layer in inspection.layers)
    return [
        ("file", f"{inspection.path}, {size}"),
        ("sha256", inspection.sha256),
        ("opset", ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in inspection.opsets.items())),
        ("producer", inspection.producer or "not named"),
        ("inputs", ", ".join(map(_value, inspection.inputs))),
        ("outputs", ", ".join(map(_value, inspection.outputs))),
        ("parameters", f"{inspection.parameters:,}"),
        (
            "FLOPs",
            f"{inspection.linear_flops / 1e9:.4g} G linear, {inspection.attention_flops / 1e9:.4g} G attention at {at}",
        ),
        (
            "quantized",
            f"{quantized} layers in weight and input, {weights - quantized} in weight alone "
            f"({inspection.quantize_nodes} Q, {inspection.dequantize_nodes} DQ)",
        ),
        ("nodes", ", ".join(f"{count} {name}" for name, count in inspection.node_types.items())),
    ]


def _pattern(layer: LayerInspection) -> str:
    if layer.zero_block_shape is None or layer.zero_blocks is None:
        return layer.pattern
    block_k, block_n = layer.zero_block_shape
    return f"{layer.zero_blocks:.1%} of {block_k}x{block_n} blocks"


def _value(value: ValueInspection) -> str:
    return f"{value.name} {value.dtype} [{', '.join(map(str, value.shape))}]"


def _inspect_layer(layer: LinearLayer) -> LayerInspection:
    stored = _stored_type(layer)
    found = find_pattern(layer.weight(), dense_below=_DENSE_BELOW.get(stored, 0.05))
    return LayerInspection(
        name=layer.name,
        role=layer.role,
        block=layer.block,
        M=layer.M,
        K=layer.K,
        N=layer.N,
        flops=layer.flops,
        dtype=stored,
        weight_bits=_quantized_bits(layer.weight_value),
        activation_bits=_quantized_bits(layer.x),
        zeros=round(found.zeros, 6),
        pattern=found.pattern,
        zero_block_shape=None if found.block is None else list(found.block),
        zero_blocks=None if found.zero_blocks is None else round(found.zero_blocks, 6),
    )


def _inspect_value(value: ir.Value) -> ValueInspection:
    shape = [] if value.shape is None else [d if isinstance(d, int) else d.value or "?" for d in value.shape]
    return ValueInspection(str(value.name), _type_name(value.dtype), shape)


def _stored_type(layer: LinearLayer) -> str:
    tensor = ir.convenience.get_const_tensor(root_of(layer.weight_value))
    return _type_name(None if tensor is None else tensor.dtype)


def _quantized_bits(value: ir.Value | None) -> int | None:
    """Return the bits of the integers that `value` is dequantized from, or None."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return _bits(node)
        if node.op_type not in ("Cast", "Identity", "Reshape", "Transpose"):
            return None
        value = node.inputs[0]
    return None


def _bits(dequantize: ir.Node) -> int | None:
    quantized = dequantize.inputs[0]
    zero_point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    for value in (zero_point, quantized):
        if value is None:
            continue
        if is_constant(value) and (tensor := ir.convenience.get_const_tensor(value)) is not None:
            return tensor.dtype.bitwidth
        if value.dtype is not None:
            return value.dtype.bitwidth
    # Without a zero point QuantizeLinear gives uint8, unless it names another type.
    return 8


def _type_name(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else _TYPE_NAMES.get(dtype.name, dtype.name.lower())


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _parameters(model: ir.Model) -> int:
    """Count entries of tensors that hold weights; shapes and indices are 64-bit integers."""
    return sum(
        tensor.size
        for graph in model.graphs()
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None and tensor.dtype not in (ir.DataType.INT64, ir.DataType.BOOL)
    )


def _external_bytes(model: ir.Model) -> int:
    files = {
        Path(value.const_value.path)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return sum(file.stat().st_size for file in files)

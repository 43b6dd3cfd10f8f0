"""What ONNX Runtime makes of a model: the nodes of its optimised graph, with the types they compute in."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

from lsp_deploy.engines.compute_types import compute_type
from lsp_deploy.engines.protocol import LayerRecord

__all__ = ["optimized_layers"]

_PROVIDERS = ["CPUExecutionProvider"]
_INT8_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
    }
)
_TYPE_NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}
_BOOKKEEPING = frozenset({"int64", "int32", "bool"})


def optimized_layers(model_path: Path, session_options: Callable[[int], Any]) -> list[LayerRecord]:
    """Return the nodes that ONNX Runtime runs for `model_path` on this CPU, shape arithmetic left out.

    The optimised graph is saved without types, so a second session, which has every value as an output and runs
    nothing, is asked for them.

    Args:
        model_path: an ONNX file.
        session_options: makes the options of a session for a number of threads.
    """
    with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as folder:
        graph = _optimized(model_path, Path(folder), session_options(1)).graph
        types = _types(graph, Path(folder), session_options(1))
        sources = _sources(ir.load(model_path).graph)
        records = [_record(node, types, sources) for node in graph]
        return [record for record in records if not _BOOKKEEPING.issuperset(record.output_types)]


def _sources(graph: ir.Graph) -> dict[str, str]:
    """Return by the name of a node in the optimised graph which node of the model it was.

    Most keep theirs. A Conv in the blocked layout of its channels is called after its output.
    """
    names = {str(node.name): str(node.name) for node in graph}
    convolutions = [node for node in graph if node.op_type == "Conv"]
    return names | {f"{node.outputs[0].name}_nchwc": str(node.name) for node in convolutions}


def _optimized(model_path: Path, folder: Path, options: Any) -> ir.Model:
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    for key, value in (("file_name", "weights.data"), ("min_size_in_bytes", "1024")):
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    ort.InferenceSession(str(model_path), options, providers=_PROVIDERS)
    return ir.load(folder / "optimized.onnx")


def _types(graph: ir.Graph, folder: Path, options: Any) -> dict[str, str]:
    present = {value.name for value in graph.outputs}
    graph.outputs.extend(value for node in graph for value in node.outputs if value.name and value.name not in present)
    path = folder / "typed.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=_PROVIDERS)
    types = {value.name: _short(value.type) for value in (*session.get_inputs(), *session.get_outputs())}
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            types[name] = _short(value.const_value.dtype.name.lower())
    return types


def _record(node: ir.Node, types: dict[str, str], sources: Mapping[str, str]) -> LayerRecord:
    inputs = [value for value in node.inputs if value is not None and value.name]
    constants = [value for value in inputs if value.is_initializer()]
    input_types = [types[str(value.name)] for value in inputs if not value.is_initializer()]
    constant_types = [types[str(value.name)] for value in constants]
    output_types = [types[value.name] for value in node.outputs if value.name]
    return LayerRecord(
        name=node.name or node.op_type,
        kind=node.op_type,
        precision=_own_type(node, constant_types) or compute_type([*input_types, *constant_types, *output_types]),
        input_types=input_types,
        constant_types=constant_types,
        output_types=output_types,
        onnx_nodes=[sources[str(node.name)]] if node.name in sources else [],
    )


def _own_type(node: ir.Node, constant_types: Sequence[str]) -> str | None:
    """Return what a node computes in whose operands do not tell: kernels of int8, and this project's operators."""
    if node.domain == "lsp" and node.op_type == "BlockSparseLinear":
        return constant_types[0]  # of its values
    if node.domain == "lsp" and node.op_type == "Attention":
        return {"bfloat16": "bf16"}.get(node.attributes.get_string("compute", ""), "fp32")
    return "int8" if node.op_type in _INT8_KERNELS or node.op_type.startswith("QLinear") else None


def _short(name: str) -> str:
    """Return "fp32" for "tensor(float)" or "float"."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    return _TYPE_NAMES.get(inner, inner)

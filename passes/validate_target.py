"""What a target's runtime refuses in a model, found before it is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from lsp_deploy.errors import UserError
from lsp_deploy.passes.tensorrt_rules import tensorrt_refusals
from lsp_deploy.plugins.operators import operator_nodes

__all__ = ["TargetRefusesError", "TargetRules", "ValidateTargetPass", "refusals"]

_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}
_SIXTEEN_BITS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MIN_OPSET_OF_16_BIT_SCALES = 19
# Whatever a user's own target file says, NVIDIA GPUs before these have no instructions for the type.
_MIN_CAPABILITY = {"bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9), "fp4": (12, 0)}
_MIN_CAPABILITY_OF_PLUGIN = (8, 0)


@dataclass(frozen=True)
class TargetRules:
    """What a model for a target must keep to."""

    name: str
    max_opset: int
    """Highest default-domain opset that the target's parser takes."""
    types: frozenset[str]
    """Of "fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4"."""
    tensorrt: bool
    """Whether TensorRT or TensorRT-RTX runs the model; ONNX Runtime otherwise."""
    compute_capability: str | None = None
    """Of the GPU, as "8.0"."""


class TargetRefusesError(UserError):
    """A model holds something that its target cannot take; `refusals` lists all of it."""

    def __init__(self, target: str, refusals: Sequence[str]) -> None:
        self.refusals = list(refusals)
        more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        first = f"{target} cannot take this model: {refusals[0]}{more}"
        super().__init__("\n  ".join([first, *refusals[1:]]))


class ValidateTargetPass(ir.passes.PassBase):
    """Changes nothing; raises where the target's runtime would refuse the model or quietly not compute as it says."""

    def __init__(self, rules: TargetRules) -> None:
        """Take the target's rules."""
        super().__init__()
        self.rules = rules

    @property
    def in_place(self) -> Literal[True]:
        """The model is returned as it came."""
        return True

    @property
    def changes_input(self) -> Literal[False]:
        """Nothing is changed."""
        return False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check the model.

        Raises:
            TargetRefusesError: with every refusal, node by node.
        """
        if found := refusals(model, self.rules):
            raise TargetRefusesError(self.rules.name, found)
        return ir.passes.PassResult(model, modified=False)


def refusals(model: ir.Model, rules: TargetRules) -> list[str]:
    """Return what the target cannot take, one line each: "node: reason"; an empty list if it takes the model."""
    found = [*_opset(model, rules), *_element_types(model, rules), *_scale_types(model)]
    if rules.tensorrt:
        found += [*_operators(model, rules), *tensorrt_refusals(model)]
    return found


def _opset(model: ir.Model, rules: TargetRules) -> Iterator[str]:
    opset = model.opset_imports.get("", 0)
    if opset > rules.max_opset:
        yield f"model: opset {opset}, but {rules.name} takes {rules.max_opset} at most"


def _element_types(model: ir.Model, rules: TargetRules) -> Iterator[str]:
    """Yield one refusal for each element type that the target does not have."""
    seen: set[str] = set()
    for value in _values(model):
        name = None if value.dtype is None else _NAMES.get(value.dtype)
        if name is None or name in seen or (not rules.tensorrt and _is_cast_at_border(value)):
            continue
        if reason := _lacks(rules, name):
            seen.add(name)
            producer = value.producer()
            yield f"{producer.name if producer is not None else value.name}: {name}, which {reason}"


def _lacks(rules: TargetRules, name: str) -> str | None:
    if name not in rules.types:
        return f"{rules.name} does not have (it has {', '.join(sorted(rules.types))})"
    least = _MIN_CAPABILITY.get(name)
    if rules.tensorrt and least and rules.compute_capability and _capability(rules.compute_capability) < least:
        return f"needs compute capability {least[0]}.{least[1]} ({rules.name} has {rules.compute_capability})"
    return None


def _capability(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _is_cast_at_border(value: ir.Value) -> bool:
    """Return whether a type is only that of an input or output, with a Cast behind it."""
    if value.is_graph_input():
        return all(node.op_type == "Cast" for node in value.consumers())
    producer = value.producer()
    return value.is_graph_output() and producer is not None and producer.op_type == "Cast" and not value.uses()


def _operators(model: ir.Model, rules: TargetRules) -> Iterator[str]:
    """Yield one refusal where the model has operators of ours, and the GPU is older than the plugin's kernels."""
    has = rules.compute_capability
    if has is not None and _capability(has) < _MIN_CAPABILITY_OF_PLUGIN:
        for node in operator_nodes(model)[:1]:
            yield f"{node.name}: lsp::{node.op_type} needs compute capability 8.0 ({rules.name} has {has})"


def _scale_types(model: ir.Model) -> Iterator[str]:
    opset = model.opset_imports.get("", 0)
    if opset >= _MIN_OPSET_OF_16_BIT_SCALES:
        return
    for node in model.graph.all_nodes():
        scale = node.inputs[1] if node.op_type in _QDQ and len(node.inputs) > 1 else None
        if scale is not None and scale.dtype in _SIXTEEN_BITS:
            yield f"{node.name}: its 16-bit scale needs opset {_MIN_OPSET_OF_16_BIT_SCALES}, the model has {opset}"


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs

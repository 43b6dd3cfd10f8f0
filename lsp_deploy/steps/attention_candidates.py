"""The attention of a network as small models of its own, in every form that it could be run in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.plugins.attention.operator import Compute

__all__ = ["AttentionPart", "attention_left", "attention_parts"]

_COMPUTE: dict[str, Compute] = {"lsp fp32": "float32", "lsp bf16": "bfloat16"}


@dataclass(frozen=True)
class AttentionPart:
    """One kind of attention of a network: what lies between its inputs and its output."""

    models: dict[str, ir.Model]
    """By candidate: "exported fp32", "lsp fp32", "lsp bf16"."""
    feeds: dict[str, NDArray[Any]] = field(repr=False)
    """Random inputs for all of them."""
    count: int = 1
    """How many of this kind the network has."""


def attention_parts(
    model: ir.Model, shapes: Mapping[str, Sequence[int]], candidates: Sequence[str]
) -> list[AttentionPart]:
    """Return the attention of a network that the operator could compute, one part for every kind of it.

    Args:
        model: canonical, float32; it is not changed.
        shapes: concrete input shapes, by name.
        candidates: of the operator, those that are to be made beside the exported form.

    Raises:
        UserError: ONNX Runtime cannot run the model at these shapes.
    """
    from lsp_deploy.graph.measured_shapes import measure_shapes

    fused = {name: _fused(model, name) for name in candidates}
    operators = list(_operators(next(iter(fused.values())))) if fused else []
    here = {str(value.name): value for value in _values(model)}
    cuts = [(_cut(node, here), str(node.outputs[0].name)) for node in operators]
    measured = measure_shapes(model, shapes, [here[name] for names, _ in cuts for name in names])
    kinds = [_kind(node, [measured[name] for name in names]) for node, (names, _) in zip(operators, cuts, strict=True)]
    counts = Counter(kinds)
    parts = []
    for kind in counts:
        names, output = cuts[kinds.index(kind)]
        inputs = {name: measured[name] for name in names}
        forms = {"exported fp32": model, **fused}
        models = {candidate: _between(form, inputs, output) for candidate, form in forms.items()}
        parts.append(AttentionPart(models, _feeds(models["exported fp32"], shapes), counts[kind]))
    return parts


def attention_left(model: ir.Model) -> dict[str, str]:
    """Return why attention of a network stays as exported, by the name of its Softmax or Attention.

    Args:
        model: canonical, float32; it is not changed.
    """
    from lsp_deploy.passes.attention_pattern import is_candidate
    from lsp_deploy.passes.fuse_attention import FuseAttentionPass
    from lsp_deploy.plugins import library

    rewrite = FuseAttentionPass()
    rewrite(model.clone())
    if library().path is not None:
        return rewrite.left
    names = [str(node.name) for node in model.graph if is_candidate(node)]
    return {name: rewrite.left.get(name, "the operator's library is missing") for name in names}


def _fused(model: ir.Model, candidate: str) -> ir.Model:
    from lsp_deploy.passes.fuse_attention import FuseAttentionPass

    copy = model.clone()
    FuseAttentionPass(_COMPUTE[candidate])(copy)
    return copy


def _operators(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.domain == "lsp" and node.op_type == "Attention")


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _cut(node: ir.Node, known: Mapping[str, ir.Value]) -> list[str]:
    """Return the nearest values before a node that another form of the graph has as well."""
    found: dict[str, None] = {}

    def visit(value: ir.Value | None) -> None:
        if value is None or value.is_initializer():
            return
        producer = value.producer()
        if str(value.name) in known or producer is None:
            found[str(value.name)] = None
            return
        for operand in producer.inputs:
            visit(operand)

    for operand in node.inputs:
        visit(operand)
    return list(found)


def _kind(node: ir.Node, shapes: Sequence[tuple[int, ...]]) -> tuple[object, ...]:
    """Return what tells attention that takes another time: heads, operands and their shapes."""
    attributes = node.attributes
    return (
        attributes.get_int("num_heads", 0), attributes.get_int("packed_qkv", 0), len(node.inputs), tuple(shapes)
    )  # fmt: skip


def _between(model: ir.Model, inputs: Mapping[str, Sequence[int]], output: str) -> ir.Model:
    """Return a copy of what computes `output` from values that are given, of concrete shapes."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    part = model.clone()
    graph = part.graph
    values = {str(value.name): value for value in _values(part)}
    graph.outputs[:] = [values[output]]
    for name, shape in inputs.items():
        old = values[name]
        given = ir.Value(name=f"{name}/given", shape=ir.Shape(shape), type=old.type)
        ir.convenience.replace_all_uses_with(old, given)
        graph.inputs.append(given)
    RemoveUnusedNodesPass()(part)
    # What computes a shape may still read the network's own input.
    graph.inputs[:] = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
    return part


def _feeds(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        own = [size for size in value.shape or () if isinstance(size, int)]  # of those that `_between` gives
        shape = shapes.get(str(value.name), own)
        feeds[str(value.name)] = random.standard_normal(tuple(shape), np.float32)
    return feeds

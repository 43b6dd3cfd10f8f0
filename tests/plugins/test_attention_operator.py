"""lsp::Attention as a node: what is valid, what is refused, and its standard operators against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import operators, run
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.errors import UserError
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plugins.attention.operator import DOMAIN, Attention, from_node, to_node
from lsp_deploy.plugins.attention.reference import attention


def value(name: str, shape: Sequence[int | str | None] | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def model(node: ir.Node, *, opset: int = 17) -> ir.Model:
    node.outputs[0].name = "y"
    inputs = [each for each in node.inputs if each is not None]
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="attention")
    return ir.Model(graph, ir_version=9)


def packed(**changes: Any) -> ir.Node:
    """Return a valid node of 3 heads of 8 channels, with other attributes; None leaves one out."""
    node = to_node(Attention(3, 0.25, True), [value("qkv", ["batch", 5, 72])], name="blocks.0/attention")
    for name, changed in changes.items():
        if changed is None:
            del node.attributes[name]
        else:
            node.attributes[name] = changed
    return node


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_node_holds_the_attributes(compute: Any, is_packed: bool) -> None:
    operator = Attention(3, 0.1, is_packed, compute)
    assert operator.scale == np.float32(0.1)
    operands = [value("qkv", ["batch", 5, 72])] if is_packed else [value(name, ["batch", 5, 24]) for name in "qkv"]
    for bias in (None, value("bias", [1, 3, 5, 5])):
        node = to_node(operator, operands, bias, name="attention")
        assert from_node(node) == operator
        assert node.outputs[0].dtype == ir.DataType.FLOAT
        assert str(node.outputs[0].shape) == "[batch,5,24]"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": None}, "it has no attribute num_heads"),
        ({"compute": None}, "it has no attribute compute"),
        ({"num_heads": ir.AttrInt64("num_heads", 0)}, "num_heads is 0, not a positive number"),
        ({"num_heads": ir.AttrFloat32("num_heads", 3.0)}, "attribute num_heads is no INT"),
        ({"num_heads": ir.AttrInt64("num_heads", 5)}, "72 channels do not make 15 heads of 1 to 128 channels"),
        ({"scale": ir.AttrFloat32("scale", float("nan"))}, "scale nan is no usable number"),
        ({"packed_qkv": ir.AttrInt64("packed_qkv", 2)}, "packed_qkv is 2, neither 0 nor 1"),
        ({"packed_qkv": ir.AttrInt64("packed_qkv", 0)}, "it takes q, k, v and at most a bias"),
        ({"compute": ir.AttrString("compute", "float16")}, "compute 'float16' is none of float32, bfloat16"),
        ({"causal": ir.AttrInt64("causal", 1)}, "it has an attribute causal, which this version does not know"),
    ],
)
def test_attributes_that_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=r"^blocks.0/attention is not a valid lsp::Attention: ") as refused:
        from_node(packed(**changes))
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("is_packed", "inputs", "reason"),
    [
        (True, [value("qkv", ["batch", 72])], "its qkv is [batch,72], not of rank 3"),
        (True, [value("qkv", ["batch", 5, 72], ir.DataType.FLOAT16)], "its qkv is FLOAT16, not FLOAT"),
        (True, [value("qkv", ["batch", 5, 1170])], "1170 channels do not make 9 heads of 1 to 128 channels"),
        (True, [value("qkv", None), value("bias", [5, 5])], "its bias is [5,5], not of rank 4"),
        (True, [value("qkv", None), value("bias", [1, 2, 5, 5])], "its bias has 2 heads, not 1 or 3"),
        (True, [value("qkv", [4, 5, 72]), value("bias", [3, 3, 5, 5])], "its bias is for 3 images, and the batch of 4"),
        (False, [value("q", [1, 5, 24]), value("k", [1, 7, 24]), value("v", [1, 7, 48])], "different sizes: 24, 48"),
        (False, [value("q", None), None, value("v", None)], "none of them empty"),
    ],
)
def test_inputs_that_are_refused(is_packed: bool, inputs: list[Any], reason: str) -> None:
    node = to_node(Attention(3, 0.25, is_packed), inputs, name="attention")
    with pytest.raises(UserError, match="attention is not a valid") as refused:
        from_node(node)
    assert reason in str(refused.value)


@settings(max_examples=40)
@given(
    images=st.integers(1, 2),
    repeats=st.integers(1, 3),
    S=st.integers(1, 9),
    T=st.integers(1, 9),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    is_packed=st.booleans(),
    bias=st.sampled_from([None, "for all heads", "for each head"]),
    dynamic=st.booleans(),
)
def test_standard_operators_compute_what_the_reference_does(
    images: int,
    repeats: int,
    S: int,
    T: int,
    heads: int,
    size: int,
    is_packed: bool,
    bias: str | None,
    dynamic: bool,
) -> None:
    random, width, batch = np.random.default_rng(S * T), heads * size, images * repeats
    shapes = {"qkv": (S, 3 * width)} if is_packed else {"q": (S, width), "k": (T, width), "v": (T, width)}
    feeds = {name: random.standard_normal((batch, *shape)).astype(np.float32) for name, shape in shapes.items()}
    inputs = [value(name, ["batch" if dynamic else batch, *shape]) for name, shape in shapes.items()]
    bias_value = None
    if bias is not None:
        shape = (repeats, 1 if bias == "for all heads" else heads, S, S if is_packed else T)
        feeds["bias"] = random.standard_normal(shape).astype(np.float32)
        bias_value = value("bias", shape)
    operator = Attention(heads, 0.4, is_packed)
    lowered = model(to_node(operator, inputs, bias_value, name="attention"))
    assert LowerOperatorsPass()(lowered).modified
    assert operators(lowered).keys() <= {"Reshape", "Transpose", "Split", "Squeeze", "Mul", "MatMul", "Add", "Softmax"}
    (actual,) = run(lowered, feeds)
    expected = attention(operator, *(feeds[name] for name in shapes), bias=feeds.get("bias"))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_repeated_bias_of_unknown_shape_has_no_form_in_standard_operators() -> None:
    bias = value("bias", [4, 1, "queries", "keys"])
    node = to_node(Attention(3, 0.25, True), [value("qkv", ["batch", 5, 72])], bias, name="attention")
    with pytest.raises(UserError, match="attention: its bias repeats along the batch"):
        LowerOperatorsPass()(model(node))


def test_shapes_follow_from_a_lowered_node() -> None:
    lowered = model(packed())
    LowerOperatorsPass()(lowered)
    InferShapesPass()(lowered)
    assert str(lowered.graph.outputs[0].shape) == "[batch,5,24]"


def test_bfloat16_rounds_operands_and_weights() -> None:
    qkv = np.random.default_rng(0).standard_normal((1, 6, 3 * 8)).astype(np.float32)
    rounded = attention(Attention(1, 0.3, True, "bfloat16"), qkv)
    exact = attention(Attention(1, 0.3, True), qkv)
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 1e-2
    # What bfloat16 holds exactly is not changed: one key has all the weight, 1.
    qkv[..., 16:] = np.rint(qkv[..., 16:])
    assert np.array_equal(attention(Attention(1, 1e4, True, "bfloat16"), qkv) % 1, np.zeros((1, 6, 8)))

"""The LinearLayer view on hand-built graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lsp_deploy.errors import UserError
from lsp_deploy.linear_layers import LinearLayer, attention_flops, linear_layers, replace_weight
from lsp_deploy.model import load_model, model_bytes

RNG = np.random.default_rng(0)
K, N = 12, 8
W = RNG.normal(size=(K, N)).astype(np.float32)
B = RNG.normal(size=N).astype(np.float32)
X = RNG.normal(size=(5, K)).astype(np.float32)


def build(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    initializers: dict[str, np.ndarray],
    x: Sequence[int | str] = ("n", K),
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    x_type: int = TensorProto.FLOAT,
) -> ir.Model:
    """Load a graph with input `x`; every initializer is given as an array."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", x_type, list(x))],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    file = path / "model.onnx"
    onnx.save(proto, file)
    return load_model(file)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # With optimizations, a MatMul with a dequantized weight quantizes its other operand as well.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def only(model: ir.Model) -> LinearLayer:
    (layer,) = linear_layers(model)
    return layer


# --- how a weight may be written

CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "initializer": ([], {"w": W}),
    "constant node": ([node("Constant", "", "w", value=numpy_helper.from_array(W))], {}),
    "identity": ([node("Identity", "w0", "w")], {"w0": W}),
    "identities": ([node("Identity", "w0", "w1"), node("Identity", "w1", "w")], {"w0": W}),
    "transpose": ([node("Transpose", "w0", "w", perm=[1, 0])], {"w0": W.T.copy()}),
    "cast": ([node("Cast", "w0", "w", to=TensorProto.FLOAT)], {"w0": W.astype(np.float16)}),
    "cast from bfloat16": ([node("Cast", "w0", "w", to=TensorProto.FLOAT)], {"w0": W.astype(ml_dtypes.bfloat16)}),
    "reshape": ([node("Reshape", "w0 shape", "w")], {"w0": W.reshape(-1), "shape": np.array([K, N])}),
    "unsqueezed": ([node("Unsqueeze", "w0 axes", "w")], {"w0": W, "axes": np.array([0])}),
    "dequantized": (
        [node("DequantizeLinear", "w0 s z", "w")],
        {"w0": np.rint(W * 20).astype(np.int8), "s": np.float32(0.05), "z": np.int8(0)},
    ),
    "dequantized by column": (
        [node("DequantizeLinear", "w0 s", "w", axis=1)],
        {"w0": np.rint(W * 20).astype(np.int8), "s": np.linspace(0.01, 0.1, N).astype(np.float32)},
    ),
    "dequantized, zero point": (
        [node("DequantizeLinear", "w0 s z", "w")],
        {"w0": np.rint(W * 20 + 100).astype(np.uint8), "s": np.float32(0.05), "z": np.uint8(100)},
    ),
    "scaled": ([node("Mul", "w0 s", "w")], {"w0": W, "s": np.float32(0.5)}),
    "chain": (
        [
            node("Identity", "w0", "w1"),
            node("DequantizeLinear", "w1 s", "w2", axis=0),
            node("Transpose", "w2", "w3", perm=[1, 0]),
            node("Identity", "w3", "w"),
        ],
        {"w0": np.rint(W.T * 20).astype(np.int8), "s": np.linspace(0.01, 0.1, N).astype(np.float32)},
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_weight_behind_constants(tmp_path: Path, kind: str) -> None:
    nodes, initializers = CHAINS[kind]
    model = build(tmp_path, [*nodes, node("MatMul", "x w", "y")], initializers)
    layer = only(model)
    weight = layer.weight()
    assert (layer.K, layer.N, layer.M) == (K, N, 1)
    assert weight.shape == (K, N)
    assert weight.dtype == np.float32
    assert layer.weight_root == ("w" if kind in ("initializer", "constant node") else "w0")
    np.testing.assert_allclose(run(model, x=X).reshape(5, N), X @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CHAINS)
def test_replace_weight_behind_constants(tmp_path: Path, kind: str) -> None:
    nodes, initializers = CHAINS[kind]
    model = build(tmp_path, [*nodes, node("MatMul", "x w", "y")], initializers)
    layer = only(model)
    before = run(model, x=X)
    replace_weight(layer, layer.weight())
    np.testing.assert_array_equal(run(model, x=X), before)
    new = np.where(layer.weight() > 0, layer.weight(), 0)
    replace_weight(layer, new)
    np.testing.assert_array_equal(layer.weight(), new)
    np.testing.assert_allclose(run(model, x=X).reshape(5, N), X @ new, rtol=1e-5, atol=1e-5)
    # Nothing of the old weight is left behind.
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert len(model.graph.initializers) == 1


def test_microsoft_dequantizer_with_16_bits(tmp_path: Path) -> None:
    quantized = np.rint(W * 2000).astype(np.int16)
    dequantize = node("DequantizeLinear", "w0 s", "w", domain="com.microsoft")
    model = build(
        tmp_path, [dequantize, node("MatMul", "x w", "y")], {"w0": quantized, "s": np.float32(1 / 2048)}, opset=17
    )
    np.testing.assert_allclose(run(model, x=X), X @ only(model).weight(), rtol=1e-5, atol=1e-5)


def test_int4_weight_in_blocks(tmp_path: Path) -> None:
    quantized = np.clip(np.rint(W * 3), -7, 7).astype(ml_dtypes.int4)
    scales = RNG.uniform(0.1, 0.5, size=(K // 4, N)).astype(np.float32)
    dequantize = node("DequantizeLinear", "w0 s", "w", axis=0, block_size=4)
    model = build(tmp_path, [dequantize, node("MatMul", "x w", "y")], {"w0": quantized, "s": scales}, opset=21)
    expected = quantized.astype(np.float32) * scales.repeat(4, axis=0)
    np.testing.assert_allclose(only(model).weight(), expected, rtol=1e-6)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta", "with_bias"), [(1.0, 1.0, True), (0.5, 2.0, True), (2.0, 1.0, False)])
def test_gemm(tmp_path: Path, trans_a: int, trans_b: int, alpha: float, beta: float, with_bias: bool) -> None:
    weight = W.T.copy() if trans_b else W
    inputs = "x w b" if with_bias else "x w"
    gemm = node("Gemm", inputs, "y", transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)
    initializers = {"w": weight, "b": B} if with_bias else {"w": weight}
    model = build(tmp_path, [gemm], initializers, x=(K, 5) if trans_a else (5, K))
    layer = only(model)
    x = X.T.copy() if trans_a else X
    assert (layer.K, layer.N, layer.M) == (K, N, 5)
    np.testing.assert_allclose(run(model, x=x), X @ layer.weight() + layer.bias_vector(), rtol=1e-5, atol=1e-5)
    new = RNG.normal(size=(K, N)).astype(np.float32)
    replace_weight(layer, new)
    np.testing.assert_allclose(layer.weight(), new, rtol=1e-6)
    np.testing.assert_allclose(run(model, x=x), X @ new + layer.bias_vector(), rtol=1e-5, atol=1e-5)
    assert (layer.bias_node is layer.node) == with_bias


def test_gemm_that_adds_an_activation_has_no_bias(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "r"), node("Gemm", "x w r", "y")]
    layer = only(build(tmp_path, nodes, {"w": W[:, :1].repeat(K, axis=1)}, x=(5, K)))
    assert layer.bias is None
    assert not layer.bias_vector().any()


@pytest.mark.parametrize("order", ["a b", "b a"])
def test_matmul_with_a_bias_after_it(tmp_path: Path, order: str) -> None:
    model = build(tmp_path, [node("MatMul", "x w", "a"), node("Add", order, "y")], {"w": W, "b": B}, x=(2, 5, K))
    layer = only(model)
    assert layer.M == 10
    assert layer.bias_node is not None
    assert layer.bias_node.op_type == "Add"
    np.testing.assert_array_equal(layer.bias_vector(), B)


@pytest.mark.parametrize("other", [np.ones((5, N), np.float32), np.ones(1, np.float32), np.ones((N, 1), np.float32)])
def test_other_constants_added_are_no_bias(tmp_path: Path, other: np.ndarray) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Add", "a b", "y")]
    assert only(build(tmp_path, nodes, {"w": W, "b": other}, x=(2, 1, K))).bias is None


def test_conv_over_patches(tmp_path: Path) -> None:
    kernel = RNG.normal(size=(N, 3, 4, 2)).astype(np.float32)
    conv = node("Conv", "x w b", "y", strides=[4, 2], kernel_shape=[4, 2])
    model = build(tmp_path, [conv], {"w": kernel, "b": B}, x=(2, 3, 8, 6))
    layer = only(model)
    assert (layer.K, layer.N, layer.M, layer.role) == (24, N, 2 * 2 * 3, "patch")
    image = RNG.normal(size=(2, 3, 8, 6)).astype(np.float32)
    patches = image.reshape(2, 3, 2, 4, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(12, 24)

    def rows() -> np.ndarray:
        return run(model, x=image).transpose(0, 2, 3, 1).reshape(12, N)

    np.testing.assert_allclose(rows(), patches @ layer.weight() + layer.bias_vector(), rtol=1e-4, atol=1e-4)
    new = RNG.normal(size=(24, N)).astype(np.float32)
    replace_weight(layer, new)
    np.testing.assert_allclose(rows(), patches @ new + layer.bias_vector(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1, 1]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "dilations": [2, 2]},
        {"strides": [2, 2], "group": 2},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ],
)
def test_other_convs_are_no_linear_layers(tmp_path: Path, attributes: dict[str, Any]) -> None:
    kernel = np.ones((4, 4 // attributes.get("group", 1), 2, 2), np.float32)
    model = build(tmp_path, [node("Conv", "x w", "y", **attributes)], {"w": kernel}, x=(1, 4, 8, 8))
    assert linear_layers(model) == []


def test_what_is_no_linear_layer(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "left x", "a"),  # a constant on the left mixes rows
        node("Cast", "a", "i", to=TensorProto.INT64),
        node("Gather", "table i", "b"),  # an embedding
        node("MatMul", "table w", "c"),  # constants alone
        node("MatMul", "x batched", "d"),  # one matrix for each head
        node("MatMul", "x vector", "e"),
    ]
    initializers = {
        "left": np.zeros((3, 5), np.float32),
        "table": np.ones((4, K), np.float32),
        "w": W,
        "batched": np.ones((2, K, 3), np.float32),
        "vector": np.ones(K, np.float32),
    }
    model = build(tmp_path, nodes, initializers, x=(5, K), outputs=("b", "c", "d", "e"))
    assert linear_layers(model) == []


def test_quantized_activations(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "xd"),
        node("DequantizeLinear", "w0 ws", "w", axis=1),
        node("MatMul", "xd w", "a"),
        node("Add", "a b", "y"),
    ]
    initializers = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "w0": np.rint(W * 20).astype(np.int8),
        "ws": np.full(N, 0.05, np.float32),
        "b": B,
    }
    layer = only(build(tmp_path, nodes, initializers))
    assert layer.x.name == "xd"
    assert layer.bias is not None


# --- shared weights


def build_shared(path: Path) -> ir.Model:
    nodes = [
        node("Identity", "w", "w1"),
        node("MatMul", "x w", "a"),
        node("Relu", "a", "r"),
        node("MatMul", "r w1", "y"),
    ]
    return build(path, nodes, {"w": RNG.normal(size=(K, K)).astype(np.float32)})


def test_shared_weights_have_one_root(tmp_path: Path) -> None:
    first, second = linear_layers(build_shared(tmp_path))
    assert first.weight_root == second.weight_root == "w"


def test_replacing_one_of_two_leaves_the_other(tmp_path: Path) -> None:
    model = build_shared(tmp_path)
    first, second = linear_layers(model)
    old, new = second.weight(), first.weight() * 0.5
    replace_weight(first, new)
    np.testing.assert_array_equal(second.weight(), old)
    np.testing.assert_allclose(run(model, x=X), np.maximum(X @ new, 0) @ old, rtol=1e-4, atol=1e-4)
    assert len(model.graph.initializers) == 2


def test_replacing_both_alike_keeps_them_shared(tmp_path: Path) -> None:
    model = build_shared(tmp_path)
    first, second = linear_layers(model)
    new = first.weight() * 0.5
    replace_weight(first, new)
    replace_weight(second, new)
    np.testing.assert_allclose(run(model, x=X), np.maximum(X @ new, 0) @ new, rtol=1e-4, atol=1e-4)
    assert len(model.graph.initializers) == 1
    assert first.weight_root == second.weight_root


def test_replacing_both_differently(tmp_path: Path) -> None:
    model = build_shared(tmp_path)
    first, second = linear_layers(model)
    one, two = first.weight() * 0.5, first.weight() * 2
    replace_weight(first, one)
    replace_weight(second, two)
    np.testing.assert_allclose(run(model, x=X), np.maximum(X @ one, 0) @ two, rtol=1e-4, atol=1e-4)
    assert len(model.graph.initializers) == 2


def test_an_initializer_that_is_also_an_output_stays(tmp_path: Path) -> None:
    model = build(tmp_path, [node("MatMul", "x w", "y")], {"w": W}, outputs=("y", "w"))
    replace_weight(only(model), W * 2)
    np.testing.assert_allclose(run(model, x=X), X @ W * 2, rtol=1e-5, atol=1e-5)


# --- what follows a layer

SCALARS = {
    name: np.float32(value)
    for name, value in {
        "sqrt2": np.sqrt(2),
        "one": 1,
        "half": 0.5,
        "c1": 0.044715,
        "c2": np.sqrt(2 / np.pi),
        "c3": 1.702,
        "three": 3,
        "six": 6,
        "zero": 0,
    }.items()
}
ACTIVATIONS: dict[str, tuple[str, list[onnx.NodeProto]]] = {
    "gelu, factor last": (
        "gelu",
        [
            node("Div", "a sqrt2", "t1"),
            node("Erf", "t1", "t2"),
            node("Add", "t2 one", "t3"),
            node("Mul", "a t3", "t4"),
            node("Mul", "t4 half", "z"),
        ],
    ),
    "gelu, factor first": (
        "gelu",
        [
            node("Mul", "a half", "t0"),
            node("Div", "a sqrt2", "t1"),
            node("Erf", "t1", "t2"),
            node("Add", "one t2", "t3"),
            node("Mul", "t0 t3", "z"),
        ],
    ),
    "gelu_tanh": (
        "gelu_tanh",
        [
            node("Pow", "a three", "p"),
            node("Mul", "p c1", "t1"),
            node("Add", "a t1", "t2"),
            node("Mul", "t2 c2", "t3"),
            node("Tanh", "t3", "t4"),
            node("Add", "t4 one", "t5"),
            node("Mul", "a t5", "t6"),
            node("Mul", "half t6", "z"),
        ],
    ),
    "quick_gelu": (
        "quick_gelu",
        [node("Mul", "a c3", "t1"), node("Sigmoid", "t1", "t2"), node("Mul", "a t2", "z")],
    ),
    "silu": ("silu", [node("Sigmoid", "a", "t1"), node("Mul", "t1 a", "z")]),
    "hardswish": ("hardswish", [node("HardSwish", "a", "z")]),
    "hardswish by hand": (
        "hardswish",
        [node("HardSigmoid", "a", "t1", alpha=1 / 6, beta=0.5), node("Mul", "a t1", "z")],
    ),
    "relu": ("relu", [node("Relu", "a", "z")]),
    "relu6": ("clip", [node("Clip", "a zero six", "z")]),
    "tanh": ("tanh", [node("Tanh", "a", "z")]),
    "microsoft gelu": ("gelu", [node("Gelu", "a", "z", domain="com.microsoft")]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_activation(tmp_path: Path, name: str, bias: bool) -> None:
    kind, nodes = ACTIVATIONS[name]
    before = [node("MatMul", "x w", "m"), node("Add", "b m", "a")] if bias else [node("MatMul", "x w", "a")]
    after = [node("MatMul", "z v", "n"), node("Add", "n x", "o"), node("MatMul", "o u", "y")]
    square = RNG.normal(size=(K, K)).astype(np.float32)
    initializers = {**SCALARS, "w": W, "b": B, "v": W.T.copy(), "u": square}
    layers = linear_layers(build(tmp_path, [*before, *nodes, *after], initializers))
    assert [layer.role for layer in layers] == ["fc1", "fc2", "head"]
    fc1, fc2, _ = layers
    assert fc1.activation_kind == kind
    assert fc1.activation is not None
    assert fc1.activation.outputs[0].name == "z"
    assert fc2.residual is not None
    assert fc2.residual.outputs[0].name == "o"
    assert fc1.residual is None
    assert fc2.activation is None
    assert (fc1.block, fc2.block) == (0, 0)


def test_fused_gelu_of_opset_20(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Gelu", "a", "z", approximate="tanh"),
        node("MatMul", "z v", "y"),
    ]
    fc1, _ = linear_layers(build(tmp_path, nodes, {"w": W, "v": W.T.copy()}, opset=20))
    assert fc1.activation_kind == "gelu_tanh"


def test_both_branches_of_a_gate_are_fc1(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "x g", "b"),
        node("Sigmoid", "a", "s"),
        node("Mul", "a s", "silu"),
        node("Mul", "silu b", "m"),
        node("LayerNormalization", "m scale", "n"),
        node("MatMul", "n v", "o"),
        node("Add", "x o", "r"),
        node("MatMul", "r u", "y"),
    ]
    weights = {"w": W, "g": W * 2, "v": W.T.copy(), "u": np.eye(K, dtype=np.float32), "scale": np.ones(N, np.float32)}
    layers = linear_layers(build(tmp_path, nodes, weights))
    assert [layer.role for layer in layers] == ["fc1", "fc1", "fc2", "head"]
    assert [layer.activation_kind for layer in layers] == ["silu", None, None, None]
    assert [layer.block for layer in layers] == [0, 0, 0, None]


def test_squeeze_and_excitation_is_no_mlp(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMean", "x", "pooled", axes=[1], keepdims=1),
        node("MatMul", "pooled w", "a"),
        node("Relu", "a", "r"),
        node("MatMul", "r v", "b"),
        node("Sigmoid", "b", "gate"),
        node("Mul", "x gate", "m"),
        node("MatMul", "m u", "y"),
    ]
    weights = {"w": W, "v": W.T.copy(), "u": np.eye(K, dtype=np.float32)}
    layers = linear_layers(build(tmp_path, nodes, weights, x=(1, 5, K)))
    assert [layer.role for layer in layers] == ["other", "other", "head"]


def test_residual_goes_through_scaling_and_reordering_but_not_through_norms(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Mul", "gamma a", "s"),
        node("Reshape", "s shape", "t"),
        node("Add", "t x", "first"),
        node("MatMul", "first w", "b"),
        node("LayerNormalization", "b gamma", "n"),
        node("Add", "first n", "y"),
    ]
    weights = {"w": np.eye(K, dtype=np.float32), "gamma": np.ones(K, np.float32), "shape": np.array([1, 5, K])}
    first, second = linear_layers(build(tmp_path, nodes, weights, x=(1, 5, K)))
    assert first.residual is not None
    assert first.residual.outputs[0].name == "first"
    assert second.residual is None


def test_the_mean_of_two_heads_is_no_residual(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("MatMul", "x v", "b"),
        node("Add", "a b", "c"),
        node("Mul", "c half", "y"),
    ]
    layers = linear_layers(build(tmp_path, nodes, {"w": W, "v": W * 2, "half": np.float32(0.5)}))
    assert [layer.role for layer in layers] == ["head", "head"]
    assert [layer.residual for layer in layers] == [None, None]


# --- fused attention, shapes and FLOPs


def test_fused_attention(tmp_path: Path) -> None:
    square = RNG.normal(size=(4, K, K)).astype(np.float32)
    nodes = [
        node("MatMul", "x wq", "q"),
        node("MatMul", "x wk", "k"),
        node("MatMul", "x wv", "v"),
        node("Attention", "q k v", "a", q_num_heads=2, kv_num_heads=2),
        node("MatMul", "a wo", "o"),
        node("Add", "x o", "r"),
        node("MatMul", "r head", "y"),
    ]
    weights = dict(zip(("wq", "wk", "wv", "wo"), square, strict=True)) | {"head": W}
    model = build(tmp_path, nodes, weights, x=(2, 5, K), opset=23)
    layers = linear_layers(model)
    assert [layer.role for layer in layers] == ["qkv", "qkv", "qkv", "proj", "head"]
    assert [layer.block for layer in layers] == [0, 0, 0, 0, None]
    assert attention_flops(model, {"x": (2, 5, K)}) == 2 * (2 * 2 * 5 * 5 * K)


def test_values_may_join_attention_beside_its_product(tmp_path: Path) -> None:
    """CoaT adds a depthwise convolution of v to the product: no residual, and the layer after it is proj."""
    nodes = [
        *[node("MatMul", f"x w{part}", part) for part in "qkv"],
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "scores"),
        node("Softmax", "scores", "probabilities"),
        node("MatMul", "probabilities v", "attended"),
        node("Transpose", "v", "channels", perm=[0, 2, 1]),
        node("Conv", "channels local", "convolved", group=K, pads=[1, 1]),
        node("Transpose", "convolved", "positions", perm=[0, 2, 1]),
        node("Add", "attended positions", "a"),
        node("MatMul", "a wo", "o"),
        node("Add", "x o", "r"),
        node("MatMul", "r head", "y"),
    ]
    square = RNG.normal(size=(4, K, K)).astype(np.float32)
    weights = dict(zip(("wq", "wk", "wv", "wo"), square, strict=True))
    weights |= {"head": W, "local": RNG.normal(size=(K, 1, 3)).astype(np.float32)}
    layers = linear_layers(build(tmp_path, nodes, weights, x=(2, 5, K)))
    assert [layer.role for layer in layers] == ["qkv", "qkv", "qkv", "proj", "head"]


def test_attention_without_a_product_is_no_mixing_of_heads(tmp_path: Path) -> None:
    """MobileViTv2 weighs tokens by a softmax, elementwise; the layer after that is an ordinary one."""
    nodes = [
        node("MatMul", "x embed", "e"),
        node("MatMul", "e wq", "q"),
        node("Softmax", "q", "p", axis=1),
        node("MatMul", "e wv", "v"),
        node("Relu", "v", "s"),
        node("Mul", "s p", "m"),
        node("MatMul", "m wo", "o"),
        node("Add", "e o", "r"),
        node("MatMul", "r head", "y"),
    ]
    square = RNG.normal(size=(4, K, K)).astype(np.float32)
    weights = dict(zip(("embed", "wq", "wv", "wo"), square, strict=True)) | {"head": W}
    layers = linear_layers(build(tmp_path, nodes, weights, x=(2, 5, K)))
    assert [layer.role for layer in layers] == ["patch", "other", "fc1", "fc2", "head"]


def test_attention_flops_of_matmul_and_einsum(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("MatMul", "x t", "scores"),
        node("Einsum", "scores x", "y", equation="bij, bjd -> bid"),
    ]
    model = build(tmp_path, nodes, {}, x=("batch", 5, K))
    assert attention_flops(model, {"x": (3, 5, K)}) == 2 * (2 * 3 * 5 * 5 * K)


def test_rows_follow_the_input_shapes(tmp_path: Path) -> None:
    model = build(tmp_path, [node("MatMul", "x w", "y")], {"w": W}, x=("batch", "tokens", K))
    (layer,) = linear_layers(model, {"x": (4, 7, K)})
    assert layer.M == 28
    assert layer.flops == 2 * 28 * K * N
    with pytest.raises(UserError, match="tokens"):
        linear_layers(model)


def test_a_model_that_cannot_run_is_a_user_error(tmp_path: Path) -> None:
    model = build(tmp_path, [node("MatMul", "x w", "y")], {"w": W}, x=("n", K + 1))
    with pytest.raises(UserError, match="ONNX Runtime cannot run the model at x:1x13"):
        linear_layers(model)


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    large = RNG.normal(size=(K, 1000)).astype(np.float32)
    model = build(tmp_path, [node("MatMul", "x w", "y")], {"w": large})
    before = model_bytes(model)
    linear_layers(model)
    assert model_bytes(model) == before


def test_half_precision_weights_stay_half(tmp_path: Path) -> None:
    model = build(tmp_path, [node("MatMul", "x w", "y")], {"w": W.astype(np.float16)}, x_type=TensorProto.FLOAT16)
    layer = only(model)
    replace_weight(layer, W * 2)
    (value,) = model.graph.initializers.values()
    assert value.dtype == ir.DataType.FLOAT16
    np.testing.assert_allclose(layer.weight(), W * 2, rtol=1e-3, atol=1e-3)


def test_brain_float_files_are_read(tmp_path: Path) -> None:
    weight = W.astype(ml_dtypes.bfloat16)
    model = build(tmp_path, [node("MatMul", "x w", "y")], {"w": weight}, x_type=TensorProto.BFLOAT16)
    np.testing.assert_array_equal(only(model).weight(), weight.astype(np.float32))

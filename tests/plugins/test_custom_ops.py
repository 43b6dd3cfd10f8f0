"""The operators in ONNX Runtime: computed as defined, shapes and types inferred, malformed nodes refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as state

from lsp_deploy.plugins.attention.operator import Attention
from lsp_deploy.plugins.attention.operator import to_node as attention_node
from lsp_deploy.plugins.attention.reference import attention
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear
from lsp_deploy.plugins.block_sparse.operator import to_node as linear_node
from lsp_deploy.plugins.block_sparse.packing import pack
from lsp_deploy.plugins.block_sparse.reference import block_sparse_linear

FLOAT, INT8 = ir.DataType.FLOAT, ir.DataType.INT8
RUN_ERRORS = (state.Fail, state.InvalidArgument, state.RuntimeException)
LOAD_ERRORS = (*RUN_ERRORS, state.InvalidGraph)


def value(name: str, shape: Sequence[int | str | None] | None, dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def model(nodes: Sequence[ir.Node], inputs: Sequence[ir.Value]) -> ir.Model:
    """Return a model of these nodes; the last one's output is the model's, called y."""
    y = nodes[-1].outputs[0]
    y.name = "y"
    constants = {v.name: v for node in nodes for v in node.inputs if v is not None and v.const_value is not None}
    graph = ir.Graph(
        inputs, [y], nodes=nodes, initializers=list(constants.values()), opset_imports={"": 17, "lsp": 1}, name="g"
    )
    return ir.Model(graph, ir_version=9)


def linear(
    x: ir.Value, weight: np.ndarray, *, block: tuple[int, int] = (16, 16), name: str = "layer", **attributes: Any
) -> tuple[ir.Node, BlockSparseLinear]:
    """Return a node of this weight, and its attributes; bias, scale and residual are taken out of `attributes`."""
    K, N = weight.shape
    bias = attributes.pop("bias", np.zeros(N, np.float32))
    scale = attributes.pop("scale", np.ones(N, np.float32))
    residual = attributes.pop("residual", None)
    blocks = pack(weight, None, block)
    operator = BlockSparseLinear(K, N, *block, blocks.col_ptr, blocks.k_idx, **attributes)
    constants = [constant(f"{name}.{what}", array) for what, array in (
        ("values", blocks.values), ("bias", bias), ("scale", scale)
    )]  # fmt: skip
    node = linear_node(operator, x, *constants, residual, name=name)
    node.outputs[0].name = f"{name}.y"
    return node, operator


@pytest.fixture(scope="module")
def session(native_library: Path) -> Callable[..., ort.InferenceSession]:
    def make(content: ir.Model | str, *, threads: int = 2, **entries: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(os.fspath(native_library))
        for key, entry in {"session.force_spinning_stop": "1", **entries}.items():
            options.add_session_config_entry(key, entry)
        if isinstance(content, ir.Model):
            content = ir.to_proto(content).SerializeToString()
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    return make


def assert_close(actual: np.ndarray, expected: np.ndarray, relative: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if expected.dtype == np.int8:  # a value halfway between two steps may go either way
        assert np.abs(actual.astype(int) - expected.astype(int)).max(initial=0) <= 1
    else:
        assert np.abs(actual - expected).max(initial=0) <= relative * max(np.abs(expected).max(initial=0), 1e-6)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    outer=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block=st.sampled_from([(16, 16), (32, 32), (16, 64), (5, 3)]),
    kind=st.sampled_from(["float32", "bfloat16", "int8", "int8 x"]),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "relu"]),
    with_residual=st.booleans(),
    quantized_y=st.booleans(),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_linear_computes_what_the_reference_does(
    session, outer, size, block, kind, activation, with_residual, quantized_y, density, seed
):
    random = np.random.default_rng(seed)
    (K, N), shape = size, outer
    weight = random.standard_normal((K, N)).astype(np.float32) * (random.random((K, N)) < density)
    attributes: dict[str, Any] = {"bias": random.standard_normal(N).astype(np.float32), "activation": activation}
    x = random.standard_normal((*shape, K)).astype(np.float32)
    if kind == "bfloat16":
        weight = weight.astype(ml_dtypes.bfloat16)
    elif kind.startswith("int8"):
        weight = np.rint(weight * 40).clip(-127, 127).astype(np.int8)
        attributes |= {"x_scale": 0.03, "scale": random.uniform(0.0005, 0.002, N).astype(np.float32)}
        if kind == "int8 x":
            x = np.rint(x * 30).clip(-128, 127).astype(np.int8)
        else:
            attributes["x_offset"] = 0.25
    if quantized_y:
        attributes |= {"out_type": INT8, "out_scale": 0.1, "out_offset": -0.5}
    feeds = {"x": x}
    inputs = [value("x", [*shape, K], ir.DataType.from_numpy(x.dtype))]
    if with_residual:
        feeds["residual"] = random.standard_normal((*shape, N)).astype(np.float32)
        inputs.append(value("residual", [*shape, N]))
        attributes["residual"] = inputs[1]
    node, operator = linear(inputs[0], weight, block=block, **attributes)
    arrays = [v.const_value.numpy() for v in node.inputs[1:4]]
    (actual,) = session(model([node], inputs)).run(None, feeds)
    expected = block_sparse_linear(operator, x, *arrays, feeds.get("residual"))
    assert_close(actual, expected, 1e-2 if kind == "bfloat16" else 1e-5)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 3),
    S=st.integers(1, 40),
    T=st.integers(1, 40),
    heads=st.integers(1, 4),
    D=st.integers(1, 40),
    packed=st.booleans(),
    bias=st.sampled_from([None, (False, False), (True, False), (False, True), (True, True)]),
    compute=st.sampled_from(["float32", "bfloat16"]),
    known_width=st.booleans(),
)
def test_attention_computes_what_the_reference_does(session, B, S, T, heads, D, packed, bias, compute, known_width):
    random = np.random.default_rng(S * T)
    operator, width = Attention(heads, D**-0.5, packed, compute), heads * D
    T = S if packed else T
    shapes = {"qkv": (B, S, 3 * width)} if packed else {"q": (B, S, width), "k": (B, T, width), "v": (B, T, width)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs = [value(name, ["B", None, shape[2] if known_width else "C"]) for name, shape in shapes.items()]
    if bias is not None:
        per_batch, per_head = bias
        feeds["bias"] = random.standard_normal((B if per_batch else 1, heads if per_head else 1, S, T)).astype(
            np.float32
        )
        inputs.append(value("bias", [None, heads if per_head else 1, None, None]))
    operands = inputs[: len(shapes)]
    node = attention_node(operator, operands, inputs[-1] if bias is not None else None, name="attention")
    (actual,) = session(model([node], inputs)).run(None, feeds)
    expected = attention(operator, *(feeds[name] for name in shapes), bias=feeds.get("bias"))
    assert_close(actual, expected, 2e-2 if compute == "bfloat16" else 2e-5)


def test_an_empty_batch_gives_an_empty_output(session):
    x = value("x", ["batch", 5, 24])
    first, _ = linear(x, np.ones((24, 48), np.float32))
    made = session(model([first, attention_node(Attention(2, 0.5, True), [first.outputs[0]], name="attention")], [x]))
    assert made.run(None, {"x": np.ones((0, 5, 24), np.float32)})[0].shape == (0, 5, 16)


def two_layers(x: ir.Value, *, typed: bool) -> ir.Model:
    """Return an int8 layer that writes int8 for another one, with or without types of inner values in the file."""
    random = np.random.default_rng(0)
    weights = [random.integers(-9, 9, shape).astype(np.int8) for shape in ((24, 40), (40, 8))]
    first, _ = linear(x, weights[0], name="fc1", x_scale=0.05, scale=np.full(40, 0.01, np.float32), activation="relu",
                      out_type=INT8, out_scale=0.02)  # fmt: skip
    second, _ = linear(first.outputs[0], weights[1], name="fc2", x_scale=0.02, scale=np.full(8, 0.01, np.float32))
    if not typed:
        first.outputs[0].type = first.outputs[0].shape = None
    return model([first, second], [x])


@pytest.mark.parametrize("typed", [True, False])
def test_types_and_shapes_are_inferred(session, typed):
    made = session(two_layers(value("x", ["batch", 7, 24]), typed=typed))
    assert [(y.type, y.shape) for y in made.get_outputs()] == [("tensor(float)", ["batch", 7, 8])]
    assert made.run(None, {"x": np.ones((2, 7, 24), np.float32)})[0].shape == (2, 7, 8)


def test_unknown_sizes_without_a_name_stay_unknown_and_distinct(session):
    node, _ = linear(value("x", [None, None, 24]), np.ones((24, 8), np.float32))
    x, y = node.inputs[0], node.outputs[0]
    y.shape = None
    (shape,) = (y.shape for y in session(model([node], [x])).get_outputs())
    assert shape[2] == 8
    assert isinstance(shape[0], str) and isinstance(shape[1], str) and shape[0] != shape[1]


def test_an_unknown_rank_is_left_to_the_run(session):
    x = value("x", None)
    made = session(model([linear(x, np.ones((24, 8), np.float32))[0]], [x]))
    assert made.run(None, {"x": np.ones((3, 24), np.float32)})[0].shape == (3, 8)


def attribute(name: str, new: ir.Attr | None) -> Callable[[ir.Node], None]:
    def change(node: ir.Node) -> None:
        if new is None:
            del node.attributes[name]
        else:
            node.attributes[name] = new

    return change


def written_as(dtype: ir.DataType) -> Callable[[ir.Node], None]:
    def change(node: ir.Node) -> None:
        node.attributes["out_type"] = ir.AttrInt64("out_type", int(dtype))
        node.outputs[0].type = ir.TensorType(dtype)

    return change


def constant_input(index: int, array: np.ndarray) -> Callable[[ir.Node], None]:
    return lambda node: node.replace_input_with(index, constant(f"other.{index}", array))


@pytest.mark.parametrize(("change", "reason"), [
    (attribute("K", None), "attribute K is missing or no integer"),
    (attribute("K", ir.AttrFloat32("K", 24.0)), "attribute K is missing or no integer"),
    (attribute("K", ir.AttrInt64("K", 25)), "x is [2, 24], but its last size must be K = 25"),
    (attribute("K", ir.AttrInt64("K", -1)), "K"),
    (attribute("N", ir.AttrInt64("N", 9)), "bias is [8], not [N] = [9]"),
    (attribute("block_n", ir.AttrInt64("block_n", 8)), "[blocks, block_k, block_n]"),
    (attribute("col_ptr", ir.AttrInt64s("col_ptr", [0, 3])), "k_idx has 2 entries"),
    (attribute("col_ptr", None), "attribute col_ptr is missing or no list of integers"),
    (attribute("k_idx", ir.AttrInt64s("k_idx", [1, 0])), "k_idx[1] does not ascend"),
    (attribute("k_idx", ir.AttrInt64s("k_idx", [0, 1 << 40])), "k_idx[1] is 1099511627776"),
    (attribute("k_idx", ir.AttrString("k_idx", "01")), "attribute k_idx is missing or no list of integers"),
    (attribute("activation", ir.AttrString("activation", "silu")), 'activation "silu" is not one of none, gelu'),
    (attribute("layout", ir.AttrString("layout", "bsl16.v1")), "convert the model first: lsp-deploy lower"),
    (attribute("layout", ir.AttrString("layout", "csr")), 'layout "csr" is unknown here'),
    (attribute("x_scale", ir.AttrInt64("x_scale", 1)), "attribute x_scale is missing or no float"),
    (attribute("x_scale", ir.AttrFloat32("x_scale", 0.1)), "x_scale is 0.1, but only int8 has a scale"),
    (attribute("x_offset", ir.AttrFloat32("x_offset", float("nan"))), "x_offset"),
    (written_as(ir.DataType.FLOAT16), "out_type is 10; on a CPU y is float32 (1) or int8 (3)"),
    (written_as(INT8), "out_scale is 0, but int8 needs a scale"),
    (attribute("out_type", ir.AttrInt64("out_type", 3)), "does not match"),  # the model says that y is float
    (attribute("plugin_version", ir.AttrString("plugin_version", "2")), "plugin_version 2 is not known here"),
    (constant_input(1, np.ones((2, 16, 16), np.float16)), "float16 is for GPUs"),
    (constant_input(1, np.ones((3, 16, 16), np.float32)), "not 2 blocks of 16 x 16"),
    (constant_input(1, np.ones((2, 16, 16), np.int8)), "x_scale is 0, but int8 needs a scale"),
    (constant_input(2, np.ones(7, np.float32)), "bias is [7], not [N] = [8]"),
    (constant_input(3, np.ones((8, 1), np.float32)), "scale is [8, 1], not [N] = [8]"),
    (lambda node: node.replace_input_with(1, value("values", [2, 16, 16])), "input 1 (values) must be a constant"),
    (lambda node: node.replace_input_with(2, value("bias", [8])), "input 2 (bias) must be a constant"),
])  # fmt: skip
def test_a_malformed_linear_is_refused_by_name(session, change, reason):
    x = value("x", [2, 24])
    node, _ = linear(x, np.ones((24, 8), np.float32), name="blocks.3/fc1")
    change(node)
    inputs = [x, *(v for v in node.inputs[1:] if v is not None and v.const_value is None)]
    with pytest.raises(LOAD_ERRORS) as raised:
        session(model([node], inputs))
    (line,) = str(raised.value).strip().splitlines()
    assert "blocks.3/fc1" in line and reason in line


@pytest.mark.parametrize(("change", "reason"), [
    (attribute("num_heads", None), "attribute num_heads is missing or no integer"),
    (attribute("num_heads", ir.AttrInt64("num_heads", 0)), "num_heads is 0"),
    (attribute("num_heads", ir.AttrInt64("num_heads", 2**62)), "num_heads is 4611686018427387904"),
    (attribute("num_heads", ir.AttrInt64("num_heads", 5)), "the last size of its first input is 24, no multiple of 15"),
    (attribute("scale", ir.AttrInt64("scale", 1)), "attribute scale is missing or no float"),
    (attribute("scale", ir.AttrFloat32("scale", float("inf"))), "scale"),
    (attribute("compute", ir.AttrString("compute", "float16")), 'compute "float16" is neither float32 nor bfloat16'),
    (attribute("packed_qkv", ir.AttrInt64("packed_qkv", 2)), "packed_qkv is 2, not 0 or 1"),
    (attribute("packed_qkv", ir.AttrInt64("packed_qkv", 0)), "it has 1 inputs, not 3 or, with a bias, one more"),
])  # fmt: skip
def test_a_malformed_attention_is_refused_by_name(session, change, reason):
    qkv = value("qkv", [1, 5, 24])
    node = attention_node(Attention(2, 0.5, True), [qkv], name="blocks.3/attention")
    change(node)
    with pytest.raises(LOAD_ERRORS) as raised:
        session(model([node], [qkv]))
    (line,) = str(raised.value).strip().splitlines()
    assert "blocks.3/attention" in line and reason in line


def test_attention_in_float16_is_refused_by_name(session):
    qkv = value("qkv", [1, 5, 24], ir.DataType.FLOAT16)
    node = attention_node(Attention(2, 0.5, True), [qkv], name="blocks.3/attention")
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(LOAD_ERRORS, match=r'"blocks.3/attention": its inputs are float16'):
        session(model([node], [qkv]))


def test_shapes_that_disagree_are_errors_of_the_run(session):
    x, residual = value("x", ["rows", "K"]), value("residual", ["rows", 8])
    node, _ = linear(x, np.ones((24, 8), np.float32), residual=residual)
    made = session(model([node], [x, residual]))
    ones = {"x": np.ones((2, 24), np.float32), "residual": np.ones((2, 8), np.float32)}
    with pytest.raises(RUN_ERRORS, match=r"layer.*x is \[2, 25\], but its last size must be K = 24"):
        made.run(None, ones | {"x": np.ones((2, 25), np.float32)})
    with pytest.raises(RUN_ERRORS, match=r"layer.*residual is \[3, 8\], but y is \[2, 8\]"):
        made.run(None, ones | {"residual": np.ones((3, 8), np.float32)})
    np.testing.assert_array_equal(made.run(None, ones)[0], np.full((2, 8), 25, np.float32))


@pytest.mark.parametrize(("shapes", "reason"), [
    ([(1, 5, 10)] * 3, "head"),
    ([(1, 5, 8), (2, 5, 8), (2, 5, 8)], r"k is \[2, 5, 8\], but q is \[1, 5, 8\]"),
    ([(1, 5, 8), (1, 6, 8), (1, 5, 8)], r"v is \[1, 5, 8\], but k is \[1, 6, 8\]"),
])  # fmt: skip
def test_operands_of_attention_that_disagree_are_errors_of_the_run(session, shapes, reason):
    operands = [value(name, [f"B{name}", f"S{name}", f"C{name}"]) for name in "qkv"]
    made = session(model([attention_node(Attention(4, 0.5, False), operands, name="attention")], operands))
    with pytest.raises(RUN_ERRORS, match=reason):
        made.run(None, {name: np.ones(shape, np.float32) for name, shape in zip("qkv", shapes, strict=True)})


def test_a_bias_that_does_not_broadcast_is_an_error_of_the_run(session):
    qkv, bias = value("qkv", [1, 5, 24]), value("bias", [1, "H", 5, 5])
    made = session(model([attention_node(Attention(4, 0.5, True), [qkv], bias, name="attention")], [qkv, bias]))
    with pytest.raises(RUN_ERRORS, match=r"bias is \[1, 2, 5, 5\], which does not broadcast"):
        made.run(None, {"qkv": np.ones((1, 5, 24), np.float32), "bias": np.ones((1, 2, 5, 5), np.float32)})


def test_ort_format_keeps_the_operators(session, native_library, tmp_path):
    x = value("x", ["batch", 7, 24])
    first, _ = linear(x, np.random.default_rng(0).standard_normal((24, 48)).astype(np.float32))
    both = model([first, attention_node(Attention(2, 0.5, True), [first.outputs[0]], name="attention")], [x])
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 7, 24)).astype(np.float32)}
    (expected,) = session(both).run(None, feeds)
    path = tmp_path / "engine.ort"
    options = ort.SessionOptions()
    options.register_custom_ops_library(os.fspath(native_library))
    options.optimized_model_filepath = os.fspath(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(ir.to_proto(both).SerializeToString(), options, providers=["CPUExecutionProvider"])
    (actual,) = session(os.fspath(path), **{"session.load_model_format": "ORT"}).run(None, feeds)
    np.testing.assert_array_equal(actual, expected)


def test_many_threads_run_one_session(session):
    x = value("x", ["rows", 24])
    node, operator = linear(x, np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32))
    made, arrays = session(model([node], [x])), [v.const_value.numpy() for v in node.inputs[1:4]]

    def run(rows: int) -> None:
        data = np.random.default_rng(rows).standard_normal((rows, 24)).astype(np.float32)
        for _ in range(5):
            assert_close(made.run(None, {"x": data})[0], block_sparse_linear(operator, data, *arrays), 1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(1, 200, 13)))


def test_sessions_of_any_number_of_threads_agree(session):
    random, x = np.random.default_rng(0), value("x", [2, 50, 64])
    qkv, _ = linear(x, random.standard_normal((64, 96)).astype(np.float32), activation="gelu")
    made = model([qkv, attention_node(Attention(2, 0.25, True), [qkv.outputs[0]], name="attention")], [x])
    feeds = {"x": random.standard_normal((2, 50, 64)).astype(np.float32)}
    outputs = [session(made, threads=n, **entry).run(None, feeds)[0] for n, entry in (
        (1, {}), (2, {}), (3, {"lsp.threads": "3"}), (2, {"lsp.threads": "many"})
    )]  # fmt: skip
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_lsp_isa_caps_the_instruction_set(session, kernels, monkeypatch):
    x = value("x", [3, 24])
    node, operator = linear(x, np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32))
    made, feeds = model([node], [x]), {"x": np.ones((3, 24), np.float32)}
    expected = block_sparse_linear(operator, feeds["x"], *(v.const_value.numpy() for v in node.inputs[1:4]))
    for name in kernels.lsp_isas().decode().split():
        monkeypatch.setenv("LSP_ISA", name)
        assert_close(session(made).run(None, feeds)[0], expected, 1e-5)
    monkeypatch.setenv("LSP_ISA", "mmx")
    with pytest.raises(LOAD_ERRORS, match=r'"layer": .*mmx'):
        session(made)


def test_the_definition_refuses_what_the_session_does(session):
    # What BlockSparseLinear of Python takes, a session takes as well: the smallest layer, and one without any block.
    for weight in (np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)):
        x = value("x", [1, 1])
        node, operator = linear(x, weight, block=(1, 1))
        assert replace(operator).blocks == int(weight[0, 0])
        assert session(model([node], [x])).run(None, {"x": np.ones((1, 1), np.float32)})[0] == weight[0, 0]

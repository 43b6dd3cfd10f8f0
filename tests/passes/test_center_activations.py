"""Centered activations: the same outputs up to int8 rounding, in every way that a bias can be there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.passes.center_activations import CenterActivationsPass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.plan import LayerPlan, Plan, PrecisionDecision, SparsityDecision

K, N = 16, 5
OFFSET = 1.25


def make_model(kind: str, layers: int = 1) -> ir.Model:
    generator = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([3, K]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, outputs, initializers = [], [], []
    for index in range(layers):
        weight = generator.standard_normal((N, K) if kind.startswith("gemm") else (K, N)).astype(np.float32)
        w = ir.Value(name=f"w{index}", const_value=ir.tensor(weight, name=f"w{index}"))
        b = ir.Value(
            name=f"b{index}", const_value=ir.tensor(generator.standard_normal(N).astype(np.float32), name=f"b{index}")
        )
        initializers.append(w)
        if kind.startswith("gemm"):
            attributes = {"transB": 1, "alpha": 0.5, "beta": 2.0}
            inputs = [x, w, b] if kind == "gemm with bias" else [x, w]
            nodes.append(ir.node("Gemm", inputs, attributes, name=f"layer{index}"))
        else:
            nodes.append(ir.node("MatMul", [x, w], name=f"layer{index}"))
        nodes[-1].outputs[0].name = f"y{index}"
        if kind == "matmul with bias":
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], b], name=f"add{index}"))
            nodes[-1].outputs[0].name = f"z{index}"
        if kind.endswith("with bias"):
            initializers.append(b)
        outputs.append(nodes[-1].outputs[0])
        outputs[-1].shape, outputs[-1].type = ir.Shape([3, N]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=9)


def make_conv_model(*, bias: bool) -> ir.Model:
    """A 1 × 1 convolution from K to N channels, as ConvNeXt's MLP has it."""
    generator = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([3, K, 2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    arrays = {"w": generator.standard_normal((N, K, 1, 1)), "b": generator.standard_normal(N)}
    values = [
        ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name))
        for name, array in arrays.items()
        if bias or name == "w"
    ]
    node = ir.node("Conv", [x, *values], {"kernel_shape": [1, 1]}, name="layer0")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([3, N, 2, 4]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[node], initializers=values, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=9)


def make_plan(model: ir.Model, layers: int = 1) -> Plan:
    plan = Plan(
        tool_version="0",
        model_sha256="",
        target="a100",
        compute_type="fp32",
        opset=17,
        layers=[
            LayerPlan(
                name=f"layer{index}",
                role="fc2",
                K=K,
                N=N,
                M=3,
                sparsity=SparsityDecision(asked="none", reason=""),
                precision=PrecisionDecision(
                    asked="int8", dtype="int8", activation_scale=1.5 / 127, activation_offset=OFFSET, reason=""
                ),
            )
            for index in range(layers)
        ],
    )
    for layer in plan.layers:
        node = next(node for node in model.graph if node.name == layer.name)
        weight = node.inputs[1].const_value.numpy()
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
        axis = 0 if node.op_type == "MatMul" else tuple(range(1, weight.ndim))
        plan.weight_scales[layer.name] = (np.abs(weight * alpha).max(axis=axis) / 127).astype(np.float32)
    return plan


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        return list(engine.run({"x": x}).values())


@pytest.mark.parametrize("kind", ["matmul", "matmul with bias", "gemm", "gemm with bias"])
def test_outputs_stay_within_int8_rounding(kind: str) -> None:
    model = make_model(kind)
    x = (OFFSET + np.random.default_rng(1).uniform(-1.4, 1.4, (3, K))).astype(np.float32)
    expected = run(model, x)[0]
    plan = make_plan(model)
    CenterActivationsPass(plan)(model)
    InsertQdqPass(plan)(model)
    assert [node.op_type for node in model.graph].count("Sub") == 1
    np.testing.assert_allclose(run(model, x)[0], expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_centered_over_its_channels(bias: bool) -> None:
    model = make_conv_model(bias=bias)
    x = (OFFSET + np.random.default_rng(1).uniform(-1.4, 1.4, (3, K, 2, 4))).astype(np.float32)
    expected = run(model, x)[0]
    plan = make_plan(model)
    CenterActivationsPass(plan)(model)
    InsertQdqPass(plan)(model)
    np.testing.assert_allclose(run(model, x)[0], expected, atol=0.05 * np.abs(expected).max())


def test_the_shift_itself_costs_nothing() -> None:
    """With an input on the grid and a weight that int8 holds, the result is exact up to float rounding."""
    model = make_model("matmul with bias")
    plan = make_plan(model)
    scale = plan.weight_scales["layer0"]
    value = model.graph.initializers["w0"]
    held = (np.rint(value.const_value.numpy() / scale) * scale).astype(np.float32)
    value.const_value = ir.tensor(held, name="w0")
    x = (OFFSET + np.arange(3 * K).reshape(3, K) * (1.5 / 127)).astype(np.float32)
    expected = run(model, x)[0]
    CenterActivationsPass(plan)(model)
    InsertQdqPass(plan)(model)
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_layers_that_read_one_tensor_share_one_subtraction() -> None:
    model = make_model("matmul with bias", layers=2)
    plan = make_plan(model, layers=2)
    CenterActivationsPass(plan)(model)
    assert [node.op_type for node in model.graph].count("Sub") == 1


def test_without_offsets_nothing_changes() -> None:
    model = make_model("matmul with bias")
    plan = make_plan(model)
    plan.layers[0].precision.activation_offset = 0.0
    assert not CenterActivationsPass(plan)(model).modified


def test_two_offsets_for_one_tensor_are_refused() -> None:
    model = make_model("matmul with bias", layers=2)
    plan = make_plan(model, layers=2)
    plan.layers[1].precision.activation_offset = 0.5
    with pytest.raises(UserError, match="two offsets"):
        CenterActivationsPass(plan)(model)

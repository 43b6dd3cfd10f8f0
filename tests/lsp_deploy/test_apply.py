"""Plans carried out for CPUs: each layer in the form that its plan says, and the whole still the same function."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pass_models import layer
from pass_models import plan as plan_of

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model, save_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plan import AttentionDecision, Plan
from lsp_deploy.plugins.block_sparse.operator import from_node
from lsp_deploy.steps.apply import apply_decisions, apply_plan

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"


@pytest.fixture(scope="module")
def canonical() -> ir.Model:
    return canonicalize(load_model(ASSETS / "digits_vit.onnx"), max_opset=23)


@pytest.fixture(scope="module")
def feeds(canonical: ir.Model) -> dict[str, np.ndarray]:
    (name,) = (str(value.name) for value in canonical.graph.inputs)
    with np.load(ASSETS / "evaluation.npz") as images:
        return {name: images[name][:16].astype(np.float32)}


@pytest.fixture(scope="module")
def int8(canonical: ir.Model, feeds: dict[str, np.ndarray]) -> Plan:
    """A plan that makes every MatMul int8."""
    layers = [one for one in linear_layers(canonical) if one.node.op_type != "Conv"]
    names = [str(one.x.name) for one in layers]
    with OnnxRuntimeEngine.from_model(canonical, threads=1, extra_outputs=names) as engine:
        values = engine.run(feeds)
    plan = plan_of(
        *(layer(one.name, one.K, one.N, "int8", float(np.abs(values[str(one.x.name)]).max() / 127)) for one in layers),
        weight_scales={one.name: np.abs(one.weight()).max(axis=0) / 127 for one in layers},
    )
    for decided, one in zip(plan.layers, layers, strict=True):
        decided.role = one.role
    return plan


def applied(canonical: ir.Model, plan: Plan) -> ir.Model:
    shape = [2, *list(canonical.graph.inputs[0].shape or ())[1:]]
    return apply_plan(canonical, plan, {}, {str(canonical.graph.inputs[0].name): shape}, kind="cpu").model


def logits(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        return next(iter(engine.run(feeds).values()))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def noise(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(actual - expected).mean() / np.square(expected).mean())


def test_int8_layers_left_to_the_engine_take_its_int8_form(canonical, feeds, int8, tmp_path):
    model = applied(canonical, int8)
    assert operators(model)["Gemm"] == len(int8.layers)
    expected = logits(apply_decisions(canonical, int8), feeds)
    # Biases are rounded here and not there, values near the middle of two integers then go another way.
    limit = noise(expected, logits(canonical, feeds)) / 2
    assert noise(logits(model, feeds), expected) < limit
    # A session as any user makes it, from the file.
    save_model(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert operators(ir.load(tmp_path / "optimized.onnx"))["QGemm"] == len(int8.layers)
    assert noise(session.run(None, feeds)[0], expected) < limit


def test_every_kernel_in_one_plan(canonical, feeds, int8):
    plan = int8.branch()
    for decided in plan.layers:
        decided.execution.kernel = {"fc1": "block_sparse", "fc2": "block_sparse", "qkv": "qgemm"}.get(
            decided.role, "engine"
        )
        if decided.role == "attn_proj":
            decided.precision.dtype = "fp32"
    model = applied(canonical, plan)
    nodes = {str(node.name): node for node in model.graph}
    for decided in plan.layers:
        expected = {"block_sparse": "BlockSparseLinear", "qgemm": "Gemm"}
        int8_form = "Gemm" if decided.precision.dtype == "int8" else "MatMul"
        assert nodes[decided.name].op_type == expected.get(decided.execution.kernel, int8_form)
    written = {one.role: from_node(nodes[one.name]).out_type for one in plan.layers if one.role in ("fc1", "fc2")}
    assert written == {"fc1": ir.DataType.INT8, "fc2": ir.DataType.FLOAT}
    expected = logits(apply_decisions(canonical, plan), feeds)
    assert noise(logits(model, feeds), expected) < noise(expected, logits(canonical, feeds)) / 2


def test_bf16_is_measured_as_it_runs(canonical, feeds, int8):
    plan = int8.branch()
    for decided in plan.layers:
        decided.precision.dtype = "bf16"
        decided.execution.kernel = "block_sparse"
    measured, written = apply_decisions(canonical, plan), applied(canonical, plan)
    for model in (measured, written):
        assert operators(model)["BlockSparseLinear"] == len(plan.layers)
    dense, rounded = logits(canonical, feeds), logits(measured, feeds)
    assert 1e-8 < noise(rounded, dense) < 1e-3
    assert noise(logits(written, feeds), rounded) < 1e-8


def test_zeros_that_leave_blocks_out(canonical, feeds, int8):
    plan = int8.branch()
    plan.block_shape = (16, 16)
    rng = np.random.default_rng(0)
    for decided in plan.layers:
        decided.execution.kernel, decided.precision.dtype = "block_sparse", "fp32"
        decided.sparsity.pattern = "block"
        grid = rng.random((-(-decided.K // 16), -(-decided.N // 16))) < 0.5
        plan.masks[decided.name] = np.repeat(np.repeat(grid, 16, 0), 16, 1)[: decided.K, : decided.N]
    model = applied(canonical, plan)
    expected = logits(apply_decisions(canonical, plan), feeds)
    np.testing.assert_allclose(logits(model, feeds), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    LowerOperatorsPass("gather")(model)
    np.testing.assert_allclose(logits(model, feeds), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_layer_as_gathers_beside_operators(canonical, feeds, int8):
    plan = int8.branch()
    plan.block_shape = (16, 16)
    gathers = [one.name for one in plan.layers if one.role == "fc1"]
    for decided in plan.layers:
        decided.execution.kernel, decided.precision.dtype = "block_sparse", "fp32"
        if decided.name in gathers:
            decided.execution.kernel = "gather"
            decided.sparsity.pattern = "block"
            plan.masks[decided.name] = np.repeat(np.arange(decided.K) // 16 % 2 == 0, decided.N).reshape(decided.K, -1)
    model = applied(canonical, plan)
    names = {str(node.name) for node in model.graph}
    assert operators(model)["BlockSparseLinear"] == len(plan.layers) - len(gathers)
    assert operators(model)["Gather"] == operators(canonical)["Gather"] + len(gathers)
    assert {f"{name}/panel_0/MatMul" for name in gathers} <= names
    expected = logits(apply_decisions(canonical, plan), feeds)
    np.testing.assert_allclose(logits(model, feeds), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_attention_as_one_operator(canonical, feeds, int8, compute):
    plan = int8.branch()
    plan.attention = AttentionDecision(kernel="lsp", compute=compute)
    for decided in plan.layers:
        decided.precision.dtype = "fp32"
    measured, written = apply_decisions(canonical, plan), applied(canonical, plan)
    assert operators(written)["Attention"] == 4
    assert operators(written)["Softmax"] == 0
    # What computes the same in float32 need not be there to be measured.
    assert operators(measured)["Attention"] == (4 if compute == "bf16" else 0)
    dense, expected = logits(canonical, feeds), logits(measured, feeds)
    assert noise(expected, dense) < 1e-3
    assert noise(logits(written, feeds), expected) < 1e-8


def test_a_type_that_the_engine_does_not_compute_in_is_refused(canonical, int8):
    plan = int8.branch()
    plan.layers[0].precision.dtype = "bf16"
    with pytest.raises(UserError, match="bf16, which its engine does not compute in"):
        applied(canonical, plan)

"""Plans carried out for GPUs: layers that lost blocks become the operator as TensorRT's plugin reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gpu_plans import applied, block_plan, inside
from graphs import random_feeds

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear, constant_inputs, from_node
from lsp_deploy.plugins.operators import operator_nodes
from lsp_deploy.steps.apply import apply_decisions

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@pytest.fixture(scope="module")
def canonical() -> ir.Model:
    return canonicalize(load_model(ASSETS / "digits_vit.onnx"), max_opset=23)


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with OnnxRuntimeEngine.from_model(model, threads=1, float32_twin=True) as engine:
        return next(iter(engine.run(feeds).values()))


def noise(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(actual - expected).mean() / np.square(expected).mean())


def operators(model: ir.Model) -> list[tuple[ir.Node, BlockSparseLinear]]:
    return [(node, from_node(node)) for node in operator_nodes(model)]


@pytest.mark.parametrize("compute_type", ["fp16", "bf16"])
def test_a_16_bit_model_has_operators_of_its_type(canonical: ir.Model, compute_type: str) -> None:
    plan = block_plan(canonical, compute_type, compute_type=compute_type, block=(16, 16))
    model = applied(canonical, plan)
    found = operators(model)
    assert {str(node.name) for node, _ in found} == {one.name for one in inside(canonical)}
    for node, operator in found:
        values, bias, scale = constant_inputs(node)
        assert operator.layout == "bsl16.v1" and operator.out_type == TYPES[compute_type]
        assert values.dtype == TYPES[compute_type].numpy() and bias.dtype == scale.dtype == np.float32
        assert node.inputs[0] is not None and node.inputs[0].dtype == TYPES[compute_type]
    activations = {operator.activation for _, operator in found}
    assert activations == {"none", "gelu"} and any(len(node.inputs) == 5 for node, _ in found)
    feeds = random_feeds(canonical)
    assert noise(outputs(model, feeds), outputs(apply_decisions(canonical, plan), feeds)) < 1e-4


def test_int8_operators_read_int8(canonical: ir.Model) -> None:
    plan = block_plan(canonical, "int8", block=(16, 16))
    model = applied(canonical, plan)
    found = operators(model)
    assert len(found) == len(plan.layers)
    for node, operator in found:
        assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT8
        assert operator.out_type in (ir.DataType.FLOAT16, ir.DataType.INT8)
        assert constant_inputs(node)[0].dtype == np.int8
    # GELU's output is read by fc2 alone, which takes it as fc1 writes it; all others are quantized by a node.
    chained = [operator for _, operator in found if operator.out_type == ir.DataType.INT8]
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(chained) == sum(one.role == "fc1" for one in inside(canonical))
    assert len(chained) + len(quantizers) == len(found)
    feeds = random_feeds(canonical)
    exact = outputs(canonical, feeds)
    decided = outputs(apply_decisions(canonical, plan), feeds)
    assert noise(outputs(model, feeds), decided) < 0.1 * noise(decided, exact)


def test_layers_left_to_the_engine_stay_as_they_were(canonical: ir.Model) -> None:
    plan = block_plan(canonical, "fp16", block=(16, 16))
    for decided in plan.layers[1:]:
        decided.execution.kernel = "engine"
    model = applied(canonical, plan)
    assert [str(node.name) for node, _ in operators(model)] == [plan.layers[0].name]

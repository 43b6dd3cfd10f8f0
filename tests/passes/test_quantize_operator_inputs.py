"""QuantizeLinear in front of int8 operators."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from block_sparse_cases import case
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.passes.quantize_operator_inputs import QuantizeOperatorInputsPass


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        return list(engine.run(feeds).values())


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from((0.0, 0.25)),
    st.booleans(),
    st.integers(0, 1 << 30),
)
@settings(max_examples=25)
def test_the_same_is_computed(k: int, n: int, offset: float, residual: bool, seed: int) -> None:
    one = case("int8", K=k, N=n, x_offset=offset, residual=residual, seed=seed)
    model = one.model()
    expected = outputs(model, one.feeds())
    assert QuantizeOperatorInputsPass()(model).modified
    subtract = ["Sub"] if offset else []
    assert op_types(model) == [*subtract, "QuantizeLinear", "BlockSparseLinear"]
    x = model.graph.node("layer").inputs[0]
    assert x is not None and x.dtype == ir.DataType.INT8
    # Scales are powers of two: dividing and multiplying by the reciprocal are the same.
    for actual, wanted in zip(outputs(model, one.feeds()), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert not QuantizeOperatorInputsPass()(model).modified


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_of_floats_are_left_alone(dtype: str) -> None:
    model = case(dtype).model()
    assert not QuantizeOperatorInputsPass()(model).modified
    assert op_types(model) == ["BlockSparseLinear"]


def test_operators_that_quantize_alike_share_a_node() -> None:
    model = case("int8", K=24, N=24).model()
    first = model.graph.node("layer")
    attributes = list(first.attributes.values())
    second = ir.Node("lsp", "BlockSparseLinear", first.inputs, attributes, name="second", version=1)
    second.outputs[0].name, second.outputs[0].type = "z", first.outputs[0].type
    second.outputs[0].shape = first.outputs[0].shape
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    QuantizeOperatorInputsPass()(model)
    assert op_types(model).count("QuantizeLinear") == 1
    assert first.inputs[0] is second.inputs[0]


def test_the_scale_has_the_type_of_x() -> None:
    model = case("int8").model()
    x = model.graph.inputs[0]
    x.type = ir.TensorType(ir.DataType.BFLOAT16)
    QuantizeOperatorInputsPass()(model)
    scale = next(node for node in model.graph if node.op_type == "QuantizeLinear").inputs[1]
    assert scale is not None and scale.const_value is not None
    assert scale.const_value.numpy().dtype == ml_dtypes.bfloat16


def test_a_scale_that_x_cannot_hold_is_refused() -> None:
    model = case("int8").model()
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    model.graph.node("layer").attributes["x_scale"] = ir.AttrFloat32("x_scale", 0.1)
    with pytest.raises(UserError, match=r"layer has an x_scale of 0\.1, which its FLOAT16 input holds as 0\.0999756"):
        QuantizeOperatorInputsPass()(model)

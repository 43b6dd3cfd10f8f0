"""Our linear operators in standard ones: what is left, and that it computes what the operators define."""

import numpy as np
import onnx_ir as ir
import pytest
from block_sparse_cases import BSL16_SHAPES, case, cpu_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_models import array_of, node_of, op_types, run

from lsp_deploy.errors import UserError
from lsp_deploy.passes.bsl16_blocks import Bsl16BlocksPass
from lsp_deploy.passes.canonical_blocks import CanonicalBlocksPass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plugins.attention.operator import Attention, to_node
from lsp_deploy.plugins.attention.reference import attention
from lsp_deploy.plugins.block_sparse.operator import from_node

FORMS = ["matmul", "gather"]


def assert_lowered(one, form, *, opset=20, optimize=False, dynamic=True):
    """The model in standard operators is valid, and gives what the reference gives."""
    model = one.model(opset=opset, dynamic=dynamic)
    assert LowerOperatorsPass(form)(model).modified
    assert "lsp" not in model.opset_imports
    assert not any(node.domain for node in model.graph)
    expected = one.expected()
    y = run(model, optimize, **one.feeds())["y"]
    assert y.shape == expected.shape and y.dtype == expected.dtype
    if expected.dtype == np.int8:
        # A sum that ends half way between two steps may be rounded to either.
        assert np.abs(y.astype(int) - expected.astype(int)).max() <= 1
        assert np.mean(y != expected) <= 0.01 + 1 / y.size
    else:
        scale = np.abs(expected).max() + 1e-6
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * scale)
    return model


@settings(max_examples=60)
@given(one=cpu_cases(), form=st.sampled_from(FORMS), opset=st.sampled_from([13, 17, 20, 21]))
def test_outputs(one, form, opset):
    assert_lowered(one, form, opset=opset)


@settings(max_examples=30)
@given(one=cpu_cases(dtypes=("bfloat16", "int8"), blocks=st.sampled_from(BSL16_SHAPES)), form=st.sampled_from(FORMS))
def test_outputs_from_bsl16(one, form):
    assert_lowered(one.in_layout("bsl16.v1"), form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_gather_skips_zero_blocks(dtype):
    one = case(dtype, K=768, N=768, block=(32, 64), zeros=0.85, activation="gelu", residual=True, outer=(2, 5))
    for optimize in (False, True):
        model = assert_lowered(one, "gather", optimize=optimize)
    types = op_types(model)
    assert types.count("MatMul") > 1 and types.count("Gather") > 1 and types.count("Concat") == 1
    weights = [node.inputs[1] for node in model.graph if node.op_type == "MatMul"]
    if dtype == "int8":
        weights = [weight.producer().inputs[0] for weight in weights]
    assert sum(weight.const_value.size for weight in weights) < 0.5 * 768 * 768


def test_gather_of_ragged_sizes_and_empty_columns():
    one = case(K=1000, N=1050, block=(64, 64), zeros=0.9, outer=(4,))
    assert (np.diff(one.operator.col_ptr) == 0).any()
    model = assert_lowered(one, "gather")
    assert "Gather" in op_types(model)


def test_neighbours_that_need_the_same_rows_share_a_panel():
    survives = np.zeros((16, 16), bool)
    survives[[0, 1, 9, 15], :8] = True
    survives[[2, 7], 8:] = True
    one = case(K=512, N=512, block=(32, 32), survives=survives, outer=(3,))
    model = assert_lowered(one, "gather")
    assert op_types(model) == ["Reshape", *["Gather", "Reshape", "MatMul"] * 2, "Concat", "Add"]
    assert array_of(model, "layer/panel_0/weight").shape == (128, 256)
    assert array_of(model, "layer/panel_1/weight").shape == (64, 256)


def test_rows_that_no_column_needs_are_left_out_of_one_panel():
    survives = np.zeros((16, 4), bool)
    survives[::4] = True
    model = assert_lowered(case(K=512, N=128, block=(32, 32), survives=survives), "gather")
    assert op_types(model) == ["Reshape", "Gather", "Reshape", "MatMul", "Add"]
    assert array_of(model, "layer/panel_0/weight").shape == (128, 128)


def test_gather_of_a_dense_weight_is_one_matmul():
    model = assert_lowered(case(K=64, N=64, zeros=0.1), "gather")
    assert op_types(model) == ["MatMul", "Add"]


def test_matmul_structure():
    one = case(activation="gelu", residual=True)
    model = assert_lowered(one, "matmul")
    assert op_types(model) == ["MatMul", "Add", "Gelu", "Add"]
    assert node_of(model, "layer").op_type == "MatMul"
    np.testing.assert_array_equal(array_of(model, "layer/weight"), one.weight)
    assert set(model.graph.initializers) == {"layer/weight", "layer/bias"}


def test_gelu_is_written_out_before_opset_20():
    types = op_types(assert_lowered(case(activation="gelu"), "matmul", opset=17))
    assert "Erf" in types and "Gelu" not in types


def test_int8_structure():
    one = case("int8", x_offset=0.5, out_type="int8")
    model = assert_lowered(one, "matmul")
    assert op_types(model) == [
        *("Sub", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add", "QuantizeLinear")
    ]
    np.testing.assert_array_equal(array_of(model, "layer/weight_q"), one.weight)
    np.testing.assert_array_equal(array_of(model, "layer/weight_scale"), one.scale / np.float32(one.operator.x_scale))


def test_int8_x_is_not_quantized_again():
    model = assert_lowered(case("int8", x_type="int8", bias=False), "matmul")
    assert op_types(model) == ["DequantizeLinear", "DequantizeLinear", "MatMul"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "x_type"), [("float16", "float16"), ("int8", "float16")])
def test_half_precision_is_computed_in_half_precision(form, dtype, x_type):
    one = case(dtype, x_type=x_type, out_type="float16", residual=True, K=64, N=48)
    model = one.model()
    LowerOperatorsPass(form)(model)
    product = node_of(model, "layer")
    assert product.inputs[0].dtype == product.outputs[0].dtype == ir.DataType.FLOAT16
    y = run(model, **one.feeds())["y"]
    np.testing.assert_allclose(y.astype(np.float32), one.expected().astype(np.float32), rtol=0, atol=0.02)


def test_half_precision_with_old_scales_is_computed_in_float32():
    one = case("int8", x_type="float16", out_type="float16", outer=(4,))
    model = one.model(opset=17)
    LowerOperatorsPass()(model)
    assert node_of(model, "layer").outputs[0].dtype == ir.DataType.FLOAT
    np.testing.assert_allclose(run(model, **one.feeds())["y"], one.expected(), rtol=2e-3, atol=2e-3)


def test_bfloat16_of_a_gpu_model_stays_bfloat16():
    one = case("bfloat16", x_type="bfloat16", out_type="bfloat16")
    model = one.model()
    LowerOperatorsPass()(model)
    assert op_types(model) == ["MatMul", "Add"]
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16


def test_inner_nodes_and_shared_values():
    """Two layers that share their blocks, one behind the other."""
    first = case(K=32, N=32, outer=(2, 3), activation="relu")
    model = first.model()
    (node,) = model.graph
    second = ir.Node(node.domain, node.op_type, [node.outputs[0], *node.inputs[1:]], node.attributes.values())
    second.name, second.outputs[0].name, node.outputs[0].name = "second", "y", "h"
    second.outputs[0].type, second.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    model.graph.append(second)
    model.graph.outputs[0] = second.outputs[0]
    lowering = LowerOperatorsPass()
    lowering(model)
    assert lowering.lowered == {"BlockSparseLinear": 2}
    hidden = np.maximum(first.x @ first.weight + first.bias, 0)
    expected = np.maximum(hidden @ first.weight + first.bias, 0)
    np.testing.assert_allclose(run(model, x=first.x)["y"], expected, rtol=1e-5, atol=1e-5)


def test_attention_and_linear_layers_together():
    """qkv is a block-sparse layer, and attention reads what it gives."""
    one = case(K=32, N=96, outer=(2, 5), zeros=0.3)
    model = one.model()
    (qkv,) = model.graph
    operator = Attention(num_heads=2, scale=0.25, packed_qkv=True)
    node = to_node(operator, [qkv.outputs[0]], name="attention")
    qkv.outputs[0].name, node.outputs[0].name = "qkv", "y"
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    lowering = LowerOperatorsPass()
    lowering(model)
    assert lowering.lowered == {"BlockSparseLinear": 1, "Attention": 1}
    assert all(value.dtype is not None and value.shape is not None for one in model.graph for value in one.outputs)
    expected = attention(operator, one.expected())
    np.testing.assert_allclose(run(model, x=one.x)["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_model_of_standard_operators_stays():
    model = case().model()
    LowerOperatorsPass()(model)
    assert not LowerOperatorsPass()(model).modified


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("block", BSL16_SHAPES)
def test_layouts_there_and_back(dtype, block):
    one = case(dtype, K=100, N=77, block=block, x_type="float16" if dtype == "float16" else "float32")
    model = one.model()
    assert Bsl16BlocksPass()(model).modified and not Bsl16BlocksPass()(model).modified
    (node,) = model.graph
    assert from_node(node).layout == "bsl16.v1"
    assert CanonicalBlocksPass()(model).modified and not CanonicalBlocksPass()(model).modified
    assert from_node(node) == one.operator
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), one.values)
    assert len(model.graph.initializers) == 3


def test_bsl16_refuses_float32():
    with pytest.raises(UserError, match=r"layer cannot be stored for TensorRT: bsl16.v1 holds float16"):
        Bsl16BlocksPass()(case().model())


def test_a_later_operator_is_refused():
    model = case().model()
    model.graph[0].op_type = "BlockSparseConv"
    with pytest.raises(UserError, match="layer is lsp::BlockSparseConv of version 1, which this version"):
        LowerOperatorsPass()(model)


def test_only_selected_operators():
    model = case(K=64, N=64).model(dynamic=False)
    (node,) = model.graph
    y = node.outputs[0]
    again = ir.Node("lsp", "BlockSparseLinear", [y, *node.inputs[1:]], node.attributes.values(), name="second")
    model.graph.append(again)
    again.outputs[0].name = "z"
    model.graph.outputs[0] = again.outputs[0]
    rewrite = LowerOperatorsPass("gather", lambda name: name == "second")
    assert rewrite(model).modified and not rewrite(model).modified
    assert [node.op_type for node in model.graph if node.domain] == ["BlockSparseLinear"]
    assert "lsp" in model.opset_imports
    assert LowerOperatorsPass()(model).modified
    assert "lsp" not in model.opset_imports


def test_unknown_rank_is_refused_by_gather_alone():
    one = case(K=768, N=768, block=(32, 64), zeros=0.9)
    model = one.model()
    model.graph.inputs[0].shape = None
    with pytest.raises(UserError, match="layer: type or rank of its input x is not known"):
        LowerOperatorsPass("gather")(model.clone())
    assert LowerOperatorsPass("matmul")(model).modified
    assert op_types(model) == ["MatMul", "Add"]

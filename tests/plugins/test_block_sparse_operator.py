"""The operator as a node: written, read, refused where it is not valid, and its output described."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from block_sparse_cases import BSL16_SHAPES, case, cpu_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.errors import UserError
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear, constant_inputs, from_node
from lsp_deploy.plugins.operators import operator_nodes

INT, INTS, FLOAT = ir.AttrInt64, ir.AttrInt64s, ir.AttrFloat32


def through_a_file(model):
    return ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))


@settings(max_examples=60)
@given(one=cpu_cases(), dynamic=st.booleans())
def test_a_file_gives_back_what_was_written(one, dynamic):
    model = through_a_file(one.model(dynamic=dynamic))
    (node,) = operator_nodes(model)
    assert from_node(node) == one.operator
    for found, written in zip(constant_inputs(node), (one.values, one.bias, one.scale), strict=True):
        np.testing.assert_array_equal(found, written)
        assert found.dtype == written.dtype


@settings(max_examples=20)
@given(one=cpu_cases(dtypes=("bfloat16", "int8"), blocks=st.sampled_from(BSL16_SHAPES)))
def test_the_other_layout_too(one):
    one = one.in_layout("bsl16.v1")
    (node,) = operator_nodes(through_a_file(one.model()))
    assert from_node(node) == one.operator


def test_attributes_of_a_node():
    (node,) = case("int8", zeros=1.0, activation="gelu", residual=True).model().graph
    assert "k_idx" not in node.attributes  # an empty list of ints does not survive everywhere
    assert node.attributes["plugin_version"].value == "1" and node.attributes["plugin_namespace"].value == "lsp"
    assert node.attributes["col_ptr"].value == (0, 0, 0)
    assert [value.name for value in node.inputs] == ["x", "values", "bias", "scale", "residual"]


def test_scales_are_those_of_a_file():
    operator = replace(case("int8").operator, x_scale=0.1)
    assert operator.x_scale == float(np.float32(0.1))


def test_col_ptr_whose_differences_wrap_around_is_refused():
    wraps = (0, 2**63 - 1, -2, 3)
    with pytest.raises(ValueError, match="col_ptr does not ascend from 0 to the 3 entries"):
        BlockSparseLinear(K=32, N=48, block_k=16, block_n=16, col_ptr=wraps, k_idx=(0, 0, 1))


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (INT("K", 0), "K is 0, not a positive size"),
        (INT("N", 1 << 40), "too large for one layer"),
        (INT("block_n", -16), "block_n is -16"),
        (INT("block_k", 1 << 62), "too large"),
        (INT("N", 25), "its values are|its bias is FLOAT"),
        (INT("N", 33), "col_ptr has 3 entries, 3 block columns need 4"),
        (INTS("col_ptr", [0, 9, 6]), "col_ptr does not ascend from 0 to the 6 entries of k_idx"),
        (INTS("col_ptr", [1, 3, 6]), "col_ptr does not ascend"),
        (INTS("col_ptr", []), "col_ptr has 0 entries"),
        (INTS("k_idx", [0, 1, 2, 0, 1, 3]), "k_idx is not within the 3 block rows"),
        (INTS("k_idx", [-1, 1, 2, 0, 1, 2]), "k_idx is not within"),
        (INTS("k_idx", [0, 2, 1, 0, 1, 2]), "k_idx does not ascend within every block column"),
        (INTS("k_idx", [0, 1, 1, 0, 1, 2]), "k_idx does not ascend"),
        (INTS("k_idx", [0, 1, 2, 0, 1]), "col_ptr does not ascend"),
        (ir.AttrString("activation", "silu"), "activation 'silu' is none of none, gelu"),
        (ir.AttrString("layout", "bsl16.v2"), "layout 'bsl16.v2' is none of"),
        (ir.AttrString("layout", "bsl16.v1"), "bsl16.v1 holds float16, bfloat16 or int8 only"),
        (FLOAT("x_scale", 0.5), "values of FLOAT and x_scale 0.5 do not fit together"),
        (FLOAT("x_scale", -0.5), "x_scale -0.5 or x_offset 0.0 is no usable number"),
        (FLOAT("x_scale", float("nan")), "no usable number"),
        (FLOAT("x_offset", 0.5), "x_offset is given without x_scale"),
        (FLOAT("out_scale", 0.5), "out_type FLOAT and out_scale 0.5 do not fit together"),
        (FLOAT("out_offset", float("inf")), "no usable number"),
        (INT("out_type", 3), "out_type INT8 and out_scale 0.0"),
        (INT("out_type", 7), "out_type INT64 is none of"),
        (INT("out_type", 999), "out_type 999 is no element type"),
        (FLOAT("K", 40.0), "attribute K is no INT"),
        (INT("alpha", 1), "an attribute alpha, which this version does not know"),
        (ir.AttrString("plugin_version", "2"), "plugin_version is '2', this version knows '1'"),
    ],
)
def test_wrong_attributes_are_refused(attribute, message):
    (node,) = case(zeros=0.0).model().graph
    node.attributes[attribute.name] = attribute
    with pytest.raises(UserError, match=f"^layer is not a valid lsp::BlockSparseLinear: .*({message})"):
        from_node(node)


@pytest.mark.parametrize("name", ["K", "N", "block_k", "block_n", "col_ptr"])
def test_missing_attributes_are_refused(name):
    (node,) = case().model().graph
    del node.attributes[name]
    with pytest.raises(UserError, match=f"layer is not .*: it has no attribute {name}"):
        from_node(node)


def constant(array):
    tensor = ir.tensor(array, name="other")
    return ir.Value(name="other", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def value(dtype, shape):
    return ir.Value(name="other", type=ir.TensorType(dtype), shape=ir.Shape(shape))


@pytest.mark.parametrize(
    ("index", "other", "message"),
    [
        (0, value(ir.DataType.FLOAT16, [2, 3, 40]), "its x is FLOAT16, not FLOAT"),
        (0, value(ir.DataType.FLOAT, [2, 41]), r"its x is \[2,41\], but has to end in 40"),
        (0, value(ir.DataType.FLOAT, []), "its x is"),
        (0, None, "none of them empty"),
        (1, constant(np.zeros((5, 16, 16), np.float32)), r"its values are \[5, 16, 16\], not \[6, 16, 16\]"),
        (1, constant(np.zeros((6, 16, 16), np.float64)), "its values are DOUBLE, not one of"),
        (1, value(ir.DataType.FLOAT, [6, 16, 16]), "its values is not constant"),
        (2, constant(np.zeros(23, np.float32)), r"its bias is FLOAT \[23\], not FLOAT \[24\]"),
        (3, constant(np.zeros(24, np.float16)), r"its scale is FLOAT16"),
        (4, value(ir.DataType.FLOAT, [2, 3, 40]), "its residual is .* has to end in 24"),
        (4, value(ir.DataType.BFLOAT16, [2, 3, 24]), "its residual is BFLOAT16"),
        (4, value(ir.DataType.FLOAT, [1, 3, 24]), "its residual has other rows than its x; it is not broadcast"),
        (4, value(ir.DataType.FLOAT, [3, 24]), "its residual has other rows"),
    ],
)
def test_wrong_inputs_are_refused(index, other, message):
    (node,) = case(zeros=0.0, residual=True).model(dynamic=False).graph
    node.replace_input_with(index, other)
    with pytest.raises(UserError, match=f"layer is not a valid .*{message}"):
        from_node(node)


def test_too_few_inputs_are_refused():
    node = ir.Node("lsp", "BlockSparseLinear", [], case().model().graph[0].attributes.values(), name="layer")
    with pytest.raises(UserError, match="it takes x, values, bias, scale"):
        from_node(node)


def test_another_version_of_the_domain_is_refused():
    model = case().model()
    model.opset_imports["lsp"] = 2
    with pytest.raises(UserError, match="lsp::BlockSparseLinear of version 2, which this version of lsp-deploy does"):
        operator_nodes(model)


def test_what_contradicts_itself_is_no_operator():
    with pytest.raises(ValueError, match="col_ptr"):
        BlockSparseLinear(K=4, N=4, block_k=2, block_n=2, col_ptr=(0, 1), k_idx=(0,))


@pytest.mark.parametrize("dynamic", [True, False])
def test_types_and_shapes_pass_through(dynamic):
    model = case("int8", out_type="int8").model(dynamic=dynamic)
    (node,) = model.graph
    scale = constant(np.array(0.5, np.float32))
    model.graph.register_initializer(scale)
    dequantize = ir.Node("", "DequantizeLinear", [node.outputs[0], scale])
    model.graph.append(dequantize)
    model.graph.outputs[0] = dequantize.outputs[0]
    dequantize.outputs[0].name, node.outputs[0].name = "y", "hidden"
    node.outputs[0].type = node.outputs[0].shape = None
    InferShapesPass()(model)
    expected = ir.Shape(["d0", "d1", 24] if dynamic else [2, 3, 24])
    assert (node.outputs[0].dtype, node.outputs[0].shape) == (ir.DataType.INT8, expected)
    assert (dequantize.outputs[0].dtype, dequantize.outputs[0].shape) == (ir.DataType.FLOAT, expected)
    assert not InferShapesPass()(model).modified

from __future__ import annotations

from pathlib import Path

import pytest

from lsp_deploy.engines.protocol import layer_counts
from lsp_deploy.engines.tensorrt_rtx.layer_table import parse_layer_table

# Lines of real tables (TensorRT-RTX 1.7.1, SM80 and SM89).
RECORDED = (Path(__file__).parent / "data" / "layer_table.txt").read_text()


def layer(name: str):
    found = [one for one in parse_layer_table(RECORDED).layers if one.name == name]
    assert len(found) == 1
    return found[0]


def test_every_recorded_line_is_read_and_the_tensors_after_the_table_are_not():
    table = parse_layer_table(RECORDED)
    assert table.unread == []
    assert layer_counts(table.layers) == {
        "kgen fp32": 4,
        "gemm int8": 2,
        "runtime_fusion fp32": 1,
        "runtime_fusion fp16": 1,
        "shape_call none": 1,
        "correlation fp32": 1,
        "kgen fp16": 1,
        "gemm fp8": 1,
    }


def test_int8_gemm_with_its_types_and_origin():
    one = layer("/blocks/blocks.0/attn/proj/MatMul_myl0_16")
    assert one.kind == "gemm"
    assert one.precision == "int8"
    assert one.input_types == ["int8"]
    assert one.constant_types == ["int8", "fp32", "fp32"]
    assert one.output_types == ["fp32"]
    assert one.tactic == "__myelin_CASK_STUB"
    assert one.onnx_nodes == ["/blocks/blocks.0/attn/proj/MatMul", "dq1", "wdq1"]


def test_a_product_of_int8_activations_and_dequantized_weights_is_not_int8():
    one = layer("__myl_CastMulFc_myl0_5")
    assert one.input_types == ["int8", "fp32"]
    assert one.precision == "fp32"


def test_int4_weights_compute_in_their_activations_type():
    one = layer("__myl_ReplCastMulCastFc_myl0_2")
    assert one.constant_types[0] == "int4"
    assert one.precision == "fp16"


@pytest.mark.parametrize("broken", ["Name: x, LayerType: gemm, Inputs: [", "Layer(CaskGemm): conv1, Tactic: 0x1"])
def test_a_line_of_another_form_is_given_back(broken: str):
    good = RECORDED.splitlines()[1]
    table = parse_layer_table(f"Layers:\n{good}\n{broken}\n")
    assert [one.kind for one in table.layers] == ["shape_call"]
    assert table.unread == [broken]


def test_node_names_with_brackets_and_commas_survive():
    line = (
        "Name: a, b[0]_myl0_1, LayerType: custom_layer, Inputs: [ { Name: x[1], Dimensions: [-1,8], Strides: [8,1], "
        "StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [], "
        "TacticName: , StreamId: 0, Metadata: [ONNX Layer: a, b[0]]\x1f[ONNX Layer: c]"
    )
    (one,) = parse_layer_table(f"Layers:\n{line}").layers
    assert (one.name, one.kind, one.precision) == ("a, b[0]_myl0_1", "custom_layer", "fp16")
    assert one.onnx_nodes == ["a, b[0]", "c"]


def test_an_empty_message_has_no_layers():
    assert parse_layer_table("").layers == []

from __future__ import annotations

import json
from typing import Any

import pytest

from lsp_deploy.engines.asked_layers import unmet_requests
from lsp_deploy.engines.protocol import LayerRecord, SparseTactics
from lsp_deploy.engines.tensorrt.inspector import InspectionError, parse_inspection
from lsp_deploy.engines.tensorrt_common import build_log
from lsp_deploy.engines.tensorrt_common.layer_words import element_type, onnx_nodes
from lsp_deploy.engines.tensorrt_common.messages import LogMessage

TENSORRT_10 = {
    "Name": "/blocks.0/mlp/fc1/MatMul_myl0_7",
    "LayerType": "gemm",
    "Inputs": [
        {"Name": "a", "Dimensions": [1, 197, 768], "Format/Datatype": "Int8"},
        {"Name": "residual", "Dimensions": [1, 197, 3072], "Format/Datatype": "Half"},
    ],
    "Outputs": [{"Name": "b", "Dimensions": [1, 197, 3072], "Format/Datatype": "Half"}],
    "TacticName": "sm80_xmma_gemm_i8f16_i8i32_f16_tn_n_tilesize128x128x64",
    "StreamId": 0,
    "Metadata": "[ONNX Layer: /blocks.0/mlp/fc1/MatMul]\x1e[ONNX Layer: /blocks.0/mlp/fc1/Add]",
}
TENSORRT_11 = TENSORRT_10 | {
    "Inputs": [
        {"Name": "a", "Dimensions": [1, 197, 768], "Format": "(Linear) Row major linear format", "DataType": "Int8"}
    ],
    "Constants": [
        {"Name": "w", "Dimensions": [768, 3072], "Format": "(Linear) Row major linear format", "DataType": "Int8"},
        {"Name": "scale", "Dimensions": [3072], "Format": "(Linear) Row major linear format", "DataType": "Float"},
    ],
}
CONVOLUTION = {
    "Name": "patch_embed + bias_add",
    "LayerType": "CaskConvolution",
    "Inputs": [
        {
            "Name": "x",
            "Dimensions": [1, 3, 224, 224],
            "Format/Datatype": "Two wide channel vectorized row major FP16 format",
        }
    ],
    "Outputs": [{"Name": "y", "Dimensions": [1, 768, 14, 14], "Format/Datatype": "Channel major FP16 format"}],
    "Weights": {"Type": "Half", "Count": 589824},
    "Bias": {"Type": "Float", "Count": 768},
    "HasSparseWeights": 0,
    "TacticName": "sm80_xmma_fprop_f16f16",
}


@pytest.mark.parametrize("kind", ["PluginV3", "custom_layer"])
def test_a_plugin_computes_in_the_type_of_its_first_input(kind: str):
    (record,) = parse_inspection(json.dumps({"Layers": [TENSORRT_10 | {"LayerType": kind, "TacticName": "0x1"}]}))
    assert (record.kind, record.precision) == (kind, "int8")


@pytest.mark.parametrize("ends", [{"Bindings": ["x", "y"]}, {"I/O Tensors": [{"Name": "x", "IOMode": "Input"}]}])
@pytest.mark.parametrize("layer", [TENSORRT_10, TENSORRT_11])
def test_both_dialects_are_read(layer: dict[str, Any], ends: dict[str, Any]):
    (record,) = parse_inspection(json.dumps({"Layers": [layer], **ends}))
    assert (record.name, record.kind, record.precision) == ("/blocks.0/mlp/fc1/MatMul_myl0_7", "gemm", "int8")
    assert record.onnx_nodes == ["/blocks.0/mlp/fc1/MatMul", "/blocks.0/mlp/fc1/Add"]
    assert record.output_types == ["fp16"]
    assert record.tactic.startswith("sm80_xmma_gemm_i8f16")


def test_a_product_of_int8_and_float_weights_is_not_int8():
    constants = [{"Name": "w", "Dimensions": [768, 3072], "DataType": "Half"}]
    layer = TENSORRT_11 | {"TacticName": "sm80_xmma_gemm_f16f16", "Constants": constants}
    (record,) = parse_inspection(json.dumps({"Layers": [layer]}))
    assert record.precision == "fp16"


def test_layers_outside_the_compiler_have_their_nodes_in_their_names():
    text = json.dumps({"Layers": [CONVOLUTION, CONVOLUTION | {"Name": "{ForeignNode[a...b]}"}]})
    convolution, foreign = parse_inspection(text)
    assert (convolution.precision, convolution.constant_types) == ("fp16", ["fp16"])
    assert convolution.onnx_nodes == ["patch_embed", "bias_add"]
    assert foreign.onnx_nodes == []


def test_an_engine_built_without_details_has_names_only():
    (record,) = parse_inspection('{"Layers": ["fc1 + gelu"], "Bindings": []}')
    assert record == LayerRecord(name="fc1 + gelu", kind="unknown", precision="unknown", onnx_nodes=["fc1", "gelu"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}'])
def test_what_is_not_an_inspection_is_refused(text: str):
    with pytest.raises(InspectionError):
        parse_inspection(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("Row major linear FP32 format", "fp32"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("UInt8", "uint8"),
        ("E8M0", "e8m0"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_types_are_found_in_words(text: str, name: str):
    assert element_type(text) == name


def test_a_node_may_have_brackets_in_its_name():
    assert onnx_nodes("[ONNX Layer: a[0]]\x1f[ONNX Layer: b]") == ["a[0]", "b"]


def test_the_builders_words_on_sparsity_are_counted():
    def said(*texts: str) -> SparseTactics | None:
        return build_log.sparse_tactics([LogMessage(severity="INFO", text=text) for text in texts])

    assert said("nothing of it") is None
    assert said(
        "(Sparsity) Found 39 layer(s) eligible to use sparse tactics: a, b + c",
        "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b + c",
    ) == SparseTactics(eligible=39, chosen=2, layers=["a", "b + c"])
    assert said(
        "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 0 layer(s) using sparse tactics",
    ) == SparseTactics(eligible=39, chosen=0)


def test_layers_that_the_builder_does_not_name_are_counted(make_model):
    model = make_model("int8")
    assert unmet_requests(model, []) == [
        "the builder does not say what became of 1 of the layers asked to be int8 or 2:4: linear"
    ]
    kernels = [
        LayerRecord(name="q", kind="kgen", precision="int8", onnx_nodes=["linear"]),
        LayerRecord(name="g", kind="gemm", precision="fp16", onnx_nodes=["linear"]),
    ]
    # What only prepares the operands does not count.
    assert unmet_requests(model, kernels) == ["linear is asked to be int8 and runs in fp16 (gemm)"]
    assert unmet_requests(make_model("fp32"), kernels) == []

from __future__ import annotations

from pathlib import Path

import pytest

from lsp_deploy.engines.tensorrt_common import build_log
from lsp_deploy.engines.tensorrt_common.messages import LogMessage, ParserError

NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In f at /_src/x.cpp:1 (cudaError 35: "
    "CUDA driver version is insufficient for CUDA runtime version))"
)


def errors(*texts: str) -> list[LogMessage]:
    return [LogMessage(severity="ERROR", text=text) for text in texts]


# Real messages of TensorRT-RTX 1.7.1.
@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for "
            "target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3. In compileGraph at "
            "/_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "Cannot compile for target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] "
            "Cannot compile operation '/blocks/blocks.0/attn/qkv/MatMul' for Turing (SM75): FP32 GEMM is not "
            "supported. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)",
            "Cannot compile operation '/blocks/blocks.0/attn/qkv/MatMul' for Turing (SM75): FP32 GEMM is not supported",
        ),
        (
            "[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 23918240 bytes.)",
            "OutOfMemory: Requested size was 23918240 bytes",
        ),
        ("something of another form\nover two lines", "something of another form over two lines"),
    ],
)
def test_an_error_is_unwrapped_to_what_it_says(said: str, line: str):
    assert build_log.error_lines(errors(said)) == [line]


def test_complaints_about_the_missing_driver_are_left_out():
    assert build_log.error_lines(errors("first", NO_DRIVER, "second", NO_DRIVER)) == ["first", "second"]


def test_they_stay_where_nothing_else_was_said():
    (line,) = build_log.error_lines(errors(NO_DRIVER))
    assert "cudaError 35" in line


def test_warnings_come_once_and_in_order():
    messages = [LogMessage(severity="WARNING", text=text) for text in ("b", "a", "b")]
    assert build_log.warning_lines([*messages, LogMessage(severity="INFO", text="c")]) == ["b", "a"]


def test_memory_by_kind():
    lines = ("Total Activation Memory: 63342080 bytes", "Total Weights Memory: 22870016 bytes", "Max Memory: 3 bytes")
    messages = [LogMessage(severity="INFO", text=line) for line in lines]
    assert build_log.memory(messages) == {"activations": 63342080, "weights": 22870016}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ParserError(
                code="INVALID_NODE",
                description='creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
                node="bs",
                operator="BlockSparseLinear",
            ),
            "node bs (BlockSparseLinear): Plugin not found, are the plugin name, version, and namespace correct?",
        ),
        (
            ParserError(
                code="INVALID_NODE",
                description="Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.",
                node="q",
                operator="QuantizeLinear",
            ),
            "node q (QuantizeLinear): Non-zero zero point is not supported.",
        ),
        (
            ParserError(code="UNSUPPORTED_NODE", description="false", node="u", operator="Unique"),
            "node u (Unique): unsupported node",
        ),
        (
            ParserError(
                code="MODEL_DESERIALIZE_FAILED",
                description="Assertion failed: model->ParseFromCodedStream(&in): Failed to parse the ONNX model.",
            ),
            "Failed to parse the ONNX model.",
        ),
    ],
)
def test_a_parser_error_names_the_node(error: ParserError, line: str):
    assert build_log.parser_error_line(error) == line


def test_the_last_node_is_the_one_the_parser_was_at():
    texts = ["Parsing node: a [Relu]", "a [Relu] outputs: y", "Parsing node: b c [MatMul]", "Searching for input: y"]
    messages = [LogMessage(severity="VERBOSE", text=text) for text in texts]
    assert build_log.last_node(messages) == "b c (MatMul)"
    assert build_log.last_node([]) is None


def test_no_node_is_blamed_once_the_parser_is_through():
    texts = ["Parsing node: a [Relu]", "Original: 12 layers"]
    assert build_log.last_node([LogMessage(severity="VERBOSE", text=text) for text in texts]) is None


def test_a_log_that_a_crash_cut_short_is_read_up_to_there(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    whole = [LogMessage(severity="INFO", text="two\nlines").model_dump_json(), '{"severity": "VERB']
    log.write_text("\n".join(whole))
    assert build_log.read_log(log) == [LogMessage(severity="INFO", text="two\nlines")]


def test_no_log_is_an_empty_one(tmp_path: Path):
    assert build_log.read_log(tmp_path / "absent") == []

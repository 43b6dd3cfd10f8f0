from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from lsp_deploy.errors import UserError
from lsp_deploy.graph.weight_patterns import BLOCK_SHAPES, find_pattern
from lsp_deploy.inspection import inspect_model, inspection_table

RNG = np.random.default_rng(0)
K, N = 128, 192


def dense() -> np.ndarray:
    return RNG.normal(size=(K, N)).astype(np.float32)


def two_four(weight: np.ndarray) -> np.ndarray:
    order = np.abs(weight).reshape(K // 4, 4, N).argsort(axis=1)
    mask = np.zeros((K // 4, 4, N), bool)
    np.put_along_axis(mask, order[:, 2:], True, axis=1)
    return weight * mask.reshape(K, N)


def blocks(weight: np.ndarray, block_k: int, block_n: int, zeros: float) -> np.ndarray:
    grid = (-(-K // block_k), -(-N // block_n))
    dead = np.zeros(grid[0] * grid[1], bool)
    dead[RNG.permutation(dead.size)[: round(dead.size * zeros)]] = True
    mask = ~dead.reshape(grid).repeat(block_k, 0).repeat(block_n, 1)[:K, :N]
    return weight * mask


# --- patterns


def test_dense() -> None:
    found = find_pattern(dense())
    assert (found.pattern, found.zeros, found.block) == ("dense", 0.0, None)


def test_two_four_along_k_only() -> None:
    weight = two_four(dense())
    assert find_pattern(weight).pattern == "2:4"
    assert find_pattern(weight).zeros == 0.5
    assert find_pattern(np.ascontiguousarray(weight.T)).pattern == "unstructured"


def test_unstructured() -> None:
    found = find_pattern(dense() * (RNG.random((K, N)) > 0.3))
    assert found.pattern == "unstructured"
    assert found.zeros == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("block", BLOCK_SHAPES)
def test_the_block_shape_that_was_pruned_is_found(block: tuple[int, int]) -> None:
    found = find_pattern(blocks(dense(), *block, zeros=0.5))
    assert (found.pattern, found.block) == ("block", block)
    assert found.zero_blocks == pytest.approx(0.5, abs=0.1)


def test_rounding_does_not_hide_blocks() -> None:
    weight = np.rint(blocks(dense(), 32, 32, zeros=0.5) * 30)
    assert find_pattern(weight).block == (32, 32)


def test_ragged_edges() -> None:
    weight = RNG.normal(size=(40, 50)).astype(np.float32)
    weight[32:, 32:] = 0
    found = find_pattern(weight, dense_below=0.01)
    # The corner of 8 × 18 is one block of 32 × 32, cut off.
    assert (found.pattern, found.block, found.zero_blocks) == ("block", (32, 32), 0.25)


def test_a_few_zeros_from_rounding_are_dense() -> None:
    assert find_pattern(np.rint(dense() * 30)).pattern == "dense"


# --- files


def write(path: Path, *, external: bool = False) -> None:
    """x [n, 5, K] -> int8 MatMul (Q/DQ) -> Relu -> fp32 2:4 MatMul behind an Identity -> y."""
    quantized = np.clip(np.rint(dense() * 30), -127, 127).astype(np.int8)
    initializers = {
        "xs": np.float32(0.03),
        "xz": np.int8(0),
        "w": quantized,
        "ws": np.full(N, 1 / 30, np.float32),
        "v": np.ascontiguousarray(two_four(dense()).T.reshape(N, K)),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Identity", ["v"], ["v1"]),
        helper.make_node("MatMul", ["r", "v1"], ["y"], name="second[1]"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, K])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="hand", ir_version=8)
    onnx.save(proto, path, save_as_external_data=external, location="weights.bin", size_threshold=1000)


def test_facts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path)
    content = path.read_bytes()
    inspection = inspect_model(path, {"x": (2, 5, K)})
    assert path.read_bytes() == content
    assert inspection.sha256 == hashlib.sha256(content).hexdigest()
    assert (inspection.file_bytes, inspection.external_bytes) == (len(content), 0)
    assert (inspection.opset, inspection.producer) == (17, "hand")
    assert [(value.name, value.dtype, value.shape) for value in inspection.inputs] == [("x", "fp32", ["n", 5, K])]
    assert [(value.name, value.dtype, value.shape) for value in inspection.outputs] == [("y", "fp32", ["n", 5, K])]
    assert inspection.input_shapes == {"x": [2, 5, K]}
    assert inspection.parameters == 2 * K * N + N + 2
    assert inspection.linear_flops == 2 * (2 * 10 * K * N)
    assert inspection.attention_flops == 0
    assert (inspection.quantize_nodes, inspection.dequantize_nodes) == (1, 2)
    assert inspection.node_types["MatMul"] == 2


def test_layers_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path)
    first, second = inspect_model(path).layers
    assert (first.name, first.role, first.block) == ("first", "fc1", 0)
    assert (first.M, first.K, first.N) == (5, K, N)
    assert (first.dtype, first.weight_bits, first.activation_bits) == ("int8", 8, 8)
    assert first.pattern == "dense"
    assert 0 < first.zeros < 0.05
    assert (second.dtype, second.weight_bits, second.activation_bits) == ("fp32", None, None)
    # Pruned along N of this orientation: not a pattern that hardware takes.
    assert (second.pattern, second.zeros) == ("unstructured", 0.5)


def test_json(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx")
    value = json.loads(json.dumps(inspect_model(tmp_path / "model.onnx").to_json()))
    assert value["layers"][0]["weight_bits"] == 8
    assert value["opsets"] == {"": 17}


def test_external_data_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", external=True)
    inspection = inspect_model(tmp_path / "model.onnx")
    assert inspection.external_bytes == (tmp_path / "weights.bin").stat().st_size
    assert inspection.file_bytes < 2000


@pytest.mark.parametrize("width", [80, 160])
def test_table(tmp_path: Path, width: int) -> None:
    write(tmp_path / "model.onnx")
    console = Console(width=width, record=True, file=(tmp_path / "out.txt").open("w"))
    for renderable in inspection_table(inspect_model(tmp_path / "model.onnx")):
        console.print(renderable)
    text = console.export_text()
    # Names with brackets are no markup.
    for fragment in ("second[1]", "[n, 5, 128]", "int8, x int8", "50.0%", "5×128×192", "hand", "2 linear layers"):
        assert fragment in text, fragment
    assert "…" not in text


def test_block_pruned_and_layerless_models(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path)
    proto = onnx.load(path)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "v")
    pruned = np.ascontiguousarray(blocks(dense(), 32, 16, zeros=0.5).T)
    tensor.CopyFrom(numpy_helper.from_array(pruned, "v"))
    onnx.save(proto, path)
    layer = inspect_model(path).layers[1]
    assert (layer.pattern, layer.zero_block_shape) == ("block", [16, 32])
    del proto.graph.node[2:4], proto.graph.node[3:]
    proto.graph.node[2].input[0], proto.graph.node[2].output[0] = "xd", "y"
    onnx.save(proto, path)
    inspection = inspect_model(path)
    assert inspection.layers == []
    assert "no linear layers" in str(inspection_table(inspection)[1])


def test_bad_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    with pytest.raises(UserError):
        inspect_model(tmp_path / "model.onnx")

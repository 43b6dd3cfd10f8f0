"""Models of a fixed batch, another dynamic dimension, no class output, or one weight in several layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def write_mlp(path: Path, batch: int | str, tokens: int | str, *, classes: bool = True, tied: bool = False) -> None:
    """Write x [batch, tokens, 16] -> two residual MLP blocks -> logits [batch, 10], or the tokens themselves."""
    random = np.random.default_rng(0)
    initializers, nodes = [], []

    def weight(name: str, *shape: int) -> str:
        initializers.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / 4, name))
        return name

    x = "x"
    for block in range(2):
        nodes.append(helper.make_node("MatMul", [x, weight(f"up{block}", 16, 128)], [f"a{block}"]))
        nodes.append(helper.make_node("Relu", [f"a{block}"], [f"b{block}"]))
        nodes.append(
            helper.make_node(
                "MatMul", [f"b{block}", "down0" if tied and block else weight(f"down{block}", 128, 16)], [f"c{block}"]
            )
        )
        nodes.append(helper.make_node("Add", [f"c{block}", x], [f"d{block}"]))
        x = f"d{block}"
    shape = [batch, tokens, 16]
    output = helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)
    if classes:
        nodes.append(helper.make_node("ReduceMean", [x], ["pooled"], axes=[1], keepdims=0))
        nodes.append(helper.make_node("MatMul", ["pooled", weight("head", 16, 10)], ["logits"]))
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "mlp", inputs, [output], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_fixed_batch_with_another_dynamic_dimension(run) -> None:
    write_mlp(Path("m.onnx"), 1, "tokens")
    result = run("compress", "m.onnx", "--target", "a100", "--dry-run", *SHAPES)
    assert result.code == 0, result.err


SHAPES = ("--min-shapes", "x:1x3x16", "--opt-shapes", "x:1x5x16", "--max-shapes", "x:1x7x16")


@pytest.mark.parametrize("zeros", [(), ("--sparsity", "block", "--block", "16x16", "--flops", "0.7")])
def test_a_fixed_batch_need_not_divide_the_samples(run, zeros: tuple[str, ...]) -> None:
    write_mlp(Path("m.onnx"), 4, 5)
    result = run(
        *("compress", "m.onnx", "--target", "a100", "--calibration-data", "random", "--samples", 10),
        *("--precision", "int8", "--no-build", "-o", "out", *zeros),
    )
    assert result.code == 0, result.err
    report = json.loads(Path("out/report.json").read_text())
    assert [report["data"][part]["samples"] for part in ("calibration", "held_out")] == [8, 2]
    assert report["model"]["inputs"][0]["shape"] == [4, 5, 16]


def test_a_fixed_batch_is_the_one_that_is_timed(run) -> None:
    write_mlp(Path("m.onnx"), 3, 5)
    result = run("profile", "m.onnx", "--duration", "0.1", "--warm-up", "0", "--json")
    assert result.code == 0, result.err
    assert [one["batch"] for one in json.loads(result.out)["profiles"]] == [3]


def test_a_16_bit_model_on_a_cpu_is_said_to_run_in_float32(run) -> None:
    write_mlp(Path("m.onnx"), 3, 5)
    options = ("--precision", "fp16", "--sparsity", "none", "--samples", 10, "--no-build")
    assert run("compress", "m.onnx", "--target", "a100", *options, "-o", "out").code == 0
    said = "model.onnx: its 16-bit floats run as float32 on a CPU; the times say nothing about a GPU's"
    short = ("--duration", "0.1", "--warm-up", "0")
    assert said in run("profile", "out/model.onnx", *short).err
    assert "16-bit" not in run("profile", "m.onnx", *short).err


def test_max_drop_without_a_class_output_is_refused(run) -> None:
    write_mlp(Path("m.onnx"), "batch", 5, classes=False)
    result = run("compress", "m.onnx", "--target", "a100", "--max-drop", "1", "--dry-run")
    assert result.code == 2
    assert "no class output" in result.err


def test_layers_that_share_a_weight_share_its_mask(run) -> None:
    write_mlp(Path("m.onnx"), "batch", 5, tied=True)
    arguments = ("--sparsity", "block", "--block", "16x16", "--flops", "0.7", "--no-build", "-o", "out")
    result = run("compress", "m.onnx", "--target", "a100", *arguments)
    assert result.code == 0, result.err
    operators = [node for node in onnx.load("out/model.onnx").graph.node if node.op_type == "BlockSparseLinear"]
    tied = [node for node in operators if any(one.name == "K" and one.i == 128 for one in node.attribute)]
    assert len(tied) == 2 and len({node.input[1] for node in tied}) == 1, "what is left of the weight is stored once"
    masks = {str([one for one in node.attribute if one.name in ("col_ptr", "k_idx")]) for node in tied}
    assert len(masks) == 1

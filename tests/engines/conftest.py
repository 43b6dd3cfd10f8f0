"""Small ONNX models that the engine tests run and build."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tensorrt_machine import made_up_gpu

K, N = 64, 96
QUANTIZED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A file with x [batch, 4, K] -> LayerNormalization -> (Q/DQ) MatMul "linear" -> Add -> y [batch, 4, N]."""

    def make(kind: str = "fp32", *, batch: int | str = "batch", name: str = "model.onnx", seed: int = 0) -> Path:
        path = tmp_path / name
        onnx.save(_model(kind, batch, seed), path)
        return path

    return make


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, 4, K)).astype(np.float32)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A made-up machine with an A100 and TensorRT 10.3."""
    with made_up_gpu(tmp_path, monkeypatch):
        yield monkeypatch


@pytest.fixture
def cuda(machine: pytest.MonkeyPatch) -> Any:
    """The made-up CUDA, which counts what is used of it."""
    return importlib.import_module("cuda.bindings.runtime")


def _model(kind: str, batch: int | str, seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    floats = np.float16 if kind == "fp16" else np.float32
    weight = (rng.standard_normal((K, N)) / 8).astype(floats)
    constants = {
        "scale": np.ones(K, floats),
        "shift": np.zeros(K, floats),
        "bias": rng.standard_normal(N).astype(floats),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    nodes = [helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["normed"], "norm", axis=-1)]
    left, right = "normed", "weight"
    if kind in QUANTIZED:
        initializers += _quantized(weight, QUANTIZED[kind])
        # ONNX Runtime up to 1.23, the last for Python 3.10, crashes on a weight without zero points.
        initializers.append(helper.make_tensor("weight_zero", QUANTIZED[kind], [N], bytes(N), raw=True))
        nodes += [
            helper.make_node("QuantizeLinear", ["normed", "x_scale", "x_zero"], ["normed_q"], "quantize"),
            helper.make_node("DequantizeLinear", ["normed_q", "x_scale", "x_zero"], ["normed_dq"], "dequantize"),
            helper.make_node(
                "DequantizeLinear", ["weight_q", "weight_scale", "weight_zero"], ["weight_dq"], "weight", axis=1
            ),
        ]
        left, right = "normed_dq", "weight_dq"
    else:
        initializers.append(numpy_helper.from_array(weight, "weight"))
    nodes += [
        helper.make_node("MatMul", [left, right], ["product"], "linear"),
        helper.make_node("Add", ["product", "bias"], ["y"], "bias_add"),
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(floats))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", element, [batch, 4, K])],
        [helper.make_tensor_value_info("y", element, [batch, 4, N])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def _quantized(weight: np.ndarray, element: int) -> list[onnx.TensorProto]:
    largest = 127 if element == TensorProto.INT8 else 448
    scale = np.abs(weight).max(axis=0) / largest
    values = weight / scale
    if element == TensorProto.INT8:
        values = np.rint(values).astype(np.int8)
    return [
        helper.make_tensor("weight_q", element, weight.shape, values.ravel()),
        helper.make_tensor("x_zero", element, (), [0]),
        numpy_helper.from_array(scale.astype(np.float32), "weight_scale"),
        numpy_helper.from_array(np.float32(4 / largest), "x_scale"),
    ]

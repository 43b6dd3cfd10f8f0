from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lsp_deploy.engines.backends import backends, builder_for
from lsp_deploy.engines.compute_types import compute_type
from lsp_deploy.engines.feeds import check_feeds
from lsp_deploy.engines.protocol import (
    BackendStatus,
    EngineInfo,
    LayerRecord,
    TensorSpec,
    layer_counts,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from lsp_deploy.engines.tensorrt import backend as tensorrt_backend
from lsp_deploy.engines.tensorrt_rtx.backend import TensorRtRtxBackend
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of
from lsp_deploy.hardware.target import load_target


def test_a_sidecar_reads_back_as_written(tmp_path: Path):
    engine = tmp_path / "tensorrt_rtx-a100.engine"
    engine.write_bytes(b"an engine")
    layer = LayerRecord(name="gemm0", kind="gemm", precision="int8", onnx_nodes=["linear"])
    info = write_sidecar(EngineInfo(backend="tensorrt_rtx", target="a100", layers=[layer]), engine)
    assert sidecar_path(engine).name == "tensorrt_rtx-a100.engine.json"
    assert (info.file, info.size_bytes, info.sha256) == (engine.name, 9, sha256_of(engine))
    assert info.created is not None
    assert read_sidecar(engine) == info


def test_no_sidecar_is_none_and_a_damaged_or_foreign_one_is_refused(tmp_path: Path):
    engine = tmp_path / "e.engine"
    engine.write_bytes(b"an engine")
    assert read_sidecar(engine) is None
    sidecar_path(engine).write_text('{"backend": "onnxruntime"}')
    with pytest.raises(UserError, match=r"e.engine.json is not an engine's sidecar: target"):
        read_sidecar(engine)
    write_sidecar(EngineInfo(backend="onnxruntime", target="cpu"), engine)
    engine.write_bytes(b"another one")
    with pytest.raises(UserError, match=r"is not the engine that e.engine.json describes"):
        read_sidecar(engine)


def test_layers_are_counted_by_kind_and_precision():
    layers = [
        LayerRecord(name=str(i), kind=kind, precision=precision)
        for i, (kind, precision) in enumerate([("gemm", "int8"), ("kgen", "fp16"), ("gemm", "int8")])
    ]
    assert layer_counts(layers) == {"gemm int8": 2, "kgen fp16": 1}


@pytest.mark.parametrize(
    ("types", "computes_in"),
    [
        (["int8", "int8"], "int8"),
        (["int8", "fp16"], "fp16"),
        (["fp16", "int4"], "fp16"),
        (["fp16", "fp32"], "fp32"),
        (["int64"], "int64"),
        ([], "none"),
    ],
)
def test_the_widest_float_is_what_is_computed_in(types: list[str], computes_in: str):
    assert compute_type(types) == computes_in


SPECS = {"x": TensorSpec(np.dtype(np.float32), ("batch", 3)), "ids": TensorSpec(np.dtype(np.int64), ())}


def test_feeds_come_in_the_engines_order_and_float_type():
    feeds = check_feeds({"ids": np.int64(1), "x": np.ones((5, 3), np.float16)}, SPECS, "the model")
    assert list(feeds) == ["x", "ids"]
    assert feeds["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.ones((1, 3))}, "the model takes the inputs x, ids; given: x"),
        ({"x": np.ones((1, 4)), "ids": np.int64(1)}, "input x of the model: expected the shape batchx3, got 1x4"),
        ({"x": np.ones(3), "ids": np.int64(1)}, "expected the shape batchx3, got 3"),
        ({"x": np.ones((1, 3), np.int8), "ids": np.int64(1)}, "input x of the model: expected float32, got int8"),
        ({"x": np.ones((1, 3)), "ids": np.float32(1)}, "input ids of the model: expected int64, got float32"),
    ],
)
def test_feeds_that_do_not_fit_are_named(feeds: dict, message: str):
    with pytest.raises(UserError, match=message):
        check_feeds(feeds, SPECS, "the model")


def test_backends_by_name():
    assert [backend.name for backend in backends()] == ["onnxruntime", "tensorrt_rtx", "tensorrt"]


def test_the_cpu_is_built_for_here():
    backend, reason = builder_for(load_target("cpu"))
    assert backend is not None
    assert backend.name == "onnxruntime"
    assert reason.endswith("builds for cpu on this machine")


@pytest.mark.parametrize("name", ["agx-orin", "h100"])
def test_what_only_the_device_builds_is_said(name: str):
    backend, reason = builder_for(load_target(name))
    assert backend is None
    assert "trtexec --stronglyTyped" in reason


def test_a_builder_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    absent = BackendStatus(
        can_build=False, can_run=False, detail="is not installed", hint="pip install 'lsp-deploy[tensorrt-rtx]'"
    )
    monkeypatch.setattr(TensorRtRtxBackend, "status", lambda self, target: absent)
    monkeypatch.setattr(tensorrt_backend, "first_gpu", lambda: None)
    backend, reason = builder_for(load_target("a100"))
    assert backend is None
    assert reason == (
        "no engine for a100 can be built on this machine: "
        "tensorrt_rtx is not installed: pip install 'lsp-deploy[tensorrt-rtx]'; "
        "tensorrt builds on an NVIDIA GPU of compute capability 8.0, and here is none: copy model.onnx to a "
        "machine with an NVIDIA GPU of compute capability 8.0 and build it there with trtexec --stronglyTyped"
    )

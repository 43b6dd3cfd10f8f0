"""TensorRT-RTX itself builds these; where it is not installed they are skipped."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lsp_deploy.engines.protocol import BuildOptions, EngineBuildError, read_sidecar
from lsp_deploy.engines.tensorrt_common.gpu import first_gpu
from lsp_deploy.engines.tensorrt_rtx import backend as backend_module
from lsp_deploy.engines.tensorrt_rtx.backend import TensorRtRtxBackend
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of
from lsp_deploy.hardware.target import load_target

installed = importlib.util.find_spec("tensorrt_rtx") is not None
needs_builder = pytest.mark.skipif(not installed, reason="tensorrt_rtx is not installed")
no_gpu = pytest.mark.skipif(first_gpu() is not None, reason="this machine has a GPU")
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
PYTHON = sys.executable  # before a test puts something else in its place
SHAPES = BuildOptions(min_shapes={"x": (1, 4, 64)}, opt_shapes={"x": (8, 4, 64)}, max_shapes={"x": (32, 4, 64)})


@pytest.fixture
def fake_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a shell script in the child's place; its fourth argument is the request."""

    def install(body: str) -> None:
        script = tmp_path / "child.sh"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return install


@needs_builder
def test_builds_for_the_target_and_says_what_it_built(make_model, tmp_path: Path):
    engine = tmp_path / "a100.engine"
    info = TensorRtRtxBackend().build(make_model(), engine, load_target("a100"), SHAPES)
    assert (info.backend, info.target, info.compute_capability) == ("tensorrt_rtx", "a100", "8.0")
    assert info.file == "a100.engine"
    assert info.size_bytes == engine.stat().st_size > 64 * 96 * 4
    assert info.sha256 == sha256_of(engine)
    assert set(info.versions) == {"tensorrt_rtx"}
    assert info.memory["weights"] >= 64 * 96 * 4
    assert info.options == SHAPES
    assert not any("could not be read" in warning for warning in info.warnings)
    (gemm,) = [layer for layer in info.layers if "linear" in layer.onnx_nodes and layer.kind != "kgen"]
    assert gemm.precision == "fp32"
    assert read_sidecar(engine) == info
    again = tmp_path / "again.engine"
    TensorRtRtxBackend().build(tmp_path / "model.onnx", again, load_target("a100"), SHAPES)
    assert again.read_bytes() == engine.read_bytes()


@needs_builder
def test_an_int8_product_is_an_int8_gemm(make_model, tmp_path: Path):
    options = SHAPES.model_copy(update={"sparse_weights": True})
    info = TensorRtRtxBackend().build(make_model("int8"), tmp_path / "e", load_target("a100"), options)
    gemms = [layer for layer in info.layers if layer.kind == "gemm"]
    assert [gemm.precision for gemm in gemms] == ["int8"]
    assert "linear" in gemms[0].onnx_nodes
    assert any("2:4 zeros gain nothing" in warning for warning in info.warnings)


@needs_builder
def test_the_target_is_told_to_the_builder(make_model, tmp_path: Path):
    """SM80 has no fp8, SM89 has: without a target the builder would take the model for both."""
    model = make_model("fp8")
    with pytest.raises(EngineBuildError, match=r"refuses the model: Cannot compile for target\(s\) sm80.*fp8_e4m3$"):
        TensorRtRtxBackend().build(model, tmp_path / "a100.engine", load_target("a100"), SHAPES)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    info = TensorRtRtxBackend().build(model, tmp_path / "l4.engine", load_target("l4"), SHAPES)
    assert [layer.precision for layer in info.layers if layer.kind == "gemm"] == ["fp8"]


@needs_builder
def test_a_refused_node_is_named(make_model, tmp_path: Path):
    with pytest.raises(EngineBuildError, match=r"'linear' for Turing \(SM75\): FP32 GEMM is not supported"):
        TensorRtRtxBackend().build(make_model(), tmp_path / "e", load_target("t4"), SHAPES)


@needs_builder
@pytest.mark.parametrize("asked", [{"hardware_compatibility": "ampere-plus"}, {"version_compatible": True}])
def test_an_engine_that_would_not_be_what_was_asked_is_refused(make_model, tmp_path: Path, asked: dict[str, Any]):
    with pytest.raises(EngineBuildError, match=r"TensorRT-RTX has no engines for other GPUs or later releases"):
        TensorRtRtxBackend().build(make_model(), tmp_path / "e", load_target("a100"), SHAPES.model_copy(update=asked))


@needs_builder
@pytest.mark.parametrize("asked", ["refittable", "strip_weights"])
def test_what_it_builds_with_a_gpu_only_is_said(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
):
    monkeypatch.setattr("lsp_deploy.engines.tensorrt_rtx.backend.first_gpu", lambda: None)
    options = SHAPES.model_copy(update={asked: True})
    with pytest.raises(EngineBuildError, match="only where an NVIDIA GPU is; leave refittable and strip_weights out"):
        TensorRtRtxBackend().build(make_model(), tmp_path / "e", load_target("a100"), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(), "input x is dynamic, .x4x64, and has no shapes to build for"),
        (BuildOptions(opt_shapes={"z": (1, 4, 64)}), "shapes are given for z, but the inputs are x"),
        (BuildOptions(opt_shapes={"x": (1, 4, 65)}), "input x is .x4x64, which 1x4x65 does not fit"),
        (SHAPES.model_copy(update={"min_shapes": {"x": (9, 4, 64)}}), "not in ascending order"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make_model, tmp_path: Path, options: BuildOptions, message: str):
    with pytest.raises(EngineBuildError, match=message):
        TensorRtRtxBackend().build(make_model(), tmp_path / "e", load_target("a100"), options)


def test_a_target_of_another_compute_capability_is_not_served(make_model, tmp_path: Path):
    backend = TensorRtRtxBackend()
    assert backend.serves(load_target("a100"))
    assert not backend.serves(load_target("agx-orin"))
    assert not backend.serves(load_target("cpu"))
    assert not backend.serves(load_target("a100").model_copy(update={"compute_capability": "9.0"}))
    with pytest.raises(EngineBuildError, match="does not build for h100"):
        backend.build(make_model(), tmp_path / "e", load_target("h100"), SHAPES)


@posix
def test_a_crash_is_an_error_that_names_the_node(make_model, tmp_path: Path, fake_child):
    log = '{"severity": "VERBOSE", "text": "Parsing node: blocks.0 [BlockSparseLinear]"}'
    fake_child(
        f"""folder=$(dirname "$4"); echo '{log}' > "$folder/log.jsonl"
        echo 'terminate called without an active exception'; kill -ABRT $$"""
    )
    expected = r"ended without an answer \(SIGABRT\), at node blocks.0 \(BlockSparseLinear\): terminate called without"
    with pytest.raises(EngineBuildError, match=expected):
        TensorRtRtxBackend().build(make_model(), tmp_path / "e", load_target("a100"), SHAPES)
    assert not (tmp_path / "e").exists()


@posix
def test_a_build_that_takes_too_long_is_ended(make_model, tmp_path: Path, fake_child):
    fake_child(f"echo $$ > {tmp_path}/pid; exec sleep 600")
    options = SHAPES.model_copy(update={"timeout_seconds": 2.0})
    with pytest.raises(EngineBuildError, match="took longer than 2 s and was ended"):
        TensorRtRtxBackend().build(make_model(), tmp_path / "e", load_target("a100"), options)
    assert not _alive(int((tmp_path / "pid").read_text()))


@posix
def test_ctrl_c_ends_the_child(make_model, tmp_path: Path, fake_child):
    fake_child(f"trap '' INT; echo $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid; exec sleep 600")
    program = (
        "import signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
        "from lsp_deploy.engines.protocol import BuildOptions\n"
        "from lsp_deploy.engines.tensorrt_rtx.backend import TensorRtRtxBackend\n"
        "from lsp_deploy.hardware.target import load_target\n"
        "sys.executable = sys.argv[1]\n"
        "TensorRtRtxBackend().build(Path(sys.argv[2]), Path(sys.argv[3]), load_target('a100'), BuildOptions())\n"
    )
    arguments = [str(tmp_path / "child.sh"), str(make_model()), str(tmp_path / "e")]
    process = subprocess.Popen([PYTHON, "-c", program, *arguments], stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    while not pid.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert not _alive(int(pid.read_text()))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs_builder
def test_the_parser_finds_the_library_by_its_unversioned_name(tmp_path: Path):
    environment = backend_module._environment(tmp_path)
    first = Path(environment["LD_LIBRARY_PATH"].split(os.pathsep)[0])
    link = first / "libtensorrt_rtx.so"
    assert link.is_symlink()
    assert link.resolve().name.startswith("libtensorrt_rtx.so.")
    assert link.resolve().is_file()


@needs_builder
def test_status_where_it_is_installed():
    status = TensorRtRtxBackend().status()
    assert status.can_build
    assert status.version is not None
    assert "SM75" in status.detail


def test_status_where_it_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda name: None)
    status = TensorRtRtxBackend().status()
    assert not status.can_build
    assert status.hint == "pip install 'lsp-deploy[tensorrt-rtx]'"


@no_gpu
def test_loading_says_which_gpu_is_missing(tmp_path: Path):
    engine = tmp_path / "e.engine"
    with pytest.raises(UserError, match="does not exist"):
        TensorRtRtxBackend().load(engine)
    engine.write_bytes(b"engine")
    with pytest.raises(UserError, match="runs on an NVIDIA GPU, and this machine has none"):
        TensorRtRtxBackend().load(engine)

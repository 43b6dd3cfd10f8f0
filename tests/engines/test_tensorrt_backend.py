"""The TensorRT backend from the ONNX file to numbers, with a fake TensorRT and a fake CUDA (`tensorrt_fakes/`).

That the calls exist in the real ones is `test_tensorrt_contract.py`'s. Nothing here has run on a GPU.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tensorrt_machine import A100

from lsp_deploy.engines.backends import builder_for
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.engines.profiler import profile
from lsp_deploy.engines.protocol import BuildOptions, EngineBuildError, EngineInfo, read_sidecar
from lsp_deploy.engines.tensorrt import backend as backend_module
from lsp_deploy.engines.tensorrt.backend import TensorRtBackend
from lsp_deploy.engines.tensorrt_common import loading
from lsp_deploy.engines.tensorrt_common.gpu import Gpu
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import load_target
from lsp_deploy.model import load_model

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell"),
    pytest.mark.usefixtures("machine"),
]
SHAPES = BuildOptions(min_shapes={"x": (1, 4, 64)}, opt_shapes={"x": (2, 4, 64)}, max_shapes={"x": (8, 4, 64)})
VERSIONS = ("10.3.0", "11.4.0")


def build(model: Path, options: BuildOptions = SHAPES, name: str = "e.engine") -> tuple[Path, EngineInfo]:
    path = model.with_name(name)
    return path, TensorRtBackend().build(model, path, load_target("a100"), options)


def reference(model: Path, x: np.ndarray) -> np.ndarray:
    with OnnxRuntimeEngine.from_model(load_model(model), threads=1) as engine:
        return engine.run({"x": x})["y"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_says_what_it_built(make_model, machine: pytest.MonkeyPatch, version: str):
    machine.setenv("FAKE_TENSORRT", version)
    engine, info = build(make_model("int8"))
    assert read_sidecar(engine) == info
    assert (info.backend, info.target, info.compute_capability, info.device) == ("tensorrt", "a100", "8.0", A100.name)
    assert info.versions == {"tensorrt": version}
    assert info.memory == {"activations": 4096, "weights": 24576}
    assert info.warnings == ["a warning"]
    norm, gemm = info.layers
    assert (norm.kind, norm.precision, norm.onnx_nodes) == ("kgen", "fp32", ["norm"])
    assert (gemm.kind, gemm.precision, gemm.onnx_nodes) == ("gemm", "int8", ["linear"])
    assert gemm.tactic == "sm80_xmma_gemm_i8f32_i8i32_tn_n"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_layer_that_is_not_what_was_asked_is_a_warning_with_its_name(
    make_model, machine: pytest.MonkeyPatch, version: str
):
    machine.setenv("FAKE_TENSORRT", version)
    machine.setenv("FAKE_TENSORRT_DENSE", "1")
    _, info = build(make_model("int8"))
    assert info.warnings[1:] == ["linear is asked to be int8 and runs in fp32 (gemm)"]
    _, info = build(with_two_four(make_model()), SHAPES.model_copy(update={"sparse_weights": True}))
    assert info.sparse_tactics is not None
    assert (info.sparse_tactics.eligible, info.sparse_tactics.chosen, info.sparse_tactics.layers) == (1, 0, [])
    assert info.warnings[1:] == ["linear has 2:4 weights and runs a dense kernel: the zeros gain no speed"]


def test_sparse_kernels_that_were_chosen_are_named(make_model):
    _, info = build(with_two_four(make_model()), SHAPES.model_copy(update={"sparse_weights": True}))
    assert info.sparse_tactics is not None
    assert (info.sparse_tactics.chosen, info.sparse_tactics.layers) == (1, ["linear + bias_add"])
    assert info.warnings == ["a warning"]


def with_two_four(path: Path) -> Path:
    model = onnx.load(path)
    (weight,) = [one for one in model.graph.initializer if one.name == "weight"]
    values = numpy_helper.to_array(weight).copy()
    values[0::4] = values[1::4] = 0
    weight.CopyFrom(numpy_helper.from_array(values, "weight"))
    onnx.save(model, path)
    return path


def test_options_reach_the_builder(make_model, tmp_path: Path):
    (tmp_path / "lib.so").write_bytes(b"")
    options = SHAPES.model_copy(
        update={
            "workspace_mb": 64,
            "optimization_level": 5,
            "version_compatible": True,
            "hardware_compatibility": "ampere-plus",
            "refittable": True,
            "plugins": (tmp_path / "lib.so",),
        }
    )
    engine, info = build(make_model(), options)
    head = engine.read_bytes().partition(b"\n")[0].decode()
    assert '"flags": ["REFIT", "VERSION_COMPATIBLE"], "workspace": 67108864, "level": 5' in head
    assert '"compatible": "AMPERE_PLUS"' in head
    assert info.options is not None
    assert info.options.plugins == (Path("lib.so"),)  # no folder of this machine
    with TensorRtBackend().load(engine) as loaded:
        assert loaded.run({"x": np.zeros((1, 4, 64), np.float32)})["y"].shape == (1, 4, 96)


def test_what_the_version_does_not_have_is_refused(make_model, tmp_path: Path, machine: pytest.MonkeyPatch):
    options = SHAPES.model_copy(update={"hardware_compatibility": "same-compute-capability"})
    with pytest.raises(EngineBuildError, match=r"tensorrt 10.3.0 has no HardwareCompatibilityLevel.SAME_COMPUTE_CAPAB"):
        build(make_model(), options)
    machine.setenv("FAKE_TENSORRT", "10.13.3")
    assert build(make_model(), options)[1].options == options
    with pytest.raises(EngineBuildError, match=r"tensorrt 10.13.3 cannot load the plugin library .*absent.so"):
        build(make_model(), SHAPES.model_copy(update={"plugins": (tmp_path / "absent.so",)}))


def test_a_refused_node_is_named_and_nothing_is_left(make_model, tmp_path: Path):
    model = onnx.load(make_model())
    model.graph.node.append(helper.make_node("Odd", ["x"], ["z"], "odd", domain="lsp"))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(EngineBuildError, match=r"TensorRT refuses the model: node odd \(Odd\): Plugin not found"):
        build(tmp_path / "model.onnx")
    assert not (tmp_path / "e.engine").exists()


def test_a_plugin_in_the_working_folder_needs_no_path(make_model, tmp_path: Path, machine: pytest.MonkeyPatch):
    machine.chdir(tmp_path)
    Path("lib.so").write_bytes(b"")
    engine, _ = build(make_model(), SHAPES.model_copy(update={"plugins": (Path("lib.so"),)}))
    assert f'"plugins": ["{tmp_path}/lib.so"]'.encode() in engine.read_bytes()
    with loading.load_engine("tensorrt", engine, plugins=(Path("lib.so"),)) as loaded:
        assert "x" in loaded.inputs


def test_a_library_that_the_engine_holds_is_not_loaded_beside_it(make_model, tmp_path: Path, cuda):
    library = tmp_path / "held.so"
    library.touch()
    engine, _ = build(make_model(), SHAPES.model_copy(update={"plugins": (library,)}))
    with loading.load_engine("tensorrt", engine, plugins=(library,)) as loaded:
        assert "x" in loaded.inputs
    assert ("tensorrt", library) not in loading._LOADED


def test_what_was_measured_is_kept_and_used_again(make_model, tmp_path: Path):
    cache = tmp_path / "cache"
    options = SHAPES.model_copy(update={"timing_cache": cache})
    build(make_model(), options)
    assert cache.read_bytes() == b"GPU 0:measured."
    build(make_model(), options)
    assert cache.read_bytes() == b"GPU 0:measured.measured."
    cache.write_bytes(b"GPU 1:measured.")
    _, info = build(make_model(), options)
    assert "the timing cache cache is of another GPU or version: everything was measured anew" in info.warnings
    assert cache.read_bytes() == b"GPU 0:measured."
    cache.unlink()
    cache.mkdir()
    engine, info = build(make_model(), options)
    assert engine.is_file()
    assert re.fullmatch(r"the timing cache cache was not written: [\w ]+", info.warnings[-1]), "names no folder"


def test_engines_may_share_a_plugin_library(make_model, tmp_path: Path, cuda):
    engine, _ = build(make_model())
    (tmp_path / "lib.so").touch()
    for _ in range(2):
        with loading.load_engine("tensorrt", engine, plugins=(tmp_path / "lib.so",)) as loaded:
            assert "x" in loaded.inputs
    with pytest.raises(UserError, match=r"cannot load the plugin library .*absent\.so"):
        loading.load_engine("tensorrt", engine, plugins=(tmp_path / "lib.so", tmp_path / "absent.so"))


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_answers_are_those_of_onnx_runtime(make_model, x: np.ndarray, cuda, kind: str):
    model = make_model(kind)
    engine, _ = build(model)
    with TensorRtBackend().load(engine) as loaded:
        assert loaded.inputs["x"].shape == ("?", 4, 64)
        for batch in (3, 3, 3, 1, 2, 2):
            y = loaded.run({"x": x[:batch]})["y"]
            np.testing.assert_allclose(y, reference(model, x[:batch]), rtol=1e-3, atol=1e-3)
        with pytest.raises(UserError, match=r"e.engine: it was not built for x of shape 9x4x64"):
            loaded.run({"x": np.zeros((9, 4, 64), np.float32)})
        with pytest.raises(UserError, match=r"input x of e.engine: expected the shape \?x4x64, got 3x5x64"):
            loaded.run({"x": np.zeros((3, 5, 64), np.float32)})
        assert loaded.run({"x": x})["y"].shape == (3, 4, 96)
    # The first run at a shape launches kernels, those that follow a graph; everything is given back.
    assert cuda.launches == {"kernel": 4, "graph": 3}
    assert (cuda.memory, cuda.handles) == ({}, {})


def test_a_gpu_that_is_full_is_a_sentence_and_leaves_nothing(make_model, x: np.ndarray, cuda, machine):
    model = make_model()
    engine, _ = build(model)
    with TensorRtBackend().load(engine) as loaded:
        machine.setattr(cuda, "capacity", x.nbytes)  # enough for x, not for y
        for _ in range(2):
            with pytest.raises(UserError, match=r"e.engine: the GPU has no memory for y of shape 3x4x96: cudaMalloc"):
                loaded.run({"x": x})
            assert cuda.memory == {}
        machine.setattr(cuda, "capacity", 2 * (x.nbytes + 3 * 4 * 96 * 4))
        np.testing.assert_allclose(loaded.run({"x": x})["y"], reference(model, x), rtol=1e-5, atol=1e-5)


def test_without_a_graph_it_runs_and_says_so(make_model, x: np.ndarray, cuda):
    cuda.refuse.add("cudaStreamBeginCapture")
    model = make_model()
    engine, _ = build(model)
    with TensorRtBackend().load(engine) as loaded:
        for _ in range(2):
            np.testing.assert_allclose(loaded.run({"x": x})["y"], reference(model, x), rtol=1e-5, atol=1e-5)
        assert loaded.describe().warnings[1:] == [
            "runs without a CUDA graph, each launch costs its time: "
            "cudaStreamBeginCapture: cudaErrorStreamCaptureUnsupported"
        ]
    assert cuda.launches == {"kernel": 2, "graph": 0}


def test_kernels_that_cannot_be_captured_are_launched_one_by_one(make_model, x: np.ndarray, cuda, machine):
    """TensorRT-RTX says so beforehand."""
    engine, _ = build(make_model())
    with TensorRtBackend().load(engine) as loaded:
        machine.setattr(type(loaded._context), "is_stream_capturable", lambda self, stream: False, raising=False)
        for _ in range(2):
            loaded.run({"x": x})
        assert loaded.describe().warnings[-1].endswith("its kernels cannot be captured")
    assert cuda.launches == {"kernel": 2, "graph": 0}


def test_a_failed_kernel_ends_the_capture(cuda):
    from lsp_deploy.engines.tensorrt_common.cuda import Cuda, CudaError

    opened = Cuda()

    def fail() -> None:
        raise CudaError("no")

    with pytest.raises(CudaError, match="no"):
        opened.capture(fail)
    assert list(cuda.handles.values()) == ["stream"]  # no graph is left
    assert opened.capture(lambda: None) > 0  # the stream captures again


def test_a_profile_is_of_the_time_on_the_gpu(make_model, x: np.ndarray, cuda):
    engine, _ = build(make_model())
    with TensorRtBackend().load(engine) as loaded:
        (one,) = profile({"e": loaded}, {"x": x}, duration=0.02, warm_up=0.0, block_seconds=0.005).values()
    assert one.device == A100.name
    assert one.clock == "CUDA events around one run; inputs and outputs stay on the GPU"
    assert one.batch == 3
    assert cuda.launches["graph"] >= one.runs
    assert (cuda.memory, cuda.handles) == ({}, {})


def test_an_engine_without_weights_takes_them_from_the_model(make_model, x: np.ndarray):
    model = make_model()
    engine, _ = build(model, SHAPES.model_copy(update={"strip_weights": True}))
    assert b'"flags": ["REFIT_IDENTICAL", "STRIP_PLAN"]' in engine.read_bytes()
    with pytest.raises(UserError, match="has no weights in it; name the ONNX file that it was built from"):
        TensorRtBackend().load(engine)
    with TensorRtBackend().load(engine, weights=model) as loaded:
        np.testing.assert_allclose(loaded.run({"x": x})["y"], reference(model, x), rtol=1e-5, atol=1e-5)


def test_a_refittable_engine_takes_other_weights(make_model, x: np.ndarray):
    engine, _ = build(make_model(), SHAPES.model_copy(update={"refittable": True}))
    other = make_model(name="other.onnx", seed=1)
    with TensorRtBackend().load(engine, weights=other) as loaded:
        np.testing.assert_allclose(loaded.run({"x": x})["y"], reference(other, x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_loaded_is_said(make_model, tmp_path: Path, machine: pytest.MonkeyPatch):
    backend = TensorRtBackend()
    with pytest.raises(UserError, match="does not exist; build the engine first"):
        backend.load(tmp_path / "absent")
    (tmp_path / "odd.engine").write_bytes(b"odd")
    with pytest.raises(UserError, match=r"10.3.0 cannot load .*odd.engine on NVIDIA A100.*Serialization \(bad magic\)"):
        backend.load(tmp_path / "odd.engine")
    engine, _ = build(make_model())
    machine.setattr(loading, "first_gpu", lambda: Gpu("NVIDIA L4", "8.9", 58))
    with pytest.raises(UserError, match=r"is built for compute capability 8.0; this machine's NVIDIA L4 has 8.9"):
        backend.load(engine)
    machine.setattr(loading, "first_gpu", lambda: None)
    with pytest.raises(UserError, match=r"runs on an NVIDIA GPU of compute capability 8.0, and this machine has none"):
        backend.load(engine)


def test_the_gpu_that_is_here_makes_tensorrt_the_builder(machine: pytest.MonkeyPatch):
    assert builder_for(load_target("h100"))[0] is None
    machine.setattr(backend_module, "first_gpu", lambda: Gpu("NVIDIA H100 80GB HBM3", "9.0", 132))
    backend, reason = builder_for(load_target("h100"))
    assert backend is not None
    assert (backend.name, reason) == ("tensorrt", "tensorrt of unknown version builds for h100 on this machine")


def test_only_the_targets_gpu_builds_for_it(make_model, tmp_path: Path, machine: pytest.MonkeyPatch):
    backend, a100 = TensorRtBackend(), load_target("a100")
    assert backend.status(a100).can_build
    assert backend.status(load_target("h100")).detail == (
        f"builds on an NVIDIA GPU of compute capability 9.0, and here is {A100.name}, 8.0"
    )
    with pytest.raises(EngineBuildError, match=r"copy model.onnx to a machine with an NVIDIA GPU of compute capab"):
        backend.build(make_model(), tmp_path / "e", load_target("h100"), SHAPES)
    machine.setattr(backend_module, "first_gpu", lambda: Gpu("NVIDIA A30", "8.0", 56))
    _, info = build(make_model())
    assert any("built on NVIDIA A30 with 56 multiprocessors, where" in warning for warning in info.warnings)
    machine.setattr(backend_module.importlib.util, "find_spec", lambda name: None)
    assert backend.status(a100).detail == "is not installed"
    machine.setattr(backend_module, "first_gpu", lambda: None)
    status = backend.status()
    assert (status.can_build, status.can_run) == (False, False)
    assert status.detail == "builds on an NVIDIA GPU, and here is none"

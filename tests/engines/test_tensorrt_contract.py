"""The TensorRT code against the real bindings of each version it is for, without TensorRT's libraries and a GPU.

The bindings' wheels, about 1 MB each, need nine C symbols of the libraries; stubs have them. What the code calls is in
`tensorrt_contract.py`, which runs in a process of its own for each version.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TENSORRT = {
    "JetPack 6.2": "tensorrt-cu12-bindings==10.3.0",
    "10.13": "tensorrt-cu12-bindings==10.13.3.9",
    "JetPack 7.2": "tensorrt-cu12-bindings==10.16.1.11",
    "11": "tensorrt-cu13-bindings==11.4.0.106",
}
CUDA = {"12": "cuda-bindings==12.9.5", "13": "cuda-bindings==13.5.0"}
SCRIPT = Path(__file__).with_name("tensorrt_contract.py")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


@pytest.fixture
def kept(pytestconfig: pytest.Config) -> Path:
    """A folder that outlives the run; wheels are fetched once."""
    return pytestconfig.cache.mkdir("tensorrt-bindings")


@pytest.mark.parametrize("requirement", TENSORRT.values(), ids=TENSORRT.keys())
def test_every_name_and_call_is_in_the_real_bindings(requirement: str, kept: Path, tmp_path: Path):
    wheel = unpacked(requirement, kept)
    stubs = stub_libraries(tmp_path, requirement.partition("==")[2].partition(".")[0])
    called = contract("tensorrt_bindings", "tensorrt", "no", tmp_path, [wheel], libraries=stubs)
    assert {"IBuilderConfig.set_timing_cache", "OnnxParserRefitter.refit_from_file"} <= called
    assert {"EngineInspector.get_engine_information", "IExecutionContext.execute_async_v3"} <= called


def test_and_in_those_of_tensorrt_rtx(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    called = contract("tensorrt_rtx", "tensorrt_rtx", "no", tmp_path, [])
    assert {"IBuilderConfig.set_compute_capability", "IExecutionContext.execute_async_v3"} <= called


@pytest.mark.parametrize("requirement", CUDA.values(), ids=CUDA.keys())
def test_every_cuda_function_is_in_the_real_runtime_bindings(requirement: str, kept: Path, tmp_path: Path):
    paths = [unpacked(requirement, kept), unpacked("cuda-pathfinder==1.9.1", kept)]
    called = contract("-", "-", "yes", tmp_path, paths)
    assert {"cudaGraphInstantiate", "cudaEventElapsedTime", "cudaMemcpyAsync"} <= called


def contract(
    module: str, name: str, with_cuda: str, folder: Path, paths: list[Path], libraries: Path | None = None
) -> set[str]:
    """Run the contract in a fresh process and return the names of what was called."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, str(SCRIPT), module, name, with_cuda, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.split())


def unpacked(requirement: str, kept: Path) -> Path:
    """Return the folder of a wheel's content, fetched with pip the first time; skips where it cannot be had."""
    folder = kept / f"{requirement}-cp{sys.version_info[0]}{sys.version_info[1]}"
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_suffix(".part")
            shutil.rmtree(partial, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run(
                [*pip, "--dest", str(partial), requirement], capture_output=True, text=True, check=False, timeout=300
            )
            if done.returncode != 0:
                pytest.skip(
                    f"pip cannot fetch {requirement}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}"
                )
            for wheel in list(partial.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(partial)
                wheel.unlink()
            partial.rename(folder)
    return folder


def stub_libraries(folder: Path, major: str) -> Path:
    """Compile libraries that have the symbols that the bindings ask for, and nothing behind them."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the stub libraries")
    libraries = folder / "stubs"
    libraries.mkdir()
    source = libraries / "stub.c"
    for name, symbols in {"nvinfer": SYMBOLS, "nvonnxparser": (), "nvinfer_plugin": ()}.items():
        file = f"lib{name}.so.{major}"
        source.write_text("\n".join(f"void* {symbol}(void) {{ return 0; }}" for symbol in symbols) + "\n")
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(libraries / file), str(source)]
        subprocess.run(command, check=True)
    return libraries

"""The C++ plugin, built for this CPU and driven as TensorRT would.

It needs TensorRT's headers, which no registry has: TENSORRT_INCLUDE_DIR names their folder.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from block_sparse_cases import Case, case
from cuda_emulation import source_hash
from cuda_toolkit import find_nvcc

from lsp_deploy.model import save_model
from lsp_deploy.plugins.tensorrt import python_plugin

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "tensorrt"
HEADERS = os.environ.get("TENSORRT_INCLUDE_DIR")
TOOLKITS = [Path("/usr/local/cuda"), *(nvcc.parents[1] for nvcc in (find_nvcc(),) if nvcc is not None)]
CUDA_HEADERS = next((path / "include" for path in TOOLKITS if (path / "include" / "cuda_runtime_api.h").exists()), None)

needs_headers = pytest.mark.skipif(
    HEADERS is None or CUDA_HEADERS is None,
    reason="TENSORRT_INCLUDE_DIR does not name TensorRT's headers, or there are none of CUDA",
)
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="no cmake or g++")

# nvinfer1::DataType and PluginFieldType
TYPES = {"float32": 0, "float16": 1, "int8": 2, "bfloat16": 7}
FIELD_TYPES = {"float32": 1, "int32": 5, "int8": 6}


class Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        return cls(TYPES[array.dtype.name], array.ndim, (ctypes.c_int64 * 8)(*array.shape), array.ctypes.data)


class Info(ctypes.Structure):
    _fields_ = (("tactics", ctypes.c_int32), ("timing_cache_id", ctypes.c_char * 64))


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("tensorrt_plugin"))


@pytest.fixture(scope="module")
def plugin(folder: Path) -> Path:
    """The plugin with emulated kernels."""
    sources = "".join(path.read_text() for path in sorted(SOURCES.rglob("*")) if path.suffix in (".h", ".cpp", ".txt"))
    kernels = source_hash("emulation", "include", "src", extra=str(HEADERS) + sources)
    target = folder / f"plugin-{kernels}.so"
    if not target.exists():
        build = folder / "build"
        shutil.rmtree(build, ignore_errors=True)
        options = ["-DLSP_CUDA_EMULATION=ON", f"-DTENSORRT_INCLUDE_DIR={HEADERS}", f"-DCUDA_INCLUDE_DIR={CUDA_HEADERS}"]
        subprocess.run(["cmake", "-S", SOURCES, "-B", build, *options], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", build, "-j2"], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(build / "liblsp_block_sparse.so", target)
    return target


@pytest.fixture(scope="module")
def driver_path(folder: Path) -> Path:
    source = Path(__file__).parent / "native" / "drive_tensorrt_plugin.cpp"
    target = folder / "driver.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-deprecated-declarations", "-shared", "-fPIC"]
    includes = ["-isystem", str(HEADERS), "-isystem", str(CUDA_HEADERS)]
    subprocess.run(["g++", *flags, *includes, source, "-ldl", "-o", target], check=True)
    return target


Drive = Callable[..., tuple[np.ndarray, Info]]


@pytest.fixture
def drive(driver_path: Path, plugin: Path) -> Drive:
    """Return a call that runs one case in a tactic; RuntimeError where a step fails."""
    function = ctypes.CDLL(str(driver_path)).drive
    function.restype = ctypes.c_char_p

    def run(one: Case, tactic: int, change: dict[str, Any] | None = None) -> tuple[np.ndarray, Info]:
        attributes = {**python_plugin._attributes(one.operator), **(change or {})}
        fields = [
            Field(name.encode(), data.ctypes.data, FIELD_TYPES[data.dtype.name], data.size)
            for name, data in attributes.items()
        ]
        arrays = [one.x, one.values, one.bias, one.scale, *([] if one.residual is None else [one.residual])]
        y = np.full((*one.x.shape[:-1], one.operator.N), 77, one.operator.out_type.numpy())
        inputs, output, info = [Tensor.of(array) for array in arrays], Tensor.of(y), Info()
        error = function(
            str(plugin).encode(),
            (Field * len(fields))(*fields),
            len(fields),
            (Tensor * len(inputs))(*inputs),
            len(inputs),
            ctypes.byref(output),
            tactic,
            ctypes.byref(info),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return y, info

    return run


FORMS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16", "x_type": "float16", "out_type": "float16", "activation": "gelu"},
    "bfloat16": {"dtype": "bfloat16", "x_type": "bfloat16", "out_type": "bfloat16", "residual": True},
    "int8": {"dtype": "int8", "x_type": "int8", "out_type": "float16", "residual": True, "activation": "relu"},
    "int8 to int8": {"dtype": "int8", "x_type": "int8", "out_type": "int8", "out_offset": 0.5},
    "no block": {"dtype": "float16", "x_type": "float16", "out_type": "float16", "survives": np.zeros((6, 5), bool)},
}


def made(form: str, **options: Any) -> Case:
    return case(K=96, N=80, **{**FORMS[form], **options}).in_layout("bsl16.v1")


@needs_headers
@needs_cmake
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_tactic_of_a_stored_layer_computes_it(drive: Drive, form: str) -> None:
    one = made(form)
    tactics = drive(one, 0)[1].tactics
    assert tactics > 1
    for tactic in range(tactics + 1):
        y = drive(one, tactic)[0].astype(np.float64)
        expected = one.expected().astype(np.float64)
        if one.operator.out_type == ir.DataType.INT8:
            assert np.abs(y - expected).max() <= 1
        else:
            rounding = 2**-7 if form == "bfloat16" else 2**-10
            np.testing.assert_allclose(y, expected, rtol=rounding, atol=rounding)


@needs_headers
@needs_cmake
def test_the_timing_cache_tells_layers_apart(drive: Drive) -> None:
    def identity(one: Case) -> bytes:
        return drive(one, 0)[1].timing_cache_id

    survives = np.eye(6, 5, dtype=bool)
    others = [
        made("float16", survives=survives),
        made("float16", survives=np.roll(survives, 1, axis=0)),
        made("float16", survives=survives, activation="none"),
        made("bfloat16", survives=survives),
    ]
    assert len({identity(one) for one in others}) == len(others)
    assert identity(others[0]) == identity(made("float16", survives=survives, seed=1))  # other values, same work


@needs_headers
@needs_cmake
def test_what_is_wrong_is_said(drive: Drive) -> None:
    one = made("float16")
    with pytest.raises(RuntimeError, match=r"createPlugin: .*layer: its values are in layout canonical"):
        drive(one, 0, {"layout": np.frombuffer(b"canonical\0", np.int8)})
    with pytest.raises(RuntimeError, match=r"createPlugin: .*attribute K has another type"):
        drive(one, 0, {"K": np.zeros(2, np.int32)})
    with pytest.raises(RuntimeError, match=r"configurePlugin: .*activation swish is unknown"):
        drive(one, 0, {"activation": np.frombuffer(b"swish\0", np.int8)})
    with pytest.raises(RuntimeError, match=r"configurePlugin: .*k_idx must ascend"):
        drive(one, 0, {"k_idx": np.array(one.operator.k_idx, np.int32)[::-1].copy()})
    with pytest.raises(RuntimeError, match=r"configurePlugin: .*its values have another shape"):
        drive(replace(one, values=one.values[:-1]), 0)
    with pytest.raises(RuntimeError, match=r"setTactic: .*there is no such tactic"):
        drive(one, 1000)
    with pytest.raises(RuntimeError, match="supportsFormatCombination"):
        drive(replace(one, values=one.values.astype(np.float32)), 0)


@needs_headers
@needs_cmake
def test_it_registers_itself_in_a_tensorrt_of_its_headers_alone(driver_path: Path, plugin: Path) -> None:
    """In another major version the registry has its functions in other places: calling them would end the process."""

    assert told_registry(driver_path, plugin, version=0, loads=False) == "BlockSparseLinear 1 lsp\n"
    assert told_registry(driver_path, plugin, version=10701, loads=True) == ""  # TensorRT-RTX 1.7.1


@needs_headers
@needs_cmake
def test_load_library_finds_it_unregistered(driver_path: Path, plugin: Path) -> None:
    """TensorRT refuses a library whose creators are there already."""
    told = told_registry(driver_path, plugin, version=0, loads=True)
    assert told == "BlockSparseLinear 1 lsp\ntaken back\n"


@needs_headers
@needs_cmake
def test_without_tensorrt_it_says_that_it_is_not_registered(plugin: Path) -> None:
    command = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(plugin)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "opened before TensorRT was loaded" in said


def told_registry(driver: Path, plugin: Path, *, version: int, loads: bool) -> str:
    """Open the plugin in a process of its own."""
    script = (
        "import ctypes, sys; driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL);"
        "driver.told_registry.restype = ctypes.c_char_p;"
        "print(driver.told_registry(sys.argv[2].encode(), int(sys.argv[3]), sys.argv[4] == 'True').decode(), end='')"
    )
    command = [sys.executable, "-c", script, str(driver), str(plugin), str(version), str(loads)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_headers
@needs_cmake
def test_no_symbol_is_left_to_tensorrt(plugin: Path) -> None:
    symbols = subprocess.run(["nm", "-D", plugin], check=True, capture_output=True, text=True).stdout
    defined = [line.split()[-1] for line in symbols.splitlines() if " T " in line]
    assert defined == ["getCreators", "setLoggerFinder"]
    for name in ("getPluginRegistry", "getLogger", "getInferLibVersion", "nvinfer"):
        assert name not in symbols


@needs_headers
@needs_cmake
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("form", sorted(FORMS))
def test_tensorrt_rtx_builds_with_it(plugin: Path, tmp_path: Path, form: str) -> None:
    from lsp_deploy.engines.protocol import BuildOptions
    from lsp_deploy.engines.tensorrt_rtx.backend import TensorRtRtxBackend
    from lsp_deploy.hardware.target import load_target

    save_model(made(form).model(dynamic=False), tmp_path / "model.onnx")
    options = BuildOptions(plugins=(plugin,))
    info = TensorRtRtxBackend().build(tmp_path / "model.onnx", tmp_path / "engine", load_target("a100"), options)
    assert [layer.onnx_nodes for layer in info.layers if layer.kind == "custom_layer"] == [["layer"]]
    assert not any("by its description only" in warning for warning in info.warnings)
    assert info.size_bytes > plugin.stat().st_size  # the engine holds the library


@needs_cmake
def test_without_headers_nothing_is_built_and_that_is_said(tmp_path: Path) -> None:
    command = ["cmake", "-S", SOURCES, "-B", tmp_path, "-DLSP_CUDA_EMULATION=ON", "-DTENSORRT_INCLUDE_DIR=/nowhere"]
    command += ["-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-DNVINFER_INCLUDE_DIR=NVINFER_INCLUDE_DIR-NOTFOUND"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if "NvInferRuntime.h was not found" not in done.stderr:
        pytest.skip("this machine has TensorRT's headers")
    assert "name their folder: -DTENSORRT_INCLUDE_DIR=<folder>" in " ".join(done.stderr.split())
    built = subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True, text=True)
    assert built.returncode == 0 and not list(tmp_path.rglob("*.so"))

"""The GPU kernels, compiled for every architecture: registers, spills, and what the library exports."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cuda_emulation import SOURCES, emulation, make_layer, small_integers
from cuda_toolkit import ARCHITECTURES, Build, build, find_nvcc, known_architectures, release

from lsp_deploy.plugins.cuda.library import CudaLibrary

NVCC = find_nvcc()
TABLE = Path(__file__).parent / "data" / "cuda_registers.json"

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc, of the machine or of the package nvidia-cuda-nvcc"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
]


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("cuda"))


@pytest.fixture(scope="module")
def kernels(cache: Path) -> Build:
    assert NVCC is not None
    return build(NVCC, cache)


def test_every_kernel_is_there_for_every_architecture(kernels: Build) -> None:
    assert NVCC is not None
    architectures = {str(number) for number in known_architectures(NVCC)}
    assert {"80", "86", "87", "89", "90"} <= architectures <= {str(number) for number in ARCHITECTURES}
    assert all(set(use) == architectures for use in kernels.use.values())
    library = CudaLibrary(kernels.library)
    for values_type in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8):
        for shape in ((64, 64), (63, 63)):
            layer = make_layer(
                1, shape, (16, 16), density=1, values_type=values_type, draw=small_integers, seed=0,
                out_type=values_type, out_scale=1.0 if values_type == ir.DataType.INT8 else 0.0,
            )  # fmt: skip
            with layer.plan(library) as plan:
                assert {f"{values_type.name.lower()} {tactic}" for tactic in plan.tactics} <= set(kernels.use)


def test_registers_and_spills_are_those_of_the_table(kernels: Build) -> None:
    """scripts/write_cuda_registers.py writes the table again."""
    assert NVCC is not None
    table = json.loads(TABLE.read_text())
    if table["toolkit"] != release(NVCC):
        pytest.skip(f"the table is of CUDA {table['toolkit']}, this is {release(NVCC)}")
    found = {name: {arch: list(pair) for arch, pair in use.items()} for name, use in kernels.use.items()}
    assert found == table["registers_and_spilled_bytes"]


def test_the_library_exports_its_functions_alone(kernels: Build) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", kernels.library], check=True, capture_output=True, text=True
    ).stdout.split()[2::3]
    assert symbols and all(symbol.startswith("lsp_cuda_") for symbol in symbols)
    needed = subprocess.run(["ldd", kernels.library], check=True, capture_output=True, text=True).stdout
    assert "libcud" not in needed  # the runtime is inside, and finds the driver by itself


def test_plans_are_those_of_the_emulation(kernels: Build, cache: Path) -> None:
    layer = make_layer(
        1, (200, 208), (32, 16), density=0.4, values_type=ir.DataType.FLOAT16, draw=small_integers, seed=0,
        out_type=ir.DataType.FLOAT16,
    )  # fmt: skip
    with layer.plan(CudaLibrary(kernels.library)) as here, layer.plan(emulation(cache)) as there:
        assert here.tactics == there.tactics and here.sub_blocks == there.sub_blocks == len(layer.values)
        for tactic in range(len(here.tactics)):
            np.testing.assert_array_equal(here.table(tactic), there.table(tactic))


def test_the_benchmark_of_the_peak_compiles(tmp_path: Path) -> None:
    assert NVCC is not None
    source = SOURCES.parents[1] / "benchmarks" / "mma_peak.cu"
    command = [NVCC, "-O3", "-std=c++17", "-arch=sm_90", "-Werror=all-warnings", "-ptx", source, "-o", tmp_path / "ptx"]
    subprocess.run(command, check=True)
    ptx = (tmp_path / "ptx").read_text()
    assert ptx.count("mma.sync.aligned.m16n8k16") >= 8 and ptx.count("mma.sync.aligned.m16n8k32") >= 8


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_a_launch_without_a_gpu_says_so(kernels: Build) -> None:
    layer = make_layer(
        4, (64, 64), (16, 16), density=1, values_type=ir.DataType.FLOAT16, draw=small_integers, seed=0,
        out_type=ir.DataType.FLOAT16,
    )  # fmt: skip
    with layer.plan(CudaLibrary(kernels.library)) as plan, pytest.raises(ValueError, match=r"^CUDA: "):
        plan.launch(0, 4, [1024] * 7, 0)

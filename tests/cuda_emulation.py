"""The GPU kernels compiled for this CPU (plugins/cuda/emulation), and a layer to run them on."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse.bsl16 import to_bsl16
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear
from lsp_deploy.plugins.block_sparse.packing import pack
from lsp_deploy.plugins.block_sparse.reference import block_sparse_linear
from lsp_deploy.plugins.cuda.library import CudaLibrary, Plan

SOURCES = Path(__file__).parents[1] / "plugins" / "cuda"
NUMPY = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16, ir.DataType.INT8: np.int8}
SHAPES = ((16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 32), (64, 64))


def source_hash(*folders: str, extra: str = "") -> str:
    """Return the hash of the sources in folders of plugins/cuda, and of what else decides the result."""
    digest = hashlib.sha256(extra.encode())
    for folder in folders:
        for path in sorted((SOURCES / folder).iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def emulation(cache: Path) -> CudaLibrary:
    """Return the kernels as they are, compiled once for each state of their sources."""
    target = cache / f"emulation-{source_hash('include', 'src', 'emulation')}.so"
    if not target.exists():
        for old in cache.glob("emulation-*.so"):
            old.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            compiled(SOURCES, Path(folder)).replace(target)
    return CudaLibrary(target)


def compiled(sources: Path, folder: Path, optimization: str = "-O2") -> Path:
    """Compile the emulation of the kernels whose sources are in a folder; return the library."""
    target = folder / "emulation.so"
    files = [
        sources / "emulation" / "emulate.cpp",
        sources / "src" / "plan.cpp",
        "-xc++",
        sources / "src" / "launch.cu",
    ]
    includes = [f"-I{sources / name}" for name in ("include", "emulation")]
    # Two of these libraries in one process must not share their static variables.
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-fno-gnu-unique"]
    subprocess.run(["g++", optimization, *flags, *includes, *files, "-o", target], check=True)
    return target


@dataclasses.dataclass
class Layer:
    """One layer with its inputs; the values are packed."""

    operator: BlockSparseLinear
    x: NDArray[Any]
    values: NDArray[Any]
    bias: NDArray[np.float32]
    scale: NDArray[np.float32]
    residual: NDArray[Any] | None = None

    @property
    def values_type(self) -> ir.DataType:
        return ir.DataType.from_numpy(self.values.dtype)

    def plan(self, library: CudaLibrary) -> Plan:
        residual = ir.DataType.from_numpy(self.residual.dtype) if self.residual is not None else None
        return library.plan(self.operator, self.values_type, residual)

    def run(self, plan: Plan, tactic: int) -> NDArray[Any]:
        """Launch the kernel on the emulated device, with garbage around x, values and y."""
        shape = (*self.x.shape[:-1], self.operator.N)
        y = _among_garbage(np.full(shape, 77, NUMPY[self.operator.out_type]))
        x, values = _among_garbage(self.x), _among_garbage(self.values)
        arrays = (x, values, self.bias, self.scale, self.residual, y, plan.table(tactic))
        plan.launch(tactic, len(x), [array.ctypes.data if array is not None else None for array in arrays], 0)
        around = y.base.view(np.uint8)
        assert (around[:_GARBAGE] == 0x7F).all() and (around[-_GARBAGE:] == 0x7F).all(), "written outside y"
        return y


_GARBAGE = 256


def _among_garbage(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy with garbage before and behind it: as floats and as integers it would be noticed."""
    around = np.full(array.nbytes + 2 * _GARBAGE, 0x7F, np.uint8)
    copy = np.ndarray(array.shape, array.dtype, around, offset=_GARBAGE)
    copy[...] = array
    return copy


def make_layer(
    m: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    *,
    density: float,
    values_type: ir.DataType,
    draw: Callable[[np.random.Generator, tuple[int, ...]], NDArray[Any]],
    seed: int,
    residual: ir.DataType | None = None,
    **attributes: Any,
) -> Layer:
    """Return a random layer with m rows of x.

    `draw` gives x, weight, bias and residual; `attributes` are the operator's.
    """
    random = np.random.default_rng(seed)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    mask = (random.random(grid) < density).repeat(block[0], axis=0).repeat(block[1], axis=1)
    dtype = NUMPY[values_type]
    blocks = pack(draw(random, shape).astype(dtype), mask[: shape[0], : shape[1]], block)
    operator = BlockSparseLinear(
        *shape, *block, col_ptr=blocks.col_ptr, k_idx=blocks.k_idx, layout="bsl16.v1", **attributes
    )
    return Layer(
        operator,
        x=draw(random, (m, shape[0])).astype(dtype),
        values=to_bsl16(operator, blocks.values),
        bias=draw(random, (shape[1],)).astype(np.float32),
        scale=np.exp2(random.integers(-2, 1, shape[1])).astype(np.float32),
        residual=draw(random, (m, shape[1])).astype(NUMPY[residual]) if residual is not None else None,
    )


def small_integers(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    """Of which all sums here are exact in every type."""
    return random.integers(-1, 2, shape)


def expected(layer: Layer, out_type: ir.DataType | None = None) -> NDArray[Any]:
    operator = dataclasses.replace(layer.operator, out_type=out_type or layer.operator.out_type)
    return block_sparse_linear(operator, layer.x, layer.values, layer.bias, layer.scale, layer.residual)

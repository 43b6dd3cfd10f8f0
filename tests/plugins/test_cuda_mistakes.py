"""Whether the emulation of the GPU kernels notices mistakes: each is put into a copy of the sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from cuda_emulation import SOURCES, compiled, expected, make_layer, small_integers

from lsp_deploy.plugins.cuda.library import CudaLibrary

INT8 = ir.DataType.INT8

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("kernel.h", "copy_async_wait<Tile::STAGES - 2>();", "copy_async_wait<Tile::STAGES - 1>();"),
        ("kernel.h", "      barrier();  // all copies", "      // all copies"),
        ("kernel.h", "  barrier();\n  if (warp.k > 0) return;", "  if (warp.k > 0) return;\n  barrier();"),
        ("kernel.h", "swizzled<Tile::CHUNKS>(row, slice * 2", "swizzled<Tile::CHUNKS>(row + 2, slice * 2"),
        ("plan.cpp", "survive.add(row / rows)", "survive.add(row / 16)"),
    ],
    ids=["waits too short", "no barrier", "barrier for some", "swizzle", "slices of int8"],
)  # fmt: skip
def test_mistakes_in_the_kernel_are_noticed(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    sources = shutil.copytree(SOURCES, tmp_path / "cuda")
    text = (sources / "src" / file).read_text()
    assert text.count(right) == 1
    (sources / "src" / file).write_text(text.replace(right, wrong))
    tiles = (sources / "src" / "tiles.h").read_text().splitlines()  # compiling all of them takes longer
    kept = [line for line in tiles if "kernel<Tile<" not in line or '"32x32"' in line]
    (sources / "src" / "tiles.h").write_text("\n".join(kept))
    library = CudaLibrary(compiled(sources, tmp_path, "-O0"))
    layer = make_layer(
        100, (192, 128), (32, 32), density=0.6, values_type=INT8, draw=small_integers, seed=0, out_type=INT8,
        out_scale=1.0,
    )  # fmt: skip
    layer.scale[:] = 1
    with layer.plan(library) as plan:
        try:
            differs = (layer.run(plan, 0) != expected(layer)).any() or plan.sub_blocks != len(layer.values)
        except ValueError:
            differs = True
    assert differs

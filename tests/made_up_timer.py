"""Times that nobody measured: runs for the CPU are quick with them, and decide alike every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lsp_deploy.hardware.cpu_timings import DENSITIES, LinearShape

# Microseconds for a million multiplications, on one thread; what skips zero blocks has some work beside them.
RATES = {
    "matmul fp32": 10.0,
    "qgemm int8": 4.0,
    "block_sparse fp32": 9.0,
    "block_sparse bf16": 5.0,
    "block_sparse int8": 3.0,
    "gather fp32": 12.0,
}


class MadeUpTimer:
    """Takes the place of `CpuLayerTimer`."""

    disturbed = False

    def __init__(self, threads: int, names: Sequence[str]) -> None:
        self.threads, self.names = threads, tuple(names)

    def curves(self, shape: LinearShape) -> dict[str, dict[float, float]]:
        work = shape.M * shape.K * shape.N / 1e6 / self.threads
        names = ("matmul fp32",) if shape.is_conv else self.names
        return {
            name: {density: RATES[name] * work * (0.1 + 0.9 * density) for density in DENSITIES}
            if name.startswith(("block_sparse", "gather"))
            else {1.0: RATES[name] * work}
            for name in names
        }

    def attention(self, model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
        return {}

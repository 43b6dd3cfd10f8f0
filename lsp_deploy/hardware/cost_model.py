"""What a linear layer costs on a target, dense, 2:4 or block-sparse: one roofline a layer, always an estimate.

y [M, N] = x [M, K] · W [K, N] is computed in tiles of tile_m × tile_n outputs, of which each multiprocessor does one
at a time, so that a layer takes ceil(tiles / sm_count) waves. With the constants of the target's `kernels` table

    compute = waves · 2·tile_m·tile_n · (K·density / rate + overhead_k / rate of the compute type) / efficiency
    memory  = (bytes of x, of the stored W and of y) / bandwidth
    time    = max(compute, memory) + launch

`rate` is the peak rate of one multiprocessor, density the fraction of the blocks that survive (1 for dense and for
2:4, whose peak is its own), efficiency that of the kind of kernel; the tile_n that is fastest counts. Where the
target's `pays` table says that zeros do not pay yet, or the dense kernel is faster, a layer is run by the dense
kernel.

Energy is LSP's Eq. 7: p_m, the energy of multiplying one tile_m × block_k piece of x by one block, times ceil(M /
tile_m) times the blocks that survive. p_m is what the board's power limit gives for that long at the peak rate,
unless the target says what was measured. Memory traffic and idle power are not in it. Neither time nor energy is
ever measured here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import ElementType, Kernels, MatrixUnit, Peak, Target

__all__ = [
    "CostKind",
    "Estimate",
    "Pattern",
    "block_costs",
    "block_matmul_energy_uj",
    "estimate_layer",
    "estimate_network",
    "layer_cost",
]

Pattern = Literal["dense", "2:4", "block"]
CostKind = Literal["flops", "parameters", "bytes", "tiles", "latency_us", "energy_uj"]

_BYTES: dict[str, float] = {
    "fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int4": 0.5, "fp4": 0.5,
}  # fmt: skip
_INDEX_BYTES = 4  # where a surviving block lies, one int32
_WIDE = 32  # blocks narrower than this have a break-even of their own


@dataclass(frozen=True)
class Estimate:
    """What a layer or a network is expected to cost. Not a measurement."""

    time_us: float
    """Microseconds for all M rows, launch included."""
    energy_uj: float
    """Microjoules of its matrix products (Eq. 7)."""
    tiles: int
    """Within-block matrix products: ceil(M / tile_m) · surviving blocks."""
    flops: float
    """FLOPs done, a multiply-add counting as two."""
    runs_as: str
    """The kernel that the time is of: dense, 2:4, block; or mixed."""
    source: str
    """Where the figures come from, as a clause for a report."""


def estimate_layer(
    target: Target,
    M: int,
    K: int,
    N: int,
    dtype: ElementType,
    *,
    pattern: Pattern = "dense",
    density: float = 1.0,
    block: tuple[int, int] = (32, 32),
) -> Estimate:
    """Estimate one linear layer (LSP, Eq. 7, for tiles and energy; a roofline for time).

    Args:
        target: a GPU target.
        M: rows of x: tokens times batch.
        K: inputs.
        N: outputs.
        dtype: element type of the weights, and of x except for int4, which is multiplied in the compute type.
        pattern: of the zeros in W.
        density: fraction of the blocks that survive, 0 to 1; block pattern only.
        block: (block_k, block_n): of the block pattern, and the unit in which tiles are counted.

    Raises:
        UserError: the target has no peak rates to estimate from.
    """
    layer = _Layer(target, M, K, N, dtype, block)
    density = density if pattern == "block" else 1.0
    dense_us = float(layer.time_us("dense"))
    time_us = float(layer.time_us(pattern, density))
    blocks = round(density * layer.blocks)
    share = 0.5 if pattern == "2:4" else density
    return Estimate(
        time_us=time_us,
        energy_uj=float(layer.energy_uj(pattern, blocks)),
        tiles=layer.row_tiles * blocks,
        flops=2 * M * K * N * share,
        runs_as=pattern if time_us < dense_us else "dense",
        source=f"estimated from {target.name}'s peak rates; kernels {target.kernels.source}",
    )


def estimate_network(layers: Iterable[Estimate]) -> Estimate:
    """Return the sum over the layers of a network, which run one after the other."""
    estimates = list(layers)
    return Estimate(
        time_us=sum(one.time_us for one in estimates),
        energy_uj=sum(one.energy_uj for one in estimates),
        tiles=sum(one.tiles for one in estimates),
        flops=sum(one.flops for one in estimates),
        runs_as=_only({one.runs_as for one in estimates}),
        source=_only({one.source for one in estimates}),
    )


def block_costs(
    kind: CostKind,
    target: Target,
    M: int,
    K: int,
    N: int,
    dtype: ElementType,
    *,
    block: tuple[int, int],
    sizes: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Return what a layer costs after the first j of its blocks are removed, for every j. It never grows with j.

    Args:
        kind: flops, parameters, bytes (the stored weights at `dtype`), tiles, latency_us or energy_uj. The first three
            are counted and need no figure of the target; the others are estimates.
        target: what it runs on.
        M: rows of x: tokens times batch.
        K: inputs.
        N: outputs.
        dtype: element type of the weights.
        block: (block_k, block_n).
        sizes: entries of each block in the order of removal, int [blocks]; ragged edges make some smaller.

    Returns:
        float64 [blocks + 1].

    Raises:
        UserError: an estimate was asked for and the target has no peak rates.
    """
    blocks = len(sizes)
    entries = np.cumsum(np.concatenate([[0], np.asarray(sizes)[::-1]]))[::-1].astype(np.float64)
    left = np.arange(blocks, -1, -1)
    if kind == "flops":
        return 2.0 * M * entries
    if kind == "parameters":
        return entries
    if kind == "bytes":
        stored = left * (block[0] * block[1] * _BYTES[dtype] + _INDEX_BYTES)
        return np.asarray(np.minimum(K * N * _BYTES[dtype], stored))
    layer = _Layer(target, M, K, N, dtype, block)
    if kind == "tiles":
        return (layer.row_tiles * left).astype(np.float64)
    if kind == "energy_uj":
        return layer.energy_uj("block", left)
    return layer.time_us("block", left / blocks)


def layer_cost(
    kind: CostKind,
    target: Target,
    M: int,
    K: int,
    N: int,
    dtype: ElementType,
    *,
    pattern: Literal["dense", "2:4"],
    block: tuple[int, int],
) -> float:
    """Return what a dense or 2:4 layer costs, in the unit of `block_costs`, to be compared with it.

    A 2:4 layer has half the FLOPs and parameters; its file is as large as the dense one, because ONNX stores its zeros.

    Args:
        kind: as for `block_costs`.
        target: what it runs on.
        M: rows of x: tokens times batch.
        K: inputs.
        N: outputs.
        dtype: element type of the weights.
        pattern: dense or 2:4.
        block: (block_k, block_n), in which tiles are counted.

    Raises:
        UserError: an estimate was asked for and the target has no peak rates.
    """
    share = 0.5 if pattern == "2:4" else 1.0
    if kind == "flops":
        return 2.0 * M * K * N * share
    if kind == "parameters":
        return K * N * share
    if kind == "bytes":
        return K * N * _BYTES[dtype]
    estimate = estimate_layer(target, M, K, N, dtype, pattern=pattern, block=block)
    return {"tiles": estimate.tiles * share, "latency_us": estimate.time_us, "energy_uj": estimate.energy_uj}[kind]


def block_matmul_energy_uj(target: Target, dtype: ElementType, block: tuple[int, int]) -> float:
    """Return p_m of LSP's Eq. 7: the energy of one tile_m × block_k by block_k × block_n product, µJ.

    The board's power limit for as long as the product takes at the peak rate, or what the target says was measured.

    Raises:
        UserError: the target has no peak rates.
    """
    return _Layer(target, target.kernels.tile_m, *block, dtype, block).p_m_uj


class _Layer:
    """One linear layer on one GPU."""

    def __init__(self, target: Target, M: int, K: int, N: int, dtype: ElementType, block: tuple[int, int]) -> None:
        self.target, self.M, self.K, self.N, self.block = target, M, K, N, block
        self.unit = _unit(target, dtype)
        self.peak = _peak(target, self.unit)
        self.base = _peak(target, target.compute_type)
        self.kernels: Kernels = target.kernels
        self.row_tiles = -(-M // self.kernels.tile_m)
        self.blocks = -(-K // block[0]) * -(-N // block[1])
        self.weight_bytes = K * N * _BYTES[dtype]
        self.other_bytes = M * K * _BYTES[self.unit] + M * N * _BYTES[target.compute_type]

    def time_us(self, pattern: Pattern, density: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Return the time of the kernel that is used: that of the pattern where it pays and is faster, else dense."""
        density = np.asarray(density, np.float64)
        dense = self._roofline(self.peak.dense, self.kernels.dense_efficiency, np.ones_like(density), 1.0)
        if pattern == "dense":
            return dense
        if pattern == "2:4":
            if not self._two_four_pays():
                return dense
            assert self.peak.sparse24 is not None
            # Half of the values, and two bits each that say which half.
            stored = 0.5 + self.K * self.N / 8 / self.weight_bytes
            return np.minimum(
                dense,
                self._roofline(self.peak.sparse24, self.kernels.sparse24_efficiency, np.ones_like(density), stored),
            )
        sparse = self._roofline(self.peak.dense, self.kernels.block_efficiency, density, density)
        return np.where(1 - density >= self._block_break_even(), np.minimum(dense, sparse), dense)

    def energy_uj(self, pattern: Pattern, blocks: ArrayLike) -> NDArray[np.float64]:
        """Return Eq. 7 for a number of surviving blocks; a 2:4 unit takes its share of the time for each."""
        share = 1.0
        if pattern == "2:4" and self._two_four_pays() and self.peak.sparse24 is not None:
            share = self.peak.dense / self.peak.sparse24
        return np.asarray(self.p_m_uj * share * self.row_tiles * np.asarray(blocks, np.float64))

    @property
    def p_m_uj(self) -> float:
        flops = 2 * self.kernels.tile_m * self.block[0] * self.block[1]
        pj_per_flop = self.peak.pj_per_flop
        if pj_per_flop is None:
            assert self.target.tdp_w is not None
            pj_per_flop = self.target.tdp_w / self.peak.dense  # W over TFLOP/s is pJ
        return flops * pj_per_flop * 1e-6

    def _roofline(
        self, peak: float, efficiency: float, density: NDArray[np.float64], stored: NDArray[np.float64] | float
    ) -> NDArray[np.float64]:
        assert self.target.sm_count is not None
        assert self.target.bandwidth_gb_s is not None
        assert self.target.launch_us is not None
        share = 1e6 / self.target.sm_count  # FLOP per µs of one multiprocessor, per TFLOP/s of the GPU
        steps = self.K * density / (peak * share) + self.kernels.overhead_k / (self.base.dense * share)
        outputs = min(
            -(-self.row_tiles * -(-self.N // tile_n) // self.target.sm_count) * self.kernels.tile_m * tile_n
            for tile_n in self.kernels.tile_n
        )
        compute = 2 * outputs * steps / efficiency
        memory = (self.other_bytes + self.weight_bytes * stored) / (self.target.bandwidth_gb_s * 1e3)
        return np.asarray(np.maximum(compute, memory) + self.target.launch_us)

    def _two_four_pays(self) -> bool:
        pays = self.target.pays
        if self.peak.sparse24 is None or pays.sparse24_min_k is None or pays.sparse24_min_n is None:
            return False
        return pays.sparse24_min_k <= self.K and pays.sparse24_min_n <= self.N

    def _block_break_even(self) -> float:
        pays = self.target.pays
        zeros = pays.block_zeros_min if self.block[1] >= _WIDE else pays.block_zeros_min_16
        return np.inf if zeros is None else zeros


def _unit(target: Target, dtype: ElementType) -> MatrixUnit:
    """Return the matrix unit that multiplies weights of a type: int4 is only stored."""
    return target.compute_type if dtype == "int4" else dtype


def _peak(target: Target, unit: MatrixUnit) -> Peak:
    if target.kind == "cpu" or not target.peak:
        raise UserError(
            f"{target.name} has no peak rates to estimate from: what it does is measured, not estimated; "
            "give the budget in FLOPs, parameters or bytes, or in latency for this machine's CPU"
        )
    if unit not in target.peak:
        raise UserError(f"{target.name} has no peak rate for {unit}; it has {', '.join(target.peak)}")
    return target.peak[unit]


def _only(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else "mixed"

"""What linear layers and attention take on this machine's CPU: measured times, and what lies between them.

A candidate is a way to run a layer, named by what multiplies and in which element type: "matmul fp32" is the engine's
own MatMul, "qgemm int8" the form that ONNX Runtime runs in int8, "block_sparse <type>" the operator of this project,
and "gather fp32" the same in stock operators. The last two skip zero blocks and are timed at several densities;
between those their time is interpolated, and it never grows where blocks are removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lsp_deploy.hardware.target import ElementType

__all__ = [
    "CANDIDATES",
    "DENSITIES",
    "GPU_CANDIDATES",
    "Activation",
    "CpuTimings",
    "LayerTimes",
    "LinearShape",
    "type_of",
]

Activation = Literal["none", "gelu", "gelu_tanh", "relu"]

CANDIDATES = (
    "matmul fp32", "qgemm int8", "block_sparse fp32", "block_sparse bf16", "block_sparse int8", "gather fp32",
)  # fmt: skip
GPU_CANDIDATES = (
    "matmul fp32", "matmul fp16", "matmul bf16", "matmul int8",
    "block_sparse fp16", "block_sparse bf16", "block_sparse int8",
)  # fmt: skip
"""Of GPUs (`gpu_timings.py`)."""
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Fractions of surviving blocks that a candidate which skips zero blocks is timed at."""

_GATHER_WORTH = 0.9  # as in plugins/block_sparse/panels.py


@dataclass(frozen=True)
class LinearShape:
    """What the time of a linear layer depends on: act(x [M, K] · W [K, N] + bias) + residual."""

    M: int
    K: int
    N: int
    activation: Activation = "none"
    residual: bool = False
    block: tuple[int, int] = (32, 32)
    """block_k × block_n of zero blocks."""
    is_conv: bool = False
    """A patch embedding: no candidate but the engine's own kernel; it is timed as a MatMul of its shape."""


@dataclass(frozen=True)
class LayerTimes:
    """Measured microseconds of the candidates for one shape."""

    shape: LinearShape
    curves: Mapping[str, Mapping[float, float]]
    """By candidate and density; a candidate that runs all blocks has its time at density 1 alone."""

    def at(self, candidate: str, density: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Return the microseconds of a candidate at densities from 0 to 1; below the least one timed, those of it.

        Raises:
            KeyError: the candidate was not timed.
        """
        curve = sorted(self.curves[candidate].items())
        times = np.array([time for _, time in curve])
        # What has fewer blocks takes no longer: where a time says so, the machine was disturbed.
        times = np.minimum.accumulate(times[::-1])[::-1]
        return np.asarray(np.interp(np.asarray(density, np.float64), [place for place, _ in curve], times), np.float64)

    def usable(self, dtype: ElementType | None = None) -> list[str]:
        """Return the candidates that a layer of an element type may take; of any type where None is given.

        The engine runs a convolution in any type: its one time stands for them all.
        """
        return [name for name in self.curves if dtype is None or self.shape.is_conv or type_of(name) == dtype]

    def fastest(self, dtype: ElementType | None = None, density: float = 1.0) -> str:
        """Return the fastest candidate of an element type, or of any; the first of equals.

        Stock operators that skip zeros are taken only where they take a tenth less than the MatMul. Where they gain
        less, they are that MatMul themselves, and their time is its time again.

        Raises:
            ValueError: none of that type was timed.
        """
        return min(self.usable(dtype), key=lambda name: float(self._as_taken(name, density)))

    def least_us(self, dtype: ElementType, density: ArrayLike = 1.0) -> NDArray[np.float64]:
        """Return the microseconds of the fastest candidate of an element type, at each density.

        Raises:
            ValueError: none of that type was timed.
        """
        return np.asarray(np.min([self._as_taken(name, density) for name in self.usable(dtype)], axis=0), np.float64)

    def gain_from_zeros(self) -> float:
        """Return the microseconds that zero blocks save at best: the fastest dense time less the fastest of all."""
        dense, sparse = (float(self.at(self.fastest(None, density), density)) for density in (1.0, min(DENSITIES)))
        return dense - sparse

    def _as_taken(self, candidate: str, density: ArrayLike) -> NDArray[np.float64]:
        """Return the microseconds of a candidate, infinite where it is not to be taken."""
        times = self.at(candidate, density)
        if not candidate.startswith("gather"):
            return times
        gains = (np.asarray(density) < 1) & (times < _GATHER_WORTH * self.at("matmul fp32", density))
        return np.where(gains, times, np.inf)


@dataclass(frozen=True)
class CpuTimings:
    """All that was timed for a network."""

    threads: int
    layers: Mapping[str, LayerTimes]
    """By layer name."""
    attention: Mapping[str, float] = field(default_factory=dict)
    """All attention of the network, µs: "exported fp32", "lsp fp32", "lsp bf16"; empty where there is none to fuse."""
    attention_left: Mapping[str, str] = field(default_factory=dict)
    """Why other attention stays as exported, by the name of its Softmax or Attention."""
    disturbed: bool = False
    """Whether other programs took CPU time from what was timed."""

    @property
    def conditions(self) -> str:
        """In words, for reasons: "measured, 2 threads"."""
        where = " on a busy machine" if self.disturbed else ""
        return f"measured{where}, {self.threads} thread{'' if self.threads == 1 else 's'}"


def type_of(candidate: str) -> ElementType:
    """Return the element type that a candidate multiplies in.

    Raises:
        ValueError: there is no such candidate.
    """
    types: dict[str, ElementType] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"}
    known = dict.fromkeys((*CANDIDATES, *GPU_CANDIDATES))
    if candidate not in known:
        raise ValueError(f"{candidate!r} is not one of {', '.join(known)}")
    return types[candidate.rpartition(" ")[2]]

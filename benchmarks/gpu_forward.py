"""A whole DeiT in CUDA graphs, with random weights: dense layers of cublasLt against block-sparse ones, and energy.

Both have the same epilogues fused (bias, GELU, residual) and the same LayerNorm, attention and patch embedding of
PyTorch, so that what differs is the linear layers.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpu_layers import BlockSparse, Dense, Weights, captured, random_weights

from lsp_deploy.plugins.block_sparse.operator import Activation
from lsp_deploy.plugins.cuda.library import CudaLibrary

TOKENS, PATCH_VALUES, BLOCKS, HEAD_SIZE = 197, 3 * 16 * 16, 12, 64
WIDTHS = {"deit_small": 384, "deit_base": 768}
BLOCK, DTYPE = (32, 32), torch.float16

Linear = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def compare_forwards(library: CudaLibrary, name: str, batch: int, density: float, energy_seconds: float) -> None:
    """Print times, and energy where it is asked for and the driver counts it, of both networks."""
    width, m = WIDTHS[name], batch * TOKENS
    weights = _weights(width, density)
    patches = torch.randn(batch, TOKENS - 1, PATCH_VALUES, device="cuda", dtype=DTYPE)
    networks = {
        "dense": _Network(width, batch, [_dense(w, m, i) for i, w in enumerate(weights)]),
        "block-sparse": _Network(width, batch, [_sparse(library, w, m, i) for i, w in enumerate(weights)]),
    }
    outputs = {kind: network(patches).float() for kind, network in networks.items()}
    error = (outputs["dense"] - outputs["block-sparse"]).norm() / outputs["dense"].norm()
    graphs = {kind: captured([lambda network=network: network(patches)]) for kind, network in networks.items()}
    runs = {kind: _Run() for kind in graphs}
    # In turn, so that both see the same temperatures; long enough for a counter that moves ten times a second.
    turns = max(2, round(energy_seconds / 10))
    for _ in range(turns):
        for kind, graph in graphs.items():
            runs[kind].add(graph, max(energy_seconds / turns, 0.3))
    print(f"### {name}, batch {batch}, density {density:.2f} in blocks of {BLOCK[0]}x{BLOCK[1]}, float16\n")
    print(f"Outputs differ by {float(error):.1e} (relative norm).\n")
    idle = _idle_watts(energy_seconds / turns) if energy_seconds else None
    print(f"Back to back; idle with both networks loaded: {'not measured' if idle is None else f'{idle:.0f} W'}.\n")
    print("| network | ms a batch | images/s | W | J/image | J/image over idle |\n|---|---:|---:|---:|---:|---:|")
    for kind, run in runs.items():
        seconds, energy = run.seconds / run.batches / batch, ["not measured"] * 3
        if run.joules is not None and idle is not None:
            watts = run.joules / run.seconds
            energy = [f"{watts:.0f}", f"{watts * seconds:.4f}", f"{(watts - idle) * seconds:.4f}"]
        print(f"| {kind} | {seconds * batch * 1000:.3f} | {1 / seconds:.0f} | {' | '.join(energy)} |", flush=True)
    print()


@functools.cache
def _weights(width: int, density: float) -> list[Weights]:
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return [
        random_weights(size, BLOCK, density, DTYPE, seed=4 * block + i)
        for block in range(BLOCKS)
        for i, size in enumerate(sizes)
    ]


def _activation(number: int) -> Activation:
    return "gelu_tanh" if number % 4 == 2 else "none"


def _example(weights: Weights, m: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    k, n = weights.weight.shape
    x, y = (torch.randn(m, size, device="cuda", dtype=DTYPE) for size in (k, n))
    return x, y, torch.randn_like(y) if number % 2 else None


def _dense(weights: Weights, m: int, number: int) -> Linear:
    """Return a dense layer, tuned; projection and fc2 add the residual."""
    layer = Dense(weights, m, activation=_activation(number), copies=1)
    x, y, residual = _example(weights, m, number)
    layer.tune(x, y, residual)

    def run(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        y = torch.empty(x.shape[0], weights.weight.shape[1], device="cuda", dtype=DTYPE)
        layer(x, y, residual)
        return y

    return run


def _sparse(library: CudaLibrary, weights: Weights, m: int, number: int) -> Linear:
    """Return the same layer, block-sparse, with its fastest tactic."""
    x, y, residual = _example(weights, m, number)
    layer = BlockSparse(
        library, weights, BLOCK, activation=_activation(number), residual=DTYPE if number % 2 else None, copies=1
    )
    tactic = int(np.argmin(layer.times_us(x, y, residual)))

    def run(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        y = torch.empty(x.shape[0], weights.weight.shape[1], device="cuda", dtype=DTYPE)
        layer(tactic, x, y, residual)
        return y

    return run


class _Network:
    """DeiT with given linear layers: qkv, projection, fc1, fc2 of each block."""

    def __init__(self, width: int, batch: int, linears: list[Linear]) -> None:
        self.width, self.batch, self.linears = width, batch, linears
        random = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, device="cuda", dtype=DTYPE) * 0.05

        self.embed, self.positions, self.token = draw(width, PATCH_VALUES), draw(TOKENS, width), draw(1, 1, width)
        self.head = draw(1000, width)
        self.gain, self.offset = 1 + draw(width), draw(width)

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        embedded = torch.nn.functional.linear(patches, self.embed)
        h = torch.cat([self.token.expand(self.batch, -1, -1), embedded], dim=1) + self.positions
        h = h.reshape(-1, self.width)
        for block in range(BLOCKS):
            qkv, projection, fc1, fc2 = self.linears[4 * block : 4 * block + 4]
            h = projection(self._attend(qkv(self._norm(h), None)), h)
            h = fc2(fc1(self._norm(h), None), h)
        return torch.nn.functional.linear(self._norm(h).view(self.batch, TOKENS, -1)[:, 0], self.head)

    def _norm(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(h, (self.width,), self.gain, self.offset)

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.view(self.batch, TOKENS, 3, -1, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(-1, self.width)


@dataclass
class _Run:
    """What was run so far, and what it took."""

    batches: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0

    def add(self, graph: torch.cuda.CUDAGraph, seconds: float) -> None:
        """Run a graph back to back for so long."""
        torch.cuda.synchronize()
        before, start = energy_j(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            self.batches += 20
        self.seconds += time.perf_counter() - start
        after = energy_j()
        self.joules = None if before is None or after is None or self.joules is None else self.joules + after - before


def _idle_watts(seconds: float) -> float | None:
    """Return the mean power while nothing runs; None where the driver does not count energy."""
    torch.cuda.synchronize()
    before, start = energy_j(), time.perf_counter()
    time.sleep(seconds)
    after, took = energy_j(), time.perf_counter() - start
    return None if before is None or after is None else (after - before) / took


def energy_j() -> float | None:
    """Return what the GPU has taken since the driver was loaded, in joules; None where the driver does not count it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    calls = (
        lambda: nvml.nvmlInit_v2(),
        lambda: nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)),
        lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)),
    )
    return energy.value / 1000 if all(call() == 0 for call in calls) else None

"""Whether the block-sparse kernels are right on this GPU: every tactic on random layers, against float64."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gpu_layers import NUMPY, BlockSparse, Weights, random_weights

from lsp_deploy.plugins.block_sparse.operator import Activation
from lsp_deploy.plugins.cuda.library import CudaLibrary

SHAPES = ((16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 32), (64, 64))
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
OUT_SCALE = 2**-5  # of an int8 y


@dataclass(frozen=True)
class Case:
    """A layer, its rows of x, and how many of the last ones are compared (all if None)."""

    dtype: torch.dtype
    size: tuple[int, int]
    block: tuple[int, int]
    density: float
    rows: int
    compared: int | None = None


def self_check(library: CudaLibrary, every: int = 1) -> int:
    """Run every tactic on random layers; return how many were wrong, or differed from run to run.

    Args:
        library: the kernels.
        every: run every Nth of the small cases, for slow tools; the large ones are smaller if it is not 1.
    """
    start, count, bad = time.perf_counter(), 0, 0
    for number, case in enumerate(_cases(every)):
        done = "no tactic"
        try:
            for name, error in _errors(library, case, number):
                count += 1
                done = name
                if not error <= 1:
                    bad += 1
                    print(f"WRONG: {name}: {error:.3g} of what is allowed", flush=True)
        except (RuntimeError, ValueError):  # CUDA's, after which nothing runs in this process
            print(f"BROKEN: {case}, after {done}", flush=True)
            raise
    print(f"self-check: {count} runs, {bad} wrong, {time.perf_counter() - start:.0f} s\n", flush=True)
    return bad


def _cases(every: int) -> Iterator[Case]:
    sizes = ((384, 512), (768, 192), (200, 72), (101, 67))
    small = itertools.product(NUMPY, SHAPES, (0.0, 0.2, 0.5, 1.0), (1, 197, 1000))
    for number, (dtype, block, density, rows) in enumerate(itertools.islice(small, 0, None, every)):
        yield Case(dtype, sizes[number % len(sizes)], block, density, rows)
    for dtype in NUMPY:  # thread blocks walk over many tiles; all cases, also through several chunks of rows
        yield Case(dtype, (768, 768), (32, 32), 0.3, 40_001 if every == 1 else 8_001)
        yield Case(dtype, (101, 67), (16, 16), 0.3, 100_001 if every == 1 else 20_001)
    if every == 1:
        huge = Case(torch.float16, (32, 4096), (32, 64), 0.5, 2**19 + 4097, compared=5000)
        if torch.cuda.mem_get_info()[0] > 24 << 30:
            yield huge
        else:
            print("more than 2^31 outputs: not checked, this GPU has too little memory", flush=True)


def _errors(library: CudaLibrary, case: Case, number: int) -> Iterator[tuple[str, float]]:
    """Yield each tactic, with its largest error in units of what the element type allows."""
    draw = random.Random(number).choice
    activation: Activation = draw(("none", "gelu", "gelu_tanh", "relu"))
    half = torch.float16 if case.dtype == torch.int8 else case.dtype
    out_type = draw((torch.int8, half))
    residual = torch.randn(case.rows, case.size[1], device="cuda", dtype=half) if draw((False, True)) else None
    weights = random_weights(case.size, case.block, case.density, case.dtype, number)
    x = random_x(case.rows, case.size[0], case.dtype)
    layer = BlockSparse(
        library,
        weights,
        case.block,
        activation=activation,
        out_type=out_type,
        out_scale=OUT_SCALE if out_type == torch.int8 else 0.0,
        residual=half if residual is not None else None,
        copies=1,
    )
    last = slice(-(case.compared or case.rows), None)
    exact = _exact(weights, x[last], activation, residual[last] if residual is not None else None)
    y, again = (torch.empty(case.rows, case.size[1], device="cuda", dtype=out_type) for _ in range(2))
    for tactic, name in enumerate(layer.plan.tactics):
        y.fill_(77)
        layer(tactic, x, y, residual)
        error = _error(y[last], exact)
        for _ in range(3):
            again.fill_(78)
            layer(tactic, x, again, residual)
            error = max(error, 0.0 if torch.equal(y, again) else math.inf)
        yield f"{name}, {case}, {activation}, y {out_type}, {'a' if residual is not None else 'no'} residual", error
    layer.plan.close()


def random_x(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return x [m, k], normal or, for int8, uniform."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    return torch.randn(m, k, device="cuda").to(dtype)


def _exact(weights: Weights, x: torch.Tensor, activation: Activation, residual: torch.Tensor | None) -> torch.Tensor:
    """Return y in float64."""
    y = x.double() @ torch.from_numpy(weights.weight.astype(np.float64)).cuda()
    if weights.dtype == torch.int8:
        y = y * torch.from_numpy(weights.scale).cuda().double()
    y = y + torch.from_numpy(weights.bias).cuda().double()
    if activation == "relu":
        y = y.relu()
    elif activation != "none":
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else y + residual.double()


def _error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error, in units of what the element type allows; NaN where y is not a number."""
    if y.dtype == torch.int8:
        steps = (exact / OUT_SCALE).clamp(-128, 127)
        return float((y.double() - steps).abs().max() / 0.52)
    allowed = TOLERANCE[y.dtype] * exact.abs() + 1e-4
    return float(((y.double() - exact).abs() / allowed).max())

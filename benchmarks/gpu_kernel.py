"""The block-sparse kernels on a GPU: first whether they are right, then their times against cublasLt and cuSPARSELt.

    cmake -S plugins/cuda -B build/cuda -DLSP_CUDA_SHARED=ON -DCMAKE_CUDA_ARCHITECTURES=native
    cmake --build build/cuda -j4
    python benchmarks/gpu_kernel.py build/cuda/liblsp_cuda.so [--full] [--forward deit_base --energy-seconds 30]

Needs PyTorch with CUDA. Prints Markdown tables. With `--forward`, a whole DeiT in CUDA graphs, dense against sparse.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from gpu_forward import compare_forwards
from gpu_layers import NUMPY, BlockSparse, Dense, TwoFour, Weights, random_weights, time_us

from lsp_deploy.plugins.block_sparse.operator import Activation
from lsp_deploy.plugins.cuda.library import CudaLibrary

TOKENS = 197
SHAPES = ((16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 32), (64, 64))
# K, N and activation of the layers of DeiT-S and DeiT-B: qkv, projection, fc1, fc2.
LAYERS: tuple[tuple[int, int, Activation], ...] = tuple(
    layer
    for width in (384, 768)
    for layer in (
        (width, 3 * width, "none"),
        (width, width, "none"),
        (width, 4 * width, "gelu_tanh"),
        (4 * width, width, "none"),
    )
)
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
OUT_SCALE = 2**-5  # of an int8 y


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here")
    library = CudaLibrary(arguments.library)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.multi_processor_count} SMs, PyTorch {torch.__version__}\n", flush=True)
    bad = self_check(library, arguments.check_every)
    if bad:
        sys.exit(f"error: {bad} self-checks failed")
    if arguments.check_only:
        return
    batches = (1, 4, 16, 32, 128) if arguments.full else (1, 16)
    for dtype in (torch.float16, torch.int8):
        layer_table(library, dtype, batches, full=arguments.full)
    if arguments.forward:
        for batch in batches:
            compare_forwards(library, arguments.forward, batch, arguments.density, arguments.energy_seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="liblsp_cuda.so")
    parser.add_argument("--check-only", action="store_true", help="only whether the kernels are right")
    parser.add_argument("--check-every", type=int, default=1, metavar="N", help="check every Nth case, for slow tools")
    parser.add_argument("--full", action="store_true", help="batches 1 to 128, more blocks and densities")
    parser.add_argument("--forward", choices=("deit_small", "deit_base"), help="also a whole network")
    parser.add_argument("--density", type=float, default=0.25, help="surviving blocks of the network's layers")
    parser.add_argument("--energy-seconds", type=float, default=0, help="how long to run each network for its energy")
    return parser.parse_args()


def self_check(library: CudaLibrary, every: int = 1) -> int:
    """Run every tactic on random layers against float64; return how many were wrong, or differed from run to run."""
    start, cases, bad = time.perf_counter(), 0, 0
    for number, (dtype, block, density, m) in enumerate(itertools.islice(_cases(), 0, None, every)):
        draw = random.Random(number).choice
        size = draw(((384, 512), (768, 192), (200, 72), (101, 67)))
        activation: Activation = draw(("none", "gelu", "gelu_tanh", "relu"))
        half = torch.float16 if dtype == torch.int8 else dtype
        out_type = draw((torch.int8, half))
        residual = draw((None, torch.randn(m, size[1], device="cuda").to(half)))
        weights, x = random_weights(size, block, density, dtype, number), _random_x(m, size[0], dtype)
        layer = BlockSparse(
            library,
            weights,
            block,
            activation=activation,
            out_type=out_type,
            out_scale=OUT_SCALE if out_type == torch.int8 else 0.0,
            residual=half if residual is not None else None,
            copies=1,
        )
        exact = _exact(weights, x, activation, residual)
        for tactic, name in enumerate(layer.plan.tactics):
            y = torch.full((m, size[1]), 77, device="cuda").to(out_type)
            layer(tactic, x, y, residual)
            error = _error(y, exact)
            again = torch.empty_like(y)
            for _ in range(3):
                layer(tactic, x, again, residual)
                error = max(error, 0.0 if torch.equal(y, again) else math.inf)
            cases += 1
            if not error <= 1:
                bad += 1
                case = f"{dtype} {name}, {size}, blocks {block}, density {density}, {m} rows, {activation}"
                print(f"WRONG: {case}: {error:.3g} of what is allowed")
        layer.plan.close()
    print(f"self-check: {cases} cases, {bad} wrong, {time.perf_counter() - start:.0f} s\n", flush=True)
    return bad


def _cases() -> Iterator[tuple[torch.dtype, tuple[int, int], float, int]]:
    return itertools.product(NUMPY, SHAPES, (0.0, 0.2, 0.5, 1.0), (1, 197, 1000))


def _random_x(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
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
    """Return the largest error, in units of what the element type allows."""
    if y.dtype == torch.int8:
        steps = (exact / OUT_SCALE).clamp(-128, 127)
        return float((y.double() - steps).abs().max() / 0.52)
    allowed = TOLERANCE[y.dtype] * exact.abs() + 1e-4
    return float(((y.double() - exact).abs() / allowed).max())


def layer_table(library: CudaLibrary, dtype: torch.dtype, batches: Sequence[int], *, full: bool) -> None:
    """Print the times of all layers; the densities of 32x32 come first, so that the break-even can be read off."""
    cases = [((32, 32), density) for density in ((1.0, 0.75, 0.5, 0.35, 0.25, 0.15) if full else (0.5, 0.25))]
    cases += [(block, 0.25) for block in (((16, 16), (16, 32), (64, 32), (64, 64)) if full else ((16, 16), (64, 64)))]
    print(
        f"### {str(dtype).removeprefix('torch.')}, µs a layer, {TOKENS} rows an image; 2:4 is without the activation\n"
    )
    print("| K x N | batch | act | dense | 2:4 | blocks | density | sparse | tactic | loads | speed-up | TFLOP/s |")
    print("|---|---:|---|---:|---:|---|---:|---:|---|---:|---:|---:|")
    for (k, n, activation), batch in itertools.product(LAYERS, batches):
        m = batch * TOKENS
        x = _random_x(m, k, dtype)
        dense, two_four = _dense_us(x, (k, n), activation, dtype), _two_four_us(x, (k, n), dtype)
        for block, density in cases:
            weights = random_weights((k, n), block, density, dtype, 7)
            out_type = torch.int8 if dtype == torch.int8 else dtype  # as the dense one, which writes int8
            layer = BlockSparse(
                library, weights, block, activation=activation, out_type=out_type,
                out_scale=OUT_SCALE if dtype == torch.int8 else 0.0,
            )  # fmt: skip
            tactic, us = layer.fastest(x, torch.empty(m, n, device="cuda", dtype=out_type))
            flops = 2 * m * np.count_nonzero(weights.mask)
            row = (
                *(f"{k} x {n}", batch, activation, _number(dense), _number(two_four), f"{block[0]}x{block[1]}"),
                *(f"{density:.2f}", f"{us:.2f}", layer.plan.tactics[tactic], f"{layer.plan.density(tactic):.2f}"),
                *(_number(dense / us if dense else None), f"{flops / us * 1e-6:.0f}"),
            )
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            layer.plan.close()
    print()


def _dense_us(x: torch.Tensor, shape: tuple[int, int], activation: Activation, dtype: torch.dtype) -> float | None:
    weights = random_weights(shape, (16, 16), 1.0, dtype, 7)
    y = torch.empty(x.shape[0], shape[1], device="cuda", dtype=dtype)
    for epilogue in (activation, "none"):
        try:
            us = Dense(weights, x.shape[0], activation=epilogue).tune(x, y)
        except RuntimeError as error:
            print(f"<!-- dense {shape} {dtype} {epilogue}: {error} -->")
            continue
        if epilogue != activation:
            print(f"<!-- dense {shape} {dtype} is without {activation} -->")
        return us
    return None


def _two_four_us(x: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> float | None:
    padded = x.new_zeros(-(-x.shape[0] // 16) * 16, x.shape[1])  # cuSPARSELt wants whole sixteens of rows
    padded[: x.shape[0]] = x
    try:
        layer = TwoFour(random_weights(shape, (16, 16), 1.0, dtype, 7), padded)
        return time_us(lambda i: layer(padded, i % len(layer.weights)))
    except (RuntimeError, AttributeError) as error:
        print(f"<!-- 2:4 {shape} {dtype}, {x.shape[0]} rows: {str(error).splitlines()[0]} -->")
        return None


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()

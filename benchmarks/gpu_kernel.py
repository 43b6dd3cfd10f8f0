"""The block-sparse kernels on a GPU: first whether they are right, then their times against cublasLt and cuSPARSELt.

    cmake -S plugins/cuda -B build/cuda -DLSP_CUDA_SHARED=ON -DCMAKE_CUDA_ARCHITECTURES=native
    cmake --build build/cuda -j4
    nvcc -O3 -shared -Xcompiler -fPIC -std=c++17 -arch=native -o build/libmma_peak.so benchmarks/mma_peak.cu
    python benchmarks/gpu_kernel.py build/cuda/liblsp_cuda.so --peak build/libmma_peak.so [--full]
    python benchmarks/gpu_kernel.py build/cuda/liblsp_cuda.so --parts forward --energy-seconds 30

Needs PyTorch with CUDA. Prints Markdown tables. The forward is a whole DeiT in CUDA graphs, dense against sparse; the
profile launches each tactic once, for a profiler to watch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gpu_forward import compare_forwards
from gpu_layers import BlockSparse, Dense, TwoFour, peak_tflops, random_weights, time_us
from gpu_self_check import OUT_SCALE, random_x, self_check

from lsp_deploy.plugins.block_sparse.operator import Activation
from lsp_deploy.plugins.cuda.library import CudaLibrary

TOKENS = 197
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


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch sees no GPU here")
    library = CudaLibrary(arguments.library)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, {properties.multi_processor_count} SMs, PyTorch {torch.__version__}\n", flush=True)
    batches = (1, 4, 16, 32, 128) if arguments.full else (1, 16)
    if "check" in arguments.parts:
        bad = self_check(library, arguments.check_every)
        if bad:
            sys.exit(f"error: {bad} self-checks failed")
    if "tables" in arguments.parts:
        for dtype in (torch.float16, torch.int8):
            peak = peak_tflops(arguments.peak, dtype) if arguments.peak else None
            layer_table(library, dtype, batches, peak, full=arguments.full)
    if "profile" in arguments.parts:
        launch_each_tactic(library)
    if "forward" in arguments.parts:
        for batch in reversed(batches):
            compare_forwards(library, arguments.network, batch, arguments.density, arguments.energy_seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="liblsp_cuda.so")
    parts = ("check", "tables", "forward", "profile")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:2], help="what to do")
    parser.add_argument("--check-every", type=int, default=1, metavar="N", help="check every Nth case, for slow tools")
    parser.add_argument("--peak", type=Path, help="mma_peak.cu as a library, to say what share of the peak is reached")
    parser.add_argument("--full", action="store_true", help="batches 1 to 128, more blocks and densities")
    parser.add_argument("--network", choices=("deit_small", "deit_base"), default="deit_base", help="of the forward")
    parser.add_argument("--density", type=float, default=0.25, help="surviving blocks of the network's layers")
    parser.add_argument("--energy-seconds", type=float, default=0, help="how long to run each network for its energy")
    return parser.parse_args()


def layer_table(
    library: CudaLibrary, dtype: torch.dtype, batches: Sequence[int], peak: float | None, *, full: bool
) -> None:
    """Print the times of all layers; the densities of 32x32 come first, so that the break-even can be read off.

    `peak` is what mma.sync does at most, in TFLOP/s. Untimed: what the default tactic takes more than the fastest.
    """
    cases = [((32, 32), density) for density in ((1.0, 0.75, 0.5, 0.35, 0.25, 0.15) if full else (0.5, 0.25))]
    cases += [(block, 0.25) for block in (((16, 16), (16, 32), (64, 32), (64, 64)) if full else ((16, 16), (64, 64)))]
    print(
        f"### {str(dtype).removeprefix('torch.')}, µs a layer, {TOKENS} rows an image; 2:4 is without the activation\n"
        f"\nmma.sync alone: {'not measured' if peak is None else f'{peak:.0f} TFLOP/s'}\n"
    )
    columns = ("K x N", "batch", "act", "dense", "2:4", "blocks", "density", "sparse", "tactic", "loads", "speed-up")
    print(f"| {' | '.join((*columns, 'TFLOP/s', 'of mma.sync', 'untimed'))} |")
    print("|---|---:|---|---:|---:|---|---:|---:|---|---:|---:|---:|---:|---:|")
    losses: list[float] = []
    notes: list[str] = []
    speed_ups: dict[tuple[int, int, tuple[int, int], float], list[float]] = {}
    for (k, n, activation), batch in itertools.product(LAYERS, batches):
        m = batch * TOKENS
        x = random_x(m, k, dtype)
        dense, lacks = _dense_us(x, (k, n), activation, dtype, notes)
        two_four = _two_four_us(x, (k, n), dtype, notes)
        for block, density in cases:
            weights = random_weights((k, n), block, density, dtype, 7)
            out_type = torch.int8 if dtype == torch.int8 else dtype  # as the dense one, which writes int8
            layer = BlockSparse(
                library, weights, block, activation=activation, out_type=out_type,
                out_scale=OUT_SCALE if dtype == torch.int8 else 0.0,
            )  # fmt: skip
            times = layer.times_us(x, torch.empty(m, n, device="cuda", dtype=out_type))
            tactic, us = int(np.argmin(times)), min(times)
            losses.append(times[layer.plan.default_tactic(m)] / us - 1)
            tflops = 2 * m * np.count_nonzero(weights.mask) / us * 1e-6
            if dense:
                speed_ups.setdefault((min(k, n), batch, block, density), []).append(dense / us)
            row = (
                *(f"{k} x {n}", batch, activation, _number(dense) + lacks, _number(two_four), f"{block[0]}x{block[1]}"),
                *(f"{density:.2f}", f"{us:.2f}", layer.plan.tactics[tactic], f"{layer.plan.density(tactic):.2f}"),
                *(_number(dense / us if dense else None), f"{tflops:.0f}"),
                *(f"{tflops / peak:.0%}" if peak else "not measured", f"+{losses[-1]:.0%}"),
            )
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            layer.plan.close()
    print(f"\nThe default tactic takes {statistics.mean(losses):.0%} more than the fastest on average.\n")
    for (width, batch, block, density), gains in speed_ups.items():
        gain = f"{statistics.geometric_mean(gains):.2f} x dense over the layers, at least {min(gains):.2f}"
        print(f"- width {width}, batch {batch}, {block[0]}x{block[1]}, density {density:.2f}: {gain}")
    for note in notes:
        print(f"- {note}")
    print(flush=True)


def launch_each_tactic(library: CudaLibrary) -> None:
    """Launch each tactic on the largest layer of DeiT-B at batch 16, with three quarters of its 32x32 blocks zero."""
    k, n, activation = LAYERS[6]
    weights = random_weights((k, n), (32, 32), 0.25, torch.float16, 7)
    layer = BlockSparse(library, weights, (32, 32), activation=activation, copies=1)
    x, y = random_x(16 * TOKENS, k, torch.float16), torch.empty(16 * TOKENS, n, device="cuda", dtype=torch.float16)
    for tactic, name in enumerate(layer.plan.tactics):
        print(f"launch {tactic}: {name}", flush=True)
        layer(tactic, x, y)
    torch.cuda.synchronize()


def _dense_us(
    x: torch.Tensor, shape: tuple[int, int], activation: Activation, dtype: torch.dtype, notes: list[str]
) -> tuple[float | None, str]:
    """Return the time of cublasLt, and what its epilogue lacks: it does not have each one for each type."""
    weights = random_weights(shape, (16, 16), 1.0, dtype, 7)
    y = torch.empty(x.shape[0], shape[1], device="cuda", dtype=dtype)
    full: tuple[Activation | None, str] = (activation, "")
    lesser: tuple[tuple[Activation | None, str], ...] = ((None, " without bias"),)
    if activation != "none":
        lesser = (("none", f" without {activation}"), (None, f" without bias and {activation}"))
    for epilogue, lacks in (full, *lesser):
        try:
            return Dense(weights, x.shape[0], activation=epilogue).tune(x, y), lacks
        except RuntimeError as error:
            notes.append(f"dense {shape}, {len(x)} rows{lacks}: {str(error).splitlines()[0]}")
    return None, ""


def _two_four_us(x: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, notes: list[str]) -> float | None:
    padded = x.new_zeros(-(-x.shape[0] // 16) * 16, x.shape[1])  # cuSPARSELt wants whole sixteens of rows
    padded[: x.shape[0]] = x
    try:
        layer = TwoFour(random_weights(shape, (16, 16), 1.0, dtype, 7), padded)
        return time_us(lambda i: layer(padded, i % len(layer.weights)))
    except (RuntimeError, AttributeError) as error:
        notes.append(f"2:4 {shape}, {len(x)} rows: {str(error).splitlines()[0]}")
        return None


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()

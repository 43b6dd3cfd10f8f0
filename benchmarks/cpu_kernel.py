"""Single linear layers on one core: our kernels, how near they come to what the core can do, and ONNX Runtime's.

    python benchmarks/cpu_kernel.py --rows 197 --zeros 0 0.5 0.7 --types float32 int8 --isa avx512_vnni avx2

Layers are those of DeiT-S and DeiT-B. Times are the least of many calls in alternating turns of one run. The limit,
from registers to registers, is measured in the same run (fma_peak.cpp, needs a compiler). ONNX Runtime's times are
those of a session with one Gemm on one thread: float32, and int8 as QuantizeLinear and a quantized Gemm. Weights are
random, and have no say in the speed; with int8, x is float32 and quantized inside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lsp_deploy.plugins import library

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import native_kernels  # noqa: E402  the tests' binding of the C interface

LAYERS = {
    "deit_small": [(384, 1152), (384, 384), (384, 1536), (1536, 384)],
    "deit_base": [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
}
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
X_SCALE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=[197, 1576], metavar="M")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.0, 0.5, 0.7], metavar="SHARE")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--isa", nargs="+", default=[None], help="as LSP_ISA; the best by default")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--activation", choices=native_kernels.ACTIVATIONS, default="none")
    parser.add_argument("--turns", type=int, default=10, help="blocks of 20 ms for each candidate")
    parser.add_argument("--library", type=Path, help="another liblsp_ort.so than the installed one")
    arguments = parser.parse_args()

    path = arguments.library or library().path
    if path is None:
        raise SystemExit(library().why)
    kernels = native_kernels.load(path)
    peaks = measure_peaks()
    print("limit of one core, 10^9 operations a second:", peaks or "not measured, no compiler for x86-64")
    for model in arguments.models:
        for rows in arguments.rows:
            for K, N in LAYERS[model]:
                candidates = onnxruntime_gemms(rows, K, N)
                shares: dict[str, tuple[str, float]] = {}
                for type_name in arguments.types:
                    for zeros in arguments.zeros:
                        for isa in arguments.isa:
                            linear, share = make_layer(kernels, K, N, type_name, zeros, isa, arguments)
                            name = f"{linear.kernel}, {type_name}, {zeros:.0%} zeros"
                            candidates[name] = call_of(linear, rows)
                            shares[name] = (type_name, share)
                report(rows, K, N, least_times(candidates, arguments.turns), shares, peaks)


def report(
    rows: int, K: int, N: int, times: dict[str, float], shares: dict[str, tuple[str, float]], peaks: dict[str, float]
) -> None:
    """Print a line for each candidate: its time, its rate, the share of the limit, and the times ONNX Runtime takes."""
    baselines = [name for name in times if name not in shares]
    columns = "".join(f"{'x ' + name:>25}" for name in baselines)
    print(f"\n{f'{rows} x {K} x {N}':44}{'us':>9} {'GFLOP/s':>9} {'limit':>7}{columns}")
    for name, seconds in times.items():
        type_name, share = shares.get(name, ("int8" if "int8" in name else "float32", 1.0))
        rate = 2 * rows * K * N * share / seconds * 1e-9
        limit = f"{rate / peaks[type_name]:.1%}" if type_name in peaks else "–"
        gains = "".join(f"{times[baseline] / seconds:25.2f}" for baseline in baselines)
        print(f"{name:44}{seconds * 1e6:9.1f} {rate:9.1f} {limit:>7}{gains}")


def least_times(candidates: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The least seconds of one call of each, in blocks of 20 ms that take turns."""
    least = dict.fromkeys(candidates, float("inf"))
    for _ in range(turns):
        for name, call in candidates.items():
            end = time.perf_counter() + 0.02
            while (begin := time.perf_counter()) < end:
                call()
                least[name] = min(least[name], time.perf_counter() - begin)
    return least


def measure_peaks() -> dict[str, float]:
    """10^9 operations a second by element type; nothing where fma_peak.cpp cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fma_peak"
        try:
            source = str(HERE / "fma_peak.cpp")
            subprocess.run(["c++", "-O2", "-march=native", source, "-o", str(program)], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return {}
        lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(rate) for name, rate in (line.split() for line in lines)}


def make_layer(
    kernels: object, K: int, N: int, type_name: str, zeros: float, isa: str | None, arguments: argparse.Namespace
) -> tuple[native_kernels.Linear, float]:
    """A layer with random weights, and the share of its blocks that survive."""
    generator = np.random.default_rng(0)
    block = (arguments.block, arguments.block)
    mask, col_ptr, k_idx, _ = native_kernels.random_blocks(generator, K, N, block, 1 - zeros)
    weight = generator.integers(-127, 128, (K, N)).astype(TYPES[type_name])
    linear = native_kernels.Linear(
        kernels, K=K, N=N, block=block, col_ptr=col_ptr, k_idx=k_idx,
        values=native_kernels.canonical_values(weight, mask, block), bias=np.zeros(N, np.float32),
        scale=np.full(N, 1e-4, np.float32), x_scale=X_SCALE if type_name == "int8" else 0.0,
        activation=arguments.activation, isa=isa,
    )  # fmt: skip
    return linear, float(mask.mean())


def call_of(linear: native_kernels.Linear, rows: int) -> Callable[[], object]:
    x, y = aligned((rows, linear.K)), aligned((rows, linear.N))
    x[...] = np.random.default_rng(1).standard_normal(x.shape)
    return lambda: linear(x, out=y)


def aligned(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Zeros that start on a cache line, as ONNX Runtime's tensors do."""
    size = 4 * shape[0] * shape[1]
    memory = np.zeros(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(np.float32).reshape(shape)


def onnxruntime_gemms(rows: int, K: int, N: int) -> dict[str, Callable[[], object]]:
    """ONNX Runtime's own layers of this shape, without zeros."""
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (K, N)).astype(np.int8)
    constants = {
        "xs": np.float32(X_SCALE), "zero": np.uint8(128), "w": weight, "ws": np.full(N, 0.01, np.float32),
        "wz": np.zeros(N, np.int8), "b": np.zeros(N, np.int32), "bs": np.full(N, 0.01 * X_SCALE, np.float32),
        "bz": np.zeros(N, np.int32),
    }  # fmt: skip
    int8 = [
        helper.make_node("QuantizeLinear", ["x", "xs", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd", "bd"], ["y"]),
    ]
    floats = {"w": weight.astype(np.float32), "b": np.zeros(N, np.float32)}
    return {
        "ONNX Runtime float32": session_call([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], floats, rows, K, N),
        "ONNX Runtime int8": session_call(int8, constants, rows, K, N),
    }


def session_call(
    nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]], rows: int, K: int, N: int
) -> Callable[[], object]:
    """One call of a session on one thread, from x to y, both in place."""
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, N])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((rows, K)).astype(np.float32)
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((rows, N), np.float32)))
    return lambda: session.run_with_iobinding(binding)


if __name__ == "__main__":
    main()

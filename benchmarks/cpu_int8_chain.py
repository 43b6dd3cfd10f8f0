"""What it is worth on a CPU that fc1 hands its output to fc2 as int8 (passes/chain_int8.py), and not as float32.

    python benchmarks/cpu_int8_chain.py --rows 197 --zeros 0 0.5 --threads 1 2

The MLPs of DeiT-S and DeiT-B, fc1 with GELU and fc2 with the residual, both lsp::BlockSparseLinear in int8 with random
weights. Each pair of models runs in alternating blocks of one run; a pair is repeated until the least times of both
have not got better by 1 % for three rounds. Prints the least microseconds, and how many times as fast the chain is.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.engines.call_times import call_times_us
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.passes.chain_int8 import ChainInt8Pass
from lsp_deploy.passes.layer_weights import add_initializer
from lsp_deploy.plugins.block_sparse.operator import DOMAIN, VERSION, Activation, BlockSparseLinear, to_node
from lsp_deploy.plugins.block_sparse.packing import pack

WIDTHS = {"DeiT-S": 384, "DeiT-B": 768}
BLOCK = 32
X_SCALE = 4 / 127
NEWS = 0.01  # better by so much
ROUNDS_WITHOUT_NEWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[197, 1576], metavar="M")
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.0, 0.5], metavar="SHARE")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    print(f"{'MLP':8}{'rows':>6}{'zeros':>7}{'threads':>9}{'float32 between':>18}{'int8 between':>15}{'ratio':>8}")
    for name, width in WIDTHS.items():
        for rows in arguments.rows:
            for zeros in arguments.zeros:
                for threads in arguments.threads:
                    whole, chained = compare(width, rows, zeros, threads)
                    print(
                        f"{name:8}{rows:6}{zeros:7.0%}{threads:9}{whole:15.0f} µs{chained:12.0f} µs"
                        f"{whole / chained:8.3f}",
                        flush=True,
                    )


def compare(width: int, rows: int, zeros: float, threads: int) -> tuple[float, float]:
    """Return the least microseconds without and with the chain."""
    random = np.random.default_rng(1)
    feeds = {name: random.standard_normal((1, rows, width), np.float32) for name in ("x", "residual")}
    with (
        OnnxRuntimeEngine.from_model(mlp(width, rows, zeros, chained=False), threads=threads) as whole,
        OnnxRuntimeEngine.from_model(mlp(width, rows, zeros, chained=True), threads=threads) as chained,
    ):
        calls = {"whole": whole.bound(feeds), "chained": chained.bound(feeds)}
        least, without_news = dict.fromkeys(calls, float("inf")), 0
        while without_news < ROUNDS_WITHOUT_NEWS:
            found, without_news = call_times_us(calls), without_news + 1
            if any(found[name] < least[name] * (1 - NEWS) for name in calls):
                without_news = 0
            least = {name: min(least[name], found[name]) for name in calls}
    return least["whole"], least["chained"]


def mlp(width: int, rows: int, zeros: float, *, chained: bool) -> ir.Model:
    """Return a model of fc1 with GELU and fc2 with the residual, [1, rows, width] to [1, rows, width]."""
    x, residual = (ir.val(name, ir.DataType.FLOAT, [1, rows, width]) for name in ("x", "residual"))
    graph = ir.Graph([x, residual], [], nodes=[], opset_imports={"": 20, DOMAIN: VERSION}, name="mlp")
    random = np.random.default_rng(0)
    hidden = _add(graph, "fc1", x, _weight(random, width, 4 * width, zeros), "gelu", None)
    y = _add(graph, "fc2", hidden, _weight(random, 4 * width, width, zeros), "none", residual)
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=10)
    if chained and not ChainInt8Pass()(model).modified:
        raise SystemExit("fc1 and fc2 were not chained")
    return model


def _weight(random: np.random.Generator, K: int, N: int, zeros: float) -> NDArray[np.int8]:
    """Return a random weight [K, N] with exactly that share of zero blocks."""
    survives = np.ones(K * N // BLOCK**2, bool)
    survives[: round(zeros * survives.size)] = False
    random.shuffle(survives)
    mask = np.kron(survives.reshape(K // BLOCK, N // BLOCK), np.ones((BLOCK, BLOCK), np.int8))
    return np.asarray(random.integers(1, 128, (K, N), np.int8) * mask, np.int8)


def _add(
    graph: ir.Graph, name: str, x: ir.Value, weight: NDArray[np.int8], activation: Activation, residual: ir.Value | None
) -> ir.Value:
    K, N = weight.shape
    blocks = pack(weight, None, (BLOCK, BLOCK))
    operator = BlockSparseLinear(
        K=K, N=N, block_k=BLOCK, block_n=BLOCK, col_ptr=blocks.col_ptr, k_idx=blocks.k_idx, activation=activation,
        x_scale=X_SCALE,
    )  # fmt: skip
    arrays = {
        "values": blocks.values,
        "bias": np.zeros(N, np.float32),
        "scale": np.full(N, X_SCALE / 127 / K**0.5, np.float32),
    }
    constants = [add_initializer(graph, f"{name}/{what}", array) for what, array in arrays.items()]
    node = to_node(operator, x, *constants, residual, name=name)
    node.outputs[0].name = f"{name}_y"
    graph.append(node)
    return node.outputs[0]


if __name__ == "__main__":
    main()

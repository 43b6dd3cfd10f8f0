"""Attention alone on this machine's CPU: as ONNX Runtime runs what exporters write, and as lsp::Attention.

Both read the fused projection qkv [batch, tokens, 3 · heads · size] of one layer, in sessions with the same options, in
alternating blocks of one run. Prints the least milliseconds of a call, the ratio, and GFLOP/s.

    nice -n -10 .venv/bin/python benchmarks/cpu_attention.py
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from alternating_blocks import Rhythm, take_turns
from numpy.typing import NDArray

from lsp_deploy.model import model_bytes
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plugins import register
from lsp_deploy.plugins.attention.operator import DOMAIN, VERSION, Attention, Compute, to_node

# Heads, their size, and tokens.
NETWORKS = {
    "DeiT-Tiny": (3, 64, 197),
    "DeiT-Small": (6, 64, 197),
    "DeiT-Base": (12, 64, 197),
    "Swin-Tiny, first stage": (3, 32, 49),
    "DeiT-Base, 384 pixels": (12, 64, 577),
}
WINDOWS = 64  # a batch of one image, where a network attends within windows
COMPUTES: tuple[Compute, ...] = ("float32", "bfloat16")


class SessionRunner:
    """A model in a session."""

    def __init__(self, model: ir.Model, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        register(options)
        self._session = ort.InferenceSession(model_bytes(model), options, providers=["CPUExecutionProvider"])

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        y: NDArray[np.float32] = self._session.run(None, {"qkv": images})[0]
        return y

    def close(self) -> None:
        del self._session


def attention_model(heads: int, size: int, tokens: int, compute: Compute) -> ir.Model:
    """Return a model of one lsp::Attention."""
    qkv = ir.val("qkv", ir.DataType.FLOAT, ["batch", tokens, 3 * heads * size])
    node = to_node(Attention(heads, size**-0.5, True, compute), [qkv], name="attention")
    node.outputs[0].name = "y"
    graph = ir.Graph([qkv], node.outputs, nodes=[node], opset_imports={"": 17, DOMAIN: VERSION}, name="attention")
    return ir.Model(graph, ir_version=8)


def compare(name: str, batch: int, threads: int, rhythm: Rhythm) -> str:
    """Return a row of the table."""
    heads, size, tokens = NETWORKS[name]
    models = {compute: attention_model(heads, size, tokens, compute) for compute in COMPUTES}
    exported = attention_model(heads, size, tokens, "float32")
    LowerOperatorsPass()(exported)
    runners = {"exported": SessionRunner(exported, threads)}
    runners |= {compute: SessionRunner(model, threads) for compute, model in models.items()}
    images = batch * WINDOWS if tokens == 49 else batch
    qkv = np.random.default_rng(0).standard_normal((images, tokens, 3 * heads * size)).astype(np.float32)
    turns = take_turns(runners, qkv, threads, rhythm)
    least = {key: turns[key].figures()["min_ms"] for key in runners}
    flops = 4 * images * heads * tokens**2 * size
    cells = [f"{least['exported']:.3f} ms"]
    cells += [
        f"{least[key]:.3f} ms, {least['exported'] / least[key]:.2f}x, {flops / least[key] / 1e6:.0f} GFLOP/s"
        for key in COMPUTES
    ]
    disturbed = sum(turns[key].figures()["disturbed_blocks"] for key in runners)
    return f"| {name} | {batch} | {threads} | {' | '.join(cells)} | {disturbed:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--blocks", type=int, default=5, help="undisturbed ones of each session")
    arguments = parser.parse_args()
    rhythm = Rhythm(arguments.blocks, 0.1, 0.02)
    print("| network | batch | threads | as exported | lsp float32 | lsp bfloat16 | disturbed blocks |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        for batch in arguments.batches:
            for threads in arguments.threads:
                print(compare(name, batch, threads, rhythm), flush=True)


if __name__ == "__main__":
    main()

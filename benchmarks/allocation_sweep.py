"""What a sweep over 20 FLOPs targets costs after one analysis: both allocators on a problem of the size of ViT-Base.

    python benchmarks/allocation_sweep.py [--block 16]

The δ-curves are made up (convex, with noise, one scale a layer); sizes, FLOPs and costs are those of ViT-Base at
224 × 224 pixels, patch embedding and head included: 50 layers, 1,000 classes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from lsp_deploy.allocation.exact import ExactAllocator
from lsp_deploy.allocation.lsp import LspAllocator
from lsp_deploy.allocation.problem import Allocation, LayerCurve
from lsp_deploy.hardware.cost_model import CostKind, block_costs
from lsp_deploy.hardware.target import load_target

TARGETS = np.linspace(0.95, 0.2, 20)
TOKENS = 197


class Allocator(Protocol):
    def allocate(self, budget: float, /) -> Allocation: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", type=int, default=16, help="block height and width (default 16)")
    block = parser.parse_args().block
    curves = vit_base((block, block))
    print(f"{len(curves)} layers, {sum(curve.blocks for curve in curves):,} blocks of {block} × {block}\n")
    print("| allocator | cost | preparation, s (measured) | 20 targets, s (measured) | Σδ at 50 % |")
    print("|---|---|---|---|---|")
    report("lsp", "FLOPs", lambda: LspAllocator(curves), 1.0)
    report("lsp, no power term", "FLOPs", lambda: LspAllocator(curves, power_weight=0), 1.0)
    report("exact", "FLOPs", lambda: ExactAllocator(curves), sum(float(curve.flops()[0]) for curve in curves))
    for kind in ("bytes", "energy_uj"):
        costs = target_costs(kind, curves)
        dense = sum(float(cost[0]) for cost in costs.values())
        report("exact", f"{kind} on a100", lambda costs=costs: ExactAllocator(curves, costs=costs), dense)


def report(name: str, cost: str, prepare: Callable[[], Allocator], dense: float) -> None:
    start = time.perf_counter()
    allocator = prepare()
    prepared = time.perf_counter()
    for share in TARGETS:
        allocator.allocate(share * dense)
    swept = time.perf_counter()
    half = allocator.allocate(0.5 * dense)
    print(f"| {name} | {cost} | {prepared - start:.2f} | {swept - prepared:.2f} | {half.damage:.4g} |")


def target_costs(kind: CostKind, curves: list[LayerCurve]) -> dict[str, np.ndarray]:
    target = load_target("a100")
    return {
        curve.name: block_costs(kind, target, curve.M, curve.K, curve.N, "fp16", block=curve.block, sizes=curve.sizes)
        for curve in curves
    }


def vit_base(block: tuple[int, int]) -> list[LayerCurve]:
    shapes = [("patch", 196, 768, 768)]
    for index in range(12):
        shapes += [(f"qkv{index}", TOKENS, 768, 2304), (f"proj{index}", TOKENS, 768, 768)]
        shapes += [(f"fc1_{index}", TOKENS, 768, 3072), (f"fc2_{index}", TOKENS, 3072, 768)]
    generator = np.random.default_rng(0)
    return [curve(name, M, K, N, block, generator) for name, M, K, N in [*shapes, ("head", 1, 768, 1000)]]


def curve(name: str, M: int, K: int, N: int, block: tuple[int, int], generator: np.random.Generator) -> LayerCurve:
    rows = np.minimum(block[0], K - np.arange(0, K, block[0]))
    columns = np.minimum(block[1], N - np.arange(0, N, block[1]))
    sizes = np.outer(rows, columns).ravel()
    order = generator.permutation(len(sizes))
    steps = np.sort(generator.lognormal(-10, 2, len(sizes))) * generator.lognormal(0, 0.5, len(sizes))
    delta = generator.lognormal() * np.concatenate([[0.0], np.cumsum(steps)])
    return LayerCurve(name, name.rstrip("_0123456789"), M, K, N, block, order, delta, sizes[order])


if __name__ == "__main__":
    main()

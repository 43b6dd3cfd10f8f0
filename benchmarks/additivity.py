"""Whether the damage of pruning adds up over layers, measured on a model and its images.

    python benchmarks/additivity.py deit_tiny_patch16_224.onnx --calibration-data images.tar --samples 32

Prunes the least important blocks of each layer alone, then of all layers together, and compares both with the sum of
the δ-curves. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from lsp_deploy.files import sha256_of
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import MAX_OPSET, load_model, resolve_shapes
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.sensitivity.additivity import Additivity, measure_additivity
from lsp_deploy.sensitivity.analysis import analyse
from lsp_deploy.steps.calibration import open_named


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    original = load_model(arguments.model)
    shapes = resolve_shapes(original, None, batch=1)
    dataset, _ = open_named(
        original,
        shapes,
        arguments.calibration_data,
        preprocess=arguments.preprocess,
        labels=arguments.labels,
        label_column=None,
        samples=arguments.samples,
        seed=0,
    )
    model = canonicalize(original, max_opset=MAX_OPSET)
    layers = linear_layers(model, shapes)
    height, width = map(int, arguments.block.split("x"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sensitivity = analyse(
            model,
            layers,
            dataset,
            block=(height, width),
            model_sha256=sha256_of(arguments.model),
            cache=Path(folder),
            objective=arguments.objective,
        )
        rows = measure_additivity(model, layers, dataset, sensitivity, fractions=arguments.fractions)
    print_table(rows)
    print(
        f"\n{arguments.model.name}, {len(layers)} layers, {sensitivity.objective} of {len(dataset)} samples, measured"
    )
    print(f"blocks {arguments.block}; {time.perf_counter() - start:.0f} s, {date.today()}, torch {torch.__version__}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration-data", required=True)
    parser.add_argument("--labels")
    parser.add_argument("--preprocess")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--objective")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def print_table(rows: list[Additivity]) -> None:
    columns = (
        "blocks removed a layer",
        "Σ δ (estimated)",
        "Σ single layers (measured)",
        "all together (measured)",
        "together / Σ single",
        "‖Δf‖²: Σ single layers",
        "‖Δf‖²: all together",
        "together / Σ single",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        values = (
            f"{row.fraction:.0%}",
            f"{row.estimated:.4g}",
            f"{row.single_layers:.4g}",
            f"{row.together:.4g}",
            f"{row.together / row.single_layers:.2f}",
            f"{row.distortion_single_layers:.4g}",
            f"{row.distortion_together:.4g}",
            f"{row.distortion_together / row.distortion_single_layers:.2f}",
        )
        print(f"| {' | '.join(values)} |")


if __name__ == "__main__":
    main()

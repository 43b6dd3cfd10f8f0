"""What a sensitivity analysis costs beside one plain forward and backward pass of torch over the same images.

    python benchmarks/sensitivity_cost.py deit_tiny_patch16_224.onnx --timm deit_tiny_patch16_224 --images 32
    python benchmarks/sensitivity_cost.py --timm vit_base_patch16_224 --images 16 --memory 128

The plain pass is timm's own module of that name with parameter gradients on, cross-entropy with its own top-1, in
batches of the same size. Both take turns, round by round; the table has medians. Without a model file one with random
weights is exported. `--memory N` also runs the whole verb on N images in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from lsp_deploy.autodiff.module import OnnxModule
from lsp_deploy.data import open_dataset
from lsp_deploy.export import export_model, import_timm
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import MAX_OPSET, load_model, resolve_shapes
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.sensitivity.block_gradients import collect_block_gradients
from lsp_deploy.sensitivity.objectives import make_objective

Times = tuple[float, float]
"""Seconds of the clock, and of all cores together."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or export_model(f"timm:{arguments.timm}", Path(folder) / "model.onnx").path
        measured = measure(path, arguments, Path(folder))
        peak = peak_bytes(path, arguments, Path(folder)) if arguments.memory else None
    print_table(measured, peak, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="ONNX file; random weights are exported if left out")
    parser.add_argument("--timm", required=True, help="name of the same architecture in timm")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--block", nargs="+", default=["16x16", "32x32"])
    parser.add_argument("--memory", type=int, default=0, help="also run the verb on so many images")
    return parser.parse_args()


def measure(path: Path, arguments: argparse.Namespace, scratch: Path) -> dict[str, list[Times]]:
    """Return the times of every round, for the plain pass, half the images, and each block shape."""
    model = canonicalize(load_model(path), max_opset=MAX_OPSET)
    shapes = resolve_shapes(model, None, batch=1)
    dataset = open_dataset("random", shapes=shapes, dtypes={}, preprocess=None, samples=arguments.images)
    layers, module, objective = linear_layers(model, shapes), OnnxModule(model), make_objective("top1", model)
    (output,) = (value for value in model.graph.outputs)
    plain = import_timm().create_model(arguments.timm, num_classes=int(output.shape[1])).eval()
    images = torch.from_numpy(next(iter(dataset.feeds(range(len(dataset))).values())))

    def forward_and_backward() -> None:
        plain.zero_grad()
        for batch in images.split(arguments.batch):
            logits = plain(batch)
            torch.nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum").backward()

    def analyse(block: str, samples: int) -> None:
        height, width = map(int, block.split("x"))
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            collect_block_gradients(
                module,
                layers,
                dataset,
                objective,
                block=(height, width),
                batch_size=arguments.batch,
                folder=Path(folder),
                samples=range(samples),
                show_progress=False,
            )

    first = arguments.block[0]
    half = arguments.images // 2
    runs: dict[str, Callable[[], None]] = {"plain": forward_and_backward}
    runs |= {block: lambda block=block: analyse(block, len(dataset)) for block in arguments.block}
    runs[f"{first}, {half} images"] = lambda: analyse(first, half)
    measured: dict[str, list[Times]] = {name: [] for name in runs}
    for number in range(arguments.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round warms up
                measured[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return measured


def peak_bytes(path: Path, arguments: argparse.Namespace, scratch: Path) -> int:
    """Return the largest resident set of the verb in a process of its own."""
    command = [sys.executable, "-I", "-m", "lsp_deploy", "sensitivity", str(path), "--calibration-data", "random"]
    command += ["--samples", str(arguments.memory), "--block", arguments.block[0], "-o", str(scratch / "out")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def print_table(measured: dict[str, list[Times]], peak: int | None, arguments: argparse.Namespace) -> None:
    medians = {name: np.median(np.array(times), axis=0) for name, times in measured.items()}
    columns = ("pass", "images", "seconds (clock)", "ratio", "CPU seconds", "ratio", "ratio of CPU seconds by round")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, (clock, cpu) in medians.items():
        images = arguments.images // 2 if "images" in name else arguments.images
        share = images / arguments.images
        ratios = ratio(clock, medians["plain"][0] * share), ratio(cpu, medians["plain"][1] * share)
        rounds = [one[1] / (other[1] * share) for one, other in zip(measured[name], measured["plain"], strict=True)]
        spread = f"{min(rounds):.2f} to {max(rounds):.2f}, median {statistics.median(rounds):.2f}"
        print(f"| {name} | {images} | {clock:.2f} | {ratios[0]} | {cpu:.2f} | {ratios[1]} | {spread} |")
    print()
    memory = "" if peak is None else f"; {peak / 2**30:.2f} GiB resident at most, {arguments.memory} images"
    settings = f"batch {arguments.batch}, {arguments.threads} threads, {arguments.rounds} rounds"
    print(f"measured: {arguments.timm}, {settings}{memory}")
    print(f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")


def ratio(value: Any, base: Any) -> str:
    return f"{value / base:.2f}"


if __name__ == "__main__":
    main()

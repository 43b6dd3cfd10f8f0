"""How fast whole vision transformers run on this CPU: lsp-deploy's forms beside ONNX Runtime and OpenVINO.

    python benchmarks/cpu_end_to_end.py --results cpu.jsonl
    python benchmarks/cpu_end_to_end.py --quick --results quick.jsonl
    python benchmarks/cpu_end_to_end.py --models deit_small_patch16_224 --profile "operator int8, 50% zeros*"

A cell is a network, a batch and a number of threads. Its variants take turns in blocks of one run; blocks in which
other programs took this process's CPUs are left out. What counts is how many times faster than ONNX Runtime's dense
fp32 of the same run a variant is. A variant whose logits are too far from those of the dense fp32 model with the same
zeros gets no figure. Each cell is appended to the results as soon as it is known, so that a run that was interrupted
goes on; `--print` only prints what is there. OpenVINO and NNCF are used where they are installed. All variants of a
cell are open at once: 12 GB for DeiT-B.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from alternating_blocks import Rhythm, take_turns
from competitors import NotMeasured, Runner
from cpu_variants import Network, Variant, images, made_up, variants
from numpy.typing import NDArray
from operator_profile import print_profile

from lsp_deploy import console
from lsp_deploy.engines.host import available_cpus, cpu_model
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of
from lsp_deploy.plugins import library

MODELS = ("deit_small_patch16_224", "deit_base_patch16_224")
# How far logits may be from those of the dense fp32 model with the same zeros, relative to their norm: several times
# what rounding explains, far below what a wrong kernel gives.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.2}
AIMED_AT = (1, 2)  # batch and threads

Cell = dict[str, Any]


def main() -> None:
    arguments = parse()
    try:
        if arguments.profile:
            profile(arguments)
            return
        results = Results(arguments.results)
        if not arguments.print:
            measure(arguments, results)
        print_tables(results.cells)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(MODELS), help="comma-separated names of timm [default: %(default)s]"
    )
    parser.add_argument("--batch", default="1,8", help="comma-separated [default: %(default)s]")
    parser.add_argument("--threads", default="1,2", help="comma-separated [default: %(default)s]")
    parser.add_argument("--only", default="*", help="variants to measure beside the first, as a pattern of the shell")
    parser.add_argument("--blocks", type=int, default=15, help="undisturbed blocks of each variant")
    parser.add_argument("--block-seconds", type=float, default=0.25, help="length of a block, at least 0.08")
    parser.add_argument("--gap-seconds", type=float, default=0.05, help="pause before a block")
    parser.add_argument("--samples", type=int, default=32, help="made-up images that int8 is calibrated on")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "lsp-deploy-cpu-end-to-end"),
                        help="keeps exports and models of other quantizers [default: %(default)s]")  # fmt: skip
    parser.add_argument("--results", type=Path, help="file of JSON lines that cells are appended to")
    parser.add_argument("--print", action="store_true", help="print tables of the results, measure nothing")
    parser.add_argument(
        "--profile", metavar="VARIANT", help="print the time by operator of variants, named by a pattern"
    )
    parser.add_argument("--quick", action="store_true", help="DeiT-S, batch 1, all CPUs, few blocks: a smoke test")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.batch, arguments.threads = MODELS[0], "1", str(min(2, len(available_cpus())))
        arguments.blocks, arguments.block_seconds, arguments.samples = 3, 0.08, 4
    if arguments.results is None and not arguments.profile:
        parser.error("--results is needed")
    if arguments.block_seconds < 0.08:
        parser.error("--block-seconds: threads and caches need 0.08 to settle on a model")
    if arguments.results is not None and not arguments.results.parent.is_dir():
        parser.error(f"--results: there is no folder {arguments.results.parent}")
    arguments.folder.mkdir(exist_ok=True)
    return arguments


def measure(arguments: argparse.Namespace, results: Results) -> None:
    for model in arguments.models.split(","):
        keys = [
            key
            for batch in map(int, arguments.batch.split(","))
            for threads in map(int, arguments.threads.split(","))
            if not results.has(key := cell_key(model, batch, threads, arguments))
        ]
        if not keys:
            continue
        with tempfile.TemporaryDirectory() as work:
            threads = len(available_cpus())
            network = Network(model, arguments.folder, Path(work), samples=arguments.samples, threads=threads)
            first, *others = variants(network)
            chosen = [first, *matching(others, arguments.only)]
            for key in keys:
                results.add({**key, **conditions(), "variants": measure_cell(network, chosen, key)})


def cell_key(model: str, batch: int, threads: int, arguments: argparse.Namespace) -> Cell:
    """Return what makes a cell another one: what is measured, how, and the kernels' library."""
    path = library().path
    return {
        "model": model,
        "batch": batch,
        "threads": threads,
        "only": arguments.only,
        "blocks": arguments.blocks,
        "block_seconds": arguments.block_seconds,
        "gap_seconds": arguments.gap_seconds,
        "samples": arguments.samples,
        "library_sha256": None if path is None else sha256_of(path),
    }


def conditions() -> Cell:
    packages = {}
    for package in ("onnxruntime", "openvino", "nncf"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "cpu": cpu_model(),
        "cpus": len(available_cpus()),
        "date": str(date.today()),
        "python": platform.python_version(),
        "versions": packages,
    }


def matching(all_variants: Sequence[Variant], pattern: str) -> list[Variant]:
    """Return the variants whose name matches; UserError if none does."""
    found = [variant for variant in all_variants if fnmatch.fnmatch(variant.name, pattern)]
    if not found:
        raise UserError(f"no variant matches {pattern!r}; there are {'; '.join(each.name for each in all_variants)}")
    return found


def measure_cell(network: Network, chosen: Sequence[Variant], key: Cell) -> dict[str, Cell]:
    """Return the figures of each variant by name, or why it has none."""
    pixels = images(made_up(key["batch"], seed=1))
    references = {zeros: network.reference(zeros, pixels) for zeros in {variant.zeros for variant in chosen}}
    figures: dict[str, Cell] = {}
    runners: dict[str, Runner] = {}
    for variant in chosen:
        aim = variant.aim if (key["batch"], key["threads"]) == AIMED_AT else None
        try:
            runner = variant.open(variant.file(), key["threads"], key["batch"])
        except NotMeasured as reason:
            figures[variant.name] = {"aim": aim, "not_measured": str(reason)}
            continue
        far = difference(runner.run(pixels), references[variant.zeros], TOLERANCE[variant.dtype])
        figures[variant.name] = {"aim": aim, **far}
        if "not_measured" in far:
            runner.close()
        else:
            runners[variant.name] = runner
    rhythm = Rhythm(key["blocks"], key["block_seconds"], key["gap_seconds"])
    for name, turns in take_turns(runners, pixels, key["threads"], rhythm).items():
        figures[name].update(turns.figures())
    for runner in runners.values():
        runner.close()
    return figures


def difference(logits: NDArray[np.float32], reference: NDArray[np.float32], tolerance: float) -> Cell:
    """Return how far the logits are from the reference, and a reason not to measure where that is too far."""
    relative = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
    figures: Cell = {"max_difference": float(np.abs(logits - reference).max()), "relative_difference": relative}
    if not relative <= tolerance:
        figures["not_measured"] = f"wrong: relative difference of the logits {relative:.2g}, above {tolerance:g}"
    return figures


def profile(arguments: argparse.Namespace) -> None:
    model, threads, batch = (option.split(",") for option in (arguments.models, arguments.threads, arguments.batch))
    with tempfile.TemporaryDirectory() as work:
        cpus = len(available_cpus())
        network = Network(model[0], arguments.folder, Path(work), samples=arguments.samples, threads=cpus)
        chosen = matching(variants(network), arguments.profile)
        pixels = images(made_up(int(batch[0]), seed=1))
        for variant in chosen:
            print(f"\n{model[0]}, {variant.name}, batch {batch[0]}, {threads[-1]} threads\n")
            print_profile(variant.file(), pixels, int(threads[-1]))


class Results:
    """The cells on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: list[Cell] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, key: Cell) -> bool:
        return any(all(cell[name] == value for name, value in key.items()) for cell in self.cells)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        with self.path.open("a") as stream:
            stream.write(json.dumps(cell) + "\n")
        console.say(f"{cell['model']}, batch {cell['batch']}, {cell['threads']} threads: measured")


def print_tables(cells: Sequence[Cell]) -> None:
    for cell in cells:
        print_cell(cell)
    print("\nTimes as fast as the first, of least times:\n")
    names = [f"{cell['model'].split('_patch')[0]}, batch {cell['batch']}, {cell['threads']} threads" for cell in cells]
    print("| | " + " | ".join(names) + " |")
    print("|---" * (len(cells) + 1) + "|")
    for name in dict.fromkeys(name for cell in cells for name in cell["variants"]):
        print(f"| {name} | " + " | ".join(ratio(cell["variants"], name, "min_ms") for cell in cells) + " |")


def print_cell(cell: Cell) -> None:
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in cell["versions"].items())
    print(f"\n{cell['model']}, batch {cell['batch']}, {cell['threads']} threads\n")
    print(f"{cell['cpu']}, {cell['cpus']} CPUs, {cell['date']}, Python {cell['python']}, {versions}\n")
    print("| | min ms | median ms | × (min) | × (median) | aim | max difference | relative | blocks, left out |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in cell["variants"]:
        print(f"| {name} | " + " | ".join(columns(cell["variants"], name)) + " |")


def columns(variants: Cell, name: str) -> list[str]:
    figures = variants[name]
    if "not_measured" in figures:
        return [f"not measured: {figures['not_measured']}", *[""] * 7]
    return [
        f"{figures['min_ms']:.2f}",
        f"{figures['median_ms']:.2f}",
        ratio(variants, name, "min_ms"),
        ratio(variants, name, "median_ms"),
        str(figures["aim"] or ""),
        f"{figures['max_difference']:.1e}",
        f"{figures['relative_difference']:.1e}",
        f"{figures['quiet_blocks']}, {figures['disturbed_blocks']}",
    ]


def ratio(variants: Cell, name: str, time: str) -> str:
    """Return how many times as fast as the first a variant is.

    Where others disturbed all blocks of either there is no figure: long calls are then hit more often than short ones,
    which flatters whatever is fast.
    """
    first, figures = next(iter(variants.values())), variants[name]
    if time not in figures:
        return "-"
    if not (first["quiet_blocks"] and figures["quiet_blocks"]):
        return "disturbed"
    return f"{first[time] / figures[time]:.2f}"


if __name__ == "__main__":
    main()

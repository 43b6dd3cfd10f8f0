"""What pruned models answer at equal budgets: top-1 and KL divergence to the dense model, one method a row.

    python benchmarks/pruning_accuracy.py deit_tiny_patch16_224.onnx --calibration-data images.tar --labels labels.csv \
        --every 5 --results deit.jsonl
    python benchmarks/pruning_accuracy.py vit_tiny.onnx --calibration-data train.tar.gz --calibration-samples 200 \
        --eval-data val.tar.gz --labels val_labels.csv --label-column model_index --eval-samples 1000 \
        --preprocess vit_tiny.toml --results vit.jsonl

Labels are of the images that measure; calibration never sees any. A budget is the fraction of the FLOPs of all linear
layers that may remain. `--ablation` compares damages to allocate by ("damage"), LSP with and without its power term
("power", the paper's Table 2), or block shapes ("blocks", its Table 3); `--two-four` adds a table on 2:4.

Each cell is appended to the results as soon as it is known, so that a run that was interrupted goes on; `--print`
only prints what is there. A cell's `seconds` are of the part that follows the analysis that all methods share; those
of a gradual search go on from the budget before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from pruning_methods import ABLATIONS, METHODS, TWO_FOUR, Left, prune_two_four

from lsp_deploy import __version__, console
from lsp_deploy.autodiff.module import OnnxModule
from lsp_deploy.cache import cache_folder, content_key
from lsp_deploy.data import Dataset
from lsp_deploy.engines.host import available_cpus, cpu_model
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of
from lsp_deploy.graph.class_scores import class_output
from lsp_deploy.hardware.target import load_target
from lsp_deploy.linear_layers import LinearLayer
from lsp_deploy.recipe import Recipe
from lsp_deploy.search.block_search import BlockSearch
from lsp_deploy.search.pruner import NetworkPruner
from lsp_deploy.sensitivity.feeds import tensor_feeds
from lsp_deploy.steps.calibration import CalibrationData, open_named, warn_assumed_preprocess
from lsp_deploy.steps.preparation import prepare
from lsp_deploy.steps.pruning import choose_pruner

BATCH = 32
KEY = ("model_sha256", "method", "block", "flops", "data", "tool_version")

Cell = dict[str, Any]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.results, sha256_of(arguments.model))
    try:
        if not arguments.print:
            measure(arguments, results)
        print_tables(arguments, results)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration-data", help="images, used without labels")
    parser.add_argument("--calibration-samples", type=int, help="images to use of those [default: all]")
    parser.add_argument("--every", type=int, help="calibrate on every so many of the images, measure on the others")
    parser.add_argument("--eval-data", help="images that are measured on, where --every does not say so")
    parser.add_argument("--eval-samples", type=int, help="images to use of those [default: all]")
    parser.add_argument("--labels", help="CSV of the images that are measured on")
    parser.add_argument("--label-column")
    parser.add_argument("--preprocess", help="of both")
    parser.add_argument("--target", default="a100")
    parser.add_argument("--ablation", choices=list(ABLATIONS), default="none")
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join([*METHODS, *TWO_FOUR])}")
    parser.add_argument("--block", help="comma-separated shapes [default: 16x16,32x32, or the ablation's]")
    parser.add_argument("--flops", help="comma-separated budgets [default: 0.95,0.9,0.8,0.65,0.5, or the ablation's]")
    parser.add_argument("--two-four", action="store_true", help="2:4 instead of blocks")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines that cells are appended to")
    parser.add_argument("--print", action="store_true", help="print tables of the results, measure nothing")
    parser.add_argument("--threads", type=int, default=len(available_cpus()))
    arguments = parser.parse_args()
    ablation, known = ABLATIONS[arguments.ablation], TWO_FOUR if arguments.two_four else METHODS
    methods = (
        arguments.methods.split(",") if arguments.methods else TWO_FOUR if arguments.two_four else ablation.methods
    )
    arguments.methods = list(methods)
    arguments.blocks = arguments.block.split(",") if arguments.block else list(ablation.blocks)
    budgets = map(float, arguments.flops.split(",")) if arguments.flops else ablation.flops
    arguments.budgets = sorted(budgets, reverse=True)  # a gradual search goes on from the budget before
    if unknown := [name for name in arguments.methods if name not in known]:
        parser.error(f"--methods: no {', '.join(unknown)}; there are {', '.join(known)}")
    if not arguments.print and not arguments.calibration_data:
        parser.error("--calibration-data is needed to measure")
    if not arguments.print and (arguments.every is None) == (arguments.eval_data is None):
        parser.error("give one of --every and --eval-data")
    return arguments


class Results:
    """The cells of one model on disk."""

    def __init__(self, path: Path, model_sha256: str) -> None:
        self.path, self.model_sha256 = path, model_sha256
        lines = path.read_text().splitlines() if path.exists() else []
        self.cells: list[Cell] = [
            cell for line in lines for cell in [json.loads(line)] if cell["model_sha256"] == model_sha256
        ]

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return those of the cells that are not there yet."""
        known = {tuple(cell[name] for name in KEY) for cell in self.cells}
        return [cell for cell in cells if tuple(cell[name] for name in KEY) not in known]

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        with self.path.open("a") as stream:
            stream.write(json.dumps(cell) + "\n")
        console.say(
            f"{cell['method']} {cell['block']} {cell['flops']:.0%}: top-1 {cell['top1']:.2f} %, KL {cell['kl']:.4f}"
        )


@dataclass(frozen=True)
class Score:
    """What a network answers on the images that are measured on."""

    top1: float
    """%."""
    kl: float
    """Mean over images of KL(dense ‖ pruned), nats."""


class Subject:
    """A model with its images."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.threads = arguments.threads
        self.target = load_target(arguments.target)
        self.recipe = Recipe(target=arguments.target, calibration_data=arguments.calibration_data, precision="fp16")
        self.prepared = prepare(arguments.model, self.recipe, self.target)
        output = class_output(self.prepared.canonical)
        if output is None or self.prepared.fixed_batch:
            raise UserError(f"{arguments.model}: top-1 is measured on a model with class scores and a dynamic batch")
        self.output = output
        self.calibration, self.evaluation = self._data(arguments)
        if self.evaluation.labels is None:
            raise UserError("top-1 needs labels of the images that are measured on: name them with --labels")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        parts = (self.calibration, self.evaluation)
        self.key = content_key(calibration=parts[0].identity, evaluation=parts[1].identity)
        self.data_words = (
            f"calibrated on {len(parts[0])} images of {parts[0].name} without labels, "
            f"measured on {len(parts[1])} of {parts[1].name}"
        )

    @cached_property
    def dense_log_p(self) -> torch.Tensor:
        """[images, classes] float64."""
        return self._log_p(OnnxModule(self.prepared.canonical).to(self.device))

    def score(self, module: OnnxModule | None = None) -> Score:
        """Measure a pruned network, or the dense one."""
        dense = self.dense_log_p
        log_p = dense if module is None else self._log_p(module)
        right = log_p.argmax(1).numpy() == self.evaluation.labels
        divergence = torch.nn.functional.kl_div(log_p, dense, log_target=True, reduction="batchmean")
        return Score(float(right.mean() * 100), float(divergence))

    def pruner(self, sparsity: Literal["block", "2:4"], block: str | None, bases: bool) -> NetworkPruner:
        """Return what the product prunes with."""
        recipe = Recipe.model_validate({
            **self.recipe.typed(),
            "sparsity": sparsity,
            "block": block,
            "recover": "reconstruct",
            "basis": "change" if bases else "keep",
        })  # fmt: skip
        data = CalibrationData(self.calibration, self.evaluation, "", "")
        pruner = choose_pruner(self.prepared, data, recipe, self.target, self.threads).pruner
        assert isinstance(pruner, NetworkPruner)
        return pruner

    def cell(self, method: str, block: str, flops: float) -> Cell:
        """Return a cell that has not been measured."""
        return {
            "model": self.prepared.path.name,
            "model_sha256": self.prepared.sha256,
            "method": method,
            "block": block,
            "flops": flops,
            "data": self.key,
            "data_words": self.data_words,
            "images": len(self.evaluation),
            "tool_version": __version__,
            "date": str(date.today()),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else cpu_model(),
            "threads": self.threads,
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"onnxruntime {version('onnxruntime')}, lsp-deploy {__version__}",
        }

    def _log_p(self, module: OnnxModule) -> torch.Tensor:
        results = []
        with torch.no_grad(), console.progress("measuring", len(self.evaluation)) as advance:
            for start in range(0, len(self.evaluation), BATCH):
                indices = np.arange(start, min(start + BATCH, len(self.evaluation)))
                scores = module(tensor_feeds(self.evaluation, indices, self.device))[self.output]
                results.append(scores.double().log_softmax(1).cpu())
                advance(len(indices))
        return torch.cat(results)

    def _data(self, arguments: argparse.Namespace) -> tuple[Dataset, Dataset]:
        def opened(source: str, samples: int | None, labels: str | None) -> Dataset:
            dataset, origin = open_named(
                self.prepared.original,
                self.prepared.shapes.opt,
                source,
                preprocess=arguments.preprocess,
                labels=labels,
                label_column=arguments.label_column,
                samples=samples,
                seed=0,
            )
            warn_assumed_preprocess(dataset, origin)
            return dataset

        if arguments.every:
            whole = opened(arguments.calibration_data, arguments.calibration_samples, arguments.labels)
            chosen = np.arange(0, len(whole), arguments.every)
            others = np.setdiff1d(np.arange(len(whole)), chosen)
            return whole.subset(chosen).without_labels(), whole.subset(others)
        calibration = opened(arguments.calibration_data, arguments.calibration_samples, None)
        evaluation = opened(arguments.eval_data, arguments.eval_samples, arguments.labels)
        return calibration.without_labels(), evaluation


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Measure every cell that is asked for and not in the results."""
    subject = Subject(arguments)
    for dense in results.missing([subject.cell("dense", "", 1.0)]):
        score = subject.score()
        results.add(dense | {"top1": score.top1, "kl": score.kl, "flops_left": 1.0, "weights_left": 1.0, "seconds": 0})
    if arguments.two_four:
        measure_two_four(arguments, results, subject)
        return
    for block in arguments.blocks:
        for bases in (False, True):
            methods = [method for method in arguments.methods if METHODS[method].bases == bases]
            rows = [[subject.cell(method, block, keep) for keep in arguments.budgets] for method in methods]
            missing = [cells for row in rows if (cells := results.missing(row))]
            if missing:
                measure_blocks(missing, results, subject, subject.pruner("block", block, bases).block_search)


def measure_blocks(missing: Sequence[Sequence[Cell]], results: Results, subject: Subject, search: BlockSearch) -> None:
    """Measure cells, one sequence a method, on a network that was analysed once for all of them."""
    layers = [*search.prunable, *search.others]
    for cells in missing:
        name = content_key(**{part: cells[0][part] for part in KEY if part != "flops"})
        checkpoints = cache_folder() / "benchmark" / name
        prune = METHODS[cells[0]["method"]].prepare(search, checkpoints)
        for cell in cells:
            start = time.perf_counter()
            try:
                left = prune(cell["flops"])
            except UserError as error:
                console.warn(f"{cell['method']} {cell['block']} {cell['flops']:.0%} stays empty: {error}")
                continue
            seconds = time.perf_counter() - start
            results.add(cell | measured(subject.score(search.network.pruned), left, layers, seconds))
        shutil.rmtree(checkpoints, ignore_errors=True)


def measure_two_four(arguments: argparse.Namespace, results: Results, subject: Subject) -> None:
    for bases in (False, True):
        methods = [method for method in arguments.methods if TWO_FOUR[method].bases == bases]
        missing = results.missing([subject.cell(method, "2:4", 0.5) for method in methods])
        pruner = subject.pruner("2:4", None, bases) if missing else None
        for cell in missing:
            assert pruner is not None
            start = time.perf_counter()
            network, left = prune_two_four(TWO_FOUR[cell["method"]], pruner, subject.calibration, subject.threads)
            seconds = time.perf_counter() - start
            results.add(cell | measured(subject.score(network.pruned), left, network.layers, seconds))


def measured(score: Score, left: Left, layers: Sequence[LinearLayer], seconds: float) -> Cell:
    """Return what a cell says of a pruned network."""
    weights = {layer.name: layer.K * layer.N for layer in layers}
    flops = {layer.name: layer.M * layer.K * layer.N for layer in layers}
    return {
        "top1": score.top1,
        "kl": score.kl,
        "flops_left": _left_of(flops, left),
        "weights_left": _left_of(weights, left),
        "seconds": round(seconds, 1),
    }


def _left_of(sizes: Mapping[str, int], left: Left) -> float:
    return sum(size * left.get(name, 1.0) for name, size in sizes.items()) / sum(sizes.values())


def print_tables(arguments: argparse.Namespace, results: Results) -> None:
    """Print the tables that are asked for, one set for each data set and version of the tool in the results."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in results.cells:
        groups.setdefault((cell["data"], cell["tool_version"]), []).append(cell)
    for cells in groups.values():
        print_header(cells)
        dense = next(cell for cell in cells if cell["method"] == "dense")
        if arguments.two_four:
            print_two_four(dense, [cell for cell in cells if cell["method"] in arguments.methods])
            continue
        found = {(cell["method"], cell["block"], cell["flops"]): cell for cell in cells}
        for title, rows in sections(arguments):
            rows = {words: at for words, at in rows.items() if any((*at, keep) in found for keep in arguments.budgets)}
            if not rows:
                continue
            kinds = {"top1": "top-1, % (measured)", "kl": "KL to the dense model, nats (measured)"}
            if arguments.ablation == "power":
                kinds["weights_left"] = "weights of linear layers left, % (counted)"
            for kind, words in kinds.items():
                print_table(f"{title}{words}", kind, dense, rows, found, arguments.budgets)


def sections(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Yield the title of a pair of tables and its rows: (method, block) by words."""
    if arguments.ablation == "blocks":
        for method in arguments.methods:
            yield f"{METHODS[method].words}: ", {f"blocks {block}": (method, block) for block in arguments.blocks}
        return
    for block in arguments.blocks:
        yield f"blocks {block}: ", {METHODS[method].words: (method, block) for method in arguments.methods}


def print_header(cells: Sequence[Cell]) -> None:
    first = cells[0]
    dates = sorted({cell["date"] for cell in cells})
    top1 = next(cell["top1"] for cell in cells if cell["method"] == "dense") / 100
    error = 100 * np.sqrt(top1 * (1 - top1) / first["images"])
    devices = sorted({f"{cell['device']}, {cell['threads']} threads" for cell in cells})
    versions = sorted({cell["versions"] for cell in cells})
    print(f"{first['model']}, {first['data_words']}; one standard error of the dense top-1: {error:.1f} points;")
    print(f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {'; '.join(devices)}; {'; '.join(versions)}")


def print_table(
    title: str,
    kind: str,
    dense: Cell,
    rows: Mapping[str, tuple[str, str]],
    found: Mapping[tuple[str, str, float], Cell],
    budgets: Sequence[float],
) -> None:
    print(f"\n| {title} | {' | '.join(f'{keep:.0%} of FLOPs' for keep in budgets)} |\n|{'---|' * (len(budgets) + 1)}")
    print(f"| dense | {' | '.join([_value(dense, kind)] * len(budgets))} |")
    for words, (method, block) in rows.items():
        values = [_entry(found.get((method, block, keep)), kind) for keep in budgets]
        print(f"| {words} | {' | '.join(values)} |")
    print()


def print_two_four(dense: Cell, cells: Sequence[Cell]) -> None:
    columns = (
        "2:4 in every layer of attention and MLP",
        "top-1, % (measured)",
        "KL to the dense model, nats (measured)",
        "FLOPs of linear layers left, % (counted)",
        "s (measured)",
    )
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    by_method = {cell["method"]: cell for cell in cells}
    rows = {"dense": dense} | {one.words: by_method[name] for name, one in TWO_FOUR.items() if name in by_method}
    for words, cell in rows.items():
        values = (*(_value(cell, kind) for kind in ("top1", "kl", "flops_left")), f"{cell['seconds']:.0f}")
        print(f"| {words} | {' | '.join(values)} |")
    print()


def _entry(cell: Cell | None, kind: str) -> str:
    if cell is None:
        return "-"
    missed = abs(cell["flops_left"] - cell["flops"]) > 0.005  # LSP's λ has steps; small layers have large blocks
    return _value(cell, kind) + (f" (at {cell['flops_left']:.1%})" if missed and kind == "top1" else "")


def _value(cell: Cell, kind: str) -> str:
    return {
        "top1": f"{cell['top1']:.2f}",
        "kl": f"{cell['kl']:.4f}",
        "flops_left": f"{100 * cell['flops_left']:.1f}",
        "weights_left": f"{100 * cell['weights_left']:.1f}",
    }[kind]


if __name__ == "__main__":
    main()

"""What only TensorRT on a GPU shows: that engines build, run in CUDA graphs, and answer as ONNX Runtime does.

    python benchmarks/gpu_engines.py OUT [--model MODEL.onnx --data DATA] [--plugin liblsp_block_sparse.so]

Compresses the model (the embedded digits ViT if none is named) in several ways for the GPU that is here, builds each
with TensorRT, and compares it with the dense model: answers with those of ONNX Runtime, times with those of the dense
engine, in alternating blocks of one run. With the plugin, block-sparse too. Writes OUT/engines.md, and exits with 1
where an engine answers otherwise than ONNX Runtime does for the same file. Needs lsp-deploy[tensorrt], installed: the
build's process sees nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lsp_deploy.engines.protocol import layer_counts, read_sidecar
from lsp_deploy.engines.tensorrt_common.gpu import first_gpu
from lsp_deploy.hardware.target import list_targets

FORMS = {
    "fp16": ("--precision", "fp16", "--sparsity", "none"),
    "int8": ("--precision", "int8", "--sparsity", "none"),
    "int8 2:4": ("--precision", "int8", "--sparsity", "2:4"),
}
BLOCK_FORMS = {
    "fp16 blocks": ("--precision", "fp16", "--sparsity", "block"),
    "int8 blocks": ("--precision", "int8", "--sparsity", "block"),
}
# Of the same file in TensorRT and in ONNX Runtime, in float32. What rounding in fp16 tips over to the next int8 stays
# above: 37 dB between fp16 and float32 for the digits ViT in int8 with 2:4, both in ONNX Runtime on a CPU.
LEAST_SQNR_DB = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Check engines against ONNX Runtime and measure them.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--plugin", type=Path, help="the operator for TensorRT (docs/tensorrt-plugin.md)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    target = write_target(given.out / "here.toml")
    model, data = given.model, given.data
    if model is None:
        lsp_deploy("demo", "--copy-only", "-o", str(given.out / "digits"))
        model = given.out / "digits" / "digits_vit.onnx"
        data = str(given.out / "digits" / "evaluation.npz")
    plugin = () if given.plugin is None else ("--plugin", str(given.plugin))
    files = {"dense": model}
    for name, flags in (FORMS | (BLOCK_FORMS if plugin else {})).items():
        folder = given.out / name.replace(":", "").replace(" ", "-")
        lsp_deploy("compress", str(model), "--target", str(target), *flags, *plugin, "-o", str(folder))
        files[name] = folder / "model.onnx"
        print_engine(name, folder)
    options = (*plugin, *(() if data is None else ("--data", data)))
    rows = [
        row(name, compare(file, file, target, options), compare(model, file, target, options))
        for name, file in files.items()
    ]
    head = "| model | batch | median ms | dense ms | gain | SQNR to ONNX Runtime, dB | SQNR to dense, dB |\n"
    text = head + "|---|---|---|---|---|---|---|\n" + "\n".join(line for lines, _ in rows for line in lines)
    (given.out / "engines.md").write_text(text + "\n")
    print(text)
    wrong = [name for name, (_, sqnr_db) in zip(files, rows, strict=True) if sqnr_db < LEAST_SQNR_DB]
    if wrong:
        sys.exit(f"{', '.join(wrong)}: the engine does not answer as ONNX Runtime does")


def write_target(path: Path) -> Path:
    """Describe the GPU that is here, for which TensorRT is the only builder."""
    gpu = first_gpu()
    if gpu is None:
        sys.exit("there is no NVIDIA GPU here")
    base = next((one for one in list_targets() if one.compute_capability == gpu.compute_capability), None)
    if base is None:
        sys.exit(f"no target has the compute capability of {gpu.name}, {gpu.compute_capability}")
    path.write_text(
        f'base = "{base.name}"\nbuilders = ["tensorrt"]\nbuild_on_device = false\nsm_count = {gpu.multiprocessors}\n'
    )
    return path


def compare(dense: Path, compressed: Path, target: Path, options: tuple[str, ...]) -> dict:
    return json.loads(lsp_deploy("compare", str(dense), str(compressed), "--target", str(target), *options, "--json"))


def row(name: str, same: dict, other: dict) -> tuple[list[str], float]:
    """Return the table's lines for one model, and how near its engine is to ONNX Runtime."""
    near = same["fidelity"]["sqnr_db"]
    times = {(one["label"], one["batch"]): one["latency_median_ms"] for one in other["profiles"]}
    lines = []
    for batch in sorted({batch for _, batch in times}):
        dense, compressed = times["dense", batch], times["compressed", batch]
        times_ms = f"{compressed:.3f} | {dense:.3f} | {dense / compressed:.2f}"
        lines.append(f"| {name} | {batch} | {times_ms} | {near:.1f} | {other['fidelity']['sqnr_db']:.1f} |")
    return lines, near


def print_engine(name: str, folder: Path) -> None:
    for engine in sorted((folder / "engines").glob("*.engine")):
        info = read_sidecar(engine)
        if info is not None:
            print(f"{name}: {layer_counts(info.layers)}, 2:4: {info.sparse_tactics}")
            for warning in info.warnings:
                print(f"  {warning}")


def lsp_deploy(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lsp_deploy", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"lsp-deploy {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()

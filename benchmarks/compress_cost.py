"""What `lsp-deploy compress` costs and gives: time, memory, file size, accuracy, int8 layers of the engine.

    python benchmarks/compress_cost.py deit_tiny.onnx --target a100 --precision int8 --sparsity none \
        --calibration-data calibration/ --labels labels.csv --eval-data evaluation/ --eval-labels labels.csv

Runs the command that follows once, in a process of its own, and prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-m", "lsp_deploy", "compress", *sys.argv[1:], "-o", f"{folder}/out"]
        start = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        if code not in (0, 1):
            sys.exit(code)
        report = json.loads(Path(folder, "out", "report.json").read_text())
    print_table(report, seconds, peak, code)


def print_table(report: dict[str, Any], seconds: float, peak: int, code: int) -> None:
    fidelity, engine, size = report["fidelity"], report["engine"], report["size"]
    rows = {
        "command": f"compress {' '.join(argument.rsplit('/', 1)[-1] for argument in sys.argv[1:])}",
        "exit code": code,
        "wall time": f"{seconds:.0f} s (measured)",
        "largest resident set of one process": f"{peak / 2**30:.2f} GiB (measured)",
        "model file": f"{size['dense_bytes']:,} → {size['compressed_bytes']:,} bytes",
        "model file left": f"{size['compressed_percent']:.1f} % (measured)",
        "FLOPs of linear layers left": f"{report['flops']['linear_remaining_fraction']:.1%} (counted)",
        "held-out samples": fidelity["samples"],
        "top-1": f"{_percent(fidelity['top1_dense_percent'])} → {_percent(fidelity['top1_compressed_percent'])}",
        "top-1 lost, 95 % interval": _interval(fidelity, "measured_drop"),
        "expected top-1 loss, 95 % interval": _interval(fidelity, "expected_drop"),
        "same answer": _percent(fidelity["agreement_percent"]),
        "SQNR of the outputs": f"{fidelity['sqnr_db']:.1f} dB",
        "engine": _engine(engine),
        "CPU": f"{report['host']['cpu']}, {report['host']['threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in report["host"]["versions"].items()),
        "date": f"{date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores",
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _interval(fidelity: dict[str, Any], name: str) -> str:
    points, low, high = (fidelity[f"{name}{end}_points"] for end in ("", "_low", "_high"))
    return "-" if points is None else f"{points:+.2f} points ({low:+.2f} to {high:+.2f})"


def _engine(engine: dict[str, Any]) -> str:
    if not engine["built"]:
        return f"not built: {engine['not_built_reason'].splitlines()[0]}"
    counts = ", ".join(f"{count} {name}" for name, count in engine["layer_counts"].items())
    return f"{engine['backend']}, SM {engine['compute_capability']}, {engine['size_bytes']:,} bytes; {counts}"


if __name__ == "__main__":
    main()

"""Where the time of a model goes in ONNX Runtime, by operator."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from competitors import PROVIDERS, Images

from lsp_deploy.engines.onnxruntime_backend import session_options

_WARM_UP = 5


def print_profile(path: Path, images: Images, threads: int, runs: int = 40) -> None:
    """Print a table of the milliseconds that each operator takes in one run of the model.

    A node counts with its median over the runs; ONNX Runtime's profiler itself adds a little to each.
    """
    times, nodes = _by_operator(_events(path, images, threads, runs))
    total = sum(times.values())
    print("| operator | nodes | ms | share |\n|---|---|---|---|")
    for operator, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
        print(f"| {operator} | {nodes[operator]} | {milliseconds:.2f} | {milliseconds / total:.0%} |")
    print(f"| all | {sum(nodes.values())} | {total:.2f} | |")


def _events(path: Path, images: Images, threads: int, runs: int) -> list[dict[str, Any]]:
    options = session_options(threads)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(str(path), options, providers=PROVIDERS)
        feeds = {session.get_inputs()[0].name: images}
        for _ in range(_WARM_UP + runs):
            session.run(None, feeds)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]


def _by_operator(events: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Return milliseconds and number of nodes by operator."""
    by_node: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        by_node[_operator(event), event["name"]].append(event["dur"] / 1000)
    times: dict[str, float] = defaultdict(float)
    nodes: dict[str, int] = defaultdict(int)
    for (operator, _), milliseconds in by_node.items():
        times[operator] += float(np.median(milliseconds[_WARM_UP:]))
        nodes[operator] += 1
    return times, nodes


def _operator(event: dict[str, Any]) -> str:
    """Return the operator's name: our linear layers with their sizes, products of two activations as attention's."""
    name: str = event["args"]["op_name"]
    inputs, outputs = (_shapes(event, which) for which in ("input_type_shape", "output_type_shape"))
    if name == "BlockSparseLinear":
        return f"{name} {inputs[0][-1]} → {outputs[0][-1]}"
    of_activations = name.endswith("MatMul") and len(inputs) >= 2 and len(inputs[1]) > 2
    return f"{name}, attention" if of_activations else name


def _shapes(event: dict[str, Any], which: str) -> list[list[int]]:
    return [shape for value in event["args"].get(which, []) for shape in value.values()]

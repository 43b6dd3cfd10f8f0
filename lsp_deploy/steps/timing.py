"""What the layers of a network take on this machine's CPU: every shape is timed once and remembered.

Small models of one layer each run in ONNX Runtime, in every form that the layer could be run in, in turns. Times are
kept in the cache by shape, threads, CPU, ONNX Runtime and the operator's library.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lsp_deploy import console
from lsp_deploy.cache import cache_folder, content_key, drop_old_entries
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of, write_text
from lsp_deploy.hardware.cpu_timings import CANDIDATES, DENSITIES, CpuTimings, LayerTimes, LinearShape, type_of

if TYPE_CHECKING:
    from lsp_deploy.hardware.cpu_timings import Activation
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["CpuLayerTimer", "LayerTimer", "candidates", "layer_shape", "time_layers"]

_FORMAT = 1  # of what is kept, and of the models that are timed


class LayerTimer(Protocol):
    """Times one layer."""

    def curves(self, shape: LinearShape) -> dict[str, dict[float, float]]:
        """Return microseconds by candidate and density."""
        ...


def time_layers(
    prepared: PreparedModel, recipe: Recipe, target: Target, threads: int, timer: LayerTimer | None = None
) -> CpuTimings:
    """Return what each linear layer takes on this machine with so many threads, at the opt shapes.

    Args:
        prepared: the model.
        recipe: for the block shape; --precision bf16 has bf16 timed where the CPU has no instructions for it, too.
        target: this machine's CPU; types that it does not have are not timed.
        threads: of the sessions.
        timer: what times; the default runs ONNX Runtime and remembers.

    Raises:
        UserError: --precision bf16 without the operator's library.
    """
    shapes = {layer.name: layer_shape(layer, recipe.block_shape) for layer in prepared.layers}
    timer = timer or CpuLayerTimer(threads, candidates(target, bf16_is_typed=recipe.precision == "bf16"))
    distinct = list(dict.fromkeys(shapes.values()))
    times = {}
    with console.progress(f"timing the layers' shapes on this CPU, {threads} threads", len(distinct)) as advance:
        for shape in distinct:
            times[shape] = LayerTimes(shape, timer.curves(shape))
            advance(1)
    return CpuTimings(threads, {name: times[shape] for name, shape in shapes.items()})


def layer_shape(layer: LinearLayer, block: tuple[int, int]) -> LinearShape:
    """Return what the time of a layer depends on."""
    fused: tuple[Activation, ...] = ("gelu", "gelu_tanh", "relu")
    return LinearShape(
        M=layer.M,
        K=layer.K,
        N=layer.N,
        activation=next((kind for kind in fused if kind == layer.activation_kind), "none"),
        residual=layer.residual is not None,
        block=block,
        is_conv=layer.node.op_type == "Conv",
    )


def candidates(target: Target, *, bf16_is_typed: bool = False) -> tuple[str, ...]:
    """Return the ways to run a layer that this machine has; says where the operator's library is missing.

    Raises:
        UserError: bf16 was typed, and there is no library.
    """
    from lsp_deploy.plugins import library

    found = library()
    if found.path is None:
        if bf16_is_typed:
            raise UserError(f"--precision bf16 on a CPU needs the operator's library: {found.why}")
        console.say(f"layers run in ONNX Runtime's own operators: {found.why}")
        names = [name for name in CANDIDATES if not name.startswith("block_sparse")]
    else:
        slow_bf16 = not bf16_is_typed and "avx512_bf16" not in usable_isas(found.path)
        names = [name for name in CANDIDATES if not (slow_bf16 and type_of(name) == "bf16")]
    return tuple(name for name in names if type_of(name) in target.types)


def usable_isas(library: Path) -> list[str]:
    """Return the instruction sets that the operator's kernels may use here, best first; LSP_ISA caps them."""
    names = ctypes.CDLL(str(library)).lsp_isas
    names.restype = ctypes.c_char_p
    isas: list[str] = names().decode().split()
    cap = os.environ.get("LSP_ISA")
    return isas[isas.index(cap) :] if cap in isas else isas


class CpuLayerTimer:
    """Times candidates in ONNX Runtime and remembers."""

    def __init__(self, threads: int, names: Sequence[str]) -> None:
        """Take the threads of the sessions and the candidates."""
        self.threads, self.names = threads, tuple(names)
        self._machine = _machine()

    def curves(self, shape: LinearShape) -> dict[str, dict[float, float]]:
        """Return microseconds by candidate and density, from the cache where they were measured before."""
        names = ("matmul fp32",) if shape.is_conv else self.names
        folder = cache_folder() / "timings"
        entry = folder / content_key(
            format=_FORMAT, machine=self._machine, threads=self.threads, names=names, **vars(shape)
        )
        drop_old_entries(folder, entry)
        path = entry / "times.json"
        if path.is_file():
            known: dict[str, dict[str, float]] = json.loads(path.read_text())
            return {name: {float(density): us for density, us in curve.items()} for name, curve in known.items()}
        curves = _measure(shape, names, self.threads)
        write_text(path, json.dumps(curves, indent=1) + "\n")
        return curves


def _measure(shape: LinearShape, names: Sequence[str], threads: int) -> dict[str, dict[float, float]]:
    from lsp_deploy.engines.call_times import call_times_us
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
    from lsp_deploy.steps.layer_candidates import candidate_model, layer_feeds

    feeds = layer_feeds(shape)
    points = {
        f"{name} @{density:g}": (name, density)
        for name in names
        for density in (DENSITIES if name.startswith(("block_sparse", "gather")) else (1.0,))
    }
    with ExitStack() as stack:
        calls = {}
        for label, (name, density) in points.items():
            model = candidate_model(shape, name, density)
            calls[label] = stack.enter_context(OnnxRuntimeEngine.from_model(model, threads=threads)).bound(feeds)
        found = call_times_us(calls)
    curves: dict[str, dict[float, float]] = {name: {} for name in names}
    for label, (name, density) in points.items():
        curves[name][density] = round(found[label], 3)
    return curves


def _machine() -> dict[str, Any]:
    """Return what of this machine times depend on, as plain JSON."""
    from lsp_deploy.engines.host import cpu_model
    from lsp_deploy.plugins import library

    path = library().path
    return {
        "cpu": cpu_model(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "library": None if path is None else sha256_of(path),
        "isas": [] if path is None else usable_isas(path),
    }

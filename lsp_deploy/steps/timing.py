"""What linear layers and attention take on this machine's CPU: every shape is timed once and remembered.

Small models of one layer each run in ONNX Runtime, in every form that the layer could be run in, in turns. Times are
kept in the cache by shape, threads, CPU, ONNX Runtime and the operator's library, unless other programs disturbed them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lsp_deploy import console
from lsp_deploy.cache import cache_folder, content_key, drop_old_entries
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of, write_text
from lsp_deploy.hardware.cpu_timings import CANDIDATES, DENSITIES, CpuTimings, LayerTimes, LinearShape, type_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from lsp_deploy.hardware.cpu_timings import Activation
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["CpuLayerTimer", "LayerTimer", "candidates", "layer_shape", "time_layers"]

_FORMAT = 1  # of what is kept, and of the models that are timed
_DISTURBED_CPUS = 0.2  # kept busy by other programs, on top of those that the sessions leave idle
_AT = " @ "
# Attention is computed in what linear layers are.
_ATTENTION = {"block_sparse fp32": "lsp fp32", "block_sparse bf16": "lsp bf16"}


class LayerTimer(Protocol):
    """Times one layer, and all attention."""

    disturbed: bool
    """Whether other programs took CPU time from anything that was timed."""

    def curves(self, shape: LinearShape) -> dict[str, dict[float, float]]:
        """Return microseconds by candidate and density."""
        ...

    def attention(self, model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Return microseconds of all attention of a network by candidate; nothing where no operator can compute it."""
        ...


def time_layers(
    prepared: PreparedModel, recipe: Recipe, target: Target, threads: int, timer: LayerTimer | None = None
) -> CpuTimings:
    """Return what each linear layer, and attention, takes on this machine with so many threads, at the opt shapes.

    Args:
        prepared: the model.
        recipe: for the block shape; --precision bf16 has bf16 timed where the CPU has no instructions for it, too.
        target: this machine's CPU; types that it does not have are not timed.
        threads: of the sessions.
        timer: what times; the default runs ONNX Runtime and remembers.

    Raises:
        UserError: --precision bf16 without the operator's library.
    """
    from lsp_deploy.steps.attention_candidates import attention_left

    shapes = {layer.name: layer_shape(layer, recipe.block_shape) for layer in prepared.layers}
    timer = timer or CpuLayerTimer(threads, candidates(target, bf16_is_typed=recipe.precision == "bf16"))
    distinct = list(dict.fromkeys(shapes.values()))
    times = {}
    with console.progress(f"timing layers on this CPU, {threads} threads", len(distinct) + 1) as advance:
        for shape in distinct:
            times[shape] = LayerTimes(shape, timer.curves(shape))
            advance(1)
        attention = timer.attention(prepared.canonical, prepared.shapes.opt)
        left = attention_left(prepared.canonical)
        advance(1)
    if timer.disturbed:
        console.warn("other programs kept the CPU busy while layers were timed; where it is quiet, choices may differ")
    layers = {name: times[shape] for name, shape in shapes.items()}
    return CpuTimings(threads, layers, attention, left, disturbed=timer.disturbed)


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
    from lsp_deploy.plugins import instruction_sets

    isas = instruction_sets(library)
    cap = os.environ.get("LSP_ISA")
    return isas[isas.index(cap) :] if cap in isas else isas


class CpuLayerTimer:
    """Times candidates in ONNX Runtime and remembers."""

    def __init__(self, threads: int, names: Sequence[str]) -> None:
        """Take the threads of the sessions and the candidates."""
        self.threads, self.names = threads, tuple(names)
        self.disturbed = False
        self._machine = _machine()

    def curves(self, shape: LinearShape) -> dict[str, dict[float, float]]:
        """Return microseconds by candidate and density, from the cache where they were measured before."""
        names = ("matmul fp32",) if shape.is_conv else self.names
        known = self._remembered(lambda: _layer_times(shape, names, self.threads), names=names, **vars(shape))
        curves: dict[str, dict[float, float]] = {name: {} for name in names}
        for label, time in known.items():
            name, density = label.split(_AT)
            curves[name][float(density)] = time
        return curves

    def attention(self, model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Return microseconds of all attention by candidate, from the cache where they were measured before."""
        from lsp_deploy.model import model_bytes
        from lsp_deploy.steps.attention_candidates import attention_parts

        operator = [_ATTENTION[name] for name in self.names if name in _ATTENTION]
        total: dict[str, float] = {}
        for part in attention_parts(model, shapes, operator):
            forms = {name: hashlib.sha256(model_bytes(form)).hexdigest() for name, form in part.models.items()}
            times = self._remembered(partial(_times, part.models, part.feeds, self.threads), forms=forms)
            for name, time in times.items():
                total[name] = total.get(name, 0.0) + part.count * time
        return total

    def _remembered(self, measure: Callable[[], dict[str, float]], **what: Any) -> dict[str, float]:
        from lsp_deploy.engines.host import CpuMeter, available_cpus

        folder = cache_folder() / "timings"
        entry = folder / content_key(format=_FORMAT, machine=self._machine, threads=self.threads, **what)
        drop_old_entries(folder, entry)
        path = entry / "times.json"
        if path.is_file():
            known: dict[str, float] = json.loads(path.read_text())
            return known
        meter = CpuMeter()
        times = measure()
        foreign = meter.foreign_cpus()
        if foreign is not None and foreign > max(0, len(available_cpus()) - self.threads) + _DISTURBED_CPUS:
            self.disturbed = True
        else:
            write_text(path, json.dumps(times, indent=1) + "\n")
        return times


def _layer_times(shape: LinearShape, names: Sequence[str], threads: int) -> dict[str, float]:
    """Return microseconds by candidate and density, as "block_sparse fp32 @ 0.5"."""
    from lsp_deploy.steps.layer_candidates import candidate_model, layer_feeds

    models = {}
    for name in names:
        for density in DENSITIES if name.startswith(("block_sparse", "gather")) else (1.0,):
            models[f"{name}{_AT}{density:g}"] = candidate_model(shape, name, density)
    return _times(models, layer_feeds(shape), threads)


def _times(models: Mapping[str, ir.Model], feeds: Mapping[str, NDArray[Any]], threads: int) -> dict[str, float]:
    from lsp_deploy.engines.call_times import call_times_us
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine

    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(OnnxRuntimeEngine.from_model(model, threads=threads))
            for name, model in models.items()
        }
        found = call_times_us({name: engine.bound(feeds) for name, engine in engines.items()})
    return {name: round(time, 3) for name, time in found.items()}


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

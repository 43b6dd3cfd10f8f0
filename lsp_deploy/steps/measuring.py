"""The measurements of a run: dense against compressed, in ONNX Runtime on this host."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsp_deploy import console

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    import onnx_ir as ir

    from lsp_deploy.engines.fidelity import Fidelity
    from lsp_deploy.engines.power.recording import PowerRecorder
    from lsp_deploy.engines.profiler import Profile
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.steps.evaluation import Evaluator
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["Measured", "measure"]

PROFILE_SECONDS = 2.0
"""Of measuring, for each of the two models."""


@dataclass
class Measured:
    """What was measured on this host."""

    fidelity: Fidelity
    profiles: Mapping[str, Profile]


def measure(
    prepared: PreparedModel, compressed: ir.Model, evaluator: Evaluator, target: Target, threads: int
) -> Measured:
    """Compare the compressed model with the user's on the held-out images, and time both in alternating blocks.

    A 16-bit model runs as its float32 twin: its time on this CPU says nothing about the target's. Power is measured
    where this CPU is the target and has a meter.
    """
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
    from lsp_deploy.engines.profiler import profile

    fidelity = evaluator.fidelity(compressed)
    batch = next(iter(prepared.shapes.min.values()))[0]
    feeds = evaluator.held_out.batch(batch)
    with (
        console.progress("profiling dense and compressed on this CPU", 1) as advance,
        OnnxRuntimeEngine.from_model(prepared.original, threads=threads, float32_twin=True) as dense,
        OnnxRuntimeEngine.from_model(compressed, threads=threads, float32_twin=True) as small,
        _recorder(target) as power,
    ):
        engines = {"dense": dense, "compressed": small}
        for warning in small.describe().warnings:
            console.warn(f"compressed: {warning}")
        profiles = profile(engines, feeds, threads=threads, duration=PROFILE_SECONDS, power=power)
        advance(1)
    return Measured(fidelity, profiles)


def _recorder(target: Target) -> AbstractContextManager[PowerRecorder]:
    from lsp_deploy.engines.power.finding import power_recorder
    from lsp_deploy.engines.power.recording import PowerRecorder

    if target.kind == "cpu":
        return power_recorder("cpu")
    return nullcontext(PowerRecorder(None, f"not measured: no engine ran on {target.name}"))

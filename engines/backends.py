"""Which backends there are, and which of them builds a target's engine on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsp_deploy.engines.protocol import Backend

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target

__all__ = ["backends", "builder_for"]


def backends() -> list[Backend]:
    """Return every backend, installed here or not."""
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeBackend
    from lsp_deploy.engines.tensorrt.backend import TensorRtBackend
    from lsp_deploy.engines.tensorrt_rtx.backend import TensorRtRtxBackend

    return [OnnxRuntimeBackend(), TensorRtRtxBackend(), TensorRtBackend()]


def builder_for(target: Target, only: str | None = None) -> tuple[Backend | None, str]:
    """Return the first of the target's builders that is usable here, or None; and in one line, which, or what to do.

    `only` is the name of the one builder to consider. `Target.commands_on_device` has the commands for a target whose
    engines only its own machine builds.
    """
    known = {backend.name: backend for backend in backends()}
    reasons = []
    for name in target.builders:
        backend = known.get(name)
        if backend is None or not backend.serves(target) or only not in (None, name):
            continue
        status = backend.status(target)
        if status.can_build:
            return backend, f"{name} {status.version} builds for {target.name} on this machine"
        reasons.append(f"{name} {status.detail}: {status.hint}")
    why = "; ".join(reasons) or f"what builds for it is {', '.join(target.builders)}"
    return None, f"no engine for {target.name} can be built on this machine: {why}"

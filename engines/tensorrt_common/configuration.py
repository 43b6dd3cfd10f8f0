"""The builder's configuration. Every flag is looked up by its name: numbers, and which there are, change by version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsp_deploy.engines.protocol import BuildOptions
from lsp_deploy.errors import UserError
from lsp_deploy.files import write_bytes

__all__ = ["NotInThisVersionError", "configure", "load_plugins", "read_timing_cache", "write_timing_cache"]


class NotInThisVersionError(ValueError):
    """An option that the installed version does not have, or a file that it does not take."""


def configure(trt: Any, config: Any, options: BuildOptions, compute_capability: tuple[int, int] | None) -> None:
    """Set what `options` ask for.

    Args:
        trt: the module, tensorrt or tensorrt_rtx.
        config: its IBuilderConfig.
        options: what is asked for.
        compute_capability: of the GPU to build for, where the module can build for one that is not there.

    Raises:
        NotInThisVersionError: this version does not have what is asked for.
    """
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the layers can be read back
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for name in _flags(options):
        config.set_flag(_member(trt, trt.BuilderFlag, name))
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper().replace("-", "_")
        config.hardware_compatibility_level = _member(trt, trt.HardwareCompatibilityLevel, level)
    if options.plugins:
        config.plugins_to_serialize = [str(path.absolute()) for path in options.plugins]
    if compute_capability is not None:
        # Without a target the builder takes types that the GPU does not have.
        major, minor = compute_capability
        config.num_compute_capabilities = 1
        config.set_compute_capability(_member(trt, trt.ComputeCapability, f"SM{major}{minor}"), 0)


def load_plugins(trt: Any, logger: Any, paths: Sequence[Path]) -> None:
    """Make TensorRT's own plugins known, and those of the libraries in `paths`.

    Raises:
        NotInThisVersionError: a library is not there, or not one for this version.
    """
    trt.init_libnvinfer_plugins(logger, "")
    for path in paths:
        # Absolute: a bare name would be looked for in the system's library folders, and not here.
        if trt.get_plugin_registry().load_library(str(path.absolute())) is None:
            raise NotInThisVersionError(f"{_title(trt)} cannot load the plugin library {path}")


def read_timing_cache(config: Any, path: Path | None) -> list[str]:
    """Give the builder what was measured in earlier builds; returns what the user should know."""
    if path is None:
        return []
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is not None and config.set_timing_cache(cache, False):
        return []
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return [f"the timing cache {path.name} is of another GPU or version: everything was measured anew"]


def write_timing_cache(config: Any, path: Path | None) -> list[str]:
    """Write what the builder has measured; returns what the user should know: the engine is there in any case."""
    cache = config.get_timing_cache() if path is not None else None
    if path is not None and cache is not None:
        try:
            write_bytes(path, bytes(cache.serialize()))
        except UserError as error:
            # The whole text names a folder of this machine, and the sidecar travels.
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.__cause__
            return [f"the timing cache {path.name} was not written: {reason}"]
    return []


def _flags(options: BuildOptions) -> list[str]:
    asked = {
        "SPARSE_WEIGHTS": options.sparse_weights,
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refittable,
        "STRIP_PLAN": options.strip_weights,
        # A stripped engine that is not refittable takes back the weights it was built with.
        "REFIT_IDENTICAL": options.strip_weights and not options.refittable,
    }
    return [name for name, wanted in asked.items() if wanted]


def _member(trt: Any, enum: Any, name: str) -> Any:
    member = getattr(enum, name, None)
    if member is None:
        raise NotInThisVersionError(f"{_title(trt)} has no {enum.__name__}.{name}")
    return member


def _title(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"

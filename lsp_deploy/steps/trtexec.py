"""Build options as flags of trtexec, for the device that builds its own engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsp_deploy.engines.protocol import BuildOptions

__all__ = ["trtexec_flags"]

_COMPATIBILITY = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}


def trtexec_flags(options: BuildOptions, model: str) -> tuple[list[str], list[str]]:
    """Return the flags that build an engine as `options` ask, and those that run it.

    Shapes, 2:4 weights and plugins are not among them: `Target.commands_on_device` writes those.

    Args:
        options: how the engine is built.
        model: path of the ONNX file on the device: an engine without weights takes them from it again.
    """
    build, run = [], []
    if options.workspace_mb is not None:
        build.append(f"--memPoolSize=workspace:{options.workspace_mb}")
    if options.optimization_level is not None:
        build.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.timing_cache is not None:
        build.append(f"--timingCacheFile={options.timing_cache.name}")
    if options.version_compatible:
        # Such an engine holds a runtime, which trtexec lets run only where it is told to.
        build.append("--versionCompatible")
        run.append("--versionCompatible")
    if options.hardware_compatibility != "none":
        build.append(f"--hardwareCompatibilityLevel={_COMPATIBILITY[options.hardware_compatibility]}")
    if options.refittable:
        build.append("--refit")
    if options.strip_weights:
        build.append("--stripWeights")
        run += ["--refit", f"--refitFromOnnx={model}"]
    return build, run

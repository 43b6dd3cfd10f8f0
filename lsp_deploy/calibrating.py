"""The verb `calibrate-target`: from where on zeros pay on the GPU of this machine, measured, in a target file."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsp_deploy import console
from lsp_deploy.allocation.gpu_execution import gpu_too_old
from lsp_deploy.errors import UserError
from lsp_deploy.files import make_folder, write_text
from lsp_deploy.hardware.cpu_timings import LinearShape
from lsp_deploy.hardware.gpu_timings import break_even_zeros

if TYPE_CHECKING:
    from rich.table import Table

    from lsp_deploy.hardware.cpu_timings import Activation
    from lsp_deploy.hardware.target import ElementType, Target
    from lsp_deploy.steps.gpu_timing import GpuLayerTimer

__all__ = ["Calibration", "LayerBreakEven", "calibrate_target", "calibration_table"]

_TOKENS = 197  # an image of 224 x 224 in patches of 16 x 16, and the class token
_WIDTHS = (384, 768)  # of DeiT-Small and DeiT-Base
_BLOCKS = ((32, 32), (16, 16))
_GAIN = 0.97  # of the dense time, at most, for 2:4 to pay: less may be chance


@dataclass(frozen=True)
class LayerBreakEven:
    """What was measured for one shape of layer."""

    shape: LinearShape
    dense_us: float
    two_four_us: float | None
    """None where the target has no 2:4 units."""
    zeros: float | None
    """Fraction of zero blocks of 32 x 32 from which the operator is faster; None where it never is."""
    zeros_16: float | None
    """The same of blocks of 16 x 16."""


@dataclass(frozen=True)
class Calibration:
    """A target as this machine has it, and what it is from."""

    path: Path
    target: Target
    layers: Sequence[LayerBreakEven]
    source: str
    """Device, versions, date and conditions."""


def calibrate_target(
    name: str,
    output: Path,
    plugins: Sequence[Path] = (),
    *,
    batch: int = 8,
    force: bool = False,
    timer: GpuLayerTimer | None = None,
) -> Calibration:
    """Measure from where on zeros pay on the target's GPU, which is here, and write a copy of the target that says so.

    The layers are those of DeiT-Small and DeiT-Base in the target's compute type. A break-even is the median over them;
    2:4 pays from the smallest sizes on from which no measured layer is without a gain.

    Args:
        name: of the target, or its TOML file.
        output: TOML file to write.
        plugins: libraries with the operator for TensorRT.
        batch: images at once.
        force: replace a file that is there.
        timer: what times; the default builds engines and remembers.

    Raises:
        UserError: the target is a CPU, its GPU is not here, no plugin is named, or the file is there already.
        EngineBuildError: an engine is refused.
    """
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.steps.gpu_timing import engine_timer

    target = load_target(name)
    _check_target(target)
    if timer is None:
        _check_gpu(target)
    _check_files(output, plugins, force=force)
    timer = timer or engine_timer(target, plugins)
    has_two_four = target.peak[target.compute_type].sparse24 is not None
    layers = []
    shapes = list(_shapes(batch))
    with console.progress(f"measuring on the {timer.device}", len(shapes)) as advance:
        for shape in shapes:
            layers.append(_break_even(shape, timer, target.compute_type, two_four=has_two_four))
            advance(1)
    versions = ", ".join(f"{what} {version}" for what, version in timer.versions.items())
    today = date.today().isoformat()
    source = f"measured on {timer.device} with {versions}, {today}, {target.compute_type}, batch {batch}"
    calibrated = _calibrated(target, layers, source, output)
    write_text(output, _toml(calibrated, name, layers, source))
    return Calibration(output, calibrated, layers, source)


def calibration_table(calibration: Calibration) -> Table:
    """Return what was measured, layer by layer."""
    from rich.table import Table

    table = Table("M", "K", "N", "dense µs", "2:4 µs", "zeros to pay, 32x32", "16x16", box=None)
    for layer in calibration.layers:
        shape = layer.shape
        two_four = "-" if layer.two_four_us is None else f"{layer.two_four_us:.1f}"
        sizes = (str(shape.M), str(shape.K), str(shape.N))
        table.add_row(*sizes, f"{layer.dense_us:.1f}", two_four, _percent(layer.zeros), _percent(layer.zeros_16))
    return table


def _check_target(target: Target) -> None:
    if target.kind == "cpu":
        raise UserError(f"{target.name} needs no calibration: compress measures every layer on the CPU that is here")
    why_not = gpu_too_old(target)
    if target.compute_type == "fp32":
        why_not = "computes in fp16, bf16 and int8 on a GPU"
    if why_not is not None:
        raise UserError(f"{target.name} has nothing to calibrate: lsp::BlockSparseLinear {why_not}")


def _check_gpu(target: Target) -> None:
    from lsp_deploy.engines.tensorrt_common.gpu import first_gpu

    gpu = first_gpu()
    if gpu is None or gpu.compute_capability != target.compute_capability:
        here = "has no NVIDIA GPU" if gpu is None else f"has a {gpu.name}, {gpu.compute_capability}"
        raise UserError(
            f"calibrate-target measures on the GPU itself: {target.title} has compute capability "
            f"{target.compute_capability}, and this machine {here}; run it there"
        )


def _check_files(output: Path, plugins: Sequence[Path], *, force: bool) -> None:
    if output.suffix != ".toml":
        raise UserError(f"{output} would not be found as a target file; let its name end with .toml")
    if output.exists() and not force:
        raise UserError(f"{output} is there already; name another file, or add --force")
    if not plugins:
        raise UserError(
            "calibrate-target times lsp::BlockSparseLinear: build liblsp_block_sparse.so (docs/tensorrt-plugin.md) "
            "and name it with --plugin"
        )
    for path in plugins:
        if not path.is_file():
            raise UserError(f"plugin {path} does not exist")
    # Now, and not when everything has been measured.
    make_folder(output.parent)
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {output}: permission denied; choose another -o")


def _shapes(batch: int) -> Iterable[LinearShape]:
    """Yield the layers of a block of each width: qkv, proj, fc1, fc2."""
    for width in _WIDTHS:
        layers: tuple[tuple[int, int, Activation], ...] = (
            (width, 3 * width, "none"),
            (width, width, "none"),
            (width, 4 * width, "gelu"),
            (4 * width, width, "none"),
        )
        for K, N, activation in layers:
            yield LinearShape(batch * _TOKENS, K, N, activation, block=_BLOCKS[0])


def _break_even(
    shape: LinearShape, timer: GpuLayerTimer, dtype: ElementType, *, two_four: bool
) -> LayerBreakEven:  # fmt: skip
    assert dtype in ("fp32", "fp16")
    dense, halved, operator = f"matmul {dtype}", f"two_four {dtype}", f"block_sparse {dtype}"
    names = [dense, *([halved] if two_four else []), operator]
    curves = timer.curves(shape, names, dtype)
    narrow = LinearShape(shape.M, shape.K, shape.N, shape.activation, block=_BLOCKS[1])
    narrow_curves = timer.curves(narrow, [dense, operator], dtype)
    # Each against the dense layer that took turns with it.
    return LayerBreakEven(
        shape=shape,
        dense_us=curves[dense][1.0],
        two_four_us=curves[halved][1.0] if two_four else None,
        zeros=break_even_zeros(curves[operator], curves[dense][1.0]),
        zeros_16=break_even_zeros(narrow_curves[operator], narrow_curves[dense][1.0]),
    )


def _calibrated(target: Target, layers: Sequence[LayerBreakEven], source: str, output: Path) -> Target:
    """Return the target with what was measured in its `pays` table; what never pays is left out."""
    sizes = _two_four_sizes(layers)
    pays = target.pays.model_copy(
        update={
            "sparse24_min_k": None if sizes is None else sizes[0],
            "sparse24_min_n": None if sizes is None else sizes[1],
            "source": source,
            "block_zeros_min": _median([layer.zeros for layer in layers]),
            "block_zeros_min_16": _median([layer.zeros_16 for layer in layers]),
            "block_source": source,
        }
    )
    name = output.stem.strip().lower().replace("_", "-").replace(" ", "-")
    return target.model_copy(update={"name": name, "aliases": [], "pays": pays})


def _median(zeros: Sequence[float | None]) -> float | None:
    """Return the median, within what a target may say; a layer for which zeros never pay counts as 1."""
    middle = statistics.median(1.0 if one is None else one for one in zeros)
    return None if middle >= 1 else min(max(round(middle, 2), 0.01), 0.99)


def _two_four_sizes(layers: Sequence[LayerBreakEven]) -> tuple[int, int] | None:
    """Return the least K and N from which every measured layer gains by 2:4, those that hold for most layers."""
    best: tuple[int, int] | None = None
    most = 0
    for k in sorted({layer.shape.K for layer in layers}):
        for n in sorted({layer.shape.N for layer in layers}):
            within = [layer for layer in layers if k <= layer.shape.K and n <= layer.shape.N]
            gains = all(one.two_four_us is not None and one.two_four_us <= _GAIN * one.dense_us for one in within)
            if gains and len(within) > most:
                best, most = (k, n), len(within)
    return best


def _toml(target: Target, base: str, layers: Sequence[LayerBreakEven], source: str) -> str:
    import tomli_w

    values: dict[str, Any] = target.model_dump(mode="json", exclude_none=True)
    lines = [f"{base}, with `pays` {source}.", "Written by lsp-deploy calibrate-target; each layer as it was measured:"]
    for layer in layers:
        shape = layer.shape
        two_four = "" if layer.two_four_us is None else f", 2:4 {layer.two_four_us:.1f} µs"
        lines.append(
            f"  {shape.M} x {shape.K} x {shape.N}: dense {layer.dense_us:.1f} µs{two_four}, zero blocks pay from "
            f"{_percent(layer.zeros)} (32x32), {_percent(layer.zeros_16)} (16x16)"
        )
    return "".join(f"# {line}\n" for line in lines) + tomli_w.dumps(values)


def _percent(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"

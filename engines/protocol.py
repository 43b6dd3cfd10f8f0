"""What every engine and every builder offers, and the sidecar that is written beside a built engine.

An `Engine` runs a model; a `Backend` builds engines for targets and loads them. ONNX Runtime, TensorRT and TensorRT-RTX
follow this protocol.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lsp_deploy.errors import CheckFailedError, UserError
from lsp_deploy.files import sha256_of, write_text

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target

__all__ = [
    "Backend",
    "BackendStatus",
    "BuildOptions",
    "DeviceTimed",
    "Engine",
    "EngineBuildError",
    "EngineInfo",
    "LayerRecord",
    "SparseTactics",
    "TensorSpec",
    "layer_counts",
    "read_sidecar",
    "sidecar_path",
    "write_sidecar",
]


class TensorSpec(NamedTuple):
    """Element type and shape of an engine's input or output; a dynamic dimension is its name."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


class EngineBuildError(CheckFailedError):
    """A builder that serves the target failed: its first meaningful line, and in `details` whatever else it said."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildOptions(_Record):
    """How an engine is built; shapes are complete, batch included, for every dynamic input."""

    min_shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    opt_shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict, description="what the engine is tuned for")
    max_shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    workspace_mb: int | None = Field(None, ge=1, description="limit of the builder's scratch memory, MiB")
    sparse_weights: bool = Field(False, description="let the builder use 2:4 kernels where weights have the pattern")
    optimization_level: int | None = Field(None, ge=0, le=5, description="TensorRT's builder optimization level")
    timing_cache: Path | None = Field(None, description="file of TensorRT's kernel timings: read if there, and written")
    plugins: tuple[Path, ...] = Field((), description="plugin libraries of the model; the engine holds them too")
    version_compatible: bool = Field(False, description="let later TensorRT releases run the engine")
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = Field(
        "none", description="which other GPUs may run the engine"
    )
    refittable: bool = Field(False, description="let other weights be put into the engine")
    strip_weights: bool = Field(False, description="leave the weights out: the engine takes them from the model again")
    timeout_seconds: float = Field(3600, gt=0)

    def for_sidecar(self) -> BuildOptions:
        """Return the options with the names of files only: folders mean nothing on another machine."""
        cache = self.timing_cache and Path(self.timing_cache.name)
        return self.model_copy(
            update={"timing_cache": cache, "plugins": tuple(Path(path.name) for path in self.plugins)}
        )


class LayerRecord(_Record):
    """One layer of a built engine, after the builder's fusions."""

    name: str
    kind: str = Field(description="the builder's own word: gemm, kgen, custom_layer, MatMulIntegerToFloat, ...")
    precision: str = Field(
        description="what it computes in: fp32, fp16, bf16, int8, ...; of a gemm, its operands' type"
    )
    input_types: list[str] = Field(default_factory=list)
    constant_types: list[str] = Field(default_factory=list, description="of its weights and other constants")
    output_types: list[str] = Field(default_factory=list)
    tactic: str = ""
    onnx_nodes: list[str] = Field(default_factory=list, description="names of the model's nodes that it does")


class SparseTactics(_Record):
    """What TensorRT's builder says of 2:4 weights: in how many layers it found them, in how many it uses them."""

    eligible: int
    chosen: int
    layers: list[str] = Field(default_factory=list, description="names of the layers that use them, as the builder has")


class EngineInfo(_Record):
    """What an engine is: the content of its sidecar, and what `describe` returns."""

    format: Literal["lsp-deploy.engine.v1"] = "lsp-deploy.engine.v1"
    backend: str
    target: str
    compute_capability: str | None = Field(None, description='of the GPU it is built for, e.g. "8.0"')
    device: str | None = Field(None, description="what it runs on, where it is loaded")
    threads: int | None = Field(None, description="CPU threads it runs on, where it is loaded")
    file: str | None = Field(None, description="name of the engine's file")
    sha256: str | None = None
    size_bytes: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    build_seconds: float | None = None
    options: BuildOptions | None = None
    layers: list[LayerRecord] = Field(default_factory=list)
    memory: dict[str, int] = Field(default_factory=dict, description="bytes, as the builder reports them")
    sparse_tactics: SparseTactics | None = Field(None, description="2:4 kernels; None where the builder says nothing")
    warnings: list[str] = Field(default_factory=list)
    created: str | None = Field(None, description="UTC, ISO 8601")


class BackendStatus(_Record):
    """Whether a backend is usable on this machine, and what to do where it is not."""

    can_build: bool
    can_run: bool
    version: str | None = None
    detail: str = ""
    hint: str = Field("", description="what to install or where to go for the rest")


class Engine(Protocol):
    """Something that runs a model."""

    backend: str

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Return the inputs by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Return the outputs by name."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output for `feeds`; raises UserError where names, types or shapes do not fit."""
        ...

    def describe(self) -> EngineInfo:
        """Return what this engine is."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@runtime_checkable
class DeviceTimed(Protocol):
    """An engine that times its runs on the device, without the copies to and from it."""

    clock: str
    """What is timed, as a clause for the report."""

    def timed_run(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Put `feeds` on the device; return a call that runs the engine on them once and gives milliseconds."""
        ...


class Backend(Protocol):
    """Something that builds engines for targets and loads them."""

    name: str

    def status(self, target: Target | None = None) -> BackendStatus:
        """Return whether this backend can build and run here, for `target` where one is named."""
        ...

    def serves(self, target: Target) -> bool:
        """Return whether this backend builds for `target`, installed here or not."""
        ...

    def build(self, model_path: Path, engine_path: Path, target: Target, options: BuildOptions) -> EngineInfo:
        """Build `model_path` for `target` into `engine_path`, with its sidecar; raises EngineBuildError."""
        ...

    def load(self, engine_path: Path) -> Engine:
        """Return the engine in `engine_path`, ready to run; raises UserError where it cannot run here."""
        ...


def sidecar_path(engine_path: Path) -> Path:
    """Return where the sidecar of an engine lies: `<engine>.json` beside it."""
    return engine_path.with_name(f"{engine_path.name}.json")


def write_sidecar(info: EngineInfo, engine_path: Path) -> EngineInfo:
    """Write the sidecar of a built engine, atomically; returns `info` with the file's name, size, hash and date."""
    complete = info.model_copy(
        update={
            "file": engine_path.name,
            "sha256": sha256_of(engine_path),
            "size_bytes": engine_path.stat().st_size,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    )
    write_text(sidecar_path(engine_path), complete.model_dump_json(indent=2) + "\n")
    return complete


def read_sidecar(engine_path: Path) -> EngineInfo | None:
    """Return the sidecar of an engine, or None where there is none.

    Raises:
        UserError: the sidecar is not one, or belongs to another engine file.
    """
    path = sidecar_path(engine_path)
    if not path.is_file():
        return None
    try:
        info = EngineInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*(str(part) for part in first["loc"]), first["msg"]])
        raise UserError(f"{path} is not an engine's sidecar: {what}; build the engine again") from None
    if info.sha256 is not None and info.sha256 != sha256_of(engine_path):
        raise UserError(f"{engine_path} is not the engine that {path.name} describes; build the engine again")
    return info


def layer_counts(layers: Iterable[LayerRecord]) -> dict[str, int]:
    """Count an engine's layers by kind and precision, most frequent first: {"gemm int8": 48, ...}."""
    return dict(Counter(f"{layer.kind} {layer.precision}" for layer in layers).most_common())

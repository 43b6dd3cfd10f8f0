"""ONNX Runtime on the host's CPU: sessions as engines, and engines built as optimised models in ORT format."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _state  # type: ignore[import-untyped, unused-ignore]

from lsp_deploy.engines.feeds import check_feeds
from lsp_deploy.engines.host import available_cpus, cpu_model
from lsp_deploy.engines.int8_saturation import int8_saturates
from lsp_deploy.engines.onnxruntime_layers import optimized_layers
from lsp_deploy.engines.own_operators import imports_operators, with_runnable_operators
from lsp_deploy.engines.protocol import (
    BackendStatus,
    BuildOptions,
    EngineBuildError,
    EngineInfo,
    TensorSpec,
    read_sidecar,
    write_sidecar,
)
from lsp_deploy.errors import UserError
from lsp_deploy.files import atomic_path
from lsp_deploy.plugins import library, register

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.hardware.target import Target

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeEngine"]

NAME = "onnxruntime"
_PROVIDERS = ["CPUExecutionProvider"]
# Above this a model goes to its session through a file: a protobuf message holds less than 2 GiB.
_IN_MEMORY_BYTES = 1_900_000_000
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}
_ORT_ERRORS = tuple(
    getattr(_state, name)
    for name in (
        "EPFail",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)


class OnnxRuntimeEngine:
    """A model in an ONNX Runtime session on the CPU."""

    backend = NAME

    def __init__(
        self,
        model: Path | bytes,
        label: str,
        *,
        threads: int | None = None,
        optimize: bool = True,
        echoes: Sequence[str] = (),
        info: EngineInfo | None = None,
        ort_format: bool = False,
    ) -> None:
        """Make the session; `from_model` and `OnnxRuntimeBackend.load` are the ways in.

        Args:
            model: an ONNX or ORT file, or its content.
            label: what errors call the model.
            threads: intra-op threads; None for as many as this process may use CPUs.
            optimize: whether ONNX Runtime may rewrite the graph.
            echoes: inputs that `run` gives back among the outputs.
            info: what `describe` starts from.
            ort_format: whether `model` is in ORT format.
        """
        self._label = label
        self._threads = threads or len(available_cpus())
        self._info = info or _session_info()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        options = session_options(self._threads, optimize=optimize)
        if ort_format:
            options.add_session_config_entry("session.load_model_format", "ORT")
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = ort.InferenceSession(source, options, providers=_PROVIDERS)
        except _ORT_ERRORS as error:
            raise UserError(f"ONNX Runtime cannot run {label}: {_one_line(error)}") from None
        self.inputs = {value.name: _spec(value, label) for value in self._session.get_inputs()}
        self.outputs = {value.name: _spec(value, label) for value in self._session.get_outputs()}
        self._echoes = tuple(echoes)
        self.outputs.update({name: self.inputs[name] for name in self._echoes})

    @classmethod
    def from_model(
        cls,
        model: ir.Model | Path | bytes,
        *,
        threads: int | None = None,
        extra_outputs: Sequence[str] = (),
        optimize: bool = True,
        float32_twin: bool = False,
    ) -> OnnxRuntimeEngine:
        """Return `model` in a session of its own; the model itself stays as it is.

        Operators of ours run in the native library, or without it in standard operators; `describe` then says so.

        Args:
            model: the model, its file, or its serialized bytes; one above 2 GB goes through a temporary file.
            threads: intra-op threads; None for as many as this process may use CPUs.
            extra_outputs: names of inner values to give out beside the model's outputs.
            optimize: whether ONNX Runtime may rewrite the graph.
            float32_twin: run a copy in which 16-bit floats are float32. The CPU provider has few 16-bit kernels
                (Q/DQ with 16-bit scales runs about ten times slower), so fidelity is measured on the twin.

        Raises:
            UserError: ONNX Runtime cannot run the model, or an extra output is not in it.
        """
        label = model.name if isinstance(model, Path) else "the model"
        if isinstance(model, (Path, bytes)):
            if not extra_outputs and not float32_twin and not imports_operators(model):
                return cls(model, label, threads=threads, optimize=optimize)
            model = _load(model)
        elif extra_outputs or float32_twin:
            model = model.clone()
        if float32_twin:
            from lsp_deploy.passes.to_float32 import ToFloat32Pass

            ToFloat32Pass()(model)
        echoes = _add_outputs(model, extra_outputs, label)
        return cls._from_ir(model, label, threads=threads, optimize=optimize, echoes=echoes)

    @classmethod
    def _from_ir(
        cls, model: ir.Model, label: str, *, threads: int | None, optimize: bool, echoes: Sequence[str]
    ) -> OnnxRuntimeEngine:
        from lsp_deploy.engines.own_int8_weights import with_own_int8_weights
        from lsp_deploy.model import model_bytes, save_model

        model, warnings = with_runnable_operators(model)
        model = with_own_int8_weights(model)
        info = _session_info(warnings)
        if _weight_bytes(model) <= _IN_MEMORY_BYTES:
            return cls(model_bytes(model), label, threads=threads, optimize=optimize, echoes=echoes, info=info)
        folder = tempfile.TemporaryDirectory(prefix="lsp-deploy-")
        with ExitStack() as if_it_fails:
            if_it_fails.callback(folder.cleanup)
            path = Path(folder.name) / "model.onnx"
            save_model(model, path)
            engine = cls(path, label, threads=threads, optimize=optimize, echoes=echoes, info=info)
            if_it_fails.pop_all()
        # The session maps its weights from the file, which therefore lives as long as the session.
        engine._folder = folder
        return engine

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output for `feeds`; floating-point feeds of another width are converted.

        Raises:
            UserError: an input is missing, unknown, or of another shape or type; or the model fails on it.
        """
        checked = check_feeds(feeds, self.inputs, self._label)
        names = [name for name in self.outputs if name not in self._echoes]
        try:
            values = self._session.run(names, checked)
        except _ORT_ERRORS as error:
            given = ", ".join(f"{name} {list(value.shape)}" for name, value in checked.items())
            raise UserError(f"{self._label} fails on {given}: {_one_line(error)}") from None
        return {**dict(zip(names, values, strict=True)), **{name: checked[name] for name in self._echoes}}

    def bound(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """Return a call that runs with these feeds and keeps its outputs in one place, as a layer in a graph does.

        Raises:
            UserError: an input is missing, unknown, or of another shape or type.
        """
        session, binding = self._session, self._session.io_binding()
        for name, value in check_feeds(feeds, self.inputs, self._label).items():
            binding.bind_cpu_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)  # allocates the outputs
        outputs = binding.get_outputs()
        for name, value in zip(self.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        return lambda: session.run_with_iobinding(binding)

    def describe(self) -> EngineInfo:
        """Return the backend, its version, the CPU and the threads it runs on; the layers where it was built."""
        return self._info.model_copy(update={"device": cpu_model(), "threads": self._threads})

    def close(self) -> None:
        """Free the session and, for a model above 2 GB, its temporary file."""
        self._session = None
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class OnnxRuntimeBackend:
    """Builds and loads engines for the host's CPU: the model as ONNX Runtime optimises it, in ORT format."""

    name = NAME

    def status(self, target: Target | None = None) -> BackendStatus:
        """Return that ONNX Runtime, which lsp-deploy depends on, is here."""
        return BackendStatus(can_build=True, can_run=True, version=ort.__version__, detail="CPU provider")

    def serves(self, target: Target) -> bool:
        """Return whether `target` is the host's CPU."""
        return self.name in target.builders

    def build(self, model_path: Path, engine_path: Path, target: Target, options: BuildOptions) -> EngineInfo:
        """Optimise `model_path` for this CPU and write it to `engine_path` in ORT format, with its sidecar.

        Raises:
            EngineBuildError: ONNX Runtime cannot optimise the model.
        """
        start = time.perf_counter()
        session = session_options(len(available_cpus()))
        session.add_session_config_entry("session.save_model_format", "ORT")
        try:
            with _buildable(model_path) as (source, warnings), atomic_path(engine_path) as temporary:
                layers = optimized_layers(source, session_options)
                session.optimized_model_filepath = str(temporary)
                ort.InferenceSession(str(source), session, providers=_PROVIDERS)
        except _ORT_ERRORS as error:
            raise EngineBuildError(f"ONNX Runtime: {_one_line(error)}") from None
        except UserError as error:
            raise EngineBuildError(f"ONNX Runtime: {error}") from None
        info = EngineInfo(
            backend=self.name,
            target=target.name,
            versions={NAME: ort.__version__},
            build_seconds=round(time.perf_counter() - start, 3),
            options=options,
            layers=layers,
            warnings=[
                f"optimised for this CPU ({cpu_model()}); build it again for another",
                *warnings,
                *_without_effect(options),
            ],
        )
        return write_sidecar(info, engine_path)

    def load(self, engine_path: Path) -> OnnxRuntimeEngine:
        """Return the engine in `engine_path`.

        Raises:
            UserError: the file is missing, not an engine of ours, or of another CPU or version.
        """
        if not engine_path.is_file():
            raise UserError(f"{engine_path} does not exist; build the engine first")
        return OnnxRuntimeEngine(engine_path, engine_path.name, info=read_sidecar(engine_path), ort_format=True)


def session_options(threads: int, *, optimize: bool = True) -> Any:
    """Return options for a session that is silent and leaves the CPU alone between runs.

    Without `force_spinning_stop`, the idle workers of one session go on spinning while another one runs: two DeiT-Tiny
    sessions run call by call on two cores then take twice their time (40 instead of 19 ms).

    Without `x64quantprecision`, a CPU that has no VNNI adds pairs of int8 products in 16 bits, which saturate: answers
    of a Q/DQ model would then depend on the CPU (an 8 % error was seen where int8 rounding explains 0.3 %). On other
    CPUs it would only make int8 slow.

    `MatMulAddFusion` reshapes the input of a MatMul of fixed shape to make it a Gemm. Behind a DequantizeLinear that
    keeps it from running in int8, and from opset 21 on it ends in a graph that ONNX Runtime itself refuses
    ("output_dtype INT8 does not match y_zero_point type UINT8", its issue 25526).

    The operators of the domain lsp are registered where the native library is here.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised; it need not be logged to stderr as well
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if int8_saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("optimization.disable_specified_optimizers", "MatMulAddFusion")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library().path is not None:
        register(options)
    return options


@contextmanager
def _buildable(model_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the file of a model that runs here, and what the user has to know of it.

    It is the model's own, or a copy with runnable operators in which no int8 weight is shared.
    """
    from lsp_deploy.engines.own_int8_weights import with_own_int8_weights
    from lsp_deploy.model import save_model

    model = _load(model_path)
    runnable, warnings = with_runnable_operators(model)
    runnable = with_own_int8_weights(runnable)
    if runnable is model:
        yield model_path, warnings
        return
    with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as folder:
        path = Path(folder) / model_path.name
        save_model(runnable, path)
        yield path, warnings


def _session_info(warnings: Sequence[str] = ()) -> EngineInfo:
    return EngineInfo(backend=NAME, target="cpu", versions={NAME: ort.__version__}, warnings=list(warnings))


def _load(model: Path | bytes) -> ir.Model:
    if isinstance(model, Path):
        from lsp_deploy.model import load_model

        return load_model(model)
    import onnx
    import onnx_ir as ir

    return ir.serde.deserialize_model(onnx.ModelProto.FromString(model))


def _add_outputs(model: ir.Model, names: Sequence[str], label: str) -> list[str]:
    """Make inner values graph outputs; returns those names that are inputs, which a session cannot give out itself."""
    present = {value.name for value in model.graph.outputs}
    inputs = {value.name for value in model.graph.inputs}
    inner = {value.name: value for node in model.graph for value in node.outputs}
    for name in dict.fromkeys(names):
        if name in inputs or name in present:
            continue
        if name not in inner:
            raise UserError(f"{label} computes no value named {name}")
        model.graph.outputs.append(inner[name])
    return [name for name in dict.fromkeys(names) if name in inputs and name not in present]


def _weight_bytes(model: ir.Model) -> int:
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _spec(value: Any, label: str) -> TensorSpec:
    if value.type not in _DTYPES:
        raise UserError(
            f"{value.name} of {label} is a {value.type}, which ONNX Runtime cannot exchange with Python; "
            "keep the model's inputs and outputs in float32 or float16"
        )
    shape = tuple(size if isinstance(size, (int, str)) else "?" for size in value.shape)
    return TensorSpec(np.dtype(_DTYPES[value.type]), shape)


def _without_effect(options: BuildOptions) -> list[str]:
    given = {
        "sparse_weights": options.sparse_weights,
        "workspace_mb": options.workspace_mb is not None,
        "optimization_level": options.optimization_level is not None,
    }
    return [f"{name} has no effect in ONNX Runtime" for name, is_given in given.items() if is_given]


def _one_line(error: Exception) -> str:
    """Return what ONNX Runtime says without its prefix: "[ONNXRuntimeError] : 1 : FAIL : ..."."""
    text = " ".join(str(error).split())
    return text.rsplit(" : ", 1)[-1] if text.startswith("[ONNXRuntimeError]") else text

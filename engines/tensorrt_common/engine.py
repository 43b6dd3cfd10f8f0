"""An engine of TensorRT or TensorRT-RTX on the GPU of this machine: buffers, a stream, a CUDA graph, events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lsp_deploy.engines.feeds import check_feeds
from lsp_deploy.engines.protocol import EngineInfo, TensorSpec
from lsp_deploy.engines.tensorrt_common.cuda import Cuda, CudaError
from lsp_deploy.errors import UserError

__all__ = ["TensorRtEngine"]

_DTYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
Feeds = Mapping[str, NDArray[Any]]


@dataclass
class _Prepared:
    """What runs at one set of input shapes."""

    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    graph: Any | None = None
    capturable: bool = True
    """False once a capture has failed."""


class TensorRtEngine:
    """A loaded engine; `run` copies inputs to the GPU and outputs back, `timed_run` times what is between.

    The first run at new input shapes launches its kernels one by one; those that follow replay them as a CUDA graph.
    """

    clock = "CUDA events around one run; inputs and outputs stay on the GPU"

    def __init__(self, trt: Any, engine: Any, info: EngineInfo, cuda: Cuda) -> None:
        """Take the module, its ICudaEngine, what the engine is, and CUDA, which the engine closes at its end."""
        self.backend = info.backend
        self._info = info
        self._label = info.file or "the engine"
        self._cuda = cuda
        self._engine = engine
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise UserError(f"{self._label}: the GPU has not enough memory for it")
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = self._spec(name)
        self._prepared: _Prepared | None = None

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Return every output for `feeds`; floating-point feeds of another width are converted.

        Raises:
            UserError: an input is missing, unknown, or of another shape or type, or out of the shapes built for.
        """
        prepared, held = self._upload(feeds)
        self._launch(prepared)
        outputs = {
            name: self._cuda.download(prepared.addresses[name], prepared.shapes[name], spec.dtype)
            for name, spec in self.outputs.items()
        }
        self._cuda.synchronize()
        del held  # the copies from these arrays are done
        if prepared.graph is None and prepared.capturable:
            self._capture(prepared)
        return outputs

    def timed_run(self, feeds: Feeds) -> Callable[[], float]:
        """Put `feeds` on the GPU; return a call that runs the engine on them and gives its milliseconds there.

        Another run at other shapes ends its use.

        Raises:
            UserError: as `run`.
        """
        self.run(feeds)
        prepared = self._prepared

        def timed() -> float:
            if prepared is None or prepared is not self._prepared:
                raise RuntimeError("the engine has run at other shapes since")
            return self._cuda.milliseconds(lambda: self._launch(prepared))

        return timed

    def describe(self) -> EngineInfo:
        """Return what the sidecar says, and what was met in running."""
        return self._info

    def close(self) -> None:
        """Free the engine and its buffers on the GPU."""
        if self._context is not None:
            self._release()
            self._context = self._engine = None
            self._cuda.close()

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _spec(self, name: str) -> TensorSpec:
        type_name = self._engine.get_tensor_dtype(name).name
        if type_name not in _DTYPES:
            raise UserError(f"{self._label}: {name} is {type_name}, which numpy has no type for")
        if self._engine.is_shape_inference_io(name):
            raise UserError(f"{self._label}: {name} is a shape that the host has to give; such engines do not run here")
        shape = tuple("?" if size == -1 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(np.dtype(_DTYPES[type_name]), shape)

    def _upload(self, feeds: Feeds) -> tuple[_Prepared, list[NDArray[Any]]]:
        """Copy the feeds to the GPU; the arrays returned have to live until the stream is synchronized."""
        checked = check_feeds(feeds, self.inputs, self._label)
        arrays = {name: np.ascontiguousarray(value) for name, value in checked.items()}
        prepared = self._prepare({name: value.shape for name, value in arrays.items()})
        for name, value in arrays.items():
            self._cuda.upload(value, prepared.addresses[name])
        return prepared, list(arrays.values())

    def _prepare(self, shapes: dict[str, tuple[int, ...]]) -> _Prepared:
        """Return buffers for these input shapes; those of other shapes are given back."""
        if self._prepared is not None:
            if all(self._prepared.shapes[name] == shape for name, shape in shapes.items()):
                return self._prepared
            self._release()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise UserError(f"{self._label}: it was not built for {name} of shape {'x'.join(map(str, shape))}")
        for name in self.outputs:
            shapes[name] = tuple(self._context.get_tensor_shape(name))
            if -1 in shapes[name]:
                raise UserError(f"{self._label}: the size of {name} depends on the data; such engines do not run here")
        self._prepared = _Prepared(shapes, {})
        for name, spec in (self.inputs | self.outputs).items():
            size = int(np.prod(shapes[name], dtype=np.int64)) * spec.dtype.itemsize
            try:
                address = self._prepared.addresses[name] = self._cuda.allocate(size)
            except CudaError as error:
                self._release()
                text = "x".join(map(str, shapes[name]))
                raise UserError(f"{self._label}: the GPU has no memory for {name} of shape {text}: {error}") from None
            self._context.set_tensor_address(name, address)
        return self._prepared

    def _launch(self, prepared: _Prepared) -> None:
        if prepared.graph is not None:
            self._cuda.launch(prepared.graph)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise CudaError(f"{self._label} did not run; TensorRT's log says why")

    def _capture(self, prepared: _Prepared) -> None:
        """Make a graph of the kernels; where that cannot be done they go on one by one, and `describe` says so."""
        may_capture = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX only
        try:
            if may_capture is not None and not may_capture(int(self._cuda.stream)):
                raise CudaError("its kernels cannot be captured")
            prepared.graph = self._cuda.capture(self._enqueue)
        except CudaError as error:
            prepared.capturable = False
            warning = f"runs without a CUDA graph, each launch costs its time: {error}"
            if warning not in self._info.warnings:
                self._info = self._info.model_copy(update={"warnings": [*self._info.warnings, warning]})

    def _release(self) -> None:
        if self._prepared is not None:
            if self._prepared.graph is not None:
                self._cuda.destroy_graph(self._prepared.graph)
            for address in self._prepared.addresses.values():
                self._cuda.free(address)
            self._prepared = None

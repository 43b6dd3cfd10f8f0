"""The little of CUDA's runtime that running an engine needs, over cuda-python; a failed call is an exception.

Addresses and handles are plain values: who makes one frees it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.errors import UserError

__all__ = ["Cuda", "CudaError"]


class CudaError(RuntimeError):
    """A CUDA call failed."""


class Cuda:
    """CUDA's runtime on the first GPU, in one stream."""

    def __init__(self) -> None:
        """Open the runtime and make a stream.

        Raises:
            UserError: cuda-python is not installed.
            CudaError: there is no usable GPU.
        """
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
            raise UserError("running an engine on a GPU needs cuda-python: pip install 'cuda-python>=12.6.1'")
        self._runtime: Any = importlib.import_module("cuda.bindings.runtime")
        self.stream = self._call("cudaStreamCreate")

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes on the GPU."""
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._call("cudaFree", address)

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to the GPU, in the stream; the array must outlive the copy."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array whose content arrives once the stream is synchronized."""
        array = np.empty(shape, dtype)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        return array

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Return what `enqueue` puts into the stream as an executable graph; nothing of it runs now."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            error, graph = self._runtime.cudaStreamEndCapture(self.stream)  # the first error counts, not this one
            if error == self._runtime.cudaError_t.cudaSuccess:
                self._runtime.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Run a captured graph in the stream."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def destroy_graph(self, graph: Any) -> None:
        """Free a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """Run what `enqueue` puts into the stream and return the time between the events around it."""
        start, end = self._call("cudaEventCreate"), self._call("cudaEventCreate")
        try:
            self._call("cudaEventRecord", start, self.stream)
            enqueue()
            self._call("cudaEventRecord", end, self.stream)
            self._call("cudaEventSynchronize", end)
            return float(self._call("cudaEventElapsedTime", start, end))
        finally:
            self._call("cudaEventDestroy", start)
            self._call("cudaEventDestroy", end)

    def close(self) -> None:
        """Destroy the stream."""
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; returns its one result, or None where it has none."""
        error, *results = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(error)
            raise CudaError(f"{name}: {text.decode() if isinstance(text, bytes) else text}")
        return results[0] if results else None

"""CUDA's runtime as cuda-python has it, on the host: memory, one stream, graphs and events, all of them counted.

`refuse` names functions that fail, and there are `capacity` bytes. Inside a capture only kernels may be put into the
stream, as on a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import time
from collections.abc import Callable
from typing import Any


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
memory: dict[int, Any] = {}
handles: dict[int, Any] = {}
refuse: set[str] = set()
capacity = 1 << 30
launches = {"kernel": 0, "graph": 0}
_numbers = itertools.count(1)
_capture: list[Callable[[], None]] | None = None


def put(kernel: Callable[[], None]) -> None:
    """What an execution context does with its kernels."""
    if _capture is not None:
        _capture.append(kernel)
    else:
        launches["kernel"] += 1
        kernel()


def _handle(content: Any) -> tuple[cudaError_t, int]:
    number = next(_numbers)
    handles[number] = content
    return OK, number


def _drop(number: int) -> tuple[cudaError_t]:
    del handles[int(number)]
    return (OK,)


def cudaMalloc(size: int) -> tuple[cudaError_t, int]:
    if size + sum(map(len, memory.values())) > capacity:
        return cudaError_t.cudaErrorMemoryAllocation, 0
    buffer = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(buffer)] = buffer
    return OK, ctypes.addressof(buffer)


def cudaFree(address: int) -> tuple[cudaError_t]:
    del memory[address]
    return (OK,)


def cudaMemcpyAsync(target: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:
    if _capture is not None:
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
    device = target if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if device not in memory or size > len(memory[device]):
        return (cudaError_t.cudaErrorInvalidValue,)
    ctypes.memmove(target, source, size)
    return (OK,)


def cudaStreamCreate() -> tuple[cudaError_t, int]:
    return _handle("stream")


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    return (OK,)


def cudaStreamBeginCapture(stream: int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    global _capture
    if "cudaStreamBeginCapture" in refuse:
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
    _capture = []
    return (OK,)


def cudaStreamEndCapture(stream: int) -> tuple[cudaError_t, int]:
    global _capture
    captured, _capture = _capture, None
    return _handle(captured)


def cudaGraphInstantiate(graph: int, flags: int) -> tuple[cudaError_t, int]:
    return _handle(list(handles[graph]))


def cudaGraphLaunch(graph: int, stream: int) -> tuple[cudaError_t]:
    launches["graph"] += 1
    for kernel in handles[graph]:
        kernel()
    return (OK,)


def cudaEventCreate() -> tuple[cudaError_t, int]:
    return _handle([0.0])


def cudaEventRecord(event: int, stream: int) -> tuple[cudaError_t]:
    handles[event][0] = time.perf_counter()
    return (OK,)


def cudaEventSynchronize(event: int) -> tuple[cudaError_t]:
    return (OK,)


def cudaEventElapsedTime(start: int, end: int) -> tuple[cudaError_t, float]:
    return OK, (handles[end][0] - handles[start][0]) * 1000


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return OK, error.name.encode()


cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = cudaEventDestroy = _drop

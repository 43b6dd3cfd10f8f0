"""One linear layer on a GPU in three ways: block-sparse, dense (cublasLt) and 2:4 (cuSPARSELt); and how to time them.

PyTorch holds the memory, the streams and the graphs; it also brings cublasLt and cuSPARSELt.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from lsp_deploy.plugins.block_sparse.bsl16 import to_bsl16
from lsp_deploy.plugins.block_sparse.operator import Activation, BlockSparseLinear
from lsp_deploy.plugins.block_sparse.packing import pack
from lsp_deploy.plugins.cuda.library import CudaLibrary

COPIES = 12
"""Of the weights, taken in turn: a network does not find its weights in the cache either."""

NUMPY = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.int8: np.int8}


@dataclass
class Weights:
    """A layer's numbers on the host: weight [K, N] with zeros where the mask [K, N] has them, bias and scale [N]."""

    weight: np.ndarray
    mask: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    dtype: torch.dtype


def random_weights(
    shape: tuple[int, int],
    block: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    seed: int,
    importance: float = 1.0,
) -> Weights:
    """Return random weights; as in trained networks, some rows and columns of blocks are more important than others."""
    random = np.random.default_rng(seed)
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    score = random.normal(size=grid) + importance * (random.normal(size=(grid[0], 1)) + random.normal(size=grid[1]))
    kept = np.zeros(score.size, bool)
    kept[np.argsort(-score, axis=None)[: round(density * score.size)]] = True
    mask = kept.reshape(grid).repeat(block[0], axis=0).repeat(block[1], axis=1)[: shape[0], : shape[1]]
    if dtype == torch.int8:
        weight = random.integers(-127, 128, shape).astype(np.int8)
    else:
        weight = random.normal(size=shape, scale=shape[0] ** -0.5).astype(NUMPY[dtype])
    bias = random.uniform(-0.5, 0.5, shape[1]).astype(np.float32)
    scale = (random.uniform(0.5, 1, shape[1]) / (40 * 73 * shape[0] ** 0.5)).astype(np.float32)
    return Weights(np.where(mask, weight, np.zeros((), weight.dtype)), mask, bias, scale, dtype)


class BlockSparse:
    """Our kernels on one layer, with COPIES of its values."""

    def __init__(
        self,
        library: CudaLibrary,
        weights: Weights,
        block: tuple[int, int],
        *,
        activation: Activation,
        out_type: torch.dtype | None = None,
        out_scale: float = 0.0,
        residual: torch.dtype | None = None,
        copies: int = COPIES,
    ) -> None:
        blocks = pack(weights.weight, weights.mask, block)
        onnx_type = {dtype: ir.DataType.from_numpy(np.dtype(numpy)) for dtype, numpy in NUMPY.items()}
        self.out_type = out_type or (torch.float16 if weights.dtype == torch.int8 else weights.dtype)
        operator = BlockSparseLinear(
            *weights.weight.shape,
            *block,
            col_ptr=blocks.col_ptr,
            k_idx=blocks.k_idx,
            activation=activation,
            layout="bsl16.v1",
            out_type=onnx_type[self.out_type],
            out_scale=out_scale,
        )
        self.plan = library.plan(operator, onnx_type[weights.dtype], onnx_type[residual] if residual else None)
        values = torch.from_numpy(to_bsl16(operator, blocks.values).view(np.uint8)).cuda()
        self.values = [values.clone() for _ in range(copies)]
        self.bias, self.scale = torch.from_numpy(weights.bias).cuda(), torch.from_numpy(weights.scale).cuda()
        self.tables = [torch.from_numpy(self.plan.table(i).copy()).cuda() for i in range(len(self.plan.tactics))]

    def __call__(
        self, tactic: int, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None, copy: int = 0
    ) -> None:
        """Enqueue y = act(x @ W + bias) [+ residual] on the current stream."""
        tensors = (x, self.values[copy], self.bias, self.scale, residual, y, self.tables[tactic])
        pointers = [tensor.data_ptr() if tensor is not None else None for tensor in tensors]
        self.plan.launch(tactic, x.shape[0], pointers, torch.cuda.current_stream().cuda_stream)

    def times_us(self, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None) -> list[float]:
        """Return the time of each tactic for this x, in µs."""
        copies = len(self.values)
        return [
            time_us(lambda i, tactic=tactic: self(tactic, x, y, residual, i % copies))
            for tactic in range(len(self.tables))
        ]


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Dense:
    """cublasLt on one layer, as fast as the best of its heuristics' suggestions, with the same epilogue.

    Its GELU is the one with tanh. y = act(x @ W + bias), or x @ W + bias + residual; x @ W where `activation` is None.
    """

    _TYPES = {torch.float32: 0, torch.float16: 2, torch.int8: 3, torch.bfloat16: 14}  # noqa: RUF012
    _TRANSA, _EPILOGUE, _BIAS_POINTER, _MAX_WORKSPACE = 3, 7, 8, 1
    _EPILOGUES = {None: 1, "none": 4, "relu": 6, "gelu": 36, "gelu_tanh": 36}  # noqa: RUF012
    _SUGGESTIONS = 12
    _handle: ctypes.c_void_p | None = None

    def __init__(self, weights: Weights, m: int, *, activation: Activation | None, copies: int = COPIES) -> None:
        self.lt = _cublas_lt()
        if Dense._handle is None:
            Dense._handle = ctypes.c_void_p()
            self._check(self.lt.cublasLtCreate(ctypes.byref(Dense._handle)))
        k, n = weights.weight.shape
        int8 = weights.dtype == torch.int8
        weight = torch.from_numpy(np.ascontiguousarray(weights.weight.T).view(np.uint8)).cuda()
        self.weights = [weight.clone() for _ in range(copies)]
        self.bias = torch.from_numpy(weights.bias).cuda().to(torch.float32 if int8 else weights.dtype)
        self.workspace = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        # Column-major, as cublasLt sees it: y' [N, M] = (W' [K, N])' · x' [K, M].
        self.matmul = ctypes.c_void_p()
        self._check(self.lt.cublasLtMatmulDescCreate(ctypes.byref(self.matmul), 72 if int8 else 68, 0))
        self._set(self._TRANSA, ctypes.c_int32(1))
        self._set(self._EPILOGUE, ctypes.c_int32(self._EPILOGUES[activation]))
        if activation is not None:
            self._set(self._BIAS_POINTER, ctypes.c_uint64(self.bias.data_ptr()))
        dtype = self._TYPES[weights.dtype]
        self.a, self.b, self.d = (self._layout(dtype, *size) for size in ((k, n), (k, m), (n, m)))
        self.suggestions = self._suggest()
        self.algorithm = self.suggestions[0]

    def __call__(self, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None, copy: int = 0) -> None:
        """Enqueue it on the current stream."""
        one, beta = ctypes.c_float(1), ctypes.c_float(0 if residual is None else 1)
        c = y if residual is None else residual
        pointer = ctypes.c_void_p
        self._check(
            self.lt.cublasLtMatmul(
                *(self._handle, self.matmul, ctypes.byref(one)),
                *(pointer(self.weights[copy].data_ptr()), self.a, pointer(x.data_ptr()), self.b),
                *(ctypes.byref(beta), pointer(c.data_ptr()), self.d, pointer(y.data_ptr()), self.d),
                *(ctypes.byref(self.algorithm.algorithm), pointer(self.workspace.data_ptr())),
                *(ctypes.c_size_t(self.workspace.numel()), pointer(torch.cuda.current_stream().cuda_stream)),
            )
        )

    def tune(self, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None) -> float:
        """Choose the fastest algorithm of those suggested; return its time in µs."""
        times = {}
        for number, suggestion in enumerate(self.suggestions):
            self.algorithm = suggestion
            try:
                times[number] = time_us(lambda i: self(x, y, residual, i % len(self.weights)))
            except RuntimeError:
                continue  # a suggestion that does not run here
        if not times:
            raise RuntimeError("cublasLt: no suggested algorithm runs")
        number = min(times, key=times.__getitem__)
        self.algorithm = self.suggestions[number]
        return times[number]

    def _suggest(self) -> list[_Heuristic]:
        preference, found = ctypes.c_void_p(), ctypes.c_int()
        self._check(self.lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        size = ctypes.c_size_t(self.workspace.numel())
        self._check(
            self.lt.cublasLtMatmulPreferenceSetAttribute(
                preference, self._MAX_WORKSPACE, ctypes.byref(size), ctypes.c_size_t(ctypes.sizeof(size))
            )
        )
        suggestions = (_Heuristic * self._SUGGESTIONS)()
        self._check(
            self.lt.cublasLtMatmulAlgoGetHeuristic(
                *(self._handle, self.matmul, self.a, self.b, self.d, self.d, preference),
                *(self._SUGGESTIONS, suggestions, ctypes.byref(found)),
            )
        )
        usable = [suggestion for suggestion in suggestions[: found.value] if suggestion.state == 0]
        if not usable:
            raise RuntimeError("cublasLt has no algorithm")
        return usable

    def _layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        size = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))
        self._check(self.lt.cublasLtMatrixLayoutCreate(ctypes.byref(layout), dtype, *size))
        return layout

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._check(self.lt.cublasLtMatmulDescSetAttribute(self.matmul, attribute, ctypes.byref(value), size))

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"cublasLt: status {status}")


class TwoFour:
    """cuSPARSELt on one layer whose weight has two zeros in every four; without an activation: PyTorch passes none."""

    def __init__(self, weights: Weights, x: torch.Tensor, copies: int = COPIES) -> None:
        dense = torch.from_numpy(np.ascontiguousarray(weights.weight.T).view(np.uint8)).cuda().view(weights.dtype)
        zeros = torch.tensor([True, True, False, False], device="cuda").repeat(dense.shape[1] // 4)
        compressed = torch._cslt_compress(dense * zeros)
        self.weights = [compressed.clone() for _ in range(copies)]
        self.bias = torch.from_numpy(weights.bias).cuda().to(weights.dtype) if weights.dtype != torch.int8 else None
        self.algorithm = torch._cslt_sparse_mm_search(compressed, x.t(), bias=self.bias, transpose_result=True)

    def __call__(self, x: torch.Tensor, copy: int = 0) -> torch.Tensor:
        """Enqueue it on the current stream."""
        return torch._cslt_sparse_mm(
            self.weights[copy], x.t(), bias=self.bias, transpose_result=True, alg_id=self.algorithm
        )


def peak_tflops(library: Path, dtype: torch.dtype) -> float:
    """Return what mma.sync does at most, in TFLOP/s: `mma_peak.cu`, compiled, multiplies and does nothing else."""
    function = ctypes.CDLL(str(library)).mma_peak
    function.argtypes = (*[ctypes.c_int] * 3, *[ctypes.c_void_p] * 2)
    blocks, steps, int8 = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 1000, dtype == torch.int8
    out = torch.empty(blocks, 256, dtype=torch.int32, device="cuda")

    def enqueue(_: int) -> None:
        error = function(int8, blocks, steps, out.data_ptr(), torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"mma_peak: CUDA error {error}")

    return blocks * steps * 64 * 2 * 16 * 8 * (32 if int8 else 16) / time_us(enqueue) * 1e-6


def time_us(enqueue: Callable[[int], object], launches: int = 4 * COPIES, replays: int = 9) -> float:
    """Return the time of one launch in µs: the median over replays of a graph of them. `enqueue` gets their number."""
    graph = captured([lambda i=i: enqueue(i) for i in range(launches)])
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / launches)
    return statistics.median(times)


def captured(actions: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of these actions, which have run once before, and replayed once."""
    with _side_stream():
        for action in actions[:COPIES]:
            action()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    graph.replay()
    torch.cuda.synchronize()
    return graph


@contextmanager
def _side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _cublas_lt() -> ctypes.CDLL:
    torch.cuda.init()
    names = [f"libcublasLt.so.{version}" for version in (13, 12)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"none of {', '.join(names)} is there")

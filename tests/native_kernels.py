"""The C interface of the CPU kernels (lsp_cpu.h) through ctypes: what tests and benchmarks of the kernels call."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

FLOAT32, INT8, BFLOAT16 = 1, 3, 16
TYPES = {np.dtype(np.float32): FLOAT32, np.dtype(np.int8): INT8, np.dtype(ml_dtypes.bfloat16): BFLOAT16}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
Run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, Task, ctypes.c_size_t, ctypes.c_void_p)


class Pool(ctypes.Structure):
    _fields_ = [("run", Run), ("pool", ctypes.c_void_p), ("threads", ctypes.c_int)]


class LinearDescription(ctypes.Structure):
    _fields_ = [
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("block_k", ctypes.c_int64),
        ("block_n", ctypes.c_int64),
        ("col_ptr", ctypes.c_void_p),
        ("col_ptr_count", ctypes.c_size_t),
        ("k_idx", ctypes.c_void_p),
        ("k_idx_count", ctypes.c_size_t),
        ("values_type", ctypes.c_int),
        ("values", ctypes.c_void_p),
        ("values_count", ctypes.c_size_t),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("activation", ctypes.c_int),
        ("x_type", ctypes.c_int),
        ("x_scale", ctypes.c_float),
        ("x_offset", ctypes.c_float),
        ("out_type", ctypes.c_int),
        ("out_scale", ctypes.c_float),
        ("out_offset", ctypes.c_float),
    ]


class KernelError(Exception):
    """What the library says when it refuses."""


def load(path: Path) -> ctypes.CDLL:
    """The library with the argument types of the functions used here."""
    library = ctypes.CDLL(str(path))
    library.lsp_isas.restype = ctypes.c_char_p
    library.lsp_linear_create.restype = ctypes.c_char_p
    library.lsp_linear_create.argtypes = [
        ctypes.POINTER(LinearDescription),
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    library.lsp_linear_run.restype = ctypes.c_char_p
    library.lsp_linear_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.POINTER(Pool),
    ]
    library.lsp_linear_kernel.restype = ctypes.c_char_p
    library.lsp_linear_kernel.argtypes = [ctypes.c_void_p]
    library.lsp_linear_destroy.restype = None
    library.lsp_linear_destroy.argtypes = [ctypes.c_void_p]
    return library


def isas(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that can be asked for here, best first."""
    return library.lsp_isas().decode().split()


class ThreadPool:
    """A pool of Python threads that runs the tasks of one call in whatever order they come."""

    def __init__(self, threads: int, *, tell: bool = True, backwards: bool = False) -> None:
        self._executor = ThreadPoolExecutor(threads)
        self.tasks = 0

        def run(_pool: int | None, task: object, count: int, user: int | None) -> None:
            self.tasks += count
            order = reversed(range(count)) if backwards else range(count)
            list(self._executor.map(lambda index: task(user, index), order))

        self._run = Run(run)
        self.pool = Pool(self._run, None, threads if tell else 0)


def random_blocks(
    generator: np.random.Generator, K: int, N: int, block: tuple[int, int], density: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A mask of blocks [ceil(K/bk), ceil(N/bn)] with its col_ptr and k_idx, and the mask of elements [K, N]."""
    rows, columns = -(-K // block[0]), -(-N // block[1])
    mask = generator.random((rows, columns)) < density
    col_ptr = np.concatenate([[0], np.cumsum(mask.sum(0))]).astype(np.int64)
    k_idx = np.concatenate([np.flatnonzero(mask[:, column]) for column in range(columns)]).astype(np.int64)
    elements = np.repeat(np.repeat(mask, block[0], 0), block[1], 1)[:K, :N]
    return mask, col_ptr, k_idx, elements


def canonical_values(weight: np.ndarray, mask: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The surviving blocks of `weight` [K, N], block column major, padded with zeros; without any, one of zeros."""
    padded = np.zeros((mask.shape[0] * block[0], mask.shape[1] * block[1]), weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(mask.shape[0], block[0], mask.shape[1], block[1]).transpose(2, 0, 1, 3)[mask.T]
    return np.ascontiguousarray(blocks) if len(blocks) else np.zeros((1, *block), weight.dtype)


class Linear:
    """One layer of the library. Keyword arguments are the fields of the description, arrays as numpy has them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        *,
        K: int,
        N: int,
        block: tuple[int, int],
        col_ptr: np.ndarray,
        k_idx: np.ndarray,
        values: np.ndarray,
        bias: np.ndarray,
        scale: np.ndarray,
        activation: str = "none",
        x_type: int = FLOAT32,
        x_scale: float = 0.0,
        x_offset: float = 0.0,
        out_type: int = FLOAT32,
        out_scale: float = 0.0,
        out_offset: float = 0.0,
        isa: str | None = None,
        **overrides: int,
    ) -> None:
        self._library, self._handle = library, ctypes.c_void_p()
        self.K, self.N, self.out_type = K, N, out_type
        col_ptr, k_idx = np.ascontiguousarray(col_ptr, np.int64), np.ascontiguousarray(k_idx, np.int64)
        values = np.ascontiguousarray(values)
        description = LinearDescription(
            K=K,
            N=N,
            block_k=block[0],
            block_n=block[1],
            col_ptr=col_ptr.ctypes.data,
            col_ptr_count=len(col_ptr),
            k_idx=k_idx.ctypes.data if len(k_idx) else None,
            k_idx_count=len(k_idx),
            values_type=TYPES[values.dtype],
            values=values.ctypes.data,
            values_count=values.size,
            bias=bias.ctypes.data,
            scale=scale.ctypes.data,
            activation=ACTIVATIONS[activation],
            x_type=x_type,
            x_scale=x_scale,
            x_offset=x_offset,
            out_type=out_type,
            out_scale=out_scale,
            out_offset=out_offset,
        )
        for name, value in overrides.items():
            setattr(description, name, value)
        why = library.lsp_linear_create(
            ctypes.byref(description), isa.encode() if isa else None, ctypes.byref(self._handle)
        )
        if why is not None:
            raise KernelError(why.decode())

    @property
    def kernel(self) -> str:
        return self._library.lsp_linear_kernel(self._handle).decode()

    def __call__(
        self,
        x: np.ndarray,
        residual: np.ndarray | None = None,
        pool: ThreadPool | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        assert x.flags.c_contiguous and x.shape[1] == self.K
        y = np.empty((len(x), self.N), np.int8 if self.out_type == INT8 else np.float32) if out is None else out
        why = self._library.lsp_linear_run(
            self._handle,
            len(x),
            x.ctypes.data,
            None if residual is None else residual.ctypes.data,
            y.ctypes.data,
            None if pool is None else ctypes.byref(pool.pool),
        )
        if why is not None:
            raise KernelError(why.decode())
        return y

    def __del__(self) -> None:
        if self._handle:
            self._library.lsp_linear_destroy(self._handle)

"""The C interface of attention on CPUs (lsp_cpu.h) through ctypes."""

from __future__ import annotations

import ctypes

import numpy as np
from native_kernels import BFLOAT16, FLOAT32, KernelError, Pool, ThreadPool

COMPUTES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


class Description(ctypes.Structure):
    _fields_ = [
        ("heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("compute", ctypes.c_int),
    ]


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64)]


class AttentionKernel:
    """A created lsp_attention; raises KernelError where the library refuses."""

    def __init__(
        self,
        library: ctypes.CDLL,
        heads: int,
        head_size: int,
        *,
        scale: float = 0.125,
        compute: str | int = "float32",
        isa: str | None = None,
    ) -> None:
        library.lsp_attention_create.restype = library.lsp_attention_run.restype = ctypes.c_char_p
        library.lsp_attention_kernel.restype = ctypes.c_char_p
        library.lsp_attention_kernel.argtypes = library.lsp_attention_destroy.argtypes = [ctypes.c_void_p]
        library.lsp_attention_run.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            *[Rows] * 3,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 2,
            ctypes.c_void_p,
            ctypes.POINTER(Pool),
        ]
        self._library, self._handle, self.width = library, ctypes.c_void_p(), heads * head_size
        description = Description(heads, head_size, scale, COMPUTES.get(compute, compute))
        reason = library.lsp_attention_create(
            ctypes.byref(description), isa.encode() if isa else None, ctypes.byref(self._handle)
        )
        if reason is not None:
            raise KernelError(reason.decode())

    def __del__(self) -> None:
        if self._handle:
            self._library.lsp_attention_destroy(self._handle)

    @property
    def name(self) -> str:
        return self._library.lsp_attention_kernel(self._handle).decode()

    def run(self, *operands: np.ndarray, bias: np.ndarray | None = None, pool: ThreadPool | None = None) -> np.ndarray:
        """y of qkv [B, S, 3·H·D], or of q, k and v, whose last axis must be dense."""
        if len(operands) == 1:
            operands = tuple(operands[0][..., part * self.width :][..., : self.width] for part in range(3))
        q, k, _ = operands
        y = np.full((*q.shape[:2], self.width), 7e7, np.float32)
        rows = [Rows(x.ctypes.data, x.strides[0] // 4, x.strides[1] // 4) for x in operands]
        described = (None, 1, 1) if bias is None else (bias.ctypes.data, *bias.shape[:2])
        reason = self._library.lsp_attention_run(
            self._handle, *q.shape[:2], k.shape[1], *rows, *described, y.ctypes.data, pool.pool if pool else None
        )
        if reason is not None:
            raise KernelError(reason.decode())
        return y

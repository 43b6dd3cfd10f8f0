"""The native library of operators for ONNX Runtime on CPUs: where it is, and how a session gets it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, NamedTuple

from lsp_deploy.errors import UserError

__all__ = ["NativeLibrary", "instruction_sets", "library", "register"]

# CMakeLists.txt installs one of the two.
_LIBRARY, _MISSING = "liblsp_ort.so", "liblsp_ort.missing"
_THREADS_ENTRY = "lsp.threads"


class NativeLibrary(NamedTuple):
    """The library's file, or why there is none and how to get it."""

    path: Path | None
    why: str | None


def library() -> NativeLibrary:
    """Return where `liblsp_ort.so` is, or a line that says why it is missing and what to do."""
    import lsp_deploy.plugins

    # An editable installation has two folders: the sources, and the one that built files are installed to.
    folders = [Path(folder) for folder in lsp_deploy.plugins.__path__]
    for folder in folders:
        if (folder / _LIBRARY).is_file():
            return NativeLibrary(folder / _LIBRARY, None)
    reasons = [(folder / _MISSING).read_text().strip() for folder in folders if (folder / _MISSING).is_file()]
    return NativeLibrary(None, reasons[0] if reasons else "lsp-deploy was not installed by pip, which builds it")


def instruction_sets(path: Path) -> list[str]:
    """Return those that the library at `path` has kernels for and this CPU has, best first.

    Raises:
        OSError: the file cannot be loaded.
    """
    ask = ctypes.CDLL(os.fspath(path)).lsp_isas
    ask.restype = ctypes.c_char_p
    names: bytes = ask()
    return names.decode().split()


def register(session_options: Any) -> None:
    """Let the sessions made with an `onnxruntime.SessionOptions` run the operators of the domain lsp.

    Call it once the options have their number of threads, which the operators are told.

    Raises:
        UserError: the library is missing, or cannot be loaded.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail  # type: ignore[import-untyped, unused-ignore]

    found = library()
    if found.path is None:
        raise UserError(f"the native operators for ONNX Runtime are missing: {found.why}")
    try:
        session_options.register_custom_ops_library(os.fspath(found.path))
    except Fail as error:
        reason = " ".join(str(error).rpartition("FAIL : ")[2].split())
        raise UserError(f"{reason}; install lsp-deploy again, on this machine") from None
    threads = session_options.intra_op_num_threads
    if threads > 0:
        session_options.add_session_config_entry(_THREADS_ENTRY, str(threads))

"""A machine with an A100 and TensorRT, both made up (`engines/tensorrt_fakes/`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lsp_deploy.engines.tensorrt import backend
from lsp_deploy.engines.tensorrt_common import loading
from lsp_deploy.engines.tensorrt_common.gpu import Gpu

A100 = Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108)
_FAKES = Path(__file__).parent / "engines" / "tensorrt_fakes"


@contextmanager
def made_up_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the fakes in the place of TensorRT, of CUDA and of the driver, in this process and in the build's child."""
    script = folder / "python.sh"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{_FAKES}/build_child.py" "$4"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.syspath_prepend(str(_FAKES))
    for name in _imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(backend, "first_gpu", lambda: A100)
    monkeypatch.setattr(loading, "first_gpu", lambda: A100)
    yield
    for name in _imported():
        del sys.modules[name]


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("tensorrt", "cuda")]

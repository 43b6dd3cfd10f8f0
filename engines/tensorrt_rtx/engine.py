"""A TensorRT-RTX engine on the GPU of this machine, run by polygraphy's `TrtRunner`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.engines.feeds import check_feeds
from lsp_deploy.engines.protocol import EngineInfo, TensorSpec
from lsp_deploy.errors import UserError

__all__ = ["TensorRtRtxEngine", "load_engine"]


class TensorRtRtxEngine:
    """A loaded engine; `run` copies its inputs to the GPU and its outputs back."""

    backend = "tensorrt_rtx"

    def __init__(
        self, runner: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], info: EngineInfo
    ) -> None:
        """Take an active polygraphy runner, what goes in and comes out, and what the engine is."""
        self._runner = runner
        self._info = info
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output for `feeds`; floating-point feeds of another width are converted.

        Raises:
            UserError: an input is missing, unknown, or of another shape or type.
        """
        checked = check_feeds(feeds, self.inputs, self._info.file or "the engine")
        outputs = self._runner.infer({name: np.ascontiguousarray(value) for name, value in checked.items()})
        # The runner writes into the same host buffers at the next call.
        return {name: np.array(outputs[name]) for name in self.outputs}

    def describe(self) -> EngineInfo:
        """Return what the sidecar says."""
        return self._info

    def close(self) -> None:
        """Free the engine and its buffers on the GPU."""
        if self._runner is not None:
            self._runner.deactivate()
            self._runner = None

    def __enter__(self) -> TensorRtRtxEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def load_engine(path: Path, info: EngineInfo | None) -> TensorRtRtxEngine:
    """Read the engine in `path` onto the GPU of this machine.

    Raises:
        UserError: TensorRT-RTX does not take it: built for another GPU, or by another version.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    backend: Any = importlib.import_module("polygraphy.backend.trt")
    exceptions: Any = importlib.import_module("polygraphy.exception")
    trt: Any = importlib.import_module("tensorrt_rtx")
    runner = backend.TrtRunner(backend.EngineFromBytes(path.read_bytes()))
    try:
        runner.activate()
    except exceptions.PolygraphyException as error:
        raise UserError(f"TensorRT-RTX cannot load {path} on this GPU: {' '.join(str(error).split())}") from None
    engine = runner.engine
    specs: dict[Any, dict[str, TensorSpec]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple("?" if size == -1 else int(size) for size in engine.get_tensor_shape(name))
        specs[engine.get_tensor_mode(name)][name] = TensorSpec(
            np.dtype(trt.nptype(engine.get_tensor_dtype(name))), shape
        )
    described = info or EngineInfo(backend=TensorRtRtxEngine.backend, target="unknown", file=path.name)
    return TensorRtRtxEngine(runner, specs[trt.TensorIOMode.INPUT], specs[trt.TensorIOMode.OUTPUT], described)

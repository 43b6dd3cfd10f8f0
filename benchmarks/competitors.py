"""What else runs a dense vision transformer fast on a CPU: OpenVINO, and int8 by ONNX Runtime's own quantizer.

Each tool gets the settings that its documentation gives for this case: one request at a time, on a known number of
threads. Quantized models are kept in the folder that is given, since making one takes minutes.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

Images = NDArray[np.float32]
PROVIDERS = ["CPUExecutionProvider"]


class NotMeasured(Exception):  # noqa: N818
    """A variant cannot run here; the text says why."""


class Runner(Protocol):
    """A model ready to run."""

    def run(self, images: Images) -> NDArray[np.float32]:
        """Return the logits [batch, classes]."""

    def close(self) -> None:
        """Free it."""


class OnnxRuntimeRunner:
    """An ONNX file in a session with ONNX Runtime's own settings, except that idle threads do not spin."""

    def __init__(self, path: Path, threads: int, batch: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session: Any = ort.InferenceSession(str(path), options, providers=PROVIDERS)
        self._input = self._session.get_inputs()[0].name

    def run(self, images: Images) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._session.run(None, {self._input: images})[0]
        return logits

    def close(self) -> None:
        self._session = None


class OpenVinoRunner:
    """A model compiled by OpenVINO for one batch, for latency."""

    def __init__(self, path: Path, threads: int, batch: int, *, precision: Literal["f32", "bf16"]) -> None:
        installed("openvino")
        import openvino as ov

        core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise NotMeasured("OpenVINO finds no bf16 in this CPU")
        model = core.read_model(path)
        shape = model.input(0).partial_shape
        shape[0] = batch
        model.reshape(shape)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        self._request: Any = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, images: Images) -> NDArray[np.float32]:
        self._request.infer([images], share_inputs=True)
        logits: NDArray[np.float32] = self._request.get_output_tensor(0).data
        return logits

    def close(self) -> None:
        self._request = None


@dataclass(frozen=True)
class Quantizers:
    """int8 models of other tools, made from the dense `file` and kept in `folder`."""

    file: Path
    folder: Path
    calibration: Images
    """[images, 3, height, width]."""

    def onnxruntime(self) -> Path:
        """Return what onnxruntime.quantization makes of the linear layers: Q/DQ, int8 weights by output channel."""
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path = self._path(f"onnxruntime-{ort.__version__}", ".onnx")
        if not path.exists():
            prepared = path.with_suffix(".prepared.onnx")
            quant_pre_process(str(self.file), str(prepared))
            quantize_static(
                str(prepared),
                str(path),
                _calibration_reader(self.file, self.calibration),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=_linear_nodes(prepared),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            prepared.unlink()
        return path

    def nncf(self) -> Path:
        """Return what NNCF's recipe for transformers makes of the model, in OpenVINO's format."""
        path = self._path(f"nncf-{installed('nncf')}", ".xml")
        installed("openvino")
        if not path.exists():
            import nncf
            import openvino as ov

            with redirect_stdout(sys.stderr):  # its progress
                model = nncf.quantize(
                    ov.Core().read_model(self.file),
                    nncf.Dataset(_one_by_one(self.calibration)),
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(self.calibration),
                )
            ov.save_model(model, path, compress_to_fp16=False)
        return path

    def _path(self, tool: str, suffix: str) -> Path:
        return self.folder / f"{self.file.stem}.int8-{tool}-{len(self.calibration)}-images{suffix}"


def installed(package: str) -> str:
    """Return the version of a package.

    Raises:
        NotMeasured: it is not there.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        raise NotMeasured(f"{package} is not installed") from None


def _linear_nodes(path: Path) -> list[str]:
    """Return the names of the nodes that multiply by a constant matrix; attention's products stay as they are."""
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants]


def _calibration_reader(file: Path, images: Images) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.name = ort.InferenceSession(str(file), providers=PROVIDERS).get_inputs()[0].name
            self.images = iter(_one_by_one(images))

        def get_next(self) -> dict[str, Images] | None:
            image = next(self.images, None)
            return None if image is None else {self.name: image}

    return Reader()


def _one_by_one(images: Images) -> list[Images]:
    return np.split(images, len(images))

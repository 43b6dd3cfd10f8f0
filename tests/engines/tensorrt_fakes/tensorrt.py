"""TensorRT in little: an engine is the ONNX model, and ONNX Runtime does its work on the fake GPU's memory.

Environment: FAKE_TENSORRT is the version, 10.3.0 if not given; FAKE_TENSORRT_DENSE lets the builder run everything in
float32 and without 2:4 kernels, whatever the model asks.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from cuda.bindings import runtime as cuda

__version__ = os.environ.get("FAKE_TENSORRT", "10.3.0")
_MAJOR = int(__version__.partition(".")[0])
_TYPES = {1: "FLOAT", 10: "HALF"}

Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)
DataType = enum.IntEnum("DataType", ["FLOAT", "HALF"], start=0)
TensorIOMode = enum.IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"], start=0)
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED", "NONE"], start=0)
MemoryPoolType = enum.IntEnum("MemoryPoolType", ["WORKSPACE"], start=0)
LayerInformationFormat = enum.IntEnum("LayerInformationFormat", ["ONELINE", "JSON"], start=0)
NetworkDefinitionCreationFlag = enum.IntEnum(
    "NetworkDefinitionCreationFlag",
    ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if _MAJOR < 11 else ["STRONGLY_TYPED"],
    start=0,
)
BuilderFlag = enum.IntEnum(
    "BuilderFlag", ["SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "REFIT_IDENTICAL"], start=7
)
HardwareCompatibilityLevel = enum.IntEnum(
    "HardwareCompatibilityLevel",
    ["NONE", "AMPERE_PLUS", *([] if __version__.startswith("10.3") else ["SAME_COMPUTE_CAPABILITY"])],
    start=0,
)
ErrorCode = enum.Enum("ErrorCode", ["INVALID_NODE"])


class ILogger:
    Severity = Severity


_LOADED: set[str] = set()


class _Registry:
    def load_library(self, path: str) -> object | None:
        if "/" not in path or not os.path.isfile(path) or path in _LOADED:  # noqa: PTH113
            return None  # dlopen finds no bare name here; TensorRT takes no library whose plugins it has already
        _LOADED.add(path)
        return object()


def get_plugin_registry() -> _Registry:
    return _Registry()


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self.dtype = DataType[_TYPES[value.type.tensor_type.elem_type]]
        self.shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)


class _Network:
    model: onnx.ModelProto

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self.model.graph.input[index])


class _ParserError:
    def code(self) -> Any:
        return ErrorCode.INVALID_NODE

    def desc(self) -> str:
        return 'Assertion failed: creator && "Plugin not found"'

    def node_name(self) -> str:
        return "odd"

    def node_operator(self) -> str:
        return "Odd"


class OnnxParser:
    num_errors = 1

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.model = onnx.load(path)
        return all(node.op_type != "Odd" for node in self.network.model.graph.node)

    def get_error(self, index: int) -> _ParserError:
        return _ParserError()


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self.shapes[name] = (tuple(low), tuple(high))


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content or b"GPU 0:"

    def serialize(self) -> bytes:
        return self.content + b"measured."


class _Config:
    profiling_verbosity: Any = None
    builder_optimization_level = 3
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    plugins_to_serialize: list[str] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.flags: set[Any] = set()
        self.profile = _Profile()
        self.cache: _TimingCache | None = None
        self.pools: dict[Any, int] = {}

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profile = profile
        return 0

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        if not cache.content.startswith(b"GPU 0:"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        assert config.profiling_verbosity == ProfilingVerbosity.DETAILED
        dense = "FAKE_TENSORRT_DENSE" in os.environ
        self.logger.log(Severity.WARNING, "a warning")
        self.logger.log(Severity.INFO, "Total Activation Memory: 4096")
        self.logger.log(Severity.INFO, "Total Weights Memory: 24576 bytes")
        if BuilderFlag.SPARSE_WEIGHTS in config.flags:
            self.logger.log(Severity.INFO, "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: linear")
            chosen = (
                "0 layer(s) using sparse tactics" if dense else "1 layer(s) using sparse tactics: linear + bias_add"
            )
            self.logger.log(Severity.INFO, f"(Sparsity) Chose {chosen}")
        head = {
            "profile": config.profile.shapes,
            "dense": dense,
            "stripped": BuilderFlag.STRIP_PLAN in config.flags,
            "flags": sorted(flag.name for flag in config.flags),
            "workspace": config.pools.get(MemoryPoolType.WORKSPACE),
            "level": config.builder_optimization_level,
            "compatible": config.hardware_compatibility_level.name,
            "plugins": config.plugins_to_serialize,
        }
        return json.dumps(head).encode() + b"\n" + network.model.SerializeToString()


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        head, _, model = bytes(plan).partition(b"\n")
        if not head.startswith(b"{"):
            self.logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (bad magic)")
            return None
        settings = json.loads(head)
        if settings["plugins"] and not self.engine_host_code_allowed:
            self.logger.log(Severity.ERROR, "host code is not allowed")
            return None
        if _LOADED.intersection(settings["plugins"]):
            self.logger.log(Severity.ERROR, "the plugins in the engine are known already")
            return None
        return _Engine(settings, model)


class Refitter:
    def __init__(self, engine: _Engine, logger: Any) -> None:
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        self.engine.settings["stripped"] = False
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.engine = refitter.engine

    def refit_from_file(self, path: str) -> bool:
        self.engine.model = onnx.load(path).SerializeToString()
        return True


class _Engine:
    def __init__(self, settings: dict[str, Any], model: bytes) -> None:
        self.settings, self.model = settings, model
        graph = onnx.load_model_from_string(model).graph
        self.tensors = {value.name: _Tensor(value) for value in (*graph.input, *graph.output)}
        self.modes = {value.name: TensorIOMode.INPUT for value in graph.input}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.modes.get(name, TensorIOMode.OUTPUT)

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self) -> _Context:
        return _Context(self)

    def create_engine_inspector(self) -> _Inspector:
        return _Inspector(self)


class _Inspector:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine

    def get_engine_information(self, form: Any) -> str:
        assert form == LayerInformationFormat.JSON
        graph = onnx.load_model_from_string(self.engine.model).graph
        names = list(self.engine.tensors)
        ends = {"Bindings": names} if _MAJOR < 11 else {"I/O Tensors": [{"Name": name} for name in names]}
        return json.dumps({"Layers": list(self._layers(graph)), **ends})

    def _layers(self, graph: onnx.GraphProto) -> Iterator[dict[str, Any]]:
        int8 = not self.engine.settings["dense"] and any(node.op_type == "DequantizeLinear" for node in graph.node)
        for node in graph.node:
            if node.op_type == "LayerNormalization":
                yield self._layer(node, "kgen", "__myl_0x1", False, "Float")
            if node.op_type == "MatMul":
                sparse = not self.engine.settings["dense"] and "SPARSE_WEIGHTS" in self.engine.settings["flags"]
                kernel = (
                    f"sm80_xmma_{'sparse_' if sparse else ''}gemm_{'i8f32_i8i32' if int8 else 'f32f32_f32f32'}_tn_n"
                )
                yield self._layer(node, "gemm", kernel, True, "Int8" if int8 else "Float")

    def _layer(self, node: Any, kind: str, tactic: str, weight: bool, element: str) -> dict[str, Any]:
        return {
            "Name": f"{node.name}_myl0_1",
            "LayerType": kind,
            "Inputs": [self._tensor(node.input[0], element)],
            "Outputs": [self._tensor(node.output[0], "Float")],
            **({"Constants": [self._tensor(node.input[1], element, (64, 96))]} if weight else {}),
            "TacticName": tactic,
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: {node.name}]",
        }

    def _tensor(self, name: str, element: str, shape: tuple[int, ...] = (-1, 4, 64)) -> dict[str, Any]:
        types = {"Format/Datatype": element} if _MAJOR < 11 else {"Format": "Row major linear", "DataType": element}
        return {"Name": name, "Dimensions": shape, **types}


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.engine.settings["profile"].get(name, (shape, shape))
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0]
        return tuple(batch if size == -1 else size for size in self.engine.tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses, engine = dict(self.shapes), dict(self.addresses), self.engine
        assert not engine.settings["stripped"]

        def kernel() -> None:
            session = ort.InferenceSession(engine.model, providers=["CPUExecutionProvider"])
            feeds = {name: _view(addresses[name], shape, engine.tensors[name]) for name, shape in shapes.items()}
            names = [value.name for value in session.get_outputs()]
            for name, value in zip(names, session.run(names, feeds), strict=True):
                ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)

        cuda.put(kernel)
        return True


def _view(address: int, shape: tuple[int, ...], tensor: _Tensor) -> np.ndarray:
    dtype = np.dtype(np.float16 if tensor.dtype == DataType.HALF else np.float32)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)

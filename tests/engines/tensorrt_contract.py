"""Run the TensorRT code against the real bindings of one version, whose libraries are stubs or have no GPU.

    python tensorrt_contract.py MODULE MODULE_AS CUDA FOLDER

imports MODULE and lets the package find it as MODULE_AS, and CUDA's real runtime bindings where CUDA is "yes". Enums,
functions' signatures and the logger are real. Objects that only a library or a GPU gives are mocks that know the real
class: an attribute or method that the class does not have is an AttributeError, and each call's number of arguments is
held against the real signature. Prints what was called.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

# How the objects come from each other, and what the code needs of them.
PRODUCTS = {
    "Builder": {
        "create_network": "INetworkDefinition",
        "create_builder_config": "IBuilderConfig",
        "create_optimization_profile": "IOptimizationProfile",
    },
    "IBuilderConfig": {"create_timing_cache": "ITimingCache", "get_timing_cache": "ITimingCache"},
    "INetworkDefinition": {"get_input": "ITensor"},
    "Runtime": {"deserialize_cuda_engine": "ICudaEngine"},
    "ICudaEngine": {"create_engine_inspector": "EngineInspector", "create_execution_context": "IExecutionContext"},
    "OnnxParser": {"get_error": "ParserError"},
}
MADE = ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter")
called: dict[str, int] = {}


class Facade:
    """The real module, in which the classes that need a library or a GPU make mocks of themselves."""

    def __init__(self, module: ModuleType, answers: dict[str, Any]) -> None:
        self._module, self._answers = module, answers
        self.__name__ = module.__name__
        self.objects: list[tuple[str, mock.Mock]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._module, name)
        if name in MADE:
            return lambda *arguments: self.make(name)
        if name == "get_plugin_registry":
            return lambda: self.make("IPluginRegistry")
        if name == "init_libnvinfer_plugins":
            check_arity(name, real, 2)
            return lambda logger, namespace: True
        return real

    def make(self, name: str) -> mock.Mock:
        real = getattr(self._module, name)
        made = mock.NonCallableMagicMock(spec_set=real, name=name)
        for method, product in PRODUCTS.get(name, {}).items():
            getattr(made, method).side_effect = lambda *arguments, _product=product: self.make(_product)
        for attribute, answer in self._answers.get(name, {}).items():
            if callable(getattr(real, attribute, None)):
                getattr(made, attribute).side_effect = answer
            else:
                setattr(type(made), attribute, answer)
        self.objects.append((name, made))
        return made

    def check_calls(self) -> None:
        for name, made in self.objects:
            for call in made.method_calls:
                method, arguments, keywords = call
                assert not keywords, f"{name}.{method} is called with keywords, whose names change by version"
                if "." not in method and not method.startswith("__"):
                    check_arity(f"{name}.{method}", getattr(getattr(self._module, name), method), len(arguments))


def check_arity(label: str, function: Any, given: int) -> None:
    """Hold the number of arguments against the signatures in the function's docstring, the only place that has them."""
    document = function.__doc__ or ""
    name = re.escape(label.rpartition(".")[2])
    signatures = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: ->.*)?$", document, re.MULTILINE)
    accepted = [arity(parameters) for parameters in signatures if "*args" not in parameters]
    assert accepted, f"{label} has no signature: {document[:200]}"
    assert any(low <= given <= high for low, high in accepted), f"{label} is given {given} arguments: {signatures}"
    called[label] = given


def arity(parameters: str) -> tuple[int, int]:
    depth, parts = 0, [""]
    for character in parameters:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    named = [part for part in (part.strip() for part in parts) if part and not part.startswith("self")]
    return sum("=" not in part for part in named), len(named)


class FakeCuda:
    """In place of our own layer over CUDA, which has its own contract."""

    stream = 7

    def __getattr__(self, name: str) -> Any:
        return mock.Mock(return_value=1)

    def capture(self, enqueue: Any) -> int:
        enqueue()
        return 1

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)


def tensor_answers(trt: Any) -> dict[str, dict[str, Any]]:
    """One dynamic input x and one output y, where the code asks for them."""
    shapes = {"x": (-1, 4), "y": (-1, 2)}
    modes = {"x": trt.TensorIOMode.INPUT, "y": trt.TensorIOMode.OUTPUT}
    return {
        "INetworkDefinition": {"num_inputs": 1},
        "ITensor": {"name": "x", "shape": shapes["x"]},
        "OnnxParser": {"parse_from_file": lambda path: True, "num_errors": 1},
        "ParserError": {
            "code": lambda: trt.ErrorCode.INVALID_NODE,
            "desc": lambda: "refused",
            "node_name": lambda: "n",
            "node_operator": lambda: "Op",
        },
        "IPluginRegistry": {"all_creators": [SimpleNamespace(name="BlockSparseLinear", plugin_namespace="lsp")]},
        "Builder": {"build_serialized_network": lambda network, config: b"plan"},
        "IBuilderConfig": {"set_timing_cache": lambda cache, ignore: True},
        "ITimingCache": {"serialize": lambda: b"cache"},
        "EngineInspector": {"get_engine_information": lambda form: '{"Layers": []}'},
        "ICudaEngine": {
            "num_io_tensors": 2,
            "get_tensor_name": lambda index: "xy"[index],
            "get_tensor_mode": lambda name: modes[name],
            "get_tensor_dtype": lambda name: trt.DataType.HALF,
            "get_tensor_shape": lambda name: shapes[name],
            "is_shape_inference_io": lambda name: False,
        },
        "IExecutionContext": {"get_tensor_shape": lambda name: (3, 2)},
        "Refitter": {"refit_cuda_engine": lambda: True},
    }


def build(module: ModuleType, name: str, folder: Path) -> Facade:
    """Drive the build with every option set, then a build whose model is refused."""
    from lsp_deploy.engines.protocol import BuildOptions
    from lsp_deploy.engines.tensorrt_common import build_child
    from lsp_deploy.engines.tensorrt_common.messages import BuildRequest

    rtx = name == "tensorrt_rtx"
    options = BuildOptions(
        min_shapes={"x": (1, 4)},
        opt_shapes={"x": (2, 4)},
        max_shapes={"x": (8, 4)},
        workspace_mb=64,
        sparse_weights=True,
        optimization_level=3,
        timing_cache=folder / "cache",
        plugins=(folder / "lib.so",),
        version_compatible=True,
        hardware_compatibility="ampere-plus",
        refittable=True,
        strip_weights=True,
    )
    answers = tensor_answers(module)
    facade = Facade(module, answers)
    request = BuildRequest(
        module=name,
        model=folder / "model.onnx",
        folder=folder,
        options=options,
        compute_capability=(8, 0) if rtx else None,
        inspect=not rtx,
        operators=True,
    )
    with mock.patch.dict(sys.modules, {name: facade}), request.log.open("w") as log:
        response = build_child._build(request, log)
        assert response.built, response
        assert response.versions == {name: module.__version__}
        identical = options.model_copy(update={"refittable": False})
        assert build_child._build(request.model_copy(update={"options": identical}), log).built
        answers["OnnxParser"]["parse_from_file"] = lambda path: False
        (error,) = build_child._build(request, log).parser_errors
        assert error.node == "n"
        facade.check_calls()
    assert rtx or request.inspection.read_text() == '{"Layers": []}'
    assert (folder / "cache").read_bytes() == b"cache"
    return facade


def run(module: ModuleType, name: str, folder: Path) -> None:
    """Drive loading, refitting, running and timing."""
    from lsp_deploy.engines.tensorrt_common import loading
    from lsp_deploy.engines.tensorrt_common.gpu import Gpu

    facade = Facade(module, tensor_answers(module))
    (folder / "e.engine").write_bytes(b"plan")
    patches = {"Cuda": FakeCuda, "first_gpu": lambda: Gpu("GPU", "8.0", 108)}
    with mock.patch.dict(sys.modules, {name: facade}), mock.patch.multiple(loading, **patches):
        # find_spec asks the module for it
        with mock.patch.object(loading.importlib.util, "find_spec", lambda name: SimpleNamespace()):
            engine = loading.load_engine(name, folder / "e.engine", weights=folder / "model.onnx")
        with engine:
            assert engine.run({"x": np.zeros((3, 4), np.float32)})["y"].dtype == np.float16
            engine.timed_run({"x": np.zeros((3, 4), np.float32)})()
            assert engine.describe().warnings == []
    facade.check_calls()


def cuda(folder: Path) -> None:
    """Drive every method of our layer over CUDA against the real runtime bindings."""
    from lsp_deploy.engines.tensorrt_common import cuda as layer

    real = importlib.import_module("cuda.bindings.runtime")
    error, _ = real.cudaStreamCreate()
    assert error == real.cudaError_t.cudaErrorInsufficientDriver  # results come as a tuple, the error first
    two = {"cudaStreamCreate", "cudaMalloc", "cudaEventCreate", "cudaStreamEndCapture", "cudaGraphInstantiate"}

    def function(name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            check_arity(name, getattr(real, name), len(arguments))
            if name == "cudaEventElapsedTime":
                return (real.cudaError_t.cudaSuccess, 0.5)
            return (real.cudaError_t.cudaSuccess, 64) if name in two else (real.cudaError_t.cudaSuccess,)

        return call

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            found = getattr(real, name)
            return found if isinstance(found, type) else function(name)  # enums are real

    with mock.patch.object(layer.importlib, "import_module", lambda name: Runtime()):
        opened = layer.Cuda()
        address = opened.allocate(16)
        opened.upload(np.zeros(4, np.float32), address)
        assert opened.download(address, (2,), np.dtype(np.int8)).shape == (2,)
        graph = opened.capture(lambda: None)
        opened.launch(graph)
        assert opened.milliseconds(lambda: None) == 0.5
        opened.synchronize()
        opened.destroy_graph(graph)
        opened.free(address)
        opened.close()


def main() -> None:
    module_name, name, with_cuda, folder = sys.argv[1:]
    path = Path(folder)
    if module_name != "-":
        module = importlib.import_module(module_name)
        build(module, name, path)
        run(module, name, path)
    if with_cuda == "yes":
        cuda(path)
    print(*sorted(called))


if __name__ == "__main__":
    main()

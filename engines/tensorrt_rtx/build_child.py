"""Build one engine in a process of its own: `python -I -m lsp_deploy.engines.tensorrt_rtx.build_child request.json`.

A process of its own, because TensorRT-RTX takes one logger a process, its ONNX parser can end the process, and a
failed build leaves state that changes the next one.

The configuration comes from polygraphy (`CreateConfigRTX`, `Profile`), which knows how each option is spelled from
version to version. Parsing and building use the raw API: polygraphy's loaders bring their own logger, which has no
place for the layer table, and turn the parser's errors into text without the node.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from lsp_deploy.engines.protocol import BuildOptions
from lsp_deploy.engines.tensorrt_rtx.messages import BuildRequest, BuildResponse, LogMessage, ParserError


def main(request_path: str) -> None:
    """Carry out the request in `request_path` and write the response to where it says."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    request = BuildRequest.model_validate_json(Path(request_path).read_bytes())
    # Line buffered: when the parser ends the process, what it said last is in the file.
    with request.log.open("w", buffering=1, encoding="utf-8") as log:
        response = _build(request, log)
    request.response.write_text(response.model_dump_json())


def _build(request: BuildRequest, log: TextIO) -> BuildResponse:
    trt: Any = importlib.import_module("tensorrt_rtx")
    versions = {"tensorrt_rtx": trt.__version__, "polygraphy": version("polygraphy")}
    start = time.perf_counter()

    def response(**fields: Any) -> BuildResponse:
        seconds = round(time.perf_counter() - start, 3)
        return BuildResponse(**{"built": False, "seconds": seconds, "versions": versions, **fields})

    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.model)):
        return response(parser_errors=[_parser_error(parser.get_error(i)) for i in range(parser.num_errors)])
    refusal = _shape_refusal(network, request.options)
    if refusal is not None:
        return response(refusal=refusal)
    engine = builder.build_serialized_network(network, _config(trt, builder, network, request))
    if engine is None:
        return response()
    request.engine.write_bytes(engine)
    return response(built=True)


def _logger(trt: Any, log: TextIO) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.write(LogMessage(severity=severity.name, text=text).model_dump_json() + "\n")

    return Logger()


def _parser_error(error: Any) -> ParserError:
    return ParserError(
        code=error.code().name,
        description=error.desc(),
        node=error.node_name() or "",
        operator=error.node_operator() or "",
    )


def _shape_refusal(network: Any, options: BuildOptions) -> str | None:
    """Say why the given shapes do not fit the network's inputs, or None where they do."""
    shapes = {value.name: tuple(value.shape) for value in (network.get_input(i) for i in range(network.num_inputs))}
    for name in (*options.min_shapes, *options.opt_shapes, *options.max_shapes):
        if name not in shapes:
            return f"shapes are given for {name}, but the inputs are {', '.join(shapes)}"
    for name, shape in shapes.items():
        bounds = _bounds(options, name)
        if bounds is None:
            if -1 in shape:
                return f"input {name} is dynamic, {_text(shape)}, and has no shapes to build for"
            continue
        for bound in bounds:
            if len(bound) != len(shape) or any(d not in (-1, size) for d, size in zip(shape, bound, strict=True)):
                return f"input {name} is {_text(shape)}, which {_text(bound)} does not fit"
        if not all(low <= opt <= high for low, opt, high in zip(*bounds, strict=True)):
            low, opt, high = (_text(bound) for bound in bounds)
            return f"input {name}: min {low}, opt {opt} and max {high} are not in ascending order"
    return None


def _config(trt: Any, builder: Any, network: Any, request: BuildRequest) -> Any:
    backend: Any = importlib.import_module("polygraphy.backend.trt")
    rtx: Any = importlib.import_module("polygraphy.backend.tensorrt_rtx")
    options = request.options
    profile = backend.Profile()
    for name in options.opt_shapes:
        profile.add(name, *(_bounds(options, name) or ()))
    limits = {} if options.workspace_mb is None else {trt.MemoryPoolType.WORKSPACE: options.workspace_mb << 20}
    create = rtx.CreateConfigRTX(
        profiles=[profile],
        # Without a target the builder takes types that the GPU does not have.
        compute_capabilities=[request.compute_capability],
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,  # makes it log the layer table
        sparse_weights=options.sparse_weights,
        builder_optimization_level=options.optimization_level,
        memory_pool_limits=limits,
    )
    return create(builder, network)


def _bounds(options: BuildOptions, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    opt = options.opt_shapes.get(name)
    if opt is None:
        return None
    return options.min_shapes.get(name, opt), opt, options.max_shapes.get(name, opt)


def _text(shape: Sequence[int]) -> str:
    return "x".join("?" if size == -1 else str(size) for size in shape)


if __name__ == "__main__":
    main(sys.argv[1])

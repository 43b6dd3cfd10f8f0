"""Build one engine in a process of its own: `python -I -m lsp_deploy.engines.tensorrt_common.build_child request.json`.

A process of its own, because TensorRT takes one logger a process, its ONNX parser can end the process, and a failed
build leaves state that changes the next one.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from lsp_deploy.engines.tensorrt_common.configuration import (
    NotInThisVersionError,
    configure,
    load_plugins,
    read_timing_cache,
    write_timing_cache,
)
from lsp_deploy.engines.tensorrt_common.logger import make_logger
from lsp_deploy.engines.tensorrt_common.messages import BuildRequest, BuildResponse, LogMessage, ParserError
from lsp_deploy.engines.tensorrt_common.network import add_profile, network_flags, shape_refusal
from lsp_deploy.engines.tensorrt_common.operators import provide_operators


def main(request_path: str) -> None:
    """Carry out the request in `request_path` and write the response to where it says."""
    request = BuildRequest.model_validate_json(Path(request_path).read_bytes())
    # Line buffered: when the parser ends the process, what it said last is in the file.
    with request.log.open("w", buffering=1, encoding="utf-8") as log:
        response = _build(request, log)
    request.response.write_text(response.model_dump_json())


def _build(request: BuildRequest, log: TextIO) -> BuildResponse:
    trt: Any = importlib.import_module(request.module)
    start = time.perf_counter()

    def response(**fields: Any) -> BuildResponse:
        seconds = round(time.perf_counter() - start, 3)
        versions = {request.module: trt.__version__}
        return BuildResponse(**{"built": False, "seconds": seconds, "versions": versions, **fields})

    def record(severity: str, text: str) -> None:
        log.write(LogMessage(severity=severity, text=text).model_dump_json() + "\n")

    logger = make_logger(trt, record)
    options = request.options
    try:
        load_plugins(trt, logger, options.plugins)
        # The registry does not keep a plugin alive.
        plugin, said = provide_operators(trt) if request.operators else (None, [])
        builder = trt.Builder(logger)
        network = builder.create_network(network_flags(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(request.model)):
            return response(parser_errors=[_parser_error(parser.get_error(i)) for i in range(parser.num_errors)])
        refusal = shape_refusal(network, options)
        if refusal is not None:
            return response(refusal=refusal)
        config = builder.create_builder_config()
        configure(trt, config, options, request.compute_capability)
    except NotInThisVersionError as error:
        return response(refusal=str(error))
    add_profile(builder, network, config, options)
    remarks = [*said, *read_timing_cache(config, options.timing_cache)]
    engine = builder.build_serialized_network(network, config)
    del plugin
    if engine is None:
        return response()
    remarks += write_timing_cache(config, options.timing_cache)
    request.engine.write_bytes(engine)
    result = response(built=True, remarks=remarks)
    if request.inspect:
        _inspect(trt, logger, engine, request.inspection)
    return result


def _inspect(trt: Any, logger: Any, engine: Any, path: Path) -> None:
    """Write what the inspector says of the engine; nothing where the engine cannot be loaded."""
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # we have just built what is in it
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is not None:
        inspector = loaded.create_engine_inspector()
        path.write_text(inspector.get_engine_information(trt.LayerInformationFormat.JSON), encoding="utf-8")


def _parser_error(error: Any) -> ParserError:
    return ParserError(
        code=str(error.code()).rpartition(".")[2],  # before 10.16 this enum's `name` is a method
        description=error.desc(),
        node=error.node_name() or "",
        operator=error.node_operator() or "",
    )


if __name__ == "__main__":
    main(sys.argv[1])

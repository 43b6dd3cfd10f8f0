"""A build in a child process, and what its end means."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lsp_deploy.engines.own_operators import imports_operators
from lsp_deploy.engines.protocol import BuildOptions, EngineBuildError
from lsp_deploy.engines.tensorrt_common import build_log
from lsp_deploy.engines.tensorrt_common.messages import BuildRequest, BuildResponse, LogMessage, ModuleName
from lsp_deploy.files import atomic_path

__all__ = ["ChildBuild", "build_in_child"]

_CHILD = "lsp_deploy.engines.tensorrt_common.build_child"
_TITLES: Mapping[ModuleName, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class ChildBuild:
    """What a build that went well left behind, beside the engine."""

    response: BuildResponse
    messages: list[LogMessage]
    inspection: str | None
    """The inspector's JSON, where it was asked."""


def build_in_child(
    module: ModuleName,
    model_path: Path,
    engine_path: Path,
    options: BuildOptions,
    *,
    compute_capability: tuple[int, int] | None = None,
    inspect: bool = False,
    environment: Callable[[Path], Mapping[str, str]] | None = None,
) -> ChildBuild:
    """Build `model_path` into `engine_path` with TensorRT in a fresh process.

    Args:
        module: which TensorRT.
        model_path: the ONNX file.
        engine_path: written whole or not at all.
        options: how to build.
        compute_capability: of the GPU to build for, where the module can build for one that is not there.
        inspect: whether the child loads the engine and asks its inspector.
        environment: the child's environment variables, given a folder that lives as long as the child.

    Raises:
        EngineBuildError: the builder refused the model, crashed, or ran out of time; nothing is written.
    """
    with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as name:
        folder = Path(name)
        request = BuildRequest(
            module=module,
            model=model_path.resolve(),
            folder=folder,
            compute_capability=compute_capability,
            options=options,
            inspect=inspect,
            operators=imports_operators(model_path),
        )
        response = _run(request, environment(folder) if environment is not None else None)
        messages = build_log.read_log(request.log)
        if not response.built:
            raise _refusal(response, messages, _TITLES[module])
        with atomic_path(engine_path) as temporary:
            shutil.copyfile(request.engine, temporary)
        inspection = request.inspection.read_text(encoding="utf-8") if request.inspection.is_file() else None
    return ChildBuild(response, messages, inspection)


def _run(request: BuildRequest, environment: Mapping[str, str] | None) -> BuildResponse:
    """Run the child; `subprocess.run` ends it on Ctrl-C and when its time is over."""
    request_path, output_path = request.folder / "request.json", request.folder / "output.txt"
    request_path.write_text(request.model_dump_json())
    # -I: neither the working folder nor PYTHON* variables may put other code in place of the installed package.
    command = [sys.executable, "-I", "-m", _CHILD, str(request_path)]
    timeout = request.options.timeout_seconds
    with output_path.open("wb") as output:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise _death(f"took longer than {timeout:g} s and was ended", request, output_path) from None
    try:
        return BuildResponse.model_validate_json(request.response.read_bytes())
    except (FileNotFoundError, ValidationError):
        raise _death(f"ended without an answer ({_ending(code)})", request, output_path) from None


def _refusal(response: BuildResponse, messages: list[LogMessage], title: str) -> EngineBuildError:
    said = [build_log.parser_error_line(error) for error in response.parser_errors]
    lines = [response.refusal] if response.refusal is not None else (said or build_log.error_lines(messages))
    first = lines[0] if lines else "the builder gave no engine and no reason"
    return EngineBuildError(f"{title} refuses the model: {first}", lines[1:])


def _death(what: str, request: BuildRequest, output_path: Path) -> EngineBuildError:
    messages = build_log.read_log(request.log)
    printed = [line.strip() for line in output_path.read_text(errors="replace").splitlines() if line.strip()]
    node = build_log.last_node(messages)
    known = [
        f"at node {node}" if node is not None else "",
        next(iter(build_log.error_lines(messages)), printed[-1] if printed else ""),
    ]
    detail = ": ".join(part for part in known if part)
    title = _TITLES[request.module]
    return EngineBuildError(f"the {title} builder {what}{', ' + detail if detail else ''}", printed)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"

"""What parent and child say to each other: one JSON file each way, and a log that survives a crash."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy.engines.protocol import BuildOptions

__all__ = ["BuildRequest", "BuildResponse", "LogMessage", "ParserError"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BuildRequest(_Strict):
    """What the child is to build."""

    model: Path
    engine: Path
    log: Path
    response: Path
    compute_capability: tuple[int, int]
    options: BuildOptions


class ParserError(_Strict):
    """Why the ONNX parser refused a model."""

    code: str
    description: str
    node: str = ""
    operator: str = ""


class BuildResponse(_Strict):
    """How the build went; what the builder itself said is in the log."""

    built: bool
    seconds: float
    versions: dict[str, str]
    parser_errors: list[ParserError] = Field(default_factory=list)
    refusal: str | None = Field(None, description="why the request itself could not be carried out")


class LogMessage(_Strict):
    """One message of TensorRT-RTX's logger."""

    severity: str
    text: str

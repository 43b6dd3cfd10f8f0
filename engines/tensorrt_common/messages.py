"""What parent and child say to each other: one JSON file each way, and a log that survives a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy.engines.protocol import BuildOptions

__all__ = ["BuildRequest", "BuildResponse", "LogMessage", "ModuleName", "ParserError"]

ModuleName = Literal["tensorrt", "tensorrt_rtx"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BuildRequest(_Strict):
    """What the child is to build, and where everything goes."""

    module: ModuleName
    model: Path
    folder: Path
    options: BuildOptions
    compute_capability: tuple[int, int] | None = Field(
        None, description="to build for, where the module can build for a GPU that is not there"
    )
    inspect: bool = Field(description="whether to load the engine and write what its inspector says")
    operators: bool = Field(False, description="whether the model holds operators of ours, which a plugin must bring")

    @property
    def engine(self) -> Path:
        """Where the engine goes."""
        return self.folder / "engine"

    @property
    def log(self) -> Path:
        """Where the builder's messages go, one JSON line each."""
        return self.folder / "log.jsonl"

    @property
    def inspection(self) -> Path:
        """Where the inspector's JSON goes."""
        return self.folder / "inspection.json"

    @property
    def response(self) -> Path:
        """Where the response goes."""
        return self.folder / "response.json"


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
    remarks: list[str] = Field(default_factory=list, description="what the user should know of a build that went well")


class LogMessage(_Strict):
    """One message of the logger."""

    severity: str
    text: str

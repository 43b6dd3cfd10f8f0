"""What the build log of TensorRT and TensorRT-RTX says: memory, 2:4 kernels, and why a build failed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from lsp_deploy.engines.protocol import SparseTactics
from lsp_deploy.engines.tensorrt_common.messages import LogMessage, ParserError

__all__ = ["error_lines", "last_node", "memory", "parser_error_line", "read_log", "sparse_tactics", "warning_lines"]

_MEMORY = {
    "Total Activation Memory": "activations",
    "Total Weights Memory": "weights",
    "Max Scratch Memory": "scratch",
    "Total Host Persistent Memory": "host_persistent",
    "Total Device Persistent Memory": "device_persistent",
}
_MEMORY_LINE = re.compile(rf"({'|'.join(_MEMORY)}): (\d+)")
_SPARSITY_LINE = re.compile(r"\(Sparsity\) (?P<what>Found|Chose) (?P<count>\d+) layer\(s\)[^:]*(?:: *(?P<names>.*))?")
# Every error of a machine without a driver is followed by a complaint about the driver, which a build does not need.
_NOISE = re.compile(r"cudaError 35|CUDA driver version is insufficient")
# IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:15: run_passes] TEXT. In compileGraph at /_src/x)
_WRAPPED = re.compile(
    r"(?:\S+: |\[\S+\] )?Error Code \d+: (?P<kind>[\w ]+) \((?:\[[^\]]*\] ?)?(?P<text>.*?)\.?(?:\s+In \w+ at \S+)?\)",
    re.DOTALL,
)
_KINDS_THAT_SAY_NOTHING = frozenset({"API Usage Error", "Internal Error", "Myelin"})
_ASSERTION = re.compile(r"Assertion failed: .*?: (?=[A-Z])|(?:Assertion failed: )?\w+ && (?=\")")
_PARSING = re.compile(r"Parsing node: (?P<node>.*) \[(?P<operator>\w+)\]")


def read_log(path: Path) -> list[LogMessage]:
    """Return the messages of a log; a last line that a crash cut short is left out."""
    messages = []
    # Not splitlines: that also breaks lines at separators that a node's name may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            messages.append(LogMessage.model_validate_json(line))
        except ValidationError:
            break
    return messages


def memory(messages: Iterable[LogMessage]) -> dict[str, int]:
    """Return the bytes of memory that the engine needs, by kind."""
    found = (_MEMORY_LINE.search(message.text) for message in messages)
    return {_MEMORY[match[1]]: int(match[2]) for match in found if match is not None}


def sparse_tactics(messages: Iterable[LogMessage]) -> SparseTactics | None:
    """Return how many layers could use 2:4 kernels and how many do; None where the builder says nothing of it."""
    found = [_SPARSITY_LINE.search(" ".join(message.text.split())) for message in messages]
    lines = {match["what"]: match for match in found if match is not None}
    if not lines:
        return None
    counts = {what: int(match["count"]) for what, match in lines.items()}
    names = (lines["Chose"]["names"] if "Chose" in lines else None) or ""
    return SparseTactics(
        eligible=counts.get("Found", 0),
        chosen=counts.get("Chose", 0),
        layers=[name for name in names.split(", ") if name],
    )


def error_lines(messages: Iterable[LogMessage]) -> list[str]:
    """Return what went wrong, one line an error, without the noise of a machine that has no NVIDIA driver."""
    errors = [message.text for message in messages if message.severity in ("ERROR", "INTERNAL_ERROR")]
    return [_unwrapped(text) for text in errors if not _NOISE.search(text)] or [_unwrapped(text) for text in errors]


def warning_lines(messages: Iterable[LogMessage]) -> list[str]:
    """Return the builder's warnings, each once, in order."""
    lines = (" ".join(message.text.split()) for message in messages if message.severity == "WARNING")
    return list(dict.fromkeys(line for line in lines if not _NOISE.search(line)))


def last_node(messages: Sequence[LogMessage]) -> str | None:
    """Return the node that the parser was at when the log ended, as `name (operator)`; None once it was through."""
    for message in reversed(messages):
        match = _PARSING.fullmatch(message.text)
        if match is not None:
            return f"{match['node']} ({match['operator']})"
        if message.text.startswith(("Original:", "After dead-layer removal")):
            return None
    return None


def parser_error_line(error: ParserError) -> str:
    """Return a parser's error as one line that names the node."""
    description = _ASSERTION.sub("", " ".join(error.description.split())).strip(' "')
    kind = error.code.lower().replace("_", " ")
    where = f"node {error.node} ({error.operator}): " if error.node else ""
    # Where the parser only says that a condition does not hold, its code says more.
    return f"{where}{kind}" if description in ("", "false") else f"{where}{description}"


def _unwrapped(text: str) -> str:
    line = " ".join(text.split())
    match = _WRAPPED.fullmatch(line)
    if match is None:
        return line
    return match["text"] if match["kind"] in _KINDS_THAT_SAY_NOTHING else f"{match['kind']}: {match['text']}"

"""A TensorRT logger that hands on every message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["make_logger"]


def make_logger(trt: Any, receive: Callable[[str, str], None]) -> Any:
    """Return a logger of the module `trt` that calls `receive` with each message's severity and text.

    The severity is the enum's name: "VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR". TensorRT takes one logger
    a process, so the first one made is the one that hears everything.
    """

    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            receive(severity.name, text)

    return Logger()

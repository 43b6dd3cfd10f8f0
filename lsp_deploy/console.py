"""What a person sees while a command runs: lines, warnings and progress bars.

Human text goes to stdout; under `--json` it goes to stderr, so that the JSON object is alone on stdout.
Progress is a bar on a terminal and a plain line elsewhere.
"""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["configure", "print_json", "progress", "say", "show", "warn"]

_human_to_stderr = False


def configure(*, json: bool) -> None:
    """Send human text to stderr when stdout must hold a JSON object alone."""
    global _human_to_stderr
    _human_to_stderr = json


def say(text: str) -> None:
    """Print one line."""
    print(text, file=_stream(), flush=True)


def print_json(value: Any) -> None:
    """Print the one JSON object of a command."""
    print(json_format.dumps(value, indent=1))


def warn(text: str) -> None:
    """Print one warning line to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def show(renderable: RenderableType) -> None:
    """Print a rich renderable (a table, a panel); text that must not be wrapped may pass the right margin."""
    _console().print(renderable, crop=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress over `total` steps; yields a function that advances by n steps."""
    console = _console()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda n: bar.advance(task, n)
        return
    start = time.monotonic()
    yield lambda n: None
    seconds = time.monotonic() - start
    if seconds > 1:
        say(f"{description}: {total} in {seconds:.0f} s")


def _stream() -> TextIO:
    return sys.stderr if _human_to_stderr else sys.stdout


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=_human_to_stderr, highlight=False)

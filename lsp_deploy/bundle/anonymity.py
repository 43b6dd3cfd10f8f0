"""Records of a run without the paths of the machine that it ran on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["PathRemover"]

_NAMES_NO_PATH = frozenset({"--exclude"})
"""Flags whose value may hold slashes and is not a path: layers are named like folders."""


class PathRemover:
    """Shortens every path that a run was given to the name of its file or folder, wherever a text repeats it."""

    def __init__(self, recipe: Mapping[str, Any], command: str, folders: Iterable[Path]) -> None:
        """Take what names paths.

        Args:
            recipe: the run's recipe, as a plan records it.
            command: its command line.
            folders: of this machine, whose names go wherever they stand before a file's.
        """
        named = [value for key, value in recipe.items() if isinstance(value, str) and key != "exclude"]
        named += _arguments(command)
        # Longest first: a path before the folder that it lies in.
        self._paths = sorted({path for path in named if "/" in path and Path(path).name}, key=lambda p: (-len(p), p))
        # A folder of one name is left: /blocks may as well be the beginning of a layer's.
        self._folders = sorted({str(folder) for folder in folders if len(folder.parts) > 2}, key=lambda p: (-len(p), p))

    def __call__(self, value: Any) -> Any:
        """Return a JSON value with every text in it shortened."""
        if isinstance(value, str):
            return self._shortened(value)
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return value

    def _shortened(self, text: str) -> str:
        text = self._without_given_paths(text)
        for folder in self._folders:
            text = text.replace(f"{folder}/", "")
        return self._without_given_paths(text)  # those that were given from a folder that is gone now

    def _without_given_paths(self, text: str) -> str:
        for path in self._paths:
            # Whole paths only: behind one may come the end of a sentence, but no more of a name.
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w/-])", lambda match: Path(match[0]).name, text)
        return text


def _arguments(command: str) -> list[str]:
    """Return the words of a command line, values behind a `=` as words of their own."""
    words: list[str] = []
    for word in shlex.split(command):
        if words and words[-1].replace("_", "-") in _NAMES_NO_PATH:
            continue
        flag, _, value = word.partition("=") if word.startswith("-") else ("", "", word)
        words += [flag, value] if flag and value else [word]
    return words

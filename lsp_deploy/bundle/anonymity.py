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
# Around a path: no more of a name.
_BEGINS, _ENDS = r"(?<![\w./-])", r"(?![\w-])"


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
        beside = [Path(path).parent for path in self._paths if path.startswith("/")]
        # A folder of one name is left: /blocks may as well be the beginning of a layer's.
        known = {str(folder) for folder in [*folders, *beside] if len(folder.parts) > 2}
        self._folders = sorted(known, key=lambda p: (-len(p), p))

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
            text = re.sub(rf"{_BEGINS}{re.escape(folder)}/", "", text)
        return self._without_given_paths(text)  # those that were given from a folder that is gone now

    def _without_given_paths(self, text: str) -> str:
        for path in self._paths:
            text = re.sub(rf"{_BEGINS}{re.escape(path)}{_ENDS}", lambda match: Path(match[0]).name, text)
        return text


def _arguments(command: str) -> list[str]:
    """Return the words of a command line that may be paths: arguments, and values of flags."""
    words, flag = [], ""
    for word in shlex.split(command):
        name, given, value = word.partition("=") if word.startswith("-") else (flag, "=", word)
        if given and name.replace("_", "-") not in _NAMES_NO_PATH:
            words.append(value)
        flag = "" if given else name
    return words

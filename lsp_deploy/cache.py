"""Where results that took long are kept between runs, by the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsp_deploy.errors import UserError

__all__ = ["GRADIENTS", "cache_folder", "content_key", "drop_old_entries"]

GRADIENTS = "gradients"
"""The part of the cache that `sensitivity` and `compress` share."""


def cache_folder() -> Path:
    """Return the folder for cached results: $LSP_DEPLOY_CACHE, else lsp-deploy in $XDG_CACHE_HOME or ~/.cache; made.

    Raises:
        UserError: it cannot be made.
    """
    named = os.environ.get("LSP_DEPLOY_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(named) if named else Path(base) / "lsp-deploy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder}: {error.strerror}; set LSP_DEPLOY_CACHE to another"
        ) from error
    return folder


def content_key(**parts: Any) -> str:
    """Return the hash, in hex, of everything that a result depends on; values are plain JSON."""
    return hashlib.sha256(json.dumps(_sorted(parts), sort_keys=True).encode()).hexdigest()[:32]


def drop_old_entries(folder: Path, used: Path, days: int = 30) -> None:
    """Mark an entry of a cache folder as used now, and remove those that were not used for so many days.

    Args:
        folder: of the entries, each a folder; it may not exist yet.
        used: the entry that is about to be used; it is made if it is not there.
        days: entries are kept that long. Other people's files in the folder are left alone.

    Raises:
        UserError: the entry cannot be made.
    """
    try:
        used.mkdir(parents=True, exist_ok=True)
        os.utime(used)
    except OSError as error:
        raise UserError(f"cannot make the folder {used}: {error.strerror or error}") from error
    oldest = time.time() - days * 86400
    for entry in folder.iterdir():
        if entry.is_dir() and re.fullmatch(r"[0-9a-f]{32}", entry.name) and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _sorted(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value

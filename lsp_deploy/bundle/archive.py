"""A folder as a compressed tar archive: the same content gives the same bytes."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lsp_deploy.errors import UserError
from lsp_deploy.files import atomic_path, sha256_of, write_text

__all__ = ["SUFFIXES", "check_suffix", "write_archive", "write_sums"]

SUFFIXES = (".tar.zst", ".tar.gz", ".tgz")
SUMS = "SHA256SUMS"
_ZSTD_LEVEL, _GZIP_LEVEL = 12, 6


def check_suffix(path: Path) -> None:
    """Refuse a file name that names no format of ours.

    Raises:
        UserError: it ends otherwise than with .tar.zst, .tar.gz or .tgz.
    """
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} names no archive that can be written; let it end with {', '.join(SUFFIXES)}")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of all files in `folder`, as sha256sum writes and checks it."""
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)]
    write_text(folder / SUMS, "".join(lines))


def write_archive(folder: Path, target: Path) -> None:
    """Write all files in `folder` to the archive `target`, atomically; its suffix says how they are compressed.

    Files are sorted, belong to nobody and are of no date. Scripts may be executed.

    Raises:
        UserError: `target` ends with no known suffix, or cannot be written.
    """
    check_suffix(target)
    with (
        atomic_path(target) as temporary,
        temporary.open("wb") as raw,
        _compressed(raw, target) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        for path in _files(folder):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            entry.mode = 0o755 if path.suffix == ".sh" else 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _compressed(raw: BinaryIO, target: Path) -> Iterator[BinaryIO]:
    if target.name.endswith(".zst"):
        import zstandard

        # One thread: with more, their number would show in the bytes.
        with zstandard.ZstdCompressor(level=_ZSTD_LEVEL).stream_writer(raw, closefd=False) as stream:
            yield cast(BinaryIO, stream)
    else:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=raw, mtime=0) as zipped:
            yield cast(BinaryIO, zipped)

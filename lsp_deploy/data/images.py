"""Folders and tar archives of images: what they hold, and the bytes of one image at a time."""

from __future__ import annotations

import os
import tarfile
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from lsp_deploy.data.decode import SUFFIXES, UndecodableImageError
from lsp_deploy.errors import UserError

__all__ = ["TAR_SUFFIXES", "ImageFolder", "ImageSource", "ImageTar", "ReadImage"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

# No image that a vision transformer is fed with is larger than this, encoded.
_LARGEST_FILE = 256 * 2**20

ReadImage = Callable[[str], bytes]


class ImageSource(Protocol):
    """A collection of encoded images."""

    names: tuple[str, ...]
    """Paths inside the collection, `/` between parts, sorted."""

    def reader(self, chosen: Collection[str]) -> ReadImage:
        """Return what reads one of the `chosen` images by name, from any thread.

        It raises UndecodableImageError for an image too large to be one, UserError for one that cannot be read.
        """


class ImageFolder:
    """The images below a folder. Links are followed, since many build subsets of them; each folder is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.names = tuple(sorted(_walk(path)))

    def reader(self, chosen: Collection[str]) -> ReadImage:
        """Return what reads an image's file."""
        return self._read

    def _read(self, name: str) -> bytes:
        try:
            with (self._path / name).open("rb") as stream:
                _check_size(os.fstat(stream.fileno()).st_size)
                return stream.read()
        except OSError as error:
            raise UserError(f"cannot read image {self._path / name}: {error.strerror}") from error


class ImageTar:
    """The images in a tar archive, plain or compressed by gzip. No member is ever written under its own name."""

    def __init__(self, path: Path) -> None:
        """List the members.

        Raises:
            UserError: not a tar archive, or a damaged one.
        """
        self._path = path
        # Where a name occurs twice the later member is the valid one, as for tar itself.
        self._extents: dict[str, _Extent] = {}
        with _opened(path) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse() and _is_image(name):
                    self._extents[name] = (member.offset_data, member.size)
        self.names = tuple(sorted(self._extents))

    def reader(self, chosen: Collection[str]) -> ReadImage:
        """Return what reads a member; those of a compressed archive are unpacked into one unnamed temporary file."""
        extents = {name: self._extents[name] for name in chosen}
        with _opened(self._path) as archive:
            if not _is_gzip(self._path):
                return _reader_at(self._path.open("rb"), extents)
            return _unpacked(archive, extents)


_Extent = tuple[int, int]  # offset and size of a member's content in the uncompressed archive, in bytes


def _unpacked(archive: tarfile.TarFile, extents: Mapping[str, _Extent]) -> ReadImage:
    wanted = {extent: name for name, extent in extents.items() if extent[1] <= _LARGEST_FILE}
    placed = dict(extents)
    stream = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the reader)
    for member in archive:
        name = wanted.get((member.offset_data, member.size))
        content = archive.extractfile(member) if name is not None else None
        if name is not None and content is not None:
            placed[name] = (stream.tell(), member.size)
            stream.write(content.read())
    return _reader_at(stream, placed)


def _reader_at(stream: IO[bytes], extents: Mapping[str, _Extent]) -> ReadImage:
    lock = threading.Lock()

    def read(name: str) -> bytes:
        offset, size = extents[name]
        _check_size(size)
        with lock:
            stream.seek(offset)
            return stream.read(size)

    weakref.finalize(read, stream.close)
    return read


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:gz" if _is_gzip(path) else "r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} as a tar archive: {reason}") from error


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _walk(folder: Path) -> Iterator[str]:
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above would go round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(here, name)
            if _is_image(name) and path.is_file():
                yield path.relative_to(folder).as_posix()


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read folder {error.filename}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    # Hidden files are what other systems leave beside images (`._photo.jpg`).
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _check_size(size: int) -> None:
    if size > _LARGEST_FILE:
        raise UndecodableImageError(f"{size / 2**20:.0f} MB encoded, more than {_LARGEST_FILE // 2**20} MB")

"""Arrays in .npz and .npy files, fed to the model as they are."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.data.image_input import is_float
from lsp_deploy.errors import UserError

__all__ = ["ARRAY_SUFFIXES", "ArrayReader", "load_arrays"]

ARRAY_SUFFIXES = (".npz", ".npy")

_CHUNK = 64  # samples that are converted and checked at once


class ArrayReader:
    """Feeds arrays, one an input, whose rows are the samples."""

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, NDArray[Any]],
        dtypes: Mapping[str, np.dtype[Any]],
        rows: NDArray[np.int64],
    ) -> None:
        """Take arrays by input name and the dtypes of the inputs, and read the `rows` that will be used once.

        Raises:
            UserError: NaN or infinity, or whole numbers that the input's dtype cannot hold; names the first sample.
        """
        self._path = path
        self._arrays = arrays
        self._dtypes = {name: np.dtype(dtypes.get(name, np.dtype(np.float32))) for name in arrays}
        self.identity = self._check(rows)

    def read(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the inputs for `rows`, each [len(rows), ...], in the dtype that the model takes."""
        with np.errstate(over="ignore", invalid="ignore"):
            return {
                name: np.ascontiguousarray(array[rows]).astype(self._dtypes[name], copy=False)
                for name, array in self._arrays.items()
            }

    def _check(self, rows: NDArray[np.int64]) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            for name, values in self.read(chunk).items():
                self._check_values(name, values, chunk)
                digest.update(f"{name} {values.dtype.name} {values.shape}".encode())
                digest.update(values.tobytes())
        return digest.hexdigest()

    def _check_values(self, name: str, values: NDArray[Any], rows: NDArray[np.int64]) -> None:
        given = self._arrays[name]
        if is_float(values.dtype):
            good = np.isfinite(values)
            what = f"NaN or infinity (in {values.dtype.name}, which the model takes)"
        else:
            good = values == given[rows]
            what = f"a value that {values.dtype.name}, which the model takes, cannot hold"
        bad = np.flatnonzero(~good.reshape(len(rows), -1).all(axis=1))
        if len(bad):
            raise UserError(f"{self._path}: input {name} holds {what}; first in sample {rows[bad[0]]}")


def load_arrays(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]], label_key: str
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]:
    """Load the arrays of a .npz (keys are input names) or .npy (for a model with one input), and labels if there.

    With one input, a single array may go by any name. A .npy stays on disk until its rows are read. Files are never
    unpickled.

    Args:
        path: the file.
        shapes: what each input of the model takes; dimension 0 is the batch.
        dtypes: what each input takes.
        label_key: key of the class indices in a .npz, [samples] whole numbers.

    Returns:
        Arrays by input name, and labels or None.

    Raises:
        UserError: not such a file, inputs missing, shapes or dtypes that do not fit, or no samples.
    """
    named = _load(path)
    labels = None if label_key in shapes else named.pop(label_key, None)
    if len(shapes) == 1 and len(named) == 1:
        named = dict(zip(shapes, named.values(), strict=True))
    missing = [name for name in shapes if name not in named]
    if missing:
        raise UserError(
            f"{path} holds {', '.join(named) or 'no arrays'}, not {', '.join(missing)}; "
            f"the model needs an .npz with the keys {', '.join(shapes)}"
        )
    arrays = {name: _read_array(path, named[name]) for name in shapes}
    for name, array in arrays.items():
        _check_fits(path, name, array, shapes[name], np.dtype(dtypes.get(name, np.dtype(np.float32))))
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"{path}: inputs have different numbers of samples: {listed}")
    samples = next(iter(counts.values()))
    if samples == 0:
        raise UserError(f"{path} holds no samples")
    return arrays, None if labels is None else _labels(path, label_key, _read_array(path, labels), samples)


def _load(path: Path) -> dict[str, Callable[[], NDArray[Any]]]:
    """Return what reads each array of the file, by its key; a .npy has one."""
    with _as_user_error(path):
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {"one array": lambda: loaded}
    with loaded as archive:
        return {key: partial(_read_key, path, key) for key in archive.files}


def _read_key(path: Path, key: str) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive[key])


def _read_array(path: Path, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    with _as_user_error(path):
        return read()


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{path} holds more than fits in memory; split it, or save the input as .npy") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        # numpy takes any content that it does not know for a pickle.
        if any(word in str(error) for word in ("pickle", "Object arrays", "Python objects")):
            raise UserError(
                f"{path} is no array file, or holds pickled objects, which could run code and are refused; "
                "save plain arrays of numbers with numpy.save or numpy.savez"
            ) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read arrays from {path}: {reason}") from error


def _check_fits(path: Path, name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if array.ndim != len(shape) or array.ndim == 0 or array.shape[1:] != tuple(shape[1:]):
        takes = ", ".join(["batch", *map(str, shape[1:])])
        raise UserError(f"{path}: {name} is {list(array.shape)}, and the model takes [{takes}]")
    kinds = "fiub" if is_float(dtype) else "b" if dtype.kind == "b" else "iub"
    if array.dtype.kind not in kinds:
        raise UserError(f"{path}: {name} is {array.dtype.name}, and the model takes {dtype.name}")


def _labels(path: Path, key: str, values: NDArray[Any], samples: int) -> NDArray[np.int64]:
    if values.ndim != 1 or values.dtype.kind not in "iu" or (len(values) and values.min() < 0):
        raise UserError(
            f"{path}: {key} is {values.dtype.name} {list(values.shape)}; labels are class indices, [samples] whole "
            "numbers of 0 or more"
        )
    if len(values) != samples:
        raise UserError(f"{path}: {key} has {len(values)} entries, and the inputs {samples} samples; give one for each")
    return values.astype(np.int64)

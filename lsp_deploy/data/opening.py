"""Data by the name that a user gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.data.dataset import Dataset
from lsp_deploy.data.image_input import image_input
from lsp_deploy.data.labels import labels_from_folders, read_labels
from lsp_deploy.data.preprocess import Preprocess
from lsp_deploy.data.splits import choose
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    from lsp_deploy.data.images import ImageSource

__all__ = ["open_dataset"]

_GENERATED_SAMPLES = 64
_UNDECODABLE_SHARE = 0.05


def open_dataset(
    source: str | Path,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    preprocess: Preprocess | None,
    labels: Path | None = None,
    label_column: str | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open calibration or evaluation data for a model.

    Args:
        source: a folder, .tar, .tar.gz or .tgz of images; a .npz (keys are input names) or .npy; or `synthetic` or
            `random`, which make data up.
        shapes: concrete shape of each input of the model; dimension 0 is the batch and of no account here.
        dtypes: numpy dtype of each input; float32 where it is not said.
        preprocess: how images are prepared (its size gives way to the input's); None for the `imagenet` preset.
            Arrays are fed as they are.
        labels: CSV of class indices. Without it class folders label images, and a key of the .npz labels arrays.
        label_column: column of the CSV, or key of the .npz, that holds the class indices.
        samples: how many to use, spread over the classes; None for all (64 of made-up data).
        seed: of the choice of samples and of made-up data.

    Returns:
        The dataset; the same arguments and the same data give the same one. Images that do not decode are left out.

    Raises:
        UserError: data that is not there, cannot be read or does not fit the model; labels that do not fit the data;
            more than 5 % of the images that do not decode.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--samples must be at least 1; got {samples}")
    asked = _Asked(shapes, dtypes, labels, label_column, samples, seed)
    if source in ("synthetic", "random"):
        return _open_generated(cast("Literal['synthetic', 'random']", source), asked)
    path = Path(source)
    if _holds_arrays(path):
        return _open_arrays(path, asked)
    return _open_images(path, preprocess or Preprocess(), asked)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `open_dataset` that every kind of data looks at."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    labels: Path | None
    label_column: str | None
    samples: int | None
    seed: int


def _holds_arrays(path: Path) -> bool:
    """Return whether `path` holds arrays; if not, it holds images."""
    from lsp_deploy.data.arrays import ARRAY_SUFFIXES
    from lsp_deploy.data.images import TAR_SUFFIXES

    if path.is_dir():
        return False
    if not path.exists():
        raise UserError(f"there is no data at {path}; name a folder or file, or synthetic or random")
    name = path.name.lower()
    if not path.is_file() or not name.endswith((*TAR_SUFFIXES, *ARRAY_SUFFIXES)):
        forms = ", ".join((*TAR_SUFFIXES, *ARRAY_SUFFIXES))
        raise UserError(f"{path} is not data that can be read: give a folder of images, or {forms}")
    return name.endswith(ARRAY_SUFFIXES)


def _open_images(path: Path, preprocess: Preprocess, asked: _Asked) -> Dataset:
    from lsp_deploy.data.image_reader import ImageReader
    from lsp_deploy.data.images import ImageFolder, ImageTar

    target = image_input(asked.shapes, asked.dtypes)
    source: ImageSource = ImageFolder(path) if path.is_dir() else ImageTar(path)
    if not source.names:
        raise UserError(f"{path} holds no images (.jpg, .png, .webp, .bmp, .tif, .gif, .ppm)")
    class_of, class_names = _image_labels(source.names, asked)
    groups = np.zeros(len(source.names), np.int64) if class_of is None else class_of
    chosen = choose(groups, asked.samples, asked.seed)
    names = [source.names[index] for index in chosen]
    settings = preprocess.model_copy(update={"size": target.size})
    reader = ImageReader(names, source.reader(names), target, settings)
    _report_undecodable(path, names, reader.undecodable)
    rows = np.array([row for row in range(len(names)) if row not in reader.undecodable], np.int64)
    return Dataset(
        name=path.resolve().name,
        kind="images",
        reader=reader,
        rows=rows,
        sample_names=tuple(_printable(names[row]) for row in rows),
        labels=None if class_of is None else class_of[chosen][rows],
        class_names=class_names,
        skipped=len(reader.undecodable),
    )


def _image_labels(names: Sequence[str], asked: _Asked) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    if asked.labels is not None:
        return read_labels(asked.labels, asked.label_column).of_images(names), None
    return labels_from_folders(names) or (None, None)


def _report_undecodable(path: Path, names: Sequence[str], undecodable: Mapping[int, str]) -> None:
    if not undecodable:
        return
    first = min(undecodable)
    words = f"{len(undecodable)} of {len(names)} images in {path} do not decode"
    example = f"first {_printable(names[first])}: {undecodable[first]}"
    if len(undecodable) > _UNDECODABLE_SHARE * len(names):
        raise UserError(f"{words} ({example}); more than {_UNDECODABLE_SHARE:.0%} is too many to go on: replace them")
    console.warn(f"{words} and are skipped ({example})")


def _open_arrays(path: Path, asked: _Asked) -> Dataset:
    from lsp_deploy.data.arrays import ArrayReader, load_arrays

    label_key = (asked.label_column if asked.labels is None else None) or "labels"
    arrays, class_of = load_arrays(path, asked.shapes, asked.dtypes, label_key)
    total = len(next(iter(arrays.values())))
    if asked.labels is not None:
        class_of = read_labels(asked.labels, asked.label_column).of_rows(total)
    if class_of is None and asked.label_column is not None:
        raise UserError(f"{path} has no labels under the key {asked.label_column}")
    rows = choose(np.zeros(total, np.int64) if class_of is None else class_of, asked.samples, asked.seed)
    return Dataset(
        name=path.name,
        kind="arrays",
        reader=ArrayReader(path, arrays, asked.dtypes, rows),
        rows=rows,
        sample_names=tuple(map(str, rows.tolist())),
        labels=None if class_of is None else class_of[rows],
    )


def _open_generated(kind: Literal["synthetic", "random"], asked: _Asked) -> Dataset:
    from lsp_deploy.data.synthetic import SyntheticReader

    if asked.labels is not None:
        raise UserError(f"--labels needs real data: {kind} data has no labels; name images or arrays")
    rows = np.arange(asked.samples or _GENERATED_SAMPLES, dtype=np.int64)
    reader = SyntheticReader(kind, asked.shapes, asked.dtypes, asked.seed)
    return Dataset(kind, kind, reader, rows, tuple(map(str, rows.tolist())))


def _printable(name: str) -> str:
    """Return `name` without the bytes that no text can hold (file names need not be UTF-8)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

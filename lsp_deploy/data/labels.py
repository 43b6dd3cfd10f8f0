"""Class indices of samples: from a CSV file, or from the folders that images lie in."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.errors import UserError

__all__ = ["DEFAULT_COLUMN", "LabelFile", "labels_from_folders", "read_labels"]

DEFAULT_COLUMN = "class_index"

# Folders by these names divide a data set into parts, not into classes.
_PARTS = {"calib", "calibration", "eval", "evaluation", "test", "train", "training", "val", "valid", "validation"}


@dataclass(frozen=True)
class LabelFile:
    """The rows of a label file."""

    path: Path
    filenames: tuple[str, ...] | None
    """[rows]; None where the file has no `filename` column."""
    labels: NDArray[np.int64]
    """[rows]"""

    def of_images(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the label of every image: found by its path, else by its file name where nothing else shares that.

        Raises:
            UserError: no `filename` column, two labels for one path, or images without a label.
        """
        by_path = self._by_path()
        rows_named = Counter(map(_file_name, by_path))
        by_file_name = {_file_name(path): label for path, label in by_path.items()}
        images_named = Counter(map(_file_name, names))
        found: list[int | None] = []
        for name in names:
            file_name = _file_name(name)
            alone = rows_named[file_name] == 1 and images_named[file_name] == 1
            found.append(by_path.get(name, by_file_name[file_name] if alone else None))
        missing = [name for name, label in zip(names, found, strict=True) if label is None]
        if missing:
            shared = rows_named[_file_name(missing[0])] > 0
            why = "several share this file name: give paths in the filename column" if shared else "add a row for each"
            raise UserError(
                f"{self.path}: no label for image {missing[0]} ({len(missing)} of {len(names)} have none); {why}"
            )
        return np.array(found, np.int64)

    def of_rows(self, samples: int) -> NDArray[np.int64]:
        """Return the labels in order, for arrays of as many samples.

        Raises:
            UserError: another number of rows.
        """
        if len(self.labels) != samples:
            raise UserError(
                f"{self.path} has {len(self.labels)} rows, and the arrays {samples} samples; give one for each"
            )
        return self.labels

    def _by_path(self) -> dict[str, int]:
        if self.filenames is None:
            raise UserError(f"{self.path} has no column filename, which says whose label a row is; add it")
        result: dict[str, int] = {}
        for name, label in zip(self.filenames, self.labels.tolist(), strict=True):
            path = name.replace("\\", "/").removeprefix("./")
            if result.setdefault(path, label) != label:
                raise UserError(f"{self.path} gives {name} two labels, {result[path]} and {label}; leave one")
        return result


def read_labels(path: Path, column: str | None = None) -> LabelFile:
    """Read a CSV file whose first line names its columns: `filename,class_index`, any others are ignored.

    Args:
        path: UTF-8, with or without a byte order mark.
        column: holds the class indices; None for `class_index`.

    Raises:
        UserError: unreadable, no such column, no rows, or a label that is not a whole number of 0 or more.
    """
    wanted = column or DEFAULT_COLUMN
    rows = _rows(path)
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    if wanted not in header:
        raise UserError(
            f"{path} has no column {wanted}; its first line, {','.join(header)[:100]!r}, must name them, "
            f"as filename,{DEFAULT_COLUMN} (--label-column names another)"
        )
    if len(rows) == 1:
        raise UserError(f"{path} has no rows below its header")
    label_at = header.index(wanted)
    labels = np.array([_label(path, line, row, label_at) for line, row in rows[1:]], np.int64)
    name_at = header.index("filename") if "filename" in header else None
    if name_at is None:
        return LabelFile(path, None, labels)
    return LabelFile(path, tuple(row[name_at].strip() if name_at < len(row) else "" for _, row in rows[1:]), labels)


def labels_from_folders(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
    """Label images by the folder they lie in: sorted folder names are classes 0, 1, ...

    A class folder is the first one below what all paths share. One folder alone, images beside the folders, and
    folders that name the parts of a data set (train, val) give no labels.

    Returns:
        Labels [images] and the sorted class names, or None.
    """
    parts = [PurePosixPath(name).parts for name in names]
    depth = 0
    while parts and all(len(path) > depth + 1 and path[depth] == parts[0][depth] for path in parts):
        depth += 1
    if not all(len(path) > depth + 1 for path in parts):
        return None
    folders = [path[depth] for path in parts]
    classes = sorted(set(folders))
    if not classes or all(name.lower() in _PARTS for name in classes):
        return None
    index = {name: place for place, name in enumerate(classes)}
    return np.array([index[name] for name in folders], np.int64), tuple(classes)


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of every row that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UserError(f"cannot read labels {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"labels {path} are not a CSV file in UTF-8: {error}") from error


def _label(path: Path, line: int, row: Sequence[str], column: int) -> int:
    text = row[column].strip() if column < len(row) else ""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{path}, line {line}: a label is a class index, a whole number of 0 or more; got {text!r}")
    return int(text)


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]

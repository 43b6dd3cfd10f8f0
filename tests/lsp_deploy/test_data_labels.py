"""Labels from CSV files and from class folders."""

from __future__ import annotations

import numpy as np
import pytest
from image_files import ARGUMENTS, numbered, png, write_folder, write_tar

from lsp_deploy.data import open_dataset
from lsp_deploy.data.labels import labels_from_folders, read_labels
from lsp_deploy.errors import UserError


def csv(tmp_path, text, name="labels.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_labels_follow_names_not_rows(tmp_path):
    folder = write_folder(tmp_path / "images", numbered(3))
    labels = csv(tmp_path, "filename,class_index\n002.png,5\nabsent.png,9\n000.png,7\n001.png,6\n")
    assert open_dataset(folder, **ARGUMENTS, labels=labels).labels.tolist() == [7, 6, 5]


def test_label_column_extra_columns_quotes_and_byte_order_mark(tmp_path):
    labels = csv(tmp_path, '\ufefffilename,words,class_index,other\n"a,b.png","fish, gold",1,4\n\nc.png,x,2,5\n')
    table = read_labels(labels, "other")
    assert table.filenames == ("a,b.png", "c.png")
    assert table.labels.tolist() == [4, 5]
    assert read_labels(labels).labels.tolist() == [1, 2]
    assert table.labels.dtype == np.int64


def test_path_wins_over_file_name(tmp_path):
    table = read_labels(csv(tmp_path, "filename,class_index\na/x.png,1\nb/x.png,2\nc/y.png,3\n./d/z.png,4\n"))
    assert table.of_images(["a/x.png", "b/x.png", "deep/y.png", "d/z.png"]).tolist() == [1, 2, 3, 4]


def test_windows_separators(tmp_path):
    assert read_labels(csv(tmp_path, "filename,class_index\na\\x.png,1\n")).of_images(["a/x.png"]).tolist() == [1]


def test_file_name_that_several_share_labels_none_of_them(tmp_path):
    by_name = read_labels(csv(tmp_path, "filename,class_index\nx.png,1\n"))
    with pytest.raises(UserError, match=r"no label for image a/x\.png \(2 of 2 have none\).*give paths"):
        by_name.of_images(["a/x.png", "b/x.png"])
    by_path = read_labels(csv(tmp_path, "filename,class_index\na/x.png,1\nb/x.png,2\n"))
    with pytest.raises(UserError, match=r"no label for image x\.png"):
        by_path.of_images(["x.png"])


def test_image_without_a_label_is_named_and_counted(tmp_path):
    source = write_tar(tmp_path / "images.tar", numbered(4))
    labels = csv(tmp_path, "filename,class_index\n000.png,1\n003.png,1\n")
    with pytest.raises(UserError, match=r"no label for image 001\.png \(2 of 4 have none\)"):
        open_dataset(source, **ARGUMENTS, labels=labels, samples=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,class_index\na.png,3.5\n", r"line 2: a label is a class index.*'3\.5'"),
        ("filename,class_index\na.png,3\nb.png,-1\n", "line 3: .*'-1'"),
        ("filename,class_index\na.png,cat\n", "'cat'"),
        ("filename,class_index\na.png,\n", "''"),
        ("filename,class_index\na.png\n", "''"),
        ("filename,class_index\na.png,99999999999999999999\n", "whole number"),
        ("a.png,3\nb.png,4\n", "has no column class_index; its first line, 'a.png,3'"),
        ("filename,class_index\n", "no rows"),
        ("", "no column class_index"),
        (b"filename,class_index\n\xff\xfe.png,1\n", "CSV file in UTF-8"),
        ("filename,class_index\n" + "x" * 200_000 + ",1\n", "CSV file in UTF-8"),
    ],
)
def test_files_that_hold_no_labels(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_labels(csv(tmp_path, text))


def test_other_unusable_files(tmp_path):
    with pytest.raises(UserError, match="cannot read labels"):
        read_labels(tmp_path / "gone.csv")
    with pytest.raises(UserError, match="cannot read labels"):
        read_labels(tmp_path)
    with pytest.raises(UserError, match="no column model_index"):
        read_labels(csv(tmp_path, "filename,class_index\na.png,1\n"), "model_index")
    with pytest.raises(UserError, match="no column filename"):
        read_labels(csv(tmp_path, "class_index\n1\n")).of_images(["a.png"])
    with pytest.raises(UserError, match=r"gives a\.png two labels, 1 and 2"):
        read_labels(csv(tmp_path, "filename,class_index\na.png,1\na.png,2\n")).of_images(["a.png"])


def test_rows_are_samples_for_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", pixels=np.zeros((3, 3, 16, 16), np.float32), labels=np.array([9, 9, 9]))
    labels = csv(tmp_path, "class_index\n4\n5\n6\n")
    dataset = open_dataset(tmp_path / "x.npz", **ARGUMENTS, labels=labels)
    assert dataset.labels.tolist() == [4, 5, 6]
    short = csv(tmp_path, "class_index\n4\n5\n")
    with pytest.raises(UserError, match="2 rows, and the arrays 3 samples"):
        open_dataset(tmp_path / "x.npz", **ARGUMENTS, labels=short)


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["cat/1.png", "dog/1.png", "cat/2.png"], [0, 1, 0], ("cat", "dog")),
        (["images/train/b/1.png", "images/train/a/deep/2.png"], [1, 0], ("a", "b")),
        (["./a/1.png", "./b/2.png"], [0, 1], ("a", "b")),
    ],
)
def test_class_folders_give_labels(names, labels, classes):
    found, class_names = labels_from_folders(names)
    assert found.tolist() == labels
    assert class_names == classes


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png"],
        ["a/1.png", "2.png"],
        ["val/1.png", "val/2.png"],
        ["train/a/1.png", "val/b/1.png"],
        ["only/1.png"],
    ],
)
def test_other_folders_give_none(names):
    assert labels_from_folders(names) is None


def test_a_labels_file_wins_over_class_folders(tmp_path):
    folder = write_folder(tmp_path / "images", {"a/1.png": png(1), "b/2.png": png(2)})
    assert open_dataset(folder, **ARGUMENTS).labels.tolist() == [0, 1]
    labels = csv(tmp_path, "filename,class_index\n1.png,8\n2.png,7\n")
    dataset = open_dataset(folder, **ARGUMENTS, labels=labels)
    assert dataset.labels.tolist() == [8, 7]
    assert dataset.class_names is None
    assert dataset.without_labels().labels is None

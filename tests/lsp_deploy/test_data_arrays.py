"""Arrays in .npz and .npy files."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
from image_files import ARGUMENTS

from lsp_deploy.data import open_dataset
from lsp_deploy.errors import UserError

TWO_INPUTS = {
    "shapes": {"pixels": (1, 3, 4, 4), "ids": (1, 5)},
    "dtypes": {"pixels": np.dtype("f2"), "ids": np.dtype("i4")},
    "preprocess": None,
}


@pytest.fixture
def pixels():
    return np.random.default_rng(0).standard_normal((10, 3, 16, 16)).astype(np.float32)


def test_npz_keyed_by_input(tmp_path, pixels):
    np.savez(tmp_path / "x.npz", other=np.zeros(3), pixels=pixels)
    dataset = open_dataset(tmp_path / "x.npz", **ARGUMENTS)
    assert (dataset.kind, dataset.name, len(dataset)) == ("arrays", "x.npz", 10)
    assert np.array_equal(dataset.feeds([3, 1])["pixels"], pixels[[3, 1]])
    assert np.array_equal(np.concatenate([batch["pixels"] for batch in dataset.batches(4)]), pixels)
    assert dataset.labels is None


@pytest.mark.parametrize("compressed", [False, True])
def test_one_array_by_any_name_with_labels(tmp_path, pixels, compressed):
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "x.npz", images=pixels, labels=np.arange(10, dtype=np.uint8))
    dataset = open_dataset(tmp_path / "x.npz", **ARGUMENTS)
    assert np.array_equal(dataset.feeds(range(10))["pixels"], pixels)
    assert dataset.labels.tolist() == list(range(10))
    assert dataset.labels.dtype == np.int64


def test_labels_under_another_key(tmp_path, pixels):
    np.savez(tmp_path / "x.npz", images=pixels, wanted=np.arange(10)[::-1])
    dataset = open_dataset(tmp_path / "x.npz", **ARGUMENTS, label_column="wanted")
    assert dataset.labels.tolist() == list(range(10))[::-1]
    with pytest.raises(UserError, match="no labels under the key absent"):
        np.savez(tmp_path / "y.npz", images=pixels)
        open_dataset(tmp_path / "y.npz", **ARGUMENTS, label_column="absent")


def test_npy(tmp_path, pixels):
    np.save(tmp_path / "x.npy", pixels.astype(np.float64))
    dataset = open_dataset(str(tmp_path / "x.npy"), **ARGUMENTS)
    feeds = dataset.feeds([9])["pixels"]
    assert feeds.dtype == np.float32
    assert np.array_equal(feeds, pixels[9:])


def test_several_inputs_are_cast_to_what_the_model_takes(tmp_path):
    np.savez(tmp_path / "x.npz", pixels=np.full((2, 3, 4, 4), 200, np.uint8), ids=np.arange(10).reshape(2, 5))
    feeds = open_dataset(tmp_path / "x.npz", **TWO_INPUTS).feeds([0, 1])
    assert (feeds["pixels"].dtype, feeds["ids"].dtype) == (np.float16, np.int32)
    assert feeds["pixels"].max() == 200
    assert feeds["ids"].ravel().tolist() == list(range(10))


def test_bfloat16_input(tmp_path, pixels):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    np.save(tmp_path / "x.npy", pixels)
    arguments = ARGUMENTS | {"dtypes": {"pixels": np.dtype(bfloat16)}}
    assert open_dataset(tmp_path / "x.npy", **arguments).feeds([0])["pixels"].dtype == bfloat16
    pixels[4] = np.inf
    np.save(tmp_path / "x.npy", pixels)
    with pytest.raises(UserError, match="first in sample 4"):
        open_dataset(tmp_path / "x.npy", **arguments)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((2, 3, 4, 4))}, "holds pixels, not ids; .*keys pixels, ids"),
        (
            {"pixels": np.zeros((2, 3, 4, 5)), "ids": np.ones((2, 5), int)},
            r"pixels is \[2, 3, 4, 5\].*\[batch, 3, 4, 4\]",
        ),
        ({"pixels": np.zeros((3, 4, 4)), "ids": np.ones((2, 5), int)}, r"pixels is \[3, 4, 4\]"),
        ({"pixels": np.float32(1), "ids": np.ones((2, 5), int)}, r"pixels is \[\]"),
        ({"pixels": np.zeros((2, 3, 4, 4)), "ids": np.ones((3, 5), int)}, "numbers of samples: pixels 2, ids 3"),
        ({"pixels": np.zeros((0, 3, 4, 4)), "ids": np.ones((0, 5), int)}, "no samples"),
        ({"pixels": np.zeros((2, 3, 4, 4)), "ids": np.ones((2, 5))}, "ids is float64, and the model takes int32"),
        ({"pixels": np.zeros((2, 3, 4, 4), complex), "ids": np.ones((2, 5), int)}, "pixels is complex128"),
        ({"pixels": np.zeros((2, 3, 4, 4)), "ids": np.full((2, 5), 2**40)}, "ids holds a value that int32"),
        (
            {"pixels": np.full((2, 3, 4, 4), 1e6), "ids": np.ones((2, 5), int)},
            "pixels holds NaN or infinity .in float16",
        ),
        ({"pixels": np.zeros((2, 3, 4, 4)), "ids": np.ones((2, 5), int), "labels": np.eye(2)}, "labels is float64"),
        ({"pixels": np.zeros((2, 3, 4, 4)), "ids": np.ones((2, 5), int), "labels": np.ones(3, int)}, "labels has 3"),
        ({"pixels": np.zeros((2, 3, 4, 4)), "ids": np.ones((2, 5), int), "labels": -np.ones(2, int)}, "0 or more"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / "x.npz", **TWO_INPUTS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_sample_that_is_not_finite_is_named(tmp_path, pixels, bad):
    many = np.tile(pixels, (10, 1, 1, 1))
    many[77, 1, 2, 3] = many[90, 0, 0, 0] = bad
    np.save(tmp_path / "x.npy", many)
    with pytest.raises(UserError, match=r"input pixels holds NaN or infinity .*first in sample 77"):
        open_dataset(tmp_path / "x.npy", **ARGUMENTS)


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize("kind", ["npy", "npz", "plain pickle"])
def test_pickles_are_refused_and_never_run(tmp_path, kind):
    path = tmp_path / ("x.npz" if kind == "npz" else "x.npy")
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(Exploit()))
    elif kind == "npz":
        np.savez(path, pixels=np.array([Exploit()], object))
    else:
        np.save(path, np.array([Exploit()], object))
    with pytest.raises(UserError, match="pickled objects, which could run code"):
        open_dataset(path, **ARGUMENTS)


def test_pickled_labels_are_refused(tmp_path, pixels):
    np.savez(tmp_path / "x.npz", pixels=pixels, labels=np.array([Exploit()] * 10, object))
    with pytest.raises(UserError, match="pickled objects"):
        open_dataset(tmp_path / "x.npz", **ARGUMENTS)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "zip of text"])
def test_damaged_files(tmp_path, pixels, name, damage):
    path = tmp_path / name
    (np.save if name == "x.npy" else np.savez)(path, pixels)
    if damage == "zip of text":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("pixels.txt", "hello")
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"filename,label\n", "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UserError, match=r"x\.np") as caught:
        open_dataset(path, **ARGUMENTS)
    assert "\n" not in str(caught.value)


def test_header_that_claims_more_than_memory(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 3, 16, 16), }"
    header += b" " * (117 - len(header)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100)
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("pixels.npy", content)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(UserError, match=r"x\.np"):
            open_dataset(tmp_path / name, **ARGUMENTS)


def test_samples_are_spread_over_labels_and_deterministic(tmp_path, pixels):
    many = np.tile(pixels, (10, 1, 1, 1))
    np.savez(tmp_path / "x.npz", pixels=many, labels=np.arange(100) % 10)
    first = open_dataset(tmp_path / "x.npz", **ARGUMENTS, samples=20, seed=1)
    again = open_dataset(tmp_path / "x.npz", **ARGUMENTS, samples=20, seed=1)
    other = open_dataset(tmp_path / "x.npz", **ARGUMENTS, samples=20, seed=2)
    assert np.bincount(first.labels).tolist() == [2] * 10
    assert first.sample_names == again.sample_names != other.sample_names
    assert first.identity == again.identity != other.identity
    rows = [int(name) for name in first.sample_names]
    assert np.array_equal(first.feeds(range(20))["pixels"], many[rows])


def test_samples_that_are_not_used_may_hold_anything(tmp_path, pixels):
    used = [int(name) for name in _names(tmp_path, pixels)]
    pixels[next(row for row in range(10) if row not in used)] = np.nan
    assert [int(name) for name in _names(tmp_path, pixels)] == used


def _names(folder, pixels):
    np.save(folder / "x.npy", pixels)
    return open_dataset(folder / "x.npy", **ARGUMENTS, samples=4).sample_names

"""Made-up data: natural-statistics noise and plain noise."""

from __future__ import annotations

import numpy as np
import pytest
from image_files import ARGUMENTS

from lsp_deploy.data import open_dataset
from lsp_deploy.errors import UserError


def made_up(kind, shapes, dtypes=None, **options):
    return open_dataset(kind, shapes=shapes, dtypes=dtypes or {}, preprocess=None, **options)


def test_amplitude_falls_with_one_over_frequency():
    size = 128
    images = made_up("synthetic", {"x": (1, 3, size, size)}, samples=12).feeds(range(12))["x"]
    spectrum = np.abs(np.fft.fft2(images)).mean(axis=(0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    band = (frequency > 0.02) & (frequency < 0.45)
    slope = np.polyfit(np.log(frequency[band]), np.log(spectrum[band]), 1)[0]
    assert -1.05 < slope < -0.95


@pytest.mark.parametrize("shape", [(8, 3, 32, 48), (8, 32, 48, 3), (1, 1, 28, 28), (1, 12, 32, 33)])
def test_channels_have_mean_0_and_std_1(shape):
    dataset = made_up("synthetic", {"x": shape})
    assert (dataset.kind, len(dataset), dataset.labels) == ("synthetic", 64, None)
    images = dataset.feeds(range(5))["x"]
    assert images.shape == (5, *shape[1:])
    assert images.dtype == np.float32
    pixels = (1, 2) if shape[3] == 3 else (2, 3)
    np.testing.assert_allclose(images.mean(axis=pixels), 0, atol=1e-5)
    np.testing.assert_allclose(images.std(axis=pixels), 1, atol=1e-5)


def test_colours_rise_and_fall_together():
    image = made_up("synthetic", {"x": (1, 3, 64, 64)}).feeds([0])["x"][0].reshape(3, -1)
    assert np.corrcoef(image)[0, 1] > 0.6


@pytest.mark.parametrize("kind", ["synthetic", "random"])
def test_same_seed_same_bytes_whatever_the_batches(kind):
    shapes = {"x": (1, 3, 16, 16), "y": (1, 7)}
    first, again, other = (made_up(kind, shapes, samples=6, seed=seed) for seed in (1, 1, 2))
    whole = first.feeds(range(6))
    pieces = list(again.batches(4))
    for name in shapes:
        assert np.concatenate([piece[name] for piece in pieces]).tobytes() == whole[name].tobytes()
        assert not np.array_equal(whole[name][0], whole[name][1])
        assert not np.array_equal(whole[name], other.feeds(range(6))[name])
    assert first.identity == again.identity != other.identity
    assert first.identity != made_up("random" if kind == "synthetic" else "synthetic", shapes, samples=6).identity


def test_random_is_standard_normal():
    values = made_up("random", {"x": (1, 3, 64, 64)}).feeds(range(8))["x"]
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert abs(np.corrcoef(values[0, 0, :, :-1].ravel(), values[0, 0, :, 1:].ravel())[0, 1]) < 0.1


def test_other_inputs():
    shapes = {"x": (1, 3, 8, 8), "tokens": (1, 197, 192), "ids": (1, 7), "mask": (1, 7)}
    dtypes = {"x": np.dtype("f2"), "ids": np.dtype("i8"), "mask": np.dtype("?")}
    feeds = made_up("synthetic", shapes, dtypes).feeds([0, 1])
    assert {name: value.dtype.name for name, value in feeds.items()} == {
        "x": "float16",
        "tokens": "float32",
        "ids": "int64",
        "mask": "bool",
    }
    assert (feeds["ids"] == 1).all()
    assert feeds["mask"].all()
    assert 0.9 < feeds["tokens"].std() < 1.1


def test_labels_are_refused(tmp_path):
    with pytest.raises(UserError, match="synthetic data has no labels"):
        open_dataset("synthetic", **ARGUMENTS, labels=tmp_path / "labels.csv")

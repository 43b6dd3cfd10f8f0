"""Presets, TOML files and metadata; pixels equal to timm's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from image_files import picture
from PIL import Image

from lsp_deploy.data import METADATA_KEY, PRESETS, Preprocess, image_size, load_preprocess
from lsp_deploy.data.transform import normalize, to_pixels
from lsp_deploy.errors import UserError


def prepared(image, preprocess):
    return normalize(to_pixels(image, preprocess), preprocess)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (32, 32)},
        {"size": (32, 32), "crop_pct": 0.9, "interpolation": "bilinear"},
        {"size": (32, 32), "crop_pct": 1.0, "interpolation": "lanczos", "mean": 0.5, "std": 0.5},
        {"size": (32, 48), "crop_pct": 0.9},
        {"size": (48, 32), "crop_mode": "squash", "interpolation": "nearest"},
        {"size": (32, 32), "crop_mode": "border", "crop_pct": 1.0},
        {"size": (32, 48), "crop_mode": "border", "interpolation": "bilinear"},
    ],
    ids=str,
)
def test_equal_to_timm(settings):
    from lsp_deploy.export import import_timm

    try:
        import_timm()
    except UserError as error:
        pytest.skip(str(error))
    from timm.data import create_transform

    preprocess = Preprocess(**settings)
    transform = create_transform(
        input_size=preprocess.size,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean * (3 // len(preprocess.mean)),
        std=preprocess.std * (3 // len(preprocess.std)),
    )
    for seed, size in enumerate([(36, 36), (60, 40), (40, 61), (20, 90), (33, 32), (8, 5)]):
        image = picture(seed, size)
        expected = transform(image).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(prepared(image, preprocess), expected, atol=2e-6, err_msg=str(size))


def test_resize_names_the_shorter_side():
    image = picture(0, (90, 60))
    by_share = Preprocess(size=(32, 32), crop_pct=0.8)
    assert np.array_equal(to_pixels(image, by_share), to_pixels(image, Preprocess(size=(32, 32), resize=40)))
    tall = to_pixels(image, Preprocess(size=(16, 32), resize=20))
    assert tall.shape == (16, 32, 3)


def test_256_pixel_image_at_the_default_is_only_cropped():
    image = picture(0, (300, 256))
    assert np.array_equal(to_pixels(image, Preprocess()), np.asarray(image)[38:262, 16:240])


def test_scale_mean_and_std_are_applied_in_this_order():
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    rgb = Preprocess(size=8, scale=1.0, mean=(1, 2, 3), std=(1, 2, 4))
    assert prepared(image, rgb)[0, 0].tolist() == [9.0, 9.0, 6.75]
    bgr = rgb.model_copy(update={"channels": "BGR"})
    assert prepared(image, bgr)[0, 0].tolist() == [29.0, 9.0, 1.75]
    gray = prepared(Image.new("L", (8, 8), 10), rgb)
    assert gray.shape == (8, 8, 1)
    np.testing.assert_allclose(gray, (10 - 2) / (7 / 3), rtol=1e-6)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", "RGB"), ("RGB", "BGR"), ("L", "RGB")])
def test_border_normalizes_to_zero(mode, channels):
    mean = (0.2, 0.4, 0.6) if channels == "RGB" else (0.6, 0.4, 0.2)
    preprocess = Preprocess(size=16, crop_mode="border", crop_pct=1.0, mean=mean, std=0.5, channels=channels)
    values = prepared(Image.new(mode, (16, 4)), preprocess)
    assert np.abs(values[:5]).max() < 2 / 255
    assert np.abs(values[-5:]).max() < 2 / 255
    assert np.abs(values[7:9]).min() > 0.3


def test_presets():
    settings = {name: load_preprocess(name, {}, (32, 32))[0] for name in PRESETS}
    assert set(settings) == {"imagenet", "inception", "clip", "siglip", "none"}
    assert all(preprocess.size == (32, 32) for preprocess in settings.values())
    assert settings["imagenet"] == Preprocess(size=(32, 32))
    assert settings["inception"].mean == (0.5, 0.5, 0.5)
    assert (settings["clip"].crop_pct, settings["clip"].crop_mode) == (1.0, "center")
    assert settings["siglip"].crop_mode == "squash"
    image = picture(0, (32, 32))
    np.testing.assert_allclose(prepared(image, settings["none"]), np.asarray(image) / 255, atol=1e-6)


def test_where_settings_come_from(tmp_path):
    wrote = {"size": [48, 48], "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bilinear"}
    metadata = {METADATA_KEY: json.dumps(wrote | {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})}
    preprocess, origin = load_preprocess(None, metadata, (64, 32))
    assert origin == "model metadata"
    assert (preprocess.crop_pct, preprocess.interpolation, preprocess.mean[0]) == (0.9, "bilinear", 0.5)
    assert preprocess.size == (64, 32)
    assert load_preprocess("clip", metadata, (64, 32))[1] == "--preprocess clip"
    assert load_preprocess(None, {}, (64, 32)) == (Preprocess(size=(64, 32)), "default")
    assert load_preprocess(None, {}, (0, 0))[1] == "default"
    file = tmp_path / "mine.toml"
    file.write_text("resize = 40\nmean = 0.1\nstd = [0.2, 0.3, 0.4]\nchannels = 'BGR'\n")
    preprocess, origin = load_preprocess(str(file), metadata, (32, 32))
    assert origin == f"--preprocess {file}"
    assert preprocess == Preprocess(size=32, resize=40, mean=0.1, std=(0.2, 0.3, 0.4), channels="BGR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean = [0.5, 0.5]", "mean has one finite value or three"),
        ("std = 0", "std is above 0"),
        ("std = nan", "std has one finite value"),
        ("crop_pct = 1.5", "crop_pct input should be less than or equal to 1"),
        ("interpolation = 'magic'", "interpolation input should be"),
        ("sise = 3", "there is no key 'sise'; keys: size"),
        ("size = 224", "size is 224 x 224, and the model takes 32 x 32"),
        ("size = 0", "size is at least 1 x 1"),
        ("resize = 3\ncrop_pct = 0.9", "leave one of them out"),
        ("= 3", "not valid TOML"),
    ],
)
def test_files_that_are_not_valid(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_preprocess(str(file), {}, (32, 32))
    assert "\n" not in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_unknown_preset_missing_file_and_bad_metadata(tmp_path):
    with pytest.raises(UserError, match=r"did you mean imagenet\? the presets are imagenet, inception"):
        load_preprocess("imagenett", {}, (32, 32))
    with pytest.raises(UserError, match="cannot read --preprocess"):
        load_preprocess(str(tmp_path / "gone.toml"), {}, (32, 32))
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"mean": []}', "mean has one")):
        with pytest.raises(UserError, match=message):
            load_preprocess(None, {METADATA_KEY: text}, (32, 32))


def test_image_size_follows_the_layout():
    assert image_size({"x": (1, 3, 32, 48)}) == (32, 48)
    assert image_size({"x": (1, 32, 48, 3)}) == (32, 48)
    assert image_size({"ids": (1, 7), "x": (1, 1, 28, 28)}) == (28, 28)
    assert image_size({"ids": (1, 7)}) == (0, 0)

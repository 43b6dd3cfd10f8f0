"""Folders and archives of images: what is found, decoded, skipped and refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_files import ARGUMENTS, DTYPES, SHAPES, encoded, numbered, picture, png, write_folder, write_tar
from PIL import Image

from lsp_deploy.data import Preprocess, images, load_preprocess, open_dataset
from lsp_deploy.data.decode import UndecodableImageError, decode_image
from lsp_deploy.errors import UserError


def everything(dataset):
    return dataset.feeds(range(len(dataset)))["pixels"]


@pytest.fixture
def shared_data():
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("LSP_DEPLOY_DATA", root.parent / "shared" / "data"))
    if not (data / "imagenet-sample").is_dir():
        pytest.skip(f"the shared evaluation data is not at {data} (LSP_DEPLOY_DATA names it)")
    return data


# What is found


def test_folder_is_searched_recursively_in_sorted_order(tmp_path):
    write_folder(tmp_path, {"b/2.png": png(2), "a/deep/1.PNG": png(1), "a/notes.txt": b"x", "labels.csv": b"x"})
    dataset = open_dataset(tmp_path, **ARGUMENTS)
    assert dataset.sample_names == ("a/deep/1.PNG", "b/2.png")
    assert dataset.kind == "images"
    assert dataset.name == tmp_path.name
    assert everything(dataset).shape == (2, 3, 16, 16)
    assert everything(dataset).dtype == np.float32


def test_hidden_files_and_folders_are_not_images(tmp_path):
    write_folder(tmp_path, {"1.png": png(), "._1.png": b"resource fork", ".cache/2.png": png()})
    assert open_dataset(tmp_path, **ARGUMENTS).sample_names == ("1.png",)


def test_links_are_followed_and_loops_end(tmp_path):
    write_folder(tmp_path / "all", {"1.png": png(1), "2.png": png(2)})
    subset = tmp_path / "subset"
    subset.mkdir()
    (subset / "linked.png").symlink_to(tmp_path / "all" / "1.png")
    (subset / "loop").symlink_to(subset)
    (subset / "dangling.png").symlink_to(tmp_path / "gone.png")
    assert open_dataset(subset, **ARGUMENTS).sample_names == ("linked.png",)


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz", "IMAGES.TAR"])
def test_archive_gives_the_same_samples_as_its_folder(tmp_path, name):
    files = {f"./{name}": content for name, content in numbered(6).items()}
    archive = open_dataset(write_tar(tmp_path / name, files), **ARGUMENTS)
    folder = open_dataset(write_folder(tmp_path / "folder", numbered(6)), **ARGUMENTS)
    assert archive.sample_names == folder.sample_names
    assert np.array_equal(everything(archive), everything(folder))
    assert archive.identity == folder.identity


def test_archive_writes_no_member_and_reads_no_link(tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = write_tar(inside / "x.tar.gz", {"../../escaped.png": png(1), "/rooted.png": png(2), "plain.png": png(3)})
    linked = inside / "linked.tar"
    with tarfile.open(linked, "w") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        member = tarfile.TarInfo("real.png")
        member.size = len(png())
        archive.addfile(member, io.BytesIO(png()))
    before = sorted(tmp_path.rglob("*"))
    dataset = open_dataset(path, **ARGUMENTS)
    assert dataset.sample_names == ("../../escaped.png", "/rooted.png", "plain.png")
    assert everything(dataset).shape[0] == 3
    assert open_dataset(linked, **ARGUMENTS).sample_names == ("real.png",)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/rooted.png").exists()


def test_of_two_members_by_one_name_the_later_counts(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        for content in (png(1), png(2)):
            member = tarfile.TarInfo("same.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    expected = open_dataset(write_folder(tmp_path / "folder", {"same.png": png(2)}), **ARGUMENTS)
    zipped = tmp_path / "twice.tar.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, zipped):
        assert np.array_equal(everything(open_dataset(source, **ARGUMENTS)), everything(expected))


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
def test_member_too_large_is_skipped_unread(tmp_path, monkeypatch, name, capsys):
    monkeypatch.setattr(images, "_LARGEST_FILE", 5000)
    source = write_tar(tmp_path / name, numbered(30) | {"zz.png": bytes(10_000)})
    dataset = open_dataset(source, **ARGUMENTS)
    assert (len(dataset), dataset.skipped) == (30, 1)
    assert "zz.png" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b\x08garbage", png()])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar"):
        open_dataset(path, **ARGUMENTS)


def test_truncated_archive_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar.gz", numbered(20))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cannot read .*x\.tar\.gz as a tar archive"):
        open_dataset(path, **ARGUMENTS)


def test_missing_empty_and_unknown_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no data at"):
        open_dataset(tmp_path / "gone", **ARGUMENTS)
    with pytest.raises(UserError, match="holds no images"):
        open_dataset(tmp_path, **ARGUMENTS)
    (tmp_path / "photo.png").write_bytes(png())
    with pytest.raises(UserError, match="give a folder of images"):
        open_dataset(tmp_path / "photo.png", **ARGUMENTS)
    with pytest.raises(UserError, match="at least 1"):
        open_dataset(tmp_path, **ARGUMENTS, samples=0)


# What is skipped


def corrupted(count: int, bad: int) -> dict[str, bytes]:
    files = numbered(count)
    for name in list(files)[3 : 3 + bad]:
        files[name] = files[name][:200]
    return files


def test_undecodable_images_up_to_5_percent_are_skipped_and_counted(tmp_path, capsys):
    files = corrupted(100, 4)
    labels = tmp_path / "labels.csv"
    labels.write_text("filename,class_index\n" + "".join(f"{name},{i}\n" for i, name in enumerate(files)))
    dataset = open_dataset(write_folder(tmp_path / "images", files), **ARGUMENTS, labels=labels)
    assert (len(dataset), dataset.skipped) == (96, 4)
    assert "003.png" not in dataset.sample_names
    assert dataset.labels.tolist() == [int(name[:3]) for name in dataset.sample_names]
    assert np.isfinite(everything(dataset)).all()
    warning = capsys.readouterr().err
    assert "4 of 100 images" in warning
    assert "003.png" in warning


def test_more_than_5_percent_undecodable_is_an_error(tmp_path):
    write_folder(tmp_path, corrupted(100, 6))
    with pytest.raises(UserError, match=r"6 of 100 images .* do not decode \(first 003\.png"):
        open_dataset(tmp_path, **ARGUMENTS)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello, I am text", id="text"),
        pytest.param(encoded(picture(), "JPEG")[:-300], id="truncated jpeg"),
        pytest.param(png()[:-100], id="truncated png"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="a program (EPS)"),
        pytest.param(encoded(Image.new("1", (20_000, 20_000))), id="decompression bomb"),
        pytest.param(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), id="floating point"),
    ],
)
def test_content_that_is_no_usable_image(content):
    with pytest.raises(UndecodableImageError) as caught:
        decode_image(content, "RGB")
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def test_strip_that_would_grow_to_gigabytes_is_skipped(tmp_path):
    files = numbered(30) | {"strip.png": encoded(Image.new("L", (60_000, 1)))}
    dataset = open_dataset(
        write_folder(tmp_path, files), shapes={"x": (1, 3, 64, 64)}, dtypes={"x": np.dtype("f4")}, preprocess=None
    )
    assert dataset.skipped == 1


# What is decoded


def decoded(content: bytes, mode="RGB") -> np.ndarray:
    return np.asarray(decode_image(content, mode)).astype(int)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    turned = decoded(encoded(image, "JPEG", exif=exif))
    assert turned.shape == (40, 20, 3)
    assert turned[:15].min() > 200
    assert turned[-15:].max() < 50


def test_damaged_exif_does_not_cost_the_image():
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert decoded(content).shape == (20, 24, 3)


def test_cmyk_jpeg():
    colours = Image.new("RGB", (16, 16), (200, 30, 60))
    result = decoded(encoded(colours.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(result - [200, 30, 60]).max() < 8


def test_grayscale_and_palette():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decoded(encoded(Image.fromarray(gray))), np.repeat(gray[:, :, None], 3, axis=2))
    palette = picture().quantize(256)
    assert np.array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decoded(encoded(Image.fromarray(gray)), "L"), gray)


def test_16_bit_grayscale_keeps_its_range():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    result = decoded(encoded(Image.fromarray(values)))
    assert np.array_equal(result[:, :, 0], values >> 8)


def test_alpha_is_dropped():
    colours = np.asarray(picture())
    alpha = np.zeros((*colours.shape[:2], 1), np.uint8)
    assert np.array_equal(decoded(encoded(Image.fromarray(np.concatenate([colours, alpha], 2)))), colours)


# What is fed


def test_one_channel_input_gets_gray_pixels_and_mean_statistics(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(Image.new("RGB", (16, 16), (90, 90, 90)))})
    dataset = open_dataset(
        tmp_path, shapes={"x": (1, 1, 16, 16)}, dtypes={"x": np.dtype("f4")}, preprocess=Preprocess()
    )
    values = dataset.feeds([0])["x"]
    assert values.shape == (1, 1, 16, 16)
    mean, std = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])
    np.testing.assert_allclose(values, (90 / 255 - mean) / std, rtol=1e-5)


def test_channels_last_and_half_precision(tmp_path):
    write_folder(tmp_path, numbered(2))
    first = everything(open_dataset(tmp_path, **ARGUMENTS))
    last = open_dataset(tmp_path, shapes={"pixels": (4, 16, 16, 3)}, dtypes={"pixels": np.dtype("f2")}, preprocess=None)
    assert everything(last).dtype == np.float16
    np.testing.assert_allclose(everything(last), first.transpose(0, 2, 3, 1), atol=2e-3)


def test_size_is_the_inputs(tmp_path):
    write_folder(tmp_path, numbered(1))
    dataset = open_dataset(tmp_path, shapes=SHAPES, dtypes=DTYPES, preprocess=Preprocess(size=(8, 8)))
    assert everything(dataset).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ({"pixels": (1, 3, 16, 16), "ids": (1, 7)}, "f4", "pixels, ids.*npz"),
        ({"pixels": (1, 197, 192)}, "f4", r"input pixels .*does not take images"),
        ({"pixels": (1, 4, 16, 16)}, "f4", r"input pixels .*does not take images"),
        ({"pixels": (1, 3, 16, 16)}, "u1", r"input pixels .*does not take images"),
    ],
)
def test_model_that_does_not_take_images(tmp_path, shapes, dtype, message):
    write_folder(tmp_path, numbered(1))
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path, shapes=shapes, dtypes=dict.fromkeys(shapes, np.dtype(dtype)), preprocess=None)


def test_batches_feeds_and_subsets_agree(tmp_path):
    dataset = open_dataset(write_folder(tmp_path, numbered(7)), **ARGUMENTS)
    pixels = everything(dataset)
    batches = [batch["pixels"] for batch in dataset.batches(3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), pixels)
    part = dataset.subset([5, 2]).subset(np.array([1]))
    assert part.sample_names == ("002.png",)
    assert np.array_equal(everything(part), pixels[2:3])


def test_images_beyond_the_cache_are_decoded_again_and_equal(tmp_path, monkeypatch):
    write_folder(tmp_path, numbered(9))
    cached = open_dataset(tmp_path, **ARGUMENTS)
    monkeypatch.setattr("lsp_deploy.data.image_reader._CACHE_BYTES", 4 * 16 * 16 * 3)
    partly = open_dataset(tmp_path, **ARGUMENTS)
    assert np.array_equal(everything(partly), everything(cached))
    (tmp_path / "000.png").unlink()
    assert len(partly.feeds([0])["pixels"]) == 1
    (tmp_path / "008.png").unlink()
    with pytest.raises(UserError, match=r"008\.png"):
        partly.feeds([8])


def test_same_data_twice_gives_the_same_bytes_and_identity(tmp_path):
    first = open_dataset(write_folder(tmp_path / "a", numbered(12)), **ARGUMENTS, samples=5, seed=3)
    second = open_dataset(write_folder(tmp_path / "b", numbered(12)), **ARGUMENTS, samples=5, seed=3)
    assert first.sample_names == second.sample_names
    assert everything(first).tobytes() == everything(second).tobytes()
    assert first.identity == second.identity


def test_identity_tells_content_order_and_preparation_apart(tmp_path):
    folder = write_folder(tmp_path / "a", numbered(4))
    dataset = open_dataset(folder, **ARGUMENTS)
    other = open_dataset(write_folder(tmp_path / "b", numbered(4) | {"003.png": png(9)}), **ARGUMENTS)
    clip, _ = load_preprocess("clip", {}, (16, 16))
    differently = open_dataset(folder, shapes=SHAPES, dtypes=DTYPES, preprocess=clip)
    views = (dataset, other, differently, dataset.subset([0, 1]), dataset.subset([1, 0]))
    assert len({view.identity for view in views}) == len(views)


def test_samples_are_spread_evenly_over_class_folders(tmp_path):
    files = {
        f"{kind}/{index}.png": png(index) for kind, count in (("a", 9), ("b", 20), ("c", 2)) for index in range(count)
    }
    dataset = open_dataset(write_folder(tmp_path, files), **ARGUMENTS, samples=12)
    assert np.bincount(dataset.labels).tolist() == [5, 5, 2]
    assert dataset.class_names == ("a", "b", "c")
    assert list(dataset.sample_names) == sorted(dataset.sample_names)


def test_more_samples_than_images_means_all(tmp_path):
    assert len(open_dataset(write_folder(tmp_path, numbered(3)), **ARGUMENTS, samples=512)) == 3


def test_shared_imagenet_sample(shared_data):
    folder = shared_data / "imagenet-sample"
    dataset = open_dataset(
        folder / "images.tar",
        shapes={"x": (1, 3, 224, 224)},
        dtypes={"x": np.dtype("f4")},
        preprocess=Preprocess(),
        labels=folder / "labels.csv",
        samples=40,
    )
    assert (len(dataset), dataset.skipped) == (40, 0)
    assert len(set(dataset.labels.tolist())) == 40
    # The shorter side is 256 already: what is left is the centre 224 of the stored pixels.
    with tarfile.open(folder / "images.tar") as archive:
        stored = np.asarray(Image.open(archive.extractfile(dataset.sample_names[7])))
    top, left = (round((side - 224) / 2) for side in stored.shape[:2])
    crop = stored[top : top + 224, left : left + 224] / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(dataset.feeds([7])["x"][0], expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize(("part", "count"), [("val", 5000), ("train", 20000)])
def test_shared_tiny_imagenet(shared_data, part, count):
    folder = shared_data / "tiny-imagenet"
    dataset = open_dataset(
        folder / f"{part}_images.tar.gz",
        **ARGUMENTS,
        labels=folder / f"{part}_labels.csv",
        label_column="model_index",
        samples=200,
    )
    assert sorted(dataset.labels.tolist()) == list(range(200))
    rows = dict(line.split(",")[::3] for line in (folder / f"{part}_labels.csv").read_text().splitlines())
    assert len(rows) == count + 1
    assert [int(rows[Path(name).name]) for name in dataset.sample_names] == dataset.labels.tolist()

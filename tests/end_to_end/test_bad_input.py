"""Every bad input: one line, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image


def assert_refused(result, *fragments: str) -> None:
    assert result.code == 2, (result.out, result.err)
    lines = [line for line in result.err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(value: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(path)
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[3] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(model, path)

    return change


def external(location: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(path)
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        size = len(tensor.raw_data)
        (path.parent.parent / "outside.bin").write_bytes(b"\0" * size)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())

    return change


BAD_MODELS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "text": lambda path: path.write_text("this is not a model\n" * 20),
    "binary": lambda path: path.write_bytes(os.urandom(4096)),
    "nan": poison(float("nan")),
    "inf": poison(float("inf")),
    "external data above": external("../outside.bin"),
    "external data missing": external("missing.bin"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_model_files(run, bare: Path, kind: str) -> None:
    BAD_MODELS[kind](bare)
    assert_refused(run("compress", bare.name, "--target", "a100"), bare.name)
    assert not (bare.parent / f"{bare.stem}-a100").exists()


def test_missing_model(run, bare: Path) -> None:
    assert_refused(run("compress", "nowhere.onnx", "--target", "a100"), "nowhere.onnx")


def test_folder_as_model(run, bare: Path) -> None:
    assert_refused(run("compress", ".", "--target", "a100"))


def test_model_without_weight_matrices(run, bare: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), "relu.onnx")
    assert_refused(run("compress", "relu.onnx", "--target", "a100"), "constant weight")


def test_unknown_target_names_the_nearest(run, bare: Path) -> None:
    assert_refused(run("compress", bare.name, "--target", "a1000"), "a100")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--flops", "1.5"),
        ("--flops", "0"),
        ("--flops", "half"),
        ("--sparsity", "block", "--block", "0x16"),
        ("--sparsity", "3:5"),
        ("--precision", "fp8"),
        ("--precision", "int4"),
        ("--recover", "finetune"),
        ("--max-drop", "-1"),
        ("--samples", "0"),
        ("--opt-shapes", "pixel_values:8x1x9x9"),
        ("--opt-shapes", "nonsense"),
        ("--opt-shapes", "other:8x1x8x8"),
        ("--calibration-data", "nowhere/"),
        ("--calibration-data", "calibration.npz", "--labels", "nowhere.csv"),
        ("--calibration-data", "calibration.npz", "--labels", "evaluation_labels.csv"),
        ("--calibration-data", "calibration.npz", "--preprocess", "imagenet"),
        ("--preprocess", "nowhere.toml"),
        ("--recipe", "nowhere.toml"),
        ("--plan", "nowhere.json"),
        ("--no-such-flag",),
        ("--jobs", "0"),
    ],
    ids=" ".join,
)
def test_bad_flags(run, bare: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(p.name for p in bare.parent.iterdir())
    assert_refused(run("compress", bare.name, "--target", "a100", *arguments))
    assert sorted(p.name for p in bare.parent.iterdir()) == before


def test_plan_and_decisions_contradict(run, bare: Path) -> None:
    assert_refused(run("compress", bare.name, "--target", "a100", "--plan", "p.json", "--precision", "fp16"), "--plan")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_inf_in_calibration(run, bare: Path, value: float) -> None:
    images = np.zeros((8, 1, 8, 8), np.float32)
    images[3, 0, 0, 0] = value
    np.savez("bad.npz", pixel_values=images)
    assert_refused(run("compress", bare.name, "--target", "a100", "--calibration-data", "bad.npz"), "bad.npz")


def test_wrong_input_shape(run, bare: Path) -> None:
    np.savez("wide.npz", pixel_values=np.zeros((8, 1, 9, 9), np.float32))
    assert_refused(run("compress", bare.name, "--target", "a100", "--calibration-data", "wide.npz"), "wide.npz")


def test_pickled_arrays_are_refused(run, bare: Path) -> None:
    np.save("evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert_refused(run("compress", bare.name, "--target", "a100", "--calibration-data", "evil.npy"), "evil.npy")


def make_images(folder: Path, good: int, bad: int) -> None:
    folder.mkdir()
    for index in range(good):
        Image.fromarray(np.full((8, 8), index % 250, np.uint8)).save(folder / f"good{index:03}.png")
    for index in range(bad):
        (folder / f"bad{index:03}.png").write_bytes(b"not an image")


def test_a_few_undecodable_images_are_skipped_and_counted(run, bare: Path) -> None:
    make_images(Path("images"), 48, 2)
    result = run("compress", bare.name, "--target", "a100", "--no-build", "--calibration-data", "images")
    assert result.code == 0, result.err
    assert "2" in result.err
    assert "skipped" in result.err


def test_many_undecodable_images_are_an_error(run, bare: Path) -> None:
    make_images(Path("images"), 30, 10)
    assert_refused(run("compress", bare.name, "--target", "a100", "--calibration-data", "images"), "images")


def test_image_without_label(run, bare: Path) -> None:
    make_images(Path("images"), 6, 0)
    Path("labels.csv").write_text("filename,class_index\ngood000.png,1\n")
    arguments = ("--calibration-data", "images", "--labels", "labels.csv")
    assert_refused(run("compress", bare.name, "--target", "a100", *arguments), "label")


def test_truncated_tar(run, bare: Path) -> None:
    make_images(Path("images"), 20, 0)
    with tarfile.open("images.tar.gz", "w:gz") as archive:
        archive.add("images")
    truncate(Path("images.tar.gz"))
    assert_refused(
        run("compress", bare.name, "--target", "a100", "--calibration-data", "images.tar.gz"), "images.tar.gz"
    )


def test_output_that_is_a_file(run, bare: Path) -> None:
    Path("out").write_text("a file")
    assert_refused(run("compress", bare.name, "--target", "a100", "-o", "out"), "out")
    assert Path("out").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(run, bare: Path) -> None:
    Path("locked").mkdir(mode=0o500)
    assert_refused(run("compress", bare.name, "--target", "a100", "-o", "locked/out"), "locked")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_full_output_folder(run, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    result = run("compress", bare.name, "--target", "a100", "--no-build", "-o", "out")
    assert_refused(result, "No space left")
    assert not [p for p in Path("out").rglob("*") if p.is_file()]


def test_ctrl_c_exits_130_with_one_line(run, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lsp_deploy.steps.preparation.prepare", interrupted)
    result = run("compress", bare.name, "--target", "a100")
    assert result.code == 130
    assert result.err.splitlines() == ["interrupted; files that are written are whole, run the same command again"]

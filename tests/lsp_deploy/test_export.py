"""`lsp-deploy export`: timm classifiers to ONNX."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from lsp_deploy import export
from lsp_deploy.data.preprocess import load_preprocess
from lsp_deploy.errors import UserError
from lsp_deploy.export import ExportResult, export_model, import_timm

pytest.importorskip("torch", reason="export needs PyTorch")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    path = tmp_path_factory.mktemp("export") / "m.onnx"
    return export_model("timm:test_vit", path, num_classes=10, image_size=64)


def _reference(name: str, images: np.ndarray, **options: int) -> np.ndarray:
    import torch

    timm = import_timm()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, **options).eval()
    with torch.inference_mode():
        return module(torch.from_numpy(images)).numpy()


def _run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": images})[0]


def _images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, size, size)).astype(np.float32)


def test_outputs_are_those_of_the_module_at_any_batch(exported: ExportResult) -> None:
    for batch in (1, 3):
        images = _images(batch, 64)
        expected = _reference("test_vit", images, num_classes=10, img_size=64)
        np.testing.assert_allclose(_run(exported.path, images), expected, rtol=1e-4, atol=1e-5)


def test_file_says_what_was_asked_for(exported: ExportResult) -> None:
    model = onnx.load(exported.path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    (dimensions,) = [value.type.tensor_type.shape.dim for value in model.graph.input]
    assert [dimension.dim_param or dimension.dim_value for dimension in dimensions] == ["batch", 3, 64, 64]
    module = import_timm().create_model("test_vit", num_classes=10, img_size=64)
    assert exported.to_json() == {
        "path": str(exported.path),
        "name": "test_vit",
        "opset": 17,
        "exporter": "torchscript",
        "input_shape": ("batch", 3, 64, 64),
        "num_classes": 10,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "pretrained": False,
    }


def test_preprocessing_is_in_the_metadata_as_the_data_reader_takes_it(exported: ExportResult) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    config = import_timm().get_pretrained_cfg("test_vit")
    settings, origin = load_preprocess(None, metadata, (64, 64))
    assert origin == "model metadata"
    assert settings.size == (64, 64)
    assert (settings.mean, settings.std) == (config.mean, config.std)
    assert (settings.interpolation, settings.crop_pct) == (config.interpolation, config.crop_pct)
    keys = {"size", "crop_pct", "crop_mode", "interpolation", "mean", "std"}
    assert set(json.loads(metadata["lsp_deploy.preprocess"])) == keys


def test_random_weights_follow_the_seed_and_leave_the_callers_alone(exported: ExportResult, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = export_model("timm:test_vit", tmp_path / "again.onnx", num_classes=10, image_size=64)
    assert torch.equal(torch.rand(3), expected)
    other = export_model("timm:test_vit", tmp_path / "other.onnx", num_classes=10, image_size=64, seed=1)
    assert again.path.read_bytes() == exported.path.read_bytes()
    assert other.path.read_bytes() != exported.path.read_bytes()


def test_dynamo_exporter_honours_opset_and_batch_and_keeps_paths_out(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_model("timm:test_vit", path, num_classes=10, image_size=64, exporter="dynamo", opset=20)
    model = onnx.load(path)
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 20
    assert b"site-packages" not in path.read_bytes()
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    images = _images(3, 64)
    expected = _reference("test_vit", images, num_classes=10, img_size=64)
    np.testing.assert_allclose(_run(path, images), expected, rtol=1e-4, atol=1e-5)


def test_each_exporter_has_a_default_opset_that_it_writes(tmp_path: Path) -> None:
    result = export_model("timm:test_vit", tmp_path / "m.onnx", num_classes=10, image_size=64, exporter="dynamo")
    assert result.opset == 18
    model = onnx.load(tmp_path / "m.onnx")
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 18


def test_fixed_batch_and_old_opset(tmp_path: Path) -> None:
    result = export_model("timm:test_vit", tmp_path / "m.onnx", image_size=64, batch=2, opset=13)
    model = onnx.load(result.path)
    assert model.opset_import[0].version == 13
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    images = _images(2, 64)
    np.testing.assert_allclose(
        _run(result.path, images), _reference("test_vit", images, img_size=64), rtol=1e-4, atol=1e-5
    )


def test_convolutional_network_takes_any_image_size(tmp_path: Path) -> None:
    result = export_model("timm:test_convnext", tmp_path / "m.onnx", num_classes=4, image_size=72)
    assert result.input_shape == ("batch", 3, 72, 72)
    images = _images(2, 72)
    expected = _reference("test_convnext", images, num_classes=4)
    np.testing.assert_allclose(_run(result.path, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("hf:google/vit", {}, "timm:deit_small_patch16_224"),
        ("deit_small_patch16_224", {}, "timm:deit_small_patch16_224"),
        ("timm:", {}, "name a timm model"),
        ("timm:deit_smal_patch16_224", {}, "deit_small_patch16_224"),
        ("timm:deit_tiny", {}, "deit_tiny_patch16_224"),
        ("timm:vit_base_patch16_224.nope", {}, "augreg_in1k"),
        ("timm:vit_small_patch16_224.dino", {"image_size": 32}, "--num-classes"),
        ("timm:test_convnext", {"image_size": 4}, "does not take images of 4x4 pixels"),
        ("timm:test_vit", {"opset": 21}, "opset 13 to 20, not 21"),
        ("timm:test_vit", {"opset": 17, "exporter": "dynamo"}, "opset 18 to 23, not 17"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    spec: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        export_model(spec, tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_output_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        export_model("timm:test_vit", tmp_path / "missing" / "m.onnx")


def test_weights_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> object:
        if pretrained:
            raise OSError("no route\nto host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="cannot download the weights of test_vit: no route to host; check the network"):
        export_model("timm:test_vit", tmp_path / "m.onnx", pretrained=True)
    assert not list(tmp_path.iterdir())


def test_architecture_without_trained_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="timm has no trained weights for levit_256d"):
        export_model("timm:levit_256d", tmp_path / "m.onnx", pretrained=True)


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'lsp-deploy\[torch\]'"):
        export_model("timm:test_vit", tmp_path / "m.onnx")


def test_other_errors_of_torchvision_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(export.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="torchvision is broken"):
        import_timm()

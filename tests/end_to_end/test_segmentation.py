"""The bare command on a model that gives classes for every pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
from exports import export_segmentation_vit

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def test_compress_in_int8(run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ("--target", "a100", "--precision", "int8", "--samples", "8", "--no-build", "-o", folder)
    result = run("compress", export_segmentation_vit(), *options)
    assert result.code == 0, result.err
    report = json.loads((folder / "report.json").read_text())
    assert sum(layer["precision"]["dtype"] == "int8" for layer in report["layers"]) >= 8
    assert report["fidelity"]["sqnr_db"] > 20
    (model,) = folder.glob("*.onnx")
    session = onnxruntime.InferenceSession(model)
    image = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    (classes,) = session.run(None, {"pixel_values": image.astype(NUMPY[session.get_inputs()[0].type])})
    assert classes.shape == (3, 6, 64, 64)
    assert np.isfinite(classes).all()

"""The bare command on models that are no single-image classifiers of a fixed shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exports import export_clip, export_family, export_huggingface_vit


def compressed(run, model: Path, tmp_path: Path) -> dict:
    result = run("compress", model, "--target", "a100", "--samples", "8", "--no-build", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_two_towers_whose_similarities_are_no_classes(run, tmp_path: Path) -> None:
    report = compressed(run, export_clip(), tmp_path)
    assert report["fidelity"]["expected_drop_points"] is None
    assert report["fidelity"]["sqnr_db"] > 20
    assert report["budget"] is None


@pytest.mark.parametrize("family", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_other_families(run, family: str, tmp_path: Path) -> None:
    report = compressed(run, export_family(family), tmp_path)
    assert sum(layer["precision"]["dtype"] == "int8" for layer in report["layers"]) > 3


def test_separate_query_key_value(run, tmp_path: Path) -> None:
    report = compressed(run, export_huggingface_vit(), tmp_path)
    assert sum(layer["role"] == "qkv" for layer in report["layers"]) % 3 == 0

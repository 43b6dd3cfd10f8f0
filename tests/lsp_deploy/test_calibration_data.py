"""Which images a run calibrates on and which it measures on, and what is said of how they are prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from digits import ASSETS
from PIL import Image

from lsp_deploy.hardware.target import load_target
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps.calibration import CalibrationData, open_data
from lsp_deploy.steps.preparation import prepare


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return str(tmp_path)


def opened(**asked: object) -> CalibrationData:
    recipe = Recipe.model_validate({"target": "a100", **asked})
    return open_data(prepare(ASSETS / "digits_vit.onnx", recipe, load_target("a100")), recipe)


def test_fewer_than_five_are_on_both_sides_and_the_note_says_so(photos: str) -> None:
    data = opened(calibration_data=photos, preprocess="none")
    assert data.notes == ["fidelity is measured on all 4 calibration samples: too few to hold any out"]


def test_images_to_measure_on_are_prepared_as_typed_beside_made_up_calibration(
    photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = opened(eval_data=photos, preprocess="none")
    assert (data.calibration.kind, data.held_out.kind) == ("synthetic", "images")
    assert data.preprocess_from != "default"
    assert data.held_out.identity != opened(eval_data=photos, preprocess="inception").held_out.identity
    assert "is assumed" not in capsys.readouterr().err


def test_assumed_preparation_of_images_to_measure_on_is_said_once(
    photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened(eval_data=photos).preprocess_from == "default"
    assert capsys.readouterr().err.count("`imagenet` is assumed") == 1

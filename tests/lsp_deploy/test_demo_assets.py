"""The embedded model, its data and its recipe."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from lsp_deploy.demo import DEMO_FILES, DEMO_MODEL, copy_demo
from lsp_deploy.errors import UserError
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model
from lsp_deploy.recipe import merge_recipe

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "lsp_deploy" / "assets"


def _labels(part: str) -> np.ndarray:
    with (ASSETS / f"{part}_labels.csv").open(newline="") as stream:
        return np.array([int(row["class_index"]) for row in csv.DictReader(stream)])


def _samples(part: str) -> np.ndarray:
    with np.load(ASSETS / f"{part}.npz") as arrays:
        return arrays["pixel_values"]


@pytest.fixture(scope="module")
def training_script() -> ModuleType:
    pytest.importorskip("torch", reason="the training script needs PyTorch")
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "scripts" / "train_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_model_is_below_a_megabyte_with_a_dynamic_batch() -> None:
    path = ASSETS / DEMO_MODEL
    assert path.stat().st_size < 1_000_000
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"pixel_values": ["batch", 1, 8, 8], "logits": ["batch", 10]}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]


def test_model_is_a_transformer_whose_layers_fit_sparse_tensor_cores() -> None:
    layers = linear_layers(load_model(ASSETS / DEMO_MODEL))
    roles = Counter(layer.role for layer in layers)
    assert roles == {"patch": 1, "qkv": 4, "proj": 4, "fc1": 4, "fc2": 4, "head": 1}
    inner = [layer for layer in layers if layer.role not in ("patch", "head")]
    assert all(size >= 64 and size % 16 == 0 for layer in inner for size in (layer.K, layer.N))


def test_accuracy_is_what_the_assets_readme_says() -> None:
    session = onnxruntime.InferenceSession(ASSETS / DEMO_MODEL, providers=["CPUExecutionProvider"])
    readme = (ASSETS / "README.md").read_text()
    for part, samples in (("calibration", 200), ("evaluation", 400)):
        (logits,) = session.run(["logits"], {"pixel_values": _samples(part)})
        correct = int((logits.argmax(axis=1) == _labels(part)).sum())
        said = re.search(rf"\| {part} \| {samples} \| (\d+) \| ([\d.]+) % \|", readme)
        assert said is not None
        # One sample for what another build of the runtime may round differently.
        assert abs(int(said[1]) - correct) <= 1
        assert float(said[2]) == 100 * int(said[1]) / samples
        if part == "evaluation":
            assert correct / samples >= 0.975


def test_data_are_digits_of_the_set_that_training_did_not_see(training_script: ModuleType) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, calibration, evaluation = training_script.split(digits.target)
    assert sorted((*train, *calibration, *evaluation)) == list(range(1797))
    samples = training_script.normalized(digits.images, train)
    for part, rows in (("calibration", calibration), ("evaluation", evaluation)):
        np.testing.assert_allclose(_samples(part), samples[rows], atol=1e-6)
        np.testing.assert_array_equal(_labels(part), digits.target[rows])
    seen = {digit.tobytes() for digit in digits.images[train]}
    assert not any(digit.tobytes() in seen for digit in digits.images[[*calibration, *evaluation]])


def test_recipe_beside_the_model_names_the_data_and_asks_for_zeros(tmp_path: Path) -> None:
    model = copy_demo(tmp_path / "demo")
    recipe = merge_recipe({"target": "a100"}, None, model)
    named = [recipe.calibration_data, recipe.labels, recipe.eval_data, recipe.eval_labels]
    assert all(path is not None and Path(path).is_file() for path in named)
    assert recipe.sparsity == "2:4"


def test_copy_is_complete_and_refuses_a_folder_with_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    model = copy_demo(folder)
    assert model == folder / DEMO_MODEL
    assert {path.name for path in folder.iterdir()} == set(DEMO_FILES)
    assert all((folder / name).read_bytes() == (ASSETS / name).read_bytes() for name in DEMO_FILES)
    with pytest.raises(UserError, match="is not empty"):
        copy_demo(folder)


def test_copy_to_where_a_file_is(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(UserError, match="choose another -o folder"):
        copy_demo(taken)
    assert taken.read_text() == "mine"

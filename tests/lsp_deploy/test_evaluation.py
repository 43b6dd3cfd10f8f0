"""What a plan loses is measured on the weights that the file is going to have."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from digits import ASSETS
from pass_models import layer
from pass_models import plan as plan_of

from lsp_deploy.data import open_dataset
from lsp_deploy.hardware.target import load_target
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps.apply import apply_plan
from lsp_deploy.steps.evaluation import Evaluator
from lsp_deploy.steps.preparation import prepare


@pytest.mark.parametrize("compute_type", ["fp16", "bf16"])
def test_a_plan_is_tried_with_the_roundings_of_its_compute_type(
    compute_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target("a100")
    prepared = prepare(ASSETS / "digits_vit.onnx", Recipe(target="a100"), target)
    shapes = prepared.shapes.opt
    images = open_dataset(str(ASSETS / "calibration.npz"), shapes=shapes, dtypes={}, preprocess=None, samples=24)
    evaluator = Evaluator(prepared.original, prepared.canonical, images, batch=8, threads=1)
    plan = plan_of(*(layer(one.name, one.K, one.N, compute_type) for one in prepared.layers))
    plan.compute_type = compute_type
    tried: list[ir.Model] = []
    measure = evaluator.fidelity
    monkeypatch.setattr(evaluator, "fidelity", lambda model, words: tried.append(model) or measure(model, words))

    evaluator.loss(plan)

    written = apply_plan(prepared.canonical, plan, prepared.original_io, shapes, kind="gpu").model
    as_tried, as_written = (evaluator.outputs_of(model, "a test") for model in (tried[0], written))
    np.testing.assert_allclose(as_tried, as_written, rtol=0, atol=1e-5)
    assert np.abs(as_tried - evaluator.dense_outputs).max() > 1e-4  # which are those of float32 weights

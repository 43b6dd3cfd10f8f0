"""Neurons, heads and layers that a plan's zeros leave dead: they leave the graph, and the report says so."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import run as outputs_of
from pass_models import layer
from pass_models import plan as plan_of

from lsp_deploy.allocation.masks import two_four_mask
from lsp_deploy.comparing import compare_models
from lsp_deploy.files import sha256_of
from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model, resolve_shapes, save_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.to_float32 import ToFloat32Pass
from lsp_deploy.plan import Plan, load_plan, save_plan
from lsp_deploy.steps.apply import apply_decisions, apply_plan

DATA = ("--calibration-data", "calibration.npz", "--labels", "calibration_labels.csv")
FC1, FC2 = "/blocks/blocks.0/mlp/fc1/MatMul", "/blocks/blocks.0/mlp/fc2/MatMul"
QKV, PROJ = "/blocks/blocks.1/attn/qkv/MatMul", "/blocks/blocks.1/attn/proj/MatMul"
GONE = ("/blocks/blocks.2/mlp/fc1/MatMul", "/blocks/blocks.2/mlp/fc2/MatMul")


def masked_plan(run: Any, model: Path, target: str, precision: str) -> Plan:
    """Write hand/plan.json: 64 neurons of one MLP, one head of four, and all of another MLP's second layer are zero."""
    arguments = ("--target", target, "--precision", precision, "--sparsity", "none", "--no-build", "-o", "dense")
    assert run("compress", model.name, *DATA, *arguments).code == 0
    plan = load_plan(Path("dense/plan.json"))
    zeros = {FC1: np.s_[:, 32:96], PROJ: np.s_[16:32], GONE[1]: np.s_[:]}
    for name, dead in zeros.items():
        decided = plan.layer(name)
        mask = np.ones((decided.K, decided.N), bool)
        mask[dead] = False
        plan.masks[name] = mask
        decided.sparsity.pattern, decided.sparsity.zeros = "block", float(1 - mask.mean())
    plan.block_shape = (16, 16)
    Path("hand").mkdir()
    save_plan(plan, Path("hand/plan.json"))
    return plan


def pruned(model: ir.Model, masks: Mapping[str, np.ndarray], two_four: Collection[str] = ()) -> ir.Model:
    """Carry out a float32 plan of these masks alone."""
    layers = [layer(name, *mask.shape) for name, mask in masks.items()]
    for one in layers:
        one.sparsity.pattern = "2:4" if one.name in two_four else "block"
    shapes = resolve_shapes(model, None, batch=1)
    return apply_plan(model, plan_of(*layers, masks=masks), {}, shapes, kind="gpu").model


def answers(model: Any) -> np.ndarray:
    ToFloat32Pass()(model)
    images = np.load("evaluation.npz")
    feeds = {name: images[name][:64].astype(np.float32) for name in images.files}
    return outputs_of(model, feeds)[0]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_dead_structure_leaves_the_model(run, bare: Path, precision: str) -> None:
    plan = masked_plan(run, bare, "a100", precision)
    result = run("compress", bare.name, "--target", "a100", "--no-build", "-o", "out", "--plan", "hand/plan.json")
    assert result.code == 0, result.err

    # Structure: qkv in int8 is written in three parts for TensorRT.
    compressed = load_model(Path("out/model.onnx"))
    weights = {tuple(onnx.numpy_helper.to_array(one).shape) for one in onnx.load("out/model.onnx").graph.initializer}
    assert {(64, 192), (192, 64), (48, 64), (64, 48 if precision == "int8" else 144)} <= weights

    # Outputs: as those of the same plan on a model that keeps its zeros.
    canonical = canonicalize(load_model(bare), max_opset=19, needed_opset=19)
    expected, actual = answers(apply_decisions(canonical, plan)), answers(compressed)
    noise = np.square(actual - expected).mean() / np.square(expected).mean()
    assert noise < (1e-5 if precision == "fp16" else 1e-2)

    # Report.
    report = json.loads(Path("out/report.json").read_text())
    rows = {layer["name"]: layer for layer in report["layers"]}
    assert len(rows) == len(plan.layers)
    left = {name: (row["structure"]["K"], row["structure"]["N"]) for name, row in rows.items() if row["structure"]}
    assert left == {FC1: (64, 192), FC2: (192, 64), QKV: (64, 144), PROJ: (48, 64), GONE[0]: (0, 0), GONE[1]: (0, 0)}
    assert rows[FC1]["structure"]["note"] == "K × N 64 × 256 became 64 × 192: 64 of 256 neurons are dead"
    assert rows[GONE[1]]["structure"]["note"] == "gone: its weight is zero"
    removed = 2 * 64 * 64 + 16 * 64 * 4 + 2 * 64 * 256
    linear = sum(row["flops"] for row in rows.values())
    tokens = rows[FC1]["M"]
    assert report["flops"]["linear_remaining_flops"] == linear - 2 * tokens * removed

    # The plan stays that of the whole model, and gives the same bytes again.
    assert load_plan(Path("out/plan.json")).layers == plan.layers
    again = run("compress", bare.name, "--target", "a100", "--no-build", "-o", "again", "--plan", "out/plan.json")
    assert again.code == 0, again.err
    assert sha256_of(Path("out/model.onnx")) == sha256_of(Path("again/model.onnx"))


def test_an_engine_is_not_asked_about_layers_that_are_gone(run, bare: Path) -> None:
    masked_plan(run, bare, "cpu", "int8")
    assert run("compress", bare.name, "--target", "cpu", "-o", "out", "--plan", "hand/plan.json").code == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["engine"]["built"]
    rows = {layer["name"]: layer for layer in report["layers"]}
    for name in GONE:
        assert rows[name]["engine"]["matches_request"] is None
        assert rows[name]["engine"]["note"] == "the layer is gone from the model"
    for name in (FC1, FC2, QKV, PROJ):
        assert rows[name]["engine"]["matches_request"] is True
    assert not [warning for warning in report["warnings"] if "another element type" in warning]
    assert "2 gone from the model" in Path("out/report.html").read_text()


def test_compare_says_which_layers_it_leaves_out(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lsp_deploy.comparing._profiles", lambda *_, **__: [])
    model = canonicalize(load_model(bare), max_opset=19, needed_opset=19)
    dead = np.ones((64, 256), bool)
    dead[:, 32:96] = False
    made = pruned(model, {FC1: dead})
    save_model(made, Path("smaller.onnx"))
    compared = compare_models(
        bare,
        Path("smaller.onnx"),
        data="random",
        labels=None,
        label_column=None,
        preprocess=None,
        samples=8,
        batches=[1],
        shapes=None,
        layers=True,
        threads=1,
    )
    assert len(compared.layers) == len(linear_layers(model)) - 2
    assert "--layers leaves out 2 of 18 linear layers" in " ".join(capsys.readouterr().out.split())


def test_two_four_zeros_stay_two_of_four(bare: Path) -> None:
    """Three dead neurons would shift the groups of the layer behind them; the group of four beside them goes."""
    model = canonicalize(load_model(bare), max_opset=19, needed_opset=19)
    weights = {layer.name: layer.weight() for layer in linear_layers(model)}
    dead = np.ones((64, 256), bool)
    dead[:, [*range(8, 12), 33, 34, 35]] = False
    made = pruned(model, {FC1: dead, FC2: two_four_mask(np.abs(weights[FC2]))}, two_four=[FC2])
    fc2 = next(layer for layer in linear_layers(made) if layer.name == FC2).weight()
    assert fc2.shape == (252, 64)
    assert ((fc2.reshape(63, 4, 64) != 0).sum(axis=1) == 2).all()

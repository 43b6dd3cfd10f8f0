"""The answers of the pruner on real graphs: masks, weights, words, and what layers share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from networks import ASSETS  # noqa: E402

from lsp_deploy.allocation.pruning import Pruning  # noqa: E402
from lsp_deploy.hardware.target import load_target  # noqa: E402
from lsp_deploy.recipe import Recipe  # noqa: E402
from lsp_deploy.search.pruner import GRADUAL_FROM, NetworkPruner  # noqa: E402
from lsp_deploy.steps.calibration import open_data  # noqa: E402
from lsp_deploy.steps.preparation import prepare  # noqa: E402
from lsp_deploy.steps.pruning import choose_pruner  # noqa: E402

INSIDE = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSP_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pruner_of(path: Path = ASSETS / "digits_vit.onnx", **asked: object) -> NetworkPruner:
    data = {} if "calibration_data" in asked else {"calibration_data": str(ASSETS / "calibration.npz"), "samples": 40}
    block = {"block": "16x16"} if asked.get("sparsity", "block") == "block" else {}
    recipe = Recipe.model_validate({"target": "a100", "sparsity": "block"} | block | data | asked)
    target = load_target(recipe.target)
    prepared = prepare(path, recipe, target)
    pruner = choose_pruner(prepared, open_data(prepared, recipe), recipe, target, 1).pruner
    assert isinstance(pruner, NetworkPruner)
    return pruner


def assert_same(one: Pruning, other: Pruning) -> None:
    for field in ("masks", "weights", "biases", "constants"):
        ours, theirs = getattr(one, field), getattr(other, field)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert (one.reasons, one.notes, one.recoveries) == (other.reasons, other.notes, other.recoveries)


def test_blocks_come_with_weights_reasons_and_the_analysis() -> None:
    pruner = pruner_of(flops=0.6)
    pruning = pruner.blocks(0.6)
    assert pruning.asked == "block" and "exact" in pruning.method and "one-shot" in pruning.method
    analysis = pruning.analysis
    assert analysis is not None
    assert (analysis.objective, analysis.samples, analysis.measure, analysis.keep) == ("top1", 32, "flops", 0.6)
    layers = {layer.name: layer for layer in pruner.block_search.network.layers}
    assert pruning.reasons.keys() == layers.keys()
    for name, point in analysis.curves.items():
        mask = pruning.masks.get(name)
        assert point.removed == (0 if mask is None else int((~mask[::16, ::16]).sum()))
        assert len(point.delta) - 1 == -(-layers[name].K // 16) * -(-layers[name].N // 16)
        assert point.delta[0] == 0
        curve = pruner._sensitivity.layers[name]
        # The last point is all blocks, in whatever order.
        assert point.delta[-1] == pytest.approx(curve.delta[-1], rel=1e-6)
    for name, mask in pruning.masks.items():
        assert pruning.weights[name].shape == mask.shape and pruning.weights[name].dtype == np.float32
        assert (pruning.weights[name][~mask] == 0).all()


def test_the_same_question_has_the_same_answer_in_any_order() -> None:
    one, other = pruner_of(), pruner_of()
    first = one.blocks(0.6)
    other.blocks(0.9)
    other.two_four([layer.name for layer in other.block_search.network.layers if layer.role == "fc1"], "auto")
    again = other.blocks(0.6)
    assert_same(first, pruner_of().blocks(0.6))
    again.notes = first.notes  # bases for 2:4 are told of, too
    assert_same(first, again)


def test_auto_is_gradual_where_the_damage_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = pruner_of()
    assert pruner.block_search.predicted_damage(0.9) < GRADUAL_FROM
    assert pruner.blocks(0.9).analysis.search == "one-shot"
    monkeypatch.setattr("lsp_deploy.search.pruner.GRADUAL_FROM", 0.0)
    assert pruner.blocks(0.9).analysis.search == "gradual"
    assert pruner_of(recover="none").blocks(0.9).analysis.search == "one-shot"


def test_two_four_keeps_two_of_every_four_and_fits_what_is_left() -> None:
    pruner = pruner_of(sparsity="2:4")
    names = [layer.name for layer in pruner._network("interleaved").layers if layer.role in INSIDE][:6]
    pruning = pruner.two_four(names, "2:4")
    assert set(pruning.masks) == set(names)
    for name in names:
        mask = pruning.masks[name]
        assert (mask.reshape(-1, 4, mask.shape[1]).sum(axis=1) == 2).all()
        assert (pruning.weights[name][~mask] == 0).all()
        assert pruning.patterns[name] == "2:4"
        assert pruning.recoveries[name].method == "reconstruct"
    assert pruning.analysis is None
    assert any("bases changed" in note for note in pruning.notes)


def test_what_two_four_does_to_a_layer_alone_is_predicted() -> None:
    pruner = pruner_of(sparsity="2:4")
    names = [layer.name for layer in pruner._network("interleaved").layers if layer.role in INSIDE]
    damages = pruner.two_four_damages(names)
    assert damages.keys() == set(names)
    assert all(np.isfinite(damage) and damage > 0 for damage in damages.values())
    pruner.two_four(names[:3], "auto")
    assert pruner.two_four_damages(names) == damages


def test_excluded_layers_and_single_blocks_stay_and_say_why() -> None:
    pruner = pruner_of(block="64x64", exclude="blocks.2/")
    pruning = pruner.blocks(0.7)
    layers = {layer.name: layer for layer in pruner.block_search.network.layers}
    for name, layer in layers.items():
        if "blocks.2/" in name:
            assert pruning.reasons[name] == "left dense: --exclude blocks.2/ names it"
        elif layer.K <= 64 and layer.N <= 64:
            assert pruning.reasons[name] == f"left dense: {layer.K} × {layer.N} is a single block"
        else:
            continue
        assert name not in pruning.masks


@pytest.mark.parametrize(
    ("asked", "kind"), [({"flops": 0.5}, "flops"), ({"max_parameters": 100_000}, "parameters"), ({}, None)]
)
def test_the_fraction_that_a_budget_leaves(asked: dict[str, object], kind: str | None) -> None:
    pruner = pruner_of(**asked)
    if kind is None:
        assert pruner.asked_keep is None
    elif kind == "flops":
        assert pruner.asked_keep == 0.5
    else:
        entries = sum(layer.K * layer.N for layer in pruner.block_search.network.layers)
        assert pruner.asked_keep == pytest.approx(100_000 / entries)


def test_steps_are_kept_for_this_question_alone_and_forgotten_at_the_end(cache: Path) -> None:
    keys = {
        pruner_of(**asked)._search_key()
        for asked in (
            {}, {"seed": 1}, {"block": "32x32"}, {"allocator": "lsp"}, {"min_density": 0.1}, {"exclude": "x"},
            {"objective": "output"}, {"recover": "none"}, {"basis": "keep"}, {"samples": 30}, {"max_size_mb": 1},
            {"precision": "fp32"},
        )
    }  # fmt: skip
    assert len(keys) == 12
    assert pruner_of(flops=0.6)._search_key() == pruner_of(flops=0.9)._search_key()  # steps are shared by budgets
    pruner = pruner_of(search="gradual")
    pruner.blocks(0.9)
    assert len(list((cache / "search" / pruner._search_key()).iterdir())) == 2
    pruner.finish()
    assert not (cache / "search" / pruner._search_key()).exists()


def write_tied(path: Path, batch: int | str) -> Path:
    """Write x [batch, 5, 16] -> two residual MLP blocks whose second layers are one weight -> logits [batch, 10]."""
    random = np.random.default_rng(0)
    sizes = {"up0": (16, 128), "up1": (16, 128), "down": (128, 16), "head": (16, 10)}
    weights = [
        numpy_helper.from_array(random.standard_normal(size).astype(np.float32) / 4, name)
        for name, size in sizes.items()
    ]
    nodes, x = [], "x"
    for block in range(2):
        nodes += [
            helper.make_node("MatMul", [x, f"up{block}"], [f"a{block}"], name=f"up{block}"),
            helper.make_node("Relu", [f"a{block}"], [f"b{block}"]),
            helper.make_node("MatMul", [f"b{block}", "down"], [f"c{block}"], name=f"down{block}"),
            helper.make_node("Add", [f"c{block}", x], [f"d{block}"]),
        ]
        x = f"d{block}"
    nodes.append(helper.make_node("ReduceMean", [x], ["pooled"], axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["pooled", "head"], ["logits"], name="head"))
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 5, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("search", ["one-shot", "gradual"])
def test_layers_that_share_a_weight_share_its_mask_and_count_twice(tmp_path: Path, search: str) -> None:
    pruner = pruner_of(
        write_tied(tmp_path / "m.onnx", "batch"), calibration_data="random", samples=20, recover="reconstruct",
        search=search,
    )  # fmt: skip
    pruning = pruner.blocks(0.5)
    shared = [pruning.masks[name] for name in ("down0", "down1")]
    np.testing.assert_array_equal(shared[0], shared[1])
    assert not shared[0].all()
    assert pruning.reasons["down0"] == pruning.reasons["down1"]
    assert "down0" not in pruning.weights, "a shared weight is masked, not refitted"
    layers = pruner.block_search.network.layers
    flops = {layer.name: layer.M * layer.K * layer.N for layer in layers}
    left = sum(count * pruning.masks[name].mean() if name in pruning.masks else count for name, count in flops.items())
    assert 0.42 <= left / sum(flops.values()) <= 0.5


@pytest.mark.parametrize("search", ["one-shot", "gradual"])
def test_a_fixed_batch_gives_what_a_dynamic_one_does(tmp_path: Path, search: str) -> None:
    prunings = []
    for batch in (4, "batch"):
        pruner = pruner_of(
            write_tied(tmp_path / f"{batch}.onnx", batch), calibration_data="random", samples=10,
            recover="reconstruct", search=search,
        )  # fmt: skip
        prunings.append(pruner.blocks(0.6))
    assert prunings[0].masks and prunings[0].masks.keys() == prunings[1].masks.keys()
    for name in prunings[0].masks:
        np.testing.assert_array_equal(prunings[0].masks[name], prunings[1].masks[name])
    for name in prunings[0].weights:
        np.testing.assert_allclose(prunings[0].weights[name], prunings[1].weights[name], rtol=0, atol=1e-4)


def test_a_shared_weight_gets_no_two_four_and_says_so(tmp_path: Path) -> None:
    pruner = pruner_of(
        write_tied(tmp_path / "m.onnx", "batch"), calibration_data="random", samples=20, recover="reconstruct",
        sparsity="2:4",
    )  # fmt: skip
    pruning = pruner.two_four(["up0", "down0", "down1"], "2:4")
    assert set(pruning.masks) == {"up0"}
    assert pruning.reasons == dict.fromkeys(("down0", "down1"), "left dense: it shares its weight with another layer")


def test_a_shared_weight_counts_once_in_a_budget_of_parameters(tmp_path: Path) -> None:
    pruner = pruner_of(
        write_tied(tmp_path / "m.onnx", "batch"), calibration_data="random", samples=20, max_parameters=3152
    )
    assert pruner.asked_keep == pytest.approx(3152 / (2 * 16 * 128 + 128 * 16 + 16 * 10))


@pytest.mark.parametrize(("samples", "words"), [(2, "too few to hold any out"), (20, "held out from the fit")])
def test_a_recovery_says_what_it_was_judged_on(samples: int, words: str) -> None:
    pruner = pruner_of(calibration_data=str(ASSETS / "calibration.npz"), samples=samples, flops=0.6)
    recoveries = pruner.blocks(0.6).recoveries
    assert recoveries and all(words in one.reason for one in recoveries.values())


def test_samples_that_memory_does_not_allow_are_not_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsp_deploy.search.network._MOST_BYTES", 1)
    assert "weights were reconstructed on 8 of 32 samples: more take too much memory" in pruner_of().blocks(0.8).notes
    assert not any("too much memory" in note for note in pruner_of(recover="none").blocks(0.8).notes)

"""Figures of pruning: what survives, patterns of blocks, δ-curves, attention; and the words that go with them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_samples import sample_attention, sample_plan, sample_pruning, sample_report

from lsp_deploy.allocation.pruning import Analysis, ChosenPoint, Pruning
from lsp_deploy.plan import Plan, RecoveryDecision
from lsp_deploy.reporting.attention_levels import attention_section, levels
from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.reporting.pruning_figures import allocation_bars, attention_strips, block_patterns, delta_curves
from lsp_deploy.reporting.pruning_rows import layer_blocks, pruning_section
from lsp_deploy.reporting.pruning_words import loss_words, pruning_words, recovery_words
from lsp_deploy.steps.attention_maps import AttentionMaps, BlockAttention, HeadMaps


@pytest.fixture(scope="module")
def plan() -> Plan:
    return sample_plan(blocks=4, width=256, pattern="block")


def pixels(uri: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    return np.asarray(image.convert("RGBA"))[..., 3] / 255


def test_bars_show_what_survives_in_graph_order(plan: Plan) -> None:
    bars = allocation_bars(layer_rows(plan, None))
    assert [bar.role for bar in bars[:6]] == ["patch", "qkv", "proj", "fc1", "fc2", "qkv"]
    assert bars[0].survives_percent == 100
    for bar, layer in zip(bars, plan.layers, strict=True):
        assert bar.survives_percent == pytest.approx(100 * (1 - layer.sparsity.zeros), abs=1e-3)
    assert [bar.position for bar in bars if bar.starts_block] == [1, 5, 9, 13]


def test_a_role_without_a_colour_is_drawn_as_other(plan: Plan) -> None:
    odd = plan.branch()
    odd.layers[1].role = '"><b>'
    assert allocation_bars(layer_rows(odd, None))[1].role == "other"


def test_patterns_show_one_pixel_a_block(plan: Plan) -> None:
    patterns = block_patterns(plan)
    assert [one.caption for one in patterns.shown[:5]] == ["0 qkv", "0 proj", "0 fc1", "0 fc2", "2 qkv"]
    assert {one.caption.split()[0] for one in patterns.shown} == {"0", "2", "3"}
    assert {one.caption.split()[0] for one in patterns.rest} == {"1"}
    for one in patterns.shown + patterns.rest:
        mask = plan.masks[one.name][::32, ::32]
        np.testing.assert_array_equal(pixels(one.uri), mask)
        assert (one.height / mask.shape[0], one.width / mask.shape[1]) == (5, 5)  # a block is as large in all of them


def test_patterns_of_many_blocks_are_reduced_to_shares() -> None:
    plan = sample_plan(blocks=1, width=64)
    layer = plan.layers[1]
    plan.block_shape, layer.sparsity.pattern = (1, 1), "block"
    mask = np.zeros((192, 384), bool)
    mask[:96] = True
    mask[96:, ::2] = True
    plan.masks.clear()
    plan.masks[layer.name] = mask
    shares = pixels(block_patterns(plan).shown[0].uri)
    assert shares.shape == (96, 192)
    np.testing.assert_allclose(shares[:48], 1)
    np.testing.assert_allclose(shares[48:], 0.5, atol=1 / 30)


def test_without_blocks_there_are_no_patterns() -> None:
    patterns = block_patterns(sample_plan(blocks=1, width=64))
    assert patterns.shown == patterns.rest == []


def analysed(delta: np.ndarray, removed: int) -> Pruning:
    curves = {"layer": ChosenPoint(delta, removed)}
    return Pruning(asked="block", analysis=Analysis("top1", 8, 0.0, "exact", "one-shot", "flops", 0.5, 0.0, curves))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.data())
def test_thinned_curves_keep_their_ends_and_the_chosen_point(values: list[float], data: st.DataObject) -> None:
    delta = np.array([0.0, *values])
    removed = data.draw(st.integers(0, len(values)))
    blocks = layer_blocks(analysed(delta, removed), "layer")
    assert blocks is not None
    assert (blocks.total, blocks.removed) == (len(values), removed)
    assert blocks.predicted_delta == delta[removed]
    assert (blocks.curve_removed[0], blocks.curve_removed[-1]) == (0, len(values))
    assert len(blocks.curve_removed) == len(blocks.curve_delta) <= 41
    np.testing.assert_allclose(blocks.curve_delta, delta[blocks.curve_removed], rtol=1e-5, atol=1e-12)


def test_layers_that_were_not_analysed_have_no_curve() -> None:
    assert layer_blocks(None, "layer") is None
    assert layer_blocks(Pruning(asked="2:4"), "layer") is None
    assert layer_blocks(analysed(np.zeros(3), 0), "another") is None


def test_curves_stay_inside_their_figure(plan: Plan) -> None:
    pruning = sample_pruning(plan)
    curves = delta_curves(layer_rows(plan, None, pruning=pruning))
    assert len(curves.shown) + len(curves.rest) == len(plan.masks)
    for one in curves.shown + curves.rest:
        point = pruning.analysis.curves[one.name]  # type: ignore[union-attr]
        assert one.chosen_x == pytest.approx(100 * point.removed / (len(point.delta) - 1))
        places = [float(number) for pair in one.path[1:].split("L") for number in pair.split()]
        assert min(places) >= 0 and max(places) <= 100
        assert 0 <= one.chosen_y <= 100 and 0 <= one.zero_y <= 100
        assert one.path.startswith(f"M0.0 {one.zero_y:.1f}")


def test_a_flat_curve_is_drawn() -> None:
    plan = sample_plan(blocks=1, width=64, pattern="block")
    pruning = sample_pruning(plan)
    assert pruning.analysis is not None
    name = plan.layers[1].name
    pruning.analysis.curves[name] = ChosenPoint(np.zeros(5), 2)
    assert delta_curves(layer_rows(plan, None, pruning=pruning)).shown[0].chosen_y == 100


def test_attention_tiles_stand_side_by_side() -> None:
    maps = sample_attention(blocks=3, heads=2, side=4)
    section = attention_section(maps)
    strips = attention_strips(section)
    assert [strip.title for strip in strips] == ["0", "1", "2"]
    assert strips[0].compressed is None
    assert strips[2].compressed is not None
    assert strips[2].compressed.note == "1 inactive head: 1"
    assert strips[2].dense.note == ""
    image = pixels(strips[1].dense.uri)
    assert image.shape == (4, 9) == (strips[1].dense.height, strips[1].dense.width)
    weights = maps.blocks[1].dense.weights
    for head, tile in enumerate((image[:, :4], image[:, 5:])):
        np.testing.assert_allclose(tile, weights[head] / weights[head].max(), atol=1 / 28)
    assert not image[:, 4].any()
    assert strips[1].dense.frames == "M0 0h4v4h-4zM5 0h4v4h-4z"


def test_an_even_head_is_pale_not_noise() -> None:
    even = HeadMaps(np.full((1, 3, 3), 1 / 9, np.float32), [0])
    section = attention_section(AttentionMaps([BlockAttention("a", "mean over all tokens", even, None)]))
    assert section is not None
    np.testing.assert_array_equal(levels(section.blocks[0], compressed=False), np.full((1, 3, 3), 64))
    assert levels(section.blocks[0], compressed=True).shape == (0, 3, 3)


def test_fewer_heads_are_said_in_words() -> None:
    maps = [HeadMaps(np.full((heads, 2, 2), 0.25, np.float32), []) for heads in (3, 2)]
    section = attention_section(AttentionMaps([BlockAttention("a", "class token", maps[0], maps[1])]))
    (strip,) = attention_strips(section)
    assert strip.compressed is not None
    assert (strip.dense.note, strip.compressed.note) == ("", "2 of 3 heads left")


def test_the_section_says_how_blocks_were_chosen(plan: Plan) -> None:
    section = pruning_section(sample_pruning(plan))
    assert section is not None
    assert (section.objective, section.samples, section.keep_fraction) == ("top1", 640, 0.65)
    assert section.basis == "estimated"
    two_four = pruning_section(Pruning(asked="2:4", method="activation", notes=["a note"]))
    assert two_four is not None
    assert (two_four.method, two_four.objective, two_four.notes) == ("activation", None, ["a note"])
    assert pruning_section(None) is None


def test_recovery_in_words(plan: Plan) -> None:
    changed = plan.branch()
    changed.layers[1].recovery = RecoveryDecision(
        method="reconstruct", fits="residual stream", error_before=0.31, error_after=0.0123, reason="why"
    )
    changed.layers[2].recovery = RecoveryDecision(reason="the error rose")
    rows = layer_rows(changed, None)
    assert recovery_words(rows[1]) == (
        "refitted to the residual stream: relative error 0.31 → 0.012 on held-out samples (measured); why"
    )
    assert recovery_words(rows[2]) == "masked weights kept: the error rose"
    assert recovery_words(rows[0]) == ""


def test_pruning_in_words(plan: Plan) -> None:
    words = pruning_words(layer_rows(plan, None))
    assert words.startswith("pruning: 16 of 18 linear layers (16 block); ")
    assert "of FLOPs left (counted); surviving weights refitted in 14" in words
    assert "12.5 % of FLOPs left" in pruning_words(layer_rows(plan, None), 0.125)
    for layer in (dense := plan.branch()).layers:
        layer.sparsity.pattern, layer.sparsity.zeros = "dense", 0.0
    assert pruning_words(layer_rows(dense, None)) == "pruning: none of 18 linear layers has zeros"


def test_predicted_beside_measured_loss(plan: Plan) -> None:
    section = pruning_section(sample_pruning(plan))
    report = sample_report(plan)
    words = loss_words(section, report.budget, report.fidelity)
    assert words is not None
    assert words.startswith("loss: predicted 0.0312 nats of cross-entropy")
    assert words.endswith("found 0.78 points of top-1 (expectation over measured outputs)")
    assert "16.2 dB" in (loss_words(section, None, report.fidelity) or "")
    assert "found" not in (loss_words(section, None, None) or "found")
    assert loss_words(None, report.budget, report.fidelity) is None

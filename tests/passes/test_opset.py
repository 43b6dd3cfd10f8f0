"""Raising and lowering the opset keeps what every operator means."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, only, operators

from lsp_deploy.errors import UserError
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.lower_opset import LowerOpsetPass
from lsp_deploy.passes.raise_opset import RaiseOpsetPass

REDUCTIONS = ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
WEIGHTS: dict[str, Any] = {
    "axes": np.array([-1], np.int64),
    "none": np.zeros(0, np.float32),
    "scales": np.array([1, 1, 2], np.float32),
    "pads": np.array([0, 0, 1, 0, 0, 1], np.int64),
    "zero": np.float32(0),
    "indices": np.array([[0], [1]], np.int64),
    "updates": np.zeros((2, 5, 8), np.float32),
    "sizes": np.array([3, 5], np.int64),
}


def model(nodes: str, opset: int, **options: Any) -> ir.Model:
    return graph(nodes, opset=opset, weights=WEIGHTS, **options)


def raised(before: ir.Model, version: int) -> ir.Model:
    after = before.clone()
    assert RaiseOpsetPass(version)(after).modified
    assert after.opset_imports[""] == version
    assert_same_outputs(before, after)
    assert not RaiseOpsetPass(version)(after).modified
    return after


def lowered(before: ir.Model, version: int) -> ir.Model:
    after = before.clone()
    assert LowerOpsetPass(version)(after).modified
    assert after.opset_imports[""] == version
    assert_same_outputs(before, after)
    return after


@pytest.mark.parametrize("version", [18, 20, 21])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_axes_of_a_reduction_become_an_input(kind: str, version: int) -> None:
    after = raised(model(f"y = Reduce{kind}<axes = [1, -1], keepdims = 0>(x)", 13, y="float[2] y"), version)
    assert only(after, f"Reduce{kind}").inputs[1].const_value.numpy().tolist() == [1, -1]


def test_reduction_over_everything_stays_one() -> None:
    after = raised(model("y = ReduceMean<keepdims = 0>(x)", 13, y="float y"), 20)
    assert len(only(after, "ReduceMean").inputs) == 1


@pytest.mark.parametrize("version", [18, 21])
def test_split_in_equal_parts_counts_them(version: int) -> None:
    nodes = "a, b, c, d = Split<axis = -1>(x) y = Sum(a, b, c, d)"
    after = raised(model(nodes, 13, y="float[2, 5, 2] y"), version)
    assert only(after, "Split").attributes["num_outputs"].as_int() == 4


def test_split_by_sizes_stays() -> None:
    after = raised(model("a, y = Split<axis = -1>(x, sizes)", 13, y="float[2, 5, 5] y"), 18)
    assert "num_outputs" not in only(after, "Split").attributes


@pytest.mark.parametrize(
    "options",
    ['mode = "linear"', 'mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"'],
)
def test_resize_computes_the_same(options: str) -> None:
    raised(model(f"y = Resize<{options}>(x, none, scales)", 13, y="float[2, 5, 16] y"), 20)


def test_pad_scatter_and_casts_compute_the_same() -> None:
    nodes = """
        p = Pad(x, pads, zero) s = ScatterND(x, indices, updates) c = Cast<to = 10>(p) d = Cast<to = 1>(c)
        e = Concat<axis = -1>(d, s) y = ReduceSum(e, axes)"""
    raised(model(nodes, 13, y="float[2, 5, 1] y"), 21)


@pytest.mark.parametrize("version", [20, 21])
def test_rois_are_rounded_as_before(version: int) -> None:
    weights = {"rois": np.array([[0, 0, 3, 3]], np.float32), "image": np.zeros(1, np.int64)}
    nodes = "y = RoiAlign<output_height = 2, output_width = 2, sampling_ratio = 2>(x, rois, image)"
    raised(graph(nodes, x="float[1, 2, 6, 6] x", y="float[1, 2, 2, 2] y", opset=13, weights=weights), version)


def test_grid_sample_computes_the_same_both_ways() -> None:
    weights = {"grid": np.random.default_rng(0).uniform(-1, 1, (1, 3, 3, 2)).astype(np.float32)}
    nodes = 'y = GridSample<mode = "bilinear">(x, grid)'
    before = graph(nodes, x="float[1, 2, 6, 6] x", y="float[1, 2, 3, 3] y", opset=16, weights=weights)
    after = raised(before, 20)
    assert only(after, "GridSample").attributes["mode"].as_string() == "linear"
    assert only(lowered(after, 19), "GridSample").attributes["mode"].as_string() == "bilinear"


def test_group_normalization_of_unknown_channels_is_refused() -> None:
    weights = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    nodes = "y = GroupNormalization<num_groups = 2>(x, scale, bias)"
    unknown = graph(nodes, x="float[1, C, 6] x", y="float[1, C, 6] y", opset=18, weights=weights)
    with pytest.raises(UserError, match="GroupNormalization changed in opset 21"):
        RaiseOpsetPass(21)(unknown)


def test_nodes_of_branches_are_converted_too() -> None:
    nodes = """
        m = ReduceMax<keepdims = 0>(x) c = Cast<to = 9>(m)
        y = If (c) <
            then_branch = t () => (float[2, 5, 1] a) { a = ReduceMean<axes = [-1]>(x) },
            else_branch = e () => (float[2, 5, 1] b) { b = ReduceMin<axes = [2]>(x) }
        >
    """
    after = raised(model(nodes, 13, y="float[2, 5, 1] y"), 20)
    lowered(after, 17)


@pytest.mark.parametrize(("version", "ir_version"), [(17, 8), (19, 9), (21, 10), (23, 11)])
def test_the_ir_version_is_that_of_the_opset(version: int, ir_version: int) -> None:
    before = model("y = Exp(x)", 13)
    before.ir_version = 7
    assert raised(before, version).ir_version == ir_version


def test_operators_of_other_domains_stay() -> None:
    before = model("y = com.microsoft.Gelu(x)", 13)
    after = raised(before, 21)
    assert operators(after) == {"Gelu": 1} and after.opset_imports["com.microsoft"] == 1


def operator_set(names: str) -> set[str]:
    return set(names.split())


def changed_operators(since: int, until: int) -> set[str]:
    schemas = onnx.defs.get_all_schemas_with_history()
    return {
        s.name for s in schemas if s.domain == "" and since < s.since_version <= until and onnx.defs.has(s.name, since)
    }


def test_every_operator_that_opsets_14_to_18_changed_is_accounted_for() -> None:
    """ONNX's own converter calls these compatible, or sets attributes to their defaults."""
    compatible = operator_set(
        "Add BatchNormalization CumSum Div GRU GreaterOrEqual Identity If LSTM LeakyRelu LessOrEqual Loop LpPool Mul "
        "PRelu Pad Pow RNN Relu Reshape Resize Scan ScatterElements ScatterND Shape Sub Where"
    )
    converted = {"RoiAlign", "Split", *(f"Reduce{kind}" for kind in (*REDUCTIONS, "LogSum"))}
    assert changed_operators(13, 18) == compatible | converted


@pytest.mark.parametrize("version", [17, 18, 19, 20])
def test_lowers_what_has_the_same_meaning(version: int) -> None:
    nodes = """
        a = ReduceMean(x, axes) b = Reshape(x, shape) c = Transpose<perm = [1, 0]>(b) d = Cast<to = 10, saturate = 1>(c)
        e = Cast<to = 1>(d) f = Transpose<perm = [1, 0]>(e) g = Reshape(f, back) y = Add(g, a)"""
    weights = WEIGHTS | {"shape": np.array([10, 8], np.int64), "back": np.array([2, 5, 8], np.int64)}
    lowered(graph(nodes, opset=21, weights=weights), version)


def test_lowered_split_gets_sizes() -> None:
    nodes = "a, y = Split<axis = 1, num_outputs = 2>(x)"
    after = lowered(model(nodes, 18, y="float[2, 2, 8] y"), 17)
    assert only(after, "Split").inputs[1].const_value.numpy().tolist() == [3, 2]


def test_quantizers_without_newer_attributes_are_lowered() -> None:
    weights = {"s": np.float32(0.02), "z": np.int8(0)}
    nodes = "q = QuantizeLinear<block_size = 0, axis = 1>(x, s, z) y = DequantizeLinear(q, s, z)"
    after = lowered(graph(nodes, opset=21, weights=weights), 17)
    assert "block_size" not in only(after, "QuantizeLinear").attributes


REFUSED = {
    "Gelu": ("y = Gelu(x)", "the operator is newer"),
    "type": ("c = Cast<to = 17>(x) y = Cast<to = 1>(c)", "it computes in float8e4m3fn"),
    "attribute": ('y = Resize<antialias = 1, mode = "linear">(x, none, scales)', "newer attribute antialias"),
    "mode": ('y = Pad<mode = "wrap">(x, pads, zero)', "newer mode"),
    "axes": ("s = Shape(x) i = Gather(s, axes) r = Mod(i, one) y = ReduceMean(x, r)", "its axes are computed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_lowered_is_refused_with_its_name(kind: str) -> None:
    nodes, reason = REFUSED[kind]
    refused = graph(nodes, opset=20, weights=WEIGHTS | {"one": np.ones(1, np.int64)})
    for node in refused.graph:
        node.name = "culprit"
    InferShapesPass()(refused)
    with pytest.raises(
        UserError, match=rf"node culprit: .* cannot be expressed in opset 17.*{reason}.*export the model"
    ):
        LowerOpsetPass(17)(refused)


def test_lowers_to_17_at_most() -> None:
    with pytest.raises(ir.passes.PreconditionError, match="opset 16 is older than 17"):
        LowerOpsetPass(16)(model("y = Exp(x)", 18))

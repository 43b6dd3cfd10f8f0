"""Attention of two models on one sample: found by name or place, classes and windows told apart, dead heads seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_family
from graphs import graph, random_feeds
from numpy.typing import NDArray

from lsp_deploy.model import load_model
from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
from lsp_deploy.steps.attention_maps import attention_maps

TOKENS = 5


def attention(names: tuple[str, ...], scales: NDArray[Any], *, tokens: int = TOKENS, axis: int = -1) -> ir.Model:
    """x [batch, heads, tokens, tokens], scaled head by head, through one Softmax for each name."""
    heads = len(scales)
    lines = "\n".join(
        f"s{index} = Mul(x, scale)\ny{index} = Softmax<axis = {axis}>(s{index})" for index in range(len(names))
    )
    outputs = ", ".join(f"float[batch, {heads}, {tokens}, {tokens}] y{index}" for index in range(len(names)))
    model = graph(
        lines,
        x=f"float[batch, {heads}, {tokens}, {tokens}] x",
        y=outputs,
        weights={"scale": np.asarray(scales, np.float32).reshape(heads, 1, 1)},
    )
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    for node, name in zip(softmaxes, names, strict=True):
        node.name = name
    return model


def softmax(scores: NDArray[Any]) -> NDArray[Any]:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def test_the_class_token_row_on_the_patch_grid() -> None:
    model = attention(("a",), np.array([1, 2]))
    feeds = random_feeds(model, batch=2)
    maps = attention_maps(model, model, feeds)
    assert maps is not None
    (block,) = maps.blocks
    expected = softmax(feeds["x"][0] * np.array([1, 2]).reshape(2, 1, 1))[:, 0, 1:].reshape(2, 2, 2)
    assert (block.name, block.query) == ("a", "class token")
    assert block.compressed is not None
    for found in (block.dense, block.compressed):
        np.testing.assert_allclose(found.weights, expected, rtol=1e-5)
        assert found.weights.dtype == np.float32
        assert found.inactive == []


@pytest.mark.parametrize(("tokens", "shape", "query"), [
    (9, (3, 3), "mean over all tokens"),
    (10, (3, 3), "class token"),
    (11, (3, 3), "class token"),
    (7, (1, 7), "mean over all tokens"),
])  # fmt: skip
def test_which_query_is_shown(tokens: int, shape: tuple[int, int], query: str) -> None:
    model = attention(("a",), np.array([1.0]), tokens=tokens)
    feeds = random_feeds(model, batch=1)
    maps = attention_maps(model, model, feeds)
    assert maps is not None
    assert (maps.blocks[0].query, maps.blocks[0].dense.weights.shape[1:]) == (query, shape)
    weights = softmax(feeds["x"][0])
    expected = weights.mean(axis=1) if query.startswith("mean") else weights[:, 0, tokens - 9 :]
    np.testing.assert_allclose(maps.blocks[0].dense.weights.reshape(1, -1), expected, rtol=1e-5)


def test_a_head_that_attends_to_all_tokens_alike_is_inactive() -> None:
    dense, small = attention(("a",), np.array([1, 1, 1])), attention(("a",), np.array([1, 0, 1]))
    maps = attention_maps(dense, small, random_feeds(dense))
    assert maps is not None and maps.blocks[0].compressed is not None
    assert (maps.blocks[0].dense.inactive, maps.blocks[0].compressed.inactive) == ([], [1])


def test_blocks_are_paired_by_name_and_may_be_gone() -> None:
    dense, small = attention(("a", "b", "c"), np.ones(1)), attention(("c", "a"), np.full(1, 2))
    maps = attention_maps(dense, small, random_feeds(dense))
    assert maps is not None
    assert [(block.name, block.compressed is None) for block in maps.blocks] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]


@pytest.mark.parametrize(("names", "found"), [(("x", "y"), True), (("x",), False)])
def test_blocks_of_other_names_are_paired_by_place_if_equally_many(names: tuple[str, ...], found: bool) -> None:
    dense, small = attention(("a", "b"), np.ones(1)), attention(names, np.ones(1))
    maps = attention_maps(dense, small, random_feeds(dense))
    assert (maps is not None) == found
    if maps is not None:
        assert [block.name for block in maps.blocks] == ["a", "b"]


def test_a_softmax_over_another_axis_is_no_attention() -> None:
    model = attention(("a",), np.ones(2), axis=1)
    assert attention_maps(model, model, random_feeds(model)) is None


def test_a_model_without_attention() -> None:
    model = load_model(export_family("convnext_atto"))
    assert attention_maps(model, model, random_feeds(model, batch=1)) is None


@pytest.mark.parametrize(
    ("family", "heads", "grid", "query"),
    [
        ("vit_tiny_patch16_224", 3, (4, 4), "class token"),
        ("deit_tiny_distilled_patch16_224", 3, (4, 4), "class token"),
        ("swin_tiny_patch4_window7_224", 3, (7, 7), "mean over all tokens"),
    ],
)
def test_real_models_in_sixteen_bit(family: str, heads: int, grid: tuple[int, int], query: str) -> None:
    dense = load_model(export_family(family))
    small = dense.clone()
    CastComputeTypePass("fp16", keep_io=True)(small)
    maps = attention_maps(dense, small, random_feeds(dense, batch=1))
    assert maps is not None
    assert len(maps.blocks) == (4 if family.startswith("swin") else 2)
    first = maps.blocks[0]
    assert (first.dense.weights.shape, first.query) == ((heads, *grid), query)
    assert first.compressed is not None
    np.testing.assert_allclose(first.compressed.weights, first.dense.weights, rtol=0.05)

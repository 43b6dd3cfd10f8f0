"""Groups of blocks: what has to be zero for neurons and heads to be removed, and what goes with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_clip, export_family, export_huggingface_vit

from lsp_deploy.graph.structure import StructureGroup, structure_groups
from lsp_deploy.linear_layers import LinearLayer, linear_layers, replace_weight
from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.remove_dead_structure import dead_structure

VIT, SWIN, EVA = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"


@cache
def canonical(path: Path) -> ir.Model:
    return canonicalize(load_model(path), max_opset=20)


def grouped(path: Path, block: tuple[int, int]) -> tuple[ir.Model, list[LinearLayer], list[StructureGroup]]:
    model = canonical(path).clone()
    layers = linear_layers(model)
    return model, layers, structure_groups(model, layers, block)


def named(layers: list[LinearLayer], role: str, block: int) -> LinearLayer:
    return next(layer for layer in layers if (layer.role, layer.block) == (role, block))


def test_neurons_and_heads_of_a_vit() -> None:
    _, layers, groups = grouped(export_family(VIT), (16, 16))
    heads = [group for group in groups if group.unit == "head"]
    neurons = [group for group in groups if group.unit == "neuron"]
    assert len(heads) == 2 * 3 and len(neurons) == 2 * 48
    qkv, proj = named(layers, "qkv", 0), named(layers, "proj", 0)
    second = heads[1]
    assert second.members == (1,)
    down = np.arange(12)[:, None] * 36
    assert second.blocks[qkv.name].tolist() == (down + np.arange(28, 32)).reshape(-1).tolist()
    queries_and_keys = (down + np.array([4, 5, 6, 7, 16, 17, 18, 19])).reshape(-1)
    assert second.free[qkv.name].tolist() == queries_and_keys.tolist()
    assert second.blocks[proj.name].tolist() == list(range(4 * 12, 8 * 12))
    fc1, fc2 = named(layers, "fc1", 1), named(layers, "fc2", 1)
    last = neurons[-1]
    assert last.members == tuple(range(752, 768))
    assert last.blocks[fc1.name].tolist() == [47 + 48 * row for row in range(12)]
    assert last.blocks[fc2.name].tolist() == list(range(47 * 12, 48 * 12))
    assert not last.free


@pytest.mark.parametrize(("block", "neurons"), [((16, 64), 64), ((64, 16), 64), ((32, 32), 32), ((48, 32), 96)])
def test_blocks_of_another_height_than_width(block: tuple[int, int], neurons: int) -> None:
    _, layers, groups = grouped(export_family(VIT), block)
    sizes = {len(group.members) for group in groups if group.unit == "neuron"}
    assert sizes == {neurons}
    check_partition(layers, groups, block)


def test_heads_that_share_blocks_are_one_group() -> None:
    _, layers, groups = grouped(export_family(SWIN), (64, 64))
    block0 = [group for group in groups if group.unit == "head" and named(layers, "proj", 0).name in group.blocks]
    assert [group.members for group in block0] == [(0, 1), (2,)]


@pytest.mark.parametrize("path", [export_huggingface_vit, export_clip])
def test_separate_projections(path) -> None:
    _, layers, groups = grouped(path(), (16, 16))
    qkv = [layer for layer in layers if (layer.role, layer.block) == ("qkv", 0)]
    proj = named(layers, "proj", 0)
    first = next(group for group in groups if group.unit == "head")
    assert len(qkv) == 3 and len(first.free) == 2 and proj.name in first.blocks
    assert set(first.free) | set(first.blocks) == {layer.name for layer in (*qkv, proj)}
    assert all(blocks.tolist() == [0, 1, 4, 5, 8, 9, 12, 13] for blocks in first.free.values())


def test_gated_neurons() -> None:
    _, layers, groups = grouped(export_family(EVA), (16, 16))
    fc1 = named(layers, "fc1", 0)
    first = next(group for group in groups if fc1.name in group.blocks)
    assert first.blocks[fc1.name].tolist() == sorted(
        [64 * row for row in range(12)] + [32 + 64 * row for row in range(12)]
    )


@pytest.mark.parametrize("family", [VIT, SWIN, EVA])
@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_group_of_zeros_is_removed(family: str, side: str) -> None:
    """One neuron group and one head group: the blocks of either side suffice."""
    model, layers, groups = grouped(export_family(family), (16, 16))
    for unit in ("neuron", "head"):
        group = next(group for group in groups if group.unit == unit)
        ordered = [layer for layer in layers if layer.name in group.blocks]
        for layer in ordered[:-1] if side == "before" else ordered[-1:]:
            replace_weight(layer, without(layer, group.blocks[layer.name], (16, 16)))
    found = dead_structure(model)
    assert len(found.removed) == 4
    assert not found.kept


def without(layer: LinearLayer, blocks: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    weight = layer.weight().copy()
    across = -(-layer.N // block[1])
    for index in blocks.tolist():
        row, column = divmod(index, across)
        weight[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]] = 0
    return weight


def check_partition(layers: list[LinearLayer], groups: list[StructureGroup], block: tuple[int, int]) -> None:
    """Every block of fc1, fc2 and proj is in exactly one group, none of qkv in two."""
    for layer in layers:
        if layer.role not in ("fc1", "fc2", "proj", "qkv"):
            continue
        of_groups = [part[layer.name] for group in groups for part in (group.blocks, group.free) if layer.name in part]
        indices = np.concatenate(of_groups)
        assert len(indices) == len(np.unique(indices))
        if layer.role != "qkv":
            assert len(indices) == -(-layer.K // block[0]) * -(-layer.N // block[1])


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (64, 64)])
@pytest.mark.parametrize("family", [VIT, SWIN])
def test_no_block_is_in_two_groups(family: str, block: tuple[int, int]) -> None:
    _, layers, groups = grouped(export_family(family), block)
    check_partition(layers, groups, block)

"""Shapes, indexing and rearrangement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from lsp_deploy.autodiff.operators.registry import Attributes, ints, operator


@operator("Shape")
def shape(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The shape, or a part of it."""
    return torch.tensor(list(x.shape)[attributes.get("start", 0) : attributes.get("end")], dtype=torch.int64)


@operator("Size")
def size(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """The number of entries."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@operator("Reshape")
def reshape(attributes: Attributes, opset: int, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Another shape; 0 keeps a dimension, -1 is what is left."""
    sizes = ints(target)
    if not attributes.get("allowzero", 0):
        sizes = [x.shape[index] if value == 0 else value for index, value in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """A matrix: the dimensions before `axis`, and those from it on."""
    axis = attributes.get("axis", 1)
    rows = 1
    for value in x.shape[:axis]:
        rows *= value
    return x.reshape(rows, -1)


@operator("Transpose")
def transpose(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """Permute dimensions; reverse them if no order is given."""
    return x.permute(attributes.get("perm") or list(range(x.dim()))[::-1])


@operator("Squeeze")
def squeeze(attributes: Attributes, opset: int, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    """Drop dimensions of size 1."""
    given = ints(axes) or attributes.get("axes")
    return x.squeeze(tuple(given)) if given else x.squeeze()


@operator("Unsqueeze")
def unsqueeze(attributes: Attributes, opset: int, x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
    """Insert dimensions of size 1."""
    given = ints(axes) or attributes["axes"]
    rank = x.dim() + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


@operator("Expand")
def expand(attributes: Attributes, opset: int, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Broadcast to a shape."""
    sizes = ints(target)
    rank = max(x.dim(), len(sizes))
    own, asked = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(sizes)) + sizes
    return x.expand([max(pair) if 0 not in pair else 0 for pair in zip(own, asked, strict=True)])


@operator("Tile")
def tile(attributes: Attributes, opset: int, x: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """Repeat along every dimension."""
    return x.repeat(ints(repeats))


@operator("Concat")
def concat(attributes: Attributes, opset: int, *inputs: torch.Tensor) -> torch.Tensor:
    """Join along an axis."""
    return torch.cat(inputs, attributes["axis"])


@operator("Split")
def split(
    attributes: Attributes, opset: int, x: torch.Tensor, sizes: torch.Tensor | None = None
) -> Sequence[torch.Tensor]:
    """Cut along an axis, into given or nearly equal sizes."""
    axis = attributes.get("axis", 0)
    given = ints(sizes) or attributes.get("split")
    if given:
        return torch.split(x, given, axis)
    parts = attributes.get("num_outputs", attributes["outputs"])
    return torch.split(x, -(-x.shape[axis] // parts), axis)


@operator("Slice")
def slice_(
    attributes: Attributes,
    opset: int,
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """A part of each named axis; steps may be negative."""
    begin, stop = ints(starts), ints(ends)
    along = ints(axes) or list(range(len(begin)))
    for start, end, axis, step in zip(begin, stop, along, ints(steps) or [1] * len(begin), strict=True):
        length = x.shape[axis]
        if step > 0:
            index = [slice(None)] * x.dim()
            index[axis] = slice(start, end, step)
            x = x[tuple(index)]
        else:
            picked = list(range(length))[slice(start, None if end < -length else end, step)]
            x = x.index_select(axis, torch.tensor(picked, device=x.device, dtype=torch.int64))
    return x


@operator("Gather")
def gather(attributes: Attributes, opset: int, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick entries along an axis."""
    axis = attributes.get("axis", 0) % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def gather_elements(attributes: Attributes, opset: int, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick entries along an axis, by position."""
    axis = attributes.get("axis", 0)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@operator("GatherND")
def gather_nd(attributes: Attributes, opset: int, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick slices by index tuples; no batch dimensions."""
    if attributes.get("batch_dims", 0):
        raise ValueError("GatherND with batch_dims is not supported")
    return x[tuple(indices.unbind(-1))]


@operator("ScatterND")
def scatter_nd(
    attributes: Attributes, opset: int, x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor
) -> torch.Tensor:
    """Replace slices by index tuples."""
    if attributes.get("reduction", "none") != "none":
        raise ValueError("ScatterND with a reduction is not supported")
    return x.index_put(tuple(indices.unbind(-1)), updates)


@operator("ConstantOfShape")
def constant_of_shape(attributes: Attributes, opset: int, target: torch.Tensor) -> torch.Tensor:
    """A tensor filled with one value."""
    value = attributes.get("value")
    fill = torch.zeros(1) if value is None else value
    return fill.reshape(-1)[:1].expand(ints(target) or []).clone() if ints(target) else fill.reshape(())


@operator("Range")
def range_(
    attributes: Attributes, opset: int, start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """start, start + delta, ... below limit."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@operator("Pad")
def pad(
    attributes: Attributes,
    opset: int,
    x: torch.Tensor,
    pads: torch.Tensor,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a border: constant, reflect or edge; negative pads cut."""
    amounts = ints(pads)
    along = [axis % x.dim() for axis in ints(axes)] or list(range(x.dim()))
    begin, end = [0] * x.dim(), [0] * x.dim()
    for position, axis in enumerate(along):
        begin[axis], end[axis] = amounts[position], amounts[position + len(along)]
    if not any(begin) and not any(end):
        return x
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        widths = [amount for axis in reversed(range(x.dim())) for amount in (begin[axis], end[axis])]
        return functional.pad(x, widths, value=0 if value is None else value.item())
    for axis in range(x.dim()):
        index = torch.arange(-begin[axis], x.shape[axis] + end[axis], device=x.device)
        last = x.shape[axis] - 1
        inside = index.clamp(0, last) if mode == "edge" else last - (last - index.abs()).abs()
        x = x.index_select(axis, inside)
    return x


@operator("DepthToSpace")
def depth_to_space(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """Channels into blocks of pixels."""
    block = attributes["blocksize"]
    batch, channels, height, width = x.shape
    if attributes.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    x = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, channels // block**2, height * block, width * block)


@operator("Trilu")
def trilu(attributes: Attributes, opset: int, x: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
    """The upper or lower triangle."""
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if attributes.get("upper", 1) else torch.tril(x, diagonal)

"""Where the entries of a value lie in another one that it was reshaped, transposed or cut out of.

So layouts are compared by what they are, not by the operators that made them. Sizes are numbers here: a size that is
only known by name stands for a large prime, which no coincidence makes equal to another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lsp_deploy.passes.constant_inputs import constant_array

__all__ = ["ConcreteSizes", "View"]

_Factor = tuple[int, int]  # size and stride, in entries of the other value

_FIRST_PRIME = 100_003


class ConcreteSizes:
    """Numbers for sizes, the same number wherever a name occurs."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._named: set[int] = set()

    def of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the shape of a value in numbers, None if a size is zero or has not even a name."""
        if value is None or value.shape is None:
            return None
        sizes = tuple(number for size in value.shape if (number := self._number(size)))
        return sizes if len(sizes) == len(value.shape) else None

    def has_name(self, number: int) -> bool:
        """Return whether a number that `of` gave stands for a name, or for an expression with one."""
        return number in self._named

    def _number(self, size: int | ir.SymbolicDim) -> int | None:
        if isinstance(size, int):
            return size
        if size.value is None:
            return None
        for name in sorted(size.free_symbols()):
            if name not in self._numbers:
                self._numbers[name] = _prime_above(max(self._numbers.values(), default=_FIRST_PRIME))
        number = size.evaluate(self._numbers)
        if not isinstance(number, int):
            return None
        self._named.add(number)
        return number


@dataclass(frozen=True)
class View:
    """A value whose entries lie in another one at regular distances."""

    offset: int
    axes: tuple[tuple[_Factor, ...], ...]
    """What each axis runs through, the last fastest; none of size 1, and none that continues another."""

    @staticmethod
    def whole(sizes: Sequence[int]) -> View:
        """Return the view of a value as it is."""
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        return View(0, tuple(_merged([factor]) for factor in zip(sizes, strides, strict=True)))

    def transposed(self, permutation: Sequence[int]) -> View:
        """Return the view with its axes in another order."""
        return View(self.offset, tuple(self.axes[axis] for axis in permutation))

    def cut(self, axis: int, start: int, length: int) -> View | None:
        """Return the view of a part of an axis; None if its entries are at no regular distances."""
        factors = self.axes[axis]
        inner = math.prod(size for size, _ in factors[1:])
        if start % inner or length % inner:
            return None
        stride = factors[0][1] if factors else 0
        rest = _merged([(length // inner, stride), *factors[1:]])
        return View(self.offset + start // inner * stride, (*self.axes[:axis], rest, *self.axes[axis + 1 :]))

    def reshaped(self, sizes: Iterable[int]) -> View | None:
        """Return the view with other sizes, its entries in the same order; None if they are at no regular distances."""
        left = list(_merged(factor for axis in self.axes for factor in axis))[::-1]
        axes = []
        for size in sizes:
            axis = []
            while size > 1:
                if not left:
                    return None
                count, stride = left.pop()
                if count > size and count % size == 0:  # this axis takes the outer part, the next one the inner part
                    inner = count // size
                    left.append((inner, stride))
                    count, stride = size, stride * inner
                if size % count:
                    return None
                axis.append((count, stride))
                size //= count
            axes.append(_merged(axis))
        return None if left else View(self.offset, tuple(axes))

    def through(self, output: ir.Value, sizes: ConcreteSizes) -> View | None:
        """Return the view of an output of a node whose first input this is; None if the node does more than move."""
        node, shape = output.producer(), sizes.of(output)
        if node is None or node.domain or shape is None:
            return None
        if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"):
            return self.reshaped(shape)
        if node.op_type == "Transpose":
            return self.transposed(node.attributes.get_ints("perm", range(len(shape))[::-1]))
        part = _part(node, output, sizes.of(node.inputs[0]), shape)
        view = None if part is None else self.cut(*part)
        return None if view is None else view.reshaped(shape)


def _part(
    node: ir.Node, output: ir.Value, before: tuple[int, ...] | None, after: tuple[int, ...]
) -> tuple[int, int, int] | None:
    """Return the axis, start and length of what a Split, Gather or Slice takes."""
    if before is None:
        return None
    axis = node.attributes.get_int("axis", 0) % len(before)
    bounds = [constant_array(value) for value in node.inputs[1:]]
    if node.op_type == "Split":
        lengths = [part.shape[axis] for part in node.outputs if part.shape is not None]
        ahead = [length for length in lengths[: output.index()] if isinstance(length, int)]
        return (axis, sum(ahead), after[axis]) if len(ahead) == output.index() else None
    if any(bound is None or bound.size != 1 for bound in bounds):
        return None
    numbers = [int(bound.item()) for bound in bounds if bound is not None]
    if node.op_type == "Gather":
        return axis, numbers[0] % before[axis], 1
    if node.op_type == "Slice" and numbers[3:] in ([], [1]):
        axis = numbers[2] % len(before) if len(numbers) > 2 else 0
        start = numbers[0] if numbers[0] >= 0 else numbers[0] + before[axis]
        return axis, start, after[axis]
    return None


def _merged(factors: Iterable[_Factor]) -> tuple[_Factor, ...]:
    """Drop factors of size 1, and join those that continue each other."""
    merged: list[_Factor] = []
    for size, stride in factors:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return tuple(merged)


def _prime_above(number: int) -> int:
    candidate = number + 2
    while any(candidate % divisor == 0 for divisor in range(3, math.isqrt(candidate) + 1, 2)):
        candidate += 2
    return candidate

"""Structure that zeros leave dead: neurons, attention heads and whole layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lsp_deploy.graph.consumer_input import ConsumerInput, consumer_input
from lsp_deploy.graph.structure import Unit, graph_shapes, unit_starts
from lsp_deploy.graph.unit_axis import Axis, Region, UntraceableError, channel_axis, is_linear, trace_units
from lsp_deploy.passes.constant_layers import replace_zero_layer
from lsp_deploy.passes.drop_units import drop_units
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.layer_bias import add_to_bias
from lsp_deploy.passes.layer_weights import add_initializer, output_axis

__all__ = ["DeadStructure", "KeptZeros", "RemoveDeadStructurePass", "SmallerLayer", "dead_structure"]


@dataclass
class SmallerLayer:
    """What became of a layer: W [K, N] without its dead rows and columns."""

    name: str
    before: tuple[int, int]
    """(K, N)."""
    rows: NDArray[np.int64]
    """Of W as it was: those that are left, none of a layer that is gone."""
    columns: NDArray[np.int64]
    reasons: list[str] = field(default_factory=list)

    @property
    def after(self) -> tuple[int, int]:
        """(K, N) of what is left; (0, 0) if the layer is gone."""
        return len(self.rows), len(self.columns)


@dataclass(frozen=True)
class KeptZeros:
    """A layer that has rows or columns of zeros which stay, and why."""

    name: str
    zero_rows: int
    zero_columns: int
    reason: str


@dataclass
class DeadStructure:
    """What the pass takes out of a model, and what it leaves, by layer in graph order."""

    removed: list[SmallerLayer]
    kept: list[KeptZeros]


def dead_structure(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> DeadStructure:
    """Return what `RemoveDeadStructurePass` would take out of a model, which is not changed.

    Args:
        model: canonical, weights with their zeros, without Q/DQ.
        shapes: concrete input shapes; a dynamic batch is 2 if not given.

    Raises:
        UserError: a dynamic dimension is not given, or ONNX Runtime cannot run the model at these shapes.
    """
    removal = RemoveDeadStructurePass(shapes)
    removal(model.clone())
    return removal.found


class RemoveDeadStructurePass(ir.passes.InPlacePass):
    """act(x @ W1 + b1) @ W2 + b2 becomes the same of smaller W1, b1 and W2; softmax(q k) v @ W + b has fewer heads.

    Three things are dead, and what they still add, which is constant, goes into the bias behind them:

    - a neuron or head that nothing reads: its rows in the next layer are zero;
    - a neuron whose columns are zero, hence act(b1) for every token, or a head whose v is, hence v's bias, because the
      probabilities of each row sum to one. A head whose q or k is zero still takes a mean over tokens;
    - a layer whose weight is zero, up to the residual Add: x + branch(x) becomes x + constant.

    Everything else stays as it is: nodes that are not known to keep units apart, shared weights, single channels of a
    head, and one last neuron or head where the constant cannot take the branch's place. Outputs are equal up to the
    order of float32 sums. Where a plan exists already, its layers no longer fit: `found` says which rows and columns
    are left.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]] | None = None, rows_in_fours: Iterable[str] = ()) -> None:
        """Take what the graph alone does not say.

        Args:
            shapes: concrete input shapes, where more than the batch is dynamic.
            rows_in_fours: names of layers with 2:4 zeros, which lose rows in aligned groups of four only: any others
                would shift the rest, and of four weights more than two could be left.
        """
        super().__init__()
        self.shapes = shapes
        self.rows_in_fours = frozenset(rows_in_fours)
        self.found = DeadStructure([], [])
        """Of the last call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove until nothing more is dead: what reads a dead layer may be dead after it.

        Raises:
            UserError: a dynamic dimension is not given, or ONNX Runtime cannot run the model at these shapes.
        """
        if not any(_has_zeros(node) for node in model.graph if is_linear(node)):
            self.found = DeadStructure([], [])
            return ir.passes.PassResult(model, modified=False)
        removal = _Removal(model, graph_shapes(model, self.shapes), self.rows_in_fours)
        while removal.remove_zero_layers() | removal.remove_units():
            RemoveUnusedNodesPass()(model)
        self.found = removal.found()
        if self.found.removed:
            InferShapesPass()(model)
        return ir.passes.PassResult(model, modified=bool(self.found.removed))

    def requires(self, model: ir.Model) -> None:
        """Check that weights are not quantized yet."""
        for node in model.graph:
            if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
                raise ir.passes.PreconditionError(f"{node.name} quantizes: dead structure is removed before that")


class _Removal:
    """The state of one call: shapes as they become, and what became of each layer."""

    def __init__(self, model: ir.Model, shapes: dict[str, tuple[int, ...]], rows_in_fours: frozenset[str]) -> None:
        self._model, self._graph = model, model.graph
        self._shapes = shapes
        self._rows_in_fours = rows_in_fours
        self._layers = {}
        for node in model.graph:
            if is_linear(node):
                k, n = _matrix(node).shape
                self._layers[node] = SmallerLayer(str(node.name), (k, n), np.arange(k), np.arange(n))
        self._row_obstacles: dict[ir.Node, str] = {}
        self._column_obstacles: dict[ir.Node, str] = {}
        """By layer: why its zeros stay."""

    def remove_zero_layers(self) -> bool:
        """Replace the branches that a layer of zeros makes constant."""
        removed = False
        for node in self._alive():
            if node.graph is None or _matrix(node).any():
                continue
            before = self._alive()
            obstacle = replace_zero_layer(self._graph, node, self._shapes)
            if obstacle is not None:
                self._row_obstacles[node] = self._column_obstacles[node] = obstacle
                continue
            RemoveUnusedNodesPass()(self._model)
            gone = [layer for layer in before if layer.graph is None]
            for layer in gone:
                of_itself = (
                    "its weight is zero"
                    if layer is node
                    else f"its branch is constant: the weight of {node.name} is zero"
                )
                self._layers[layer].reasons.append(of_itself)
            removed |= bool(gone)
        return removed

    def remove_units(self) -> bool:
        """Remove dead neurons and heads."""
        removed = False
        for unit, value, axis in unit_starts(self._graph, self._shapes):
            try:
                region = trace_units(value, axis, self._shapes)
            except UntraceableError as error:
                for node in value.consumers():
                    self._row_obstacles.setdefault(node, str(error))
                for node in _layers_before(value):
                    self._column_obstacles.setdefault(node, str(error))
                continue
            if region.producers and region.consumers:
                removed |= self._shrink(unit, region)
        return removed

    def found(self) -> DeadStructure:
        """Return what was removed and what was not."""
        for node, layer in self._layers.items():
            if node.graph is None:
                layer.rows = layer.columns = np.zeros(0, np.int64)
        removed = [layer for layer in self._layers.values() if layer.after != layer.before]
        kept = []
        for node in self._alive():
            matrix = _matrix(node)
            rows, columns = (int((~matrix.any(axis=axis)).sum()) for axis in (1, 0))
            if rows or columns:
                reasons = [self._row_obstacles.get(node, "it is no layer between others")] if rows else []
                reasons += [self._column_obstacles.get(node) or self._obstacle_behind(node)] if columns else []
                kept.append(KeptZeros(str(node.name), rows, columns, "; ".join(dict.fromkeys(reasons))))
        return DeadStructure(removed, kept)

    def _alive(self) -> list[ir.Node]:
        return [node for node in self._layers if node.graph is not None]

    def _shrink(self, unit: Unit, region: Region) -> bool:
        dead, constants = _dead_units(region, self._shapes)
        what = f"no whole {unit} is dead"
        for consumer in region.consumers:
            self._row_obstacles[consumer] = what
        obstacles = [read.obstacle for read in constants.values() if read.obstacle is not None]
        for producer in region.producers:
            self._column_obstacles[producer] = next(iter(obstacles), what)
        if dead.any() and not (dead := self._in_fours(region, dead)).any():
            for node in (*region.consumers, *region.producers):
                obstacle = f"the {unit}s that are dead are not four in a row, as the 2:4 zeros behind them need"
                self._row_obstacles[node] = self._column_obstacles[node] = obstacle
        gone = dead
        if dead.all():
            gone = dead.copy()
            gone[0] = False  # one unit of nothing can stay, or four
            gone = self._in_fours(region, gone)
        if not gone.any():
            return False
        for consumer in region.consumers:
            self._fold(region, consumer, dead, constants.get(consumer))
        reason = f"{dead.sum()} of {region.count} {unit}s are dead"
        if dead.all():
            # The constants are in the biases: what is left adds nothing.
            for consumer in region.consumers:
                self._clear(consumer)
        kept = np.flatnonzero(~gone)
        for node in region.consumers:
            value = node.inputs[0]
            assert value is not None
            layer = self._layers[node]
            layer.rows = layer.rows[region.axes[value].entries(kept)]
            layer.reasons.append(reason)
        for node in region.producers:
            layer = self._layers[node]
            layer.columns = layer.columns[region.axes[node.outputs[0]].entries(kept)]
            layer.reasons.append(reason)
        drop_units(self._graph, region, kept, self._shapes)
        return True

    def _in_fours(self, region: Region, dead: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which of the `dead` units can go, where layers that read them lose rows in fours only."""
        for node in region.consumers:
            if node.name in self._rows_in_fours:
                value = node.inputs[0]
                assert value is not None
                channels = region.axes[value]
                rows = channels.outer * channels.step
                whole = np.zeros(-(-rows // 4) * 4, bool)
                whole[channels.entries(np.flatnonzero(dead))] = True
                whole = np.repeat(whole.reshape(-1, 4).all(axis=1), 4)[:rows]
                can_go = np.asarray(whole.reshape(channels.outer, channels.count, channels.inner).all(axis=(0, 2)))
                if not can_go[dead].all():
                    return self._in_fours(region, dead & can_go)  # fewer of them, for all readers
        return dead

    def _fold(self, region: Region, node: ir.Node, dead: NDArray[np.bool_], read: ConsumerInput | None) -> None:
        """Add what dead units give, which is constant, to the bias of the layer that reads it."""
        x = node.inputs[0]
        assert x is not None
        entries = region.axes[x].entries(np.flatnonzero(dead))
        rows = _matrix(node)[entries].astype(np.float64)
        if read is None or read.constant is None or not rows.any():
            return
        correction = read.constant[entries] @ rows
        if node.op_type == "Gemm":
            correction = correction * node.attributes.get_float("alpha", 1.0)
        if correction.any():
            shape = self._shapes[str(node.outputs[0].name)]
            for value in (add_to_bias(self._graph, node, correction), node.outputs[0]):
                self._shapes[str(value.name)] = shape

    def _clear(self, node: ir.Node) -> None:
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        array = np.zeros_like(weight.const_value.numpy())
        node.replace_input_with(1, add_initializer(self._graph, f"{node.name}/zeros", array))
        del self._graph.initializers[str(weight.name)]

    def _obstacle_behind(self, node: ir.Node) -> str:
        y = node.outputs[0]
        sizes = self._shapes[str(y.name)]
        index = channel_axis(node, len(sizes))
        try:
            trace_units(y, Axis(index, 1, sizes[index], 1), self._shapes)
        except UntraceableError as error:
            return str(error)
        return "no whole unit is dead"


def _dead_units(
    region: Region, shapes: dict[str, tuple[int, ...]]
) -> tuple[NDArray[np.bool_], dict[ir.Node, ConsumerInput]]:
    """Return which units are dead, and what the consumers that decide it read from those whose columns are zero."""
    empty = {
        (node, part): zero
        for node in region.producers
        for part, zero in enumerate(_zero_parts(_matrix(node), region.axes[node.outputs[0]], columns=True))
    }
    some_empty = any(zero.any() for zero in empty.values())
    dead = np.ones(region.count, bool)
    constants: dict[ir.Node, ConsumerInput] = {}
    for node in region.consumers:
        x = node.inputs[0]
        assert x is not None
        unread = np.logical_and.reduce(_zero_parts(_matrix(node), region.axes[x], columns=False))
        if some_empty and not unread.all():
            read = constants[node] = consumer_input(region, node, shapes)
            if read.constant is not None and read.sources:
                unread = unread | np.logical_and.reduce([empty[source] for source in read.sources])
        dead &= unread
    return dead, constants


def _layers_before(value: ir.Value) -> list[ir.Node]:
    """Return the linear layers whose outputs reach a value without passing another."""
    found: dict[ir.Node, None] = {}
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer()
        if node is None:
            continue
        if is_linear(node):
            found[node] = None
            continue
        new = {operand for operand in node.inputs if operand is not None and operand not in seen}
        seen |= new
        waiting += new
    return list(found)


def _zero_parts(matrix: NDArray[np.float32], channels: Axis, *, columns: bool) -> NDArray[np.bool_]:
    """Return which units have rows (or columns) of zeros alone, for each outer part: bool [outer, count]."""
    used = np.asarray(matrix.any(axis=0 if columns else 1))
    return np.asarray(~used.reshape(channels.outer, channels.count, channels.inner).any(axis=2))


def _has_zeros(node: ir.Node) -> bool:
    matrix = _matrix(node)
    return bool((~matrix.any(axis=0)).any() or (~matrix.any(axis=1)).any())


def _matrix(node: ir.Node) -> NDArray[np.float32]:
    """Return W [K, N] of a linear node, without a Gemm's alpha."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None  # is_linear sees to it
    array = weight.const_value.numpy()
    matrix = array.reshape(array.shape[:2] if node.op_type == "Conv" else array.shape[-2:])
    return matrix.T if output_axis(node, array.ndim) == 0 else matrix

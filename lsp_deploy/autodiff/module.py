"""An ONNX graph as a torch module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lsp_deploy.autodiff.expansion import expand_functions
from lsp_deploy.autodiff.operators import (  # noqa: F401  (importing registers their operators)
    elementwise,
    linear,
    normalization,
    quantization,
    reduction,
    shape,
)
from lsp_deploy.autodiff.operators.registry import HOST_INPUTS, OPERATORS, Operator
from lsp_deploy.errors import UserError

__all__ = ["Execution", "LayerHook", "OnnxModule"]

LayerHook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with a node's first input and its output as the graph runs; returns the output to go on with."""


class OnnxModule(torch.nn.Module):
    """Runs the graph of `model` in torch, node by node; equal to ONNX Runtime up to rounding.

    Floating-point initializers become parameters, in graph order, found by initializer name in `weights`; integer
    ones stay constants on the CPU, where shape arithmetic happens, and follow what they are combined with. Operators
    without an implementation here are written out by their ONNX function bodies.

    Raises:
        UserError: the graph holds an operator that has no torch implementation; names it and its node.
    """

    def __init__(self, model: ir.Model) -> None:
        """Take a model; it is not changed and its tensors are copied."""
        super().__init__()
        model = expand_functions(model, OPERATORS.keys() | {("", "Constant")})
        self.opset = model.opset_imports[""]
        self.hooks_by_node: dict[str, LayerHook] = {}
        self.input_names = [str(value.name) for value in model.graph.inputs if not value.is_initializer()]
        self.output_names = [str(value.name) for value in model.graph.outputs]
        self._constants: dict[str, torch.Tensor] = {}
        self._parameter_names: dict[str, str] = {}
        for value in model.graph.initializers.values():
            self._add_initializer(str(value.name), value)
        self._steps = [_Step(node, self.opset) for node in model.graph]
        self._index_of = {step.name: index for index, step in enumerate(self._steps)}
        self._last_use = _last_uses(self._steps, self.output_names)

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by initializer name."""
        return {name: getattr(self, attribute) for name, attribute in self._parameter_names.items()}

    @property
    def node_names(self) -> list[str]:
        """Names of the nodes in the order they run."""
        return [step.name for step in self._steps]

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the graph.

        Args:
            feeds: inputs by name.

        Returns:
            Outputs by name.
        """
        return self.start(feeds).finish()

    def start(self, feeds: Mapping[str, torch.Tensor], keep: Iterable[str] = ()) -> Execution:
        """Begin a run that can stop at any node and go on from there; no node has run yet.

        Args:
            feeds: inputs by name.
            keep: names of values that are not dropped after their last use.
        """
        return Execution(self, feeds, keep)

    def write_back(self, model: ir.Model) -> None:
        """Put the parameters into the initializers of `model`, in their own element types, bit-exactly."""
        for name, parameter in self.weights.items():
            value = model.graph.initializers[name]
            array = parameter.detach().cpu()
            if array.dtype == torch.bfloat16:
                data = array.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
            else:
                data = array.numpy()
            value.const_value = ir.tensor(np.ascontiguousarray(data), name=name)

    def _add_initializer(self, name: str, value: ir.Value) -> None:
        if value.const_value is None:
            raise UserError(f"initializer {name} has no data; load the model with its external data")
        tensor = _to_torch(value.const_value)
        if not tensor.is_floating_point():
            self._constants[name] = tensor
            return
        attribute = f"weight_{len(self._parameter_names)}"
        self._parameter_names[name] = attribute
        self.register_parameter(attribute, torch.nn.Parameter(tensor))

    def _initializer(self, name: str) -> torch.Tensor:
        if name in self._constants:
            return self._constants[name]
        weight: torch.Tensor = getattr(self, self._parameter_names[name])
        return weight

    def _run(self, step: _Step, inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
        try:
            result = step.function(step.attributes, self.opset, *_on_one_device(step.op_type, inputs))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = [None if value is None else tuple(value.shape) for value in inputs]
            raise UserError(
                f"{step.op_type} ({step.name}) does not run in torch on inputs {shapes}: {error}"
            ) from error
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        hook = self.hooks_by_node.get(step.name)
        if hook is not None and inputs and inputs[0] is not None:
            outputs[0] = hook(inputs[0], outputs[0])
        return outputs


class Execution:
    """A run of a module's graph that stops where it is told to and goes on from there.

    Going node by node to the end costs one forward pass in all. A weight is read when the node that uses it runs: one
    that is changed between two calls takes effect from then on.
    """

    values: dict[str, torch.Tensor]
    """What is live, by ONNX value name: inputs and results that a later node reads, outputs, and what is kept.
    An entry may be replaced before going on. Initializers are not here but in the module."""

    def __init__(self, module: OnnxModule, feeds: Mapping[str, torch.Tensor], keep: Iterable[str] = ()) -> None:
        """Take what `OnnxModule.start` takes."""
        self.values = dict(feeds)
        self._module = module
        self._kept = frozenset(keep)
        self._next = 0

    def advance(self, node_name: str, *, after: bool) -> None:
        """Run up to a node, and drop the values that no later node reads.

        Args:
            node_name: where to stop.
            after: whether that node still runs; if not, the values that it reads are live.

        Raises:
            ValueError: there is no such node, or it has run already.
        """
        index = self._module._index_of.get(node_name)
        if index is None:
            raise ValueError(f"the graph has no node {node_name}")
        stop = index + 1 if after else index
        if stop < self._next:
            raise ValueError(f"node {node_name} has run already")
        self._run_until(stop)

    def finish(self) -> dict[str, torch.Tensor]:
        """Run what is left and return the outputs by name."""
        self._run_until(len(self._module._steps))
        return {name: self._value(name) for name in self._module.output_names}

    def _run_until(self, stop: int) -> None:
        module = self._module
        for index in range(self._next, stop):
            step = module._steps[index]
            outputs = module._run(step, [self._value(name) if name else None for name in step.inputs])
            self.values.update(zip(step.outputs, outputs, strict=False))
            for name in module._last_use.get(index, ()):
                if name not in self._kept:
                    self.values.pop(name, None)
            self._next = index + 1

    def _value(self, name: str) -> torch.Tensor:
        value = self.values.get(name)
        return self._module._initializer(name) if value is None else value


class _Step:
    """One node, ready to run."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.name, self.op_type = str(node.name), node.op_type
        self.inputs = [None if value is None else str(value.name) for value in node.inputs]
        self.outputs = [str(value.name) for value in node.outputs]
        self.attributes = {name: _attribute(attribute, node) for name, attribute in node.attributes.items()}
        self.attributes["outputs"] = len(node.outputs)
        self.function = _function(node, self.attributes)


def _function(node: ir.Node, attributes: Mapping[str, Any]) -> Operator:
    if node.op_type == "Constant":
        constant = _constant(attributes)
        return lambda attributes, opset: constant
    try:
        return OPERATORS[node.domain, node.op_type]
    except KeyError:
        domain = f"{node.domain}::" if node.domain else ""
        raise UserError(f"operator {domain}{node.op_type} (node {node.name}) cannot be differentiated") from None


def _constant(attributes: Mapping[str, Any]) -> torch.Tensor:
    if "value" in attributes:
        value: torch.Tensor = attributes["value"]
        return value
    for key, dtype in (("value_float", torch.float32), ("value_floats", torch.float32)):
        if key in attributes:
            return torch.tensor(attributes[key], dtype=dtype)
    return torch.tensor(attributes["value_int"] if "value_int" in attributes else attributes["value_ints"])


def _attribute(attribute: ir.Attr, node: ir.Node) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return _to_torch(attribute.as_tensor())
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise UserError(
            f"operator {node.op_type} (node {node.name}) runs a graph of its own and cannot be differentiated"
        )
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


def _to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    array = np.array(tensor.numpy(), order="C")
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _on_one_device(op_type: str, inputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Move inputs to the accelerator that one of them is on, but for shapes, axes and the like, which stay."""
    device = next((value.device for value in inputs if value is not None and value.device.type != "cpu"), None)
    if device is None:
        return inputs
    host = HOST_INPUTS.get(op_type, ())
    return [value if value is None or index in host else value.to(device) for index, value in enumerate(inputs)]


def _last_uses(steps: list[_Step], outputs: list[str]) -> dict[int, list[str]]:
    """Return, by step index, the inputs and results that no later step reads; their memory can go."""
    last = {name: index for index, step in enumerate(steps) for name in [*step.inputs, *step.outputs]}
    by_step: dict[int, list[str]] = {}
    for name, index in last.items():
        if name and name not in outputs:
            by_step.setdefault(index, []).append(name)
    return by_step

"""An ONNX graph as a torch module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lsp_deploy.autodiff.operators import (  # noqa: F401  (importing registers their operators)
    elementwise,
    linear,
    normalization,
    quantization,
    reduction,
    shape,
)
from lsp_deploy.autodiff.operators.registry import OPERATORS, Operator
from lsp_deploy.errors import UserError

__all__ = ["LayerHook", "OnnxModule"]

LayerHook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with a node's first input and its output as the graph runs; returns the output to go on with."""


class OnnxModule(torch.nn.Module):
    """Runs the graph of `model` in torch, node by node; equal to ONNX Runtime up to rounding.

    Floating-point initializers become parameters, in graph order, found by initializer name in `weights`; integer
    ones stay constants on the CPU, where shape arithmetic happens.

    Raises:
        UserError: the graph holds an operator that has no torch implementation; names it and its node.
    """

    def __init__(self, model: ir.Model) -> None:
        """Take a model with functions inlined; its tensors are copied."""
        super().__init__()
        self.opset = model.opset_imports[""]
        self.hooks_by_node: dict[str, LayerHook] = {}
        self.input_names = [str(value.name) for value in model.graph.inputs if not value.is_initializer()]
        self.output_names = [str(value.name) for value in model.graph.outputs]
        self._constants: dict[str, torch.Tensor] = {}
        self._parameter_names: dict[str, str] = {}
        for value in model.graph.initializers.values():
            self._add_initializer(str(value.name), value)
        self._steps = [_Step(node, self.opset) for node in model.graph]
        self._last_use = _last_uses(self._steps, self.output_names)

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by initializer name."""
        return {name: getattr(self, attribute) for name, attribute in self._parameter_names.items()}

    def forward(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the graph.

        Args:
            feeds: inputs by name.

        Returns:
            Outputs by name.
        """
        values: dict[str, torch.Tensor] = {**self._constants, **self.weights, **feeds}
        for index, step in enumerate(self._steps):
            inputs = [values[name] if name else None for name in step.inputs]
            outputs = self._run(step, inputs)
            values.update(zip(step.outputs, outputs, strict=False))
            for name in self._last_use.get(index, ()):
                del values[name]
        return {name: values[name] for name in self.output_names}

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

    def _run(self, step: _Step, inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
        try:
            result = step.function(step.attributes, self.opset, *inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = [None if value is None else tuple(value.shape) for value in inputs]
            raise UserError(
                f"{step.op_type} ({step.name}) does not run in torch on inputs {shapes}: {error}"
            ) from error
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        hook = self.hooks_by_node.get(step.name)
        if hook is not None and inputs[0] is not None:
            outputs[0] = hook(inputs[0], outputs[0])
        return outputs


class _Step:
    """One node, ready to run."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.name, self.op_type = str(node.name), node.op_type
        self.inputs = [None if value is None else str(value.name) for value in node.inputs]
        self.outputs = [str(value.name) for value in node.outputs]
        self.attributes = {name: _attribute(attribute) for name, attribute in node.attributes.items()}
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


def _attribute(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return _to_torch(attribute.as_tensor())
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise UserError(f"control flow (attribute {attribute.name} holds a graph) cannot be differentiated")
    value = attribute.value
    return list(value) if isinstance(value, tuple) else value


def _to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    array = np.array(tensor.numpy(), order="C")
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _last_uses(steps: list[_Step], kept: list[str]) -> dict[int, list[str]]:
    """Return, by step index, the values that no later step reads; their memory can go."""
    produced = {name for step in steps for name in step.outputs}
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in [*step.inputs, *step.outputs]:
            if name in produced:
                last[str(name)] = index
    by_step: dict[int, list[str]] = {}
    for name, index in last.items():
        if name and name not in kept:
            by_step.setdefault(index, []).append(name)
    return by_step

"""Elementwise arithmetic, comparisons and activations."""

from __future__ import annotations

from functools import reduce

import torch
from torch.nn import functional

from lsp_deploy.autodiff.operators.registry import OPERATORS, Attributes, onnx_dtype, operator

_UNARY = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Identity": lambda x: x,
    "IsInf": torch.isinf,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": functional.softplus,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
    "HardSwish": functional.hardswish,
}
_BINARY = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x >= 0, x, x * slope),
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "Sub": torch.sub,
}

for _name, _function in _UNARY.items():
    OPERATORS["", _name] = lambda attributes, opset, x, _function=_function: _function(x)
for _name, _function in _BINARY.items():
    OPERATORS["", _name] = lambda attributes, opset, x, y, _function=_function: _function(x, y)


@operator("Div")
def divide(attributes: Attributes, opset: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X / y; integers truncate towards zero, as ONNX has it."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operator("Mod")
def modulo(attributes: Attributes, opset: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The sign follows the divisor, or the dividend with fmod."""
    return torch.fmod(x, y) if attributes.get("fmod", 0) else torch.remainder(x, y)


@operator("Max")
def maximum(attributes: Attributes, opset: int, *inputs: torch.Tensor) -> torch.Tensor:
    """The largest of any number of inputs."""
    return reduce(torch.maximum, inputs)


@operator("Min")
def minimum(attributes: Attributes, opset: int, *inputs: torch.Tensor) -> torch.Tensor:
    """The smallest of any number of inputs."""
    return reduce(torch.minimum, inputs)


@operator("Sum")
def add_all(attributes: Attributes, opset: int, *inputs: torch.Tensor) -> torch.Tensor:
    """The sum of any number of inputs."""
    return reduce(torch.add, inputs)


@operator("Clip")
def clip(
    attributes: Attributes,
    opset: int,
    x: torch.Tensor,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bound x from below and above."""
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Cast")
def cast(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """Convert to another element type."""
    return x.to(onnx_dtype(attributes["to"]))


@operator("CastLike")
def cast_like(attributes: Attributes, opset: int, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Convert to the element type of `like`."""
    return x.to(like.dtype)


@operator("Gelu")
def gelu(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """GELU, exact or by tanh."""
    return functional.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("HardSigmoid")
def hard_sigmoid(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """max(0, min(1, alpha * x + beta))."""
    return torch.clamp(attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5), 0, 1)


@operator("LeakyRelu")
def leaky_relu(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """x, or alpha * x below zero."""
    return functional.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("Elu")
def elu(attributes: Attributes, opset: int, x: torch.Tensor) -> torch.Tensor:
    """x, or alpha * (exp(x) - 1) below zero."""
    return functional.elu(x, attributes.get("alpha", 1.0))


@operator("Where")
def where(
    attributes: Attributes, opset: int, condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """X where the condition holds, else y."""
    return torch.where(condition, x, y)

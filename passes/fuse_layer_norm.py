"""LayerNorm written out in elementary operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter.pattern import MatchResult, OrValue, RewriteRule, RewriteRuleClassBase, RewriteRuleSet

from lsp_deploy.passes.constant_inputs import constant_array, constant_scalar
from lsp_deploy.passes.node_names import name_beside

__all__ = ["FuseLayerNormPass"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class FuseLayerNormPass(ir.passes.InPlacePass):
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta becomes LayerNormalization(x, gamma, beta).

    Mean and variance are over the last axis. The forms are those of torch, whose half-precision exports compute the
    variance in a wider type, of Hugging Face models and of Keras. Decomposed, the squares overflow in half precision;
    the fused operator computes in float32 whatever its input.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the normalization first, then take in gamma, then beta."""
        count = sum(rules.apply_to_model(model) for rules in _RULES)
        return ir.passes.PassResult(model, modified=bool(count))

    def requires(self, model: ir.Model) -> None:
        """Check that the opset has LayerNormalization, which came with 17."""
        if model.opset_imports[""] < 17:
            raise ir.passes.PreconditionError(f"LayerNormalization needs opset 17, not {model.opset_imports['']}")


class _Normalize(RewriteRuleClassBase):
    """(x - mean) / sqrt(variance + epsilon) becomes LayerNormalization(x, 1)."""

    def __init__(self, divide: Callable[..., Any], *, widened: bool) -> None:
        """Take how the division is written, and whether it is in a wider type than `x`."""
        super().__init__()
        self._divide = divide
        self._widened = widened

    def pattern(self, op: Any, x: Any, epsilon: Any, exponent: Any, number: Any) -> Any:
        """Match one way of writing it; `exponent` is that of the square, `number` belongs to the division."""
        deviation = op.Sub(x, op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"]))
        if self._widened:
            deviation = op.Cast(deviation)
        square = OrValue([op.Mul(deviation, deviation), op.Pow(deviation, exponent)])
        variance = op.ReduceMean(square, _allow_other_inputs=True, _outputs=["variance"])
        normal = self._divide(op, deviation, op.Add(variance, epsilon), number)
        return op.Cast(normal) if self._widened else normal

    def check(
        self,
        context: Any,
        x: ir.Value,
        mean: ir.Value,
        variance: ir.Value,
        epsilon: ir.Value,
        exponent: ir.Value | None,
        number: ir.Value | None,
    ) -> MatchResult:
        """Check axes, types and constants."""
        (output,) = context.output_values
        if output.dtype != x.dtype:
            return MatchResult().fail("The result is of another type than x.", output)
        if exponent is not None and constant_scalar(exponent) != 2:
            return MatchResult().fail("The deviation is not squared.", exponent)
        expected = _NUMBERS[self._divide]
        if number is not None and constant_scalar(number) != expected:
            return MatchResult().fail(f"The constant of the division is not {expected}.", number)
        return _check_moments(x, mean, variance, epsilon)

    def rewrite(self, op: Any, x: ir.Value, mean: ir.Value, epsilon: ir.Value, **_: Any) -> ir.Value:
        """Normalize with a scale of ones, which a gamma that follows replaces."""
        return _layer_norm(op, x, _name(mean), epsilon, np.ones(_width(x)))


class _KerasLayerNorm(RewriteRuleClassBase):
    """x s + (beta - mean s), s = gamma / sqrt(variance + epsilon), becomes LayerNormalization(x, gamma, beta)."""

    def pattern(self, op: Any, x: Any, epsilon: Any, exponent: Any, gamma: Any, beta: Any) -> Any:
        """Match the batch normalization that Keras computes LayerNormalization with."""
        mean = op.ReduceMean(x, _allow_other_inputs=True, _outputs=["mean"])
        deviation = op.Sub(x, mean)
        square = OrValue([op.Mul(deviation, deviation), op.Pow(deviation, exponent)])
        variance = op.ReduceMean(square, _allow_other_inputs=True, _outputs=["variance"])
        scale = op.Mul(op.Reciprocal(op.Sqrt(op.Add(variance, epsilon))), gamma)
        return op.Add(op.Mul(x, scale), op.Sub(beta, op.Mul(mean, scale)))

    def check(
        self,
        context: Any,
        x: ir.Value,
        mean: ir.Value,
        variance: ir.Value,
        epsilon: ir.Value,
        exponent: ir.Value | None,
        gamma: ir.Value,
        beta: ir.Value,
    ) -> MatchResult:
        """Check axes, types and constants."""
        if exponent is not None and constant_scalar(exponent) != 2:
            return MatchResult().fail("The deviation is not squared.", exponent)
        moments = _check_moments(x, mean, variance, epsilon)
        if moments and any(_along_last_axis(value, x) is None for value in (gamma, beta)):
            return MatchResult().fail("gamma or beta is not one number for each channel.", [gamma, beta])
        return moments

    def rewrite(
        self, op: Any, x: ir.Value, mean: ir.Value, epsilon: ir.Value, gamma: ir.Value, beta: ir.Value, **_: Any
    ) -> ir.Value:
        """Fuse in one step."""
        vectors = [vector for value in (gamma, beta) if (vector := _along_last_axis(value, x)) is not None]
        return _layer_norm(op, x, _name(mean), epsilon, *vectors)


class _TakeInScale(RewriteRuleClassBase):
    """LayerNormalization(x, scale) * gamma becomes LayerNormalization(x, scale * gamma)."""

    def pattern(self, op: Any, x: Any, scale: Any, gamma: Any) -> Any:
        """Match a LayerNormalization without bias."""
        return op.Mul(op.LayerNormalization(x, scale, _outputs=["normal"]), gamma)

    def check(self, context: Any, x: ir.Value, scale: ir.Value, gamma: ir.Value, normal: ir.Value) -> MatchResult:
        """Check that gamma is one constant for each channel."""
        return _check_vectors(x, normal, scale, gamma)

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, gamma: ir.Value, normal: ir.Value) -> ir.Value:
        """Multiply the scales."""
        first, second = _along_last_axis(scale, x), _along_last_axis(gamma, x)
        assert first is not None and second is not None
        return _again(op, normal, x, first.astype(np.float64) * second.astype(np.float64))


class _TakeInBias(RewriteRuleClassBase):
    """LayerNormalization(x, scale) + beta becomes LayerNormalization(x, scale, beta)."""

    def pattern(self, op: Any, x: Any, scale: Any, beta: Any) -> Any:
        """Match a LayerNormalization without bias."""
        return op.Add(op.LayerNormalization(x, scale, _outputs=["normal"]), beta)

    def check(self, context: Any, x: ir.Value, scale: ir.Value, beta: ir.Value, normal: ir.Value) -> MatchResult:
        """Check that beta is one constant for each channel."""
        return _check_vectors(x, normal, scale, beta)

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, beta: ir.Value, normal: ir.Value) -> ir.Value:
        """Add the bias."""
        first, second = _along_last_axis(scale, x), _along_last_axis(beta, x)
        assert first is not None and second is not None
        return _again(op, normal, x, first, second)


# The ways to write deviation / sqrt(variance), and the constant that each has in it.
_DIVISIONS: list[tuple[Callable[..., Any], float | None]] = [
    (lambda op, deviation, variance, number: op.Div(deviation, op.Sqrt(variance)), None),
    (lambda op, deviation, variance, number: op.Mul(deviation, op.Reciprocal(op.Sqrt(variance))), None),
    (lambda op, deviation, variance, number: op.Mul(deviation, op.Div(number, op.Sqrt(variance))), 1.0),
    (lambda op, deviation, variance, number: op.Mul(deviation, op.Pow(variance, number)), -0.5),
    (lambda op, deviation, variance, number: op.Div(deviation, op.Pow(variance, number)), 0.5),
]
_NUMBERS = dict(_DIVISIONS)


def _rule(rule: type[RewriteRuleClassBase], *arguments: Any, **options: Any) -> RewriteRule:
    made: RewriteRule = rule.rule(*arguments, **options)  # type: ignore[no-untyped-call]
    return made


_FORMS = [_rule(_Normalize, divide, widened=widened) for divide in _NUMBERS for widened in (False, True)]

_RULES = [
    RewriteRuleSet([_rule(_KerasLayerNorm), *_FORMS], commute=True),
    RewriteRuleSet([_rule(_TakeInScale)], commute=True),
    RewriteRuleSet([_rule(_TakeInBias)], commute=True),
]


def _check_moments(x: ir.Value, mean: ir.Value, variance: ir.Value, epsilon: ir.Value) -> MatchResult:
    result = MatchResult()
    if x.dtype not in _FLOATS or x.shape is None or not isinstance(x.shape[-1], int):
        return result.fail("x is not a float tensor with a known last dimension.", x)
    if constant_scalar(epsilon) is None:
        return result.fail("epsilon is not a constant number.", epsilon)
    for moment in (mean, variance):
        node = moment.producer()
        if node is None or not _is_over_last_axis(node, len(x.shape)):
            return result.fail("A mean is not over the last axis alone, or drops it.", moment)
    return result


def _check_vectors(x: ir.Value, normal: ir.Value, scale: ir.Value, vector: ir.Value) -> MatchResult:
    node = normal.producer()
    assert node is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if x.dtype not in _FLOATS or x.shape is None or axis not in (-1, len(x.shape) - 1):
        return MatchResult().fail("LayerNormalization is not of floats over the last axis.", node)
    if any(_along_last_axis(value, x) is None for value in (scale, vector)):
        return MatchResult().fail("The operand is not one constant for each channel.", vector)
    return MatchResult()


def _is_over_last_axis(node: ir.Node, rank: int) -> bool:
    if "keepdims" in node.attributes and not node.attributes["keepdims"].as_int():
        return False
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    else:
        array = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if array is None else array.tolist()
    return axes in ([-1], [rank - 1])


def _along_last_axis(value: ir.Value, x: ir.Value) -> NDArray[Any] | None:
    """Return a constant that broadcasts along the last axis of `x` as a vector; None for any other value."""
    array = constant_array(value)
    if array is None or x.shape is None or array.ndim > len(x.shape):
        return None
    if array.ndim and array.shape[-1] != array.size:
        return None
    width = _width(x)
    return np.broadcast_to(array.reshape(-1), width) if array.size in (1, width) else None


def _width(x: ir.Value) -> int:
    assert x.shape is not None and isinstance(x.shape[-1], int)
    return x.shape[-1]


def _layer_norm(op: Any, x: ir.Value, name: str, epsilon: ir.Value | float, *vectors: NDArray[Any]) -> ir.Value:
    assert x.dtype is not None
    constants = [op.Constant(value=ir.tensor(vector.astype(x.dtype.numpy()))) for vector in vectors]
    number = constant_scalar(epsilon) if isinstance(epsilon, ir.Value) else epsilon
    normal: ir.Value = op.LayerNormalization(
        x, *constants, axis=-1, epsilon=number, stash_type=int(ir.DataType.FLOAT), _name=name
    )
    return normal


def _again(op: Any, normal: ir.Value, x: ir.Value, *vectors: NDArray[Any]) -> ir.Value:
    node = normal.producer()
    assert node is not None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    return _layer_norm(op, x, str(node.name), epsilon, *vectors)


def _name(mean: ir.Value) -> str:
    node = mean.producer()
    assert node is not None
    return name_beside(node, "LayerNormalization")

"""What a plan costs in accuracy, measured on held-out images in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from numpy.typing import NDArray

from lsp_deploy.graph.class_scores import class_output
from lsp_deploy.plan import Plan
from lsp_deploy.steps.apply import apply_decisions

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.data import Dataset
    from lsp_deploy.engines.fidelity import Fidelity

__all__ = ["MEASURED_FROM", "Drop", "Evaluator", "decisive_drop"]

# With fewer labelled images one answer more or less moves top-1 by more than 0.2 points.
MEASURED_FROM = 500


class Drop(NamedTuple):
    """Points of top-1 lost, which measure says so, and its 95 % interval."""

    points: float
    measure: Literal["expected", "measured"]
    low: float
    high: float


def _is_fixed_beyond_the_batch(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in list(value.shape)[1:])


class Evaluator:
    """Runs plans on the held-out images against the dense model's answers."""

    def __init__(self, dense: ir.Model, canonical: ir.Model, held_out: Dataset, *, batch: int, threads: int) -> None:
        """Take the user's model, its canonical float32 form and the images; runs the dense model once."""
        self.canonical = canonical
        self.held_out = held_out
        self.threads = threads
        # The canonical form knows its shapes, where a file may say nothing of them.
        self.is_classifier = class_output(canonical) is not None
        fixed = [str(output.name) for output in canonical.graph.outputs if _is_fixed_beyond_the_batch(output)]
        self.output = class_output(canonical) or (fixed[0] if fixed else str(dense.graph.outputs[0].name))
        # An output whose other dimensions may follow the batch is compared sample by sample.
        self.batch = batch if self.output in fixed else 1
        self.dense_outputs = self.outputs_of(dense, "dense model on held-out images")

    def outputs_of(self, model: ir.Model, description: str) -> NDArray[Any]:
        """Return the compared output of `model` (its float32 twin) on the held-out images, [samples, ...]."""
        from lsp_deploy.engines.fidelity import run_dataset
        from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine

        with OnnxRuntimeEngine.from_model(model, threads=self.threads, float32_twin=True) as engine:
            return run_dataset(engine, self.held_out, self.batch, self.output, description=description)

    def fidelity(self, model: ir.Model, description: str = "compressed model on held-out images") -> Fidelity:
        """Compare `model` with the dense model on the held-out images."""
        return self.compare(self.outputs_of(model, description))

    def compare(self, outputs: NDArray[Any]) -> Fidelity:
        """Compare outputs on the held-out images with the dense model's."""
        from lsp_deploy.engines.fidelity import compare_outputs

        labels = self.held_out.labels
        return compare_outputs(self.dense_outputs, outputs, labels, classification=self.is_classifier)

    def loss(self, plan: Plan) -> float:
        """Return the points of top-1 that `plan` loses, by the measure that the budget is about.

        Weights and scales are rounded as in the file: on few images, int8 with other roundings loses other points.
        """
        from lsp_deploy.passes.cast_compute_type import CastComputeTypePass

        model = apply_decisions(self.canonical, plan)
        if plan.compute_type != "fp32":
            CastComputeTypePass(plan.compute_type, keep_io=False)(model)
        return decisive_drop(self.fidelity(model, "trying a plan")).points


def decisive_drop(fidelity: Fidelity) -> Drop:
    """Return the loss that the budget is about: measured with labels and at least 500 images, else expected.

    Raises:
        ValueError: the outputs are not class scores.
    """
    measured = (
        fidelity.measured_drop_points,
        fidelity.measured_drop_low_points,
        fidelity.measured_drop_high_points,
    )
    expected = (
        fidelity.expected_drop_points,
        fidelity.expected_drop_low_points,
        fidelity.expected_drop_high_points,
    )
    enough = fidelity.samples >= MEASURED_FROM
    points, low, high = measured if enough and None not in measured else expected
    if points is None or low is None or high is None:
        raise ValueError("a model without class scores has no top-1 to lose")
    return Drop(points, "measured" if enough and None not in measured else "expected", low, high)

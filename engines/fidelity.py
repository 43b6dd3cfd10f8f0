"""How true a compressed model stays to the dense one: answers, probabilities and signal-to-noise ratio.

Everything is paired: both models answer the same samples, and intervals are those of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy import console
from lsp_deploy.engines.batches import Batches, run_batches, without_padding
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.engines.protocol import Engine

__all__ = ["SQNR_LIMIT_DB", "Fidelity", "compare_outputs", "layer_sqnr", "run_dataset", "sqnr_db"]

# Float32 resolves about 140 dB; beyond this two tensors are the same, and below its negative nothing is left.
SQNR_LIMIT_DB = 200.0
_Z95 = 1.959964  # normal quantile of a two-sided 95 % interval


class Fidelity(BaseModel):
    """A compressed model's outputs against the dense model's, on the same samples.

    Points are percentage points of top-1, positive where the compressed model is worse; low and high bound a 95 %
    interval. Classification fields are None for outputs that are not class scores, fields that need labels without
    labels.
    """

    model_config = ConfigDict(extra="forbid")

    samples: int
    sqnr_db: float = Field(description="signal to quantization noise of the outputs, dB; at most ±200")
    cosine: float = Field(description="mean cosine similarity of the samples' outputs")
    non_finite_samples: int = Field(0, description="samples for which the compressed model gave NaN or infinity")
    agreement_percent: float | None = Field(None, description="samples whose top-1 answer is the same")
    dense_confidence_percent: float | None = Field(
        None, description="mean probability of the dense model's own answers: the expected drop is at most this"
    )
    expected_drop_points: float | None = Field(
        None, description="100 · mean(p_dense - p_compressed), both at the dense model's answer"
    )
    expected_drop_standard_error: float | None = None
    expected_drop_low_points: float | None = None
    expected_drop_high_points: float | None = None
    dense_top1_percent: float | None = None
    compressed_top1_percent: float | None = None
    dense_top5_percent: float | None = None
    compressed_top5_percent: float | None = None
    measured_drop_points: float | None = Field(None, description="top-1 of the dense model minus the compressed one's")
    measured_drop_low_points: float | None = None
    measured_drop_high_points: float | None = None
    only_dense_right: int | None = Field(None, description="McNemar: samples that only the dense model gets right")
    only_compressed_right: int | None = Field(None, description="McNemar: those that only the compressed one does")


def compare_outputs(
    dense: NDArray[Any],
    compressed: NDArray[Any],
    labels: NDArray[Any] | None,
    *,
    classification: bool | None = None,
) -> Fidelity:
    """Compare two models' outputs on the same samples.

    Args:
        dense: outputs of the reference, [samples, ...]; class scores or probabilities where [samples, classes].
        compressed: outputs of the other model, same shape.
        labels: class indices, [samples], or None.
        classification: whether the outputs are class scores; None: they are where [samples, 2 classes or more].

    A sample for which the compressed model gives NaN or infinity counts as a wrong answer of probability 0.

    Raises:
        UserError: the dense model gives NaN or infinity, or a label is not one of its classes.
        ValueError: shapes that do not belong together.
    """
    if dense.shape != compressed.shape or dense.ndim == 0 or len(dense) == 0:
        raise ValueError(f"outputs of the same samples are needed, got {dense.shape} and {compressed.shape}")
    dense, compressed = np.asarray(dense, np.float64), np.asarray(compressed, np.float64)
    if not np.isfinite(dense).all():
        raise UserError("the dense model gives NaN or infinity; check the model, the images and --preprocess")
    finite = np.isfinite(compressed).reshape(len(compressed), -1).all(axis=1)
    result = Fidelity(
        samples=len(dense),
        sqnr_db=sqnr_db(dense, compressed),
        cosine=_mean_cosine(dense, compressed, finite),
        non_finite_samples=int((~finite).sum()),
    )
    if classification is None:
        classification = dense.ndim == 2 and dense.shape[1] > 1
    if not classification:
        return result
    fields = _answers(dense, compressed, finite)
    if labels is not None:
        fields |= _accuracy(dense, compressed, finite, labels)
    return result.model_copy(update=fields)


def sqnr_db(reference: NDArray[Any], value: NDArray[Any]) -> float:
    """Return 10·log10(Σ reference² / Σ (reference - value)²), in dB, bounded by ±SQNR_LIMIT_DB.

    Identical tensors give +SQNR_LIMIT_DB, a value with NaN or infinity gives -SQNR_LIMIT_DB.
    """
    signal, noise = _energies(reference, value)
    return _decibels(signal, noise)


def run_dataset(
    engine: Engine,
    dataset: Batches,
    batch_size: int,
    output: str | None = None,
    *,
    description: str = "running",
) -> NDArray[Any]:
    """Run all samples through `engine` and return one output for them, [samples, ...].

    A model of a fixed batch runs at that batch, whatever `batch_size` says; the last batch is padded and cut.

    Args:
        engine: runs the model.
        dataset: the samples.
        batch_size: samples a run, for a model of dynamic batch.
        output: name of the output; None for the first.
        description: what the progress bar says.

    Raises:
        UserError: no such output, or one without a batch dimension.
    """
    name = output if output is not None else next(iter(engine.outputs))
    if name not in engine.outputs:
        raise UserError(f"the model has no output {name}; it has {', '.join(engine.outputs)}")
    parts = []
    with console.progress(description, len(dataset)) as advance:
        for count, _, outputs in run_batches(engine, dataset, batch_size):
            parts.append(_cut(outputs[name], count, name))
            advance(count)
    return np.concatenate(parts)


def layer_sqnr(
    dense: ir.Model,
    compressed: ir.Model,
    pairs: Mapping[str, tuple[str, str]],
    dataset: Batches,
    *,
    batch_size: int = 4,
    threads: int | None = None,
) -> dict[str, float]:
    """Return the signal-to-noise ratio of inner values of two models, in dB, over a data set.

    Both models run in ONNX Runtime; energies are summed in float64 over all samples.

    Args:
        dense: the reference.
        compressed: the other model.
        pairs: by layer name, the value of `dense` and the value of `compressed` to compare; same shape.
        dataset: the samples.
        batch_size: samples a run; all the compared values of a run are in memory at once.
        threads: threads of each session.

    Raises:
        UserError: a value is not in its model, or the two differ in shape.
    """
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine

    totals = {layer: np.zeros(2) for layer in pairs}
    with ExitStack() as stack, console.progress("comparing layers", len(dataset)) as advance:
        engines = [
            stack.enter_context(OnnxRuntimeEngine.from_model(model, threads=threads, extra_outputs=list(names)))
            for model, names in zip((dense, compressed), zip(*pairs.values(), strict=True), strict=True)
        ]
        both = (run_batches(engine, dataset, batch_size) for engine in engines)
        for (count, size, ours), (_, _, theirs) in zip(*both, strict=True):
            for layer, (a, b) in pairs.items():
                if ours[a].shape != theirs[b].shape:
                    raise UserError(f"{layer}: {a} is {ours[a].shape} but {b} is {theirs[b].shape}")
                totals[layer] += _energies(*(without_padding(value, count, size) for value in (ours[a], theirs[b])))
            advance(count)
    return {layer: _decibels(signal, noise) for layer, (signal, noise) in totals.items()}


def _cut(value: NDArray[Any], count: int, name: str) -> NDArray[Any]:
    if value.ndim == 0 or len(value) < count:
        raise UserError(f"output {name} of shape {list(value.shape)} has no batch dimension; name another output")
    return value[:count]


def _answers(dense: NDArray[Any], compressed: NDArray[Any], finite: NDArray[np.bool_]) -> dict[str, Any]:
    answer = dense.argmax(axis=1)
    safe = np.where(finite[:, None], compressed, 0.0)
    # Some models end in a Softmax: their outputs are probabilities already.
    as_probabilities = _are_probabilities(dense)
    rows = np.arange(len(dense))
    p_dense, p_compressed = (scores if as_probabilities else _softmax(scores) for scores in (dense, safe))
    confidence = p_dense[rows, answer]
    lost = 100 * (confidence - np.where(finite, p_compressed[rows, answer], 0.0))
    mean = float(lost.mean())
    fields: dict[str, Any] = {
        "agreement_percent": 100 * float((finite & (safe.argmax(axis=1) == answer)).mean()),
        "dense_confidence_percent": 100 * float(confidence.mean()),
        "expected_drop_points": mean,
        # One sample says nothing about the spread: the interval is all that is possible.
        "expected_drop_low_points": -100.0,
        "expected_drop_high_points": 100.0,
    }
    if len(lost) > 1:
        error = float(lost.std(ddof=1)) / math.sqrt(len(lost))
        fields |= {
            "expected_drop_standard_error": error,
            "expected_drop_low_points": max(-100.0, mean - _Z95 * error),
            "expected_drop_high_points": min(100.0, mean + _Z95 * error),
        }
    return fields


def _accuracy(
    dense: NDArray[Any], compressed: NDArray[Any], finite: NDArray[np.bool_], labels: NDArray[Any]
) -> dict[str, Any]:
    classes = dense.shape[1]
    if labels.shape != (len(dense),):
        raise ValueError(f"{len(dense)} samples but labels of shape {labels.shape}")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise UserError(f"label {outside[0]} is not one of the model's classes 0 to {classes - 1}; check the labels")
    ranks = {"dense": _rank(dense, labels), "compressed": np.where(finite, _rank(compressed, labels), classes)}
    right = {model: rank < 1 for model, rank in ranks.items()}
    fields: dict[str, Any] = {
        f"{model}_top1_percent": 100 * float(is_right.mean()) for model, is_right in right.items()
    }
    if classes > 5:
        fields |= {f"{model}_top5_percent": 100 * float((rank < 5).mean()) for model, rank in ranks.items()}
    lost = int((right["dense"] & ~right["compressed"]).sum())
    gained = int((right["compressed"] & ~right["dense"]).sum())
    low, high = _paired_interval(lost, gained, len(dense))
    return fields | {
        "measured_drop_points": 100 * (lost - gained) / len(dense),
        "measured_drop_low_points": low,
        "measured_drop_high_points": high,
        "only_dense_right": lost,
        "only_compressed_right": gained,
    }


def _paired_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of (lost - gained) / samples, in points.

    Adjusted Wald interval for paired proportions: half a sample is added to each of the four cells, so that it does
    not shrink to nothing where no answer changed (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    total = samples + 2
    p_lost, p_gained = (lost + 0.5) / total, (gained + 0.5) / total
    difference = p_lost - p_gained
    half = _Z95 * math.sqrt((p_lost + p_gained - difference**2) / total)
    return 100 * max(-1.0, difference - half), 100 * min(1.0, difference + half)


def _rank(scores: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
    """Return how many classes come before the labelled one; the lower index wins a tie, as in argmax."""
    own = scores[np.arange(len(scores)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    before: NDArray[np.int64] = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return before


def _softmax(scores: NDArray[Any]) -> NDArray[Any]:
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: NDArray[Any] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def _are_probabilities(scores: NDArray[Any]) -> bool:
    return bool((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-2))


def _mean_cosine(dense: NDArray[Any], compressed: NDArray[Any], finite: NDArray[np.bool_]) -> float:
    a = dense.reshape(len(dense), -1)
    b = np.where(finite[:, None], compressed.reshape(len(compressed), -1), 0.0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = finite & ~a.any(axis=1) & ~b.any(axis=1)
    cosine = np.divide((a * b).sum(axis=1), norms, out=both_zero.astype(np.float64), where=norms > 0)
    return float(cosine.mean())


def _energies(reference: NDArray[Any], value: NDArray[Any]) -> tuple[float, float]:
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return float(np.vdot(reference, reference)), float(np.square(reference - value).sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return SQNR_LIMIT_DB
    if signal == 0 or not math.isfinite(noise):
        return -SQNR_LIMIT_DB
    return float(np.clip(10 * math.log10(signal / noise), -SQNR_LIMIT_DB, SQNR_LIMIT_DB))

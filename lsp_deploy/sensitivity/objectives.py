"""What is differentiated: one scalar a sample, whose gradient says how much each weight matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lsp_deploy.errors import UserError
from lsp_deploy.graph.class_scores import class_output

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.sensitivity.block_gradients import Objective

__all__ = ["OBJECTIVES", "ObjectiveName", "Reference", "default_objective", "make_objective"]

Reference = Callable[[NDArray[np.int64]], Mapping[str, torch.Tensor]]
"""Gives the dense model's outputs for samples, where another model is differentiated."""

_Answers = Callable[[Mapping[str, torch.Tensor], NDArray[np.int64]], torch.Tensor]
"""Gives a class at each position [batch, positions], from outputs and sample indices."""

ObjectiveName = Literal["loss", "top1", "pseudo", "output"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)


def default_objective(model: ir.Model, labels: NDArray[np.int64] | None) -> ObjectiveName:
    """Return the objective for a model and data that nobody named one for.

    With labels and class scores it is `loss`; without labels `top1`, as good in trials, where class scores
    [batch, classes] are the one floating-point output; else, for dense predictions and several outputs, `output`.
    """
    scores = _class_scores(model)
    is_classifier = scores is not None and scores.rank == 2
    if labels is not None and is_classifier:
        return "loss"
    return "top1" if is_classifier and len(_float_outputs(model)) == 1 else "output"


def make_objective(
    name: str,
    model: ir.Model,
    labels: NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
    reference: Reference | None = None,
) -> Objective:
    """Return an objective: given outputs and sample indices, the sum over the batch of one scalar a sample.

    - `loss`: cross-entropy with the label.
    - `top1`: cross-entropy with the dense model's own top-1; for outputs [batch, classes, height, width] or
      [batch, positions, classes] at each position, averaged over the positions.
    - `pseudo`: the same with a class that is drawn from the dense model's softmax.
    - `output`: <r, y_n> summed over all floating-point outputs, r standard normal: E[(g·ΔW)²] = ‖J·ΔW‖², the squared
      distortion of LSP's Eq. 1 linearised. The mean gradient is zero in expectation: only the second-order term says
      something.

    What is drawn depends on the seed and the sample's index alone, whatever the batches and processes.

    Args:
        name: one of `OBJECTIVES`.
        model: whose outputs are looked at.
        labels: class index of each sample, for `loss`.
        seed: of what is drawn.
        reference: whose classes `top1` and `pseudo` take; the model that is differentiated if None.

    Raises:
        UserError: the name is unknown, `loss` without labels or class scores, labels that are no classes of the model,
            `top1` or `pseudo` without scores, or `output` without a floating-point output.
    """
    if name not in OBJECTIVES:
        raise UserError(f"--objective is one of {', '.join(OBJECTIVES)}; got {name}")
    if name == "output":
        return _projection(model, seed)
    scores = _class_scores(model)
    if scores is None:
        raise UserError(f"--objective {name} needs class scores, and the model has none; use --objective output")
    if name == "loss":
        return _loss(scores, labels)
    answers = _top1(scores) if cast(ObjectiveName, name) == "top1" else _pseudo(scores, seed)
    return _against(answers, scores, reference)


@dataclass(frozen=True)
class _ClassScores:
    """The output that holds class scores."""

    output: str
    rank: int
    class_axis: int
    classes: int | None
    are_probabilities: bool
    """Whether the graph ends in a softmax."""

    def log_probabilities(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return log p as [batch, classes, positions], float64; one position for a classifier.

        The gradient of a sample that the model is sure of is p - 1, of which float32 would leave a few digits.
        """
        scores = outputs[self.output].double().movedim(self.class_axis, 1)
        scores = scores.reshape(scores.shape[0], scores.shape[1], -1)
        if self.are_probabilities:
            return torch.log(scores.clamp_min(torch.finfo(scores.dtype).tiny))
        return functional.log_softmax(scores, dim=1)


def _loss(scores: _ClassScores, labels: NDArray[np.int64] | None) -> Objective:
    if labels is None:
        raise UserError("--objective loss needs labels: name them with --labels, or use --objective top1")
    if scores.rank != 2:
        raise UserError("--objective loss needs class scores [batch, classes]; use top1 or output for dense outputs")
    if scores.classes is not None and int(labels.max()) >= scores.classes:
        raise UserError(f"label {int(labels.max())} is not one of the model's {scores.classes} classes; check --labels")

    def objective(outputs: Mapping[str, torch.Tensor], indices: NDArray[np.int64]) -> torch.Tensor:
        log_p = scores.log_probabilities(outputs)
        targets = torch.from_numpy(labels[indices]).to(log_p.device)
        return functional.nll_loss(log_p[:, :, 0], targets, reduction="sum")

    return objective


def _top1(scores: _ClassScores) -> _Answers:
    def answers(outputs: Mapping[str, torch.Tensor], indices: NDArray[np.int64]) -> torch.Tensor:
        return scores.log_probabilities(outputs).argmax(dim=1)

    return answers


def _pseudo(scores: _ClassScores, seed: int) -> _Answers:
    def answers(outputs: Mapping[str, torch.Tensor], indices: NDArray[np.int64]) -> torch.Tensor:
        log_p = scores.log_probabilities(outputs)
        drawn = np.stack([np.random.default_rng([seed, int(index)]).random(log_p.shape[2]) for index in indices])
        below = log_p.exp().cumsum(dim=1) < torch.from_numpy(drawn).to(log_p.device)[:, None]
        return below.sum(dim=1).clamp_max(log_p.shape[1] - 1)

    return answers


def _against(answers: _Answers, scores: _ClassScores, reference: Reference | None) -> Objective:
    """Return the cross-entropy with the classes that the dense model answers, the mean over positions."""
    given: dict[int, torch.Tensor] = {}  # the reference is asked once for each sample

    def objective(outputs: Mapping[str, torch.Tensor], indices: NDArray[np.int64]) -> torch.Tensor:
        log_p = scores.log_probabilities(outputs)
        if reference is None:
            targets = answers({name: value.detach() for name, value in outputs.items()}, indices)
        else:
            if any(int(index) not in given for index in indices):
                asked = answers(reference(indices), indices)
                given.update(zip((int(index) for index in indices), asked, strict=True))
            targets = torch.stack([given[int(index)] for index in indices])
        return functional.nll_loss(log_p, targets, reduction="sum") / log_p.shape[2]

    return objective


def _projection(model: ir.Model, seed: int) -> Objective:
    names = _float_outputs(model)
    if not names:
        raise UserError("--objective output needs a floating-point output, and the model has none")

    def objective(outputs: Mapping[str, torch.Tensor], indices: NDArray[np.int64]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32)
        generators = [np.random.default_rng([seed, int(index)]) for index in indices]
        for name in names:
            value = outputs[name]
            drawn = np.stack([generator.standard_normal(tuple(value.shape[1:])) for generator in generators])
            total = total.to(value) + (torch.from_numpy(drawn).to(value) * value).sum()
        return total

    return objective


def _class_scores(model: ir.Model) -> _ClassScores | None:
    """Return the output that `top1` and the like look at: class scores [batch, classes], else the first dense one."""
    name = class_output(model)
    for output in model.graph.outputs:
        rank = 0 if output.shape is None else len(output.shape)
        if output.name == name if name else rank in (3, 4) and output.name in _float_outputs(model):
            axis = 2 if rank == 3 else 1
            size = None if output.shape is None else output.shape[axis]
            return _ClassScores(
                output=str(output.name),
                rank=rank,
                class_axis=axis,
                classes=size if isinstance(size, int) else None,
                are_probabilities=_follows_softmax(output),
            )
    return None


def _float_outputs(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.outputs if value.dtype is None or value.dtype.is_floating_point()]


def _follows_softmax(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Softmax"

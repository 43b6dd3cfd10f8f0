"""Objectives: what each of them is, which one is the default, and that draws depend on seed and sample alone."""

from __future__ import annotations

import numpy as np
import pytest

from lsp_deploy.errors import UserError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from graphs import graph  # noqa: E402

from lsp_deploy.sensitivity.objectives import OBJECTIVES, default_objective, make_objective  # noqa: E402

CLASSES = "float[n, 7] y"
POSITIONS = "float[n, 5, 7] y"
MAP = "float[n, 7, 3, 4] y"


def model_with(outputs: str, nodes: str = "y = Relu(x)"):
    return graph(nodes, x=outputs.replace(" y", " x"), y=outputs)


def scores(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).requires_grad_()


def value(name: str, outputs: str, y: torch.Tensor, labels=None, indices=None, seed: int = 0) -> torch.Tensor:
    objective = make_objective(name, model_with(outputs), labels, seed=seed)
    return objective({"y": y}, np.arange(len(y)) if indices is None else np.asarray(indices))


def test_loss_is_the_cross_entropy_with_the_samples_labels() -> None:
    y, labels = scores(3, 7), np.array([5, 0, 2, 6])
    expected = torch.nn.functional.cross_entropy(y, torch.tensor([2, 6, 0]), reduction="sum")
    torch.testing.assert_close(value("loss", CLASSES, y, labels, [2, 3, 1]).float(), expected)


@pytest.mark.parametrize(
    ("outputs", "shape", "axis"), [(CLASSES, (3, 7), 1), (POSITIONS, (3, 5, 7), 2), (MAP, (3, 7, 3, 4), 1)]
)
def test_top1_is_the_cross_entropy_with_the_models_own_class_at_each_position(outputs, shape, axis) -> None:
    y = scores(*shape)
    log_p = torch.log_softmax(y, axis)
    expected = -log_p.amax(axis).reshape(3, -1).mean(dim=1).sum()
    torch.testing.assert_close(value("top1", outputs, y).float(), expected)


@pytest.mark.parametrize(("outputs", "shape"), [(CLASSES, (1, 7)), (MAP, (1, 7, 3, 4))])
def test_pseudo_draws_classes_as_often_as_softmax_says(outputs: str, shape: tuple[int, ...]) -> None:
    y = scores(*shape)
    log_p = torch.log_softmax(y, 1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    draws = [float(value("pseudo", outputs, y.detach(), indices=[index])) for index in range(3000)]
    assert np.mean(draws) == pytest.approx(float(entropy.detach()), abs=4 * np.std(draws) / np.sqrt(len(draws)))
    if outputs == CLASSES:
        assert len(set(np.round(draws, 5))) == 7


def test_output_estimates_the_squared_distortion_without_bias() -> None:
    generator = np.random.default_rng(1)
    J = generator.standard_normal((7, 4))
    change = generator.standard_normal(4)
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    projected = []
    for index in range(4000):
        y = (torch.from_numpy(J) @ weight)[None]
        (gradient,) = torch.autograd.grad(value("output", CLASSES, y, indices=[index]), weight)
        projected.append(float(gradient.numpy() @ change))
    squared = np.square(projected)
    error = 4 / np.sqrt(len(squared))
    assert squared.mean() == pytest.approx(np.square(J @ change).sum(), abs=error * squared.std())
    assert np.mean(projected) == pytest.approx(0, abs=error * np.std(projected))


def test_output_projects_every_floating_point_output() -> None:
    model = graph(
        "y = Relu(x) z = Neg(x) i = Cast<to = 7>(x)", x="float[n, 7] x", y="float[n, 7] y, float[n, 7] z, int64[n, 7] i"
    )
    y, z = scores(2, 7), scores(2, 7)
    make_objective("output", model)({"y": y, "z": z, "i": torch.ones(2, 7).long()}, np.arange(2)).backward()
    assert y.grad.any()
    assert z.grad.any()
    assert not torch.equal(y.grad, z.grad)


@pytest.mark.parametrize("name", ["pseudo", "output"])
@pytest.mark.parametrize(("outputs", "shape"), [(CLASSES, (6, 7)), (MAP, (6, 7, 3, 4))])
def test_draws_depend_on_seed_and_sample_alone(name: str, outputs: str, shape: tuple[int, ...]) -> None:
    y = scores(*shape).detach()
    one_by_one = [value(name, outputs, y[index : index + 1], indices=[index]) for index in range(6)]
    torch.testing.assert_close(value(name, outputs, y), torch.stack(one_by_one).sum())
    torch.testing.assert_close(value(name, outputs, y[[4, 1]], indices=[4, 1]), one_by_one[4] + one_by_one[1])
    assert float(value(name, outputs, y, seed=1)) != pytest.approx(float(value(name, outputs, y)))


def test_scores_that_went_through_softmax_are_probabilities() -> None:
    model = graph("y = Softmax(x)", x="float[n, 7] x", y="float[n, 7] y")
    logits = scores(3, 7)
    for name in ("top1", "pseudo", "loss"):
        labels = np.array([1, 2, 3])
        found = make_objective(name, model, labels)({"y": torch.softmax(logits, 1)}, np.arange(3))
        torch.testing.assert_close(found, value(name, CLASSES, logits, labels))


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (CLASSES, True, "loss"),
        (CLASSES, False, "top1"),
        (POSITIONS, False, "output"),
        (MAP, False, "output"),
        (MAP, True, "output"),
    ],
)
def test_the_default_follows_labels_and_outputs(outputs: str, labels: bool, expected: str) -> None:
    assert default_objective(model_with(outputs), np.zeros(4, np.int64) if labels else None) == expected


def test_several_outputs_are_projected_by_default() -> None:
    model = graph("y = Relu(x) z = Neg(x)", x="float[n, 7] x", y="float[n, 7] y, float[n, 7] z")
    assert default_objective(model, None) == "output"


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "message"),
    [
        ("loss", CLASSES, None, "needs labels"),
        ("loss", MAP, [0], "needs class scores"),
        ("loss", CLASSES, [7], "label 7 is not one of the model's 7 classes"),
        ("top1", "float[n] y", None, "needs class scores"),
        ("output", "int64[n, 7] y", None, "floating-point output"),
        ("magnitude", CLASSES, None, "--objective is one of"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(name: str, outputs: str, labels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_objective(name, model_with(outputs), None if labels is None else np.array(labels))


def test_every_objective_is_named_in_the_command_line() -> None:
    from lsp_deploy.cli import Objective

    assert tuple(one.value for one in Objective) == OBJECTIVES

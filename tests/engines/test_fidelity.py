from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.engines.fidelity import SQNR_LIMIT_DB, Fidelity, compare_outputs, layer_sqnr, run_dataset, sqnr_db
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.model import load_model


class Arrays:
    """Samples of one input in batches, as a data set gives them."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.x), size):
            self.sizes.append(len(self.x[start : start + size]))
            yield {"x": self.x[start : start + size]}


def scores(samples: int = 40, classes: int = 10, *, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    base = np.random.default_rng(0).standard_normal((samples, classes)) * 2
    return base + noise * np.random.default_rng(seed).standard_normal((samples, classes))


def softmax(row: np.ndarray) -> np.ndarray:
    return np.exp(row) / np.exp(row).sum()


def test_against_a_plain_loop_over_samples():
    dense, other = scores(), scores(noise=1.5, seed=1)
    labels = np.random.default_rng(2).integers(0, 10, 40)
    result = compare_outputs(dense, other, labels)
    lost = [softmax(a)[a.argmax()] - softmax(b)[a.argmax()] for a, b in zip(dense, other, strict=True)]
    right = [(a.argmax() == y, b.argmax() == y) for a, b, y in zip(dense, other, labels, strict=True)]
    top5 = [(y in np.argsort(-a)[:5], y in np.argsort(-b)[:5]) for a, b, y in zip(dense, other, labels, strict=True)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(dense, other, strict=True)]
    assert result.samples == 40
    assert result.agreement_percent == pytest.approx(
        100 * np.mean([a.argmax() == b.argmax() for a, b in zip(dense, other, strict=True)])
    )
    assert result.dense_confidence_percent == pytest.approx(100 * np.mean([softmax(a).max() for a in dense]))
    assert result.expected_drop_points == pytest.approx(100 * np.mean(lost))
    error = 100 * np.std(lost, ddof=1) / math.sqrt(40)
    assert result.expected_drop_standard_error == pytest.approx(error)
    assert result.expected_drop_low_points == pytest.approx(100 * np.mean(lost) - 1.96 * error, abs=1e-3)
    assert result.expected_drop_high_points == pytest.approx(100 * np.mean(lost) + 1.96 * error, abs=1e-3)
    assert result.dense_top1_percent == pytest.approx(100 * np.mean([a for a, _ in right]))
    assert result.compressed_top1_percent == pytest.approx(100 * np.mean([b for _, b in right]))
    assert result.dense_top5_percent == pytest.approx(100 * np.mean([a for a, _ in top5]))
    assert result.compressed_top5_percent == pytest.approx(100 * np.mean([b for _, b in top5]))
    assert result.only_dense_right == sum(a and not b for a, b in right)
    assert result.only_compressed_right == sum(b and not a for a, b in right)
    assert result.measured_drop_points == pytest.approx(result.dense_top1_percent - result.compressed_top1_percent)
    assert result.measured_drop_low_points < result.measured_drop_points < result.measured_drop_high_points
    assert result.cosine == pytest.approx(np.mean(cosines))
    assert result.sqnr_db == pytest.approx(10 * np.log10((dense**2).sum() / ((dense - other) ** 2).sum()))


@given(st.integers(2, 30), st.integers(2, 12), st.integers(0, 1000))
def test_a_model_compared_with_itself_loses_nothing(samples: int, classes: int, seed: int):
    dense = np.random.default_rng(seed).standard_normal((samples, classes)).astype(np.float32)
    result = compare_outputs(dense, dense.copy(), dense.argmax(axis=1))
    assert result.agreement_percent == result.dense_top1_percent == result.compressed_top1_percent == 100
    assert result.expected_drop_points == result.measured_drop_points == 0
    assert result.cosine == pytest.approx(1)
    assert result.sqnr_db == SQNR_LIMIT_DB
    assert Fidelity.model_validate_json(result.model_dump_json()) == result


def test_no_changed_answer_still_has_an_interval():
    dense = scores(100)
    result = compare_outputs(dense, dense, dense.argmax(axis=1))
    assert result.measured_drop_low_points < 0 < result.measured_drop_high_points


def test_the_paired_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    p_lost, p_gained, samples, trials = 0.04, 0.02, 300, 400
    held = 0
    for _ in range(trials):
        # Two classes, the dense model always answers 0, the other 0 or 1: labels decide who is right.
        outcome = rng.choice(3, samples, p=[p_lost, p_gained, 1 - p_lost - p_gained])
        dense = np.tile([1.0, 0.0], (samples, 1))
        other = np.where(outcome[:, None] == 2, dense, dense[:, ::-1])
        result = compare_outputs(dense, other, np.where(outcome == 1, 1, 0))
        held += result.measured_drop_low_points <= 100 * (p_lost - p_gained) <= result.measured_drop_high_points
    assert held / trials > 0.92


def test_one_sample_says_nothing_about_the_spread():
    result = compare_outputs(scores(1), scores(1, noise=1.0), None)
    assert result.expected_drop_standard_error is None
    assert (result.expected_drop_low_points, result.expected_drop_high_points) == (-100, 100)


def test_without_labels_nothing_is_said_about_accuracy():
    result = compare_outputs(scores(), scores(noise=0.1), None)
    assert result.expected_drop_points is not None
    assert result.dense_top1_percent is None
    assert result.measured_drop_points is None


def test_probabilities_are_taken_as_they_are():
    logits = scores() * 3
    dense = np.array([softmax(row) for row in logits])
    other = np.array([softmax(row) for row in logits / 2])
    assert compare_outputs(dense, other, None).expected_drop_points == pytest.approx(
        compare_outputs(logits, logits / 2, None).expected_drop_points, abs=1e-6
    )


def test_an_answer_that_is_not_finite_is_a_wrong_one():
    dense = scores(10)
    broken = dense.copy()
    broken[:4, 3] = np.nan
    broken[4, 0] = np.inf
    result = compare_outputs(dense, broken, dense.argmax(axis=1))
    assert result.non_finite_samples == 5
    assert result.agreement_percent == result.compressed_top1_percent == 50
    assert result.measured_drop_points == 50
    p_dense = [softmax(row).max() for row in dense[:5]]
    assert result.expected_drop_points == pytest.approx(100 * sum(p_dense) / 10)
    assert result.cosine == pytest.approx(0.5)
    assert result.sqnr_db == -SQNR_LIMIT_DB
    assert Fidelity.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 1), (6,)])
def test_outputs_that_are_not_class_scores_have_no_answers(shape: tuple[int, ...]):
    dense = np.random.default_rng(0).standard_normal(shape)
    result = compare_outputs(dense, dense * 1.1, np.zeros(6, int))
    assert result.sqnr_db == pytest.approx(20)
    assert result.cosine == pytest.approx(1)
    assert result.agreement_percent is None
    assert result.expected_drop_points is None
    assert result.dense_top1_percent is None


def test_embeddings_can_be_declared_as_such():
    assert compare_outputs(scores(), scores(), None, classification=False).agreement_percent is None


def test_input_that_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="the dense model gives NaN"):
        compare_outputs(np.full((2, 3), np.nan), np.ones((2, 3)), None)
    with pytest.raises(UserError, match="label 10 is not one of the model's classes 0 to 9"):
        compare_outputs(scores(2), scores(2), np.array([1, 10]))
    with pytest.raises(ValueError, match="same samples"):
        compare_outputs(scores(2), scores(3), None)
    with pytest.raises(ValueError, match="labels of shape"):
        compare_outputs(scores(2), scores(2), np.array([1]))


def test_top5_needs_more_than_five_classes():
    assert compare_outputs(scores(4, 5), scores(4, 5), np.zeros(4, int)).dense_top5_percent is None


def test_signal_to_noise():
    reference = np.ones((4, 5), np.float32)
    assert sqnr_db(reference, reference * 1.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(reference, reference) == SQNR_LIMIT_DB
    assert sqnr_db(np.zeros(3), np.ones(3)) == -SQNR_LIMIT_DB
    assert sqnr_db(reference, np.full((4, 5), np.inf)) == -SQNR_LIMIT_DB
    # Energies of float16 values overflow float16 itself.
    assert sqnr_db(np.full(9, 6e4, np.float16), np.full(9, 5.4e4, np.float16)) == pytest.approx(20, abs=0.05)


@pytest.mark.parametrize("batch", ["batch", 4, 1])
def test_a_data_set_runs_at_the_batch_that_the_model_takes(make_model, batch: int | str):
    samples = np.random.default_rng(4).standard_normal((7, 4, 64)).astype(np.float32)
    with OnnxRuntimeEngine.from_model(make_model(name="any.onnx")) as engine:
        expected = engine.run({"x": samples})["y"]
    data = Arrays(samples)
    with OnnxRuntimeEngine.from_model(make_model(batch=batch)) as engine:
        outputs = run_dataset(engine, data, 3)
    assert data.sizes == {"batch": [3, 3, 1], 4: [4, 3], 1: [1] * 7}[batch]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_an_output_that_is_not_there_is_named(make_model):
    with (
        OnnxRuntimeEngine.from_model(make_model()) as engine,
        pytest.raises(UserError, match="the model has no output logits; it has y"),
    ):
        run_dataset(engine, Arrays(np.zeros((2, 4, 64), np.float32)), 2, "logits")


def test_an_output_without_a_batch_dimension_is_refused(make_model):
    with OnnxRuntimeEngine.from_model(make_model(), extra_outputs=["product"]) as engine:
        run = engine.run
        engine.run = lambda feeds: {name: value.sum() for name, value in run(feeds).items()}  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"output y of shape \[\] has no batch dimension"):
            run_dataset(engine, Arrays(np.zeros((2, 4, 64), np.float32)), 2)


@pytest.mark.parametrize("batch", ["batch", 4])
def test_signal_to_noise_of_inner_values(make_model, batch: int | str):
    paths: list[Path] = [make_model(name="a.onnx", batch=batch), make_model("int8", name="b.onnx", batch=batch)]
    samples = np.random.default_rng(5).standard_normal((6, 4, 64)).astype(np.float32)
    values = []
    for path in (make_model(name="c.onnx"), make_model("int8", name="d.onnx")):
        with OnnxRuntimeEngine.from_model(path, extra_outputs=["product"]) as engine:
            values.append(engine.run({"x": samples})["product"])
    models = [load_model(path) for path in paths]
    pairs = {"linear": ("product", "product"), "norm": ("normed", "normed")}
    measured = layer_sqnr(models[0], models[1], pairs, Arrays(samples), batch_size=2, threads=1)
    assert measured["linear"] == pytest.approx(sqnr_db(*values), abs=1e-3)
    assert 20 < measured["linear"] < 60
    assert measured["norm"] > 100


def test_inner_values_of_other_shapes_cannot_be_compared(make_model):
    model = load_model(make_model())
    with pytest.raises(UserError, match=r"norm: normed is .* but product is"):
        layer_sqnr(model, model, {"norm": ("normed", "product")}, Arrays(np.zeros((2, 4, 64), np.float32)))

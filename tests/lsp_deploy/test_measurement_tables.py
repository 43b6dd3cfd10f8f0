"""What `profile` and `compare` print, 80 columns wide."""

from __future__ import annotations

import io

import numpy as np
from report_samples import sample_profile
from rich.console import Console, RenderableType

from lsp_deploy.comparing import Comparison, LayerFidelity
from lsp_deploy.engines.fidelity import Fidelity, compare_outputs
from lsp_deploy.measurement_tables import comparison_tables, profile_tables


def printed(*renderables: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    for renderable in renderables:
        console.print(renderable, crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def compared(fidelity: Fidelity, layers: tuple[LayerFidelity, ...] = (), **busy: int) -> str:
    profiles = [sample_profile("dense", 10.0, **busy), sample_profile("compressed", 4.0, **busy)]
    return printed(
        *comparison_tables(
            Comparison(
                dense="dense.onnx",
                compressed="small.onnx",
                data="photos: 200 samples",
                fidelity=fidelity,
                profiles=profiles,
                layers=list(layers),
            )
        )
    )


def scores(noise: float) -> np.ndarray:
    base = 3 * np.random.default_rng(0).standard_normal((200, 10))
    return base + noise * np.random.default_rng(1).standard_normal((200, 10))


def test_every_answer_has_its_unit_and_its_interval() -> None:
    labels = scores(0.0).argmax(axis=1)
    fidelity = compare_outputs(scores(0.0), scores(1.0), labels)
    lines = {line.split("  ")[0].strip(): " ".join(line.split()) for line in compared(fidelity).splitlines()}
    assert fidelity.compressed_top1_percent is not None and fidelity.expected_drop_points is not None
    assert lines["top-1"] == f"top-1 100 % {fidelity.compressed_top1_percent:.2f} % by the labels"
    assert f"{fidelity.measured_drop_points:.2f} points 95 %: " in lines["top-1 loss"]
    assert f"{fidelity.expected_drop_points:.2f} points 95 %: " in lines["expected top-1 loss"]
    assert f"{fidelity.dense_confidence_percent:.2f} %" in lines["sureness"]
    assert f"{fidelity.sqnr_db:.1f} dB" in lines["signal to noise"]
    assert "NaN or infinity" not in lines


def test_outputs_that_are_not_class_scores_and_not_finite() -> None:
    dense, other = np.ones((4, 2, 3)), np.ones((4, 2, 3))
    other[0, 0, 0] = np.nan
    text = compared(compare_outputs(dense, other, None))
    assert "1 sample" in text and "NaN or infinity" in text
    assert "same answer" not in text and "None" not in text


def test_the_speed_is_the_ratio_of_rounds() -> None:
    assert "batch 8: 2.50 × as fast as dense, 2.50 to 2.50 × over 3 rounds (measured)" in compared(
        compare_outputs(scores(0.0), scores(1.0), None)
    )


def test_no_model_and_no_unit_is_cut_off() -> None:
    text = compared(compare_outputs(scores(0.0), scores(1.0), None), (LayerFidelity(name="blocks.0.fc1", sqnr_db=9.0),))
    assert "compressed      8" in text and "samples/s" in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "--basis change" in text


def test_a_busy_machine_is_named() -> None:
    quiet, busy = sample_profile(), sample_profile(disturbed_blocks=3)
    assert "other programs" not in printed(*profile_tables([quiet]))
    text = " ".join(printed(*profile_tables([quiet, busy])).split())
    assert "other programs took CPU time in 3 of 3 blocks" in text

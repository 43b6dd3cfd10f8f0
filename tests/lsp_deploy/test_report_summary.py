"""The summary in the terminal and the plan of a dry run, 80 columns wide."""

from __future__ import annotations

import io

import pytest
from report_samples import sample_engine, sample_plan, sample_pruning, sample_report
from rich.console import Console, RenderableType

from lsp_deploy.plan import AttentionDecision
from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.execution_rows import attention_execution
from lsp_deploy.reporting.page import render_page
from lsp_deploy.reporting.plan_table import plan_table
from lsp_deploy.reporting.summary import summary_renderables


def printed(*renderables: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    for renderable in renderables:
        console.print(renderable, crop=False)  # as lsp_deploy.console.show does
    return console.file.getvalue()  # type: ignore[attr-defined]


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_summary_fits_forty_lines_of_eighty_columns() -> None:
    plan = sample_plan()
    text = printed(*summary_renderables(sample_report(plan, engine=sample_engine(plan))))
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    for expected in (
        "23.0 MB",
        "6.21 MB",
        "77.50 %",
        "76.88 %",
        "0.78 points",
        "within the default budget of 1",
        "counted",
        "measured",
    ):
        assert expected in flat(text)
    assert "not a100" in flat(text)
    assert "46 int8" in flat(text)
    assert "48 2:4" in flat(text)
    assert "50 of 50 linear layers run as asked" in flat(text)
    assert "warning: the drop is known" in flat(text)


def test_commands_for_the_device_are_not_broken() -> None:
    plan = sample_plan(blocks=1, width=64)
    command = "trtexec --onnx=model.onnx " + " ".join(f"--flag{index}=value" for index in range(12))
    engine = {"built": False, "not_built_reason": f"only the device builds its engines; run there:\n{command}"}
    lines = printed(*summary_renderables(sample_report(plan, engine_section=engine))).splitlines()
    assert command in lines


@pytest.mark.parametrize("classifier", [True, False])
def test_without_labels_there_is_no_top1(classifier: bool) -> None:
    plan = sample_plan(blocks=1, width=64)
    text = printed(*summary_renderables(sample_report(plan, labelled=False, classifier=classifier)))
    assert "top-1 " not in text.replace("top-1 loss", "")
    assert ("same answer" in text) == classifier
    assert ("signal to noise, 160 samples" in flat(text)) == (not classifier)


@pytest.mark.parametrize(
    ("typed", "met", "expected"),
    [
        (True, True, "--max-drop 1: met"),
        (True, False, "--max-drop 1: not met"),
        (False, True, "within the default budget of 1"),
        (False, False, "above 1, the default budget of what auto adds to typed choices"),
    ],
)
def test_what_is_said_of_the_budget(typed: bool, met: bool, expected: str) -> None:
    plan = sample_plan(blocks=1, width=64)
    budget = {"max_drop_points": 1, "typed": typed, "measure": "expected", "drop_points": 0.5 if met else 2, "met": met}
    report = sample_report(plan, budget=budget)
    assert expected in flat(printed(*summary_renderables(report)))
    assert expected in render_page(report, plan)


def test_the_ratio_of_latencies_is_called_that_of_rounds() -> None:
    text = flat(printed(*summary_renderables(sample_report(sample_plan()))))
    assert "as fast on this host's CPU, not a100, batch 1, median of 10 rounds, measured" in text


def test_many_reasons_are_cut_short() -> None:
    plan = sample_plan(blocks=5, width=64)
    for number, layer in enumerate(plan.layers):
        layer.sparsity.reason = "because " + "x" * number
    text = flat(printed(*summary_renderables(sample_report(plan))))
    assert "16 for other reasons: see report.html" in text


def test_names_are_not_taken_for_markup() -> None:
    plan = sample_plan(blocks=1, width=64)
    plan.layers[0].name = plan.layers[0].sparsity.reason = "[red]patch[/red]"
    assert printed(plan_table(plan)).count("[red]patch[/red]") == 2


def test_a_dry_run_names_every_layer_and_every_reason() -> None:
    plan = sample_plan(blocks=2, width=64)
    text = printed(plan_table(plan))
    for layer in plan.layers:
        assert layer.name in text
    assert "2:4 50 %" in text
    assert "the patch embedding is not pruned" in text


def test_why_attention_stays_as_exported() -> None:
    plan = sample_plan(blocks=2, width=64)
    plan.attention = AttentionDecision(left={"a/Softmax": "its heads are mixed"}, reason="1 stays as exported")
    report = sample_report(plan).model_copy(update={"attention_execution": attention_execution(plan.attention)})
    for text in (printed(*summary_renderables(report)), printed(plan_table(plan))):
        assert "attention: 1 stays as exported" in text


def test_pruning_in_two_lines_beside_what_was_found() -> None:
    plan = sample_plan(blocks=2, width=64, pattern="block")
    report = sample_report(plan, pruning=sample_pruning(plan))
    left = formatting.percent(100 * report.flops.linear_remaining_fraction)
    text = printed(*summary_renderables(report))
    assert max(map(len, text.splitlines()[:-10])) <= 80
    for expected in (
        "pruning: 8 of 10 linear layers (8 block);",
        f"{left} of FLOPs left (counted); surviving weights refitted in 6",
        "loss: predicted 0.0312 nats of cross-entropy against the dense model's own answer (estimated); "
        "found 0.78 points of top-1 (expectation over measured outputs)",
    ):
        assert expected in flat(text)


def test_a_dry_run_says_what_is_predicted_and_nothing_of_what_was_found() -> None:
    plan = sample_plan(blocks=2, width=64, pattern="block")
    text = flat(printed(plan_table(plan, sample_pruning(plan))))
    assert "pruning: 8 of 10 linear layers (8 block);" in text
    assert text.endswith("predicted 0.0312 nats of cross-entropy against the dense model's own answer (estimated)")
    assert "predicted" not in flat(printed(plan_table(plan)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_000, "1.00 kB"), (22_981_730, "23.0 MB"), (999_600_000, "1.00 GB")],
)
def test_file_sizes(value: int, expected: str) -> None:
    assert formatting.file_size(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(100, "100 %"), (99.99, "> 99.9 %"), (0, "0 %"), (0.01, "< 0.1 %"), (27.03, "27.0 %"), (50, "50 %")],
)
def test_percentages_are_round_only_where_they_are(value: float, expected: str) -> None:
    assert formatting.percent(value) == expected


def test_shares_of_answers_keep_their_digits() -> None:
    assert formatting.percent(70, 2) == "70.00 %"
    assert formatting.percent(100, 2) == "100 %"


@pytest.mark.parametrize(("value", "expected"), [(3.42, "3.4 s"), (119.7, "2 min 00 s"), (125, "2 min 05 s")])
def test_durations(value: float, expected: str) -> None:
    assert formatting.seconds(value) == expected


def test_signs() -> None:
    assert formatting.points(-0.001) == "0.00 points"
    assert formatting.points(-1.5) == "\N{MINUS SIGN}1.50 points"
    assert formatting.interval(-0.1, 0.5) == "\N{MINUS SIGN}0.10 to 0.50"
    assert formatting.interval(None, 0.5) == ""

"""The plan joined with the engine's layer table, and reasons in groups."""

from __future__ import annotations

import pytest
from report_samples import sample_engine, sample_plan, sample_report

from lsp_deploy.engines.protocol import EngineInfo, LayerRecord
from lsp_deploy.plan import ExecutionDecision, Plan
from lsp_deploy.reporting.cards import as_asked_words, cards
from lsp_deploy.reporting.execution_rows import linear_time, linear_time_words, operator_words
from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.reporting.reasons import engine_groups, execution_groups, precision_groups, sparsity_groups


@pytest.fixture
def plan() -> Plan:
    return sample_plan(blocks=3, width=64)


def info(backend: str, *records: LayerRecord) -> EngineInfo:
    return EngineInfo(backend=backend, target="a100", layers=list(records))


def test_rows_carry_the_plan_in_its_order(plan: Plan) -> None:
    rows = layer_rows(plan, None)
    assert [row.name for row in rows] == [layer.name for layer in plan.layers]
    qkv = rows[1]
    assert (qkv.K, qkv.N, qkv.role, qkv.block) == (64, 192, "qkv", 0)
    assert qkv.flops == 2 * qkv.M * 64 * 192
    assert qkv.sparsity.zeros_percent == 50
    assert qkv.precision.reason == plan.layers[1].precision.reason
    assert qkv.time_ms is None


def test_without_an_engine_nothing_is_claimed(plan: Plan) -> None:
    for row in layer_rows(plan, None):
        assert row.engine.matches_request is None
        assert row.engine.precision is None
        assert row.engine.note == "no engine was built"


def test_an_engine_that_does_as_asked(plan: Plan) -> None:
    rows = layer_rows(plan, sample_engine(plan))
    assert all(row.engine.matches_request is True for row in rows)
    assert {row.engine.precision for row in rows} == {"int8", "fp16"}


def test_another_type_than_asked_is_said_in_words(plan: Plan) -> None:
    name = plan.layers[1].name
    rows = layer_rows(plan, sample_engine(plan, other_precision=[name]))
    assert rows[1].engine.matches_request is False
    assert "asked int8, the engine ran fp16 gemm" in (rows[1].engine.note or "")
    assert [row.engine.matches_request for row in rows].count(False) == 1


def test_the_engine_in_words(plan: Plan) -> None:
    engine = sample_engine(plan, other_precision=[plan.layers[1].name])
    assert as_asked_words(sample_report(plan, engine=engine)) == "13 of 14 linear layers run as asked"
    fewer = engine.model_copy(update={"layers": engine.layers[3:]})
    assert as_asked_words(sample_report(plan, engine=fewer)) == "11 of 14 linear layers run as asked, 3 not known"


def test_a_node_that_the_table_does_not_name_is_unknown(plan: Plan) -> None:
    row = layer_rows(plan, info("tensorrt_rtx"))[1]
    assert row.engine.matches_request is None
    assert "does not name" in (row.engine.note or "")


def test_of_several_engine_layers_the_one_that_multiplies_counts(plan: Plan) -> None:
    name = plan.layers[1].name
    reformat = LayerRecord(name="a", kind="kgen", precision="fp16", onnx_nodes=[name])
    gemm = LayerRecord(name="b", kind="gemm", precision="int8", onnx_nodes=[name])
    for records in ((reformat, gemm), (gemm, reformat)):
        assert layer_rows(plan, info("tensorrt_rtx", *records))[1].engine.layer == "b"


@pytest.mark.parametrize("part", ["{}", "panel_{}/MatMul"])
def test_a_layer_that_was_cut_into_parts_is_found_by_them(plan: Plan, part: str) -> None:
    name = plan.layers[1].name
    parts = [f"{name}/{part.format(number)}" for number in range(3)]
    merged = LayerRecord(name="all", kind="gemm", precision="int8", onnx_nodes=parts)
    engine = layer_rows(plan, info("tensorrt_rtx", merged))[1].engine
    assert (engine.layer, engine.matches_request) == ("all", True)
    apart = [
        LayerRecord(name=part, kind="gemm", precision=precision, onnx_nodes=[part])
        for part, precision in zip(parts, ("int8", "fp16", "int8"), strict=True)
    ]
    engine = layer_rows(plan, info("tensorrt_rtx", *apart))[1].engine
    assert engine.matches_request is False
    assert "asked int8, the engine ran int8 and fp16 gemm" in (engine.note or "")


@pytest.mark.parametrize(
    ("backend", "tactic", "expected"),
    [
        ("tensorrt_rtx", "__myelin_CASK_STUB", False),
        ("tensorrt", "sm80_xmma_sparse_gemm_i8i8_i8i32", True),
        ("tensorrt", "sm80_xmma_gemm_i8i8_i8i32", False),
        ("tensorrt", "", None),
        ("onnxruntime", "", False),
    ],
)
def test_whether_a_two_four_kernel_was_chosen(plan: Plan, backend: str, tactic: str, expected: bool | None) -> None:
    name = plan.layers[1].name
    record = LayerRecord(name="g", kind="gemm", precision="int8", tactic=tactic, onnx_nodes=[name])
    engine = layer_rows(plan, info(backend, record))[1].engine
    assert engine.uses_two_four is expected
    assert (engine.note is None) == (expected is True)


def test_a_dense_layer_is_not_asked_about_two_four(plan: Plan) -> None:
    record = LayerRecord(name="g", kind="gemm", precision="fp16", onnx_nodes=[plan.layers[0].name])
    engine = layer_rows(plan, info("onnxruntime", record))[0].engine
    assert engine.uses_two_four is None
    assert engine.note is None


def test_layers_decided_alike_are_one_group(plan: Plan) -> None:
    rows = layer_rows(plan, None)
    groups = precision_groups(rows)
    assert [(group.outcome, len(group.layers)) for group in groups] == [
        ("int8", 10),
        ("fp16", 2),
        ("fp16", 1),
        ("fp16", 1),
    ]
    assert sorted(position for group in groups for position in group.layers) == list(range(len(rows)))
    assert groups[0].reason.startswith("the output keeps ")
    low, high = (
        min(rows[i].precision.sqnr_db for i in groups[0].layers),
        max(rows[i].precision.sqnr_db for i in groups[0].layers),
    )
    assert f"{low:.1f} to {high:.1f} dB" in groups[0].reason
    assert "(threshold 20 dB)" in groups[0].reason


def test_names_with_digits_stay_whole(plan: Plan) -> None:
    group = sparsity_groups(layer_rows(plan, None))[0]
    assert group.outcome == "2:4"
    assert "--sparsity 2:4, though it does not pay: 2:4 pays on a100 from K = 256 and N = 256" in group.reason
    assert "this layer is 64 to 256 × 64 to 256" in group.reason


def test_engine_groups_say_what_differs(plan: Plan) -> None:
    groups = engine_groups(layer_rows(plan, sample_engine(plan, other_precision=[plan.layers[1].name])))
    assert any("asked int8, the engine ran fp16 gemm" in group.reason for group in groups)
    assert any(group.outcome == "int8 gemm" and group.reason.startswith("as asked") for group in groups)


def on_cpu(plan: Plan) -> Plan:
    """The plan as it were one for the CPU: all layers timed, the operator runs those inside blocks."""
    for layer in plan.layers:
        inside = layer.block is not None
        layer.precision.dtype = "int8" if inside else "fp32"
        layer.execution = ExecutionDecision(
            kernel="block_sparse" if inside else "engine",
            times_us={"matmul fp32": 200.0, "block_sparse int8": 50.0},
            threads=2,
            reason=f"{'block_sparse int8: 50' if inside else 'matmul fp32: 200'} µs (measured, 2 threads)",
        )
    return plan


def test_rows_say_what_runs_a_layer_and_what_it_takes(plan: Plan) -> None:
    rows = layer_rows(on_cpu(plan), None)
    assert rows[1].execution.kernel == "block_sparse" and rows[1].execution.threads == 2
    assert rows[1].time_ms == 0.05 and rows[0].time_ms == 0.2
    groups = {group.outcome: group for group in execution_groups(rows)}
    assert groups["block_sparse int8"].reason == "50 µs (measured, 2 threads)"
    assert len(groups["block_sparse int8"].layers) == 12
    assert len(groups["engine fp32"].layers) == 2


@pytest.mark.parametrize(
    ("reason", "detail"),
    [
        ("not built: --no-build", "not built: --no-build"),
        (
            "no builder: copy it; on the device run:\n# a remark\ntrtexec",
            "no builder: copy it; what to run there stands below",
        ),
    ],
)
def test_the_card_of_an_engine_that_was_not_built_ends_in_a_sentence(plan: Plan, reason: str, detail: str) -> None:
    report = sample_report(plan, engine_section={"built": False, "not_built_reason": reason})
    assert next(card for card in cards(report) if card.value == "not built").detail == detail


def test_the_times_of_all_layers_are_summed(plan: Plan) -> None:
    times = linear_time(on_cpu(plan), batch=8)
    assert times is not None
    assert (times.dense_ms, times.compressed_ms) == pytest.approx((14 * 0.2, 12 * 0.05 + 2 * 0.2))
    words = linear_time_words(times, layer_rows(plan, None))
    assert words == (
        "linear layers: 12 block_sparse int8, 2 engine fp32; 1.00 ms together, 2.80 ms as dense matmul fp32 "
        "(measured, shape by shape, batch 8, 2 threads)"
    )
    (card,) = [card for card in cards(sample_report(plan, linear_time=times)) if card.title == "Time of linear layers"]
    assert (card.value, card.basis) == ("1.00 ms", "measured")


def test_without_all_times_there_is_no_sum(plan: Plan) -> None:
    assert linear_time(plan, batch=8) is None
    on_cpu(plan).layers[3].execution.times_us.pop("block_sparse int8")
    assert linear_time(plan, batch=8) is None
    assert layer_rows(plan, None)[3].time_ms is None


def test_who_runs_the_model_is_told_what_it_needs(plan: Plan) -> None:
    assert operator_words(layer_rows(plan, None), None, on_gpu=False) is None
    words = operator_words(layer_rows(on_cpu(plan), None), None, on_gpu=False)
    assert words is not None and "plugins.register" in words and "lsp-deploy lower" in words
    words = operator_words(layer_rows(on_cpu(plan), None), None, on_gpu=True)
    assert words is not None and "liblsp_block_sparse.so" in words and "plugins.register" not in words


def test_layers_that_were_not_timed_are_in_no_group(plan: Plan) -> None:
    assert execution_groups(layer_rows(plan, None)) == []


def test_the_operator_is_recognised_as_what_multiplies(plan: Plan) -> None:
    name = plan.layers[1].name
    records = [
        LayerRecord(name="x", kind="QuantizeLinear", precision="fp32", onnx_nodes=[name]),
        LayerRecord(name="y", kind="BlockSparseLinear", precision="int8", onnx_nodes=[name]),
    ]
    row = layer_rows(on_cpu(plan), info("onnxruntime", *records))[1]
    assert (row.engine.kind, row.engine.precision, row.engine.matches_request) == ("BlockSparseLinear", "int8", True)

"""report.json: its schema, and that every field says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from report_samples import sample_attention, sample_engine, sample_plan, sample_pruning, sample_report

from lsp_deploy.files import sha256_of
from lsp_deploy.plan import plan_schema
from lsp_deploy.reporting.report import Report, report_schema
from lsp_deploy.reporting.writing import write_report

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def report() -> Report:
    plan = sample_plan(blocks=2, width=64, pattern="block")
    return sample_report(
        plan, engine=sample_engine(plan), pruning=sample_pruning(plan), attention=sample_attention(blocks=2)
    )


@pytest.mark.parametrize("name", ["report", "plan"])
def test_the_schemas_in_docs_are_current(name: str) -> None:
    current = {"report": report_schema, "plan": plan_schema}[name]()
    assert json.loads((DOCS / f"{name}.schema.json").read_text()) == json.loads(current), (
        "run scripts/write_schemas.py and commit docs/"
    )


def test_a_report_fits_its_schema_and_survives_a_round_trip(report: Report) -> None:
    text = report.model_dump_json()
    jsonschema.validate(json.loads(text), json.loads((DOCS / "report.schema.json").read_text()))
    assert Report.model_validate_json(text) == report


def test_a_plan_fits_its_schema() -> None:
    plan = sample_plan(blocks=1, width=64)
    jsonschema.validate(json.loads(plan.model_dump_json()), json.loads((DOCS / "plan.schema.json").read_text()))


def test_unknown_keys_and_numbers_that_are_none_are_refused(report: Report) -> None:
    content = json.loads(report.model_dump_json())
    with pytest.raises(ValidationError, match="surprise"):
        Report.model_validate(content | {"surprise": 1})
    with pytest.raises(ValidationError):
        Report.model_validate(content | {"size": content["size"] | {"compressed_percent": float("nan")}})


def properties() -> list[tuple[str, str, dict[str, Any]]]:
    schema = json.loads(report_schema())
    parts = {"Report": schema, **schema["$defs"]}
    return [(part, name, field) for part, content in parts.items() for name, field in content["properties"].items()]


@pytest.mark.parametrize(("part", "name", "field"), properties(), ids=lambda value: str(value)[:40])
def test_every_field_is_described(part: str, name: str, field: dict[str, Any]) -> None:
    assert field.get("description"), f"{part}.{name}"


UNITS = (
    *("_ms", "_db", "_percent", "_bytes", "_points", "_seconds", "_fraction", "_flops", "_ratio", "_per_s", "_us"),
    *("_w", "_j"),
)


def test_every_measured_number_has_its_unit_in_its_name() -> None:
    without = {
        f"{part}.{name}"
        for part, name, field in properties()
        if '"number"' in json.dumps({key: value for key, value in field.items() if key != "additionalProperties"})
        and not name.endswith(UNITS)
    }
    # Ratios of like quantities have none; δ and the damage have the unit of the objective that stands beside them.
    assert without == {
        "FidelitySection.cosine",
        "LayerBlocks.curve_delta",
        "LayerBlocks.predicted_delta",
        "LayerRecovery.error_after",
        "LayerRecovery.error_before",
        "LayerRecovery.ridge",
        "PruningSection.kappa",
        "PruningSection.predicted_damage",
    }


@pytest.mark.parametrize("part", ["size", "flops", "fidelity", "power", "run", "pruning", "attention"])
def test_parts_with_numbers_say_where_they_come_from(report: Report, part: str) -> None:
    assert json.loads(report.model_dump_json())[part]["basis"] in ("measured", "counted", "estimated", "not measured")


def test_both_files_are_written_and_the_same_report_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    plan = sample_plan(blocks=2, width=64)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(report, plan, tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["report.html", "report.json"]
    for name in ("report.html", "report.json"):
        assert sha256_of(tmp_path / "a" / name) == sha256_of(tmp_path / "b" / name)
    assert Report.model_validate_json((tmp_path / "a" / "report.json").read_text()) == report

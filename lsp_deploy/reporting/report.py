"""The report: what a run did, what it cost, and why; report.json holds it, report.html shows it."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from lsp_deploy.reporting.sections import (
    AttentionExecution,
    AttentionSection,
    BudgetSection,
    DataSection,
    EngineSection,
    FidelitySection,
    FlopsSection,
    HostSection,
    LayerRow,
    LinearTimeSection,
    ModelSection,
    OutputFile,
    PowerSection,
    ProfileRow,
    PruningSection,
    RunSection,
    Section,
    SizeSection,
    SpeedupRow,
    TargetSection,
)

__all__ = ["Report", "report_schema"]


class Report(Section):
    """The measured account of one run; every number has its unit in its name."""

    format: Literal["lsp-deploy.report.v1"] = Field("lsp-deploy.report.v1", description="of this file")
    tool_version: str = Field(description="of lsp-deploy")
    created: str = Field(description="UTC, ISO 8601")
    command: str = Field(description="as typed, without the program's name")
    notes: list[str] = Field(default_factory=list, description="what a reader must know first, most important first")
    warnings: list[str] = Field(default_factory=list, description="what may be wrong with this result")
    model: ModelSection = Field(description="the model that went in")
    target: TargetSection = Field(description="the hardware it was compressed for")
    data: DataSection = Field(description="the samples used")
    size: SizeSection = Field(description="files before and after")
    flops: FlopsSection = Field(description="work before and after")
    layers: list[LayerRow] = Field(description="every linear layer, in graph order")
    linear_time: LinearTimeSection | None = Field(None, description="their times together; null: not measured")
    attention_execution: AttentionExecution | None = Field(None, description="what computes attention; null: not known")
    pruning: PruningSection | None = Field(None, description="how zeros were chosen; null where this run did not")
    attention: AttentionSection | None = Field(None, description="attention maps; null where there are none to compare")
    fidelity: FidelitySection | None = Field(None, description="answers before and after; null: not measured")
    budget: BudgetSection | None = Field(None, description="the loss budget; null for a model without class output")
    profiles: list[ProfileRow] = Field(default_factory=list, description="latency before and after")
    speedups: list[SpeedupRow] = Field(default_factory=list, description="ratio of latencies, dense by compressed")
    power: PowerSection = Field(default_factory=PowerSection, description="power and energy")
    engine: EngineSection = Field(description="the target's engine")
    host: HostSection = Field(description="the machine that measured")
    run: RunSection = Field(description="what the run itself took")
    outputs: list[OutputFile] = Field(default_factory=list, description="files written")


def report_schema() -> str:
    """Return the JSON schema of report.json."""
    return json.dumps(Report.model_json_schema(), indent=1) + "\n"

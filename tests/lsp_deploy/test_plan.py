"""The plan on disk: everything comes back, damage is a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of
from lsp_deploy.plan import LayerPlan, Plan, PrecisionDecision, SparsityDecision, load_plan, save_plan


def make_plan() -> Plan:
    mask = np.random.default_rng(0).random((20, 6)) < 0.5
    plan = Plan(
        tool_version="0",
        model_sha256="0" * 64,
        target="a100",
        compute_type="fp16",
        opset=19,
        layers=[
            LayerPlan(
                name="/blocks.0/qkv",
                role="qkv",
                block=0,
                K=20,
                N=6,
                M=8,
                sparsity=SparsityDecision(
                    asked="2:4", pattern="2:4", zeros=0.5, method="activation", reason="asked for"
                ),
                precision=PrecisionDecision(asked="int8", dtype="int8", activation_scale=0.1, reason="asked for"),
            )
        ],
    )
    plan.masks["/blocks.0/qkv"] = mask
    plan.weight_scales["/blocks.0/qkv"] = np.linspace(0.1, 0.6, 6, dtype=np.float32)
    return plan


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.model_dump() == plan.model_dump()
    np.testing.assert_array_equal(loaded.masks["/blocks.0/qkv"], plan.masks["/blocks.0/qkv"])
    np.testing.assert_array_equal(loaded.weight_scales["/blocks.0/qkv"], plan.weight_scales["/blocks.0/qkv"])
    assert loaded.tensors_sha256 == sha256_of(tmp_path / "plan.safetensors")


def test_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_plan(make_plan(), tmp_path / name / "plan.json")
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_branch_can_be_changed_freely() -> None:
    plan = make_plan()
    branch = plan.branch()
    branch.layers[0].precision.dtype = "fp16"
    branch.masks.clear()
    assert plan.layers[0].precision.dtype == "int8"
    assert plan.masks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not valid at tool_version"),
        (b"no json", "not valid"),
        (b"\xff\xff", "not a text file"),
        (b'{"format": "other"}', "not valid at format"),
    ],
)
def test_a_file_that_is_no_plan(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_plan(path)


def test_tensors_that_do_not_belong(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").write_bytes(b"truncated")
    with pytest.raises(UserError, match="does not belong"):
        load_plan(tmp_path / "plan.json")


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read plan"):
        load_plan(tmp_path / "plan.json")

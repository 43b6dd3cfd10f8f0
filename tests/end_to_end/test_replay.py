"""A plan carried out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lsp_deploy.files import sha256_of


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_plan_of_another_compute_type_replays_to_the_same_bytes(run, bare: Path, precision: str) -> None:
    common = ("compress", bare.name, "--target", "a100", "--no-build")
    assert run(*common, "-o", "a", "--precision", precision).code == 0
    for _ in range(2):  # the second time into the folder that holds the first one's result
        result = run(*common, "-o", "b", "--plan", "a/plan.json")
        assert result.code == 0, result.err
        assert sha256_of(Path("a/model.onnx")) == sha256_of(Path("b/model.onnx"))


def test_nothing_of_an_earlier_model_stays(run, demo: Path) -> None:
    first = ("compress", demo.name, "--target", "cpu", "--sparsity", "none", "-o", "out")
    assert run(*first).code == 0
    assert list(Path("out/engines").iterdir())
    assert run(*first, "--precision", "fp32", "--no-build", "--force").code == 0
    assert not list(Path("out/engines").iterdir())


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("layers", "qgemm", "execution.kernel qgemm"),
        ("layers", "gather", "execution.kernel gather"),
        ("attention", "lsp", "attention.kernel lsp"),
    ],
)
def test_engines_of_a_gpu_have_no_kernels_of_a_cpu(run, bare: Path, place: str, value: str, words: str) -> None:
    common = ("compress", bare.name, "--target", "a100", "--no-build")
    assert run(*common, "-o", "a", "--precision", "fp16").code == 0
    plan = json.loads(Path("a/plan.json").read_text())
    changed = plan["attention"] if place == "attention" else plan["layers"][1]["execution"]
    changed["kernel"] = value
    Path("a/plan.json").write_text(json.dumps(plan))
    result = run(*common, "-o", "b", "--plan", "a/plan.json")
    assert result.code == 2 and words in result.err
    assert len(result.err.strip().splitlines()) == 1

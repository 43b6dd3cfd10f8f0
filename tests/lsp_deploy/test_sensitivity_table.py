"""What `sensitivity` prints, 80 columns wide."""

from __future__ import annotations

import io

from rich.console import Console

from lsp_deploy.analysing import sensitivity_table


def test_no_number_is_cut_off_and_the_unit_is_named() -> None:
    deltas = {"10": -0.000123456, "25": -8.1654e-05, "50": 0.000477123, "100": -0.0142123}
    layer = {"K": 3072, "N": 1024, "blocks": 12288, "delta_at_percent": deltas}
    result = {"objective": "top1", "samples": 12, "layers": {"/vit/encoder/layers.11/attention/o_proj/MatMul": layer}}
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(sensitivity_table(result), crop=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for delta in ("-0.000123", "-8.17e-05", "0.000477", "-0.0142"):
        assert delta in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "in nats of cross-entropy" in " ".join(text.split())

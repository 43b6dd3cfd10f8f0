"""The list of passes in the documentation is complete."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_pass_is_listed_once_in_the_documentation() -> None:
    defined = {
        name
        for file in (ROOT / "passes").glob("*.py")
        for name in re.findall(r"^class (\w+Pass)\(", file.read_text(), re.M)
    }
    rows = re.findall(r"^\| `(\w+Pass)", (ROOT / "docs" / "passes.md").read_text(), re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) == defined, "docs/passes.md has one line a pass"

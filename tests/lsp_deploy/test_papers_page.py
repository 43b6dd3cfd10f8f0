"""The page that maps the papers to the code names nothing that does not exist, and leaves nothing out."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import typer

from lsp_deploy.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "papers.md"
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PAGE.read_text())))
FILES = [span for span in SPANS if re.match(r"(lsp_deploy|passes|engines|tests|benchmarks|docs)/", span)]
COMMANDS = [span for span in SPANS if span.startswith(("lsp-deploy ", "--"))]
LINKS = sorted(set(re.findall(r"\]\(([^)#]+)", PAGE.read_text())))


@pytest.mark.parametrize("span", FILES)
def test_files_and_what_they_define_exist(span: str) -> None:
    """`path`, `path:name`, `path:Class.member` or `path --flag value`."""
    reference, *arguments = span.split()
    path, _, name = reference.partition(":")
    assert (ROOT / path).is_file(), f"{path} does not exist"
    if name:
        assert name in definitions(ROOT / path), f"{path} does not define {name}"
    for argument in arguments:
        assert f'"{argument}"' in (ROOT / path).read_text(), f"{path} does not take {argument}"


@pytest.mark.parametrize("span", COMMANDS)
def test_verbs_and_flags_exist(span: str) -> None:
    verbs = flags_by_verb()
    words = span.removeprefix("lsp-deploy ").split()
    if span.startswith("lsp-deploy "):
        assert words[0] in verbs
    for flag in words:
        assert not flag.startswith("--") or any(flag in flags for flags in verbs.values()), f"no verb takes {flag}"


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link: str) -> None:
    assert (PAGE.parent / link).is_file()


@pytest.mark.parametrize(("kind", "count"), [("Eq.", 14), ("Table", 8), ("Fig.", 6)])
def test_every_equation_table_and_figure_has_a_row(kind: str, count: int) -> None:
    rows = re.findall(rf"^\| {re.escape(kind)} (\d+)[,| ]", PAGE.read_text(), re.M)
    assert [int(row) for row in rows] == list(range(1, count + 1))


def test_what_cannot_be_taken_literally_is_explained_and_referred_to() -> None:
    explained = re.findall(r"^\*\*([①-⑳])", PAGE.read_text(), re.M)
    assert explained == [chr(ord("①") + index) for index in range(len(explained))]
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert set(re.findall("[①-⑳]", "\n".join(rows))) == set(explained)


@cache
def definitions(path: Path) -> frozenset[str]:
    """Return what a file defines at its top level, and `Class.member` for methods, fields and attributes."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names |= targets(node)
        if isinstance(node, ast.ClassDef):
            members = {name for statement in node.body for name in targets(statement)}
            members |= {
                attribute.attr
                for attribute in ast.walk(node)
                if isinstance(attribute, ast.Attribute)
                and isinstance(attribute.ctx, ast.Store)
                and isinstance(attribute.value, ast.Name)
                and attribute.value.id == "self"
            }
            names |= {f"{node.name}.{member}" for member in members}
    return frozenset(names)


def targets(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    assigned = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in assigned if isinstance(target, ast.Name)}


@cache
def flags_by_verb() -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    return {
        verb: {flag for parameter in command.params for flag in parameter.opts}
        for verb, command in group.commands.items()
    }

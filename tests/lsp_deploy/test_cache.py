"""Where results are kept between runs, and what their names depend on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.cache import cache_folder, content_key, drop_old_entries
from lsp_deploy.errors import UserError


def test_the_named_folder_wins_and_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_DEPLOY_CACHE", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "a" / "b"
    assert cache_folder().is_dir()
    assert not (tmp_path / "xdg").exists()


def test_then_the_desktops_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSP_DEPLOY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lsp-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "lsp-deploy"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSP_DEPLOY_CACHE", str(tmp_path / "file" / "in"))
    with pytest.raises(UserError, match="set LSP_DEPLOY_CACHE to another") as raised:
        cache_folder()
    assert "\n" not in str(raised.value)


@given(st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=5))))
def test_a_key_depends_on_the_content_alone(parts: dict[str, object]) -> None:
    key = content_key(parts=parts, format=1)
    assert key == content_key(format=1, parts=dict(reversed(list(parts.items()))))
    assert key != content_key(parts=parts, format=2)
    assert key != content_key(parts={**parts, "more": 1}, format=1)


def test_tuples_are_lists() -> None:
    assert content_key(block=(16, 16)) == content_key(block=[16, 16]) != content_key(block=(16, 32))


def test_entries_that_were_not_used_for_long_are_removed_and_nothing_else(tmp_path: Path) -> None:
    old, used, mine = tmp_path / ("a" * 32), tmp_path / ("b" * 32), tmp_path / "notes"
    for folder in (old, used, mine):
        folder.mkdir()
        (folder / "content").write_text("x")
        os.utime(folder, (0, 0))
    drop_old_entries(tmp_path, used)
    assert not old.exists()
    assert (used / "content").exists() and (mine / "content").exists()
    drop_old_entries(tmp_path, tmp_path / ("c" * 32))
    assert used.exists(), "it was used a moment ago"

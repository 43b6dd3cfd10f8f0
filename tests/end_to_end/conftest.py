"""Runs the command line in this process, on a copy of the embedded model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from made_up_timer import MadeUpTimer

from lsp_deploy import console
from lsp_deploy.cli import main
from lsp_deploy.demo import copy_demo


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `lsp-deploy ARGUMENTS` and return its exit code and output."""

    monkeypatch.setattr("lsp_deploy.steps.measuring.PROFILE_SECONDS", 0.1)
    monkeypatch.setattr("lsp_deploy.steps.timing.CpuLayerTimer", MadeUpTimer)
    # A machine with a power meter would wait for its windows.
    monkeypatch.setattr("lsp_deploy.engines.power.finding.find_meter", lambda *_: (None, "no meter in tests"))

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["lsp-deploy", *map(str, arguments)])
        console.configure(json=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached results: that of the tests alone, not the user's."""
    monkeypatch.setenv("LSP_DEPLOY_CACHE", str(_cache))
    return _cache


@pytest.fixture(scope="session")
def demo_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    copy_demo(folder)
    return folder


@pytest.fixture
def demo(demo_master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the embedded model, its data and its recipe; the working directory is there."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_master, folder)
    monkeypatch.chdir(folder)
    return next(folder.glob("*.onnx"))


@pytest.fixture
def bare(demo: Path) -> Path:
    """The embedded model without the recipe beside it."""
    (demo.parent / "lsp-deploy.toml").unlink()
    return demo

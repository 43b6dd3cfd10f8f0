"""What holds for the source as a whole: who imports whom, what is declared, what a wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lsp_deploy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"lsp_deploy": "lsp_deploy", "passes": "lsp_deploy/passes", "engines": "lsp_deploy/engines"}
FOLDERS |= {"plugins": "lsp_deploy/plugins"}
# Scripts that a bundle carries run on a device, beside other files and without lsp-deploy: they are not modules of it.
ON_DEVICE = ROOT / "lsp_deploy" / "bundle" / "on_device"
MODULES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not path.is_relative_to(ON_DEVICE)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("torch", "timm", "tensorrt_rtx", "tensorrt", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "matplotlib")
HEAVY += ("PIL", "polygraphy", "numpy", "jinja2")
# Import names that are not the distribution's.
DISTRIBUTIONS = {"PIL": "pillow", "google": "protobuf", "pynvml": "nvidia-ml-py", "sklearn": "scikit-learn"}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared() -> dict[str, list[Requirement]]:
    project = PROJECT["project"]
    lines = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in requirements] for extra, requirements in lines.items()}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("passes", ("engines", "sensitivity", "allocation", "reporting", "cli", "compress", "data")),
        ("engines", ("sensitivity", "allocation", "reporting", "cli", "compress")),
        ("plugins", ("engines", "sensitivity", "allocation", "reporting", "cli", "compress")),
        ("lsp_deploy/hardware", ("sensitivity", "allocation", "reporting", "cli", "compress", "engines")),
        ("lsp_deploy/data", ("sensitivity", "allocation", "reporting", "cli", "compress", "engines", "passes")),
        ("lsp_deploy/sensitivity", ("allocation", "reporting", "cli", "compress")),
    ],
)
def test_dependencies_run_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    prefixes = tuple(f"lsp_deploy.{name}" for name in forbidden)
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in _imports(path)
        if name.startswith(prefixes) and name.split(".")[1] in forbidden
    ]
    assert not wrong


def test_every_import_is_declared() -> None:
    names = {requirement.name for requirements in _declared().values() for requirement in requirements}
    # tomllib is in the standard library from Python 3.11; nvidia-ml-py is looked for, never needed.
    allowed = {_canonical(name) for name in names} | {"lsp-deploy", "nvidia-ml-py", "tomllib"}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in {found.partition(".")[0] for found in _imports(path)}
        if name not in sys.stdlib_module_names and _canonical(DISTRIBUTIONS.get(name, name)) not in allowed
    }
    assert not wrong


def test_lock_has_every_dependency_within_its_bounds() -> None:
    lines = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and pin.url is None for pin in pins)
    declared = _declared()
    for requirement in (item for extra in ("", "torch", "tensorrt-rtx", "dev") for item in declared[extra]):
        versions = [str(pin.specifier)[2:] for pin in pins if _canonical(pin.name) == _canonical(requirement.name)]
        assert versions, f"{requirement.name} is not locked"
        assert all(SpecifierSet(str(requirement.specifier)).contains(Version(version)) for version in versions)


def test_every_module_postpones_annotations() -> None:
    # The folders' package files hold nothing but a docstring.
    wrong = [
        path.relative_to(ROOT)
        for path in MODULES
        if "__future__" not in _imports(path) and any(not isinstance(node, ast.Expr) for node in _tree(path).body)
    ]
    assert not wrong


def test_nothing_loads_pickles() -> None:
    names = ("pickle", "shelve", "dill")
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in MODULES for name in _imports(path) if name in names]
    wrong += [
        f"{path.relative_to(ROOT)}: allow_pickle"
        for path in MODULES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle"
        if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert not wrong


def test_only_console_and_command_line_print() -> None:
    wrong = [
        path.relative_to(ROOT)
        for path in MODULES
        if path.name not in ("console.py", "cli.py")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['lsp-deploy', 'compress', '--help']\n"
        "from lsp_deploy.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "--calibration-data" in result.stdout
    assert result.stderr.strip() == "[]"


def test_version_and_entry_point() -> None:
    assert PROJECT["project"]["version"] == lsp_deploy.__version__
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "lsp-deploy"]
    assert script.value == PROJECT["project"]["scripts"]["lsp-deploy"]
    assert callable(script.load())


def test_wheel_holds_one_package_with_its_data(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core", reason="building a wheel needs scikit-build-core")
    settings = {"build-dir": str(tmp_path / "build"), "cmake.define.LSP_NATIVE": "OFF"}
    code = f"from scikit_build_core.build import build_wheel; build_wheel({str(tmp_path)!r}, {settings!r})"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lsp_deploy-*-py3-none-linux_*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"lsp_deploy"}
    # Code, and what stands beside it, but for what is compiled; and that it was not.
    expected = {"lsp_deploy/plugins/liblsp_ort.missing"} | {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ROOT / "plugins/onnxruntime" not in path.parents
    }
    assert names == expected
    assert {"lsp_deploy/assets/digits_vit.onnx", "lsp_deploy/py.typed"} <= names


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())

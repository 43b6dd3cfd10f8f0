"""A target calibrated with made-up times, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lsp_deploy import calibrating
from lsp_deploy.calibrating import Calibration, calibrate_target, calibration_table
from lsp_deploy.cli import app
from lsp_deploy.engines.tensorrt_common.gpu import Gpu
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cpu_timings import LinearShape
from lsp_deploy.hardware.gpu_timings import GPU_DENSITIES
from lsp_deploy.hardware.target import load_target


class MadeUpTimer:
    """Blocks of 32 pay from 30 % zeros on, those of 16 from 60 %; 2:4 pays where K is 1000 or more."""

    device = "NVIDIA Made Up"
    versions = {"tensorrt": "10.3.0"}  # noqa: RUF012
    has_operator = True

    def __init__(self, *, never: bool = False) -> None:
        self.never = never
        self.asked: list[tuple[LinearShape, list[str]]] = []

    def curves(self, shape: LinearShape, names: Sequence[str], compute_type: str) -> dict[str, dict[float, float]]:
        self.asked.append((shape, list(names)))
        assert compute_type == "fp16"
        dense = shape.K / 10
        level = 1e3 if self.never else 1 / (0.7 if shape.block == (32, 32) else 0.4)
        times = {
            "matmul fp16": {1.0: dense},
            "two_four fp16": {1.0: dense * (0.8 if shape.K >= 1000 and not self.never else 0.99)},
            "block_sparse fp16": {density: dense * density * level for density in GPU_DENSITIES},
        }
        return {name: times[name] for name in names}


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "liblsp_block_sparse.so"
    path.write_bytes(b"")
    return path


def calibrate(plugin: Path, target: str = "a100", timer: MadeUpTimer | None = None, **options: int) -> Calibration:
    output = plugin.with_name("My_A100.toml")
    return calibrate_target(target, output, [plugin], timer=timer or MadeUpTimer(), **options)


def test_the_file_is_the_target_with_what_was_measured(plugin: Path) -> None:
    calibration = calibrate(plugin)
    found, base = load_target(str(calibration.path)), load_target("a100")
    assert found == calibration.target
    pays = found.pays
    assert (pays.block_zeros_min, pays.block_zeros_min_16) == (0.3, 0.6)
    assert (pays.sparse24_min_k, pays.sparse24_min_n) == (1536, 384)
    assert pays.source == pays.block_source
    assert pays.source.startswith("measured on NVIDIA Made Up with tensorrt 10.3.0, 20")
    assert pays.source.endswith(", fp16, batch 8")
    assert found.name == "my-a100" and found.aliases == []
    same = {"name": base.name, "aliases": base.aliases, "pays": base.pays}
    assert found.model_copy(update=same) == base


def test_comments_say_what_was_measured_and_on_what(plugin: Path) -> None:
    lines = calibrate(plugin, batch=2).path.read_text().splitlines()
    assert lines[0].startswith("# a100, with `pays` measured on NVIDIA Made Up with tensorrt 10.3.0, ")
    layers = [line for line in lines if line.startswith("#   ")]
    assert len(layers) == 8
    assert layers[0] == (
        "#   394 x 384 x 1152: dense 38.4 µs, 2:4 38.0 µs, zero blocks pay from 30% (32x32), 60% (16x16)"
    )


def test_zeros_that_never_pay_are_left_out(plugin: Path) -> None:
    pays = load_target(str(calibrate(plugin, timer=MadeUpTimer(never=True)).path)).pays
    assert (pays.block_zeros_min, pays.block_zeros_min_16, pays.sparse24_min_k, pays.sparse24_min_n) == (None,) * 4


def test_two_four_is_not_timed_where_there_are_no_units_for_it(plugin: Path) -> None:
    own = plugin.with_name("own.toml")
    base = load_target("a100")
    text = calibrate(plugin).path.read_text()
    own.write_text(text.replace(f"sparse24 = {base.peak['fp16'].sparse24}", ""))
    assert load_target(str(own)).peak["fp16"].sparse24 is None
    timer = MadeUpTimer()
    calibration = calibrate_target(str(own), plugin.with_name("again.toml"), [plugin], timer=timer)
    assert not any(name.startswith("two_four") for _, names in timer.asked for name in names)
    assert calibration.target.pays.sparse24_min_k is None
    assert all(layer.two_four_us is None for layer in calibration.layers)


def test_the_table_has_a_row_a_layer(plugin: Path) -> None:
    table = calibration_table(calibrate(plugin))
    assert table.row_count == 8
    assert list(table.columns[5].cells) == ["30%"] * 8


@pytest.mark.parametrize(
    ("target", "output", "words"),
    [
        ("cpu", "x.toml", "cpu needs no calibration"),
        ("t4", "x.toml", "t4 has nothing to calibrate: lsp::BlockSparseLinear needs compute capability 8.0"),
        ("a100", "x.json", "let its name end with .toml"),
        ("a101", "x.toml", "unknown target 'a101'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(plugin: Path, target: str, output: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        calibrate_target(target, plugin.with_name(output), [plugin], timer=MadeUpTimer())


class NeverTimed(MadeUpTimer):
    def curves(self, shape, names, compute_type):
        raise AssertionError("measured before it is known where the file goes")


def test_where_the_file_goes_is_looked_at_before_anything_is_measured(plugin: Path, monkeypatch) -> None:
    plugin.with_name("file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .*file"):
        calibrate_target("a100", plugin.with_name("file") / "x.toml", [plugin], timer=NeverTimed())
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot write .*x.toml: permission denied"):
        calibrate_target("a100", plugin.with_name("x.toml"), [plugin], timer=NeverTimed())
    monkeypatch.undo()
    assert calibrate_target("a100", plugin.with_name("new") / "x.toml", [plugin], timer=MadeUpTimer()).path.is_file()


def test_a_file_is_replaced_only_on_demand(plugin: Path) -> None:
    first = calibrate(plugin).path.read_text()
    with pytest.raises(UserError, match="is there already"):
        calibrate(plugin)
    assert calibrate(plugin, force=True).path.read_text() == first


def test_a_plugin_is_needed(plugin: Path) -> None:
    with pytest.raises(UserError, match="name it with --plugin"):
        calibrate_target("a100", plugin.with_name("x.toml"), timer=MadeUpTimer())
    with pytest.raises(UserError, match=r"plugin .*nowhere\.so does not exist"):
        calibrate_target("a100", plugin.with_name("x.toml"), [Path("nowhere.so")], timer=MadeUpTimer())


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (None, r"H100 80GB SXM has compute capability 9\.0, and this machine has no NVIDIA GPU; run it there"),
        (Gpu("NVIDIA L4", "8.9", 58), r"this machine has a NVIDIA L4, 8\.9; run it there"),
    ],
)
def test_a_machine_without_the_gpu_is_an_error_of_one_line(
    plugin: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, words: str
) -> None:
    monkeypatch.setattr("lsp_deploy.engines.tensorrt_common.gpu.first_gpu", lambda: gpu)
    output = plugin.with_name("x.toml")
    with pytest.raises(UserError, match=words):
        calibrate_target("h100", output, [plugin])
    assert not output.exists()


def test_the_verb_prints_the_target(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_made_up_times(*given: object, **options: object) -> Calibration:
        return calibrate_target(*given, **options, timer=MadeUpTimer())  # type: ignore[arg-type]

    monkeypatch.setattr(calibrating, "calibrate_target", with_made_up_times)
    output = plugin.with_name("board.toml")
    arguments = ["calibrate-target", "a100", "-o", str(output), "--plugin", str(plugin)]
    answer = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(answer.stdout)["target"]["pays"]["block_zeros_min"] == 0.3
    shown = CliRunner().invoke(app, [*arguments, "--force"], catch_exceptions=False).output
    assert "use it with --target" in shown and "1536" in shown

"""The shipped targets are complete and say where their figures come from; a user's own are checked in one line."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

import lsp_deploy.hardware.target as target_module
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import Kernels, Peak, Target, list_targets, load_target
from lsp_deploy.hardware.target_tables import target_details, target_table

FOLDER = Path(target_module.__file__).parent / "targets"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
GPUS = [name for name in NAMES if name != "cpu"]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "targets.md"

CPU_BOARD = """
kind = "cpu"
architecture = "Zen 9"
builders = ["onnxruntime"]
compute_type = "fp32"
types = ["fp32", "int8"]
max_opset = 21
[pays]
source = "measured on my board"
block_source = "measured on my board"
"""


def write(folder: Path, text: str, name: str = "my-board.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def refused(name_or_path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_target(name_or_path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(renderable)
    return console.file.getvalue()


def test_the_first_set_is_complete():
    expected = {"a100", "a100-40gb", "h100", "l4", "t4", "rtx-4090", "rtx-5090", "agx-orin-64gb", "cpu"}
    assert expected <= set(NAMES)
    assert {target.name for target in list_targets()} == set(NAMES)
    assert list_targets()[-1].name == "cpu"


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_is_named_like_its_target(name):
    assert load_target(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_names_its_sources(name):
    comments = [line for line in (FOLDER / f"{name}.toml").read_text().splitlines() if line.startswith("#")]
    assert comments
    text = " ".join(comments)
    assert any(word in text for word in ("datasheet", "whitepaper", "technical brief")) or name == "cpu"


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_has_every_figure(name):
    target = load_target(name)
    figures = [target.memory_gb, target.bandwidth_gb_s, target.tdp_w, target.sm_count, target.boost_mhz]
    figures += [peak.dense for peak in target.peak.values()] + [target.launch_us]
    assert all(figure is not None and figure > 0 for figure in figures)
    assert set(target.types) - {"int4"} <= set(target.peak)
    assert target.tensorrt
    assert target.pays.source
    assert target.pays.block_source


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_in_the_ratios_that_matrix_units_have(name):
    peak = load_target(name).peak
    for unit in peak.values():
        assert unit.sparse24 is None or unit.sparse24 == pytest.approx(2 * unit.dense, rel=0.002)
    assert peak["int8"].dense / peak["fp16"].dense == pytest.approx(
        round(peak["int8"].dense / peak["fp16"].dense), 0.01
    )
    assert peak["fp32"].dense < peak["fp16"].dense < peak["int8"].dense


@pytest.mark.parametrize("name", GPUS)
def test_peak_fp32_follows_from_multiprocessors_and_clock(name):
    """An SM does 64 (before Ampere and in A100) or 128 fused multiply-adds a clock; a tensor clock may be lower."""
    target = load_target(name)
    per_clock = target.peak["fp32"].dense * 1e12 / (2 * target.sm_count * target.boost_mhz * 1e6)
    assert per_clock == pytest.approx(64, rel=0.01) or per_clock == pytest.approx(128, rel=0.09)


@pytest.mark.parametrize(("name", "present", "absent"), [
    ("t4", {"fp16", "int8"}, {"bf16", "fp8", "fp4", "int4"}),
    ("a100", {"bf16", "int8", "int4"}, {"fp8", "fp4"}),
    ("agx-orin", {"bf16", "int8"}, {"fp8", "fp4"}),
    ("l4", {"bf16", "fp8"}, {"fp4"}),
    ("rtx-4090", {"bf16", "fp8"}, {"fp4"}),
    ("h100", {"bf16", "fp8"}, {"fp4"}),
    ("rtx-5090", {"bf16", "fp8", "fp4"}, set()),
    ("cpu", {"fp32", "bf16", "int8"}, {"fp16", "fp8"}),
])  # fmt: skip
def test_element_types(name, present, absent):
    types = set(load_target(name).types)
    assert present <= types
    assert not absent & types


@pytest.mark.parametrize(("name", "builders"), [
    ("a100", ["tensorrt_rtx", "tensorrt"]),
    ("t4", ["tensorrt_rtx", "tensorrt"]),
    ("rtx-5090", ["tensorrt_rtx", "tensorrt"]),
    ("h100", ["tensorrt"]),
    ("agx-orin", ["tensorrt"]),
    ("cpu", ["onnxruntime"]),
])  # fmt: skip
def test_builders_in_order_of_preference(name, builders):
    assert load_target(name).builders == builders


def test_tensorrt_rtx_has_every_compute_capability_that_it_is_named_for():
    runtime = pytest.importorskip("tensorrt_rtx", reason="needs the extra [tensorrt-rtx]")
    known = {name.removeprefix("SM") for name in runtime.ComputeCapability.__members__ if name.startswith("SM")}
    for target in list_targets():
        if target.compute_capability is not None:
            buildable = target.compute_capability.replace(".", "") in known
            assert buildable == ("tensorrt_rtx" in target.builders), target.name


def test_where_zeros_pay():
    a100, h100, t4, cpu = (load_target(name).pays for name in ("a100", "h100", "t4", "cpu"))
    assert (a100.sparse24_min_k, a100.sparse24_min_n) == (256, 256)
    assert a100.block_zeros_min < h100.block_zeros_min < a100.block_zeros_min_16
    assert t4.sparse24_min_k is None
    assert t4.block_zeros_min is None
    assert cpu.sparse24_min_k is None
    assert cpu.block_zeros_min is None


def test_kernels_have_defaults_that_name_their_source(tmp_path):
    a100, h100 = (load_target(name).kernels for name in ("a100", "h100"))
    assert a100 == Kernels()
    assert h100.block_efficiency < a100.block_efficiency < a100.dense_efficiency
    assert "not measured" in a100.source
    target = load_target(write(tmp_path, 'base = "a100"\n[kernels]\ntile_n = [128, 64]\nsource = "measured here"\n'))
    assert target.kernels == Kernels(tile_n=[128, 64], source="measured here")
    text = printed(target_details(target))
    assert "kernels.tile_m" in text
    assert "128, 64" in text
    assert "kernels." not in printed(target_details(load_target("cpu")))


def test_no_two_targets_share_a_name():
    names = [alias for target in list_targets() for alias in (target.name, *target.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("typed", "name"), [
    ("A100", "a100"), ("a100_80gb", "a100"), ("a100-80GB", "a100"), ("A100-40GB", "a100-40gb"),
    ("a100-pcie", "a100-pcie"), ("agx-orin", "agx-orin-64gb"), ("AGX_Orin_64GB", "agx-orin-64gb"),
    ("RTX_4090", "rtx-4090"), ("RTX 5090", "rtx-5090"), ("Tesla-T4", "t4"), ("host", "cpu"),
])  # fmt: skip
def test_names_and_aliases(typed, name):
    assert load_target(typed).name == name


def test_the_boards_of_one_gpu_differ_only_where_they_do():
    sxm, small, pcie = (load_target(name) for name in ("a100", "a100-40gb", "a100-pcie"))
    assert (sxm.memory_gb, sxm.bandwidth_gb_s, sxm.tdp_w) == (80, 2039, 400)
    assert (small.memory_gb, small.bandwidth_gb_s, small.tdp_w) == (40, 1555, 400)
    assert (pcie.memory_gb, pcie.bandwidth_gb_s, pcie.tdp_w) == (80, 1935, 300)
    assert small.peak == sxm.peak == pcie.peak
    assert not set(small.aliases) & set(sxm.aliases)
    assert len({sxm.sha256, small.sha256, pcie.sha256}) == 3


@pytest.mark.parametrize(("typed", "nearest"), [
    ("a10", "a100"), ("h200", "h100"), ("rtx-4091", "rtx-4090"), ("agxorin", "agx-orin-64gb"), ("5090ti", "rtx-5090"),
])  # fmt: skip
def test_an_unknown_name_gets_the_nearest(typed, nearest):
    message = refused(typed)
    assert repr(typed) in message
    assert nearest in message
    assert "lsp-deploy targets" in message


def test_a_name_like_nothing_gets_no_guess():
    assert "nearest" not in refused("zzz")
    assert "nearest" not in refused("")


def test_a_users_file(tmp_path):
    target = load_target(write(tmp_path, CPU_BOARD))
    assert target.name == "my-board"
    assert target.title == "my-board"
    assert target.max_opset == 21


def test_a_file_is_a_path_only_if_it_looks_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, CPU_BOARD, "a100.toml")
    write(tmp_path, CPU_BOARD, "board")
    assert load_target("a100").architecture == "Ampere"
    assert load_target("a100.toml").architecture == "Zen 9"
    assert load_target("./board").architecture == "Zen 9"
    assert "unknown target 'board'" in refused("board")


def test_inheritance_merges_table_by_table(tmp_path):
    text = 'base = "A100"\nname = "a100-at-250w"\ntdp_w = 250\n'
    text += "[peak]\nfp16 = { dense = 250 }\n[pays]\nblock_zeros_min = 0.5\n"
    target, base = load_target(write(tmp_path, text)), load_target("a100")
    assert (target.name, target.title, target.aliases) == ("a100-at-250w", "a100-at-250w", [])
    assert target.tdp_w == 250
    assert target.peak["fp16"] == Peak(dense=250, sparse24=624)
    assert target.peak["int8"] == base.peak["int8"]
    assert target.pays.block_zeros_min == 0.5
    assert target.pays.sparse24_min_k == base.pays.sparse24_min_k
    assert base.tdp_w == 400


def test_inheritance_through_an_alias_and_a_derived_target(tmp_path):
    assert load_target(write(tmp_path, 'base = "a100-sxm4-40gb"\n')).bandwidth_gb_s == 1555


@pytest.mark.parametrize(("text", "said"), [
    ("kind = ", "not valid TOML"),
    ('base = "b200"\n', "base is the name of a target"),
    ("base = 7\n", "base is the name of a target"),
    (CPU_BOARD.replace("max_opset = 21", ""), "max_opset is missing: highest opset"),
    (CPU_BOARD.replace("max_opset = 21", "max_opset = 11"), "should be greater than or equal to 17; got 11"),
    (CPU_BOARD.replace("max_opset", "max_opsets"), "there is no field 'max_opsets'; did you mean max_opset?"),
    (CPU_BOARD.replace('"int8"', '"int7"'), "types.1: Input should be"),
    (CPU_BOARD.replace("[pays]", "[pays]\nsparse24_min_k = 64"), "sparse24_min_k and sparse24_min_n belong together"),
    (CPU_BOARD.replace("[pays]", "[pays]\nblock_zeros_min = 45"), "Input should be less than 1; got 45"),
    (CPU_BOARD.replace("[pays]", "[pays]\nbreak_even = 1"), "there is no field 'pays.break_even'; the fields are"),
    (CPU_BOARD.replace('compute_type = "fp32"', 'compute_type = "fp16"'), "fp16, which is not among types"),
    (CPU_BOARD.replace('kind = "cpu"', 'kind = "gpu"'), "a GPU target also needs compute_capability, memory_gb"),
    (CPU_BOARD + '[pays.more]\nx = 1\n', "there is no field 'pays.more'"),
    ('base = "a100"\nbandwidth_gb_s = -1\n', "should be greater than 0; got -1 (peak memory bandwidth"),
    ('base = "a100"\nbandwidth_gb_s = nan\n', "bandwidth_gb_s: "),
    ('base = "a100"\nbandwidth_gb_s = "2039"\n', "bandwidth_gb_s: Input should be a valid number; got '2039'"),
    ('base = "a100"\n[peak]\nfp16 = { dense = 300, sparse24 = 200 }\n', "peak.fp16: sparse24 = 200 is not above"),
    ('base = "a100"\n[kernels]\ntile_n = [0]\n', "kernels.tile_n: a tile has at least one column; got [0]"),
    ('base = "a100"\n[kernels]\nblok_efficiency = 0.4\n', "kernels.blok_efficiency'; did you mean block_efficiency?"),
    ('base = "a100"\n[peak]\nfp17 = { dense = 300 }\n', "peak.fp17: Input should be"),
    ('base = "a100"\nname = "../../etc"\n', "a name is made of lower-case letters"),
    ('base = "a100"\nbuild_on_device = true\ndevice_commands = ""\n', "build_on_device needs device_commands"),
    ('base = "a100"\ndevice_commands = "x {enginee} ${HOME}"\n', "{enginee} is not filled in; did you mean {engine}?"),
])  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, said):
    message = refused(write(tmp_path, text))
    assert "my-board.toml" in message
    assert said in message


def test_files_that_cannot_be_read(tmp_path):
    assert "does not exist" in refused(str(tmp_path / "none.toml"))
    assert "cannot read target" in refused(f"{tmp_path}/")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(str(tmp_path / "binary.toml"))


def test_the_hash_follows_what_the_target_says(tmp_path):
    first = load_target(write(tmp_path, CPU_BOARD))
    reordered = (
        "\n".join(reversed(CPU_BOARD.split("[pays]")[0].splitlines())) + "\n[pays]" + CPU_BOARD.split("[pays]")[1]
    )
    assert load_target(write(tmp_path, reordered)).sha256 == first.sha256
    assert load_target(write(tmp_path, CPU_BOARD.replace("21", "22"))).sha256 != first.sha256


def test_a_target_survives_json():
    for target in list_targets():
        assert Target.model_validate_json(target.model_dump_json()) == target


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_that_a_model_is_checked_by(name):
    target = load_target(name)
    rules = target.rules()
    assert (rules.name, rules.max_opset, rules.types) == (name, target.max_opset, frozenset(target.types))
    assert rules.tensorrt == (target.kind == "gpu")
    assert rules.compute_capability == target.compute_capability


def test_only_the_orin_builds_for_the_orin():
    assert [target.name for target in list_targets() if target.build_on_device] == ["agx-orin-64gb"]
    commands = load_target("agx-orin").commands_on_device("out/model.onnx", "out/model.engine")
    assert "/usr/src/tensorrt/bin/trtexec --onnx=out/model.onnx --saveEngine=out/model.engine" in commands
    assert "TensorRT 10.3" in commands
    assert "Shapes" not in commands
    assert "{" not in commands


@pytest.mark.parametrize("name", ["agx-orin", "h100"])
def test_commands_are_ready_for_a_shell(name):
    shapes = {bound: {"pixel values": (batch, 3, 224, 224)} for bound, batch in (("min", 1), ("opt", 8), ("max", 32))}
    text = load_target(name).commands_on_device("my model.onnx", "e.engine", shapes=shapes, sparse_weights=True)
    build, run = (shlex.split(part) for part in text.replace("\\\n", " ").splitlines() if not part.startswith("#"))
    assert build[0].endswith("trtexec")
    assert {"--onnx=my model.onnx", "--stronglyTyped", "--sparsity=enable"} <= set(build)
    assert "--minShapes=pixel values:1x3x224x224" in build
    assert "--optShapes=pixel values:8x3x224x224" in build
    assert "--maxShapes=pixel values:32x3x224x224" in build
    assert "--loadEngine=e.engine" in run
    assert "--shapes=pixel values:8x3x224x224" in run


def test_the_overview_fits_a_terminal_and_names_all():
    text = printed(target_table(list_targets()))
    for target in list_targets():
        assert target.name in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("name", NAMES)
def test_the_details_of_a_target(name):
    target = load_target(name)
    text = printed(target_details(target))
    assert "max_opset" in text
    assert "pays.source" in text
    assert ("trtexec" in text) == ("tensorrt" in target.builders)


def test_the_documentation_lists_every_target_and_field():
    text = DOCUMENTATION.read_text()
    for target in list_targets():
        assert f"`{target.name}`" in text, target.name
    for field in [*Target.model_fields, *Kernels.model_fields]:
        assert f"`{field}`" in text, field

"""The recipe: layers of it, validation in one line, and replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsp_deploy.errors import UserError
from lsp_deploy.recipe import BLOCK_SHAPES, Recipe, merge_recipe, parse_shapes, read_recipe_file, save_recipe_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def test_flag_wins_over_recipe_over_found_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lsp-deploy.toml").write_text('target = "t4"\nprecision = "fp16"\nsamples = 7\n')
    named = tmp_path / "named.toml"
    named.write_text('precision = "int8"\nsamples = 8\n')
    merged = merge_recipe({"samples": 9}, named, model)
    assert (merged.target, merged.precision, merged.samples) == ("t4", "int8", 9)


def test_found_file_names_paths_in_its_own_folder_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lsp-deploy.toml").write_text('target = "a100"\ncalibration_data = "../elsewhere"\n')
    with pytest.raises(UserError, match="leads out of the model's folder"):
        merge_recipe({}, None, model)
    named = tmp_path / "named.toml"
    named.write_text('target = "a100"\ncalibration_data = "../elsewhere"\n')
    (tmp_path / "lsp-deploy.toml").unlink()
    assert merge_recipe({}, named, model).calibration_data == str(tmp_path / "../elsewhere")


def test_found_file_refuses_a_link_that_leads_out(model: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside-images"
    outside.mkdir(exist_ok=True)
    (tmp_path / "images").symlink_to(outside)
    (tmp_path / "lsp-deploy.toml").write_text('target = "a100"\ncalibration_data = "images"\n')
    with pytest.raises(UserError, match="leads out"):
        merge_recipe({}, None, model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"flops": 1.5}, "--flops is the fraction of FLOPs that remains"),
        ({"flops": 0.0}, "--flops"),
        ({"sparsity": "block", "block": "0x16"}, "--block is one of 16x16"),
        ({"precision": "int3"}, "--precision is one of"),
        ({"precision": "int4"}, "later version"),
        ({"precision": "fp8"}, "later version"),
        ({"recover": "finetune"}, "later version"),
        ({"sparsity": "block", "flops": 0.5, "max_latency_ms": 1.0}, "give one of them"),
        ({"max_energy_mj": 1.0}, "--max-energy-mj is for --sparsity block"),
        ({"sparsity": "block", "max_parameters": 0}, "--max-parameters is a number above 0"),
        ({"sparsity": "block", "max_size_mb": 1.0, "allocator": "lsp"}, "--allocator lsp knows a FLOPs target only"),
        ({"sparsity": "block", "min_density": 1.5}, "--min-density is a fraction"),
        ({"min_density": 0.5}, "--min-density is for --sparsity block"),
        ({"sparsity": "block", "power_weight": 2.0}, "--power-weight is a term of --allocator lsp"),
        ({"sparsity": "block", "allocator": "lsp", "power_weight": -1.0}, "--power-weight is a number of 0 or more"),
        ({"sparsity": "block", "allocator": "lsp", "prefer_structure": True}, "needs --allocator exact"),
        ({"prefer_structure": True}, "--prefer-structure is for --sparsity block"),
        ({"exclude": "("}, "--exclude is a regular expression"),
        ({"block": "32x32"}, "--block is for --sparsity block"),
        ({"sparsity": "none", "flops": 0.5}, "--sparsity none"),
        ({"flops_of": "model"}, "give --flops"),
        ({"labels": "l.csv"}, "has no labels"),
        ({"eval_labels": "l.csv"}, "needs --eval-data"),
        ({"label_column": "c"}, "--label-column"),
        ({"eval_data": "random"}, "name images"),
        ({"max_drop": -1.0}, "--max-drop"),
        ({"samples": 0}, "--samples"),
        ({"opt_shapes": "x=1x3"}, "--opt-shapes"),
    ],
)
def test_bad_values_are_one_line(flags: dict[str, object], message: str, model: Path) -> None:
    with pytest.raises(UserError) as raised:
        merge_recipe({"target": "a100", **flags}, None, model)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_target_says_what_to_type(model: Path) -> None:
    with pytest.raises(UserError, match="--target is missing"):
        merge_recipe({}, None, model)


def test_unknown_key_names_file_and_keys(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lsp-deploy.toml").write_text('target = "a100"\nsparsty = "2:4"\n')
    with pytest.raises(UserError, match=r"lsp-deploy\.toml: there is no recipe key 'sparsty'"):
        merge_recipe({}, None, model)


@pytest.mark.parametrize("content", [b"target = ", b"\xff\xfe"])
def test_recipe_that_is_not_toml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not valid TOML"):
        read_recipe_file(path, own_folder_only=False)


def test_saved_recipe_replays_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(target="a100", precision="int8", calibration_data="images", max_drop=0.5)
    save_recipe_file(recipe, tmp_path / "saved.toml")
    replayed = merge_recipe({}, tmp_path / "saved.toml", tmp_path / "model.onnx")
    assert replayed.typed() == {**recipe.typed(), "calibration_data": str(tmp_path / "images")}


@pytest.mark.parametrize("block", BLOCK_SHAPES)
def test_every_block_shape_is_taken(block: str) -> None:
    recipe = Recipe(target="a100", sparsity="block", block=block)
    assert "x".join(map(str, recipe.block_shape)) == block


def test_shapes_are_spelled_as_trtexec_does() -> None:
    assert parse_shapes("x:1x3x224x224, y:1x77") == {"x": (1, 3, 224, 224), "y": (1, 77)}
    for bad in ("x", "x:", ":1x3", "x:1x", "x:0x3", "x:-1x3"):
        with pytest.raises(ValueError, match="written like"):
            parse_shapes(bad)


def test_data_named_anew_does_not_get_the_labels_of_other_data(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lsp-deploy.toml").write_text(
        'target = "a100"\ncalibration_data = "a.npz"\nlabels = "a.csv"\n'
        'sparsity = "block"\nblock = "16x16"\nflops = 0.5\n'
    )
    merged = merge_recipe({"calibration_data": "synthetic", "sparsity": "2:4"}, None, model)
    assert (merged.labels, merged.block, merged.flops) == (None, None, None)
    assert merge_recipe({}, None, model).flops == 0.5

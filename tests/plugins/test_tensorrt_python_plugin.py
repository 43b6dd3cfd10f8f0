"""The plugin in Python: what it stores, and engines that TensorRT-RTX builds with it, without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from block_sparse_cases import case
from exports import export_timm
from gpu_plans import applied, block_plan, inside
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.engines.protocol import BuildOptions, EngineBuildError, EngineInfo
from lsp_deploy.engines.tensorrt_common.configuration import NotInThisVersionError
from lsp_deploy.engines.tensorrt_common.operators import provide_operators
from lsp_deploy.engines.tensorrt_rtx.backend import TensorRtRtxBackend
from lsp_deploy.hardware.target import load_target
from lsp_deploy.model import load_model, save_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear
from lsp_deploy.plugins.tensorrt import python_plugin

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"
FORMS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": "float16", "x_type": "float16", "out_type": "float16", "activation": "gelu"},
    "bfloat16": {"dtype": "bfloat16", "x_type": "bfloat16", "out_type": "bfloat16", "residual": True},
    "int8": {"dtype": "int8", "x_type": "int8", "out_type": "float16", "residual": True},
    "int8 to int8": {"dtype": "int8", "x_type": "int8", "out_type": "int8", "out_offset": 0.5},
    "float16 to int8": {"dtype": "float16", "x_type": "float16", "out_type": "int8", "activation": "relu"},
    "no block": {"dtype": "float16", "x_type": "float16", "out_type": "float16", "survives": np.zeros((6, 5), bool)},
}

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


def built(model: ir.Model, folder: Path, target: str = "a100") -> EngineInfo:
    """Build a model whose first dimensions may be dynamic."""
    path = folder / "model.onnx"
    save_model(model, path)
    shapes = {}
    for value in model.graph.inputs:
        sizes = [size if isinstance(size, int) else None for size in value.shape or ()]
        shapes[str(value.name)] = [tuple(batch if size is None else size for size in sizes) for batch in (1, 2, 4)]
    bounds = {
        name: {key: bound[index] for key, bound in shapes.items()}
        for index, name in enumerate(("min_shapes", "opt_shapes", "max_shapes"))
    }
    return TensorRtRtxBackend().build(path, folder / "engine", load_target(target), BuildOptions(**bounds))


def operators_in(info: EngineInfo) -> dict[str, str]:
    """Return what each operator of the engine computes in, by its node."""
    found = [layer for layer in info.layers if layer.kind == "custom_layer"]
    return {name: layer.precision for layer in found for name in layer.onnx_nodes}


@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from(((16, 16), (32, 64), (64, 32))),
    st.integers(0, 1 << 30),
)
@settings(max_examples=30)
def test_fields_hold_all_of_an_operator(form: str, k: int, n: int, block: tuple[int, int], seed: int) -> None:
    options = {**FORMS[form], "survives": None}
    operator = case(K=k, N=n, block=block, seed=seed, **options).in_layout("bsl16.v1").operator
    fields = python_plugin._attributes(operator)
    # TensorRT hands over numbers and texts one way when it parses and another when it loads an engine.
    texts = {name: field.view(np.uint8) for name, field in fields.items() if field.dtype == np.int8}
    assert python_plugin._operator(fields) == operator == python_plugin._operator({**fields, **texts})


def test_a_layout_for_cpus_is_refused() -> None:
    operator = case("float16", x_type="float16", out_type="float16").operator
    with pytest.raises(ValueError, match=r"layout canonical, the plugin reads bsl16\.v1"):
        python_plugin._operator(python_plugin._attributes(operator))


@pytest.mark.parametrize(
    ("form", "types"),
    [
        ("float16", (10, 10, 1, 1, 10)),
        ("bfloat16", (16, 16, 1, 1, 16, 16)),
        ("int8", (3, 3, 1, 1, 10, 10)),
        ("int8 to int8", (3, 3, 1, 1, 3)),
        ("float16 to int8", (10, 10, 1, 1, 3)),
    ],
)
def test_each_tensor_has_the_one_type_that_fits_those_before_it(form: str, types: tuple[int, ...]) -> None:
    operator = case(**FORMS[form]).in_layout("bsl16.v1").operator
    inputs = len(types) - 1
    for position in range(1, len(types)):
        before = list(types[:position])
        taken = [one for one in (0, 1, 3, 10, 16) if python_plugin._takes(operator, position, [*before, one], inputs)]
        assert taken == [types[position]]


@needs_builder
@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_layer_is_built(form: str, tmp_path: Path) -> None:
    one = case(K=96, N=80, **FORMS[form]).in_layout("bsl16.v1")
    info = built(one.model(dynamic=True), tmp_path)
    wanted = {"float16": "fp16", "bfloat16": "bf16", "int8": "int8"}[FORMS[form]["dtype"]]
    assert operators_in(info) == {"layer": wanted}
    assert any("by its description only" in warning for warning in info.warnings)


@needs_builder
@pytest.mark.parametrize("target", ["rtx-4090", "rtx-5090"])
def test_a_layer_is_built_for_other_gpus(target: str, tmp_path: Path) -> None:
    one = case(K=96, N=80, **FORMS["float16"]).in_layout("bsl16.v1")
    assert operators_in(built(one.model(), tmp_path, target)) == {"layer": "fp16"}


@needs_builder
def test_values_of_another_mask_are_refused(tmp_path: Path) -> None:
    one = case(K=96, N=80, **FORMS["float16"]).in_layout("bsl16.v1")
    model = one.model()
    values = model.graph.initializers["values"]
    values.const_value = ir.tensor(one.values[:-1], name="values")
    with pytest.raises(EngineBuildError):
        built(model, tmp_path)
    assert not (tmp_path / "engine").exists()


@needs_builder
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_whole_network_is_built(dtype: str, tmp_path: Path) -> None:
    canonical = canonicalize(load_model(ASSETS / "digits_vit.onnx"), max_opset=23)
    info = built(applied(canonical, block_plan(canonical, dtype, block=(16, 16))), tmp_path)
    assert operators_in(info) == {one.name: dtype for one in inside(canonical)}


@needs_builder
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_deit_tiny_is_built_with_48_operators(dtype: str, tmp_path: Path) -> None:
    path = export_timm("deit_tiny_patch16_224")  # of full size; weights are random
    canonical = canonicalize(load_model(path), max_opset=23)
    info = built(applied(canonical, block_plan(canonical, dtype)), tmp_path)
    assert info.compute_capability == "8.0"
    found = operators_in(info)
    assert len(found) == 48 and set(found.values()) == {dtype}


def tensorrt_with(*creators: tuple[str, str], name: str = "tensorrt") -> SimpleNamespace:
    """Return a made-up module whose registry has plugins of these names and namespaces."""
    known = [SimpleNamespace(name=name, plugin_namespace=namespace) for name, namespace in creators]
    return SimpleNamespace(__name__=name, get_plugin_registry=lambda: SimpleNamespace(all_creators=known))


def test_tensorrt_itself_needs_the_library() -> None:
    with pytest.raises(NotInThisVersionError, match=r"no plugin for it is loaded: build liblsp_block_sparse\.so"):
        provide_operators(tensorrt_with(("BlockSparseLinear", ""), ("Other", "lsp")))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_plugin_that_is_known_is_left_in_place(name: str) -> None:
    assert provide_operators(tensorrt_with(("BlockSparseLinear", "lsp"), name=name)) == (None, [])


@needs_builder
def test_a_build_logs_no_error_of_the_search_for_a_plugin(tmp_path: Path) -> None:
    info = built(case(K=96, N=80, **FORMS["float16"]).in_layout("bsl16.v1").model(), tmp_path)
    assert not any("Cannot find plugin" in warning for warning in info.warnings)
    broken = case(K=96, N=80, **FORMS["float16"]).model()  # canonical
    with pytest.raises(EngineBuildError) as refused:
        built(broken, tmp_path)
    assert "Cannot find plugin" not in str(refused.value)


def test_fields_are_those_of_the_operator() -> None:
    attributes = set(BlockSparseLinear.__dataclass_fields__)
    assert set(python_plugin._FIELDS) == attributes
    source = (Path(__file__).parents[2] / "plugins" / "tensorrt" / "src" / "attributes.cpp").read_text()
    named = [line.split('"')[1] for line in source.splitlines() if line.startswith('  visit("')]
    assert named == [*python_plugin._FIELDS, *python_plugin._TYPES]

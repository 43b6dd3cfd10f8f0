"""A plan made for the whole model is carried out on what is left of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from exports import export_family
from graphs import assert_same_outputs, move_weights, random_feeds, run
from pass_models import layer, plan

from lsp_deploy.linear_layers import linear_layers
from lsp_deploy.model import load_model
from lsp_deploy.passes.apply_masks import ApplyMasksPass
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.center_activations import CenterActivationsPass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.remove_dead_structure import RemoveDeadStructurePass
from lsp_deploy.passes.smaller_plan import smaller_plan
from lsp_deploy.plan import Plan


def vit() -> ir.Model:
    model = load_model(export_family("vit_tiny_patch16_224"))
    move_weights(model)
    return canonicalize(model, max_opset=20)


def int8_plan(model: ir.Model) -> Plan:
    """Return a plan for int8 in all layers of the blocks, with neurons, a head and an MLP masked."""
    layers = [found for found in linear_layers(model) if found.block is not None]
    made = plan(*(layer(found.name, found.K, found.N, "int8", scale=0.05, role=found.role) for found in layers))
    for found in layers:
        weight = found.weight()
        made.weight_scales[found.name] = np.maximum(np.abs(weight).max(axis=0), 1e-6) / 127
        mask = np.ones(weight.shape, bool)
        if found.role == "fc1" and found.block == 0:
            mask[:, 128:256] = False
        elif found.role == "proj" and found.block == 1:
            mask[64:128] = False
        elif found.role == "fc2" and found.block == 1:
            mask[:] = False
        else:
            continue
        made.masks[found.name] = mask
    made.layers[2].precision.activation_offset = 0.25
    return made


def quantized(model: ir.Model, made: Plan) -> ir.Model:
    CenterActivationsPass(made)(model)
    InsertQdqPass(made)(model)
    return model


def test_the_rest_is_quantized_as_planned() -> None:
    model = vit()
    made = int8_plan(model)
    ApplyMasksPass(made)(model)
    smaller = model.clone()
    removal = RemoveDeadStructurePass()
    removal(smaller)
    assert_same_outputs(model, smaller)
    rest = smaller_plan(made, removal.found)
    assert len(made.layers) == 8 and len(rest.layers) == 6
    sizes = {found.name: (found.K, found.N) for found in linear_layers(smaller)}
    for left in rest.layers:
        assert sizes[left.name] == (left.K, left.N)
        assert rest.weight_scales[left.name].shape == (left.N,)
        assert left.name not in rest.masks or rest.masks[left.name].shape == (left.K, left.N)
    feeds = random_feeds(model)
    (expected,) = run(quantized(model, made), feeds)
    (actual,) = run(quantized(smaller, rest), feeds)
    noise = np.square(actual - expected).mean() / np.square(expected).mean()
    assert noise < 1e-2, "dead neurons are constants that are no longer rounded; nothing else differs"


def test_a_plan_of_a_model_without_dead_structure_stays() -> None:
    model = vit()
    made = int8_plan(model)
    made.masks.clear()
    removal = RemoveDeadStructurePass()
    removal(model)
    assert smaller_plan(made, removal.found) == made

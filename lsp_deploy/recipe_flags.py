"""The recipe's fields as flags of a verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lsp_deploy.recipe import Recipe

__all__ = ["with_recipe_flags"]


def with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one flag for every field of `Recipe`; it receives those that were typed as `flags`."""
    # Not get_type_hints: on Python 3.10 it hides the options of parameters whose default is None.
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "flags"
    ]
    flags: list[inspect.Parameter] = []
    for name, field in Recipe.model_fields.items():
        kind = _scalar_type(field.annotation)
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        choices = _choices(field.annotation)
        flag = f"--{name.replace('_', '-')}"
        option = typer.Option(
            *([flag, f"--no-{flag[2:]}"] if kind is bool else [flag]),
            help=f"{field.description}{default}",
            metavar="|".join(choices) if choices else _METAVARS.get(name),
            show_default=False,
        )
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def verb(**arguments: Any) -> None:
        typed = {name: arguments.pop(name) for name in Recipe.model_fields}
        command(**arguments, flags=typed)

    parameters = [own[0], *flags, *own[1:]]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    verb.__name__, verb.__doc__ = command.__name__, command.__doc__
    return verb


_METAVARS = {
    "target": "NAME|FILE",
    "block": "KxN",
    "flops": "FRACTION",
    "max_drop": "POINTS",
    "power_weight": "FACTOR",
    "max_latency_ms": "MS",
    "max_energy_mj": "MJ",
    "max_parameters": "N",
    "max_size_mb": "MB",
    "min_density": "FRACTION",
    "exclude": "REGEX",
    "calibration_data": "PATH|synthetic|random",
    "labels": "CSV",
    "label_column": "NAME",
    "eval_data": "PATH",
    "eval_labels": "CSV",
    "samples": "N",
    "preprocess": "PRESET|FILE",
    "min_shapes": "SHAPES",
    "opt_shapes": "SHAPES",
    "max_shapes": "SHAPES",
    "seed": "N",
}


def _choices(annotation: Any) -> list[str]:
    """Return the words of a Literal, or of one that may be left out."""
    members = [annotation, *getattr(annotation, "__args__", ())]
    return [value for member in members for value in getattr(member, "__args__", ()) if isinstance(value, str)]


def _scalar_type(annotation: Any) -> type:
    members = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in (bool, float, int) if kind in members), str)

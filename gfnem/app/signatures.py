"""Check options against the signature of what will take them, before anything is called."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from typing_extensions import Unpack

from gfnem.errors import UserError

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter name -> annotation of what can be passed by name; Any where there is none.

    Of **options: Unpack[Options], those of the typed dictionary; a constructor that takes **options
    without saying which takes those of the next class in line too.
    """
    if isinstance(function, type):
        calls = [vars(base)["__init__"] for base in function.__mro__ if "__init__" in vars(base)]
    else:
        calls = [function]
    found: dict[str, Any] = {}
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, _evaluated(parameter.annotation, call))
            if parameter.kind == parameter.VAR_KEYWORD:
                annotation = _evaluated(parameter.annotation, call)
                if get_origin(annotation) is Unpack:
                    found |= get_type_hints(*get_args(annotation))
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    found.pop("self", None)
    return found


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value read from YAML can stand where the annotation does."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, (int, float))
    if annotation in (int, str, NoneType):
        return isinstance(value, annotation)
    if annotation is Path:
        return isinstance(value, str)
    if isinstance(value, list):
        is_sequence = isinstance(origin, type) and issubclass(origin, Sequence)
        items = [argument for argument in arguments if argument is not Ellipsis]
        return is_sequence and all(any(fits(v, item) for item in items) for v in value)
    # The options of an object, which are checked against its own signature.
    return isinstance(value, dict)


def check_type(value: Any, annotation: Any, where: str) -> None:
    """Raise UserError for a value that does not fit; lists and mappings may be those of a config.

    where: the name of the option.
    """
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if not fits(plain, annotation):
        shown = "null" if value is None else value
        raise UserError(f"{where}={shown}: it must be {described(annotation)}")
    check_numbers(plain, where)


def check_numbers(value: Any, where: str) -> None:
    """Raise UserError for a number, alone or in a list, that no option of any part can use."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{where}={value}: it must be finite")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise UserError(f"{where}={value}: it must fit into 64 bits")


def described(annotation: Any) -> str:
    """What fits an annotation, for people."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(described, arguments))))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "a list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    return _NAMES.get(annotation, "")


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)
    except NameError:  # imported for type checkers alone: nothing that YAML could hold
        return Any

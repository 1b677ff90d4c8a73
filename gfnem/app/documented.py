"""What the file of a function or class says of it, read without importing what it imports."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

# What annotations of options are made of, beside the built-in types.
_KNOWN = {"Any": Any, "Literal": Literal, "Path": Path, "Sequence": Sequence, "Mapping": Mapping}


@dataclass(frozen=True)
class Documented:
    """A function of a verb.

    options: name -> default; without the first parameter, which is the run.
    text: its documentation, without what it raises.
    """

    options: dict[str, str]
    text: str

    @classmethod
    def read(cls, target: str) -> Documented | None:
        """None where there is no such function, or no file with it."""
        node = _definition(target)
        return cls(_options(node.args), _text(node)) if isinstance(node, ast.FunctionDef) else None


def annotations_in_file(target: str) -> dict[str, Any]:
    """Parameter name -> annotation of what `_target_` names, as far as its file alone tells."""
    node = _definition(target)
    typed: list[tuple[str, ast.expr]] = []
    if isinstance(node, ast.ClassDef):
        makers = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        typed = [(ast.unparse(f.target), f.annotation) for f in fields if not makers]
        node = makers[0] if makers else None
    if isinstance(node, ast.FunctionDef):
        arguments = (*node.args.args, *node.args.kwonlyargs)
        typed = [(one.arg, one.annotation) for one in arguments if one.annotation is not None]
    found = {}
    for name, annotation in typed:
        try:
            found[name] = eval(ast.unparse(annotation), {}, _KNOWN)
        except (NameError, SyntaxError):  # what would have to be imported
            continue
    return found


def _definition(target: str) -> ast.stmt | None:
    """The function or class in its file."""
    module, _, name = target.rpartition(".")
    try:
        spec = find_spec(module)
    except ImportError:
        return None
    if spec is None or spec.origin is None:
        return None
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    return None


def _options(arguments: ast.arguments) -> dict[str, str]:
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    values = [ast.literal_eval(default) for default in arguments.defaults]
    return {name: str(value) for name, value in zip(named[-len(values) :], values, strict=True)}


def _text(node: ast.FunctionDef) -> str:
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return text.partition("\nRaises")[0].rstrip()

"""Options and documentation of a function, read from its file without importing what it imports."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


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
        module, _, name = target.rpartition(".")
        try:
            spec = find_spec(module)
        except ImportError:
            return None
        if spec is None or spec.origin is None:
            return None
        for node in ast.parse(Path(spec.origin).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return cls(_options(node.args), _text(node))
        return None


def _options(arguments: ast.arguments) -> dict[str, str]:
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    values = [ast.literal_eval(default) for default in arguments.defaults]
    return {name: str(value) for name, value in zip(named[-len(values) :], values, strict=True)}


def _text(node: ast.FunctionDef) -> str:
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return text.partition("\nRaises")[0].rstrip()

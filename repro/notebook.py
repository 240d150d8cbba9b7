"""Notebooks as files, read without Jupyter: their cells, their code and their parameters.

The parameters are the assignments in the cell tagged `parameters`, as papermill has it. papermill only
warns of a misspelt one and turns values it does not know into text; here both are errors.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from repro.files import ReproError


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook."""

    default: object
    kinds: tuple[type, ...]
    """Types a value may have: those of the annotation, else the default's; empty where anything may be."""


def parameters_of(path: str | Path) -> dict[str, Parameter]:
    """The parameters of the notebook `path`: lines `name = literal` or `name: type = literal` of its cell
    tagged `parameters`.

    Raises `ReproError` where there is not exactly one such cell, or it holds any other line.
    """
    tagged = [cell for cell in cells(path) if cell["type"] == "code" and "parameters" in cell["tags"]]
    if len(tagged) != 1:
        raise ReproError(
            f"{path} has {len(tagged)} cells tagged `parameters`; it needs one, "
            f"with a line `name = default` for each parameter"
        )
    found = {}
    for line in _parse(tagged[0]["source"], path).body:
        try:
            match line:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    default = plain(ast.literal_eval(line.value))
                    kinds = () if default is None else (type(default),)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                    default, kinds = plain(ast.literal_eval(line.value)), _kinds(line.annotation)
                case _:
                    raise ValueError
        except ValueError:
            raise ReproError(
                f"{path}: the cell tagged `parameters` may only have lines `name = literal` or "
                f"`name: type = literal`, not `{ast.unparse(line)}`"
            ) from None
        found[name] = Parameter(default, kinds)
    return found


def check_parameters(path: str | Path, given: dict[str, object]) -> dict[str, object]:
    """All parameters of the notebook `path`: its defaults, with `given` in their place, as JSON's types.

    numpy scalars become numbers, paths text, tuples lists, and whole numbers floats where a float is
    due. Raises `ReproError` for an unknown name, listing the near ones, and for a value of a wrong type.
    """
    known = parameters_of(path)
    values = {name: parameter.default for name, parameter in known.items()}
    for name, value in given.items():
        if name not in known:
            raise ReproError(f"{Path(path).name} has no parameter {name!r}. {near(name, list(known))}")
        kinds = known[name].kinds
        try:
            value = plain(value)
        except ValueError:
            raise ReproError(
                f"parameter {name} of {Path(path).name} cannot be {value!r} ({type(value).__name__}): "
                f"use finite numbers, text, true, false, and lists and dictionaries of these"
            ) from None
        if type(value) is int and float in kinds and int not in kinds:
            value = float(value)
        if kinds and type(value) not in kinds:  # not isinstance: True is no number of rows
            due = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
            due += " (true or false)" if bool in kinds else ""
            raise ReproError(
                f"parameter {name} of {Path(path).name} must be {due}, not {value!r} "
                f"({type(value).__name__}); its default is {known[name].default!r}"
            )
        values[name] = value
    return values


def cells(path: str | Path) -> list[dict]:
    """Type, tags and source of each cell: what is the same before and after a notebook is executed."""
    try:
        return [
            {
                "type": cell["cell_type"],
                "tags": sorted(cell["metadata"].get("tags", [])),
                "source": "".join(cell["source"]),
            }
            for cell in json.loads(Path(path).read_text())["cells"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ReproError(f"{path} is not a notebook of format 4 ({error!r}); restore it from git") from None


def code(path: str | Path) -> str:
    """The code cells of the notebook `path` as one Python source, IPython's commands and comments left
    out; raises `ReproError` where a cell is not Python."""
    sources = [cell["source"] for cell in cells(path) if cell["type"] == "code"]
    return "\n".join(ast.unparse(_parse(source, path)) for source in sources)


def content_hash(path: str | Path) -> str:
    """SHA-256 of the notebook's cells; outputs and execution counts do not enter."""
    return hashlib.sha256(json.dumps(cells(path)).encode()).hexdigest()


def near(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the known ones that are near, else all."""
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(found)}?" if found else f"There are: {', '.join(known) or 'none'}."


def plain(value: object) -> object:
    """`value` in JSON's types; raises `ValueError` for anything that would not come back from JSON as
    what it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(inner) for key, inner in value.items()}
    if type(value) in (NoneType, bool, int, str) or type(value) is float and math.isfinite(value):
        return value
    raise ValueError


def _kinds(annotation: ast.expr) -> tuple[type, ...]:
    """Types of an annotation such as `int`, `list[int]` or `float | None`."""
    types = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "tuple": list, "dict": dict}
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kinds(left) + _kinds(right)
        case ast.Subscript(value=value):
            return _kinds(value)
        case ast.Constant(value=None):
            return (NoneType,)
        case ast.Name(id=name) if name in types:
            return (types[name],)
    raise ValueError


def _parse(source: str, path: str | Path) -> ast.Module:
    without_commands = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source)  # IPython's, such as %time
    for text in (source, without_commands):
        with contextlib.suppress(SyntaxError):
            return ast.parse(text)
    raise ReproError(f"{path}: the cell that starts with `{source.strip().splitlines()[0]}` is not Python")

"""Which recorded files a result was computed from, and which code computed it."""

from __future__ import annotations

import ast
import hashlib
import os
from functools import cache
from pathlib import Path

from repro import files

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: the folder that holds `repro/`, `paper/` and `notebooks/`."""

ABSENT = "absent"
"""Stands for the hash of a file that was looked for and is not there."""

_used: dict[str, str] = {}


def relative(path: str | Path) -> str:
    """`path` as written in records: relative to the checkout, with forward slashes."""
    return Path(os.path.relpath(Path(path).resolve(), ROOT)).as_posix()


def used(path: str | Path) -> Path:
    """Note that `path` was read; every figure, table and value saved after that names it with its hash.

    A file that is not there is noted too, as "absent": its coming changes what follows.
    """
    name, digest = relative(path), files.sha256(path) if Path(path).exists() else ABSENT
    _used[name] = digest
    if work := os.environ.get("REPRO_RENDER"):  # set by `render`, which renders anew when the file changes
        files.append_line(Path(work) / "used.jsonl", {"path": name, "sha256": digest})
    return Path(path)


def used_files() -> dict[str, str]:
    """SHA-256 of every file noted in this process, by path relative to the checkout, sorted."""
    return dict(sorted(_used.items()))


def forget() -> None:
    """Start a new account of the files used."""
    _used.clear()


def modules_of(source: str) -> set[str]:
    """Names of the `repro` modules that `source` imports, directly or through others."""
    found: set[str] = set()
    waiting = set(_imports(source))
    while waiting:
        name = waiting.pop()
        path = module_path(name)
        if name in found or path is None:
            continue
        found.add(name)
        waiting |= _imports(path.read_text())
    return found


def module_path(name: str) -> Path | None:
    """The source file of a `repro` module, or none where the name is not a module of ours."""
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _imports(source: str) -> frozenset[str]:
    """Names that a source text imports from `repro`; kept, since every record looks at the same modules."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name == "repro" or name.startswith("repro."))


def code_version(source: str = "import repro") -> str:
    """First 16 hexadecimal digits of the SHA-256 of the `repro` modules that `source` imports.

    A content hash, unlike a commit, says the same for the same code in any checkout, so committed
    outputs do not change when an unrelated file does.
    """
    digest = hashlib.sha256()
    for name in sorted(modules_of(source)):
        digest.update(name.encode() + b"\0" + module_path(name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]

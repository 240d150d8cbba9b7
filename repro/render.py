"""Render an output of the paper: execute its notebook, and only if something it depends on has changed.

`paper/figures.toml` says, by output id, which notebook makes it with which parameters. `render`
checks the parameters before anything starts, executes the notebook with papermill in a process of its
own, and ends that process, kernel and all, at the time limit. What the notebook saves takes its place
only when every cell has run; a failed run changes no figure, table or value. In build/:

    notebooks/<id>.ipynb          the executed notebook, its provenance in its metadata under `repro`
                                  (<id>-<hash>.ipynb with other parameters than those of figures.toml)
    notebooks/<id>.failed.ipynb   the last run that failed, up to the cell that did
    render/<id>.json              hashes of all that the last rendering read and wrote

Nothing heavy is imported here: to find that an output is up to date must take no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repro import files, notebook, provenance
from repro.files import ReproError

FIGURES = provenance.ROOT / "paper" / "figures.toml"

KERNEL = "python3"

FOLDERS = ("REPRO_DATA", "REPRO_REFERENCE", "REPRO_RUNS")
"""Environment variables that say where a notebook's inputs lie."""


@dataclass(frozen=True)
class Output:
    """One table of figures.toml: what makes the output `id`."""

    id: str
    notebook: Path
    parameters: dict[str, object]
    time_limit: float
    """Seconds."""


# What there is to render ----------------------------------------------------------------------------


def ids(figures_toml: str | Path = FIGURES) -> list[str]:
    """Ids of all outputs, in the order of figures.toml."""
    return list(_read_toml(Path(figures_toml)))


def find(id: str, figures_toml: str | Path = FIGURES) -> Output:
    """What makes the output `id`; raises `ReproError` where figures.toml has none, or a bad one."""
    figures_toml = Path(figures_toml)
    tables = _read_toml(figures_toml)
    if id not in tables:
        raise ReproError(f"there is no output {id!r}. {notebook.near(id, list(tables))}")
    table = tables[id]
    expected = {"notebook": str, "parameters": dict, "time_limit": (int, float)}
    for key, value in table.items():
        if key not in expected:
            raise ReproError(f"{figures_toml}, [{id}]: unknown key {key!r}; known are {', '.join(expected)}")
        if not isinstance(value, expected[key]):
            raise ReproError(f"{figures_toml}, [{id}]: {key} cannot be {value!r}")
    if absent := [key for key in ("notebook", "time_limit") if key not in table]:
        raise ReproError(f"{figures_toml}, [{id}] lacks {' and '.join(absent)}")
    path = figures_toml.resolve().parent.parent / table["notebook"]
    if not path.is_file():
        raise ReproError(f"{figures_toml}, [{id}]: there is no notebook {table['notebook']}")
    return Output(id, path, table.get("parameters", {}), float(table["time_limit"]))


def parse_overrides(texts: list[str]) -> dict[str, object]:
    """Parameters from `name=value` as given on the command line.

    A value is read as TOML (`8`, `1.5`, `true`, `"text"`, `[1, 2]`), else as JSON (`null`), else it is
    the text itself. Raises `ReproError` for a text without a name or `=`, and for a name given twice.
    """
    found: dict[str, object] = {}
    for text in texts:
        name, equals, literal = text.partition("=")
        if not equals or not name.isidentifier():
            raise ReproError(f"cannot read the parameter {text!r}; write name=value, such as rows=8")
        if name in found:
            raise ReproError(f"the parameter {name} is given twice")
        found[name] = _literal(literal)
    return found


def _literal(text: str) -> object:
    with contextlib.suppress(ValueError):  # not TOML, or one of its dates
        table = tomllib.loads(f"value = {text}")
        if table.keys() == {"value"}:
            return notebook.plain(table["value"])
    with contextlib.suppress(ValueError):
        return notebook.plain(json.loads(text))
    return text


# Rendering ------------------------------------------------------------------------------------------


def render(
    id: str,
    figures_toml: str | Path = FIGURES,
    out: str | Path | None = None,
    overrides: dict[str, object] | None = None,
    force: bool = False,
) -> Path:
    """Make the output `id`, unless it is up to date; returns the executed notebook's path.

    `overrides` go over the parameters of figures.toml. Figures, tables and values go to `out`, by
    default the environment variable REPRO_PAPER_OUT, else the folder of figures.toml; anywhere but
    there, `build` is a folder in `out`, so that a scratch rendering leaves the real one as it was.
    With `force` it is rendered anew in any case. Two renderings of one id wait for each other.

    Raises `ReproError` for anything wrong with the id or the parameters (before anything starts), for
    a cell that fails, and at the time limit, when the notebook's processes have been ended.
    """
    figures_toml = Path(figures_toml).resolve()
    root = figures_toml.parent.parent
    output = find(id, figures_toml)
    parameters = notebook.check_parameters(output.notebook, output.parameters | (overrides or {}))
    home = Path(out or os.environ.get("REPRO_PAPER_OUT") or figures_toml.parent).resolve()
    build = (root if home == figures_toml.parent else home) / "build"
    stem, usual = id, notebook.check_parameters(output.notebook, output.parameters)
    if home == figures_toml.parent and parameters != usual:  # beside the figure's own, not in its place
        stem += "-" + hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
    executed, record_path = build / "notebooks" / f"{stem}.ipynb", build / "render" / f"{stem}.json"

    with _lock(build / "render" / f"{id}.lock", id):
        inputs = _inputs(output, parameters, root)
        record = _read_record(record_path)
        changed = ["nothing is rendered yet"] if record is None else _changes(record, inputs, home, executed)
        if not changed and not force:
            print(f"{id}: up to date")
            return executed
        print(f"{id}: rendering ({'; '.join(changed) or 'forced'})", flush=True)
        record_path.unlink(missing_ok=True)  # from here until the end, nothing is up to date
        used, outputs, seconds = _execute(output, parameters, home, build, stem)
        outputs[_name(executed, root)] = files.sha256(executed)
        files.write_json(record_path, {"inputs": inputs, "used": used, "outputs": outputs})
    print(f"{id}: rendered in {seconds:.0f} s")
    return executed


def _inputs(output: Output, parameters: dict, root: Path) -> dict[str, object]:
    """All that is known before the notebook runs to change what it makes, by a name a reader understands."""
    lock = root / "requirements.lock"
    modules = provenance.modules_of(notebook.code(output.notebook))
    return {
        _name(output.notebook, root): notebook.content_hash(output.notebook),
        **{f"parameter {name}": value for name, value in parameters.items()},
        **{f"module {name}": files.sha256(provenance.module_path(name)) for name in sorted(modules)},
        **{f"environment {name}": os.environ.get(name) for name in FOLDERS},
        lock.name: files.sha256(lock) if lock.exists() else None,
    }


def _changes(record: dict, inputs: dict, home: Path, executed: Path) -> list[str]:
    """What differs from the recorded rendering; none means that it is up to date."""
    before, gone = record["inputs"], object()
    names = [*before, *(name for name in inputs if name not in before)]
    changes = [f"{name} changed" for name in names if before.get(name, gone) != inputs.get(name, gone)]
    for name, digest in record["used"].items():
        path = provenance.ROOT / name
        if (files.sha256(path) if path.is_file() else provenance.ABSENT) != digest:
            changes.append(f"{name} changed")
    for name, digest in record["outputs"].items():
        path = executed if name.endswith(".ipynb") else home / name
        if not path.is_file() or files.sha256(path) != digest:
            changes.append(f"{name} is missing or was edited")
    return changes


def _execute(
    output: Output, parameters: dict, home: Path, build: Path, stem: str
) -> tuple[dict, dict, float]:
    """Run the notebook in its own process and put what it made in place; `stem` names it in `build`.

    Returns SHA-256 by path of the files it read and wrote, and the seconds it took.
    """
    root = output.notebook.parent.parent
    executed = build / "notebooks" / f"{stem}.ipynb"
    failed = executed.with_suffix(".failed.ipynb")
    work = build / "render" / f"{stem}.work"
    shutil.rmtree(work, ignore_errors=True)  # of a rendering that was killed
    work.mkdir(parents=True)
    shutil.copyfile(output.notebook, work / "source.ipynb")
    code = notebook.code(output.notebook)
    code_hash = hashlib.sha256(code.encode()).hexdigest()[:16]
    job = {
        "id": output.id,
        "notebook": {"path": _name(output.notebook, root), "code": code_hash},
        "parameters": parameters,
    }
    files.write_json(work / "job.json", job)

    began = time.monotonic()
    try:
        problem = _run(output, work, home)
        seconds = time.monotonic() - began
        result = _load(work / "executed.ipynb")
        if not problem and (last := _unfinished(result)) is not None:
            problem = f"cell `{last}` left the notebook before its end"
        made = sorted(path for path in (work / "out").rglob("*") if path.is_file())
        if not problem and not made:
            problem = "it saved no figure, table or value"
        if problem:
            executed.unlink(missing_ok=True)
            message = f"{output.id}: {_name(output.notebook, root)} failed: {problem}."
            if result:
                files.write_atomic(failed, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
                message += f" The notebook as far as it got: {failed}"
            raise ReproError(message)

        used = {line["path"]: line["sha256"] for line in files.read_lines(work / "used.jsonl")}
        version = provenance.code_version(code)
        result["metadata"]["repro"] = job | {"code": version, "files": used, "seconds": round(seconds, 1)}
        outputs = {}
        for path in made:
            name = path.relative_to(work / "out").as_posix()
            files.write_atomic(home / name, path.read_bytes())
            outputs[name] = files.sha256(home / name)
        files.write_atomic(executed, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        failed.unlink(missing_ok=True)
        return used, outputs, seconds
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(output: Output, work: Path, home: Path) -> str | None:
    """Execute work/source.ipynb to work/executed.ipynb in a process of its own; says what went wrong, if
    anything did. When it returns, none of the notebook's processes is left."""
    environment = os.environ | {
        "REPRO_RENDER": str(work),
        "REPRO_PAPER_OUT": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(provenance.ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": "1704067200",  # any fixed date
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # sums are taken in an order that depends on the number of threads: the same one everywhere
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        # nothing of the user's own Jupyter and IPython set-up takes part
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_RUNTIME_DIR": str(work / "jupyter"),
        "IPYTHONDIR": str(work / "ipython"),
    }
    for name in FOLDERS:  # the notebook runs in another folder
        if name in os.environ:
            environment[name] = os.path.abspath(os.environ[name])
    log = work / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "repro.render", str(work)],
            cwd=output.notebook.parent,
            env=environment,
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends; see _main
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        status = process.wait(output.time_limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        end_processes(work)
        process.wait()
        process.stdin.close()
    if status is None:
        at = _unfinished(_load(work / "executed.ipynb"))
        where = "" if at is None else f" in cell `{at}`"
        return (
            f"it reached its time limit of {output.time_limit:g} s{where} and was ended (time_limit in "
            f"paper/figures.toml sets it)"
        )
    if (work / "error.txt").exists():
        return (work / "error.txt").read_text().rstrip(". \n")
    if status:
        lines = log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with status {status}: {lines[-1] if lines else 'no message'}".rstrip(". ")
    return None


def end_processes(work: Path) -> None:
    """Kill every process that executes the notebook in `work`: papermill, the kernel and what they started.

    A kernel leads a session of its own, so that no signal to papermill's group reaches it; all of them,
    though, have inherited REPRO_RENDER.
    """
    import psutil

    for _ in range(100):
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("REPRO_RENDER") == str(work) and process.pid != os.getpid():
                    found |= {p.pid: p for p in (process, *process.children(recursive=True))}
        if not found:
            return
        for process in found.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found.values(), timeout=0.1)
    raise ReproError(f"processes {', '.join(map(str, found))} of a notebook do not end; end them yourself")


def _main(work: Path) -> None:
    """The process that executes a notebook: `python -m repro.render WORK`."""

    def end_with_parent() -> None:
        sys.stdin.read()
        end_processes(work)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import papermill

    parameters = json.loads((work / "job.json").read_text())["parameters"]
    try:
        papermill.execute_notebook(
            work / "source.ipynb",
            work / "executed.ipynb",
            parameters=parameters,
            kernel_name=KERNEL,
            language="python",
            progress_bar=False,
            start_timeout=120,
        )
    except papermill.PapermillExecutionError as error:
        message = f"cell `{_first_line(error.source)}`: {error.ename}: {error.evalue}"
        (work / "error.txt").write_text(message)
        sys.exit(1)


# Executed notebooks, records and locks ---------------------------------------------------------------


def _unfinished(executed: dict | None) -> str | None:
    """First line of the first code cell that papermill did not complete, if there is one."""
    for cell in (executed or {"cells": []})["cells"]:
        if cell["cell_type"] == "code" and cell["metadata"].get("papermill", {}).get("status") != "completed":
            return _first_line("".join(cell["source"]))
    return None


def _first_line(source: str) -> str:
    return next(iter(source.strip().splitlines()), "")


def _load(path: Path) -> dict | None:
    """An executed notebook, or none where there is none or a kill has cut it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _read_record(path: Path) -> dict | None:
    record = _load(path)
    return record if record and record.keys() == {"inputs", "used", "outputs"} else None


@contextlib.contextmanager
def _lock(path: Path, id: str) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{id}: another process is rendering it; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file unlocks it


def _read_toml(path: Path) -> dict[str, dict]:
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ReproError(f"{path} (what can be rendered) is missing; restore it from git") from None
    except tomllib.TOMLDecodeError as error:
        raise ReproError(f"{path} is not TOML: {error}") from None
    for id, table in tables.items():
        if not isinstance(table, dict) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", id):
            raise ReproError(f"{path}: {id!r} must be a table [id] named by letters, digits, _ and -")
    return tables


def _name(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

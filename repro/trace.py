"""What made a file, by the record in it, and whether all of that is still what it was.

    python -m repro trace paper/figures/fig9_celeba64_unet.png

Figures (.png, .pdf), values (.json) and tables (.md, .tex) carry what `paper.stamp` wrote into them, so a
copy outside the checkout can be traced too. A table's .csv holds numbers alone: it is traced by the .md that
was saved with it. Recorded samples and weights carry nothing: they are found by their SHA-256 in a run.json.
What is compared is all that a file was made from; whether the same is drawn from it, `render` shows.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from repro import files, notebook, paper, provenance, render
from repro.files import ReproError

KINDS = (".png", ".pdf", ".json", ".md", ".tex", ".csv", ".safetensors")

_stamped = {"id": str, "runs": dict, "files": dict, "code": str}


@dataclass
class Trace:
    """What was found out about one file: lines to print, and what does not match."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    compared: dict[str, str] = field(default_factory=dict)
    """Each file compared, by path: "same", "changed", "missing", or "new" where there was none before."""

    def say(self, label: str, text: str, depth: int = 1) -> None:
        """Add a line: a label, and what is to be said of it in a column of its own."""
        self.lines.append(f"{'  ' * depth}{label:<10}  {text}".rstrip())

    def compare(self, path: str, recorded: str) -> str:
        """Whether the file at `path`, relative to the checkout, has the recorded SHA-256 (see `compared`)."""
        if path not in self.compared:
            place = provenance.ROOT / path
            now = files.sha256(place) if place.is_file() else provenance.ABSENT
            status = "same" if now == recorded else "missing" if now == provenance.ABSENT else "changed"
            self.compared[path] = "new" if recorded == provenance.ABSENT != now else status
            if now != recorded:
                self.problems.append(f"{path} is {self.compared[path]}")
        return self.compared[path]


def trace(path: str | Path) -> Trace:
    """What the file at `path` was made from, and whether that is the same now.

    Raises `ReproError` where the file is missing or damaged, or nothing is recorded about it.
    """
    path = Path(path)
    if not path.is_file():
        raise ReproError(f"there is no file {path}; give the path of one, such as paper/figures/ID.png")
    if path.suffix not in KINDS:
        raise ReproError(f"{path} cannot be traced: only files that end in {', '.join(KINDS)} can")
    carrier = _table_of(path) if path.suffix == ".csv" else path
    record = None if path.suffix == ".safetensors" else _stamp(carrier)
    found = _recorded(path) if record is None else _made(path, record)
    if found.problems:
        found.lines.append(f"does not match: {'; '.join(found.problems)}")
    else:
        and_code = ", and so do notebook, parameters and code" if record else ""
        found.lines.append(f"all {len(found.compared)} files match{and_code}")
    return found


# Figures, tables and values -------------------------------------------------------------------------


def _stamp(path: Path) -> dict | None:
    """What `paper.stamp` wrote into a file; none where a PNG carries no such thing.

    Raises `ReproError` where the file is not whole, or any other carries none.
    """
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()  # a cut file may have its record and not all of its pixels
                if "repro" not in image.info:
                    return None
        if path.suffix == ".pdf" and b"%%EOF" not in path.read_bytes()[-1024:]:
            raise OSError("its end is missing")
        record = paper.read_provenance(path)
    except (ReproError, AttributeError):  # JSON that is no object has no attributes
        record = None
    except (OSError, SyntaxError, ValueError) as error:  # as Pillow and json have it
        raise ReproError(
            f"{path} is damaged or cut ({error}); restore it, or render it: {_command()}"
        ) from None
    if isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in _stamped.items()):
        return record
    raise ReproError(
        f"{path} carries no provenance of repro.paper: it was not saved by it, or was edited since. "
        f"Render it: {_command()}"
    )


def _table_of(path: Path) -> Path:
    """The .md that was saved with a table's .csv: beside it, or in paper/tables where the bytes are the same.

    Raises `ReproError` where there is none, or one of other columns or another number of rows.
    """
    own, saved = path.with_suffix(".md"), provenance.ROOT / "paper" / "tables" / path.name
    if not own.is_file() and saved.is_file() and files.sha256(saved) == files.sha256(path):
        own = saved.with_suffix(".md")
    if not own.is_file():
        raise ReproError(
            f"{path} is a .csv, which carries no provenance, and the .md that was saved with it is not there"
        )
    with open(path, newline="") as file:
        columns, *rows = csv.reader(file)
    lines = [line for line in own.read_text().splitlines() if line.startswith("|")]
    header = "| " + " | ".join(name.replace("|", r"\|").replace("\n", " ") for name in columns) + " |"
    if lines[:1] != [header] or len(lines) != len(rows) + 2:
        raise ReproError(f"{path} has other columns or rows than {own}, so it was not saved with it")
    return own


def _made(path: Path, record: dict) -> Trace:
    """The trace of a file that carries the stamp `record`."""
    found = Trace([str(path)])
    found.say("output", record["id"])
    if path.suffix == ".csv":
        found.say("", "by the .md that was saved with it, since a .csv carries no provenance")
    _tell_notebook(found, path, record)
    found.say("files read", "" if record["files"] else "none")
    for name, digest in record["files"].items():
        found.say(found.compare(name, digest), f"{_short(digest)}  {name}", 2)
    found.say("runs", "" if record["runs"] else "none")
    for name, weights in record["runs"].items():
        run_json = next((file for file in record["files"] if file.endswith(f"/{name}/run.json")), "")
        same = found.compared.get(run_json) == "same"
        about = files.read_json(provenance.ROOT / run_json) if same else None
        _tell_run(found, name, Path(run_json).parent.as_posix(), about, weights)
    return found


def _tell_notebook(found: Trace, path: Path, record: dict) -> None:
    """The notebook, its parameters and the library: as recorded, and whether they are the same now."""
    about = record.get("notebook")
    if about is None:
        found.say("notebook", "none: it was saved in a session of someone's own")
        found.say("code", f"{record['code']}, of the modules that session had loaded")
        found.problems.append("the code cannot be compared, since no notebook is recorded; use `render`")
        return
    place = provenance.ROOT / about["path"]
    try:
        code = notebook.code(place) if place.is_file() else ""
    except ReproError as error:
        found.say("", str(error))
        code = ""
    now = hashlib.sha256(code.encode()).hexdigest()[:16] if code else "missing or damaged"
    _tell_code(found, "notebook", about["path"], about["code"], now)
    _tell_parameters(found, record["id"], about["path"], record.get("parameters") or {})
    now = provenance.code_version(code) if code else "not known without its notebook"
    _tell_code(found, "code", "the library", record["code"], now)
    if now != record["code"] and code:
        paths = [provenance.relative(provenance.module_path(name)) for name in provenance.modules_of(code)]
        for module in _changed_since_written(path, sorted(paths)):
            found.say("", f"changed since the file was committed: {module}")
            found.problems.append(f"{module} is changed")


def _tell_code(found: Trace, label: str, name: str, recorded: str, now: str) -> None:
    found.say(label, f"{name}, recorded {recorded}, now {now}: {'same' if now == recorded else 'other'}")
    if now != recorded:
        found.problems.append(f"the code of {name} is other than recorded")


def _tell_parameters(found: Trace, id: str, path: str, parameters: dict) -> None:
    """The notebook's parameters, and which output of figures.toml has them now."""
    found.say("parameters", "" if parameters else "none")
    wide = max(map(len, parameters), default=0)
    for name, value in parameters.items():
        found.say("", f"{name:<{wide}} = {json.dumps(value, ensure_ascii=False)}")
    known = _parameters_now(path)
    same = [output for output, now in known.items() if now == parameters]
    own = {output: now for output, now in known.items() if f"{id}_".startswith(f"{output}_")}
    if same:
        found.say("", f"as figures.toml has them now; to draw it again: {_command(same[0])}")
    elif own:
        output, now = max(own.items(), key=lambda item: len(item[0]))
        gone = object()
        names = sorted(n for n in now.keys() | parameters if now.get(n, gone) != parameters.get(n, gone))
        found.problems.append(f"{output} has other parameters now: {', '.join(names)}")
        found.say("", f"other than those of {output} now: {', '.join(names)}")
    else:
        found.say("", "of no output of figures.toml: they were given by hand")


def _parameters_now(path: str) -> dict[str, dict]:
    """The parameters that each output of figures.toml gives to the notebook `path` now, by output."""
    figures_toml, found = provenance.ROOT / "paper" / "figures.toml", {}
    for id in render.ids(figures_toml):
        with contextlib.suppress(ReproError):  # of a notebook that is missing or damaged, which is told
            output = render.find(id, figures_toml)
            if provenance.relative(output.notebook) == path:
                found[id] = notebook.check_parameters(output.notebook, output.parameters)
    return found


def _changed_since_written(path: Path, paths: list[str]) -> list[str]:
    """Those of `paths` that changed since the commit that last wrote the file `path`, or one of its name in
    paper/; none where git cannot tell."""
    kind = {".png": "figures", ".pdf": "figures", ".json": "values"}.get(path.suffix, "tables")
    places = [provenance.relative(path), f"paper/{kind}/{path.name}"]
    for place in places:
        commit = _git("log", "-1", "--format=%H", "--", place).strip()
        if commit:
            return _git("diff", "--name-only", "--relative", commit, "--", *paths).split()
    return []


def _git(*arguments: str) -> str:
    """What git prints in the checkout; nothing where there is no git, or it is not content."""
    try:
        done = subprocess.run(["git", *arguments], cwd=provenance.ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout


# Recorded runs --------------------------------------------------------------------------------------


def _recorded(path: Path) -> Trace:
    """The trace of samples or weights of a recorded run, found by where they lie, else by their SHA-256.

    What a run.json says is taken as it is. Other code than that which drew samples is told, and is no
    mismatch: the code that trained and drew is a record's, and the library goes on.
    """
    base = Path(os.environ.get("REPRO_RUNS") or provenance.ROOT / "paper" / "runs")
    digest = files.sha256(path)
    for place in [path.resolve().parent / "run.json", *sorted(base.glob("*/*/run.json"))]:
        if not place.is_file():
            continue
        about = files.read_json(place)
        drawn = [each for each in (about.get("samples"), *about.get("further_samples", ())) if each]
        named = {each["file"]: each["sha256"] for each in drawn} | about.get("weights", {})
        here = [path.name] if place.parent == path.resolve().parent and path.name in named else []
        if file := next(iter(here or [name for name in named if named[name] == digest]), None):
            break
    else:
        raise ReproError(
            f"{path} carries no provenance, and no run.json in {base} has its SHA-256 {_short(digest)}. "
            f"Figures that were saved by repro.paper can be traced: {_command()}"
        )
    found = Trace([str(path)])
    found.say("record", provenance.relative(place))
    folder = provenance.relative(place.parent)
    found.say(
        "file", f"{file}, SHA-256 {_short(named[file])}: {found.compare(f'{folder}/{file}', named[file])}"
    )
    for each in drawn:
        if each["file"] == file:
            last = each["first_seed"] + each["rows"] * each["cols"] - 1
            found.say(
                "samples", f"seeds {each['first_seed']} to {last}, {paper.describe_sampler(each['sample'])}"
            )
            found.say("", f"drawn in {each['precision']} on {each['device']}")
            now = provenance.code_version("import repro.train")
            code = each.get("code", "unknown")
            differs = "same" if now == code else "other (a record keeps the code that drew it)"
            found.say("code", f"the library, recorded {code}, now {now}: {differs}")
    found.say("run", "")
    name = f"{place.parent.parent.name}/{place.parent.name}"
    _tell_run(found, name, folder, about, about.get("weights", {}))
    return found


def _tell_run(found: Trace, name: str, folder: str, about: dict | None, weights: dict[str, str]) -> None:
    """A recorded run: what trained it on what, by its run.json `about`, and its weights."""
    found.lines.append(f"    {name}")
    if about is None:
        found.say("training", "not told here, since its run.json is not the one that was read", 3)
    elif about.get("imported"):
        told = ", ".join(f"{key} {value}" for key, value in about["imported"].items())
        found.say("imported", told, 3)
    else:
        data = about["data"]
        found.say("training", f"{about['images']:,} images seen, on {about['device']}", 3)
        for part in [*about.get("earlier", ()), about]:
            found.say("code", f"{part['code']}, commit {part['commit']}", 3)
            if began := part.get("from_weights"):
                told = ", ".join(_short(digest) for digest in began.values())
                whose = f"those of {part['from_run']}" if part.get("from_run") else "others"
                now = "recorded here" if set(began.values()) <= set(weights.values()) else "not here any more"
                found.say("", f"began from weights {told}: {whose}, {now}", 3)
        found.say("data", f"{data['name']}, fingerprint {_short(data['fingerprint'])}", 3)
    if not weights:
        found.say("weights", "not recorded", 3)
    for file, digest in weights.items():
        found.say("weights", f"{found.compare(f'{folder}/{file}', digest):<7} {_short(digest)}  {file}", 3)


def _short(digest: str) -> str:
    return digest if digest == provenance.ABSENT else f"{digest[:16]}…"


def _command(id: str = "ID") -> str:
    return f"python -m repro render {id}"

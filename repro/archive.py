"""One file for an archive such as Zenodo: code, records and outputs, described and with checksums.

    python -m repro archive                  writes build/min-snr-repro-<version>.zip
    python -m repro archive --check PLACE    names what is missing, changed or extra in such a file or folder

Beside every tracked file it holds `ro-crate-metadata.json`, a description after RO-Crate 1.1 of what the
files are and which of them each figure was made from, and `SHA256SUMS` of all the others. Unpacked anywhere,
git or no git, it is the package: `make figures` works, and so does another `archive`, which gives the same
bytes. A .zip compresses each file by itself, so that damage is damage to a file with a name.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import re
import subprocess
import tomllib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from repro import files, provenance
from repro.files import ReproError

SUMS = "SHA256SUMS"
CRATE = "ro-crate-metadata.json"

PARTS = {
    "notebooks": "One notebook per table, figure or section; they read the records and draw",
    "paper/bench": "Measured speeds and times",
    "paper/cards": "What is known of each recorded run and each data set, for people to read",
    "paper/figures": "The figures, as the notebooks draw them",
    "paper/reference": "Statistics of the features of real images, which distances are measured against",
    "paper/runs": "Recorded runs: configuration, weights, losses, measurements and samples",
    "paper/sweeps": "What was tried before samplers and settings were chosen",
    "paper/tables": "The tables, as the notebooks write them",
    "paper/values": "The numbers behind figures, tables and claims, as the notebooks write them",
    "repro": "The library",
    "tests": "The tests of the library",
}
"""What is in a folder, by its path."""

TYPES = {
    ".jsonl": "application/jsonl",
    ".ipynb": "application/x-ipynb+json",
    ".md": "text/markdown",
    ".npz": "application/zip",
    ".py": "text/x-python",
    ".safetensors": "application/octet-stream",
    ".toml": "application/toml",
}
"""Media types that Python does not know on every machine, by a name's ending."""

ARTICLE = "https://arxiv.org/abs/2303.09556"

_LEFT_OUT = re.compile(  # what is made in a restored folder, after .gitignore
    r"(\.git|\.venv|build|data|runs)/|(.*/)?(__pycache__|\.\w+_cache|\.hypothesis|\.ipynb_checkpoints)/"
    r"|[^/]*\.egg-info/|(.*/)?(\.lock|\.partial\..*|state\.safetensors)$"
)

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a .zip can hold


@dataclass(frozen=True)
class Source:
    """The files of a checkout or of an unpacked archive, and what is known of their state."""

    names: list[str]
    """Paths relative to the root, sorted."""
    commit: str
    """Of git, with "+" where files differ from it."""
    date: str
    """Of that commit, in ISO 8601."""


def source(root: Path) -> Source:
    """What there is to archive in `root`: what git tracks, or, without git, what its SHA256SUMS lists.

    Raises `ReproError` where neither can tell, or where one of the files is missing.
    """
    if (root / ".git").exists():
        names = [name for name in _git(root, "ls-files", "-z").split("\0") if name]
        commit, date = _git(root, "log", "-1", "--format=%H %cI").split()
        if _git(root, "status", "--porcelain", "--untracked-files=no"):
            commit += "+"
    elif (root / SUMS).is_file():
        names = list(_sums((root / SUMS).read_text()))
        graph = files.read_json(root / CRATE)["@graph"]
        about = next(entity for entity in graph if entity["@id"] == "./")
        commit, date = about["version"].partition(", commit ")[2], about["datePublished"]
    else:
        raise ReproError(f"{root} is neither a git checkout nor an unpacked archive: it has no {SUMS}")
    names = sorted(set(names) - {SUMS, CRATE})
    if missing := [name for name in names if not (root / name).is_file()]:
        raise ReproError(f"{', '.join(missing)} cannot be archived: missing in {root}. Restore it first.")
    return Source(names, commit, date)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise ReproError(f"git, which knows the files of {root}, cannot be run: {error}") from error
    if done.returncode:
        raise ReproError(f"git {arguments[0]} failed in {root}: {done.stderr.strip()}")
    return done.stdout


# Building -------------------------------------------------------------------------------------------


def build(out: Path | None = None, root: Path = provenance.ROOT) -> Path:
    """Write the archive of `root` to `out` and return its path; by default build/<name>-<version>.zip.

    The same files give the same bytes. Raises `ReproError` as `source` does, where `out` is no .zip, where
    the library rocrate is not installed, and where the archive cannot be written: then there is no file, or
    still the old one.
    """
    about = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    title = f"{about['name']}-{about['version']}"
    out = out or root / "build" / f"{title}.zip"
    if out.suffix != ".zip":
        raise ReproError(f"the archive is a .zip, and {out} is not named like one")
    found = source(root)
    contents = {CRATE: json.dumps(describe(root, found), indent=1, ensure_ascii=False).encode() + b"\n"}
    sums = {name: files.sha256(root / name) for name in found.names}
    sums[CRATE] = hashlib.sha256(contents[CRATE]).hexdigest()
    contents[SUMS] = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()

    def write(temporary: str) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted([*found.names, *contents]):
                entry = zipfile.ZipInfo(f"{title}/{name}", _EPOCH)
                entry.create_system, entry.compress_type = 3, zipfile.ZIP_DEFLATED  # 3: modes are Unix's
                entry.external_attr = (0o100755 if os.access(root / name, os.X_OK) else 0o100644) << 16
                archive.writestr(entry, contents[name] if name in contents else (root / name).read_bytes())

    files.replace_atomic(out, write)
    return out


def describe(root: Path, found: Source) -> dict:
    """The RO-Crate description of `root`, as JSON: its files, its folders, and what made each output.

    Raises `ReproError` where the library rocrate is not installed.
    """
    try:
        from rocrate.model import ContextEntity
        from rocrate.rocrate import ROCrate
    except ImportError as error:
        raise ReproError(f"the library rocrate is missing ({error}); make env installs it") from error

    about = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    crate = ROCrate(version="1.1")

    def add(id: str, **properties: object) -> ContextEntity:
        return crate.add(ContextEntity(crate, id, properties=properties))

    author = add("#authors", **{"@type": "Organization"}, name=about["authors"][0]["name"])
    licence = add(
        "https://spdx.org/licenses/MIT", **{"@type": "CreativeWork"}, name="MIT License", identifier="MIT"
    )
    article = add(
        ARTICLE,
        **{"@type": "ScholarlyArticle"},
        name="Efficient Diffusion Training via Min-SNR Weighting Strategy",
    )
    dataset = crate.root_dataset
    crate.name = f"{about['name']} {about['version']}"
    crate.description = about["description"]
    crate.datePublished = found.date
    dataset["version"] = f"{about['version']}, commit {found.commit}"
    dataset["author"] = dataset["publisher"] = author
    dataset["license"] = licence
    dataset["citation"] = article

    entities = {}
    for name in found.names:
        kind = TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "text/plain"
        size = str((root / name).stat().st_size)
        properties = {"name": Path(name).name, "encodingFormat": kind, "contentSize": size}
        if kind == "text/x-python":
            properties |= {"@type": ["File", "SoftwareSourceCode"], "programmingLanguage": "Python"}
        entities[name] = crate.add_file(root / name, name, properties=properties)
    folders = dict(PARTS)
    for name in found.names:
        if re.fullmatch(r"paper/runs/[^/]+/[^/]+/run\.json", name):
            note = files.read_json(root / name).get("config", {}).get("note")
            folders[name.removesuffix("/run.json")] = f"A recorded run. {note or ''}".rstrip()
    for folder, told in sorted(folders.items()):
        if inside := [entities[name] for name in found.names if name.startswith(f"{folder}/")]:
            part = crate.add_dataset(root / folder, folder, properties={"name": folder, "description": told})
            part["hasPart"] = inside
    for stem, (outputs, record) in _outputs(root, found.names).items():
        notebook = (record.get("notebook") or {}).get("path")
        action = add(f"#render-{stem}", **{"@type": "CreateAction"}, name=f"Rendering of {stem}")
        action["result"] = [entities[name] for name in outputs]
        if notebook in entities:
            action["instrument"] = entities[notebook]
        if read := [entities[name] for name in record["files"] if name in entities]:
            action["object"] = read
    described = crate.metadata.generate()
    described["@graph"].sort(key=lambda entity: (entity["@id"] not in (CRATE, "./"), entity["@id"]))
    return described


def _outputs(root: Path, names: list[str]) -> dict[str, tuple[list[str], dict]]:
    """The files that were saved under one name, and the record in them of what made them, by that name."""
    from repro import paper

    found: dict[str, tuple[list[str], dict]] = {}
    kept = [name for name in names if re.match(r"paper/(figures|tables|values)/", name)]
    for name in kept:
        stem = Path(name).stem
        carrier = Path(name).with_suffix(".md") if name.endswith(".csv") else Path(name)
        if stem not in found:
            found[stem] = ([], paper.read_provenance(root / carrier))
        found[stem][0].append(name)
    return found


# Checking -------------------------------------------------------------------------------------------


def check(place: Path) -> list[str]:
    """What is missing, changed or extra in the archive or unpacked folder `place`, a line each.

    In a folder, what the package itself makes there (.venv, build, ...) is not extra. Raises `ReproError`
    where there is nothing that could be checked.
    """
    sums, found = _folder(place) if place.is_dir() else _archived(place)
    lines = [f"{name} is missing" for name in sums if name not in found]
    lines += [f"{name} is changed" for name in sums if name in found and found[name] != sums[name]]
    lines += [f"{name} is extra" for name in found if name not in sums]
    return sorted(lines)


def _folder(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The SHA-256 of each file, by its path: as listed, and as it is."""
    if not (root / SUMS).is_file():
        raise ReproError(f"{root} has no {SUMS}: it is no unpacked archive, or not the whole of one")
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    kept = {name: path for name, path in paths.items() if not _LEFT_OUT.match(name) and name != SUMS}
    return _sums((root / SUMS).read_text()), {name: files.sha256(kept[name]) for name in sorted(kept)}


def _archived(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """As `_folder`, of an archive, which is read without being unpacked."""
    damage = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)
    found, sums = {}, None
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.partition("/")[2]
                try:
                    content = archive.read(entry)
                except damage:
                    found[name] = "cannot be read"
                    continue
                if name == SUMS:
                    sums = _sums(content.decode())
                else:
                    found[name] = hashlib.sha256(content).hexdigest()
    except (*damage, UnicodeDecodeError) as error:
        raise ReproError(f"{path} is no archive, or is damaged: {error}") from error
    if sums is None:
        raise ReproError(f"{path} has no {SUMS} that can be read: it is no archive of ours, or is damaged")
    return sums, found


def _sums(text: str) -> dict[str, str]:
    """SHA-256 by path, of a list as `sha256sum` writes it; raises `ReproError` for any other line."""
    found = {}
    for line in text.splitlines():
        digest, space, name = line.partition("  ")
        if not space or not re.fullmatch("[0-9a-f]{64}", digest) or name in found:
            raise ReproError(f"{SUMS} has a line that is not of sha256sum: {line!r}; restore it")
        found[name] = digest
    return found

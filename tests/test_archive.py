"""The archive: the same bytes twice, whole on a machine without git, and damage to it is named."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from urllib.parse import unquote

import pytest

from repro import archive, files, provenance
from repro.__main__ import main
from repro.files import ReproError

KEPT = (
    "repro",
    "paper/values",
    "paper/claims.toml",
    "paper/reported.toml",
    "paper/figures.toml",
    "pyproject.toml",
)
NAME = "min-snr-repro-0.1.0"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A small checkout: the library, the values, a run; and a file that git does not track."""
    root = tmp_path_factory.mktemp("checkout")
    run = "paper/runs/lab/unet-lr1e-3"
    for name in (*KEPT, run, "notebooks/claims.ipynb", "paper/tables/claims.csv", "paper/tables/claims.md"):
        place, copy = provenance.ROOT / name, root / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            shutil.copytree(place, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(place, copy)
    (root / "run me").write_text("#!/bin/sh\n")
    (root / "run me").chmod(0o755)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "All")
    (root / "scratch.txt").write_text("not tracked")
    return root


def git(root, *arguments):
    subprocess.run(["git", *arguments], cwd=root, check=True)


@pytest.fixture(scope="module")
def made(checkout, tmp_path_factory):
    return archive.build(tmp_path_factory.mktemp("made") / "archive.zip", checkout)


@pytest.fixture
def restored(made, tmp_path):
    """The archive, unpacked in a folder without git."""
    with zipfile.ZipFile(made) as packed:
        packed.extractall(tmp_path)
    return tmp_path / NAME


def tracked(root):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    return {name for name in listed.stdout.split("\0") if name}


def test_it_holds_what_is_tracked_with_checksums_and_a_description(checkout, made):
    with zipfile.ZipFile(made) as packed:
        entries = {entry.filename.removeprefix(f"{NAME}/"): entry for entry in packed.infolist()}
    assert entries.keys() == tracked(checkout) | {archive.SUMS, archive.CRATE}
    assert list(entries) == sorted(entries)
    assert {entry.date_time for entry in entries.values()} == {(1980, 1, 1, 0, 0, 0)}
    executable = {name for name, entry in entries.items() if entry.external_attr >> 16 == 0o100755}
    assert executable == {"run me"}


def test_twice_gives_the_same_bytes_and_so_does_the_unpacked_copy(checkout, made, restored, tmp_path):
    again = archive.build(tmp_path / "again.zip", checkout)
    assert again.read_bytes() == made.read_bytes()
    (restored / "run me").chmod(0o755)  # Python's zipfile, unlike unzip, leaves modes alone
    (restored / "build").mkdir()
    (restored / "build" / "scratch").touch()
    assert archive.build(tmp_path / "third.zip", restored).read_bytes() == made.read_bytes()


def test_the_description_is_of_ro_crate_1_1(checkout, made, restored):
    from rocrate.rocrate import ROCrate

    described = json.loads((restored / archive.CRATE).read_text())
    assert described["@context"] == "https://w3id.org/ro/crate/1.1/context"
    entities = {entity["@id"]: entity for entity in described["@graph"]}
    assert len(entities) == len(described["@graph"])
    own = entities[archive.CRATE]
    assert own["@type"] == "CreativeWork" and own["about"] == {"@id": "./"}
    assert own["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    root = entities["./"]
    assert root["@type"] == "Dataset"
    assert all(root[key] for key in ("name", "description", "datePublished", "license", "author"))
    assert all("@type" in entity for entity in described["@graph"])
    files_named = {name for name, entity in entities.items() if "File" in entity["@type"]}
    assert {unquote(name) for name in files_named} == tracked(checkout)
    for name in files_named:
        assert entities[name]["contentSize"] == str((restored / unquote(name)).stat().st_size)
    assert files_named <= {part["@id"] for part in root["hasPart"]}
    assert not (named(described) - entities.keys()) - {"https://w3id.org/ro/crate/1.1"}
    made_it = entities["#render-claims"]
    assert made_it["instrument"] == {"@id": "notebooks/claims.ipynb"}
    assert {"@id": "paper/claims.toml"} in made_it["object"]
    assert {"@id": "paper/tables/claims.csv"} in made_it["result"]
    assert entities["paper/runs/lab/unet-lr1e-3/"]["description"].startswith("A recorded run.")

    crate = ROCrate(restored)  # the library reads what it wrote
    assert crate.root_dataset["version"].startswith("0.1.0, commit ")
    assert {entity.id for entity in crate.data_entities} > files_named


def named(value):
    """All that is referred to by its @id, at any depth."""
    if isinstance(value, dict):
        own = {value["@id"]} if value.keys() == {"@id"} else set()
        return own.union(*(named(inner) for inner in value.values()))
    return set().union(*(named(inner) for inner in value)) if isinstance(value, list) else set()


def test_unpacked_it_is_whole_and_runs_without_git(restored):
    assert archive.check(restored) == []
    sums = subprocess.run(["sha256sum", "--quiet", "--check", archive.SUMS], cwd=restored)
    assert sums.returncode == 0
    environment = os.environ | {
        "PYTHONPATH": str(restored),
        "PATH": "/nothing",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for arguments in (["claims"], ["archive", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "repro", *arguments],
            cwd=restored,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == ". is whole\n"


def test_what_is_missing_changed_or_extra_in_a_folder_is_named(restored, capsys):
    place = restored / "paper" / "claims.toml"
    data = bytearray(place.read_bytes())
    data[100] ^= 1
    place.write_bytes(data)
    (restored / "pyproject.toml").unlink()
    (restored / "paper" / "new.txt").touch()
    for made_there in (".venv/lib/a.py", "build/b", "repro/__pycache__/c.pyc", "paper/.lock"):
        (restored / made_there).parent.mkdir(parents=True, exist_ok=True)
        (restored / made_there).touch()
    lines = ["paper/claims.toml is changed", "paper/new.txt is extra", "pyproject.toml is missing"]
    assert archive.check(restored) == lines
    assert main(["archive", "--check", str(restored)]) == 1
    assert capsys.readouterr().out.splitlines() == lines


def test_a_flipped_byte_of_the_archive_is_named(made, tmp_path):
    assert archive.check(made) == []
    with zipfile.ZipFile(made) as packed:
        entry = packed.getinfo(f"{NAME}/paper/claims.toml")
    data = bytearray(made.read_bytes())
    data[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 1
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(data)
    assert archive.check(damaged) == ["paper/claims.toml is changed"]
    damaged.write_bytes(made.read_bytes()[:-1000])
    with pytest.raises(ReproError, match="no archive, or is damaged"):
        archive.check(damaged)


def test_what_cannot_be_done_is_said(checkout, restored, tmp_path):
    with pytest.raises(ReproError, match="named like one"):
        archive.build(tmp_path / "archive.tar.gz", checkout)
    (restored / "paper" / "claims.toml").unlink()
    with pytest.raises(ReproError, match=r"paper/claims\.toml cannot be archived: missing"):
        archive.build(tmp_path / "a.zip", restored)
    (restored / archive.SUMS).write_text("what is this\n")
    with pytest.raises(ReproError, match="not of sha256sum: 'what is this'"):
        archive.check(restored)
    (restored / archive.SUMS).unlink()
    with pytest.raises(ReproError, match="neither a git checkout nor an unpacked archive"):
        archive.build(tmp_path / "a.zip", restored)
    with pytest.raises(ReproError, match="no unpacked archive"):
        archive.check(restored)
    with pytest.raises(ReproError, match="is no archive"):
        archive.check(tmp_path / "absent.zip")
    assert not list(tmp_path.glob("*.zip"))


def test_a_full_disk_leaves_the_old_archive_and_nothing_else(checkout, tmp_path, monkeypatch):
    out = tmp_path / "archive.zip"
    out.write_bytes(b"old")

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(ReproError, match="No space left on device"):
        archive.build(out, checkout)
    assert [path.name for path in tmp_path.iterdir()] == ["archive.zip"] and out.read_bytes() == b"old"


def test_a_change_that_is_not_committed_is_told(checkout):
    clean = archive.source(checkout)
    assert len(clean.commit) == 40 and clean.names == sorted(tracked(checkout))
    place = checkout / "run me"
    before = place.read_text()
    place.write_text("changed")
    try:
        assert archive.source(checkout).commit == f"{clean.commit}+"
    finally:
        files.write_atomic(place, before)
        place.chmod(0o755)

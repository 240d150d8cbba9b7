"""The set-up: pins that agree with each other, and a Makefile that does what it says."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

root = Path(__file__).parents[1]
pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
direct = [
    Requirement(line) for line in pyproject["project"]["dependencies"] + pyproject["dependency-groups"]["dev"]
]
conda_names = {"pytorch": "torch"}


def lock_entries() -> list[str]:
    """The entries of requirements.lock, each with its hashes, comments removed."""
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return re.split(r"\n(?=\S)", text.strip())


def lock_versions() -> dict[str, str]:
    """Name to version of every package in requirements.lock."""
    return dict(entry.split(" ")[0].split("==") for entry in lock_entries())


def test_every_lock_entry_is_pinned_and_hashed():
    for entry in lock_entries():
        assert re.match(r"[a-z0-9-]+==[0-9][^ ]*( ; [^\\]+)? \\\n", entry), entry.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), f"no hash: {entry.splitlines()[0]}"
    assert len(lock_versions()) == len(lock_entries()), "a package is locked in two versions"


def test_lock_names_no_address_and_how_it_is_made():
    text = (root / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|^-", text, re.M)
    assert "make lock" in text.split("==")[0]


@pytest.mark.parametrize("requirement", direct, ids=lambda requirement: requirement.name)
def test_direct_dependency_is_locked_in_a_version_it_allows(requirement):
    assert requirement.specifier.contains(lock_versions()[requirement.name]), "run `make lock`"


def test_conda_environment_has_the_same_direct_pins():
    *conda, pip = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert conda[:2] == [f"python{pyproject['project']['requires-python']}", "pip"]
    assert pip["pip"][-1] == "--editable ."
    pins = dict(line.split("==") for line in conda[2:] + pip["pip"][:-1])
    pins = {conda_names.get(name, name): version for name, version in pins.items()}
    assert pins == {requirement.name: lock_versions()[requirement.name] for requirement in direct}


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pyproject["project"]["version"]


def documented_commands() -> list[str]:
    """Every `make ...` in code spans and code blocks of the README."""
    readme = root / "README.md"
    return re.findall(r"(?:^|`)(make(?: [A-Za-z][\w=-]*)+)", readme.read_text(encoding="utf-8"), re.M)


def test_documented_targets_exist():
    commands = documented_commands()
    rules = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.M)
    outputs = tomllib.loads((root / "paper/figures.toml").read_text(encoding="utf-8"))
    for command in commands:
        for target in (word for word in command.split()[1:] if "=" not in word):
            assert target in rules or target in outputs, (
                f"README says `{command}`; there is no target {target}"
            )


def test_ci_runs_the_documented_test_command():
    script = root / ".ci/run"
    assert script.stat().st_mode & stat.S_IXUSR
    last = script.read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith("make test") and last in documented_commands()


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make in `folder`, free of what a make around this test passes down."""
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "TORCH", "PYTHON", "UV_FIND_LINKS")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with what the set-up reads, and two figures."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/figures.toml").write_text(
        '[fig1_a]\nnotebook = "a.ipynb"\n[fig1_a.parameters]\nn = 1\n[table1_b]\n'
    )
    return tmp_path


def test_help_lists_every_target(checkout):
    shown = re.findall(r"^make ([a-z-]+) ", make(checkout).stdout, re.M)
    phony = re.search(r"^\.PHONY: (.*)", (root / "Makefile").read_text(encoding="utf-8"), re.M).group(1)
    assert sorted(shown) == sorted(set(phony.split()) - {"$(FIGURES)"})


def test_old_python_is_refused_by_name(checkout):
    old = checkout / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    run = make(checkout, "test", f"PYTHON={old}")
    assert run.returncode != 0
    assert f"Python 3.11 or newer is needed, and {old} is not" in run.stdout
    assert not (checkout / ".venv").exists()


def test_choice_of_torch_is_remembered_and_made_once(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv/uv").touch()
    version = lock_versions()["torch"]
    assert "--torch-backend" not in make(checkout, "-n", "test").stdout
    (checkout / ".venv/torch").write_text("cpu\n")
    plan = make(checkout, "-n", "-j", "figures", "test").stdout
    assert plan.count(f"--torch-backend cpu torch=={version} torchvision==") == 1
    assert (
        "pip sync --require-hashes requirements.lock" in make(checkout, "-n", "test", "TORCH=default").stdout
    )


def test_environment_follows_the_lock(checkout):
    (checkout / ".venv").mkdir()
    for stamp in ("uv", "ready-default"):
        (checkout / ".venv" / stamp).touch()
    assert "uv pip" not in make(checkout, "-n", "test").stdout
    os.utime(checkout / "requirements.lock", (2**32, 2**32))
    assert "uv pip sync --require-hashes requirements.lock" in make(checkout, "-n", "test").stdout


def test_each_output_is_rendered_by_its_own_target(checkout):
    plan = make(checkout, "-n", "figures").stdout
    assert re.findall(r"-m repro render (\w+)", plan) == ["fig1_a", "table1_b"]
    assert re.findall(r"-m repro render (\w+)", make(checkout, "-n", "table1_b").stdout) == ["table1_b"]


def test_claims_are_rendered_after_what_they_are_read_from(checkout):
    figures = checkout / "paper/figures.toml"
    figures.write_text("[claims]\n" + figures.read_text())
    for target in ("figures", "claims"):
        plan = make(checkout, "-n", "-j4", target).stdout
        assert re.findall(r"-m repro render (\w+)", plan) == ["fig1_a", "table1_b", "claims"]
    assert "render claims" not in make(checkout, "-n", "table1_b").stdout

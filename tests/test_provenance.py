"""Which code and which files: followed through imports, by content."""

import pytest

from repro import files, provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small `repro` whose module a imports b, which imports models.c; d stands alone."""
    folder = tmp_path / "repro"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from repro import b\n")
    (folder / "b.py").write_text("def f():\n    import repro.models.c as c\n")
    (folder / "models" / "c.py").write_text("import numpy\n")
    (folder / "d.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return folder


def test_imports_are_followed(checkout):
    assert provenance.modules_of("from repro.a import f") == {"repro.a", "repro", "repro.b", "repro.models.c"}
    assert provenance.modules_of("import numpy\nimport reproduce") == set()


def test_the_code_version_follows_what_is_imported_and_nothing_else(checkout):
    before = provenance.code_version("import repro.a")
    (checkout / "d.py").write_text("x = 2\n")
    assert provenance.code_version("import repro.a") == before
    (checkout / "models" / "c.py").write_text("import scipy\n")
    assert provenance.code_version("import repro.a") != before


def test_the_code_of_a_measurement_covers_the_networks_it_runs():
    covered = provenance.modules_of("import repro.train")
    assert {
        "repro.models.unet",
        "repro.models.vit",
        "repro.evaluate",
        "repro.samplers",
        "repro.runs",
    } <= covered


def test_used_files_are_named_relative_to_the_checkout_with_their_hashes(checkout):
    provenance.forget()
    provenance.used(checkout / "d.py")
    assert provenance.used_files() == {"repro/d.py": files.sha256(checkout / "d.py")}
    provenance.forget()
    assert provenance.used_files() == {}

"""The notebooks, executed for real: what is committed is what they make, and they notice a false record."""

import json
import shutil

import nbformat
import numpy as np
import pytest
from PIL import Image

from repro import paper, provenance, render, runs
from repro.files import ReproError

ID = "fig9_celeba64_unet"
COMMITTED = provenance.ROOT / "paper"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder into which every output of paper/figures.toml was rendered anew."""
    out = tmp_path_factory.mktemp("paper")
    for id in render.ids():
        render.render(id, out=out)
    return out


def without_provenance(path):
    values = json.loads(path.read_text())
    values.pop("provenance", None)
    return values


def test_committed_values_are_what_the_notebooks_make(drawn):
    for path in sorted((drawn / "values").glob("*.json")):
        assert without_provenance(path) == without_provenance(COMMITTED / "values" / path.name)


def test_committed_figures_are_what_the_notebooks_draw(drawn):
    for path in sorted((drawn / "figures").glob("*.png")):
        new, old = (
            np.asarray(Image.open(p).convert("RGB")) for p in (path, COMMITTED / "figures" / path.name)
        )
        np.testing.assert_array_equal(new, old)


def test_committed_tables_are_what_the_notebooks_make(drawn):
    for path in sorted((drawn / "tables").glob("*.csv")):
        assert path.read_text() == (COMMITTED / "tables" / path.name).read_text()


def test_figures_name_the_run_and_the_hash_of_each_weight_file(drawn):
    about = paper.read_provenance(drawn / "figures" / f"{ID}.png")
    assert about["runs"] == {"lab/celeba64-unet": runs.load_run("lab/celeba64-unet").record.weights}


def test_another_runs_samples_stop_the_notebook(tmp_path, monkeypatch):
    """A record whose samples do not come from its weights: the picture mirrored, its hash put right."""
    folder = tmp_path / "runs" / "lab" / "celeba64-unet"
    shutil.copytree(runs.RECORDED / "lab" / "celeba64-unet", folder)
    record = runs.read_record(folder / "run.json")
    images = runs.load_run("lab/celeba64-unet").samples()[:, :, ::-1]
    samples = {**json.loads((folder / "run.json").read_text())["samples"]}
    samples["sha256"] = runs.save_samples(
        folder, np.ascontiguousarray(images), samples["rows"], samples["cols"]
    )
    values = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**values, "samples": samples}))
    assert runs.read_record(folder / "run.json") != record
    with pytest.raises(ReproError, match="not what its weights draw"):
        runs.load_run("lab/celeba64-unet", tmp_path / "runs").check_samples(1)


def test_notebooks_hold_no_outputs_functions_or_classes():
    for path in sorted((provenance.ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert any("parameters" in cell.metadata.get("tags", []) for cell in code), path.name
        for cell in code:
            assert not cell.outputs and cell.execution_count is None, path.name
            assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines()), (
                path.name
            )

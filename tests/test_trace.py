"""Tracing: a figure leads to all that it was made from, and whatever changed since is named."""

import json
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from repro import files, paper, provenance, trace
from repro.__main__ import main
from repro.files import ReproError

ID = "fig9_celeba64_unet"
FIGURES = provenance.ROOT / "paper" / "figures"
RUN = "paper/runs/lab/celeba64-unet"
WEIGHTS = f"{RUN}/weights-00003-of-00003.safetensors"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what one figure was made from, in a git repository of its own."""
    root = tmp_path / "checkout"
    read = paper.read_provenance(FIGURES / f"{ID}.png")["files"]
    outputs = [f"paper/figures/{ID}.png", f"paper/figures/{ID}.pdf", f"paper/values/{ID}.json"]
    tables = [f"paper/tables/{ID}.{suffix}" for suffix in ("csv", "md", "tex")]
    for name in ["paper/figures.toml", *read, *outputs, *tables]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(provenance.ROOT / name, root / name)
    for folder in ("repro", "notebooks"):
        shutil.copytree(
            provenance.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def flip(path, at=-1):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


RUNS = provenance.ROOT / "paper" / "runs" / "lab"


def traced(path) -> str:
    return "\n".join(trace.trace(path).lines)


def test_a_committed_figure_traces_to_all_that_made_it_and_matches(capsys):
    assert main(["trace", str(FIGURES / f"{ID}.png")]) == 0
    printed = capsys.readouterr().out
    record = json.loads((provenance.ROOT / RUN / "run.json").read_text())
    stamp = paper.read_provenance(FIGURES / f"{ID}.png")
    for told in (
        *stamp["files"],
        *(f"{digest[:16]}" for digest in (*stamp["files"].values(), *record["weights"].values())),
        f"notebooks/sample_grid.ipynb, recorded {stamp['notebook']['code']}",
        f"the library, recorded {stamp['code']}, now {stamp['code']}: same",
        "rows      = 8",
        "8,294,400 images seen",
        f"celeba64, fingerprint {record['data']['fingerprint'][:16]}",
        f"code        {record['code']}, commit {record['commit']}",
    ):
        assert told in printed
    assert printed.endswith("\nall 8 files match, and so do notebook, parameters and code\n")


def test_it_tells_what_a_training_began_from_and_whether_that_is_recorded(tmp_path, monkeypatch):
    figure = FIGURES / "fig10_imagenet64_vit.png"
    (one, two) = json.loads((RUNS / "imagenet64-vit" / "run.json").read_text())["from_weights"].values()
    began = f"began from weights {one[:16]}…, {two[:16]}…: those of lab/imagenet64-vit, "
    assert traced(figure).count(began + "not here any more") == 2  # of the run, and of that which goes on
    changed = json.loads((RUNS / "imagenet64-vit" / "run.json").read_text())
    changed["from_weights"] = changed["weights"]
    found = trace.Trace()
    trace._tell_run(found, "lab/x", "paper/runs/lab/imagenet64-vit", changed, changed["weights"])
    assert any("those of lab/imagenet64-vit, recorded here" in line for line in found.lines)


def test_runs_without_weights_say_so_and_other_kinds_of_files_trace_the_same():
    lines = traced(provenance.ROOT / "paper" / "values" / "fig2_edm.json")
    assert "weights     not recorded" in lines and "does not match" not in lines
    for name in (f"figures/{ID}.pdf", f"values/{ID}.json", f"tables/{ID}.md", f"tables/{ID}.tex"):
        assert "all 8 files match" in traced(provenance.ROOT / "paper" / name), name


def test_a_copy_outside_the_checkout_is_traced_a_csv_by_its_bytes(tmp_path):
    for name in (f"figures/{ID}.png", f"tables/{ID}.csv"):
        copy = Path(shutil.copy(provenance.ROOT / "paper" / name, tmp_path))
        assert "all 8 files match" in traced(copy)
    replace(copy, "7.0", "1.0")
    with pytest.raises(ReproError, match="the .md that was saved with it is not there"):
        trace.trace(copy)
    shutil.copy(provenance.ROOT / "paper" / "tables" / "fig2_edm.md", copy.with_suffix(".md"))
    with pytest.raises(ReproError, match="other columns or rows than"):
        trace.trace(copy)


def test_each_change_is_named(checkout, capsys):
    figure = checkout / "paper" / "figures" / f"{ID}.png"
    assert main(["trace", str(figure)]) == 0

    def problems() -> str:
        capsys.readouterr()
        assert main(["trace", str(figure)]) == 1
        return capsys.readouterr().out.splitlines()[-1].removeprefix("does not match: ")

    flip(checkout / WEIGHTS)
    assert problems() == f"{WEIGHTS} is changed"
    flip(checkout / WEIGHTS)
    replace(checkout / RUN / "metrics.jsonl", "109.91537342890226", "109.91537342890227")
    assert problems() == f"{RUN}/metrics.jsonl is changed"
    (checkout / RUN / "metrics.jsonl").unlink()
    assert problems() == f"{RUN}/metrics.jsonl is missing"
    shutil.copy(Path(__file__).parents[1] / RUN / "metrics.jsonl", checkout / RUN)
    replace(checkout / "paper" / "figures.toml", "rows = 8", "rows = 7")
    assert problems() == f"{ID} has other parameters now: rows"
    replace(checkout / "paper" / "figures.toml", "rows = 7", "rows = 8")
    replace(checkout / RUN / "run.json", "8294400", "8294401")
    assert problems() == f"{RUN}/run.json is changed"
    replace(checkout / RUN / "run.json", "8294401", "8294400")
    assert main(["trace", str(figure)]) == 0


def test_a_changed_module_is_named_by_git_and_without_git_the_version_is(checkout):
    figure, module = checkout / "paper" / "figures" / f"{ID}.png", checkout / "repro" / "samplers.py"
    replace(module, '"""', '"""One more word. ')
    assert trace.trace(figure).problems == ["the code of the library is other than recorded"]
    assert "now 6a0d" not in traced(figure)
    replace(module, '"""One more word. ', '"""')
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout)]
    for command in (["init", "-q"], ["add", "repro", "paper/figures"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    replace(module, '"""', '"""One more word. ')
    replace(checkout / "repro" / "bench.py", '"""', '"""Of no concern here. ')
    named = ["the code of the library is other than recorded", "repro/samplers.py is changed"]
    assert trace.trace(figure).problems == named
    copy = shutil.copy(figure, checkout.parent)
    assert trace.trace(copy).problems == named


def test_a_changed_or_missing_notebook_is_named(checkout):
    figure, source = (
        checkout / "paper" / "values" / f"{ID}.json",
        checkout / "notebooks" / "sample_grid.ipynb",
    )
    replace(source, "import", "import repro.samplers\\nimport")
    assert trace.trace(figure).problems == ["the code of notebooks/sample_grid.ipynb is other than recorded"]
    source.unlink()
    assert len(trace.trace(figure).problems) >= 2


def test_recorded_samples_and_weights_are_found_by_their_bytes(checkout, tmp_path):
    samples = checkout / RUN / "samples.png"
    for path in (samples, shutil.copy(samples, tmp_path / "mine.png"), checkout / WEIGHTS):
        told = traced(path)
        assert f"{RUN}/run.json" in told and "8,294,400 images seen" in told
        assert told.endswith("all 4 files match" if Path(path).suffix == ".png" else "all 3 files match")
    assert "seeds 0 to 63, ancestral, 250 steps" in traced(samples)
    flip(checkout / WEIGHTS)
    assert trace.trace(samples).problems == [f"{WEIGHTS} is changed"]
    Image.new("RGB", (8, 8)).save(samples)
    assert f"{RUN}/samples.png is changed" in trace.trace(samples).problems


def test_what_cannot_be_traced_says_why_and_the_others_are_traced_still(tmp_path, capsys):
    whole = (FIGURES / f"{ID}.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "short.png").write_bytes(whole[:20])
    (tmp_path / "cut.pdf").write_bytes((FIGURES / f"{ID}.pdf").read_bytes()[:-2000])
    (tmp_path / "cut.json").write_text('{"provenance": {')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"provenance": {"files": []}}')
    (tmp_path / "plain.tex").write_text("text")
    (tmp_path / "notes.txt").write_text("text")
    expected = {
        "plain.png": "carries no provenance, and no run.json",
        "cut.png": "damaged or cut",
        "short.png": "damaged or cut",
        "cut.pdf": "damaged or cut",
        "cut.json": "damaged or cut",
        "list.json": "carries no provenance of repro.paper",
        "other.json": "carries no provenance of repro.paper",
        "plain.tex": "carries no provenance of repro.paper",
        "notes.txt": "cannot be traced: only files that end in .png",
        "absent.png": "there is no file",
    }
    for name, message in expected.items():
        assert main(["trace", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.out == ""
        assert name in printed.err and message in printed.err
    assert main(["trace", str(tmp_path / "absent.png"), str(FIGURES / f"{ID}.png")]) == 2
    assert "all 8 files match" in capsys.readouterr().out


def test_a_figure_saved_in_a_session_of_ones_own_says_that_its_code_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_PAPER_OUT", str(tmp_path))
    monkeypatch.delenv("REPRO_RENDER", raising=False)
    provenance.forget()
    png, _ = paper.save_figure(plt.figure(), "mine")
    assert trace.trace(png).problems == [
        "the code cannot be compared, since no notebook is recorded; use `render`"
    ]


def test_a_file_that_was_absent_and_has_come_is_new():
    found = trace.Trace()
    assert found.compare("README.md", provenance.ABSENT) == "new"
    assert found.compare("no/such/file", provenance.ABSENT) == "same"
    assert found.compare("LICENSE", files.sha256(provenance.ROOT / "LICENSE")) == "same"
    assert found.problems == ["README.md is new"]

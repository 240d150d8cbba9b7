"""Verification: what is whole is found well, and each kind of damage is found and named."""

import contextlib
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from repro import evaluate, files, provenance, render, runs, verify
from repro.__main__ import main
from repro.files import ReproError

RUN = "paper/runs/lab/celeba64-unet"
WEIGHTS = "weights-00003-of-00003.safetensors"

NOTEBOOK = """
import matplotlib.pyplot as plt
import pandas as pd
from repro import files, paper, provenance, weights

measured = files.read_json(provenance.used(provenance.ROOT / "paper" / "measured.json"))
fig, ax = plt.subplots(figsize=(2, 2))
ax.plot([0, measured["value"]], [0, weights.LARGEST])
paper.save_figure(fig, "fig", dpi=60)
paper.save_table("fig", pd.DataFrame({"value": [measured["value"]]}), "One number.")
paper.save_values("fig", {"of": {"value": measured["value"], "largest": weights.LARGEST}})
"""


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def wrong(findings) -> dict[str, str]:
    return {finding.name: finding.told for finding in findings if not finding.well}


# Runs


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A copy of one recorded run."""
    shutil.copytree(provenance.ROOT / RUN, tmp_path / "runs" / "lab" / "one")
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "lab" / "one"


def told_of(folder: Path) -> str:
    (finding,) = verify.records()
    assert finding.name == provenance.relative(folder)
    assert finding.well == ("are those of run.json" in finding.told)
    return finding.told


def test_a_run_is_whole_until_any_of_its_files_is_not(recorded):
    assert told_of(recorded) == "4 files are those of run.json"
    flip(recorded / WEIGHTS)
    assert told_of(recorded) == f"{WEIGHTS} is changed"
    flip(recorded / WEIGHTS)
    flip(recorded / "samples.png", at=5000)
    (recorded / WEIGHTS).unlink()
    assert told_of(recorded) == f"{WEIGHTS} is missing; samples.png is changed"
    (recorded / "metrics.jsonl").write_text("{}\n3\n")
    assert "metrics.jsonl, line 2, is no record" in told_of(recorded)
    (recorded / "metrics.jsonl").write_text('{}\n{"value": \n{}\n')
    assert "metrics.jsonl, line 2, is not JSON" in told_of(recorded)
    (recorded / "run.json").write_text("{")
    assert "run.json" in told_of(recorded)


# Outputs


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a library, a measured number, and an output drawn from both."""
    root = tmp_path / "checkout"
    shutil.copytree(provenance.ROOT / "repro", root / "repro", ignore=shutil.ignore_patterns("__pycache__"))
    with open(root / "repro" / "weights.py", "a") as module:
        module.write("\nLARGEST = 5\n")
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_code_cell("number = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(NOTEBOOK),
    ]
    (root / "notebooks").mkdir()
    nbformat.write(book, root / "notebooks" / "draw.ipynb")
    files.write_json(root / "paper" / "measured.json", {"value": 17.4})
    entry = "[fig]\nnotebook = 'notebooks/draw.ipynb'\ntime_limit = 120\n"
    (root / "paper" / "figures.toml").write_text(entry)
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.delenv("REPRO_PAPER_OUT", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(root))
    render.render("fig", root / "paper" / "figures.toml")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        of = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *command]
        subprocess.run(of, check=True, capture_output=True)
    return root


def test_one_digit_and_one_line_are_caught_and_named(checkout, tmp_path, capsys):
    """Traced, and drawn anew."""
    scratch = tmp_path / "scratch"
    found = [*verify.traced(), *verify.strays(), *verify.redrawn(["fig"], scratch)]
    assert not wrong(found) and len(found) == 2 * 6  # .png .pdf .csv .md .tex .json
    number, line = checkout / "paper" / "measured.json", checkout / "repro" / "weights.py"
    replace(number, "17.4", "17.5")
    assert set(wrong(verify.traced()).values()) == {"paper/measured.json is changed"}
    replace(line, "LARGEST = 5", "LARGEST = 6")
    for told in wrong(verify.traced()).values():
        assert "the code of the library is other than recorded" in told
        assert "repro/weights.py is changed" in told
    found = wrong(verify.redrawn(["fig"], scratch))
    assert found["values/fig.json"] == "values.of.largest is 6, not 5; values.of.value is 17.5, not 17.4"
    assert found["tables/fig.csv"] == "'17.4' is '17.5' now"
    assert "allowed" in found["figures/fig.png"] and "as a .png" in found["figures/fig.pdf"]
    replace(number, "17.5", "17.4")
    replace(line, "LARGEST = 6", "LARGEST = 5")
    shutil.copy(checkout / "paper" / "values" / "fig.json", checkout / "paper" / "values" / "fig_old.json")
    (checkout / "paper" / "tables" / "fig.csv").unlink()
    assert wrong(verify.redrawn(["fig"], scratch)) == {
        "tables/fig.csv": "is made, but is not in paper/",
        "values/fig_old.json": "is not drawn any more: remove it",
    }
    replace(checkout / "paper" / "figures.toml", "time_limit", "parameters = {number = 2}\ntime_limit")
    assert "values/fig.json" in wrong(verify.strays())


def picture(path: Path, text: str = "a", thick: int = 2, size: tuple[int, int] = (200, 100)) -> Path:
    image = Image.new("RGB", size, "white")
    drawn = ImageDraw.Draw(image)
    drawn.line((10, 90, 190, 10), "black", thick)
    drawn.text((60, 20), text, "black", font_size=30)
    image.save(path)
    return path


def test_pictures_are_compared_as_an_eye_does(tmp_path):
    one = picture(tmp_path / "one.png")
    assert verify._pictures(one, picture(tmp_path / "two.png")) == (True, "the same pixels")
    for name, changed in (("text", {"text": "b"}), ("thick", {"thick": 5}), ("size", {"size": (200, 101)})):
        well, told = verify._pictures(one, picture(tmp_path / f"{name}.png", **changed))
        assert not well and ("allowed" in told or told == "200 x 101 pixels, not 200 x 100")
    noisy = np.asarray(Image.open(one)).astype(int)
    edges = np.abs(np.diff(noisy, axis=1, prepend=255)) > 0
    noisy = np.clip(noisy + edges * 20, 0, 255)  # as another way to smooth edges
    Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / "noisy.png")
    well, told = verify._pictures(one, tmp_path / "noisy.png")
    assert well and "smoothed, pixels differ by up to" in told


def test_values_and_tables_are_compared_to_the_last_digit(tmp_path):
    def written(name: str, values: dict) -> Path:
        files.write_json(tmp_path / name, {"provenance": {"id": name}, "values": values})
        return tmp_path / name

    one = written("one.json", {"a": [1.0, {"b": "x"}], "c": None})
    assert verify.compare(one, written("two.json", {"a": [1.0, {"b": "x"}], "c": None}), "n").well
    for values, told in (
        ({"a": [1.0, {"b": "y"}], "c": None}, 'values.a.1.b is "y", not "x"'),
        ({"a": [1.0000000001, {"b": "x"}], "c": None}, "values.a.0 is 1.0000000001, not 1.0"),
        ({"a": [1.0], "c": None}, 'values.a is [1.0], not [1.0, {"b": "x"}]'),
        ({"a": [1.0, {"b": "x"}], "d": None}, "values.c is gone; values.d is new"),
    ):
        finding = verify.compare(one, written("other.json", values), "n")
        assert (finding.well, finding.told) == (False, told)
    (tmp_path / "a.md").write_text('<!-- repro: {"id": 1} -->\n\n| a |\n| 1 |\n')
    (tmp_path / "b.md").write_text('<!-- repro: {"id": 2} -->\n\n| a |\n| 1 |\n')
    (tmp_path / "c.md").write_text('<!-- repro: {"id": 2} -->\n\n| a |\n| 1 |\n| 2 |\n')
    assert verify.compare(tmp_path / "a.md", tmp_path / "b.md", "n").told == "the same table"
    assert verify.compare(tmp_path / "a.md", tmp_path / "c.md", "n").told == "has another number of rows"


def test_all_that_is_committed_belongs_to_an_output():
    assert not wrong(verify.strays())


# Distances


def test_a_distance_measured_anew_may_differ_as_much_as_two_drawings_do():
    upper = json.loads((provenance.ROOT / "paper" / "values" / "sec4_4_seeds.json").read_text())
    upper = upper["values"]["intervals"]["sampling"][1]
    assert verify.tolerance() == pytest.approx(2.772 * upper, rel=1e-3)
    rng = np.random.default_rng(0)  # two distances of that standard deviation
    apart = rng.normal(1, upper, 200_000) / rng.normal(1, upper, 200_000) - 1
    assert np.mean(np.abs(apart) < verify.tolerance()) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("factor, well", [(1.0, True), (1.01, True), (1.05, False), (float("nan"), False)])
def test_distances_are_measured_as_they_were_and_compared(monkeypatch, factor, well):
    """With measuring itself, which takes a GPU, replaced."""
    name = "lab/celeba64-unet"
    line = runs.load_run(name).distances(runs.load_run(name).sample)[-1]
    asked = []

    def stand_in(denoiser, run, fingerprint, images, device, precision, batch):
        assert not torch.backends.cudnn.allow_tf32  # float32 is true float32, as when it was recorded
        asked.append((run.evaluate.samples, run.evaluate.first_seed, run.sample, precision, images))
        return [line | {"value": factor * line["value"]}]

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(evaluate, "evaluate", stand_in)
    (finding,) = verify.remeasured([name], "cpu")
    sample = runs.load_run(name).sample
    assert asked == [(line["samples"], line["first_seed"], sample, line["precision"], line["images"])]
    assert finding.well == well and finding.name == name and f"recorded {line['value']:.2f}" in finding.told
    assert finding.measured["recorded"] == line["value"] and finding.measured["device"] == "cpu"
    expected = None if np.isnan(factor) else pytest.approx(factor - 1, abs=1e-12)
    assert finding.measured["apart"] == expected
    report = verify.report([finding], verify.about("checkpoints"))
    assert json.loads(json.dumps(report, allow_nan=False))["farthest_apart"] == (
        None if np.isnan(factor) else pytest.approx(abs(factor - 1), abs=1e-12)
    )


def test_what_a_report_says_of_several_distances():
    apart = (0.01, -0.03, 0.02)
    findings = [verify.Finding("a", n < 2, "told", {"apart": number}) for n, number in enumerate(apart)]
    report = verify.report([*findings, verify.Finding("b", False, "missing")], {"level": "checkpoints"})
    assert (report["count"], report["well"], report["farthest_apart"]) == (4, 2, 0.03)
    nan = verify.Finding("c", False, "told", {"apart": None})
    assert verify.report([*findings, nan], {})["farthest_apart"] is None
    assert verify.report([], {})["farthest_apart"] is None


def test_a_run_that_cannot_be_measured_does_not_end_the_others(recorded, monkeypatch):
    others = recorded.parent / "two", recorded.parent / "unreadable"
    for folder in others:
        shutil.copytree(recorded, folder)
    (others[1] / "run.json").write_text("{")

    def stand_in(denoiser, run, fingerprint, images, device, precision, batch):
        if next(denoiser.net.parameters()).flatten()[0] == 7:
            raise torch.OutOfMemoryError("none is left")
        return [runs.load_run("lab/two").distances(run.sample)[-1]]

    weights = runs.Run.weights
    full = "lab/one"
    monkeypatch.setattr(
        runs.Run,
        "weights",
        lambda run, *a: {k: v.fill_(7) if run.name == full else v for k, v in weights(run, *a).items()},
    )
    monkeypatch.setattr(evaluate, "evaluate", stand_in)
    found = {finding.name: finding for finding in verify.remeasured(None, "cpu")}
    assert list(found) == ["lab/one", "lab/two", "lab/unreadable"]
    assert [finding.well for finding in found.values()] == [False, True, False]
    assert found["lab/one"].told == "OutOfMemoryError: none is left"
    assert "run.json" in found["lab/unreadable"].told
    (others[0] / WEIGHTS).unlink()
    full = None
    found = {finding.name: finding for finding in verify.remeasured(None, "cpu")}
    assert [finding.well for finding in found.values()] == [True, False, False]
    assert f"{WEIGHTS} is missing" in found["lab/two"].told
    with pytest.raises(ReproError, match="run.json"):
        list(verify.remeasured(["lab/unreadable"], "cpu"))


def test_runs_are_shared_out_among_gpus_by_commands(monkeypatch):
    """Each device does one run at a time, and a command that dies is a finding."""
    names = ["lab/celeba64-unet", "lab/imagenet64-unet", "lab/imagenet64-vit"]
    busy, lock = set(), threading.Lock()

    def command(words, **how):
        name, device = words[words.index("verify") + 1], words[words.index("--device") + 1]
        with lock:
            assert device not in busy
            busy.add(device)
        time.sleep(0.5 if name == names[0] else 0.05)
        with lock:
            busy.remove(device)
        if name == names[1]:
            return subprocess.CompletedProcess(words, 1, "said first\n", "Traceback\nout of memory\n")
        finding = verify.Finding(name, name == names[0], "told", {"apart": 0.5, "device": device})
        report = Path(words[words.index("--report") + 1])
        files.write_json(report, {"findings": [vars(finding)]})
        return subprocess.CompletedProcess(words, 0, "", "")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", command)
        findings = list(verify.shared_out(names, ["cuda:0", "cuda:1"]))
    assert findings[-1].name == names[0]  # that which takes longest does not keep the others waiting
    found = {finding.name: finding for finding in findings}
    assert [found[name].well for name in names] == [True, False, False]
    assert found[names[1]].told == "measuring it failed: out of memory"
    with pytest.raises(ReproError, match="no recorded weights"):
        list(verify.shared_out(["lab/vit-lr1e-3"], ["cuda:0"]))


def test_a_true_command_that_fails_is_a_finding_with_its_last_words():
    (finding,) = verify.shared_out(["lab/imagenet64-x0-minsnr5"], ["cuda:99"])  # which no machine has
    assert finding.name == "lab/imagenet64-x0-minsnr5" and not finding.well
    assert finding.told.startswith("measuring it failed: ") and "cuda" in finding.told.lower()


def test_all_gpus_are_taken_but_where_one_is_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    well = [verify.Finding("one", True, "told")]
    monkeypatch.setattr(verify, "shared_out", lambda *how: asked.append(how) or well)
    monkeypatch.setattr(verify, "remeasured", lambda *how: asked.append(how) or well)
    assert main(["verify", "lab/one", "--level", "checkpoints"]) == 0
    assert main(["verify", "--level", "checkpoints", "--device", "cuda:1"]) == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["verify", "lab/one", "--level", "checkpoints"]) == 0
    assert asked == [(("lab/one",), ["cuda:0", "cuda:1"]), (None, "cuda:1"), (("lab/one",), "cuda")]


def test_a_report_is_there_before_anything_is_measured_and_where_nothing_is(monkeypatch, tmp_path, capsys):
    report, asked = tmp_path / "report.json", []
    monkeypatch.setattr(verify, "remeasured", lambda *how: asked.append(report.is_file()) or [])
    assert main(["verify", "--level", "checkpoints", "--device", "cpu", "--report", str(report)]) == 0
    assert asked == [True] and json.loads(report.read_text())["count"] == 0
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "report.json")
    assert main(["verify", "--level", "checkpoints", "--device", "cpu", "--report", nowhere]) == 1
    assert asked == [True]  # nothing was measured in vain


def test_what_was_found_before_it_was_stopped_is_in_the_report(monkeypatch, tmp_path):
    def some(*how):
        yield verify.Finding("one", True, "told")
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "remeasured", some)
    report = tmp_path / "report.json"
    with contextlib.suppress(KeyboardInterrupt):
        main(["verify", "--level", "checkpoints", "--device", "cpu", "--report", str(report)])
    assert [finding["name"] for finding in json.loads(report.read_text())["findings"]] == ["one"]


def test_a_run_without_weights_cannot_be_measured_anew():
    with pytest.raises(ReproError, match="lab/vit-lr1e-3 has no recorded weights"):
        list(verify.remeasured(["lab/vit-lr1e-3"], "cpu"))
    with pytest.raises(ReproError, match="classifier has no recorded distance of its own sampler"):
        list(verify.remeasured(["lab/imagenet64-classifier"], "cpu"))


# The command


def test_the_command_says_what_is_wrong_and_writes_it(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "traced", lambda: [])
    report = tmp_path / "report.json"
    assert main(["verify", "--level", "records", "--report", str(report)]) == 0
    assert capsys.readouterr().out.endswith("all 1 are as recorded\n")
    flip(recorded / WEIGHTS)
    assert main(["verify", "--level", "records", "--report", str(report)]) == 1
    assert (
        f"1 of 1 are not as recorded: {provenance.relative(recorded)}: {WEIGHTS}" in capsys.readouterr().out
    )
    written = json.loads(report.read_text())
    assert written["findings"][0]["well"] is False and (written["count"], written["well"]) == (1, 0)
    assert written["level"] == "records" and written["code"]
    assert main(["verify", "no-such-figure", "--level", "figures"]) == 1
    assert "there is no output 'no-such-figure'" in capsys.readouterr().out


def test_what_was_measured_anew_on_gpus_are_all_records_with_a_distance():
    """The committed report: of each the distance that is recorded now, within the tolerance of now."""
    report = json.loads((provenance.ROOT / "paper" / "bench" / "verified.json").read_text())
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert sorted(findings) == sorted(verify.measurable())
    assert (report["count"], report["well"]) == (len(findings), len(findings))
    for name, finding in findings.items():
        recorded, measured = verify._own_lines(runs.load_run(name))[-1], finding["measured"]
        assert measured["recorded"] == recorded["value"] and "NVIDIA" in measured["device"]
        assert abs(measured["value"] / recorded["value"] - 1) <= min(measured["allowed"], verify.tolerance())

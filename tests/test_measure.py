"""What is measured of the flagships: what is missing, in which order, and on which GPU."""

import dataclasses
import json
import shutil
import threading
import time

import pytest

from repro import config, measure, runs
from repro.__main__ import main
from repro.files import ReproError
from repro.measure import Sizes, Work

NAME = "lab/imagenet64-vit"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The ViT's record without its measurements and further pictures, in a folder of its own."""
    folder = tmp_path / "runs" / NAME
    folder.mkdir(parents=True)
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    values = json.loads((runs.RECORDED / NAME / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**values, "further_samples": []}))
    return folder


def line(run, how, samples, first, value, precision="bf16", name="FD (EfficientNet-Lite0)"):
    """A distance as `evaluate` appends it, as far as it is looked at."""
    return {
        "name": name, "value": value, "images": run.record.images, "samples": samples, "first_seed": first,
        "precision": precision, "sample": config.sample_json(how), "features": "efficientnet_lite0",
    }  # fmt: skip


class Commands:
    """Stands for the commands: appends what they would, and remembers them."""

    def __init__(self, folder, fails=()):
        self.folder, self.fails = folder, fails
        self.done, self.busy, self.lock = [], set(), threading.Lock()

    def __call__(self, one, run, place, logs, compile):
        with self.lock:
            assert place not in self.busy
            self.busy.add(place)
        time.sleep(0.002)
        with self.lock:
            self.busy.remove(place)
            self.done.append((one, place))
            if one.told in self.fails:
                return logs / f"{one.told}.txt"
            given = dict(zip(one.arguments[::2], one.arguments[1::2], strict=False))
            with open(self.folder / "metrics.jsonl", "a") as file:
                for n, how in enumerate(one.settings if one.command == "evaluate" else ()):
                    far = 20.0 + n if (how.guidance, how.churn) == (2.5, 10.0) else 30.0 + n
                    drawn = int(given["--evaluate.samples"]), int(given["--evaluate.first-seed"])
                    found = [line(run, how, *drawn, far, given.get("--precision", "bf16"))]
                    if "--neighbours" in one.arguments:
                        kinds = ("nearest training image", "precision (k = 3)", "recall (k = 3)")
                        found += [line(run, how, *drawn, 1.0, name=kind) for kind in kinds]
                    file.writelines(json.dumps(each) + "\n" for each in found)
        return None


def test_of_the_recorded_flagships_is_missing_what_metrics_and_pictures_lack():
    for name in (NAME, "lab/imagenet64-unet"):
        run = runs.load_run(name)
        there = {
            json.dumps([config.sample_json(config.sample_from_json(m["sample"])), m["first_seed"]])
            for m in run.metrics
            if m.get("samples") == 5000 and m["images"] == run.record.images and m["precision"] == "bf16"
        }
        listed = json.loads((measure.SWEEPS / "imagenet64-samplers.json").read_text())
        expected = [
            how
            for how in (config.sample_from_json(each) for each in listed)
            if json.dumps([config.sample_json(how), 1_000_000]) not in there
        ]
        found = measure.missing(name)
        assert {how for one in found for how in one.settings} == set(expected)
        assert {one.arguments for one in found} <= {
            ("--evaluate.samples", "5000", "--evaluate.first-seed", "1000000")
        }


def test_a_sweep_is_done_first_and_then_its_best_is_measured_and_drawn(record, monkeypatch):
    commands = Commands(record)
    monkeypatch.setattr(measure, "_run", commands)
    monkeypatch.setattr(measure.torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ReproError, match="lacks a distance of the sweep: measure it first"):
        measure.second_part(runs.load_run(NAME))
    measure.measure(NAME, compile=False)
    done = [one for one, _ in commands.done]
    assert {place for _, place in commands.done} == {"0", "1", "2"}
    sweep = [one for one in done if one.told.startswith("sweep")]
    assert done[: len(sweep)] == sweep
    ways = [how for one in sweep for how in one.settings]
    assert len(set(ways)) == len(ways) == 24
    assert max(one.passes for one in sweep) < 1.1 * min(one.passes for one in sweep)  # shared out evenly
    chosen = measure.best(runs.load_run(NAME))
    assert (chosen.guidance, chosen.churn) == (2.5, 10.0)
    by_name = {one.told: one for one in done}
    best = by_name["the sweep's best"]
    assert best.settings == (chosen,)
    assert best.arguments == ("--evaluate.samples", "10000", "--evaluate.first-seed", "1000000")
    rows = by_name["pictures by guidance"]
    assert [(how.guidance, how.churn) for how in rows.settings] == [(1.0, 0.0), (2.5, 10.0), (2.5, 0.0)]
    order = [one.told for one in done]
    assert order.index("the sweep's best") < order.index("pictures by guidance")
    assert order.index("pictures by guidance") < order.index("pictures by samplers")
    seeds = [by_name[f"block {n}"].arguments[3] for n in range(3)]
    assert seeds == ["1000000", "1050000", "1100000"]
    assert by_name["fp32"].arguments[-2:] == ("--precision", "fp32")
    # 39 evaluations of Heun's 20 steps, guided: 78 passes an image
    assert by_name["block 1"].passes == 50_000 * 78

    left = measure.missing(NAME)  # pictures were not really drawn
    assert [one.told for one in left] == ["pictures by guidance", "pictures by samplers"]


def test_what_fails_is_named_and_the_same_command_goes_on(record, monkeypatch):
    monkeypatch.setattr(measure.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(measure, "_run", Commands(record, fails=("sweep 2",)))
    with pytest.raises(ReproError, match=r"1 commands failed: sweep 2 \(.*sweep 2.txt\). The same command"):
        measure.measure(NAME)
    again = Commands(record)
    monkeypatch.setattr(measure, "_run", again)
    measure.measure(NAME)
    sweep = [one for one, _ in again.done if one.told.startswith("sweep")]
    assert sum(len(one.settings) for one in sweep) == 6  # those that failed, no others


def test_a_command_is_given_its_gpu_its_samplers_and_a_log(record, monkeypatch, tmp_path):
    run, seen = runs.load_run(NAME), []

    class Ended:
        returncode = 1

    def ran(command, env, stdout, stderr):
        seen.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        stdout.write("what went wrong")
        return Ended

    monkeypatch.setattr(measure.subprocess, "run", ran)
    one = Work("evaluate", "sweep 1", ("--evaluate.samples", "3"), (run.sample,), 1)
    log = measure._run(one, run, "5", tmp_path, True)
    command, gpu = seen[0]
    assert (gpu, log.read_text()) == ("5", "what went wrong")
    assert command[1:5] == ["-m", "repro", "evaluate", str(run.path)] and command[-1] == "--compile"
    written = json.loads((tmp_path / "sweep-1.json").read_text())
    assert [config.sample_from_json(each) for each in written] == [run.sample]
    measure._run(dataclasses.replace(one, command="sample"), run, "", tmp_path, True)
    assert seen[1][0][-2:] == ["--device", "cpu"]


def test_runs_that_cannot_be_measured_so_are_refused(record, capsys):
    values = json.loads((record / "run.json").read_text())
    (record / "run.json").write_text(json.dumps({**values, "weights": {}}))
    assert main(["measure", NAME]) == 1
    assert (
        "lab/imagenet64-vit is recorded without weights, so nothing can be drawn" in capsys.readouterr().err
    )
    other = record.parent / "celeba64-unet"
    other.mkdir()
    shutil.copy(runs.RECORDED / "lab" / "celeba64-unet" / "run.json", other)
    assert main(["measure", "lab/celeba64-unet", "--dry-run"]) == 1
    assert "knows no null class, so it has no guidance to measure" in capsys.readouterr().err


def test_the_command_lists_what_is_missing(record, capsys):
    assert main(["measure", NAME, "--dry-run", "--few", "100"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4 and told[0].startswith("sweep 1: 6 samplers, 47 thousand passes (evaluate --eval")
    assert Sizes().few == 5_000

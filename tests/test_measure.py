"""What is measured of the flagships: what is missing, in which order, and on which GPU."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading

import pytest

from repro import config, files, measure, runs
from repro.__main__ import main
from repro.files import Busy, ReproError
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
    """Stands for the commands: records what they would, and remembers them."""

    def __init__(self, folder, fails=(), best=(2.5, 10.0)):
        self.folder, self.fails, self.best = folder, fails, best
        self.done, self.busy, self.lock = [], set(), threading.Lock()

    def __call__(self, one, run, device, log, lock, compile):
        with self.lock:
            assert device not in self.busy
            self.busy.add(device)
        with pytest.raises(Busy), files.lock(run.path):  # meanwhile, for others
            pass
        with self.lock:
            self.busy.remove(device)
            self.done.append((one, device))
            if one.told in self.fails:
                return False
            given = dict(zip(one.arguments[::2], one.arguments[1::2], strict=False))
            if one.command == "sample":
                self.draw(one, int(one.arguments[-1]))
                return True
            drawn = int(given["--evaluate.samples"]), int(given["--evaluate.first-seed"])
            for n, how in enumerate(one.settings):
                far = 20.0 if (how.guidance, how.churn, how.steps) == (*self.best, 20) else 30.0 + n
                for block in range(int(given.get("--blocks", 1))):
                    seed = drawn[1] + block * drawn[0]
                    self.append(line(run, how, drawn[0], seed, far, given.get("--precision", "bf16")))
                kinds = {"--neighbours": ["nearest"], "--precision-recall": ["precision", "recall"]}
                for kind in [kind for key in kinds if key in one.arguments for kind in kinds[key]]:
                    samples = drawn[0] if kind == "nearest" else 8747
                    self.append(line(run, how, samples, drawn[1], 1.0, name=kind) | {"k": 3})
            return True

    def append(self, values):
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def draw(self, one, columns):
        record = runs.read_record(self.folder / "run.json")
        for how in one.settings:
            others = tuple(row for row in record.further_samples if row.sample != how)
            row = dataclasses.replace(
                record.samples, file=runs.further_samples_file(how), rows=1, cols=columns, sample=how
            )
            record = dataclasses.replace(record, further_samples=(*others, row))
        runs.write_record(self.folder, record)


@pytest.fixture
def three_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(measure.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure.sample, "takes_fp8", lambda run, device: run.model.kind == "vit")
    monkeypatch.setattr(measure.tempfile, "tempdir", str(tmp_path))


def test_what_the_unets_record_lacks_of_samplers_is_missing(monkeypatch, tmp_path):
    """By a count of its own; a line taken out of it is missing too."""
    name = "lab/imagenet64-unet"
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    for file in ("run.json", "metrics.jsonl"):
        shutil.copy(runs.RECORDED / name / file, folder)
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    end = runs.load_run(name).record.images
    lines = [json.loads(each) for each in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [m for m in lines if not (m.get("samples") == 5000 and m.get("sample", {}).get("order") == 3)]
    assert len(kept) < len(lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in kept))
    there = {
        json.dumps(config.sample_json(config.sample_from_json(m["sample"])))
        for m in kept
        if (m.get("samples"), m.get("first_seed"), m.get("precision")) == (5000, 1_000_000, "bf16")
        and m["images"] == end
    }
    listed = json.loads((measure.SWEEPS / "imagenet64-samplers.json").read_text())
    ways = {config.sample_from_json(each) for each in listed}
    expected = {how for how in ways if json.dumps(config.sample_json(how)) not in there}
    assert sum(how.order == 3 for how in expected) == sum(how.order == 3 for how in ways) > 5
    found = [one for one in measure.missing(name) if one.told.startswith("samplers")]
    assert {how for one in found for how in one.settings} == expected
    assert {one.arguments for one in found} == {
        ("--evaluate.samples", "5000", "--evaluate.first-seed", "1000000")
    }


def test_a_sweep_is_done_first_and_then_its_best_is_measured_and_drawn(record, monkeypatch, three_gpus):
    commands = Commands(record)
    monkeypatch.setattr(measure, "_run", commands)
    with pytest.raises(ReproError, match="lacks a distance of the sweep: measure it first"):
        measure.second_part(runs.load_run(NAME))
    measure.measure(NAME, compile=False)
    done = [one for one, _ in commands.done]
    assert {device for _, device in commands.done} <= {"cuda:0", "cuda:1", "cuda:2"}
    sweep = [one for one in done if one.told.startswith("sweep")]
    assert done[: len(sweep)] == sweep
    ways = [how for one in sweep for how in one.settings]
    assert len(set(ways)) == len(ways) == 24
    assert max(one.passes for one in sweep) < 1.1 * min(one.passes for one in sweep)  # shared out evenly
    chosen = measure.best(runs.load_run(NAME))
    assert (chosen.guidance, chosen.churn) == (2.5, 10.0)
    by_name = {one.told: one for one in done}
    best = by_name["best of the sweep"]
    assert best.settings == (chosen,)
    assert best.arguments == ("--evaluate.samples", "10000", "--evaluate.first-seed", "1000000")
    rows = by_name["pictures by guidance"]
    assert [(how.guidance, how.churn) for how in rows.settings] == [(1.0, 0.0), (2.5, 10.0), (2.5, 0.0)]
    order = [one.told for one in done]
    assert order.index("best of the sweep") < order.index("pictures by guidance")
    assert order.index("pictures by guidance") < order.index("pictures by samplers")
    seeds = [by_name[f"block {n}"].arguments[3] for n in range(3)]
    assert seeds == ["1000000", "1050000", "1100000"]
    assert by_name["small blocks"].arguments[1::2] == ("5000", "1005000", "9")  # the first is a sampler's
    for precision in ("fp32", "fp16", "fp8"):
        assert by_name[precision].arguments[-2:] == ("--precision", precision)
    # 39 evaluations of Heun's 20 steps, guided: 78 passes an image
    assert by_name["block 1"].passes == 50_000 * 78
    assert measure.missing(NAME) == []
    assert not list(record.parents[2].glob("measure-*"))  # logs of what went well


def test_small_blocks_are_measured_from_the_first_that_is_missing(record, monkeypatch, three_gpus):
    monkeypatch.setattr(measure, "_run", Commands(record))
    measure.measure(NAME)
    lines = [json.loads(each) for each in (record / "metrics.jsonl").read_text().splitlines()]
    kept = [m for m in lines if m["first_seed"] not in (1_010_000, 1_045_000)]
    (record / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in kept))
    (left,) = measure.missing(NAME)
    assert left.arguments[1::2] == ("5000", "1010000", "8")
    assert left.passes == 8 * 5_000 * 78
    assert measure.missing(NAME, Sizes(few_blocks=2)) == []


def test_float8_is_measured_of_vits_alone(record, monkeypatch):
    """The record is taken for one of a UNet."""
    run = runs.load_run(NAME)
    for how in measure.sweep(run):
        Commands(record).append(line(run, how, 5000, measure.ELSEWHERE, 30.0))
    of_vit = {one.told for works in measure.second_part(runs.load_run(NAME)) for one in works}
    values = json.loads((record / "run.json").read_text())
    values["config"]["model"] = {"kind": "unet", "null_class": True}
    (record / "run.json").write_text(json.dumps(values))
    of_unet = {one.told for works in measure.second_part(runs.load_run(NAME)) for one in works}
    assert of_vit - of_unet == {"fp8"}


def test_what_a_device_has_no_float8_for_is_not_missing_there(record):
    run = runs.load_run(NAME)
    for how in measure.sweep(run):
        Commands(record).append(line(run, how, 5000, measure.ELSEWHERE, 30.0))
    told = {one.told for one in measure.missing(NAME, device="cpu")}
    assert {"fp32", "fp16"} < told and "fp8" not in told


def test_the_longest_work_comes_first(record, monkeypatch):
    run = runs.load_run(NAME)
    for how in measure.sweep(run):
        Commands(record).append(line(run, how, 5000, measure.ELSEWHERE, 30.0))
    passes = [sum(one.passes for one in works) for works in measure.second_part(runs.load_run(NAME))]
    assert passes == sorted(passes, reverse=True) and len(set(passes)) > 5


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_a_way_that_two_rows_show_is_drawn_once_as_long_as_the_longer(record, monkeypatch, three_gpus, churn):
    """Guidance 1.5, the run's own, may be the best, and is the first of the samplers that are shown."""
    commands = Commands(record, best=(1.5, churn))
    monkeypatch.setattr(measure, "_run", commands)
    own = runs.load_run(NAME).sample
    commands.draw(Work("sample", "a shorter row", (), (own,), 1), 4)
    measure.measure(NAME)
    assert measure.missing(NAME) == []
    drawn = [how for one, _ in commands.done if one.command == "sample" for how in one.settings]
    assert len(drawn) == len(set(drawn))
    rows = {row.sample: row.cols for row in runs.load_run(NAME).record.further_samples}
    assert rows[own] == 12


def test_the_nearest_images_of_fewer_samples_are_not_those_of_a_block(record, monkeypatch, three_gpus):
    commands = Commands(record)
    monkeypatch.setattr(measure, "_run", commands)
    run = runs.load_run(NAME)
    commands.append(line(run, run.sample, 10_000, 1_000_000, 1.2, name="nearest training image"))
    measure.measure(NAME)
    lines = [json.loads(each) for each in (record / "metrics.jsonl").read_text().splitlines()]
    for name in ("nearest", "precision", "recall"):
        kept = [m for m in lines if m["name"] != name]
        (record / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in kept))
        assert [one.told for one in measure.missing(NAME)] == ["block 0"]


def test_what_fails_is_named_and_the_same_command_goes_on(record, monkeypatch, three_gpus):
    monkeypatch.setattr(measure, "_run", Commands(record, fails=("sweep 2",)))
    with pytest.raises(ReproError, match=r"commands failed: sweep 2 \(.*sweep-2.txt\). Mend that, and"):
        measure.measure(NAME)
    again = Commands(record, fails=("best of the sweep",))
    monkeypatch.setattr(measure, "_run", again)
    with pytest.raises(ReproError, match="commands failed: best of the sweep"):
        measure.measure(NAME)
    sweep = [one for one, _ in again.done if one.told.startswith("sweep")]
    assert sum(len(one.settings) for one in sweep) == 4  # those that failed, of 24 in 6 parts, no others
    left = [one.told for one in measure.missing(NAME)]  # what follows it, and nothing else
    assert left == ["best of the sweep", "pictures by guidance", "pictures by samplers"]


def test_a_full_disk_is_told_and_other_work_is_done(record, monkeypatch, three_gpus):
    commands = Commands(record)

    def run(one, *others):
        if one.told == "sweep 1":
            raise OSError(28, "No space left on device")
        return commands(one, *others)

    monkeypatch.setattr(measure, "_run", run)
    with pytest.raises(ReproError, match=r"commands failed: sweep 1 \(.*No space left on device\)"):
        measure.measure(NAME)
    assert len(commands.done) == 5  # of 6 parts, two for each GPU


def test_a_command_is_given_its_gpu_its_samplers_and_the_lock(record, tmp_path):
    """A true command, which fails, and what it says; and that a lock is kept while such a command lives."""
    run = runs.load_run(NAME)
    one = Work("evaluate", "sweep 1", ("--evaluate.samples", "3"), (run.sample,), 1)
    log = tmp_path / "sweep-1.txt"
    with files.lock(run.path) as lock:
        assert not measure._run(one, run, "tpu", log, lock, True)
    assert "unknown device 'tpu'" in log.read_text()
    written = json.loads(log.with_suffix(".json").read_text())
    assert [config.sample_from_json(each) for each in written] == [run.sample]
    with files.lock(run.path) as lock:
        script = "import sys; print('there', flush=True); sys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            pass_fds=(lock.fileno(),),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        child.stdout.readline()
    with pytest.raises(Busy, match="another process is working in"), files.lock(run.path):
        pass
    child.communicate()
    with files.lock(run.path):
        pass


def test_runs_that_cannot_be_measured_so_are_refused(record, capsys, monkeypatch):
    values = json.loads((record / "run.json").read_text())
    (record / "run.json").write_text(json.dumps({**values, "weights": {}}))
    for name in ("celeba64-unet", "imagenet64-latent-vit"):
        (record.parent / name).mkdir()
        shutil.copy(runs.RECORDED / "lab" / name / "run.json", record.parent / name)
    for name, message in (
        (NAME, f"{NAME} is recorded without weights, so nothing can be drawn"),
        ("lab/celeba64-unet", "knows no null class, so it has no guidance to measure"),
        ("lab/imagenet64-latent-vit", "draws latents, which have no range to clip to"),
    ):
        assert main(["measure", name, "--dry-run"]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        (["--few", "0"], "measure needs 2 samples or more each time"),
        (["--blocks", "-1"], "and 1 block or more"),
        ([], "torch sees no GPU, and without one this takes days"),
    ):
        assert main(["measure", NAME, *arguments]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["measure", NAME]) == 1
    assert "start it without torchrun" in capsys.readouterr().err
    with pytest.raises(ReproError, match="would reach the sweep's seeds, from 3,000,000 on; take fewer"):
        (record / "run.json").write_text(json.dumps({**values, "further_samples": []}))
        run = runs.load_run(NAME)
        for how in measure.sweep(run):
            Commands(record).append(line(run, how, 5000, measure.ELSEWHERE, 30.0))
        measure.second_part(runs.load_run(NAME), Sizes(many=1_000_000))
    with pytest.raises(ReproError, match="500 blocks of 5,000 samples would reach the sweep's seeds"):
        measure.second_part(runs.load_run(NAME), Sizes(few_blocks=500))


def test_the_command_lists_what_is_missing(record, capsys):
    assert main(["measure", NAME, "--dry-run", "--few", "100"]) == 0
    told = capsys.readouterr().out.splitlines()
    parts, samplers = ([line for line in told if line.startswith("  ") == own] for own in (False, True))
    assert len(parts) == 4 and parts[0].startswith("sweep 1: 47 thousand passes (evaluate --evaluate.samples")
    assert len(samplers) == 24 and "  steps 20, sigma_max 40.0, churn 20.0, guidance 3.0" in samplers
    assert Sizes().few == 5_000

"""Training: resumed bit for bit after a kill, the same on two processes, and it learns."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import cluster
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats

from repro import (
    config,
    data,
    denoiser,
    evaluate,
    files,
    pareto,
    prepare,
    presets,
    provenance,
    runs,
    schedules,
    train,
)
from repro.config import Config, Data, Evaluate, Sample, Train, UNet, ViT
from repro.files import ReproError

MODEL = ViT(patch=16, width=32, depth=1, heads=2)
UNET = UNet(channels=32, multipliers=(1, 1, 1, 1), blocks=1, attention=(), heads=1, dropout=0.1)
TRAIN = Train(
    images=48, batch=4, lr=1e-3, warmup_images=16, ema_halflife_images=20, precision="fp32", compile=False,
    state_every_images=12, log_every_images=4,
)  # fmt: skip
RUN = Config("lab/tiny", Data("drawn"), MODEL, TRAIN, sample=Sample(steps=2))


def prepared(folder, name="drawn", classes=0, count=10, constant=None):
    """A data set of random images, or of one grey level; with classes, `count` images of each."""
    random = np.random.default_rng(0)
    for number in range(max(classes, 1)):
        below = folder / "source" / name / (f"n{number:08d}" if classes else "")
        below.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
            pixels = pixels if constant is None else np.full_like(pixels, constant)
            Image.fromarray(pixels).save(below / f"{i:03d}.png")
    source = folder / "source" / name
    prepare.prepare("imagenet64" if classes else "celeba64", source, folder / "data", name=name, workers=1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    prepared(tmp_path)
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("REPRO_REFERENCE", str(tmp_path / "reference"))
    return tmp_path


def change(run, **changes):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def log_of(folder):
    return [(line["images"], line["loss"], line["lr"]) for line in files.read_lines(folder / "log.jsonl")]


CPU = train.Place(0, 1, torch.device("cpu"))

# A run and its end ----------------------------------------------------------------------------------


def test_a_run_is_recorded_whole(home):
    folder = train.train(RUN, home / "out", "cpu", grid=(1, 2))
    run = runs.load_run(folder)
    assert run.record.images == 48 and run.config == RUN
    assert run.record.data == runs.DataUsed("drawn", data.verify("drawn"), 10, 10, 0)
    assert [images for images, _, _ in log_of(folder)] == list(range(4, 49, 4))
    state = load_file(folder / train.STATE)
    for name, tensor in run.weights().items():
        assert torch.equal(tensor, state[f"ema.{name}"].half().float())
    assert run.check_samples(2)["largest_mean_difference"] == 0


def test_a_run_that_knows_classes_records_their_names(home):
    prepared(home, "labelled", classes=2, count=3)
    labelled = Data("labelled", classes=2)
    for used, names in ((labelled, ("n00000000", "n00000001")), (Data("labelled"), ())):
        run = change(dataclasses.replace(RUN, data=used), images=4)
        folder = train.train(run, home / f"out{used.classes}", "cpu", grid=(1, 1))
        assert runs.load_run(folder).record.data.classes == names


def test_a_run_without_its_weights_says_so(home):
    run = dataclasses.replace(RUN, record_weights=False, evaluate=Evaluate(at=(24,), samples=4))
    folder = train.train(run, home / "out", "cpu", grid=(1, 2))
    recorded = runs.load_run(folder)
    assert recorded.record.weights == {} and not list(folder.glob("weights-*"))
    assert len(recorded.samples()) == 2  # drawn before
    with pytest.raises(ReproError, match="recorded without weights"):
        recorded.check_samples(1)
    state = files.sha256(folder / train.STATE)
    train.train(run, folder, "cpu", grid=(1, 2))  # ended: nothing is trained or drawn again
    assert files.sha256(folder / train.STATE) == state and runs.load_run(folder).record == recorded.record


def test_training_counts_images_and_rounds_up_to_whole_batches(home):
    folder = train.train(change(RUN, images=6), home / "out", "cpu", grid=(1, 1))
    assert runs.load_run(folder).record.images == 8


def test_an_ended_run_is_not_trained_again_and_can_be_prolonged(home):
    whole = train.train(RUN, home / "whole", "cpu", grid=(1, 1))
    before = files.sha256(whole / train.STATE)
    train.train(RUN, whole, "cpu", grid=(1, 1))
    assert files.sha256(whole / train.STATE) == before
    parts = train.train(change(RUN, images=24), home / "parts", "cpu", grid=(1, 1))
    train.train(RUN, parts, "cpu", grid=(1, 1))
    assert log_of(parts) == log_of(whole)
    assert runs.load_run(parts).record.weights == runs.load_run(whole).record.weights


SCRIPT = """
import dataclasses, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)  # as conftest has it: how sums are split decides their last bits
from test_train import RUN, UNET, change, train
train.train(dataclasses.replace(change(RUN, {changes}), model={model}), {out!r}, "cpu", (1, 1))
"""


def script(out, model="RUN.model", changes=""):
    """A program that trains into `out`, for a process of its own."""
    tests, root = os.path.dirname(__file__), str(provenance.ROOT)
    return SCRIPT.format(tests=tests, root=root, out=str(out), model=model, changes=changes)


def test_a_run_killed_anywhere_goes_on_bit_for_bit(home):
    """For real: three times `kill -9`, at whatever the process is doing, then to the end."""

    def start(out):
        code = script(home / out, "UNET", "images=80")  # a network with dropout
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    whole = start("whole")
    for least in (16, 36, 56):
        process = start("killed")
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if (log := log_of(home / "killed")) and log[-1][0] >= least:
                break
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start("killed")
    for process in (whole, last):
        assert process.wait(200) == 0, process.stderr.read().decode()
    assert log_of(home / "killed") == log_of(home / "whole")
    one, other = (load_file(home / name / train.STATE) for name in ("whole", "killed"))
    assert one.keys() == other.keys() and len(one) > 50
    for name in one:
        assert torch.equal(one[name], other[name]), name
    one, other = (runs.load_run(home / name).record for name in ("whole", "killed"))
    assert one.images == 80 and (one.weights, one.samples) == (other.weights, other.samples)
    left = {path.name for path in (home / "killed").iterdir()}
    assert left == {"log.jsonl", "run.json", "samples.png", train.STATE, ".lock", *one.weights}


STUCK = """
from safetensors.torch import save_file
def stuck(tensors, path, about):
    save_file(tensors, path, about)
    if '"step": 6' in about["about"]:
        print("writing", flush=True)
        time.sleep(300)
import time
train.save_file = stuck
"""


def test_killed_while_it_writes_the_state_the_last_one_counts(home):
    code = script(home / "out").replace("train.train", STUCK + "train.train")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert any("writing" in line for line in process.stdout)
    process.kill()
    process.wait()
    left = [path for path in (home / "out").iterdir() if path.name.startswith(files.PARTIAL)]
    assert len(left) == 1 and _about(home / "out")["step"] == 3
    assert [images for images, _, _ in log_of(home / "out")] == [4, 8, 12, 16, 20, 24]
    whole = train.train(RUN, home / "whole", "cpu", grid=(1, 1))
    resumed = train.train(RUN, home / "out", "cpu", grid=(1, 1))
    assert log_of(resumed) == log_of(whole) and not left[0].exists()
    assert runs.load_run(resumed).record.weights == runs.load_run(whole).record.weights


def test_a_resumed_run_names_all_code_and_machines_that_trained_it(home, monkeypatch):
    folder = home / "out"

    def images_to(images):
        train.train(change(RUN, images=images), folder, "cpu", grid=(1, 1))
        return runs.load_run(folder).record

    first = images_to(16)
    assert first.earlier == () and images_to(24).earlier == ()  # resumed by the same code on the same machine
    monkeypatch.setattr(train.provenance, "code_version", lambda _: "0123456789abcdef")
    second = images_to(32)
    assert (second.code, len(second.earlier), second.earlier[0].code) == ("0123456789abcdef", 1, first.code)
    monkeypatch.setattr(evaluate, "device_name", lambda _: "another machine")
    third = images_to(40)
    assert [session.first_image for session in third.earlier] == [0, 24]
    assert [session.device for session in third.earlier] == ["cpu", "cpu"]
    assert third.device == "another machine"


@pytest.mark.parametrize("lost", ["record", "samples"])
def test_killed_between_state_and_record_the_record_is_made_up_for(home, lost):
    folder = train.train(RUN, home / "out", "cpu", grid=(1, 1))
    whole = runs.load_run(folder).record
    if lost == "record":
        (folder / "run.json").unlink()
    else:
        runs.write_record(folder, dataclasses.replace(whole, samples=None))
    again = runs.load_run(train.train(RUN, folder, "cpu", grid=(1, 1))).record
    assert (again.weights, again.samples, again.images) == (whole.weights, whole.samples, 48)


class Means(torch.nn.Module):
    """Features that cost nothing: the mean colour."""

    name, title, dimension = "efficientnet_lite0", "FD (EfficientNet-Lite0)", 3

    def forward(self, images):
        return images.float().mean((2, 3))


def measured(folder):
    return [
        (line["images"], line["name"], line["value"]) for line in files.read_lines(folder / "metrics.jsonl")
    ]


EVALUATED = dataclasses.replace(RUN, data=Data("drawn", holdout=3), evaluate=Evaluate(at=(18, 48), samples=4))


def test_an_evaluation_that_fails_loses_nothing_and_is_recorded_once(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    whole = train.train(EVALUATED, home / "whole", "cpu", grid=(1, 1))
    measure = evaluate.evaluate

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", fails)
    with pytest.raises(KeyboardInterrupt):
        train.train(EVALUATED, home / "out", "cpu", grid=(1, 1))
    monkeypatch.setattr(evaluate, "evaluate", measure)
    assert _about(home / "out")["step"] == 5 and not (home / "out" / "run.json").exists()
    # as if it had been killed between two lines
    files.append_line(home / "out" / "metrics.jsonl", files.read_lines(whole / "metrics.jsonl")[0])
    resumed = train.train(EVALUATED, home / "out", "cpu", grid=(1, 1))
    assert measured(resumed) == measured(whole)
    assert len(measured(whole)) == len(set(measured(whole)))
    assert {images for images, _, _ in measured(whole)} == {20, 48}
    assert sum(name.startswith("nearest") for _, name, _ in measured(whole)) == 1  # at the end alone


def test_the_end_is_measured_wherever_it_is(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    run = dataclasses.replace(EVALUATED, evaluate=Evaluate(at=(18, 1000), samples=4))
    folder = train.train(run, home / "out", "cpu", grid=(1, 1))
    assert {images for images, _, _ in measured(folder)} == {20, 48}
    assert [line["images"] for line in runs.load_run(folder).distances(run.sample)] == [20, 48]


def test_a_run_stops_in_time_measured_and_goes_on(home, monkeypatch, capsys):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    whole = train.train(EVALUATED, home / "whole", "cpu", grid=(1, 1), minutes=60)
    assert "stopped" not in capsys.readouterr().out
    stopped = train.train(EVALUATED, home / "out", "cpu", grid=(1, 1), minutes=1e-9)
    assert "stopped in time at 4 images" in capsys.readouterr().out
    assert runs.load_run(stopped).record.images == _about(stopped)["step"] * 4 == 4
    names = {name.split(" ")[0] for images, name, _ in measured(stopped) if images == 4}
    assert names == {"FD", "nearest", "loss"}
    first = train.train(EVALUATED, stopped, "cpu", grid=(1, 1), minutes=1e-9)
    assert runs.load_run(first).record.images == 8
    train.train(EVALUATED, stopped, "cpu", grid=(1, 1))
    assert [line for line in measured(stopped) if line[0] > 8] == measured(whole)
    assert runs.load_run(stopped).record.weights == runs.load_run(whole).record.weights


def test_killed_while_it_measures_at_the_time_limit_it_measures_again(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    stopped = train.train(EVALUATED, home / "stopped", "cpu", grid=(1, 1), minutes=1e-9)
    measure = evaluate.evaluate

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", fails)
    with pytest.raises(KeyboardInterrupt):
        train.train(EVALUATED, home / "out", "cpu", grid=(1, 1), minutes=1e-9)
    monkeypatch.setattr(evaluate, "evaluate", measure)
    again = train.train(EVALUATED, home / "out", "cpu", grid=(1, 1), minutes=1e-9)
    assert [line for line in measured(again) if line[0] == 4] == measured(stopped)


def test_a_run_that_stopped_may_be_declared_finished_and_no_other_record_changes(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    out = train.train(EVALUATED, home / "out", "cpu", grid=(1, 1), minutes=1e-9)
    seen = runs.load_run(out).record.images
    assert not runs.load_run(out).finished
    shorter = change(EVALUATED, images=seen)
    assert not train.is_trained(shorter, out)  # so `train-all` declares it too
    train.train(shorter, out, "cpu", grid=(1, 1))
    assert runs.load_run(out).finished and runs.load_run(out).config.train.images == seen
    assert train.is_trained(shorter, out)
    monkeypatch.setattr(train.Trainer, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a longer one that fails at once
        train.train(EVALUATED, out, "cpu", grid=(1, 1))
    assert runs.load_run(out).finished


def test_a_record_made_up_for_keeps_what_was_measured(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    folder = train.train(EVALUATED, home / "out", "cpu", grid=(1, 1))
    before = measured(folder)
    (folder / "run.json").unlink()
    later = dataclasses.replace(EVALUATED, evaluate=Evaluate(samples=4))  # not at the end any more
    assert measured(train.train(later, folder, "cpu", grid=(1, 1))) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    "classes, changes", [(0, {}), (2, {}), (2, {"micro_batch": 2, "also_ema_halflife_images": (5.0,)})]
)
def test_a_captured_step_is_the_step(classes, changes):
    run = dataclasses.replace(
        change(RUN, cuda_graphs=True, batch=8, warmup_images=80, precision="bf16", **changes),
        model=dataclasses.replace(UNET, dropout=0.2),
        data=Data("drawn", classes=classes),
    )
    if classes:
        run = change(run, label_drop=0.3)
    place, states = train.find_place("cuda"), []
    y = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda() * 2 - 1
    labels = (torch.arange(8) % 2).cuda() if classes else None
    for graphs in (True, False):
        trainer = train.Trainer(change(run, cuda_graphs=graphs), place)
        generator = torch.Generator("cuda")
        losses = [
            float(trainer.train_step(y, labels, train.draw(run, step, place, generator))) for step in range(9)
        ]
        assert (trainer.captured is not None and trainer.captured.graph is not None) == graphs
        optimizer = [v for state in trainer.optimizer.state.values() for v in state.values()]
        averages = [tensor for average in trainer.averages.values() for tensor in average]
        states.append([losses, *trainer.parameters, *averages, *optimizer])
    assert states[0][0] == states[1][0]
    assert all(torch.equal(a, b) for a, b in zip(states[0][1:], states[1][1:], strict=True))


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_a_time_limit_must_be_positive(home, minutes):
    with pytest.raises(ReproError, match="give a number above 0"):
        train.train(RUN, home / "out", "cpu", minutes=minutes)
    assert not (home / "out").exists()


def test_held_out_images_are_as_hard_as_the_same_images_trained_on(home):
    real = data.load("drawn")
    trainer = train.Trainer(dataclasses.replace(RUN, parameterization="x0"), CPU)
    rows = np.array([1, 4, 6])
    same = train.held_out_loss(trainer, real, rows, rows)
    assert [line["name"] for line in same] == ["loss on held-out images", "loss on training images"]
    assert same[0]["value"] == same[1]["value"] > 0 and same[0]["count"] == 3
    other = train.held_out_loss(trainer, real, np.array([0, 2, 3, 5]), rows)
    assert other[0]["value"] == same[0]["value"] != other[1]["value"] and other[1]["count"] == 3
    every_other = train.held_out_loss(trainer, real, np.array([1, 0, 4, 0, 6, 0]), rows)
    assert every_other[1]["value"] == same[0]["value"]  # the images compared are spread over all
    assert train.held_out_loss(trainer, real, rows, np.array([], int)) == []


def torchrun(number, *arguments):
    """`number` processes joined by gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(provenance.ROOT)}
    environment["PYTHONFAULTHANDLER"] = "1"  # tells where Python is when a library aborts
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-10_000:]


@pytest.mark.parametrize("changes", ["", ", micro_batch=1"], ids=["at once", "one by one"])
def test_two_processes_train_what_one_does(home, changes):
    """Same data, noise and levels. Sums differ in their order: what is learned differs by 2e-6 of itself."""
    (home / "two.py").write_text(script(home / "two", changes=f"images=40{changes}"))
    torchrun(2, home / "two.py")
    train.train(change(RUN, images=40), home / "one", "cpu", grid=(1, 1))
    one, two = (runs.load_run(home / out) for out in ("one", "two"))
    assert (one.record.processes, two.record.processes) == (1, 2)
    start = train.Trainer(RUN, CPU).net.state_dict()
    states = [load_file(home / out / train.STATE) for out in ("one", "two")]
    for kind in ("net", "ema"):
        alone, both = (
            torch.cat([(state[f"{kind}.{name}"] - start[name]).flatten() for name in start])
            for state in states
        )
        assert (alone - both).norm() < 1e-4 * alone.norm()
    for seen, wanted in zip(log_of(home / "two"), log_of(home / "one"), strict=True):
        assert seen == pytest.approx(wanted, rel=1e-5)


def test_two_processes_sample_what_one_does(home):
    one = train.train(change(RUN, images=40), home / "one", "cpu", grid=(1, 1))
    torchrun(2, "-m", "repro", "sample", one, "--seeds", "3", "8", "--out", home / "drawn")
    pictures = [np.asarray(Image.open(home / "drawn" / f"{seed}.png")) for seed in range(3, 8)]
    np.testing.assert_array_equal(pictures, runs.load_run(one).draw(range(3, 8)))


LOST = """
import os, pathlib, signal
step_of, mark = train.Trainer.train_step, pathlib.Path({mark!r})

def step_or_die(self, *given):
    if self.place.rank == 1 and self.step == 4 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(self, *given)

train.Trainer.train_step = step_or_die
"""


def dies_once(home):
    """The mark left by lost.py, written here, which trains as `script` does, but that a process of it is
    killed in its fifth step, once. Each process that starts it leaves a file of its own too."""
    code, mark = script(home / "two", changes="images=40"), home / "killed"
    begin, train_it = code.rsplit("train.train(", 1)
    start = f"import os, pathlib; pathlib.Path({str(home)!r}, f'start-{{os.getpid()}}').touch()\n"
    (home / "lost.py").write_text(f"{start}{begin}{LOST.format(mark=str(mark))}train.train({train_it}")
    return mark


def test_where_a_process_is_lost_all_end_and_started_again_miss_nothing(home):
    """Killed in the fifth step; the same command then goes on from the last state, after the third."""
    mark = dies_once(home)
    with pytest.raises(AssertionError, match="SIGKILL"):
        torchrun(2, home / "lost.py")
    assert mark.exists() and log_of(home / "two")[-1][0] < 40
    torchrun(2, home / "lost.py")
    train.train(change(RUN, images=40), home / "one", "cpu", grid=(1, 1))
    one, two = (runs.load_run(home / out) for out in ("one", "two"))
    assert two.record.images == 40 and two.record.processes == 2 and two.finished
    for seen, wanted in zip(log_of(home / "two"), log_of(home / "one"), strict=True):
        assert seen == pytest.approx(wanted, rel=1e-5)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


SRUN = """#!{python}
import os, subprocess, sys
given = sys.argv[2 : sys.argv.index("repro") - 1]  # between python and -m repro
at = given.index("--rdzv-endpoint") + 1
given[at] = given[at].replace(":29500", ":{port}")
command = [sys.executable, *given, "--local-addr", "127.0.0.1", "lost.py"]
os.environ["OMP_NUM_THREADS"] = "1"
said = [open(f"node{{number}}.txt", "w") for number in (0, 1)]
nodes = [subprocess.Popen(command, stdout=file, stderr=file) for file in said]
sys.exit(max(abs(node.wait()) for node in nodes))
"""


def test_where_a_node_loses_its_process_torchrun_starts_both_nodes_anew(home):
    """README's script, with two agents of one host for its two nodes, and lost.py for what it trains. Without
    one of its variables this failed. A process of four is killed in the fifth step; all go on from the state
    of the third."""
    mark = dies_once(home)
    srun = SRUN.format(python=sys.executable, port=free_port())
    cluster.write_job(home, scontrol="#!/bin/bash\necho 127.0.0.1\n", srun=srun)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2"}
    paths = {"PATH": f"{home}:{os.environ['PATH']}", "PYTHONPATH": str(provenance.ROOT)}
    environment = {**os.environ, **slurm, **paths}
    job = subprocess.Popen(["bash", "job.sh"], cwd=home, env=environment, start_new_session=True)
    try:
        ended = job.wait(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGTERM)  # agents then end their processes; nothing where all ended
    assert ended == 0, [(home / f"node{number}.txt").read_text()[-3000:] for number in (0, 1)]
    assert mark.exists() and len(list(home.glob("start-*"))) == 8
    train.train(change(RUN, images=40), home / "one", "cpu", grid=(1, 1))
    one, two = (runs.load_run(home / out) for out in ("one", "two"))
    assert two.record.images == 40 and two.record.processes == 4 and two.finished
    for seen, wanted in zip(log_of(home / "two"), log_of(home / "one"), strict=True):
        assert seen == pytest.approx(wanted, rel=1e-5)


UGD = config.Weight("ugd", bins=3, every_images=8, probe_images=2)
OTHERWISE = f"dataclasses.replace(RUN, weight=train.config.{UGD!r}, parameterization='x0')"


@pytest.mark.parametrize("predicts, ridge", [("x0", None), ("v", None), ("x0", 0.1)])
def test_a_weight_that_follows_from_gradients_is_that_of_theorem_1(home, predicts, ridge):
    """In the first step, by gradients taken one by one; then anew after every 8 images, in the log."""
    weight = dataclasses.replace(UGD, ridge=ridge)
    run = dataclasses.replace(change(RUN, images=16), weight=weight, parameterization=predicts)
    trainer = train.Trainer(run, CPU)
    real = data.load("drawn")
    y, labels = train.Batches(real, np.arange(10), run.train, CPU).fetch(0)
    trainer.balance(y, labels)
    generator = torch.Generator().manual_seed(train.seed_of(run.train.seed, "balance", 0))
    noise, uniform = torch.randn(2, 3, 64, 64, generator=generator), torch.rand(2, generator=generator)
    D, rows = trainer.denoiser, []
    for level in range(3):
        sigma = D.schedule.draw((level + uniform.double()) / 3)
        x = y[:2] + sigma.float()[:, None, None, None] * noise
        loss = (D(x, sigma) - y[:2]).square().mean()  # in x0, whatever the network predicts
        found = torch.autograd.grad(loss, list(trainer.net.parameters()), allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in found if g is not None]))
    wanted = 3 * pareto.ridged(pareto.gram(torch.stack(rows)), ridge or 0.0).weights
    torch.testing.assert_close(trainer.weight.values, wanted, rtol=1e-3, atol=1e-4)
    assert float(trainer.weight.values.mean()) == pytest.approx(1) and trainer.net.training
    log = files.read_lines(train.train(run, home / "out", "cpu", grid=(1, 1)) / "log.jsonl")
    weights = [line["weights"] for line in log]  # after 4, 8, 12 and 16 images
    np.testing.assert_allclose(weights[0], wanted, rtol=1e-3, atol=1e-4)
    assert weights[0] == weights[1] and weights[2] == weights[3]
    assert predicts == "v" or weights[1] != weights[2]  # of v, the level of least noise has all, twice


def test_such_a_weight_is_resumed_and_the_same_on_two_processes(home):
    code = script(home / "two", changes="images=24").replace("change(RUN,", f"change({OTHERWISE},")
    assert "ugd" in code
    (home / "two.py").write_text(code)
    torchrun(2, home / "two.py")
    run = change(dataclasses.replace(RUN, weight=UGD, parameterization="x0"), images=24)
    one = train.train(run, home / "one", "cpu", grid=(1, 1))
    for seen, wanted in zip(
        files.read_lines(home / "two" / "log.jsonl"), files.read_lines(one / "log.jsonl"), strict=True
    ):
        np.testing.assert_allclose(seen["weights"], wanted["weights"], rtol=1e-3, atol=1e-4)
        assert seen["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    # stopped between two computations of the weights, it goes on with those that it had
    parts = train.train(change(run, images=12, state_every_images=12), home / "parts", "cpu", grid=(1, 1))
    train.train(run, parts, "cpu", grid=(1, 1))
    assert log_of(parts) == log_of(one)
    weights = [
        [line["weights"] for line in files.read_lines(folder / "log.jsonl")] for folder in (parts, one)
    ]
    assert weights[0] == weights[1]


def test_a_weight_that_cannot_be_computed_is_refused():
    few = dataclasses.replace(RUN, weight=dataclasses.replace(UGD, probe_images=5))
    with pytest.raises(ReproError, match="weight.probe_images is 5, more than the 4 images that a process"):
        train.Trainer(few, CPU)
    for weight, message in (
        (dataclasses.replace(UGD, bins=None), "the weight 'ugd' needs bins"),
        (dataclasses.replace(UGD, gamma=5.0), "has no gamma, k or min_snr_factor"),
        (config.Weight("snr", bins=3), "the weight 'snr' has no bins; leave it out"),
        (config.Weight("snr", ridge=1.0), "the weight 'snr' has no ridge; leave it out"),
        (dataclasses.replace(UGD, ridge=-1.0), "ridge of the weight 'ugd' must be positive and finite"),
    ):
        with pytest.raises(ReproError, match=message):
            train.Trainer(dataclasses.replace(RUN, weight=weight), CPU)


GRADIENTS = """
import torch
from repro import train
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
conv = torch.nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
unused = torch.nn.Parameter(torch.ones(3))
mean = train.GradientMean([*conv.parameters(), unused])
for step in range(2):
    conv.zero_grad(set_to_none=True)
    torch.manual_seed(step)
    gradients = [torch.randn(2, *p.shape) for p in conv.parameters()]
    for p, gradient in zip(conv.parameters(), gradients):
        p.grad = torch.empty_like(p).copy_(gradient[rank])
    mean()
    for p, gradient in zip(conv.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient.mean(0))
        assert p.grad.stride() == p.stride()
    assert unused.grad is None
torch.distributed.destroy_process_group()
"""


def test_gradients_are_averaged_over_processes(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    torchrun(2, tmp_path / "gradients.py")


SHRUNK = {
    "name", "note", "data.name", "data.classes", "model.channels", "model.multipliers", "model.blocks",
    "model.attention", "model.head_channels", "train.images", "train.batch", "train.micro_batch",
    "train.compile", "train.log_every_images", "sample.steps", "evaluate.at",
}  # fmt: skip
"""What the first steps below change of the paper's preset: the network's size, the data, and lengths. All
that remains is the paper's: schedule, target, weight, factor, Adam, warm-up, average, dropout, bfloat16."""


def test_the_first_steps_of_the_papers_edm_on_two_processes_by_micro_batches(tmp_path, monkeypatch):
    prepared(tmp_path, classes=2, count=6)
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    shrunk = """
        --data.name drawn --data.classes 2 --model.channels 32 --model.multipliers 1 1 1 --model.blocks 1
        --model.attention 16 --model.head-channels 32 --train.images 24 --train.batch 8 --train.micro-batch 2
        --train.no-compile --train.log-every-images 8 --sample.steps 2 --evaluate.at --device cpu
    """.split()
    name = "paper/imagenet64-edm-minsnr"
    torchrun(2, "-m", "repro", "train", name, "--out", tmp_path / "first", *shrunk)
    run, preset = runs.load_run(tmp_path / "first"), presets.preset(name)
    assert set(runs.differences(run.config, preset)) == SHRUNK
    assert (run.record.images, run.record.processes) == (24, 2)
    assert [rate for _, _, rate in log_of(run.path)] == pytest.approx([8e-11, 16e-11, 24e-11])  # of 1e-4

    # before it learns the network predicts 0: the loss is that of its target, times the factor
    numbers = train.draw(run.config, 0, CPU, torch.Generator())
    y, _ = train.Batches(data.load("drawn"), np.arange(12), run.config.train, CPU).fetch(0)
    sigma = schedules.from_config(preset.schedule).draw(numbers.uniform)
    on_y, on_noise = (c[:, None, None, None] for c in denoiser.edm(0.5).target(sigma))
    errors = (on_y * y + on_noise * numbers.noise).square().mean((1, 2, 3))
    wanted = (errors * (5 * sigma**2).clamp(max=1)).mean()
    assert log_of(run.path)[0][1] == pytest.approx(float(wanted), rel=1e-5)
    # and a step at most as large as Adam's first
    moved = load_file(run.path / train.STATE)["net.conv_out.weight"].abs().max()
    assert 0 < moved <= 1.01e-4 * (8 + 16 + 24) / 10**7


# What a step does -----------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_for_any_batch_and_number_of_processes(home):
    real = data.load("drawn")
    indices = np.array([0, 2, 3, 5, 7, 8, 9])
    batches = train.Batches(real, indices, dataclasses.replace(TRAIN, batch=4), CPU)
    order = np.concatenate([batches.rows(step) for step in range(7)])
    for epoch in order.reshape(4, 7):
        assert sorted(epoch) == list(indices)
    assert not np.array_equal(order[:7], order[7:14])
    halves = [
        train.Batches(real, indices, TRAIN, train.Place(rank, 2, torch.device("cpu"))) for rank in (0, 1)
    ]
    for step in (0, 3):
        both = torch.cat([half.fetch(step)[0] for half in halves])
        assert torch.equal(both, batches.fetch(step)[0])


def test_the_numbers_of_a_step_are_shared_out_among_processes():
    generator = torch.Generator()
    whole = train.draw(RUN, 5, CPU, generator)
    shares = [train.draw(RUN, 5, train.Place(rank, 2, torch.device("cpu")), generator) for rank in (0, 1)]
    for name in ("uniform", "noise", "flip", "drop"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    assert not torch.equal(train.draw(RUN, 6, CPU, generator).noise, whole.noise)


def test_flips_and_dropped_labels_come_at_their_rates():
    run = dataclasses.replace(RUN, data=Data("drawn", classes=2))
    run = change(run, batch=1000, label_drop=0.15)
    draws = [train.draw(run, step, CPU, torch.Generator()) for step in range(10)]
    flips, drops = (
        torch.cat([getattr(one, name) for one in draws]).float().mean() for name in ("flip", "drop")
    )
    assert abs(flips - 0.5) < 0.02 and abs(drops - 0.15) < 0.015


def test_flipped_images_and_null_labels_reach_the_network(home, monkeypatch):
    run = change(dataclasses.replace(RUN, data=Data("drawn", classes=2)), label_drop=0.5)
    trainer = train.Trainer(run, CPU)
    seen = {}

    def loss(denoiser, y, noise, uniform, labels):
        seen.update(y=y, labels=labels)
        return (next(trainer.net.parameters()).sum() + y.sum() * 0).expand(4)

    monkeypatch.setattr(trainer, "loss", loss)
    y, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    numbers = train.draw(run, 0, CPU, torch.Generator())
    numbers.flip, numbers.drop = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 0, 1, 1]).bool()
    trainer.train_step(y, labels, numbers)
    assert torch.equal(seen["y"], torch.stack([y[0].flip(2), y[1], y[2].flip(2), y[3]]))
    assert seen["labels"].tolist() == [0, 1, 2, 2]


def test_warm_up_is_linear_then_constant():
    rates = [train.learning_rate(TRAIN, images) for images in (0, 4, 8, 16, 1000)]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 1e-3, 1e-3])
    assert train.learning_rate(dataclasses.replace(TRAIN, warmup_images=0), 0) == 1e-3


def test_half_of_the_average_is_younger_than_the_halflife():
    steady = dataclasses.replace(TRAIN, ema_halflife_images=400, ema_rampup=None)
    assert train.ema_decay(steady, 10**6) ** (400 / 4) == pytest.approx(0.5)
    early = dataclasses.replace(TRAIN, ema_halflife_images=400, ema_rampup=0.05)
    assert train.ema_decay(early, 2000) ** (100 / 4) == pytest.approx(0.5)  # 5% of 2000
    assert train.ema_decay(early, 10**6) == train.ema_decay(steady, 10**6)


def test_the_average_is_the_recursion_written_out(home):
    trainer = train.Trainer(change(RUN, ema_rampup=None), CPU)
    batches = train.Batches(data.load("drawn"), np.arange(10), TRAIN, CPU)
    expected = [p.detach().double().clone() for p in trainer.parameters]
    for step in range(3):
        trainer.train_step(*batches.fetch(step), train.draw(RUN, step, CPU, torch.Generator()))
        decay = 0.5 ** (4 / 20)
        expected = [
            decay * e + (1 - decay) * p.detach() for e, p in zip(expected, trainer.parameters, strict=True)
        ]
    for e, p in zip(expected, trainer.ema_parameters, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 1e-3, 1e9])
def test_the_log_tells_how_large_gradients_are_and_how_many_are_clipped(home, clip):
    run = change(
        RUN, grad_clip=clip, images=8, warmup_images=0, lr=1e-30, weight_decay=0.0, log_every_images=8
    )
    trainer = train.Trainer(run, CPU)
    batches = train.Batches(data.load("drawn"), np.arange(10), run.train, CPU)
    norms = []
    for step in range(2):  # the weights do not move
        y, _ = batches.fetch(step)
        numbers = train.draw(run, step, CPU, torch.Generator())
        y = torch.where(numbers.flip[:, None, None, None], y.flip(3), y)
        loss = trainer.loss(trainer.denoiser, y, numbers.noise, numbers.uniform, None).mean()
        gradients = torch.autograd.grad(loss, trainer.parameters, allow_unused=True)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None)))
    folder = train.train(run, home / "run", "cpu", grid=(1, 1))
    (line,) = files.read_lines(folder / "log.jsonl")
    assert line["gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert line["clipped"] == (clip == 1e-3)


STEADY = change(EVALUATED, ema_rampup=None)
"""Without the ramp-up, by which both averages below would have the same half-life all along."""


def with_two_averages(**changes):
    """A run with averages of half-lives 20 and 5, on images of which some are held out."""
    return change(STEADY, also_ema_halflife_images=(5.0,), **changes)


@pytest.mark.parametrize("rampup", [None, 1.0])
def test_each_of_two_averages_is_its_recursion_written_out(home, rampup):
    run = with_two_averages(ema_rampup=rampup)
    trainer = train.Trainer(run, CPU)
    batches = train.Batches(data.load("drawn"), np.arange(10), run.train, CPU)
    start = [p.detach().double().clone() for p in trainer.parameters]
    expected = {20: start, 5: start}
    for step in range(3):
        trainer.train_step(*batches.fetch(step), train.draw(run, step, CPU, torch.Generator()))
        for halflife, average in expected.items():
            effective = halflife if rampup is None else min(halflife, rampup * 4 * (step + 1))
            decay = 0.5 ** (4 / effective)
            expected[halflife] = [
                decay * e + (1 - decay) * p.detach() for e, p in zip(average, trainer.parameters, strict=True)
            ]
    assert list(trainer.averages) == [20, 5]
    for halflife, average in expected.items():
        for e, p in zip(average, trainer.averages[halflife], strict=True):
            torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-7)
    apart = torch.cat([(a - b).flatten() for a, b in zip(expected[20], expected[5], strict=True)])
    assert apart.abs().max() > 1e-4  # else one could stand for the other


def test_within_a_block_the_network_has_another_average_and_then_its_own_again(home):
    run = with_two_averages()
    trainer = train.Trainer(run, CPU)
    batches = train.Batches(data.load("drawn"), np.arange(10), run.train, CPU)
    trainer.train_step(*batches.fetch(0), train.draw(run, 0, CPU, torch.Generator()))
    main, other = ([p.clone() for p in trainer.averages[halflife]] for halflife in (20.0, 5.0))

    def is_now(average):
        return all(torch.equal(a, b) for a, b in zip(trainer.ema.parameters(), average, strict=True))

    with pytest.raises(KeyboardInterrupt), trainer.averaged(5.0):
        assert is_now(other) and not is_now(main)
        raise KeyboardInterrupt
    assert is_now(main)


def test_two_averages_are_measured_recorded_and_resumed_beside_a_run_that_is_else_the_same(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    alone = runs.load_run(train.train(STEADY, home / "alone", "cpu", grid=(1, 1)))
    whole = runs.load_run(train.train(with_two_averages(), home / "whole", "cpu", grid=(1, 1)))
    parts = train.train(with_two_averages(images=24), home / "parts", "cpu", grid=(1, 1))
    parts = runs.load_run(train.train(with_two_averages(), parts, "cpu", grid=(1, 1)))

    # the main average does not know of the other
    how, further = whole.config.sample, [line for line in whole.metrics if "ema_halflife_images" in line]
    assert whole.curve(how) == whole.curve(how, ema=20.0) == alone.curve(how)
    main = [(m["name"], m["value"]) for m in whole.metrics if m not in further]
    assert main == [(m["name"], m["value"]) for m in alone.metrics]
    main_files = {name for name in whole.record.weights if "ema" not in name}
    assert main_files == set(alone.record.weights)
    assert all(torch.equal(whole.weights()[name], tensor) for name, tensor in alone.weights().items())
    # one without further averages writes what it always wrote
    assert not any("ema_halflife_images" in line for line in alone.metrics)
    state = load_file(alone.path / train.STATE)
    assert {name.split(".")[0] for name in state} == {"net", "optimizer", "ema"}

    # the other is measured at the same times, with the same seeds, and recorded
    assert [line["ema_halflife_images"] for line in further] == [5, 5]
    assert further == whole.distances(how, ema=5.0)
    for ours, mains in zip(further, whole.distances(how), strict=True):
        same = ("images", "samples", "first_seed", "sample", "features", "evaluations")
        assert {key: ours[key] for key in same} == {key: mains[key] for key in same}
        assert ours["value"] != mains["value"]
    state = load_file(whole.path / train.STATE)
    assert {name.split(".")[0] for name in state} == {"net", "optimizer", "ema", "ema5"}
    for halflife, prefix in ((None, "ema"), (20.0, "ema"), (5.0, "ema5")):
        for name, tensor in whole.weights(halflife).items():
            assert torch.equal(tensor, state[f"{prefix}.{name}"].half().float())
    assert set(whole.record.weights) - main_files == {"weights-ema5-00001-of-00001.safetensors"}
    with pytest.raises(ReproError, match="no average with a half-life of 7 images; it keeps those of 20, 5"):
        whole.weights(7.0)

    # resumed, both go on bit for bit
    resumed = load_file(parts.path / train.STATE)
    assert state.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in state.items())
    assert parts.curve(how, ema=5.0)[1][-1] == whole.curve(how, ema=5.0)[1][-1]
    assert set(parts.record.weights) == set(whole.record.weights)  # other headers: fewer images were planned
    assert {path.name for path in parts.path.glob("weights-*")} == set(whole.record.weights)

    # damage to its file is named, and leaves the main average readable
    path = whole.path / "weights-ema5-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReproError, match=f"{path.name} is damaged"):
        whole.denoiser(ema=5.0)
    whole.denoiser()


def test_a_run_that_keeps_no_weights_keeps_none_of_any_average(home):
    run = change(dataclasses.replace(RUN, record_weights=False), also_ema_halflife_images=(5.0, 6.5))
    folder = train.train(run, home / "out", "cpu", grid=(1, 1))
    assert runs.load_run(folder).record.weights == {} and not list(folder.glob("weights-*"))
    with pytest.raises(ReproError, match="recorded without weights"):
        runs.load_run(folder).weights(6.5)


def test_a_state_from_before_an_option_goes_on_and_a_further_average_is_named(tmp_path):
    train.Trainer(RUN, CPU, "f").save_state(tmp_path)
    about = _about(tmp_path)
    for name in ("micro_batch", "also_ema_halflife_images"):
        del about["config"]["train"][name]
    del about["config"]["min_snr_factor"]
    state = load_file(tmp_path / train.STATE)
    save_file(state, tmp_path / train.STATE, {"about": json.dumps(about)})
    train.Trainer(RUN, CPU, "f").load_state(tmp_path)
    further = change(RUN, also_ema_halflife_images=(5.0,))
    for run, name in (
        (further, "train.also_ema_halflife_images"),
        (dataclasses.replace(RUN, min_snr_factor=5.0), "min_snr_factor"),
    ):
        with pytest.raises(ReproError, match=rf"saved with other settings \({name}\)"):
            train.Trainer(run, CPU, "f").load_state(tmp_path)


LABELLED = change(
    dataclasses.replace(RUN, data=Data("drawn", classes=2), model=dataclasses.replace(UNET, dropout=0.0)),
    label_drop=0.3, grad_clip=None, also_ema_halflife_images=(5.0,),
)  # fmt: skip


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_by_micro_batches_is_the_step(micro_batch, monkeypatch):
    """Same numbers for each image; only sums differ in their order."""
    y, labels = (
        torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 1, 0]),
    )
    trainers = [train.Trainer(run, CPU) for run in (LABELLED, change(LABELLED, micro_batch=micro_batch))]
    sizes, loss_of = [], train.Trainer.loss

    def loss(self, denoiser, y, *others):
        sizes.append((self.at_once, len(y)))
        return loss_of(self, denoiser, y, *others)

    monkeypatch.setattr(train.Trainer, "loss", loss)
    for step in range(3):
        losses = [
            trainer.train_step(y, labels, train.draw(LABELLED, step, CPU, torch.Generator()))
            for trainer in trainers
        ]
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
        if step == 0:  # later steps start at other weights: Adam divides by small numbers
            gradients = [torch.cat([p.grad.flatten() for p in trainer.parameters]) for trainer in trainers]
            assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()
    assert sizes == 3 * [(4, 4), *(4 // micro_batch) * [(micro_batch, micro_batch)]]
    start = train.Trainer(LABELLED, CPU).parameters
    for halflife in (None, 20.0, 5.0):
        alone, parted = (
            torch.cat([
                (p - s).flatten().detach()
                for p, s in zip(t.averages[halflife] if halflife else t.parameters, start, strict=True)
            ])
            for t in trainers
        )  # fmt: skip
        assert (alone - parted).norm() < 1e-4 * alone.norm()


def test_gradients_are_averaged_once_a_step_whatever_the_micro_batch(home):
    run = change(RUN, micro_batch=1)
    trainer, calls = train.Trainer(run, train.Place(1, 2, torch.device("cpu"))), []
    assert isinstance(trainer.average_gradients, train.GradientMean)
    trainer.average_gradients = lambda: calls.append([p.grad.clone() for p in trainer.parameters])
    numbers = train.draw(run, 0, trainer.place, torch.Generator())
    trainer.train_step(torch.zeros(2, 3, 64, 64), None, numbers)
    assert len(calls) == 1


@pytest.mark.parametrize("world, micro_batch, share", [(1, 3, 4), (2, 4, 2), (1, 8, 4)])
def test_a_micro_batch_must_divide_a_processes_share(world, micro_batch, share):
    with pytest.raises(
        ReproError, match=f"train.micro_batch is {micro_batch}, .* choose a divisor of {share}"
    ):
        train.Trainer(change(RUN, micro_batch=micro_batch), train.Place(0, world, torch.device("cpu")))


def test_before_it_learns_the_loss_of_edm_is_what_theory_says():
    """On data of variance sigma_data^2 the first loss is 1 at every sigma. With the factor it is the mean of
    min(1, gamma sigma^2), for normal ln sigma: P(sigma > a) + gamma E[sigma^2; sigma < a], a = gamma^(-1/2).
    """
    y, noise = (
        torch.tensor(signs, dtype=torch.float32).view(1, 1, 2, 2).tile(400, 3, 8, 8)
        for signs in ([0.5, 0.5, -0.5, -0.5], [1, -1, 1, -1])
    )
    uniform, edm = (torch.arange(400) + 0.5) / 400, config.Schedule("edm")
    for gamma in (None, 1.0, 5.0, 20.0):
        run = dataclasses.replace(
            RUN, data=Data("drawn", resolution=16), model=UNET, schedule=edm, parameterization="edm",
            weight=config.Weight("edm"), min_snr_factor=gamma,
        )  # fmt: skip
        trainer = train.Trainer(run, CPU)
        with torch.no_grad():
            losses = [
                trainer.loss(trainer.denoiser, y[some], noise[some], uniform[some], None)
                for some in torch.arange(400).split(50)
            ]
        wanted = 1.0
        if gamma is not None:
            mean, std, end = edm.P_mean, edm.P_std, -math.log(gamma) / 2
            below = stats.norm.cdf((end - mean - 2 * std**2) / std) * math.exp(2 * mean + 2 * std**2)
            wanted = stats.norm.sf((end - mean) / std) + gamma * below
        assert float(torch.cat(losses).mean()) == pytest.approx(wanted, rel=1e-6 if gamma is None else 2e-4)


def test_gradients_are_clipped(home):
    trainer = train.Trainer(change(RUN, grad_clip=1e-3), CPU)
    batches = train.Batches(data.load("drawn"), np.arange(10), TRAIN, CPU)
    trainer.train_step(*batches.fetch(0), train.draw(RUN, 0, CPU, torch.Generator()))
    norm = torch.stack([p.grad.norm() for p in trainer.parameters]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_it_learns_a_single_image(tmp_path, monkeypatch):
    prepared(tmp_path, "grey", constant=200)
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    run = dataclasses.replace(
        RUN,
        data=Data("grey"),
        parameterization="x0",
        weight=config.Weight("constant"),
        sample=Sample(steps=5),
    )
    run = change(run, images=1200, warmup_images=0, lr=3e-3, log_every_images=100, state_every_images=1200)
    folder = train.train(run, tmp_path / "out", "cpu", grid=(1, 2))
    losses = [loss for _, loss, _ in log_of(folder)]
    assert losses[-1] < 0.05 * losses[0]
    assert abs(runs.load_run(folder).samples().astype(float).mean() - 200) < 15


# What is refused ------------------------------------------------------------------------------------


def test_a_data_set_that_is_not_prepared_names_the_command(home):
    run = dataclasses.replace(RUN, data=Data("celeba64"))
    with pytest.raises(ReproError, match="(?s)not prepared in .*python -m repro prepare celeba64 --source"):
        train.train(run, home / "out", "cpu")
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    "used, message",
    [
        (
            Data("drawn", resolution=32),
            r"holds images of \(3, 64, 64\), the configuration asks for \(3, 32, 32\)",
        ),
        (Data("drawn", classes=3), "has 0 classes, the configuration asks for 3"),
        (Data("drawn", holdout=10), "data.holdout is 10, but drawn has 10 images"),
    ],
)
def test_data_that_do_not_fit_are_refused(home, used, message):
    with pytest.raises(ReproError, match=message):
        train.train(dataclasses.replace(RUN, data=used), home / "out", "cpu")


def test_other_settings_or_pixels_do_not_go_on_from_a_state(home, tmp_path_factory, monkeypatch):
    folder = train.train(change(RUN, images=12), home / "out", "cpu", grid=(1, 1))
    with pytest.raises(
        ReproError, match=r"saved with other settings \(train.lr, weight.gamma\). Resume with the"
    ):
        train.train(
            dataclasses.replace(change(RUN, lr=1.0), weight=config.Weight("min_snr", gamma=1.0)),
            folder,
            "cpu",
        )
    other = tmp_path_factory.mktemp("other")
    prepared(other, constant=7)
    monkeypatch.setenv("REPRO_DATA", str(other / "data"))
    with pytest.raises(ReproError, match="trained on other pixels than the prepared drawn"):
        train.train(RUN, folder, "cpu")


@pytest.mark.parametrize(
    "name, value",
    [
        ("images", 99), ("state_every_images", 1), ("log_every_images", 1), ("compile", True),
        ("cuda_graphs", True), ("micro_batch", 2), ("recompute", True),
    ],
)  # fmt: skip
def test_lengths_and_speed_may_change_when_a_run_goes_on(tmp_path, name, value):
    train.Trainer(RUN, CPU, "f").save_state(tmp_path)
    run = change(RUN, **{name: value})
    assert run != RUN
    train.Trainer(run, CPU, "f").load_state(tmp_path)


def test_sampling_evaluation_and_note_may_change_and_all_else_is_named(tmp_path):
    train.Trainer(RUN, CPU, "f").save_state(tmp_path)
    run = dataclasses.replace(RUN, sample=Sample(steps=9), evaluate=Evaluate(at=(5,)), note="other")
    train.Trainer(run, CPU, "f").load_state(tmp_path)
    for name in ("batch", "lr", "betas", "weight_decay", "warmup_images", "ema_halflife_images",
                 "ema_rampup", "grad_clip", "seed"):  # fmt: skip
        value = (0.5, 0.5) if name == "betas" else 2
        with pytest.raises(ReproError, match=rf"saved with other settings \(train.{name}\)"):
            train.Trainer(change(RUN, **{name: value}), CPU, "f").load_state(tmp_path)


def test_a_record_without_state_is_not_overwritten(home):
    folder = train.train(change(RUN, images=4), home / "out", "cpu", grid=(1, 1))
    (folder / train.STATE).unlink()
    with pytest.raises(ReproError, match="holds a recorded run without its state; choose another --out"):
        train.train(RUN, folder, "cpu")


TWO = change(RUN, also_ema_halflife_images=(5.0,), warmup_images=16)


def test_a_run_goes_on_from_its_recorded_weights_where_its_state_is_lost(home, monkeypatch):
    """The average is the network then, in the record's float16; the optimizer begins, and warms up, anew."""
    monkeypatch.setenv("REPRO_RUNS", str(home / "recorded"))
    kept = train.train(change(TWO, images=24), home / "recorded" / TWO.name, "cpu", grid=(1, 1))
    runs.write_record(kept, dataclasses.replace(runs.read_record(kept / "run.json"), seconds=1000.0))
    recorded = runs.load_run(TWO.name)
    (kept / train.STATE).unlink()
    before = {path.name: files.sha256(path) for path in kept.iterdir()}
    longer = dataclasses.replace(TWO, name="lab/longer")
    folder = train.train(longer, home / "out", "cpu", grid=(1, 1), from_weights=TWO.name)
    assert {path.name: files.sha256(path) for path in kept.iterdir()} == before

    hand = train.Trainer(TWO, CPU)
    names = [name for name, _ in hand.net.named_parameters()]
    for halflife, average in hand.averages.items():
        for mine, name in zip(average, names, strict=True):
            mine.data.copy_(recorded.weights(halflife)[name])
    hand.net.load_state_dict(recorded.weights())
    hand.step = 6
    hand.sessions = [dataclasses.replace(recorded.record.sessions[0], first_image=24, from_run=TWO.name)]
    batches = train.Batches(data.load("drawn"), np.arange(10), TWO.train, CPU)
    rates = []
    for step in range(6, 12):
        hand.train_step(*batches.fetch(step), train.draw(TWO, step, CPU, torch.Generator()))
        rates.append(hand.rate)
    assert rates == pytest.approx([lr * 1e-3 for lr in (0.25, 0.5, 0.75, 1, 1, 1)])
    went_on = runs.load_run(folder)
    assert [line[2] for line in log_of(folder)][6:] == rates
    assert log_of(folder)[:6] == log_of(kept)
    for halflife, average in hand.averages.items():
        for mine, name in zip(average, names, strict=True):
            assert torch.equal(mine.half().float(), went_on.weights(halflife)[name])
    record = went_on.record
    assert (record.images, record.first_image, record.from_run) == (48, 24, TWO.name)
    assert record.from_weights == recorded.record.weights
    assert [(part.first_image, part.from_run) for part in record.sessions] == [(0, None), (24, TWO.name)]
    assert record.seconds >= 1000  # those before count

    # now it has a state, which says more than weights
    train.train(change(longer, images=56), folder, "cpu", grid=(1, 1), from_weights=TWO.name)
    parts = [(part.first_image, part.from_run) for part in runs.load_run(folder).record.sessions]
    assert parts == [(0, None), (24, TWO.name), (48, None)]
    assert log_of(folder)[-1][2] == 1e-3  # warm already

    (folder / train.STATE).unlink()  # lost again, on the same machine
    train.train(change(longer, images=64), folder, "cpu", grid=(1, 1), from_weights=folder)
    record = runs.load_run(folder).record
    assert (len(record.sessions), record.first_image, record.from_run) == (4, 56, "lab/longer")
    assert log_of(folder)[-1][2] == pytest.approx(0.5e-3)


def test_what_was_measured_of_recorded_weights_is_kept_and_not_measured_again(home):
    short = train.train(change(EVALUATED, images=24), home / "short", "cpu", grid=(1, 1))
    assert runs.load_run(short).metrics[-1]["images"] == 24
    lines = (short / "metrics.jsonl").read_text()
    longer = dataclasses.replace(EVALUATED, evaluate=Evaluate(at=(18, 24), samples=4))
    folder = train.train(longer, home / "out", "cpu", grid=(1, 1), from_weights=short)
    found = (folder / "metrics.jsonl").read_text()
    assert found.startswith(lines)
    assert {json.loads(line)["images"] for line in found[len(lines) :].splitlines()} == {48}


def test_recorded_weights_are_measured_where_their_record_has_not_or_otherwise(home):
    longer = dataclasses.replace(EVALUATED, evaluate=Evaluate(at=(24,), samples=4))
    unmeasured = dataclasses.replace(change(RUN, images=24), data=EVALUATED.data)
    fewer = dataclasses.replace(change(longer, images=24), evaluate=Evaluate(at=(24,), samples=3))
    for name, run in (("unmeasured", unmeasured), ("fewer", fewer)):
        short = train.train(run, home / name, "cpu", grid=(1, 1))
        before = (short / "metrics.jsonl").read_text() if (short / "metrics.jsonl").exists() else ""
        folder = train.train(longer, home / f"from-{name}", "cpu", grid=(1, 1), from_weights=short)
        found = (folder / "metrics.jsonl").read_text()
        assert found.startswith(before)
        lines = [json.loads(line) for line in found[len(before) :].splitlines()]
        assert {line["samples"] for line in lines if line["images"] == 24 and "samples" in line} == {4}


def test_two_processes_go_on_from_recorded_weights_as_one_does(home):
    short = train.train(change(RUN, images=24), home / "short", "cpu", grid=(1, 1))
    code = script(home / "two", changes="images=40")
    code = code.replace('"cpu", (1, 1))', f'"cpu", (1, 1), from_weights={str(short)!r})')
    assert "from_weights" in code
    (home / "two.py").write_text(code)
    torchrun(2, home / "two.py")
    one = train.train(change(RUN, images=40), home / "one", "cpu", grid=(1, 1), from_weights=short)
    assert runs.load_run(home / "two").record.first_image == 24
    for seen, wanted in zip(log_of(home / "two"), log_of(one), strict=True):
        assert seen == pytest.approx(wanted, rel=1e-5)


def test_the_state_of_a_training_that_is_not_recorded_yet_is_kept_with_its_log(home):
    short = train.train(change(RUN, images=24), home / "short", "cpu", grid=(1, 1))
    folder = train.train(change(RUN, images=32), home / "out", "cpu", grid=(1, 1))
    own = log_of(folder)
    (folder / "run.json").unlink()  # as if killed before the first record
    train.train(change(RUN, images=36), folder, "cpu", grid=(1, 1), from_weights=short)
    assert log_of(folder)[:8] == own and runs.load_run(folder).record.from_run is None


def test_a_weight_that_follows_from_gradients_is_computed_at_once_by_one_that_goes_on_from_weights(home):
    run = change(dataclasses.replace(RUN, weight=UGD, parameterization="x0"), images=12)  # 8 images: anew
    short = train.train(run, home / "short", "cpu", grid=(1, 1))
    folder = train.train(change(run, images=20), home / "out", "cpu", grid=(1, 1), from_weights=short)
    weights = [line["weights"] for line in files.read_lines(folder / "log.jsonl")]
    assert weights[3] != [1.0, 1.0, 1.0] and sum(weights[3]) == pytest.approx(3)  # after 16 images
    assert weights[3] != weights[2] and weights[4] != weights[3]


def test_recorded_weights_of_another_run_are_not_gone_on_from(home, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REPRO_RUNS", str(home / "recorded"))
    with pytest.raises(ReproError, match="there is no recorded run lab/tiny"):
        train.train(RUN, home / "new", "cpu", from_weights="lab/tiny")
    folder = train.train(change(RUN, images=4), home / "out", "cpu", grid=(1, 1))
    (folder / train.STATE).unlink()
    with pytest.raises(ReproError, match="or go on from its weights with --from-weights"):
        train.train(RUN, folder, "cpu")
    other = train.train(change(RUN, images=8), home / "other", "cpu", grid=(1, 1))
    with pytest.raises(ReproError, match="holds a recorded run without its state"):  # which would be lost
        train.train(RUN, folder, "cpu", from_weights=other)

    def refused(message, run=RUN):
        with pytest.raises(ReproError, match=message):
            train.train(run, home / "new", "cpu", from_weights=folder)
        assert not {path.name for path in (home / "new").glob("*")} - {".lock"}

    refused(r"was recorded with other settings \(train.lr\): its training", change(RUN, lr=1.0))
    refused("has seen 4 images, and 4 are asked for: ask for more", change(RUN, images=4))
    elsewhere = tmp_path_factory.mktemp("other")
    prepared(elsewhere, constant=7)
    monkeypatch.setenv("REPRO_DATA", str(elsewhere / "data"))
    refused("was trained on other pixels than the prepared drawn")
    weights = next(folder.glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    monkeypatch.setenv("REPRO_DATA", str(home / "data"))
    refused("is damaged: its SHA-256")
    weights.unlink()
    runs.write_record(folder, dataclasses.replace(runs.load_run(folder).record, weights={}))
    refused("was recorded without weights")


def test_a_damaged_state_is_named(home):
    folder = train.train(change(RUN, images=4), home / "out", "cpu", grid=(1, 1))
    (folder / train.STATE).write_bytes(b"0" * 100)
    with pytest.raises(ReproError, match="state.safetensors cannot be read .*remove it to start anew"):
        train.train(RUN, folder, "cpu")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(home, monkeypatch):
    folder = home / "out"
    step = train.Trainer.train_step

    def broken(self, *arguments):
        loss = step(self, *arguments)
        return loss * float("nan") if self.step > 7 else loss

    monkeypatch.setattr(train.Trainer, "train_step", broken)
    with pytest.raises(ReproError, match="the loss is nan at 32 images .* is as it was at the last state"):
        train.train(RUN, folder, "cpu")
    assert _about(folder)["step"] == 6


def test_weights_that_are_not_finite_do_not_replace_the_last_good_state(tmp_path):
    trainer = train.Trainer(RUN, CPU)
    trainer.save_state(tmp_path)
    before = files.sha256(tmp_path / train.STATE)
    with torch.no_grad():
        trainer.parameters[3].view(-1)[0] = float("inf")
    with pytest.raises(ReproError, match="is not finite after 0 images; .* is as it was at the last state"):
        trainer.save_state(tmp_path)
    assert files.sha256(tmp_path / train.STATE) == before


def _about(folder):
    with safe_open(folder / train.STATE, "pt") as file:
        return json.loads(file.metadata()["about"])


def test_a_batch_must_divide_among_the_processes(home, monkeypatch):
    monkeypatch.setattr(train, "find_place", lambda device: train.Place(0, 3, torch.device("cpu")))
    with pytest.raises(ReproError, match="a batch of 4 cannot be shared by 3 processes"):
        train.train(RUN, home / "out", "cpu")


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ReproError, match="torch sees no GPU; use --device cpu"):
        train.find_place("cuda")


@pytest.mark.parametrize("device", ["gpu", "mps", "meta"])
def test_an_unknown_device_names_the_known_ones(device):
    with pytest.raises(ReproError, match=f"unknown device '{device}'; known are cpu, cuda and cuda:N"):
        train.find_place(device)


def test_averages_follow_small_and_large_tensors_alike(monkeypatch):
    """Large ones by themselves, small ones together: the same arithmetic, to a rounding."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 2000, 17, 4000)
    average, parameters = ([torch.randn(size, generator=generator) for size in sizes] for _ in range(2))
    expected = [a + 0.125 * (p - a) for a, p in zip(average, parameters, strict=True)]
    for large in (0, 1000, 10**9):
        found = [a.clone() for a in average]
        monkeypatch.setattr(train, "LARGE", large)
        train.follow(found, parameters, torch.tensor(0.125))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

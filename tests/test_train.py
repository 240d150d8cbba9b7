"""Training: resumed bit for bit after a kill, the same on two processes, and it learns."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from repro import config, data, evaluate, files, prepare, provenance, runs, train
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


def test_a_record_made_up_for_keeps_what_was_measured(home, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Means)
    folder = train.train(EVALUATED, home / "out", "cpu", grid=(1, 1))
    before = measured(folder)
    (folder / "run.json").unlink()
    later = dataclasses.replace(EVALUATED, evaluate=Evaluate(samples=4))  # not at the end any more
    assert measured(train.train(later, folder, "cpu", grid=(1, 1))) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("classes", [0, 2])
def test_a_captured_step_is_the_step(classes):
    run = dataclasses.replace(
        change(RUN, cuda_graphs=True, batch=8, warmup_images=80, precision="bf16"),
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
        states.append([losses, *trainer.parameters, *trainer.ema_parameters, *optimizer])
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
    assert train.held_out_loss(trainer, real, rows, np.array([], int)) == []


def torchrun(number, *arguments):
    """`number` processes joined by gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(provenance.ROOT)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_train_and_sample_what_one_does(home):
    """Same data, noise and levels. Sums differ in their order: what is learned differs by 2e-6 of itself."""
    (home / "two.py").write_text(script(home / "two", changes="images=40"))
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

    torchrun(2, "-m", "repro", "sample", home / "one", "--seeds", "3", "8", "--out", home / "drawn")
    pictures = [np.asarray(Image.open(home / "drawn" / f"{seed}.png")) for seed in range(3, 8)]
    np.testing.assert_array_equal(pictures, one.draw(range(3, 8)))


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
        ("cuda_graphs", True),
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
    with pytest.raises(ReproError, match="the loss is nan at 32 images; .* is as it was at the last state"):
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

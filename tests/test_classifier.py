"""The noisy classifier: its network, its training, what is measured of it, and how it guides."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from released import listed
from test_unet import plain_attention, plain_norm, plain_residual, plain_silu, scramble

from repro import config, data, evaluate, files, guidance, prepare, runs, sample, schedules, train
from repro.classifier import Classifier
from repro.config import Config, Data, Evaluate, NoisyClassifier, Sample, Train, ViT
from repro.denoiser import EPS, Denoiser
from repro.files import ReproError
from repro.models import unet

TINY = NoisyClassifier(
    channels=32, multipliers=(1, 1, 1, 2), blocks=1, attention=(8,), heads=2, head_channels=None
)
HOW = Train(
    images=96, batch=8, lr=2e-3, ema_halflife_images=20, precision="fp32", compile=False,
    state_every_images=32, log_every_images=8,
)  # fmt: skip
CLASSIFIER = Config("lab/tells", Data("grey", classes=2), TINY, HOW, evaluate=Evaluate(at=(48,), levels=3))
GUIDED = Sample(steps=3, classifier="lab/tells", classifier_scale=2.0)
DRAWS = Config(
    "lab/draws", Data("grey", classes=2), ViT(patch=16, width=32, depth=1, heads=2),
    dataclasses.replace(HOW, images=16), sample=Sample(steps=3),
    evaluate=Evaluate(at=(8,), samples=4, also=(GUIDED,), levels=3),
)  # fmt: skip


def grey_images(folder, name, count, classes=(40, 200)):
    """Classes of images of nearly one grey level each, so that even a little network tells them apart."""
    random = np.random.default_rng(len(name))
    for number, level in enumerate(classes):
        below = folder / "source" / name / f"n{number:08d}"
        below.mkdir(parents=True)
        for i in range(count):
            pixels = np.full((64, 64, 3), level, np.uint8) + random.integers(0, 30, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(below / f"{i:03d}.png")
    prepare.prepare("imagenet64", folder / "source" / name, folder / "data", name=name, workers=1)


@contextmanager
def grey_data(folder):
    """Within a block the package works in `folder`, where grey images are prepared."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data", "reference", "runs"):
            patch.setenv(f"REPRO_{name.upper()}", str(folder / name))
        grey_images(folder, "grey", 12)
        grey_images(folder, "grey-val", 5)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared data, a trained classifier, and a run that is guided by it."""
    folder = tmp_path_factory.mktemp("classifier")
    with grey_data(folder):
        train.train(CLASSIFIER, folder / "runs" / "lab" / "tells", "cpu")
        train.train(DRAWS, folder / "runs" / "lab" / "draws", "cpu", grid=(1, 2))
        yield folder
        sample._recorded.cache_clear()


def released_classifier() -> dict:
    return listed("adm-imagenet64-classifier (64x64_classifier.pt)")


# The network ----------------------------------------------------------------------------------------


def test_its_tensors_are_those_of_the_released_classifier():
    released = released_classifier()
    with torch.device("meta"):
        net = unet.NoisyClassifier(NoisyClassifier(), 64, 3, 1000)
    ours = Counter(tuple(tensor.shape) for tensor in net.state_dict().values())
    linear = ("qkv.weight", "proj_out.weight", "qkv_proj.weight", "c_proj.weight")  # 1-D convolutions there
    theirs = Counter(
        tuple(shape[:2] if name.endswith(linear) else shape) for name, shape in released["state_dict"].items()
    )
    assert ours == theirs
    assert sum(p.numel() for p in net.parameters()) == released["parameters"] == 65_438_568


def plain_pool(net, h):
    """ADM's attention pooling, head by head, in plain sums."""
    pool, (n, c) = net.pool, h.shape[:2]
    tokens = h.reshape(n, c, -1)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + pool.position
    q, k, v = (torch.einsum("oc,nct->not", w, tokens) + b[:, None]
               for w, b in zip(pool.qkv.weight.split(c), pool.qkv.bias.split(c), strict=True))  # fmt: skip
    size, mixed = c // pool.heads, []
    for head in range(pool.heads):
        part = slice(head * size, (head + 1) * size)
        share = (torch.einsum("nct,ncs->nts", q[:, part], k[:, part]) / math.sqrt(size)).softmax(2)
        mixed.append(torch.einsum("nts,ncs->nct", share, v[:, part]))
    out = torch.cat(mixed, dim=1)[:, :, 0]  # the mean's token
    return out @ pool.proj.weight.T + pool.proj.bias


@pytest.mark.parametrize("scale_shift", [True, False])
def test_the_network_equals_a_plain_float64_computation(scale_shift):
    model = dataclasses.replace(TINY, multipliers=(1, 2), scale_shift_norm=scale_shift)
    net = scramble(unet.NoisyClassifier(model, 16, 3, 7))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = model.channels // 2
    emb = torch.cat([torch.ones(3, half), torch.zeros(3, half)], 1).double()  # of t = 0
    emb = (
        plain_silu(emb @ net.time_in.weight.T + net.time_in.bias) @ net.time_out.weight.T + net.time_out.bias
    )
    h = F.conv2d(x, net.conv_in.weight, net.conv_in.bias, padding=1)
    for step, (factor, attends) in zip(net.encoder, [(None, 0), ("down", 0), (None, 1)], strict=True):
        h = plain_residual(step[0], h, emb, scale_shift, factor)
        h = plain_attention(step[1], h, 2) if attends else h
    first, attention, second = net.middle
    h = plain_residual(first, h, emb, scale_shift)
    h = plain_residual(second, plain_attention(attention, h, 2), emb, scale_shift)
    expected = plain_pool(net, plain_silu(plain_norm(h, net.norm_out)))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(net(x, torch.zeros(3)).double(), expected, rtol=1e-5, atol=1e-5)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ReproError, match="needs data with classes"):
        unet.NoisyClassifier(TINY, 64, 3, 0)
    odd = dataclasses.replace(TINY, heads=None, head_channels=24)
    with pytest.raises(ReproError, match="do not divide into heads of 24"):
        unet.NoisyClassifier(odd, 64, 3, 2)


# In EDM's frame -------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """Logits that are the image's first pixels, and notes of what it was told."""

    classes = 3

    def forward(self, x, t):
        self.x, self.t = x, t
        return x[:, 0, 0, :3]


def test_it_is_given_the_scaled_image_and_the_timestep():
    schedule = schedules.cosine_vp()
    classifier = Classifier(Told(), schedule)
    y, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = schedule.sigmas[[100, 900]]
    labels = torch.tensor([2, 0])
    loss = classifier.loss(y, noise, sigma, labels)
    x_t = (y + sigma[:, None, None, None] * noise) / (1 + sigma**2).sqrt()[:, None, None, None]
    torch.testing.assert_close(classifier.net.x, x_t.float())
    assert classifier.net.t.tolist() == [100, 900]
    torch.testing.assert_close(loss, F.cross_entropy(x_t[:, 0, 0, :3].float(), labels, reduction="none"))
    log_p = classifier(y, torch.tensor(0.5))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2))


# Training, and what is measured ---------------------------------------------------------------------


def test_it_learns_and_its_accuracy_by_noise_level_is_recorded(home):
    run = runs.load_run("lab/tells")
    assert run.record.images == 96 and run.record.samples is None
    lines = [line for line in run.metrics if line["name"] == "accuracy by noise level"]
    assert [line["images"] for line in lines] == [48, 96]
    last = lines[-1]
    assert last["count"] == 10 and len(last["sigmas"]) == len(last["losses"]) == 3
    assert last["dataset"] == {"name": "grey-val", "fingerprint": data.verify("grey-val")}
    assert last["accuracies"][0] == 1 and last["losses"][0] < 0.3  # at little noise, all are told
    # what was recorded is what the recorded weights do, by another way of computing it
    real, classifier = data.load("grey-val"), run.classifier()
    sigma = torch.tensor(last["sigmas"][0], dtype=torch.float64)
    y = sample.from_uint8(torch.from_numpy(np.array(real.images)))
    noise = torch.randn((10, 3, 64, 64), generator=torch.Generator().manual_seed(evaluate.LEVEL_SEED))
    with torch.no_grad():
        log_p = classifier(y + sigma.float() * noise, sigma)
    loss = F.nll_loss(log_p, torch.from_numpy(real.labels))
    assert float(loss) == pytest.approx(last["losses"][0], rel=2e-2)  # float16 weights


def test_it_is_trained_to_its_end_once_and_resumed(home):
    folder = home / "runs" / "lab" / "tells"
    before = files.sha256(folder / train.STATE)
    train.train(CLASSIFIER, folder, "cpu")
    assert files.sha256(folder / train.STATE) == before
    part = home / "part"
    train.train(dataclasses.replace(CLASSIFIER, train=dataclasses.replace(HOW, images=40)), part, "cpu")
    train.train(CLASSIFIER, part, "cpu")
    assert runs.load_run(part).record.weights == runs.load_run("lab/tells").record.weights


def test_errors_by_noise_level_are_exact_for_a_network_that_predicts_no_noise(home):
    """Then D = x, and the error is sigma^2 times the noise's mean square."""

    class Nothing(torch.nn.Module):
        classes = 0

        def forward(self, x, t, labels):
            assert len(x) == 4 and labels is None
            return torch.zeros_like(x)

    denoiser = Denoiser(Nothing(), schedules.cosine_vp(), EPS)
    line = evaluate.by_level(denoiser, DRAWS, 7, "cpu", "fp32", 3, batch=4)
    assert line["timesteps"] == [166, 500, 833] and line["images"] == 7 and line["count"] == 10
    noise = torch.cat([
        torch.randn((4, 3, 64, 64), generator=torch.Generator().manual_seed(evaluate.LEVEL_SEED + first))
        for first in (0, 4, 8)
    ])[:10]  # fmt: skip
    expected = [sigma**2 * float(noise.double().square().mean()) for sigma in line["sigmas"]]
    assert line["errors"] == pytest.approx(expected, rel=1e-5)


def test_both_samplers_and_the_errors_are_measured_of_a_guided_run(home):
    metrics = runs.load_run("lab/draws").metrics
    distances = [line for line in metrics if line["name"].startswith("FD")]
    assert [(line["images"], line["sample"]["classifier"]) for line in distances] == [
        (8, None), (8, "lab/tells"), (16, None), (16, "lab/tells"),
    ]  # fmt: skip
    assert distances[0]["classifier"] is None
    assert distances[1]["classifier"] == {
        "run": "lab/tells",
        "weights": runs.load_run("lab/tells").record.weights,
    }
    assert [line["images"] for line in metrics if line["name"] == "denoising error by noise level"] == [16]


# Guidance -------------------------------------------------------------------------------------------


def test_a_recorded_classifier_guides_the_samples(home):
    denoiser, classifier = runs.load_run("lab/draws").denoiser(), runs.load_run("lab/tells").classifier()
    seeds, labels = [0, 1], torch.tensor([0, 1])
    by_hand = guidance.classifier(denoiser, classifier, 2.0)
    sigmas = schedules.grid_for(denoiser.schedule, GUIDED)
    start = sample.SeedNoise(seeds, (3, 64, 64))()
    x = sample.samplers.heun(lambda x, sigma: by_hand(x, sigma, labels), start.double() * sigmas[0], sigmas)
    (drawn,) = sample.generate(denoiser, DRAWS, seeds, 2, "cpu", sample=GUIDED, labels=labels)
    torch.testing.assert_close(drawn, sample.to_uint8(x.detach()))
    (plain,) = sample.generate(denoiser, DRAWS, seeds, 2, "cpu", labels=labels)
    assert (drawn.float() - plain.float()).abs().max() > 1


def test_guidance_towards_a_class_makes_the_classifier_surer_of_it(home):
    denoiser, classifier = runs.load_run("lab/draws").denoiser(), runs.load_run("lab/tells").classifier()
    seeds = list(range(6))
    labels = torch.tensor([0, 1] * 3)

    def sure(how):
        (images,) = sample.generate(denoiser, DRAWS, seeds, 6, "cpu", sample=how, labels=labels)
        with torch.no_grad():
            log_p = classifier(sample.from_uint8(images), torch.tensor(0.05))
        return float(log_p.gather(1, labels[:, None]).mean())

    assert sure(dataclasses.replace(GUIDED, classifier_scale=20.0)) > sure(Sample(steps=3)) + 0.1


def test_what_cannot_guide_is_named(home):
    denoiser = runs.load_run("lab/draws").denoiser()
    for name, message in (
        ("lab/draws", "lab/draws is no classifier"),
        ("lab/tels", "no recorded run lab/tels"),
    ):
        how = dataclasses.replace(GUIDED, classifier=name)
        with pytest.raises(ReproError, match=message):
            list(sample.generate(denoiser, DRAWS, [0], 1, "cpu", sample=how))
    with pytest.raises(ReproError, match="lab/tells is a classifier: it draws no images"):
        runs.load_run("lab/tells").draw([0])
    for wrong in ({"classifier": "lab/tells"}, {"classifier_scale": 1.0}):
        with pytest.raises(ValidationError, match="given together"):
            Sample(**wrong)
    with pytest.raises(ValidationError, match="label_drop"):
        dataclasses.replace(CLASSIFIER, train=dataclasses.replace(HOW, label_drop=0.1))


def test_a_missing_classifier_or_val_split_is_found_before_training(home):
    how = dataclasses.replace(GUIDED, classifier="lab/absent")
    guided = dataclasses.replace(DRAWS, evaluate=dataclasses.replace(DRAWS.evaluate, also=(how,)))
    with pytest.raises(ReproError, match="no recorded run lab/absent"):
        train.train(guided, home / "nothing", "cpu")
    grey_images(home, "alone", 2)
    alone = dataclasses.replace(CLASSIFIER, data=Data("alone", classes=2))
    with pytest.raises(ReproError, match="'alone-val' is not prepared"):
        train.train(alone, home / "nothing", "cpu")
    assert files.read_lines(home / "nothing" / "log.jsonl") == []


def changed(run, **changes):
    return dataclasses.replace(run, **changes)


@pytest.mark.parametrize(
    "run, message",
    [
        (changed(DRAWS, data=Data("grey")), r"channels\) \(2, 64, 3\), but lab/draws draws \(0, 64, 3\)"),
        (changed(DRAWS, evaluate=Evaluate(also=(Sample(guidance=2.0),)),
                 model=ViT(patch=16, width=32, depth=1, heads=2, null_class=False)),
         "has no null class, so it cannot be sampled with guidance 2"),
        (changed(DRAWS, evaluate=Evaluate(also=(Sample(steps=1001, grid="uniform"),))),
         "a section of 1000 of the 1000 timesteps cannot have 1001 steps"),
    ],
)  # fmt: skip
def test_sampling_that_cannot_work_is_found_before_training(home, run, message):
    with pytest.raises(ReproError, match=message):
        train.train(run, home / "unfit", "cpu")
    assert not (home / "unfit" / "log.jsonl").exists()


def test_a_classifier_that_is_still_being_trained_does_not_guide(home):
    path = home / "runs" / "lab" / "tells"
    whole = (path / "run.json").read_text()
    record = runs.load_run(path).record
    runs.write_record(path, dataclasses.replace(record, images=48))
    try:
        with pytest.raises(ReproError, match="lab/tells is not trained to its end yet"):
            train.train(DRAWS, home / "early", "cpu")
    finally:
        (path / "run.json").write_text(whole)


def test_a_classifier_of_other_weights_is_another_one(home):
    """Of the same name, after its file has changed: neither an old one is used, nor a curve made of both."""
    path = home / "runs" / "lab" / "tells"
    denoiser, labels = runs.load_run("lab/draws").denoiser(), torch.tensor([1])
    (before,) = sample.generate(denoiser, DRAWS, [0], 1, "cpu", sample=GUIDED, labels=labels)
    kept = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    run = runs.load_run(path)
    weights = {name: -tensor for name, tensor in run.weights().items()}
    hashes = runs.save_weights(path, weights, run.config)
    runs.write_record(path, dataclasses.replace(run.record, weights=hashes))
    try:
        (after,) = sample.generate(denoiser, DRAWS, [0], 1, "cpu", sample=GUIDED, labels=labels)
        assert not torch.equal(before, after)
        lines = evaluate.evaluate(
            denoiser, changed(DRAWS, sample=GUIDED), data.verify("grey"), 8, "cpu", "fp32", 4
        )
        assert lines[0]["classifier"]["weights"] == hashes
    finally:
        for name, content in kept.items():
            (path / name).write_bytes(content)
    mixed = home / "mixed"
    shutil.copytree(home / "runs" / "lab" / "draws", mixed)
    assert len(runs.load_run(mixed).distances(GUIDED)) == 2
    files.append_line(mixed / "metrics.jsonl", lines[0])
    with pytest.raises(ReproError, match="different weights, which are no curve"):
        runs.load_run(mixed).distances(GUIDED)


def test_a_recorded_network_takes_over_where_noise_is_low(home):
    """Everywhere, nowhere, and from a step on, which no network of the two draws alone."""
    path = home / "runs" / "lab" / "other"
    train.train(changed(DRAWS, name="lab/other", train=dataclasses.replace(HOW, seed=1)), path, "cpu")
    own, other = runs.load_run("lab/draws").denoiser(), runs.load_run("lab/other").denoiser()

    def images(denoiser, **options):
        how = dataclasses.replace(DRAWS.sample, **options)
        return next(sample.generate(denoiser, DRAWS, [0, 1], 2, "cpu", sample=how))

    switched = {sigma: images(own, low_noise="lab/other", low_noise_below=sigma) for sigma in (1e-3, 1, 1e3)}
    assert torch.equal(switched[1e-3], images(own)) and torch.equal(switched[1e3], images(other))
    assert not torch.equal(switched[1], switched[1e-3]) and not torch.equal(switched[1], switched[1e3])
    assert torch.equal(images(own, low_noise="lab/draws", low_noise_below=1.0), images(own))
    how = dataclasses.replace(DRAWS.sample, low_noise="lab/other", low_noise_below=1.0)
    assert torch.equal(
        torch.from_numpy(runs.load_run("lab/draws").draw([0, 1], how)), switched[1].permute(0, 2, 3, 1)
    )


def test_what_another_network_drew_says_which_weights_it_had(home):
    how = dataclasses.replace(DRAWS.sample, low_noise="lab/draws", low_noise_below=1.0)
    run, fingerprint = changed(DRAWS, sample=how), data.verify("grey")
    recorded = runs.load_run("lab/draws")
    (line,) = evaluate.evaluate(recorded.denoiser(), run, fingerprint, 16, "cpu", "fp32", 4)
    assert line["low_noise"] == {"run": "lab/draws", "weights": recorded.record.weights}
    assert config.sample_from_json(line["sample"]) == how
    mixed = home / "lower"
    shutil.copytree(recorded.path, mixed)
    files.append_line(mixed / "metrics.jsonl", line)
    assert [m["value"] for m in runs.load_run(mixed).distances(how)] == [line["value"]]
    assert line["value"] not in [m["value"] for m in runs.load_run(mixed).distances(DRAWS.sample)]
    files.append_line(mixed / "metrics.jsonl", {**line, "images": 8, "low_noise": {"weights": {"w": "0"}}})
    with pytest.raises(ReproError, match="distances of lab/draws with different weights"):
        runs.load_run(mixed).distances(how)


def test_a_network_that_cannot_take_over_is_refused(home):
    def with_low_noise(name, **changes):
        how = dataclasses.replace(DRAWS.sample, low_noise=name, low_noise_below=1.0)
        return changed(DRAWS, evaluate=Evaluate(at=(8,), samples=4, also=(how,)), **changes)

    with pytest.raises(ReproError, match="there is no recorded run lab/none"):
        train.train(with_low_noise("lab/none"), home / "unfit", "cpu")
    linear = config.Schedule("linear_vp")
    for run, differ in (
        (with_low_noise("lab/tells"), "model.kind, which is that of the classifier"),
        (with_low_noise("lab/draws", data=Data("grey")), "data.classes"),
        (with_low_noise("lab/draws", schedule=linear), "schedule"),
    ):
        message = f"cannot take over from lab/draws where noise is low: they differ in {differ}"
        with pytest.raises(ReproError, match=message):
            train.train(run, home / "unfit", "cpu")
        with pytest.raises(ReproError, match=message):
            next(sample.generate(runs.build(run), run, [0], 1, "cpu", sample=run.evaluate.also[0]))
    early = home / "runs" / "lab" / "early"
    shutil.copytree(home / "runs" / "lab" / "draws", early)
    runs.write_record(early, dataclasses.replace(runs.load_run(early).record, images=8))
    with pytest.raises(ReproError, match="lab/early is not trained to its end yet"):
        train.train(with_low_noise("lab/early"), home / "unfit", "cpu")
    assert not (home / "unfit" / "log.jsonl").exists()
    with pytest.raises(ValidationError, match="low_noise and low_noise_below are given together"):
        Sample(low_noise="lab/draws")
    with pytest.raises(ValidationError, match="low_noise and low_noise_below are given together"):
        Sample(low_noise_below=1.0)


def test_a_val_split_of_other_classes_is_refused(home):
    grey_images(home, "three", 2, classes=(10, 100, 200))
    grey_images(home, "three-val", 2)
    run = changed(CLASSIFIER, data=Data("three", classes=3))
    with pytest.raises(ReproError, match="three-val and three differ in their classes"):
        train.train(run, home / "three-run", "cpu")


# Several runs ---------------------------------------------------------------------------------------


def little(name):
    """A run of one step, that measures nothing."""
    return changed(DRAWS, name=name, train=dataclasses.replace(HOW, images=8), evaluate=Evaluate())


def test_several_runs_are_trained_once_each_and_shared(home):
    one, two, three = (little(f"lab/{name}") for name in ("one", "two", "three"))
    out = home / "several"
    with files.lock(out / "lab" / "two"):  # as another process, which trains it, holds it
        assert train.train_all([one, two], out, "cpu") == [out / "lab" / "one"]
    assert train.train_all([one, two, three], out, "cpu") == [out / "lab" / "two", out / "lab" / "three"]
    noted = dataclasses.replace(one, note="What a resumed run may change makes it no other run.")
    assert train.train_all([noted, two, three], out, "cpu") == []
    longer = dataclasses.replace(one, train=dataclasses.replace(one.train, images=16))
    assert train.train_all([longer], out, "cpu", minutes=1e-9) == []
    assert train.train_all([longer], out, "cpu") == [out / "lab" / "one"]
    # a record that was cut before its samples is finished
    record = runs.load_run(out / "lab" / "two").record
    runs.write_record(out / "lab" / "two", dataclasses.replace(record, samples=None))
    assert train.train_all([two], out, "cpu") == [out / "lab" / "two"]
    assert runs.load_run(out / "lab" / "two").record.samples is not None


def test_a_run_that_fails_does_not_keep_the_others_from_being_trained(home, capsys):
    wild = dataclasses.replace(little("lab/wild"), train=dataclasses.replace(HOW, images=40, lr=1e30))
    out = home / "failing"
    with pytest.raises(ReproError, match="1 runs failed: lab/wild"):
        train.train_all([wild, little("lab/good")], out, "cpu")
    assert train.is_trained(little("lab/good"), out / "lab" / "good")
    assert "lab/wild: the loss is" in capsys.readouterr().out
    other = dataclasses.replace(little("lab/good"), parameterization="v")
    with pytest.raises(ReproError, match="1 runs failed"):
        train.train_all([other], out, "cpu")
    assert "holds a run of other settings (parameterization)" in capsys.readouterr().out


def test_several_runs_are_not_for_torchrun(home, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReproError, match="without torchrun"):
        train.train_all([DRAWS], home / "several", "cpu")


def test_the_configuration_of_a_classifier_is_read_as_written():
    written = config.to_json(CLASSIFIER)
    assert config.from_json(json.loads(json.dumps(written))) == CLASSIFIER

"""An autoencoder's loss and scale, the latents of a data set, and a run that learns them."""

import dataclasses
import errno
import json
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_classifier import grey_data

from repro import (
    __main__,
    autoencoder,
    data,
    files,
    latents,
    runs,
    sample,
    schedules,
    train,
)
from repro.config import Autoencoder, Config, Data, Evaluate, Sample, Train, ViT
from repro.files import ReproError
from repro.models.autoencoder import KLAutoencoder

TINY = Autoencoder(channels=(16, 16), blocks=1, groups=8, latent_channels=2, feature_weight=0.1)
HOW = Train(
    images=64, batch=8, lr=2e-3, ema_halflife_images=20, precision="fp32", compile=False,
    state_every_images=32, log_every_images=8,
)  # fmt: skip
CODES = Config("lab/codes", Data("grey", classes=2), TINY, HOW, evaluate=Evaluate(at=(32,)))
DRAWS = Config(
    "lab/of-latents", Data("grey", resolution=32, channels=2, classes=2, holdout=4, autoencoder="lab/codes"),
    ViT(patch=8, width=32, depth=1, heads=2), dataclasses.replace(HOW, images=32),
    parameterization="x0", sample=Sample(steps=3), evaluate=Evaluate(at=(16,), samples=4, levels=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared data, and a recorded autoencoder of them."""
    folder = tmp_path_factory.mktemp("latents")
    with grey_data(folder):
        train.train(CODES, folder / "runs/lab/codes", "cpu")
        for name in ("grey", "grey-val"):
            latents.encode(name, "lab/codes", batch=5)
        yield folder


@pytest.fixture(scope="module")
def drawing(home):
    """A recorded run that learned the latents."""
    return train.train(DRAWS, home / "runs/lab/of-latents", "cpu", grid=(1, 2))


def tiny_network(seed=0, **changes):
    torch.manual_seed(seed)
    return KLAutoencoder(dataclasses.replace(TINY, **changes), 16)


def test_the_network_does_what_diffusers_own_methods_do():
    net, x = tiny_network(), torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 2, 8, 8)
    again, mean, log_variance = net(x, noise)
    theirs = net.kl.encode(x).latent_dist
    torch.testing.assert_close(mean, theirs.mean)
    torch.testing.assert_close(log_variance, theirs.logvar)
    torch.testing.assert_close(again, net.kl.decode(theirs.mean + theirs.std * noise).sample)


def test_without_diffusers_it_says_what_is_missing(monkeypatch):
    for name in ("diffusers", "diffusers.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ReproError, match="need the package diffusers, which is not installed"):
        tiny_network()


def test_the_loss_is_pixels_divergence_and_features():
    net, y = tiny_network(), torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 3, 16, 16)
    schedule = schedules.cosine_vp(10)
    again, mean, log_variance = net(y, noise.reshape(2, -1)[:, : 2 * 8 * 8].reshape(2, 2, 8, 8))
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    pixels = (again - y).abs().mean((1, 2, 3))
    how = dataclasses.replace(TINY, kl_weight=0.25, feature_weight=0.0)
    plain = autoencoder.Autoencoder(net, how, schedule).loss(y, noise)
    torch.testing.assert_close(plain, pixels + 0.25 * divergence.sum((1, 2, 3)) / (3 * 16 * 16))

    how = dataclasses.replace(how, feature_weight=2.0)
    joined = autoencoder.Autoencoder(net, how, schedule)
    ends = [  # cosines of the maps' vectors, by another way than lengths and differences
        1 - torch.nn.functional.cosine_similarity(one, other, dim=1).mean((1, 2))
        for one, other in zip(joined.features(again), joined.features(y), strict=True)
    ]
    torch.testing.assert_close(
        joined.loss(y, noise), plain + 2 * 2 * torch.stack(ends).mean(0), atol=2e-3, rtol=1e-3
    )
    assert all(not parameter.requires_grad for parameter in joined.features.parameters())


def test_latents_of_more_numbers_than_an_image_are_refused():
    net = tiny_network(latent_channels=16)
    joined = autoencoder.Autoencoder(
        net, dataclasses.replace(TINY, latent_channels=16, feature_weight=0.0), schedules.cosine_vp(10)
    )
    y = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ReproError, match="1,024 numbers are more than the 768"):
        joined.loss(y, y)


def test_a_side_that_cannot_be_halved_is_refused():
    with pytest.raises(ReproError, match="15 pixels cannot be halved 1 times"):
        KLAutoencoder(TINY, 15)


def test_groups_must_divide_the_widths():
    with pytest.raises(ValidationError, match="groups .7. must divide each of channels"):
        Autoencoder(channels=(16, 16), groups=7)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sample": Sample(clip=True)}, "no range to clip to"),
        ({"evaluate": Evaluate(also=(Sample(clip=True),))}, "no range to clip to"),
        ({"model": TINY}, "works on images"),
    ],
)
def test_settings_that_latents_cannot_have_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        dataclasses.replace(DRAWS, **changes)


def test_the_scale_gives_drawn_latents_a_deviation_of_one(home):
    net = runs.load_run("lab/codes").autoencoder()
    scale = latents.find_scale(net, data.load("grey").images, np.arange(24))
    moments = torch.from_numpy(np.array(latents.load("grey", "lab/codes")))
    generator = torch.Generator().manual_seed(0)
    plain = torch.zeros(24, dtype=torch.bool)
    many = torch.cat(
        [latents.drawn(moments, plain, torch.randn(24, 2, 32, 32, generator=generator)) for _ in range(20)]
    )
    assert many.std() * scale / float(net.scale) == pytest.approx(1, rel=5e-3)
    assert float(net.scale) != 1 and np.isfinite(float(net.scale))


def test_latents_are_drawn_from_their_distribution_or_the_mirror_images():
    mean = torch.tensor([[1.0, -2.0], [5.0, 6.0]])[:, :, None, None]  # of each view
    log_variance = torch.tensor([[0.0, -2.0], [2.0, 1.0]])[:, :, None, None]
    moments = torch.cat([mean, log_variance], 1)[None].expand(20000, 2, 4, 1, 1)
    noise = torch.randn(20000, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    mirrored = torch.arange(20000) % 2 == 1
    found = latents.drawn(moments, mirrored, noise)[:, :, 0, 0]
    for view, chosen in ((0, ~mirrored), (1, mirrored)):
        torch.testing.assert_close(found[chosen].mean(0), mean[view, :, 0, 0], atol=0.1, rtol=0)
        torch.testing.assert_close(
            found[chosen].std(0), (0.5 * log_variance[view, :, 0, 0]).exp(), atol=0.1, rtol=0
        )
    torch.testing.assert_close(latents.plain(moments.half())[0, :, 0, 0], mean[0, :, 0, 0])


def test_a_data_sets_latents_are_the_autoencoders_of_each_image_and_its_mirror_image(home):
    net, real = runs.load_run("lab/codes").autoencoder(), data.load("grey")
    moments = torch.from_numpy(np.array(latents.load("grey", "lab/codes"))).float()
    assert moments.shape == (24, 2, 4, 32, 32)
    for view, images in enumerate((real.images, real.images[..., ::-1])):
        mean, log_variance = net.encode(sample.from_uint8(torch.from_numpy(np.array(images))))
        expected = torch.cat([mean * net.scale, log_variance + 2 * net.scale.log()], 1)
        torch.testing.assert_close(moments[:, view], expected, atol=2e-3, rtol=2e-3)


def test_encoding_goes_on_where_it_was_stopped(home, monkeypatch):
    whole = latents.folder("grey", runs.load_run("lab/codes").record.weights)
    expected = (whole / "moments.f16").read_bytes()
    aside = whole.rename(whole.with_name("aside"))
    calls = []

    def killed(net, images, precision, real=latents._moments):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(net, images, precision)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "_moments", killed)
        with pytest.raises(KeyboardInterrupt):
            latents.encode("grey", "lab/codes", batch=5)
        with pytest.raises(ReproError, match="not there. Run: python -m repro encode grey lab/codes"):
            latents.load("grey", "lab/codes")
        latents.encode("grey", "lab/codes", batch=7)
    assert calls == [5, 5, 5, 7, 7]  # ten images were done
    assert (whole / "moments.f16").read_bytes() == expected
    assert sorted(path.name for path in whole.iterdir()) == [".lock", "manifest.json", "moments.f16"]
    before = (whole / "moments.f16").stat().st_mtime_ns
    latents.encode("grey", "lab/codes")  # whole: left alone
    assert (whole / "moments.f16").stat().st_mtime_ns == before
    for path in sorted(aside.iterdir()):
        path.unlink()
    aside.rmdir()


def test_a_full_disk_is_told_and_nothing_is_lost(home, monkeypatch):
    out = latents.folder("grey-val", runs.load_run("lab/codes").record.weights)
    expected = (out / "moments.f16").read_bytes()
    (out / "manifest.json").unlink()
    before = (out / "moments.f16").rename(out / "aside")
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(latents, "_moments", full)
        with pytest.raises(ReproError, match="Free some space and give the same command"):
            latents.encode("grey-val", "lab/codes")
    latents.encode("grey-val", "lab/codes")
    assert (out / "moments.f16").read_bytes() == expected
    before.unlink()


def test_encoding_that_was_killed_before_its_manifest_is_not_done_again(home, monkeypatch):
    out = latents.folder("grey-val", runs.load_run("lab/codes").record.weights)
    manifest = files.read_json(out / "manifest.json")
    about = {key: value for key, value in manifest.items() if key != "sha256"}
    files.write_json(out / "begun.json", about)
    (out / "manifest.json").unlink()
    monkeypatch.setattr(latents, "_moments", None)
    latents.encode("grey-val", "lab/codes")
    assert files.read_json(out / "manifest.json") == manifest and not (out / "begun.json").exists()


def test_latents_that_are_cut_or_of_other_pixels_are_refused(home):
    out = latents.folder("grey-val", runs.load_run("lab/codes").record.weights)
    content, manifest = (out / "moments.f16").read_bytes(), (out / "manifest.json").read_text()
    (out / "moments.f16").write_bytes(content[:-2])
    with pytest.raises(ReproError, match="not whole, or of other pixels"):
        latents.load("grey-val", "lab/codes")
    (out / "moments.f16").write_bytes(content)
    files.write_json(out / "manifest.json", json.loads(manifest) | {"pixels": "others"})
    with pytest.raises(ReproError, match="not whole, or of other pixels"):
        latents.load("grey-val", "lab/codes")
    with pytest.raises(ReproError, match="not whole, or were encoded otherwise"):
        latents.encode("grey-val", "lab/codes")
    (out / "manifest.json").write_text(manifest)
    with pytest.raises(ReproError, match="in fp32 and not bf16"):
        latents.encode("grey-val", "lab/codes", precision="bf16")
    (out / "moments.f16").write_bytes(content[:-2] + b"\0\1")
    with pytest.raises(ReproError, match="changed since it was encoded"):
        latents.verify("grey-val", "lab/codes")
    (out / "moments.f16").write_bytes(content)
    assert latents.verify("grey-val", "lab/codes")["precision"] == "fp32"


def test_training_does_not_go_on_with_other_latents(home, drawing, monkeypatch):
    """Neither from a state, nor from a record; nor are such runs compared."""
    longer = dataclasses.replace(DRAWS, train=dataclasses.replace(DRAWS.train, images=48))
    out = home / "goes-on"
    train.train(DRAWS, out, "cpu", grid=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(latents, "verify", lambda *_: {"sha256": "others", "precision": "fp32"})
        with pytest.raises(ReproError, match="trained on other latents of grey, of other weights"):
            train.train(longer, out, "cpu")
        with pytest.raises(ReproError, match="trained on other latents of grey. Encode the same"):
            train.train(longer, home / "from-weights", "cpu", from_weights=drawing)
    one = runs.load_run(drawing)
    data_used = dataclasses.replace(one.record.data, latents={"sha256": "others", "precision": "fp32"})
    other = runs.Run("lab/other", one.path, dataclasses.replace(one.record, data=data_used))
    with pytest.raises(ReproError, match="the data's latents"):
        runs.check_comparable([one, other], [])


def test_an_autoencoder_that_cannot_decode_is_told_before_training(home):
    path = home / "runs/lab/codes"
    weights = next(path.glob("weights-*"))
    aside = weights.rename(home / "aside.safetensors")
    with pytest.raises(ReproError, match="is missing: .*codes needs all of"):
        train.train(DRAWS, home / "before", "cpu")
    aside.rename(weights)
    before = (path / "run.json").read_text()
    record = json.loads(before)
    record["config"]["train"]["images"] = 128
    (path / "run.json").write_text(json.dumps(record))
    try:
        for work in (
            lambda: train.train(DRAWS, home / "before", "cpu"),
            lambda: latents.encode("grey", "lab/codes"),
        ):
            with pytest.raises(ReproError, match="the autoencoder lab/codes is not trained to its end yet"):
                work()
    finally:
        (path / "run.json").write_text(before)


def test_what_cannot_encode_is_refused(home, drawing, monkeypatch):
    with pytest.raises(ReproError, match="lab/of-latents is no autoencoder"):
        latents.encode("grey", "lab/of-latents")
    with pytest.raises(ReproError, match="not prepared"):
        latents.encode("nothing", "lab/codes")
    record = runs.load_run("lab/codes").record
    other = dataclasses.replace(record.config, data=dataclasses.replace(record.config.data, resolution=32))
    fake = runs.Run("lab/codes", runs.load_run("lab/codes").path, dataclasses.replace(record, config=other))
    monkeypatch.setattr(runs, "load_run", lambda name: fake)
    with pytest.raises(ReproError, match="of side 32; grey holds images of"):
        latents.encode("grey", "lab/codes")


def test_a_trained_autoencoder_reconstructs_and_is_measured(home):
    recorded = runs.load_run("lab/codes")
    assert recorded.record.samples is None and recorded.finished
    lines = {(line["name"], line["images"]): line for line in recorded.metrics}
    first, last = (lines["reconstruction error", images] for images in (32, 64))
    assert last["value"] < first["value"] and last["psnr"] > first["psnr"] and last["samples"] == 10
    net, real = recorded.autoencoder(), data.load("grey-val").images
    again = sample.to_uint8(net.decode(net.encode(sample.from_uint8(torch.from_numpy(np.array(real))))[0]))
    apart = again.numpy().astype(float) - real
    assert last["value"] == pytest.approx(np.abs(apart).mean(), rel=0.02)  # recorded as float16
    noise = 10 * np.log10(255**2 / (apart**2).mean((1, 2, 3)))
    assert last["psnr"] == pytest.approx(noise.mean(), rel=0.01)
    assert lines["reconstruction FD (EfficientNet-Lite0)", 64]["reference"]["name"] == "grey-val"
    with pytest.raises(ReproError, match="is an autoencoder: it draws no images"):
        recorded.denoiser()
    with pytest.raises(ReproError, match="is no classifier"):
        recorded.classifier()


def test_a_run_learns_latents_and_draws_images(home, drawing):
    recorded, codes = runs.load_run(drawing), runs.load_run("lab/codes")
    assert recorded.record.data.autoencoder == codes.record.weights
    assert recorded.samples().shape == (2, 64, 64, 3)
    names = [line["name"] for line in recorded.metrics if line["images"] == 32]
    assert {"FD (EfficientNet-Lite0)", "nearest training image", "denoising error by noise level"} <= {*names}
    assert "loss on held-out images" in names
    line = next(line for line in recorded.metrics if line["name"].startswith("FD"))
    assert line["autoencoder"] == {"run": "lab/codes", "weights": codes.record.weights}
    assert line["reference"]["name"] == "grey"

    net, denoiser = codes.autoencoder(), recorded.denoiser()
    drawn = next(sample.generate(denoiser, recorded.config, [0, 1], 2, "cpu"))
    z = sample.sample_batch(
        denoiser,
        recorded.config.sample,
        sample.SeedNoise([0, 1], (2, 32, 32)),
        sample.labels_for([0, 1], 2),
    )
    expected = sample.to_uint8(net.decode((z / net.scale).float()))
    assert (drawn.int() - expected.int()).abs().max() <= 1
    recorded.check_samples(2)


def test_training_on_latents_is_the_same_when_resumed(home, drawing, monkeypatch):
    short = dataclasses.replace(DRAWS, train=dataclasses.replace(DRAWS.train, state_every_images=16))
    out = home / "resumed"
    train.train(dataclasses.replace(short, train=dataclasses.replace(short.train, images=16)), out, "cpu")
    train.train(short, out, "cpu", grid=(1, 2))
    one, other = runs.load_run(drawing).weights(), runs.load_run(out).weights()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_on_held_out_images_is_of_their_means(home, drawing):
    """By the denoiser's own loss on the scaled means of these images' latents."""
    recorded = runs.load_run(drawing)
    line = next(
        line
        for line in recorded.metrics
        if line["name"] == "loss on held-out images" and line["images"] == 32
    )
    moments = latents.load("grey", "lab/codes")
    _, held_out = data.holdout_split(24, 4)
    y = torch.from_numpy(np.array(moments[held_out][:, 0, :2])).float()
    generator = torch.Generator().manual_seed(train.seed_of("held-out loss", 0))
    noise = torch.randn(y.shape, generator=generator)
    uniform = (torch.arange(4) + torch.rand(4, generator=generator)) / 4
    D = recorded.denoiser()
    labels = torch.from_numpy(data.load("grey").labels[held_out])
    weight = train.weights.of_run(DRAWS, D.parameterization)
    expected = D.loss(y, noise, D.schedule.draw(uniform), labels, weight).mean()
    assert line["value"] == pytest.approx(float(expected), rel=0.02)  # recorded as float16


def test_another_autoencoder_of_the_same_name_is_refused(home, drawing):
    path = home / "runs/lab/codes/run.json"
    before = path.read_text()
    record = json.loads(before)
    record["weights"] = {name: "0" * 64 for name in record["weights"]}
    path.write_text(json.dumps(record))
    try:
        with pytest.raises(ReproError, match="learned the latents of lab/codes with other weights"):
            runs.load_run(drawing).denoiser()
    finally:
        path.write_text(before)


def test_latents_of_another_size_than_configured_are_refused(home):
    wrong = dataclasses.replace(DRAWS, data=dataclasses.replace(DRAWS.data, channels=4))
    with pytest.raises(ReproError, match=r"latents by lab/codes of \(2, 32, 32\), the configuration asks"):
        train.train(wrong, home / "wrong", "cpu")
    missing = dataclasses.replace(DRAWS, data=dataclasses.replace(DRAWS.data, autoencoder="lab/none"))
    with pytest.raises(ReproError, match="lab/none"):
        train.train(missing, home / "wrong", "cpu")


def test_commands(home, drawing, capsys):
    assert __main__.main(["encode", "grey", "lab/codes"]) == 0
    assert capsys.readouterr().out.count("encoded in") == 2
    assert __main__.main(["encode", "grey", "lab/codes", "--batch", "0"]) == 1
    assert "at least 1 image" in capsys.readouterr().err
    assert __main__.main(["evaluate", "lab/codes", "--no-record", "--precision", "fp32"]) == 0
    told = capsys.readouterr().out
    assert "reconstruction FD (EfficientNet-Lite0)" in told and "10 val images" in told
    recorded = runs.load_run("lab/codes")
    value = [line["value"] for line in recorded.metrics if line["name"] == "reconstruction error"][-1]
    assert float(told.split("reconstruction error: ")[1].split(",")[0]) == pytest.approx(value, rel=0.02)
    assert __main__.main(["evaluate", "lab/codes", "--neighbours"]) == 1
    assert "--neighbours has no effect on it" in capsys.readouterr().err
    assert __main__.main(["sample", str(drawing), "--sample.clip", "--seeds", "0", "1"]) == 1
    assert "no range to clip to" in capsys.readouterr().err

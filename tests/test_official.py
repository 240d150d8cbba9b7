"""Released checkpoints: names and shapes of the real files, and networks computed from the files' tensors."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released import listed
from safetensors.torch import save_file
from test_vit import numpy_vit

from repro import __main__, config, evaluate, files, official, presets, provenance, render, runs, train
from repro.files import ReproError
from repro.models.vit import ViT

README = provenance.ROOT / "README.md"
KEYS = {
    "minsnr-vit-l-imagenet64": "minsnr-vit-l-imagenet64 (ema_0.9999_large.pt)",
    "minsnr-vit-xl-imagenet256": "minsnr-vit-xl-imagenet256-latent (ema_0.9999_xl.pt)",
    "adm-imagenet64-unet": "adm-imagenet64-unet (64x64_diffusion.pt)",
    "adm-imagenet64-classifier": "adm-imagenet64-classifier (64x64_classifier.pt)",
}

DATA = config.Data("imagenet64", resolution=8, classes=5)
SMALL = {
    "minsnr-vit-l-imagenet64": config.ViT(patch=4, width=24, depth=2, heads=2),
    "adm-imagenet64-unet": config.UNet(
        channels=32, multipliers=(1, 2), blocks=2, attention=(4,), heads=None, head_channels=16,
        null_class=False,
    ),
    "adm-imagenet64-classifier": config.NoisyClassifier(
        channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16
    ),
}  # fmt: skip


def shapes(known):
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in runs.network(known.config).state_dict().items()}


def as_released(known):
    """A state dict as the file has it: names, 4000 rows of time, a variance, kernels of one pixel."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in shapes(known).items():
        if name == "time_embedding.weight":
            shape = (4000, shape[1])
        if name.startswith("conv_out."):
            shape = (2 * shape[0], *shape[1:])
        pointwise = ".qkv.", ".proj.", "pool.qkv.", "pool.proj."
        if (
            known.rename is official.adm_name
            and name.endswith(".weight")
            and any(p in f".{name}" for p in pointwise)
        ):
            shape = (*shape, 1)
        std = 0.5 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        state[known.rename(name)] = std * torch.randn(shape, generator=generator)
    return state


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The checkpoints with small networks, and folders of their own."""
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(official, "RELEASED", tmp_path / "released.json")
    for name, model in SMALL.items():
        known = official.CHECKPOINTS[name]
        run = dataclasses.replace(known.config, model=model, data=DATA)
        monkeypatch.setitem(official.CHECKPOINTS, name, dataclasses.replace(known, config=run))
    return tmp_path


def released(folder, name):
    """A file such as the released one, of the small network."""
    known = official.CHECKPOINTS[name]
    torch.save(as_released(known), folder / known.file)
    return folder / known.file


# The real files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
def test_every_tensor_of_the_real_file_has_its_place(name):
    shapes_there = listed(KEYS[name])["state_dict"]
    known = official.CHECKPOINTS[name]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes_there.items()}
    wanted = shapes(known)
    assert {known.rename(key) for key in wanted} == set(shapes_there)
    real = torch.isfinite
    torch.isfinite = lambda t: torch.ones(())  # of tensors without content nothing is known
    try:
        found = official.translated(state, wanted, known, Path(known.file))
    finally:
        torch.isfinite = real
    assert {key: tuple(t.shape) for key, t in found.items()} == wanted


def test_stable_diffusions_autoencoder_fills_its_published_file_to_the_byte():
    """Names, shapes and order of all tensors are in the header of safetensors, whose length tells them."""
    known = official.CHECKPOINTS["sd-vae-ft-mse"]
    sizes = {known.rename(name): shape for name, shape in shapes(known).items() if name != "scale"}
    header, first = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(sizes):
        last = first + 4 * math.prod(sizes[name])
        header[name] = {"dtype": "F32", "shape": list(sizes[name]), "data_offsets": [first, last]}
        first = last
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + math.ceil(length / 8) * 8 + first == known.published["bytes"]
    assert known.constants == {"scale": 0.18215} and known.file == "sd-vae-ft-mse.safetensors"


def test_the_vit_xl_draws_latents_as_its_authors_do():
    run = official.CHECKPOINTS["minsnr-vit-xl-imagenet256"].config
    assert (run.sample.sampler, run.sample.steps, run.sample.guidance) == ("heun", 50, 1.5)
    assert run.parameterization == "x0" and run.data.autoencoder == "paper/sd-vae-ft-mse"
    assert (run.data.resolution, run.data.channels, run.model.patch) == (32, 4, 2)


def test_the_vit_is_sampled_as_its_authors_do_and_adm_is_guided_by_its_classifier():
    vit, unet = (official.CHECKPOINTS[n].config for n in ("minsnr-vit-l-imagenet64", "adm-imagenet64-unet"))
    assert (vit.sample.sampler, vit.sample.steps, vit.sample.guidance) == ("heun", 20, 1.5)
    assert (vit.sample.sigma_min, vit.sample.sigma_max, vit.sample.rho) == (0.002, 80.0, 7.0)
    assert vit.parameterization == unet.parameterization == "eps"
    assert vit.schedule == unet.schedule == config.Schedule("cosine_vp", steps=1000)
    assert (unet.sample.classifier, unet.sample.classifier_scale) == ("paper/adm-imagenet64-classifier", 1.0)
    assert not unet.model.null_class and unet.model.head_channels == 64


# Networks from the files' own tensors ---------------------------------------------------------------


def adm_parts(w, emb, heads_of, heads_within):
    """ADM's blocks by its own names, in float64."""

    def norm(h, p):
        return F.group_norm(h, 32, w[f"{p}.weight"], w[f"{p}.bias"], eps=1e-5)

    def conv(h, p):
        kernel = w[f"{p}.weight"]
        return F.conv2d(h, kernel, w[f"{p}.bias"], padding=kernel.shape[-1] // 2)

    def residual(h, p, factor=None):
        z = F.silu(norm(h, f"{p}.in_layers.0"))
        if factor == "down":
            z, h = F.avg_pool2d(z, 2), F.avg_pool2d(h, 2)
        if factor == "up":
            z, h = (m.repeat_interleave(2, 2).repeat_interleave(2, 3) for m in (z, h))
        z = conv(z, f"{p}.in_layers.2")
        condition = F.silu(emb) @ w[f"{p}.emb_layers.1.weight"].T + w[f"{p}.emb_layers.1.bias"]
        scale, shift = condition[:, :, None, None].chunk(2, dim=1)
        z = conv(F.silu(norm(z, f"{p}.out_layers.0") * (1 + scale) + shift), f"{p}.out_layers.3")
        return z + (conv(h, f"{p}.skip_connection") if f"{p}.skip_connection.weight" in w else h)

    def attention(h, p):
        n, c, height, width = h.shape
        heads = heads_of(c)
        qkv = w[f"{p}.qkv.weight"][:, :, 0] @ norm(h, f"{p}.norm").flatten(2) + w[f"{p}.qkv.bias"][:, None]
        if heads_within:
            q, k, v = (part.reshape(n, heads, c // heads, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(n, heads, 3 * c // heads, -1).chunk(3, dim=2)
        share = (q.transpose(2, 3) @ k / math.sqrt(c // heads)).softmax(-1)
        mixed = (v @ share.transpose(2, 3)).reshape(n, c, -1)
        mixed = w[f"{p}.proj_out.weight"][:, :, 0] @ mixed + w[f"{p}.proj_out.bias"][:, None]
        return h + mixed.reshape(h.shape)

    def block(h, p, factor=None):
        """All parts of one of ADM's blocks; its only residual one halves, or its second doubles the side."""
        place = 0
        while f"{p}.{place}.norm.weight" in w or f"{p}.{place}.in_layers.0.weight" in w:
            if f"{p}.{place}.norm.weight" in w:
                h = attention(h, f"{p}.{place}")
            else:
                here = factor == "down" or (factor == "up" and place > 0)
                h = residual(h, f"{p}.{place}", factor if here else None)
            place += 1
        return h

    return norm, conv, block


def adm_embedding(w, t, channels):
    half = channels // 2
    angles = t.double()[:, None] * torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float64) / half
    )
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    emb = F.silu(emb @ w["time_embed.0.weight"].T + w["time_embed.0.bias"])
    return emb @ w["time_embed.2.weight"].T + w["time_embed.2.bias"]


def on_the_way_down(w, x, blocks, conv, block):
    """Maps after each input block, and the middle's; after `blocks` residual blocks comes one that halves."""
    maps = [conv(x, "input_blocks.0.0")]
    last = max(int(name.split(".")[1]) for name in w if name.startswith("input_blocks."))
    for number in range(1, last + 1):
        factor = "down" if number % (blocks + 1) == 0 else None
        maps.append(block(maps[-1], f"input_blocks.{number}", factor))
    return maps, block(maps[-1], "middle_block")


def doubled(path):
    return {name: tensor.double() for name, tensor in torch.load(path, weights_only=True).items()}


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TIMES, LABELS = torch.tensor([0.0, 999.0]), torch.tensor([4, 0])


def test_an_imported_vit_computes_what_the_file_does(small):
    name = "minsnr-vit-l-imagenet64"
    path = released(small, name)
    out = official.import_checkpoint(name, path)
    model = SMALL[name]
    net = runs.load_run(f"paper/{name}").denoiser().net.double()
    reference = ViT(
        dataclasses.replace(model, time_rows=4000), 8, 3, 5
    ).double()  # holds the file's tensors alone
    reference.load_state_dict(doubled(path))
    expected = numpy_vit(reference, X.numpy(), [0, 999], LABELS.tolist(), model.heads)
    with torch.no_grad():
        torch.testing.assert_close(net(X, TIMES, LABELS), torch.from_numpy(expected), rtol=0, atol=1e-9)
    assert out == small / "runs" / "paper" / name


def test_an_imported_unet_computes_what_the_file_does(small):
    name = "adm-imagenet64-unet"
    path = released(small, name)
    official.import_checkpoint(name, path)
    w, model = doubled(path), SMALL[name]
    emb = adm_embedding(w, TIMES, model.channels) + w["label_emb.weight"][LABELS]
    norm, conv, block = adm_parts(w, emb, lambda c: c // model.head_channels, heads_within=True)
    maps, h = on_the_way_down(w, X, model.blocks, conv, block)
    for number in range(len(maps)):
        last_of_level = number % (model.blocks + 1) == model.blocks and number < len(maps) - 1
        h = block(
            torch.cat([h, maps.pop()], dim=1), f"output_blocks.{number}", "up" if last_of_level else None
        )
    expected = conv(F.silu(norm(h, "out.0")), "out.2")[:, :3]
    net = runs.load_run(f"paper/{name}").denoiser().net.double()
    with torch.no_grad():
        torch.testing.assert_close(net(X, TIMES, LABELS), expected, rtol=0, atol=1e-6)  # times are float32


def test_an_imported_classifier_computes_what_the_file_does(small):
    name = "adm-imagenet64-classifier"
    path = released(small, name)
    official.import_checkpoint(name, path)
    w, model = doubled(path), SMALL[name]
    emb = adm_embedding(w, TIMES, model.channels)
    norm, conv, block = adm_parts(w, emb, lambda c: c // model.head_channels, heads_within=False)
    _, h = on_the_way_down(w, X, model.blocks, conv, block)
    tokens = F.silu(norm(h, "out.0")).flatten(2)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + w["out.2.positional_embedding"]
    qkv = w["out.2.qkv_proj.weight"][:, :, 0] @ tokens + w["out.2.qkv_proj.bias"][:, None]
    c = tokens.shape[1]
    heads = c // model.head_channels
    q, k, v = (part.reshape(2, heads, c // heads, -1) for part in qkv.chunk(3, dim=1))
    share = (q.transpose(2, 3) @ k / math.sqrt(c // heads)).softmax(-1)
    mixed = (v @ share.transpose(2, 3)).reshape(2, c, -1)[:, :, 0]
    expected = mixed @ w["out.2.c_proj.weight"][:, :, 0].T + w["out.2.c_proj.bias"]
    net = runs.load_run(f"paper/{name}").classifier().net.double()
    with torch.no_grad():
        torch.testing.assert_close(net(X, TIMES), expected.float(), rtol=0, atol=1e-6)


def small_autoencoder(folder, monkeypatch, **changes):
    """The checkpoint of Stable Diffusion's autoencoder with a small network, and a file of that."""
    monkeypatch.setenv("REPRO_RUNS", str(folder / "runs"))
    monkeypatch.setattr(official, "RELEASED", folder / "released.json")
    known = official.CHECKPOINTS["sd-vae-ft-mse"]
    model = config.Autoencoder(channels=(8, 16), blocks=1, groups=4)
    run = dataclasses.replace(known.config, model=model, data=dataclasses.replace(DATA, resolution=16))
    known = dataclasses.replace(known, config=run, **changes)
    monkeypatch.setitem(official.CHECKPOINTS, "sd-vae-ft-mse", known)
    net = runs.network(run)
    generator = torch.Generator().manual_seed(1)
    state = {
        known.rename(name): torch.randn(t.shape, generator=generator) / math.sqrt(max(1, t[:1].numel()))
        for name, t in net.state_dict().items()
        if name != "scale"
    }
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    net.kl.save_config(folder)
    return folder / "diffusion_pytorch_model.safetensors", type(net.kl)


def test_an_imported_autoencoder_computes_what_diffusers_makes_of_the_file(tmp_path, monkeypatch):
    """diffusers knows the names that its attention once had."""
    path, theirs = small_autoencoder(tmp_path, monkeypatch, published={})
    assert __main__.main(["import", "sd-vae-ft-mse", "--file", str(path)]) == 0
    net = runs.load_run("paper/sd-vae-ft-mse").autoencoder()
    reference = theirs.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference.encode(x).latent_dist.mean
        torch.testing.assert_close(net.encode(x)[0], expected)
        torch.testing.assert_close(net.decode(expected), reference.decode(expected).sample)
    assert float(net.scale) == pytest.approx(0.18215, abs=1e-8)


def test_an_imported_vit_of_latents_draws_what_the_imported_autoencoder_decodes(tmp_path, monkeypatch):
    path, _ = small_autoencoder(tmp_path, monkeypatch, published={})
    official.import_checkpoint("sd-vae-ft-mse", path)
    name = "minsnr-vit-xl-imagenet256"
    known = official.CHECKPOINTS[name]
    run = dataclasses.replace(
        known.config,
        model=SMALL["minsnr-vit-l-imagenet64"],
        data=dataclasses.replace(known.config.data, resolution=8, classes=5),
        sample=config.Sample(steps=2, guidance=1.5),
    )
    monkeypatch.setitem(official.CHECKPOINTS, name, dataclasses.replace(known, config=run))
    official.import_checkpoint(name, released(tmp_path, name))
    recorded = runs.load_run(f"paper/{name}")
    assert recorded.draw([0, 1]).shape == (2, 16, 16, 3)
    assert recorded.record.parameters == sum(p.numel() for p in runs.network(run).parameters())
    decoder = runs.load_run("paper/sd-vae-ft-mse")
    assert decoder.record.parameters == sum(p.numel() for p in decoder.autoencoder().parameters())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (None, r"is not the sd-vae-ft-mse.safetensors that is known: .* not 334,643,276 of a1d993488569e928"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "no whole file of safetensors"),
        (lambda path: torch.save({"x": torch.ones(1)}, path), "no whole file of safetensors"),
    ],
)
def test_another_autoencoder_is_refused(spoil, message, tmp_path, monkeypatch):
    path, _ = small_autoencoder(tmp_path, monkeypatch, **({} if spoil is None else {"published": {}}))
    if spoil:
        spoil(path)
    with pytest.raises(ReproError, match=message):
        official.import_checkpoint("sd-vae-ft-mse", path)
    assert not (tmp_path / "runs").exists() and not official.RELEASED.exists()


# The record -----------------------------------------------------------------------------------------


def test_an_import_is_a_recorded_run_that_says_where_it_comes_from(small, capsys):
    name = "minsnr-vit-l-imagenet64"
    path = released(small, name)
    assert __main__.main(["import", name, "--file", str(path)]) == 0
    assert f"sample paper/{name} --record" in capsys.readouterr().out
    assert (
        __main__.main(
            ["import", "adm-imagenet64-unet", "--file", str(released(small, "adm-imagenet64-unet"))]
        )
        == 0
    )
    assert "import adm-imagenet64-classifier" in capsys.readouterr().out
    guide = "adm-imagenet64-classifier"
    assert __main__.main(["import", guide, "--file", str(released(small, guide))]) == 0
    assert "sample" not in capsys.readouterr().out
    run = runs.load_run(f"paper/{name}")
    state = torch.load(path, weights_only=True)
    assert torch.equal(run.weights()["pos_embed"], state["pos_embed"])  # float32, as they are
    assert torch.equal(run.weights()["time_embedding.weight"], state["time_embedding.weight"][:1000])
    seen = {"url": official.CHECKPOINTS[name].url, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
    assert run.record.imported == seen and run.finished
    assert json.loads(official.RELEASED.read_text())[path.name] == seen
    assert run.draw(range(2)).shape == (2, 8, 8, 3)
    with pytest.raises(ReproError, match="is there already; remove the folder to import"):
        official.import_checkpoint(name, path)


def test_a_grid_of_an_imported_run_says_whose_weights_they_are(small):
    name = "minsnr-vit-l-imagenet64"
    official.import_checkpoint(name, released(small, name))
    for folder in ("notebooks", "paper"):
        (small / folder).mkdir()
    shutil.copy(provenance.ROOT / "notebooks" / "sample_grid.ipynb", small / "notebooks")
    figures = small / "paper" / "figures.toml"
    parameters = f'profile = "paper"\nrun = "{name}"\noutput = "grid"\nrows = 1\ncols = 2\nrecompute = 1\n'
    figures.write_text(
        f'[grid]\nnotebook = "notebooks/sample_grid.ipynb"\ntime_limit = 200\n[grid.parameters]\n{parameters}'
    )
    with pytest.raises(ReproError, match=f"python -m repro sample paper/{name} --record"):
        render.render("grid", figures)
    assert __main__.main(["sample", f"paper/{name}", "--record", "--device", "cpu"]) == 0
    run = runs.load_run(f"paper/{name}")
    line = {
        "images": 0, "samples": 50_000, "first_seed": 1_000_000, "sampler": "heun", "steps": 20,
        "evaluations": 78, "guidance": 1.5, "sample": config.sample_json(run.sample), "precision": "fp32",
        "reference": {"name": "x.npz", "sha256": "0" * 64},
    }  # fmt: skip
    edm = line | {"name": "FID (edm)", "protocol": "edm", "features": "inception_legacy", "value": 2.5}
    for one in (
        edm,
        line | {"name": "FID (clean)", "protocol": "clean", "features": "inception", "value": 3.5},
    ):
        files.append_line(run.path / "metrics.jsonl", one)
    render.render("grid", figures)
    values = json.loads((small / "paper" / "values" / "grid.json").read_text())["values"]
    assert values["run"]["imported"]["url"] == official.CHECKPOINTS[name].url
    assert (values["distance"]["name"], values["distance"]["value"]) == ("FID (edm)", 2.5)
    assert [m["value"] for m in values["curve"]] == [2.5] and values["real_halves"] is None
    assert [row["FID (edm)"] for row in values["samplers"]] == [2.5]


def test_weights_of_a_record_that_git_keeps_without_them_are_restored(small):
    name = "minsnr-vit-l-imagenet64"
    path = released(small, name)
    folder = official.import_checkpoint(name, path)
    assert __main__.main(["sample", f"paper/{name}", "--record", "--device", "cpu"]) == 0
    record = runs.load_run(f"paper/{name}").record
    for file in folder.glob("weights-*"):
        file.unlink()
    with pytest.raises(ReproError, match=f"Restore it .python -m repro import {name}"):
        runs.load_run(f"paper/{name}").weights()
    official.import_checkpoint(name, path)
    assert (
        runs.load_run(f"paper/{name}").record == record
        and len(runs.load_run(f"paper/{name}").samples()) == 64
    )


def test_a_download_that_is_no_such_file_is_not_kept(small, monkeypatch):
    import pooch

    cached = small / "cached.pt"
    cached.write_bytes(b"<html>")
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: str(cached))
    with pytest.raises(ReproError, match="Download it again"):
        official.import_checkpoint("minsnr-vit-l-imagenet64")
    assert not cached.exists()


def test_an_imported_training_does_not_go_on(small):
    name = "minsnr-vit-l-imagenet64"
    official.import_checkpoint(name, released(small, name))
    run = runs.load_run(f"paper/{name}")
    with pytest.raises(ReproError, match="was trained by others"):
        train.check_goes_on(run, run.config, "f")


def test_a_file_must_be_the_one_that_was_seen_first(small):
    name = "minsnr-vit-l-imagenet64"
    path = released(small, name)
    folder = official.import_checkpoint(name, path)
    (folder / "run.json").unlink()
    state = torch.load(path, weights_only=True)
    state["pos_embed"] += 1
    torch.save(state, path)
    with pytest.raises(ReproError, match=r"is not the ema_0.9999_large.pt that is known"):
        official.import_checkpoint(name, path)


def test_a_file_that_moved_is_the_same_and_one_of_which_size_alone_is_published_is_known_by_hash(
    small, monkeypatch
):
    import pooch

    path = small / "a.pt"
    path.write_bytes(b"a")
    seen = official.checked(path, "https://old/a.pt", "a.pt")
    official.remember("a.pt", seen)
    moved = official.checked(path, "https://new/a.pt", "a.pt", {"bytes": 1})
    assert moved == seen | {"url": "https://new/a.pt"}
    asked = []
    monkeypatch.setattr(pooch, "retrieve", lambda url, known, **_: asked.append(known) or str(path))
    for published in ({"bytes": 1}, {"sha256": "f"}, {}, None):
        official.download("https://new/a.pt", "a.pt", "--file", published)
    known = f"sha256:{seen['sha256']}"
    assert asked == [known, "sha256:f", known, known]


def test_the_command_of_the_readme_measures_what_its_run_is_known_by(small, monkeypatch):
    """A line of it is among the run's distances by protocol edm; and a classifier has none."""
    (command,) = re.findall(r"-m repro (evaluate paper/.* --protocol edm.*)", README.read_text())
    words = [word for word in shlex.split(command) if word != "--compile"]
    name = words[1].removeprefix("paper/")
    official.import_checkpoint(name, released(small, name))
    asked = []

    def measured(_, run, *others):
        about = {"images": others[1], "samples": run.evaluate.samples, "first_seed": run.evaluate.first_seed}
        line = {"name": others[-1].title, "value": 2.5, "precision": others[3]}
        return [line | about | {"sample": config.sample_json(run.sample)}]

    def reference(*given):
        asked.append(given)
        return evaluate.ReferenceFile("x.npz", "0", torch.zeros(1), torch.ones(1, 1))

    monkeypatch.setattr(official, "fid_reference", reference)
    monkeypatch.setattr(evaluate, "feature_network", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", measured)
    assert __main__.main([*words, "--device", "cpu"]) == 0
    run = runs.load_run(words[1])
    (line,) = run.distances(run.sample, protocol="edm")
    assert line["precision"] == "fp32" and asked == [("imagenet64", None)]
    guide = "adm-imagenet64-classifier"
    official.import_checkpoint(guide, released(small, guide))
    assert __main__.main(["evaluate", f"paper/{guide}", "--protocol", "edm", "--device", "cpu"]) == 1
    assert len(asked) == 1


class Poison:
    """Runs a command where a pickle of it is loaded carelessly."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def other(state, change):
    return {**state, **change}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p, s: p.unlink(), "there is no file .*; leave out --file to download"),
        (lambda p, s: p.write_bytes(p.read_bytes()[:-2000]), "Download it again"),
        (lambda p, s: p.write_bytes(b""), "Download it again"),
        (lambda p, s: p.write_bytes(b"<html>not found</html>"), "Download it again"),
        (lambda p, s: torch.save({"state": s}, p), "holds no plain state dict"),
        (lambda p, s: torch.save([1, 2], p), "holds no plain state dict"),
        (lambda p, s: torch.save({1: torch.ones(1), **s}, p), "holds no plain state dict"),
        (lambda p, s: torch.save(other(s, {"x": Poison(p.parent / "proof")}), p), "holds more than tensors"),
        (
            lambda p, s: torch.save({f"module.{key}": value for key, value in s.items()}, p),
            "of its tensors .* missing .* and .* unknown",
        ),
        (lambda p, s: torch.save(other(s, {"ema.x": torch.ones(1)}), p), r"of its tensors 1 unknown \(ema.x"),
        (lambda p, s: torch.save({k: v for k, v in s.items() if k != "pos_embed"}, p), "1 missing"),
        (
            lambda p, s: torch.save(other(s, {"pos_embed": s["pos_embed"][:, :-1]}), p),
            r"pos_embed is of shape \(1, 5, 24\), not \(1, 6, 24\)",
        ),
        (
            lambda p, s: torch.save(other(s, {"time_embedding.weight": torch.ones(999, 24)}), p),
            r"time_embedding.weight is of shape \(999, 24\)",
        ),
        (lambda p, s: torch.save(other(s, {"pos_embed": s["pos_embed"] * torch.nan}), p), "is not finite"),
    ],
)  # fmt: skip
def test_files_that_are_not_the_released_one_leave_nothing_behind(small, spoil, message):
    name = "minsnr-vit-l-imagenet64"
    path = released(small, name)
    spoil(path, torch.load(path, weights_only=True))
    with pytest.raises(ReproError, match=message):
        official.import_checkpoint(name, path)
    assert not (small / "runs").exists() and not official.RELEASED.exists() and not (small / "proof").exists()


def test_a_download_that_fails_says_where_the_file_is(small, monkeypatch):
    import pooch

    def fails(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(pooch, "retrieve", fails)
    with pytest.raises(ReproError, match=r"Fetch https://github.com/.*ema_0.9999_large.pt .* --file"):
        official.import_checkpoint("minsnr-vit-l-imagenet64")


def test_an_unknown_checkpoint_names_the_near_and_the_known_ones():
    with pytest.raises(ReproError, match="Did you mean adm-imagenet64-unet"):
        official.import_checkpoint("adm-imagenet64-unett")


def test_the_largest_tensor_of_adms_network_can_be_recorded(tmp_path):
    """It is larger than a file of weights is else."""
    with torch.device("meta"):
        state = runs.network(presets.preset("paper/imagenet64-unet")).state_dict()
    name = max(state, key=lambda key: state[key].numel())
    assert 2 * state[name].numel() > runs.SHARD_BYTES
    tensor = torch.zeros(state[name].shape)
    (file,) = runs.save_weights(tmp_path, {name: tensor}, presets.preset("paper/imagenet64-unet"))
    assert (tmp_path / file).stat().st_size > runs.SHARD_BYTES

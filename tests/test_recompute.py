"""Activation checkpointing: the same step, with less kept for it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from repro import config, plan, presets, runs, train
from repro.__main__ import main
from repro.config import Data, Train
from repro.files import ReproError
from repro.models import recompute, unet, vit

NETWORKS = {
    "vit": config.ViT(patch=4, width=32, depth=3, heads=2),
    "unet": config.UNet(
        channels=32, multipliers=(1, 2), blocks=1, attention=(8,), heads=2, dropout=0.2
    ),
    "unet of convolutions": config.UNet(
        channels=32, multipliers=(1, 1), blocks=1, attention=(), heads=1, resample_in_blocks=False
    ),
    "ldm": config.UNet(
        channels=32, multipliers=(1, 2), blocks=1, attention=(8,), heads=2, scale_shift_norm=False,
        transformer_depth=1, context_width=16, dropout=0.1,
    ),
    "classifier": config.NoisyClassifier(
        channels=32, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16
    ),
}  # fmt: skip
TRAIN = Train(images=64, batch=8, lr=1e-3, precision="fp32", compile=False)


def run_of(name, **changes):
    model = NETWORKS[name]
    parameterization = "eps" if model.kind in config.DRAWS else None
    lab = presets.preset("lab/imagenet64-classifier" if parameterization is None else "lab/imagenet64-unet")
    return dataclasses.replace(
        lab, name=f"lab/{name.split()[0]}", data=Data("drawn", resolution=16, classes=3), model=model,
        train=dataclasses.replace(TRAIN, **changes),
    )  # fmt: skip


def steps_of(run, device, count=3):
    """Losses, gradients of the first step, and all weights after `count` steps."""
    place = train.find_place(device)
    generator = torch.Generator().manual_seed(0)
    side = run.data.resolution
    y = (torch.rand(run.train.batch, 3, side, side, generator=generator) * 2 - 1).to(place.device)
    labels = (torch.arange(run.train.batch) % 3).to(place.device)
    trainer = train.Trainer(run, place)
    with torch.no_grad():  # what starts at zero would hide what comes before it
        for parameter in trainer.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(place.device))
    losses, gradients = [], None
    for step in range(count):
        torch.manual_seed(step)
        numbers = train.draw(run, step, place, torch.Generator(place.device))
        losses.append(float(trainer.train_step(y, labels, numbers)))
        if gradients is None:
            gradients = [p.grad.clone() for p in trainer.parameters if p.grad is not None]
    weights = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.close()
    return losses, gradients, weights


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_that_computes_blocks_again_is_the_step(name):
    plainly, again = (steps_of(run_of(name, recompute=value), "cpu") for value in (False, True))
    # where a convolution halves a map, biases are added before, or after, it is kept for the way up
    exact = name != "unet of convolutions"
    losses, gradients, weights = (0.0, 0.0, 0.0) if exact else (1e-6, 2e-6, 1e-4)
    assert again[0] == pytest.approx(plainly[0], rel=losses, abs=0) and plainly[0][0] != plainly[0][1]
    for one, other, limit in zip(plainly[1:], again[1:], (gradients, weights), strict=True):
        one, other = (torch.cat([tensor.flatten() for tensor in each]) for each in (one, other))
        assert (one - other).norm() <= limit * one.norm()
    assert all(gradient.any() for gradient in again[1][:3])


BLOCKS = {"vit": (vit.Block, 3), "unet": (unet.Step, 8), "classifier": (unet.Step, 4)}
"""What is computed again, and how many a network has. With two levels of one block the way down has three
steps, of which one halves the side, the middle is one, and the way up has two for each level."""


@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_is_computed_twice_in_training_alone(name, monkeypatch):
    kind, count = BLOCKS[name]
    calls, forward = [], kind.forward

    def counted(self, *given, **named):
        calls.append(self)
        return forward(self, *given, **named)

    monkeypatch.setattr(kind, "forward", counted)
    for again in (False, True):
        calls.clear()
        steps_of(run_of(name, recompute=again), "cpu", count=1)
        assert len(calls) == (2 if again else 1) * count and len(set(map(id, calls))) == count
    net = runs.network(run_of(name))
    recompute.allow(net, True)
    labels = [] if name == "classifier" else [torch.tensor([0, 3])]
    for training, gradient, times in [(False, True, 1), (True, False, 1), (True, True, 2)]:
        calls.clear()
        with torch.set_grad_enabled(gradient):
            out = net.train(training)(torch.zeros(2, 3, 16, 16), torch.zeros(2), *labels)
            if gradient:
                out.sum().backward()
        assert len(calls) == times * count


def test_a_network_that_cannot_is_refused():
    lab = presets.preset("lab/imagenet64-autoencoder")
    run = dataclasses.replace(lab, train=dataclasses.replace(lab.train, recompute=True))
    with pytest.raises(ReproError, match="a KLAutoencoder cannot compute .* take train.micro_batch"):
        train.Trainer(run, train.find_place("cpu"))


def test_what_a_gpu_could_not_capture_is_refused_by_a_dry_run_too(capsys):
    command = ["train", "lab/imagenet64-unet", "--dry-run", "--train.recompute", "--train.no-compile"]
    assert main(command) == 1
    assert "need train.compile: what draws" in (found := capsys.readouterr()).err and not found.out
    assert "give --train.no-cuda-graphs too" in found.err
    for more in (["--train.no-cuda-graphs"], ["--device", "cpu"]):
        assert main([*command, *more]) == 0
        assert "lab/imagenet64-unet" in capsys.readouterr().out
    run = run_of("unet", recompute=True, cuda_graphs=True)
    with pytest.raises(ReproError, match="need train.compile: .* give --train.no-cuda-graphs too"):
        train.Trainer(run, train.Place(0, 1, torch.device("cuda")))  # before anything is on a GPU
    train.Trainer(run, train.find_place("cpu"))  # where nothing is captured
    compiled = run_of("unet", recompute=True, cuda_graphs=True, compile=True)
    train.check_captured(compiled.train)
    train.Trainer(compiled, train.find_place("cpu"))


def test_theorem_1_s_weights_are_found_of_a_network_that_computes_blocks_again():
    """By per-sample gradients, which cannot go through what is computed again."""
    found = []
    for again in (False, True):
        run = run_of("vit", recompute=again)
        weight = config.Weight("ugd", bins=4, probe_images=8, every_images=8)
        trainer = train.Trainer(dataclasses.replace(run, weight=weight), train.find_place("cpu"))
        y = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        trainer.balance(y, torch.arange(8) % 3)
        assert trainer.balanced and trainer.net.training
        found.append(trainer.weight.values)
    assert torch.equal(*found) and len(set(found[0].tolist())) > 1


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {
    "vit": NETWORKS["vit"],
    "unet": config.UNet(channels=32, multipliers=(1,), blocks=1, attention=(), heads=1),
}


@pytest.mark.parametrize("name, most, times", [("vit", 0.2, 2), ("unet", 0.3, 1.7)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_compiled_too_less_is_kept_but_what_enters_blocks(name, most, times, device, unchecked, inductor):
    """What comes before and after the blocks, and weights with their numbers in another order, come on top.
    Of these networks, on a CPU, without our copies and policy too: what those are for shows in blocks by our
    kernels, as on a GPU (see also test_vit)."""
    given = [torch.rand(64, 3, 16, 16), torch.arange(64.0), torch.arange(64) % 3]
    given = [tensor.to(device) for tensor in given]
    found = []
    for again in (False, True):
        run = dataclasses.replace(run_of(name, recompute=again), model=SMALL[name])
        net = runs.network(run).to(device, memory_format=torch.channels_last)
        recompute.allow(net, again)
        kept = plan.Kept(plan.storages_of(net))
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=inductor)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
                compiled(*given)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                compiled(*given)
        found.append(kept.bytes)
    entering, given_on = plan.Kept(plan.storages_of(net)), []

    def note(function, *given):
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                entering(tensor)
        out = function(*given)
        given_on.extend(tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor))
        return out

    with recompute.by(note), torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        net(*given)
    assert len(entering.tensors) > 2
    copies = [event for event in profile.events() if event.name == "repro::copy"]
    blocks = [module for module in net.modules() if isinstance(module, BLOCKS[name][0])]
    assert len(copies) == len(given_on) <= 2 * len(blocks)  # a map and its offset; z, and perhaps a branch
    assert 0 < found[1] < most * found[0]
    assert entering.bytes <= found[1] < (2 if device == "cuda" else times) * entering.bytes
    assert found[1] < plan.kept_for_backward(run, 64)


class Dropping(torch.nn.Module):
    """Blocks that multiply by weights, and drop half of what comes of it."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.linspace(0.5, 1.5, 3 * 64).view(3, 1, 64))

    def forward(self, x):
        for weight in self.weights:
            x = recompute.block(True, lambda x, weight: F.dropout(x * weight, 0.5), x, weight)
        return x


def test_compiled_too_random_numbers_are_those_of_the_first_call(unchecked, inductor):
    """What comes out is proportional to each weight with the same numbers dropped, so that the sum of it is
    that of each block's weights times their gradients. Kept are what enters blocks and seeds, not masks."""
    net = Dropping()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=inductor)
    sums = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        net.zero_grad()
        kept = plan.Kept(plan.storages_of(net))
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            y = compiled(torch.ones(16, 64))
        y.sum().backward()
        torch.testing.assert_close((net.weights.grad * net.weights).sum((1, 2)), y.sum().expand(3))
        assert 0.05 < (y != 0).float().mean() < 0.25
        sums.add(y.sum().item())
    assert len(sums) == 2
    assert sorted(tensor.numel() for tensor in kept.tensors) == [3, *3 * [16 * 64]]


@GPU
@pytest.mark.parametrize(
    "name, compiled", [("vit", False), ("unet", False), ("ldm", False), ("vit", True), ("unet", True)]
)
def test_on_a_gpu_the_step_is_the_same_and_takes_less_memory(name, compiled, unchecked):
    size = {"vit": {"width": 192, "depth": 6}}.get(name, {"channels": 64, "attention": (32,)})
    found, peaks = [], []
    for again in (False, True):
        how = {"precision": "bf16", "compile": compiled, "cuda_graphs": compiled, "batch": 64}
        run = run_of(name, recompute=again, **how)
        run = dataclasses.replace(
            run, model=dataclasses.replace(run.model, **size), data=Data("drawn", resolution=64, classes=3)
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(steps_of(run, "cuda", count=6))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one == pytest.approx(other, rel=1e-2)
    of_first = [torch.cat([gradient.flatten() for gradient in each[1]]) for each in found]
    assert (of_first[0] - of_first[1]).norm() < 1e-2 * of_first[0].norm()
    assert peaks[1] < 0.8 * peaks[0]

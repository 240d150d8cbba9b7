"""What a training will take, told before it is started: steps, memory and arithmetic, from shapes alone.

Networks are built of tensors without content, so that those of the paper profile can be planned anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repro import bench, config, presets, runs, sample, train
from repro.files import ReproError
from repro.models import recompute


@dataclass(frozen=True)
class Plan:
    """What one process of a training holds and does."""

    parameters: int
    images: int
    """Images that are trained on in all: whole steps, so up to a batch more than asked for."""
    steps: int
    processes: int
    share: int
    """Images of a step that each process takes."""
    at_once: int
    """Images that it takes through the network at once."""
    state: dict[str, int]
    """Bytes of what a process holds all the time, exactly: weights, gradients, Adam, averages, all-reduce."""
    kept: int
    """Bytes kept of `at_once` images for the backward pass (see `kept_for_backward`)."""
    forward_flops: float
    """FLOPs of a forward pass of one image, two a multiply-add (see `bench.forward_flops`)."""


def plan(run: config.Config, processes: int = 1) -> Plan:
    """What `run` takes on so many processes; needs neither its data nor its memory, and writes nothing.

    Raises `ReproError` for a batch that does not divide (see `train.shares`), and for sizes of a network that
    do not fit each other.
    """
    share, at_once = train.shares(run.train, processes)
    steps = math.ceil(run.train.images / run.train.batch)
    with torch.device("meta"):
        tensors = list(runs.network(run).parameters())
    # linear in the images, but for the copies of weights that autocast makes
    one, two = (kept_for_backward(run, images) for images in (1, 2))
    return Plan(
        parameters=sum(tensor.numel() for tensor in tensors),
        images=steps * run.train.batch,
        steps=steps,
        processes=processes,
        share=share,
        at_once=at_once,
        state=state_bytes(tensors, 1 + len(run.train.also_ema_halflife_images), processes),
        kept=one + (at_once - 1) * (two - one),
        forward_flops=bench.forward_flops(run),
    )


def state_bytes(parameters: list[Tensor], averages: int, processes: int) -> dict[str, int]:
    """Bytes of what a process holds besides activations, by kind, for parameters of any device.

    Adam keeps two moments of each parameter, and counts its steps in a float32 for each tensor. Where there
    are several processes, gradients are copied to be summed over them. Images are not counted.
    """
    weights = sum(tensor.nbytes for tensor in parameters)
    state = {
        "weights": weights,
        "gradients": weights,
        "Adam": 2 * weights + 4 * len(parameters),
        "averages": averages * weights,
    }
    return state | ({"all-reduce": weights} if processes > 1 else {})


def kept_for_backward(run: config.Config, images: int) -> int:
    """Bytes that plain PyTorch keeps of a forward pass of so many images for the backward pass, without the
    parameters themselves: an estimate of the memory of activations.

    Counted on tensors without content, each storage once. Of what is computed again (`train.recompute`):
    what enters it, and the largest of them, as the backward pass has it back. A compiled UNet, with our
    kernels (`repro.models.norm_kernels`), keeps about half, or most of it where it is computed again; a ViT
    all of it. Gradients of activations and workspaces come on top.
    """
    with bench.without_content(run, images) as (net, inputs):
        recompute.allow(net, run.train.recompute)
        own = storages_of(net)
        kept, largest = Kept(own), 0

        def again(function, *given):
            nonlocal largest
            for tensor in tree_leaves(given):
                if isinstance(tensor, Tensor):
                    kept(tensor)
            within = Kept(own | set(kept.storages))
            with torch.autograd.graph.saved_tensors_hooks(within, lambda tensor: tensor):
                out = function(*given)
            largest = max(largest, within.bytes)
            return out

        with (
            torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor),
            recompute.by(again),
            sample.autocast("cpu", run.train.precision),
        ):
            net(*inputs)
    return kept.bytes + largest


class Kept:
    """A hook for saved tensors that notes their storages, each once, but for some that are known by address;
    and keeps the tensors, so that no address is taken twice."""

    def __init__(self, known: set[int]):
        self.known, self.storages, self.tensors = known, {}, []

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage.nbytes()
            self.tensors.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        """Of all these storages."""
        return sum(self.storages.values())


def storages_of(net: nn.Module) -> set[int]:
    """Addresses of the storages of a network's parameters."""
    return {parameter.untyped_storage()._cdata for parameter in net.parameters()}


@dataclass(frozen=True)
class Rate:
    """Arithmetic that a recorded training reached on each of its GPUs."""

    flops: float
    """A second, of three forward passes an image, each as the network is defined."""
    device: str
    run: str


def rate_of(kind: str) -> Rate | None:
    """The fastest recorded training of such a network, by arithmetic a second; none where there is none.

    Over whole trainings, compilation included; those that stopped and went on count where all parts ran on as
    many GPUs of one model. Those on a CPU do not count.
    """
    known: dict[tuple, float] = {}
    best = None
    for name in runs.names():
        run = runs.load_run(name)
        how, record = run.config, run.record
        places = {(part.device, part.processes) for part in record.sessions}
        if (how.model.kind, len(places)) != (kind, 1) or record.imported or record.device == "cpu":
            continue
        key = (how.model, how.data.resolution, how.data.channels, how.data.classes)
        if key not in known:
            known[key] = bench.forward_flops(how)
        flops = 3 * known[key] * record.images / (record.seconds * record.processes)
        if best is None or flops > best.flops:
            best = Rate(flops, record.device, name)
    return best


def costs(profile: str) -> list[dict]:
    """What each preset of a profile takes, a row each: sizes, steps, memory, and GPU-hours.

    Bytes of state are of one of one process; those of activations are of an image (see `Plan`). GPU-hours are
    what the training's arithmetic takes at the rate of the fastest recorded one of a network of its kind (see
    `rate_of`), so without evaluations, and of a network of other sizes.
    """
    rates: dict[str, Rate | None] = {}
    rows = []
    for name, run in presets.PRESETS.items():
        if not name.startswith(f"{profile}/"):
            continue
        found = plan(run)
        kind = run.model.kind
        if kind not in rates:
            rates[kind] = rate_of(kind)
        flops = 3 * found.forward_flops * found.images
        rows.append(
            {
                "preset": name,
                "parameters": found.parameters,
                "forward_flops": found.forward_flops,
                "batch": run.train.batch,
                "steps": found.steps,
                "state_bytes": sum(found.state.values()),
                "kept_bytes": found.kept // found.at_once,
                "gpu_hours": rates[kind] and flops / rates[kind].flops / 3600,
                "rate": rates[kind],
            }
        )
    return rows


def tell_costs(profile: str) -> str:
    """`costs` as lines of text; raises `ReproError` for a profile without presets."""
    rows = costs(profile)
    if not rows:
        raise ReproError(f"there are no presets of a profile {profile!r}; there are lab and paper")
    form = "{:<38} {:>11} {:>13} {:>6} {:>9} {:>9} {:>13} {:>9}"
    lines = [
        form.format("preset", "parameters", "GFLOP/image", "batch", "steps", "state", "an image", "GPU-hours")
    ]
    for row in rows:
        hours = "unknown" if row["gpu_hours"] is None else f"{row['gpu_hours']:,.1f}"
        lines.append(
            form.format(
                row["preset"], f"{row['parameters'] / 1e6:,.1f}M", f"{row['forward_flops'] / 1e9:,.1f}",
                row["batch"], f"{row['steps']:,}", _gib(row["state_bytes"]),
                f"{row['kept_bytes'] / 2**20:,.0f} MiB", hours,
            )
        )  # fmt: skip
    lines += [
        "",
        "GFLOP/image: of a forward pass, two a multiply-add. State: weights, gradients, Adam and averages",
        "of a process. An image: what plain PyTorch keeps of it for the backward pass; compiled UNets, less.",
        "GPU-hours: the arithmetic of training alone, at the rate of a recorded training of such a network:",
    ]
    for rate in {row["rate"] for row in rows if row["rate"]}:
        lines.append(f"  {rate.flops / 1e12:,.0f} TFLOP/s on a {rate.device}, {rate.run}")
    return "\n".join(lines)


def describe(run: config.Config, plan: Plan) -> str:
    """A plan of `run` in a few lines of text."""
    times = f"{plan.share // plan.at_once} times " if plan.at_once < plan.share else ""
    state = ", ".join(f"{name} {_gib(size)}" for name, size in plan.state.items())
    averages = 1 + len(run.train.also_ema_halflife_images)
    passes = 4 if run.train.recompute else 3  # forward, perhaps again, and twice backward
    lines = {
        "network": f"{run.model.kind}, {plan.parameters:,} parameters, {run.train.precision}",
        "training": f"{plan.steps:,} steps of {run.train.batch:,} images, {plan.images:,} images",
        "processes": f"{plan.processes}, each {times}{plan.at_once:,} images at once a step",
        "state": f"{_gib(sum(plan.state.values()))} a process ({state}; averages: {averages})",
        "activations": f"about {_gib(plan.kept)} of {plan.at_once:,} images at once"
        + (", by plain PyTorch; compiled, less" if run.model.kind != "vit" else ""),
        "arithmetic": f"{plan.forward_flops / 1e9:,.2f} GFLOP a forward pass of an image; a step is about "
        f"{passes * plan.forward_flops * run.train.batch / 1e12:,.2f} TFLOP over all processes",
    }
    return "\n".join([run.name, *(f"  {name:<12} {text}" for name, text in lines.items())])


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"

"""Training: from a prepared data set to a recorded run, resumed by itself after a kill.

Randomness is a function of (seed, step): data order, noise levels, noise, flips and dropped labels
are drawn for the whole batch and each process takes its share. So a resumed run, or one on another
number of processes, sees the same numbers (but for dropout, which each process draws for itself, anew
for each micro-batch); on CPU a resumed run is bit for bit the uninterrupted one.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repro import (
    config,
    cuda_graph,
    data,
    evaluate,
    files,
    latents,
    pareto,
    provenance,
    runs,
    sample,
    schedules,
    weights,
)
from repro.files import ReproError
from repro.models import recompute

STATE = "state.safetensors"

MAY_CHANGE = ("train.images", "record_weights", "note", *runs.EXECUTION)
"""Settings that a resumed run may have changed, besides everything under `evaluate` and `sample`."""


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`: independent streams from one run seed."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def learning_rate(train: config.Train, images: int) -> float:
    """The learning rate `images` images after the optimizer began: linear warm-up, then constant."""
    return train.lr * min(1.0, images / train.warmup_images) if train.warmup_images else train.lr


def ema_decay(train: config.Train, images: int, halflife: float | None = None) -> float:
    """What one step keeps of the average after `images` images, in [0, 1).

    Half of what is averaged is younger than the half-life, which is at most `ema_rampup` times the
    images seen so far (Karras et al. 2022, their training code's EMA ramp-up). halflife: in images; by
    default that of the main average.
    """
    halflife = halflife or train.ema_halflife_images
    if train.ema_rampup is not None:
        halflife = min(halflife, train.ema_rampup * images)
    return 0.5 ** (train.batch / max(halflife, 1e-8))


def shares(train: config.Train, world: int) -> tuple[int, int]:
    """Images of a step that each of `world` processes takes, and how many of them it takes at once.

    Raises `ReproError` where the batch does not divide among the processes, or a process's share of it into
    micro-batches.
    """
    if train.batch % world:
        raise ReproError(f"a batch of {train.batch} cannot be shared by {world} processes")
    share = train.batch // world
    at_once = train.micro_batch or share
    if share % at_once:
        raise ReproError(
            f"train.micro_batch is {at_once}, which does not divide the {share} images that each of {world} "
            f"processes takes of a batch of {train.batch}; choose a divisor of {share}"
        )
    return share, at_once


@dataclass(frozen=True)
class Place:
    """Where this process runs among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0


def find_place(device: str | None = None) -> Place:
    """This process's rank and device; joins the process group where `torchrun` started several.

    float32 means float32 from here on: TF32, PyTorch's default for convolutions on a GPU, is off
    (but for bf16 training steps, see `Trainer`).
    """
    torch.backends.cudnn.allow_tf32 = False
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        known = torch.device(kind).type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise ReproError(f"unknown device {kind!r}; known are cpu, cuda and cuda:N")
    if torch.device(kind).type == "cuda" and not torch.cuda.is_available():
        raise ReproError(f"the device {kind} was asked for, but torch sees no GPU; use --device cpu")
    if world > 1:
        if kind.startswith("cuda:"):
            raise ReproError(f"--device {kind} would put all processes on one GPU; use --device cuda")
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    place = Place(rank, world, torch.device(kind))
    if place.device.type == "cuda" and place.device.index is not None:
        torch.cuda.set_device(place.device)  # where streams and graphs go
    if world > 1:
        torch.distributed.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
    return place


def check_captured(settings: config.Train) -> None:
    """Raise `ReproError` where a GPU could not capture a step of these settings as a graph."""
    if settings.recompute and settings.cuda_graphs and not settings.compile:
        raise ReproError(
            "on a GPU, train.recompute and train.cuda_graphs need train.compile: what draws random numbers "
            "again cannot be captured; give --train.no-cuda-graphs too (or, for a CPU, --device cpu)"
        )


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow convolutions in float32 to use TF32 on a GPU, or not, within a block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Batches:
    """Training batches: image indices, images and labels for each step, on one process's device.

    indices: positions in the data set that are trained on. Each epoch is a new permutation of them. learned:
    by default its images (see `latents.of_run`). resident: whether all of them are kept on the GPU; by
    default where they take less than a quarter of its memory.
    """

    def __init__(
        self,
        real: data.Dataset,
        indices: np.ndarray,
        train: config.Train,
        place: Place,
        learned: Shaped[np.ndarray, "all *shape"] | None = None,
        resident: bool | None = None,
    ):
        self.real, self.indices, self.train, self.place = real, indices, train, place
        self.learned = real.images if learned is None else learned
        self.epochs: dict[int, np.ndarray] = {}
        self.resident = None
        if resident is None and place.device.type == "cuda":
            resident = self.learned.nbytes < torch.cuda.mem_get_info(place.device)[0] / 4
        if resident:
            self.resident = torch.from_numpy(np.array(self.learned)).to(place.device)

    def rows(self, step: int) -> Int[np.ndarray, " batch"]:
        """Positions in the data set of the whole batch of step `step` (counted from 0)."""
        n, batch = len(self.indices), self.train.batch
        wanted = np.arange(step * batch, (step + 1) * batch)
        rows = np.empty(batch, dtype=np.int64)
        for epoch in np.unique(wanted // n):
            inside = wanted // n == epoch
            rows[inside] = self._order(int(epoch))[wanted[inside] % n]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self.epochs:
            generator = torch.Generator().manual_seed(seed_of(self.train.seed, "order", epoch))
            order = torch.randperm(len(self.indices), generator=generator).numpy()
            self.epochs = {epoch: self.indices[order]}
        return self.epochs[epoch]

    def fetch(self, step: int) -> tuple[Float[Tensor, "n *shape"], Int[Tensor, " n"] | None]:
        """This process's part of step `step`, float32: images in [-1, 1], or moments; and their labels."""
        share = self.train.batch // self.place.world
        rows = self.rows(step)[self.place.rank * share : (self.place.rank + 1) * share]
        if self.resident is not None:
            images = self.resident[torch.from_numpy(rows).to(self.place.device)]
        else:
            images = torch.from_numpy(data.rows_of(self.learned, rows)).to(self.place.device)
        labels = None
        if self.real.labels is not None:
            labels = torch.from_numpy(self.real.labels[rows]).to(self.place.device)
        return sample.from_uint8(images) if images.dtype == torch.uint8 else images.float(), labels


@dataclass
class Draws:
    """The random numbers of one step, for one process's share of the batch."""

    uniform: Float[Tensor, " n"]
    noise: Float[Tensor, "n c h w"]
    flip: Tensor
    drop: Tensor
    latent: Float[Tensor, "n c h w"] | None = None
    """Noise by which latents are drawn from their distribution, where they are learned."""


def draw(run: config.Config, step: int, place: Place, generator: torch.Generator) -> Draws:
    """The random numbers of step `step`: drawn for the whole batch, then this process's share of them.

    Also seeds the default generators, which dropout uses.
    """
    batch, share = run.train.batch, run.train.batch // place.world
    mine = slice(place.rank * share, (place.rank + 1) * share)
    generator.manual_seed(seed_of(run.train.seed, "step", step))
    torch.manual_seed(seed_of(run.train.seed, "dropout", step, place.rank))
    shape = (batch, run.data.channels, run.data.resolution, run.data.resolution)
    options = {"device": place.device, "generator": generator}
    uniform = torch.rand(3, batch, **options)
    noise = torch.randn(shape, **options)
    latent = torch.randn(shape, **options)[mine] if run.data.autoencoder else None
    return Draws(
        uniform[0, mine], noise[mine], uniform[1, mine] < 0.5, uniform[2, mine] < run.train.label_drop, latent
    )


class GradientMean:
    """The mean of all processes' gradients, by one all-reduce after the backward pass.

    Where a step is captured as a CUDA graph, this takes the place of DistributedDataParallel, whose hooks,
    which reduce gradients while others are still computed, belong to each launch of a backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        first, sizes = self.parameters[0], [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self.shares = [
            part.as_strided(p.shape, p.stride())  # as it lies in memory, channels-last or not
            for part, p in zip(self.flat.split(sizes), self.parameters, strict=True)
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Replace each parameter's gradient; one without any, which must be so everywhere, stays without."""
        found = [
            (p, share) for p, share in zip(self.parameters, self.shares, strict=True) if p.grad is not None
        ]
        torch._foreach_copy_([share for _, share in found], [p.grad for p, _ in found])
        torch.distributed.all_reduce(self.flat)
        self.flat /= torch.distributed.get_world_size()
        for p, share in found:
            p.grad = share


LARGE = 2**18
"""Numbers from which on a tensor is worth a kernel of its own."""


def follow(average: list[Tensor], parameters: list[Tensor], share: Float[Tensor, ""]) -> None:
    """Move each average by `share` of the way to its parameter, in place; nothing waits for a GPU.

    Large tensors in one pass each, the many small ones together in three.
    """
    small = []
    for mean, parameter in zip(average, parameters, strict=True):
        if parameter.numel() >= LARGE:
            mean.lerp_(parameter, share)
        else:
            small.append((mean, parameter))
    if small:
        means, some = zip(*small, strict=True)
        changes = torch._foreach_sub(some, means)
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(means, changes)


class Trainer:
    """Everything that a step changes, and how it is saved and restored.

    Raises `ReproError` for a batch that does not divide (see `shares`), and see `check_captured`.
    """

    def __init__(
        self,
        run: config.Config,
        place: Place,
        fingerprint: str = "",
        encoded: dict[str, str] | None = None,
    ):
        on_gpu = place.device.type == "cuda"
        if on_gpu:
            check_captured(run.train)
        self.run, self.place, self.fingerprint = run, place, fingerprint
        self.encoded = encoded or {}
        """Of latents, what `latents.verify` says."""
        self.at_once = shares(run.train, place.world)[1]
        torch.manual_seed(seed_of(run.train.seed, "init"))
        self.denoiser = runs.build(run).to(place.device, memory_format=torch.channels_last)
        self.net = self.denoiser.net
        recompute.allow(self.net, run.train.recompute)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        # on the device, so that a captured step reads what each step sets
        self.lr = torch.tensor(run.train.lr, device=place.device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=self.lr if on_gpu else run.train.lr,
            betas=run.train.betas,
            weight_decay=run.train.weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self.weight = None
        if run.model.kind in config.DRAWS:
            self.weight = weights.of_run(run, self.denoiser.parameterization)
        self.balance_every, self.balanced = 0, False
        """Steps after which a weight `ugd` is computed anew, 0 for all others; and whether it was yet."""
        if run.weight.name == "ugd" and self.weight is not None:
            if run.weight.probe_images > run.train.batch // place.world:
                raise ReproError(
                    f"weight.probe_images is {run.weight.probe_images}, more than the "
                    f"{run.train.batch // place.world} images that a process has of a batch"
                )
            self.weight = self.weight.to(place.device)
            self.balance_every = max(1, round(run.weight.every_images / run.train.batch))
        self.step, self.seconds = 0, 0.0
        self.stopped = False
        """Whether the state is that of a time limit, and so to be measured."""
        self.sessions: list[runs.Session] = []

        self.graphs = run.train.cuda_graphs and on_gpu
        self.captured: cuda_graph.Captured | None = None
        net = runs.compiled(self.net) if run.train.compile else self.net
        self.average_gradients = None
        if place.world > 1 and (self.graphs or run.train.micro_batch):
            self.average_gradients = GradientMean(self.net.parameters())
        elif place.world > 1:
            device_ids = [place.device.index] if place.device.type == "cuda" else None
            net = DistributedDataParallel(net, device_ids=device_ids)
        self.denoiser.net = net
        ema = runs.compiled(self.ema) if run.train.compile else self.ema
        self.ema_denoiser = self.denoiser.with_net(ema)
        self.ema_parameters = list(self.ema.parameters())
        self.parameters = list(self.net.parameters())
        self.averages: dict[float, list[Tensor]] = {run.train.ema_halflife_images: self.ema_parameters}
        """By half-life, tensors as in `parameters`: the main one, which is that of `ema`, and the others."""
        for halflife in run.train.also_ema_halflife_images:
            self.averages[halflife] = [parameter.clone() for parameter in self.ema_parameters]
        self.ema_shares = [torch.tensor(0.0, device=place.device) for _ in self.averages]
        self.norms = torch.zeros(2, device=place.device)
        """Sums over the steps since it was last zeroed: the gradient's norm, and whether that was clipped."""

    @property
    def images(self) -> int:
        """Images seen so far."""
        return self.step * self.run.train.batch

    @property
    def rate(self) -> float:
        """The learning rate of the step that ends at `images`."""
        began = [session.first_image for session in self.sessions if session.from_run]
        return learning_rate(self.run.train, self.images - (began[-1] if began else 0))

    def loss(
        self,
        denoiser: runs.Joined,
        y: Tensor,
        noise: Tensor,
        uniform: Tensor,
        labels: Tensor | None,
    ) -> Float[Tensor, " n"]:
        """The weighted loss of each image at the noise levels that `uniform` draws."""
        return self.loss_at(denoiser, y, noise, denoiser.schedule.draw(uniform), labels)

    def loss_at(
        self,
        denoiser: runs.Joined,
        y: Tensor,
        noise: Tensor,
        sigma: Tensor,
        labels: Tensor | None,
    ) -> Float[Tensor, " n"]:
        """The weighted loss of each image at its noise level, in the precision of the training."""
        with sample.autocast(self.place.device, self.run.train.precision):
            return denoiser.loss(y, noise, sigma, labels, self.weight)

    def train_step(self, y: Tensor, labels: Tensor | None, numbers: Draws) -> Float[Tensor, ""]:
        """One optimizer step on this process's share of a batch; returns its mean loss (on the device)."""
        train = self.run.train
        if self.run.data.autoencoder:
            mirrored = numbers.flip if self.run.data.flip else torch.zeros_like(numbers.flip)
            y = latents.drawn(y, mirrored, numbers.latent)
        elif self.run.data.flip:
            y = torch.where(numbers.flip[:, None, None, None], y.flip(3), y)
        if not self.run.data.classes:
            labels = None
        elif train.label_drop:
            labels = torch.where(numbers.drop, self.run.data.classes, labels)
        y = y.contiguous(memory_format=torch.channels_last)
        noise = numbers.noise.contiguous(memory_format=torch.channels_last)
        self.step += 1
        seen, rate = self.images, self.rate
        for share, halflife in zip(self.ema_shares, self.averages, strict=True):
            share.fill_(1 - ema_decay(train, seen, halflife))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        given = (y, noise, numbers.uniform) + (() if labels is None else (labels,))
        return self._replay(given) if self.graphs else self._update(*given)

    def balance(self, y: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None) -> None:
        """Give the bins of a weight `ugd` Theorem 1's weights (or, with a ridge, more even ones).

        By the first images of process 0's batch.

        Of losses in x0, scaled to a mean of 1. By the network itself, not its average, without dropout,
        dropped labels and mirrored images.
        """
        count = self.run.weight.probe_images
        if self.run.data.autoencoder:
            y = latents.plain(y)
        if self.place.first:
            generator = torch.Generator(self.place.device)
            generator.manual_seed(seed_of(self.run.train.seed, "balance", self.step))
            options = {"device": self.place.device, "generator": generator}
            noise, uniform = torch.randn(y[:count].shape, **options), torch.rand(count, **options)
            known = labels[:count] if self.run.data.classes else None
            self.net.eval()
            try:
                plain = self.denoiser.with_net(self.net)
                weight = self.run.weight
                found = pareto.of_bins(
                    plain, y[:count], noise, uniform, weight.bins, known, chunk=1, ridge=weight.ridge or 0.0
                )
            finally:
                self.net.train()
            self.weight.values.copy_(found.weights * len(found.weights))  # in place: a captured step reads it
        if self.place.world > 1:
            torch.distributed.broadcast(self.weight.values, 0)
        self.balanced = True

    def _update(
        self, y: Tensor, noise: Tensor, uniform: Tensor, labels: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Loss, gradients, optimizer and averages: all on the device, with nothing that waits for it."""
        self.optimizer.zero_grad(set_to_none=True)
        given = [tensor.split(self.at_once) for tensor in (y, noise, uniform)]
        given.append([None] * len(given[0]) if labels is None else labels.split(self.at_once))
        total = 0.0
        # in bf16, the last convolution, which stays in float32, may drop all but 10 bits: 3 more than bf16
        with tf32(self.run.train.precision == "bf16"):
            for part in zip(*given, strict=True):
                loss = self.loss(self.denoiser, *part).mean() / len(given[0])
                loss.backward()
                total = total + loss.detach()
        if self.average_gradients:
            self.average_gradients()
        largest = math.inf if self.run.train.grad_clip is None else self.run.train.grad_clip
        norm = nn.utils.clip_grad_norm_(self.parameters, largest)
        self.norms.add_(torch.stack([norm, norm > largest]))
        self.optimizer.step()
        with torch.no_grad():
            for share, average in zip(self.ema_shares, self.averages.values(), strict=True):
                follow(average, self.parameters, share)
        return total

    def _replay(self, given: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """`_update` as one CUDA graph, captured after a few steps: launching its kernels costs nothing.

        The graph reads its inputs, learning rate and EMA shares from fixed places on the device; dropout
        follows the default generator's seed as set before each replay. Capturing changes no weights.
        """
        self.captured = self.captured or cuda_graph.Captured(self._update)
        if self.captured.graph is None:  # or gradients of the last step would lie outside the graph's memory
            self.optimizer.zero_grad(set_to_none=True)
        return self.captured(*given)

    def close(self) -> None:
        """Let go of the captured step: a process group whose reductions it holds could not be left."""
        if self.captured is not None:
            torch.cuda.synchronize(self.place.device)
            self.captured = None

    @contextmanager
    @torch.no_grad()
    def averaged(self, halflife: float) -> Iterator[None]:
        """Within a block `ema` and `ema_denoiser` have the average of that half-life, one of `averages`.

        So one network, compiled once, measures and records them all. No step may be made in the block.
        """
        main = [parameter.clone() for parameter in self.ema_parameters]
        torch._foreach_copy_(self.ema_parameters, self.averages[halflife])
        try:
            yield
        finally:
            torch._foreach_copy_(self.ema_parameters, main)

    def save_state(self, path: Path) -> None:
        """Write all of the state, atomically: a killed run goes on from here."""
        tensors = {}
        for name, parameter in self.net.named_parameters():
            tensors[f"net.{name}"] = parameter
            tensors |= {
                f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()
            }
        for prefix, average in self._averages_by_prefix():
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in average.items()}
        if self.balance_every:
            tensors["weight.values"] = self.weight.values
        plain = {name: tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
                 for name, tensor in tensors.items()}  # fmt: skip
        if broken := [name for name, tensor in plain.items() if not tensor.isfinite().all()]:
            raise ReproError(
                f"{broken[0]} is not finite after {self.images:,} images; {path} is as it was at the last "
                f"state. Lower train.lr or use train.precision fp32, and start in a new folder."
            )
        about = {
            "step": self.step,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
            "latents": self.encoded,
            "config": config.to_json(self.run),
            "stopped": self.stopped,
            "sessions": [asdict(session) for session in self.sessions],
        }
        files.replace_atomic(
            path / STATE, lambda temporary: save_file(plain, temporary, {"about": json.dumps(about)})
        )

    def _averages_by_prefix(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What each average's tensors are called in the state file, and these by parameter name."""
        names = [name for name, _ in self.ema.named_parameters()]
        for halflife, average in self.averages.items():
            main = average is self.ema_parameters
            prefix = "ema" if main else f"ema{runs.halflife_label(halflife)}"
            yield prefix, dict(zip(names, average, strict=True))

    def load_state(self, path: Path) -> None:
        """Restore what `save_state` wrote; raises `ReproError` where it belongs to other settings."""
        tensors = runs.load_shards(path / STATE)
        with safe_open(path / STATE, "pt") as file:
            about = json.loads(file.metadata()["about"])
        if about["fingerprint"] != self.fingerprint:
            raise ReproError(
                f"{path / STATE} was trained on other pixels than the prepared {self.run.data.name} "
                f"({about['fingerprint'][:8]} against {self.fingerprint[:8]}). Prepare the same images, or "
                f"choose another --out."
            )
        if about.get("latents", {}) != self.encoded:
            raise ReproError(
                f"{path / STATE} was trained on other latents of {self.run.data.name}, of other weights of "
                f"{self.run.data.autoencoder}. Restore that run and its latents, or choose another --out."
            )
        saved = config.from_json(about["config"])
        if changed := unlike(saved, self.run):
            raise ReproError(
                f"{path / STATE} was saved with other settings ({', '.join(changed)}). Resume with the "
                f"same settings, choose another --out, or remove {path} to start anew."
            )
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(tensors[f"net.{name}"])
                prefix = f"optimizer.{name}."
                state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                for key, value in state.items():
                    on = self.place.device if key != "step" or self.place.device.type == "cuda" else "cpu"
                    like_parameter = value.shape == parameter.shape and key != "step"
                    placed = torch.empty_like(parameter).copy_(value) if like_parameter else value.to(on)
                    self.optimizer.state[parameter][key] = placed
            for prefix, average in self._averages_by_prefix():
                for name, tensor in average.items():
                    tensor.copy_(tensors[f"{prefix}.{name}"])
            if self.balance_every:
                self.weight.values.copy_(tensors["weight.values"])
                self.balanced = True
        self.captured = None  # a graph would go on with the tensors replaced above
        self.step, self.seconds, self.stopped = about["step"], about["seconds"], about.get("stopped", False)
        self.sessions = [runs.Session(**session) for session in about.get("sessions", [])]

    def load_weights(self, recorded: runs.Run) -> None:
        """Take averages and network from a recorded run, as far as that was trained.

        The network is the main average, in the record's float16; the optimizer knows nothing, as in a run
        that begins. Raises `ReproError` as `check_goes_on` does, and where the weights are not whole.
        """
        check_goes_on(recorded, self.run, self.fingerprint)
        if recorded.record.data.latents != self.encoded:
            raise ReproError(
                f"{recorded.name} was trained on other latents of {self.run.data.name}. Encode the same with "
                f"the same weights of {self.run.data.autoencoder}, or leave out --from-weights."
            )
        with torch.no_grad():
            for halflife, average in self.averages.items():
                found = recorded.weights(halflife)
                for (name, parameter), mine in zip(self.net.named_parameters(), average, strict=True):
                    mine.copy_(found[name])
                    if average is self.ema_parameters:
                        parameter.copy_(found[name])
        self.captured = None
        self.step, self.seconds = recorded.record.images // self.run.train.batch, recorded.record.seconds
        self.sessions = recorded.record.sessions


def check_goes_on(recorded: runs.Run, run: config.Config, fingerprint: str) -> None:
    """Raise `ReproError` where `run` cannot go on from a recorded run's weights.

    That is where settings differ (but for the name, and what may always change), or the pixels, where the
    recorded weights have seen as many images as are asked for, or others trained them.
    """
    if recorded.record.imported:
        raise ReproError(
            f"{recorded.name} was trained by others, in ways that its record does not hold: there is no "
            f"training that could go on. Leave out --from-weights."
        )
    if changed := [name for name in unlike(recorded.config, run) if name != "name"]:
        raise ReproError(
            f"{recorded.name} was recorded with other settings ({', '.join(changed)}): its training can only "
            f"go on with the same ones. Leave out --from-weights to begin anew."
        )
    if (theirs := recorded.record.data.fingerprint) != fingerprint:
        raise ReproError(
            f"{recorded.name} was trained on other pixels than the prepared {run.data.name} ({theirs[:8]} "
            f"against {fingerprint[:8]}). Prepare the same images, or leave out --from-weights."
        )
    if (seen := recorded.record.images) >= run.train.images:
        raise ReproError(
            f"{recorded.name} has seen {seen:,} images, and {run.train.images:,} are asked for: ask for "
            f"more, with --train.images"
        )


def train(
    run: config.Config,
    out: str | Path,
    device: str | None = None,
    grid: tuple[int, int] = (8, 8),
    minutes: float | int | None = None,
    from_weights: str | Path | None = None,
) -> Path:
    """Train `run` into the folder `out` and record it there; returns the folder.

    Goes on from the state file where there is one. At each evaluation the run so far is recorded whole
    (weights, samples, metrics), so that a run that is never finished is still a recorded run.
    grid: rows and columns of samples.png, sample seeds 0, 1, ... minutes: stop after as many, measure
    and record; the same call goes on from there. from_weights: a recorded run: where `out` has no state,
    go on from its weights (see `Trainer.load_weights`), log and metrics. The learning rate warms up again,
    where it does at all.

    Raises `ReproError` for a data set that is not prepared or does not fit, a batch that does not
    divide among the processes, a state of other settings, and a loss that is not finite.
    """
    began = time.perf_counter()
    if minutes is not None and not minutes > 0:
        raise ReproError(f"a run cannot stop after {minutes} minutes; give a number above 0")
    out, place = Path(out), find_place(device)
    data.load(run.data.name)  # before a folder is made for it
    source = None if from_weights is None else runs.load_run(from_weights)
    with files.lock(out) if place.first else nullcontext():
        _train(run, out, place, grid, math.inf if minutes is None else began + 60 * minutes, source)
    return out


def is_trained(run: config.Config, out: Path) -> bool:
    """Whether `out` holds the whole record of `run`, trained to its end.

    Raises `ReproError` where it holds another run.
    """
    if not (out / "run.json").exists():
        return False
    record = runs.read_record(out / "run.json")
    if changed := unlike(record.config, run):
        raise ReproError(f"{out} holds a run of other settings ({', '.join(changed)}); choose another folder")
    whole = record.samples is not None or run.model.kind not in config.DRAWS
    planned = record.config.train.images <= run.train.images  # else it is yet to be declared finished
    return whole and planned and record.images >= run.train.images


def unlike(one: config.Config, other: config.Config) -> list[str]:
    """Settings that differ and that a resumed run may not change."""
    return [
        name
        for name in runs.differences(one, other)
        if name not in MAY_CHANGE and not name.startswith(("evaluate.", "sample."))
    ]


def train_all(
    chosen: Iterable[config.Config], out: str | Path, device: str | None = None, minutes: float | None = None
) -> list[Path]:
    """Train runs one after the other, each into the folder `out`/<profile>/<run>.

    Runs that are trained, or that another process is training, are left out: start as many processes on
    the same `out` as there are GPUs, and they share the runs. A run that fails does not keep the others
    from being trained; one that another process's run may be needed for is tried again. minutes: as in
    `train`, for all together. Returns the folders of the runs that were trained. Raises `ReproError` under
    `torchrun`, and in the end where runs failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ReproError(
            "several runs are shared out among processes of their own: start them without torchrun"
        )
    until = math.inf if minutes is None else time.perf_counter() + 60 * minutes
    pending, done = list(chosen), []
    while pending:
        failed: dict[str, ReproError] = {}
        busy = progress = False
        for run in list(pending):
            left = (until - time.perf_counter()) / 60
            if left <= 0:
                return done
            folder = Path(out) / run.name
            try:
                if not is_trained(run, folder):
                    done.append(train(run, folder, device, minutes=None if math.isinf(left) else left))
                    progress = True
                pending.remove(run)
            except files.Busy:
                busy = True
            except ReproError as error:
                failed[run.name] = error
                print(f"{run.name}: {error}", flush=True)
        if not failed:
            return done
        if not (busy or progress):
            raise ReproError(f"{len(failed)} runs failed: {', '.join(failed)}; see above")
        if not progress:
            time.sleep(10)  # until another process is done with what these may need
    return done


def _train(
    run: config.Config,
    out: Path,
    place: Place,
    grid: tuple[int, int],
    until: float,
    source: runs.Run | None,
) -> None:
    def say(text: str) -> None:
        if place.first:
            print(text, flush=True)

    def write(name: str, line: dict) -> None:
        if place.first:
            files.append_line(out / name, line)

    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, run.train.cudnn_plans
    shares(run.train, place.world)  # raises, before anything is read
    real = data.load(run.data.name)
    check_data(run, real)
    check_evaluations(run, real)
    trained_on, held_out = data.holdout_split(len(real.images), run.data.holdout)
    encoded = latents.verify(run.data.name, run.data.autoencoder) if run.data.autoencoder else {}
    trainer = Trainer(run, place, data.verify(run.data.name), encoded)
    if (out / STATE).exists():
        trainer.load_state(out)
        say(f"{run.name}: going on from {trainer.images:,} images")
        source = None
    elif (out / "run.json").exists() and (source is None or source.path.resolve() != out.resolve()):
        raise ReproError(
            f"{out} holds a recorded run without its state; choose another --out or move it away, or go on "
            f"from its weights with --from-weights {out}"
        )
    elif source is not None:
        trainer.load_weights(source)
        say(f"{run.name}: going on from the weights of {source.name}, of {trainer.images:,} images")
        if place.first and source.path.resolve() != out.resolve():
            copy_lines(source.path, out)
    if place.first:
        files.remove_partial(out)
        for name in ("log.jsonl", "metrics.jsonl"):  # what a killed run wrote after its last state
            keep_until(out / name, trainer.images)

    session = runs.Session(
        first_image=trainer.images,
        device=evaluate.device_name(place.device),
        processes=place.world,
        versions=versions(),
        commit=git_commit(),
        code=provenance.code_version("import repro.train"),
        from_run=None if source is None else source.config.name,
        from_weights={} if source is None else source.record.weights,
    )
    last = trainer.sessions[-1] if trainer.sessions else None
    if source is not None or last is None or replace(session, first_image=last.first_image) != last:
        trainer.sessions.append(session)
    record = runs.Record(
        config=run,
        data=runs.DataUsed(
            name=run.data.name,
            fingerprint=trainer.fingerprint,
            count=len(real.images),
            trained_on=len(trained_on),
            held_out=len(held_out),
            classes=tuple(real.classes) if run.data.classes else (),
            autoencoder=runs.load_run(run.data.autoencoder).record.weights if run.data.autoencoder else {},
            latents=trainer.encoded,
        ),
        images=trainer.images,
        seconds=trainer.seconds,
        device=session.device,
        processes=session.processes,
        versions=session.versions,
        commit=session.commit,
        code=session.code,
        parameters=sum(p.numel() for p in trainer.net.parameters()),
        earlier=tuple(trainer.sessions[:-1]),
        first_image=trainer.sessions[-1].first_image,
        from_run=trainer.sessions[-1].from_run,
        from_weights=trainer.sessions[-1].from_weights,
    )
    say(f"{run.name}: {record.parameters:,} parameters, {len(trained_on):,} images, {record.device}")

    batches = Batches(real, trained_on, run.train, place, latents.of_run(run, real))
    generator = torch.Generator(place.device)
    total = math.ceil(run.train.images / run.train.batch)
    log_every, state_every = (
        max(1, round(images / run.train.batch))
        for images in (run.train.log_every_images, run.train.state_every_images)
    )
    evaluations = {math.ceil(at / run.train.batch) for at in run.evaluate.at}
    if evaluations:  # what is recorded in the end is measured, wherever that is
        evaluations.add(total)
    network, drawing = None, run.model.kind in config.DRAWS

    def report(measure: bool, last: bool) -> None:
        nonlocal network
        now = replace(record, images=trainer.images, seconds=round(trainer.seconds, 1))
        if run.model.kind == "autoencoder":  # what is recorded and measured knows its latents' scale
            trainer.ema.scale.fill_(latents.find_scale(trainer.ema, real.images, trained_on))
        if measure and run.model.kind != "classifier":
            network = network or evaluate.feature_network(run.evaluate.features, place.device)
        if measure:
            for line in measured(trainer, network, real, trained_on, held_out, last):
                write("metrics.jsonl", line | {"training_seconds": now.seconds})
                say(f"{trainer.images:>12,} images  {line['name']}: {line['value']:.4f}")
        if place.first and not drawing:
            record_weights(out, now, trainer.ema)
        elif place.first:
            others = {}
            for halflife in run.train.also_ema_halflife_images:
                with trainer.averaged(halflife):
                    others |= runs.save_weights(out, trainer.ema.state_dict(), run, halflife)
            now = record_run(out, now, trainer.ema, grid, place.device, others)
            if last and not run.record_weights:
                runs.forget_weights(out, now)

    recorded = runs.read_record(out / "run.json") if (out / "run.json").exists() else None
    whole = recorded and recorded.images == trainer.images and (recorded.samples or not drawing)
    shortened = recorded and trainer.step == total and recorded.config.train.images > run.train.images
    if whole and place.first and shortened:  # it ends here, earlier than planned
        shorter = replace(recorded.config.train, images=run.train.images)
        runs.write_record(out, replace(recorded, config=replace(recorded.config, train=shorter)))
    measure, last = trainer.step in evaluations or trainer.stopped, trainer.step == total
    measure = measure and not (source is not None and was_measured(source, run))
    if (measure or last) and not whole:  # killed between the state and the record
        if measure and place.first and source is None:
            keep_until(out / "metrics.jsonl", trainer.images - 1)
        report(measure, last or trainer.stopped)
    trainer.stopped = False
    losses, began, logged_at, logged_images = [], time.perf_counter(), time.perf_counter(), trainer.images
    stop = False

    with closing(trainer), ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(batches.fetch, trainer.step)
        while trainer.step < total and not stop:
            y, labels = upcoming.result()
            upcoming = loader.submit(batches.fetch, trainer.step + 1)
            every = trainer.balance_every
            if every and (trainer.step % every == 0 or not trainer.balanced):
                trainer.balance(y, labels)
            losses.append(trainer.train_step(y, labels, draw(run, trainer.step, place, generator)))
            step, images = trainer.step, trainer.images
            if step % log_every == 0:
                stop = agreed(time.perf_counter() > until, place)
            last, measure = step == total, step in evaluations or stop

            save = measure or last or step % state_every == 0
            if step % log_every == 0 or save:
                loss = torch.stack(losses).mean()
                if place.world > 1:
                    torch.distributed.all_reduce(loss)
                loss = float(loss) / place.world
                speed = (images - logged_images) / (time.perf_counter() - logged_at)
                norm, clipped = (trainer.norms / len(losses)).tolist()
                trainer.norms.zero_()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise ReproError(
                        f"the loss is {loss} at {images:,} images (the gradient's norm {norm}); "
                        f"{out} is as it was at the last state. "
                        f"Lower train.lr or use train.precision fp32, and start in a new folder."
                    )
                line = {
                    "images": images,
                    "loss": loss,
                    "images_per_second": round(speed, 1),
                    "lr": trainer.rate,
                    "gradient_norm": norm,
                    "clipped": clipped,
                }
                if trainer.balance_every:
                    line["weights"] = trainer.weight.values.tolist()
                write("log.jsonl", line)
                say(f"{images:>12,} images  loss {loss:.5f}  {speed:,.0f} images/s")
                losses, logged_at, logged_images = [], time.perf_counter(), images

            trainer.stopped = stop
            if save and place.first:
                trainer.seconds += time.perf_counter() - began
                trainer.save_state(out)
                began = time.perf_counter()
            if measure or last:  # after the state, which a failing measurement then leaves whole
                report(measure, last or stop)
                began = logged_at = time.perf_counter()
        upcoming.cancel()
    if stop and trainer.step < total:
        say(f"{run.name}: stopped in time at {trainer.images:,} images; the same command goes on")
    if place.world > 1:
        torch.distributed.barrier()


def was_measured(source: runs.Run, run: config.Config) -> bool:
    """Whether the record of a run has measurements of its final weights, and by the settings of `run`."""
    settings = ("sample", "evaluate")
    changed = {name for name in runs.differences(source.config, run) if name.startswith(settings)}
    at_end = any(line["images"] == source.record.images for line in source.metrics)
    return at_end and not changed - {"evaluate.at"}


def agreed(mine: bool, place: Place) -> bool:
    """What the first process says, so that all stop at the same step."""
    if place.world == 1:
        return mine
    said = torch.tensor(float(mine), device=place.device)
    torch.distributed.broadcast(said, 0)
    return bool(said)


def evaluation_batch(run: config.Config) -> int:
    """Images per batch when evaluating while training: 500, or fewer for few samples."""
    return min(500, run.evaluate.samples)


def check_data(run: config.Config, real: data.Dataset) -> None:
    """Raise `ReproError` where a prepared data set does not fit the configuration."""
    shape = (run.data.channels, run.data.resolution, run.data.resolution)
    found = real.images.shape[1:]
    if run.data.autoencoder:  # of each two views, with means and log variances
        latents.trained(run.data.autoencoder)  # raises where samples could not be decoded
        _, doubled, *sides = latents.of_run(run, real).shape[1:]
        found = (doubled // 2, *sides)
    if found != shape:
        what = f"latents by {run.data.autoencoder}" if run.data.autoencoder else "images"
        raise ReproError(f"{run.data.name} holds {what} of {found}, the configuration asks for {shape}")
    if run.data.classes and (real.labels is None or len(real.classes) != run.data.classes):
        raise ReproError(
            f"{run.data.name} has {len(real.classes)} classes, the configuration asks for {run.data.classes}"
        )
    if run.data.holdout >= len(real.images):
        raise ReproError(
            f"data.holdout is {run.data.holdout}, but {run.data.name} has {len(real.images)} images"
        )


def check_evaluations(run: config.Config, real: data.Dataset) -> None:
    """Raise `ReproError` where what a run will be measured with is missing or unfit, before it is trained."""
    if run.evaluate.at and (run.evaluate.levels or run.model.kind not in config.DRAWS):
        val = data.load(f"{run.data.name}-val")
        latents.of_run(run, val)  # raises where they are wanted and not there
        if val.classes != real.classes or val.images.shape[1:] != real.images.shape[1:]:
            raise ReproError(
                f"{val.name} and {run.data.name} differ in their classes or the size of their images: "
                f"prepare both from one source"
            )
    for how in (run.sample, *run.evaluate.also):
        schedules.grid_for(schedules.from_config(run.schedule), how)  # raises where there is no such grid
        if how.guidance != 1 and not (run.data.classes and getattr(run.model, "null_class", False)):
            raise ReproError(
                f"{run.name} has no null class, so it cannot be sampled with guidance {how.guidance}"
            )
        sample.check_low_noise(run, how)
        if how.classifier is None:
            continue
        guide = runs.load_run(how.classifier)
        guide.classifier()
        if not guide.finished:
            raise ReproError(f"the classifier {how.classifier} is not trained to its end yet")
        theirs, ours = ((d.classes, d.resolution, d.channels) for d in (guide.config.data, run.data))
        if theirs != ours:
            raise ReproError(
                f"the classifier {how.classifier} is one of (classes, side, channels) {theirs}, but "
                f"{run.name} draws {ours}"
            )


def copy_lines(source: Path, out: Path) -> None:
    """Copy the log and the metrics of a recorded run's folder into `out`."""
    try:
        for name in ("log.jsonl", "metrics.jsonl"):
            (out / name).unlink(missing_ok=True)  # of a training that was killed before its first state
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
    except OSError as error:
        raise ReproError(f"cannot copy from {source} to {out}: {error}. Free some space.") from error


def keep_until(path: Path, images: int) -> None:
    """Drop the lines of a log that were written after `images` images."""
    if path.exists():
        kept = [line for line in files.read_lines(path) if line["images"] <= images]
        files.write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


def measured(
    trainer: Trainer,
    network: nn.Module | None,
    real: data.Dataset,
    trained_on: np.ndarray,
    held_out: np.ndarray,
    last: bool,
) -> Iterator[dict]:
    """What is measured of the averaged weights: lines for metrics.jsonl.

    Of a denoiser the distance, by each sampler; at the last measurement also copies and errors by noise
    level. Of a classifier the accuracy by noise level. Of further averages the distances alone, from the
    same seeds, in lines that say `ema_halflife_images`. network: of the distance's features.
    """
    run, device, precision = trainer.run, trainer.place.device, trainer.run.train.precision

    def by_level(count: int) -> dict:
        return evaluate.by_level(trainer.ema_denoiser, run, trainer.images, device, precision, count)

    def distances(neighbours: bool) -> Iterator[dict]:
        for how in (run.sample, *run.evaluate.also):
            yield from evaluate.evaluate(
                trainer.ema_denoiser, replace(run, sample=how), trainer.fingerprint, trainer.images, device,
                precision, evaluation_batch(run), neighbours and how == run.sample, network,
                run.train.cuda_graphs,
            )  # fmt: skip

    if run.model.kind == "autoencoder":
        yield from latents.measure(
            trainer.ema, run, trainer.fingerprint, trainer.images, device, precision, network
        )
    elif run.model.kind == "classifier":
        yield by_level(run.evaluate.levels or 25)
    else:
        yield from distances(last and len(held_out) > 0)
        if last and run.evaluate.levels:
            yield by_level(run.evaluate.levels)
    yield from held_out_loss(trainer, real, trained_on, held_out)
    for halflife in run.train.also_ema_halflife_images:
        with trainer.averaged(halflife):
            for line in distances(False):
                yield line | {"ema_halflife_images": halflife}


@torch.no_grad()
def held_out_loss(
    trainer: Trainer, real: data.Dataset, trained_on: np.ndarray, held_out: np.ndarray
) -> list[dict]:
    """The loss of the averaged weights on held-out images and on as many training images.

    Both use the same noise and noise levels, so the difference is what the network has memorised. The
    training images are spread evenly over their order, which is by class (lines of older code, without
    `spread`, are of the first ones).
    """
    run, device = trainer.run, trainer.place.device
    if len(held_out) == 0:
        return []
    lines, learned = [], latents.of_run(run, real)
    number = min(len(held_out), len(trained_on))
    spread = trained_on[np.arange(number) * len(trained_on) // number]
    for name, indices in (("held-out", held_out), ("training", spread)):
        batch = min(evaluation_batch(run), len(indices))
        total, count = 0.0, 0
        for first in range(0, len(indices) - batch + 1, batch):
            rows = indices[first : first + batch]
            y = latents.plain(torch.from_numpy(data.rows_of(learned, rows))).to(device)
            labels = torch.from_numpy(real.labels[rows]).to(device) if run.data.classes else None
            generator = torch.Generator().manual_seed(seed_of("held-out loss", first))
            noise = torch.randn(y.shape, generator=generator).to(device)
            uniform = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch).to(device)
            total += float(trainer.loss(trainer.ema_denoiser, y, noise, uniform, labels).sum())
            count += batch
        lines.append(
            {
                "name": f"loss on {name} images",
                "value": total / count,
                "images": trainer.images,
                "count": count,
                "spread": True,
            }
        )
    return lines


def record_run(
    out: Path,
    record: runs.Record,
    ema: nn.Module,
    grid: tuple[int, int],
    device: torch.device,
    others: dict[str, str] | None = None,
) -> runs.Record:
    """Record the averaged weights, and samples drawn from them; others: as in `record_weights`."""
    return record_samples(out, record_weights(out, record, ema, others), grid, device)


def record_weights(
    out: Path, record: runs.Record, ema: nn.Module, others: dict[str, str] | None = None
) -> runs.Record:
    """Record the averaged weights, float16, and return the record with their hashes.

    others: files and hashes of further averages, which lie in `out` already.
    """
    hashes = runs.save_weights(out, ema.state_dict(), record.config) | (others or {})
    record = replace(record, weights=hashes, samples=None, further_samples=())
    runs.write_record(out, record)
    runs.forget_samples(out, record)
    return record


def record_samples(
    out: Path,
    record: runs.Record,
    grid: tuple[int, int],
    device: torch.device,
    how: config.Sample | None = None,
) -> runs.Record:
    """Draw samples.png from the weights as recorded, in float32, and return the record that names it.

    grid: rows and columns; sample seeds 0, 1, ... how: by default as the run's configuration says.
    """
    samples = _draw_samples(
        out, grid, range(grid[0] * grid[1]), how or record.config.sample, device, "samples.png"
    )
    record = replace(record, samples=samples)
    runs.write_record(out, record)
    return record


def record_further_samples(
    out: Path, record: runs.Record, seeds: range, device: torch.device, how: config.Sample
) -> runs.Record:
    """Draw a row of images, one a seed, as `how` says, and return the record that names it too.

    In float32, from the weights as recorded; in the place of a row that was drawn so before.
    """
    samples = _draw_samples(out, (1, len(seeds)), seeds, how, device, runs.further_samples_file(how))
    others = tuple(other for other in record.further_samples if other.sample != how)
    record = replace(record, further_samples=(*others, samples))
    runs.write_record(out, record)
    runs.forget_samples(out, record)
    return record


def _draw_samples(
    out: Path, grid: tuple[int, int], seeds: range, how: config.Sample, device: torch.device, name: str
) -> runs.Samples:
    rows, cols = grid
    images = runs.load_run(out).draw(seeds, how, device)
    return runs.Samples(
        file=name,
        sha256=runs.save_samples(out, images, rows, cols, name),
        rows=rows,
        cols=cols,
        first_seed=seeds[0],
        sample=how,
        precision="fp32",
        device=evaluate.device_name(device),
        code=provenance.code_version("import repro.train"),
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found


def git_commit() -> str:
    """The commit of the checkout, with "+" where tracked files were changed; "unknown" outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(provenance.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

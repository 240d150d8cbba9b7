"""How fast a network trains and samples on this GPU, and where the time of a step goes.

    python -m repro.bench --out paper/bench/unet64.json
    python -m repro.bench --out paper/bench/sampling.json --variants "ViT-L/4" "lab ViT" "lab UNet"
    python -m repro.bench --out paper/bench/sampling-vit.json --variants "ViT-L/4" "lab ViT"
    python -m repro.bench --out paper/bench/sampling-float8.json --variants "ViT-L/4"
    python -m repro.bench --out paper/bench/vit.json --variants "ViT-B/2" "ViT-XL/2" "ViT-XL/2, batch 64"
    python -m repro.bench --out paper/bench/vit-forward.json --variants "ViT-B/2"
    python -m repro.bench --out paper/bench/adm64.json --variants "ADM-64"
    python -m repro.bench --out paper/bench/changes.json --variants "changes to ViT-B/2" \
        "ViT-B/2: wired as ours"
    python -m repro.bench --out paper/bench/changes-kernels.json --variants "ViT-B/2: one CUDA graph a step" \
        "ViT-B/2: our attention" "ViT-B/2: our sum and layer norm" "ViT-B/2: our GELU" "ViT-B/2: compiled"
    python -m repro.bench --out paper/bench/changes-adm64-uncompiled.json --variants "ADM-64: float32" \
        "ADM-64: bfloat16"
    python -m repro.bench --out paper/bench/changes-adm64.json --variants "ADM-64: bfloat16" \
        "ADM-64: compiled" "ADM-64: one CUDA graph a step" "ADM-64: our norms" "ADM-64: our convolutions"
    python -m repro.bench --out paper/bench/memory.json --variants "ViT-XL/2, batch 64" \
        "ViT-XL/2, batch 64, by 16" "ViT-XL/2, batch 64, recomputed" "ViT-XL/2, recomputed"
    python -m repro.bench --out paper/bench/memory-adm64.json --variants "ADM-64: our convolutions" \
        "ADM-64, recomputed"
    python -m repro.bench --out paper/bench/disk-cold.json --variants "ViT-B/2 from disk" \
        "ViT-B/2 from disk, 2 GPUs"
    python -m repro.bench --out paper/bench/loader.json --variants "batches from disk"       (without a GPU)

All variants are compiled at once, each network once, but for those from disk, which warm up by themselves,
and those that run uncompiled; then each is timed in a process of its own, one after the other, so that
nothing disturbs how cuDNN chooses its plans. FLOPs are
those of the network as defined, however it is computed, counted by torch (2 per multiply-add, matrix products
and convolutions only); a training step counts as 3 forward passes. Rates are medians over steps timed with
CUDA events, on random data; those from disk are by the wall clock. (Of earlier states of this script or of
the library, not here: disk.json, of a file that memory holds, read twice; disk-mapped.json, of latents read
without asking for them first; vit-first-gpu.json to vit-third-gpu.json, the ViTs on other GPUs of a kind.)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repro import (
    config,
    cuda_graph,
    data,
    evaluate,
    files,
    plainly,
    presets,
    provenance,
    runs,
    sample,
    schedules,
    train,
)
from repro.denoiser import Denoiser

PROTOTYPE = config.UNet(
    channels=96, multipliers=(1, 2, 2, 2), blocks=2, attention=(16, 8), resample_in_blocks=False, heads=4
)
"""The 22M network of the first prototype, for comparison at equal FLOPs."""

_lab = presets.PRESETS["lab/celeba64-unet"].model
_adm = presets.PRESETS["paper/imagenet64-unet"]

PLAIN = tuple(plainly.BLOCKS)


@dataclass(frozen=True)
class Variant:
    """What is measured: a network, how it is computed, and images per step."""

    model: config.UNet | config.ViT
    data: config.Data | None = None
    """Whose sizes and classes the network has; by default the lab UNet's."""
    plain: tuple[str, ...] = ()
    """Parts of a UNet that are written plainly (see `plainly.BLOCKS`): norms by `F.group_norm` of maps that
    are joined before; convolutions of doubled maps, and by cuDNN alone, the last in float32."""
    batch: int = 256
    cuda_graphs: bool = False
    forward: bool = True
    """Also time forward passes alone (which costs another compilation)."""
    precision: str = "bf16"
    compile: bool = True
    kernels: tuple[str, ...] = tuple(plainly.PARTS)
    """Of ours, which a ViT has (see `plainly.use_kernels`)."""
    micro_batch: int | None = None
    recompute: bool = False


VARIANTS = {
    "prototype, plain": Variant(PROTOTYPE, plain=PLAIN, batch=512, forward=False),
    "prototype": Variant(PROTOTYPE, batch=512, cuda_graphs=True, forward=False),
    "lab": Variant(_lab, cuda_graphs=True),
    "ViT-B/2": Variant(*presets.TABLE_1["ViT-Base"], cuda_graphs=True),
    "ViT-XL/2": Variant(*presets.TABLE_1["ViT-XL"], batch=256, cuda_graphs=True),
    "ViT-XL/2, batch 64": Variant(*presets.TABLE_1["ViT-XL"], batch=64, cuda_graphs=True),
    "ADM-64": Variant(_adm.model, _adm.data, batch=128, cuda_graphs=True),
}
"""By name. `ViT-*` on latents of 4 x 32 x 32, drawn anew in each step as in training; the last is ADM's
network without the channels that predict a variance."""

MEMORY = {
    "ViT-XL/2, batch 64, by 16": replace(VARIANTS["ViT-XL/2, batch 64"], micro_batch=16, forward=False),
    "ViT-XL/2, batch 64, recomputed": replace(VARIANTS["ViT-XL/2, batch 64"], recompute=True, forward=False),
    "ViT-XL/2, recomputed": replace(VARIANTS["ViT-XL/2"], recompute=True, forward=False),
    "ADM-64, recomputed": replace(VARIANTS["ADM-64"], recompute=True, forward=False),
}
"""By name: what a network trains like in less memory."""

EAGER = {"compile": False, "cuda_graphs": False}
CHANGES = {
    "ViT-B/2": {
        "float32": {"precision": "fp32", "kernels": (), **EAGER},
        "bfloat16": {"kernels": (), **EAGER},
        "compiled": {"kernels": (), "cuda_graphs": False},
        "one CUDA graph a step": {"kernels": ()},
        "our attention": {"kernels": ("attention",)},
        "our sum and layer norm": {"kernels": ("attention", "sum and norm")},
        "our GELU": {},
    },
    "ADM-64": {
        "float32": {"precision": "fp32", "plain": PLAIN, **EAGER},
        "bfloat16": {"plain": PLAIN, **EAGER},
        "compiled": {"plain": PLAIN, "cuda_graphs": False},
        "one CUDA graph a step": {"plain": PLAIN},
        "our norms": {"plain": ("convolutions",)},
        "our convolutions": {},
    },
}
"""Of a variant: what is done for speed, each change on top of those before; the last makes the variant."""

STEPS = {
    f"{name}: {change}": replace(VARIANTS[name], forward=False, **how)
    for name, changes in CHANGES.items()
    for change, how in changes.items()
}
"""By name, the variants that `CHANGES` makes."""

CONTROL = {"ViT-B/2: wired as ours": replace(STEPS["ViT-B/2: our GELU"], kernels=(plainly.WIRING,))}
"""By name: without a kernel of ours, but PyTorch's placed as ours are, to tell what that alone changes."""

TRAINED = {**VARIANTS, **MEMORY, **STEPS, **CONTROL}


@dataclass(frozen=True)
class Sampling:
    """What is measured of sampling: a preset's network, with random weights, drawing as the preset says."""

    preset: str
    batch: int


SAMPLING = {
    "ViT-L/4": Sampling("paper/imagenet64-vit", 256),
    "lab ViT": Sampling("lab/imagenet64-vit", 500),
    "lab UNet": Sampling("lab/imagenet64-unet", 500),
}


@dataclass(frozen=True)
class FromDisk:
    """What is measured end to end: the training of a variant on latents in a file, by so many GPUs.

    By none: how fast batches of it are read, without training.
    """

    variant: str
    gpus: int = 1


FROM_DISK = {
    "ViT-B/2 from disk": FromDisk("ViT-B/2"),
    "ViT-B/2 from disk, 2 GPUs": FromDisk("ViT-B/2", 2),
    "batches from disk": FromDisk("ViT-B/2", 0),
}
"""By name. Each GPU takes the variant's images a step."""

FILE_IMAGES = 1_281_167
"""Of the file of latents, in the layout of `repro.latents`: ImageNet's, which take 42 GB for 4 x 32 x 32."""

DISK_STEPS = 200
"""Timed on images that no memory holds, and again on the same: few of all, so that most are read alone."""


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a bf16 product of two random size x size matrices."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats)


def median_seconds(work, repeats: int, warm_up: int = 3) -> float:
    """Median seconds of `work()` on the GPU."""
    for _ in range(warm_up):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2] / 1000


@contextmanager
def without_content(run: config.Config, images: int) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """The network of `run` and inputs for so many images, of which there are shapes alone within a block.

    So a network of any size is counted in a little memory. The meta device would do but for autocast.
    """
    size, labelled = run.data.resolution, run.data.classes and run.model.kind in config.DRAWS
    with torch.device("meta"):
        net = runs.network(run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.zeros(images, run.data.channels, size, size), torch.zeros(images)]
        if labelled:
            inputs.append(torch.zeros(images, dtype=torch.long))
        if run.model.kind == "autoencoder":
            inputs = [inputs[0], torch.zeros(images, run.model.latent_channels, net.side, net.side)]
        yield net.to_empty(device="cpu"), tuple(inputs)


def forward_flops(run: config.Config, plain: bool = True) -> float:
    """FLOPs of one forward pass of one image: of the network as defined, or as we compute it."""
    with without_content(run, 1) as (net, inputs):
        if plain:
            plainly.make_plain(net)
        # attention by two matrix products, since the CPU's fused one is not counted
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(*inputs)
    return float(counter.get_total_flops())


KINDS = {
    "GELU": ("_gelu_kernel", "_gelu_fp8_kernel", "_gelu_grad_kernel"),
    "attention": (
        "flash",
        "fmha",
        "attention",
        "compute_dot_do_o",
        "convert_dq",
        "_query_gradient_kernel",
        "_key_gradient_kernel",
    ),
    "norm and other reductions": ("triton_red", "triton_per", "_norm_kernel", "_grad_kernel"),
    "elementwise": ("triton_poi", "elementwise", "copy", "memset", "memcpy", "cat"),
    "optimizer": ("multi_tensor", "adam", "lpnorm"),
    # before matrix products: cuDNN's convolutions are called "..._implicit_gemm_..."
    "convolution": ("conv", "cudnn", "implicit", "wgrad", "dgrad", "fprop", "nhwc"),
    "matrix product": ("gemm", "nvjet", "cutlass", "splitk", "_gelu_of_product_kernel"),
}
"""Parts of the names of GPU kernels; a kernel is of the first kind that fits."""


def kernel_times(work, steps: int = 3) -> tuple[float, dict[str, float], list[tuple[str, float]]]:
    """Milliseconds a step that the GPU is busy, shares of it by kind of kernel, and the largest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0.0) + event.device_time_total
    total = sum(times.values())
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, spent in times.items():
        kind = next((k for k, parts in KINDS.items() if any(part in name.lower() for part in parts)), "other")
        shares[kind] += spent / total
    top = sorted(times.items(), key=lambda item: -item[1])[:30]
    return total / steps / 1000, shares, [(name[:120], round(spent / steps / 1000, 4)) for name, spent in top]


def forward_rates(forwards: dict[str, float], flops: float, matmul: float) -> dict[str, float]:
    """What is recorded of images a second by precision, of `flops` each, beside a bf16 product's FLOP/s.

    What is not of bf16 says so, as in "forwards_per_second_fp8".
    """
    found = {}
    for precision, rate in forwards.items():
        of = "" if precision == "bf16" else f"_{precision}"
        found |= {
            f"forwards_per_second{of}": rate,
            f"forward_tflops{of}": flops * rate / 1e12,
            f"forward_share_of_matmul{of}": flops * rate / matmul,
        }
    return found


def precisions(run: config.Config) -> tuple[str, ...]:
    """In which forward passes are timed: those of a ViT in float8 too, where the GPU has it."""
    return ("bf16", "fp8") if sample.takes_fp8(run) else ("bf16",)


def precisions_of(variant: Variant) -> tuple[str, ...]:
    """The same of a variant; in its own alone where it is not computed as we do."""
    as_ours = variant.compile and variant.kernels == tuple(plainly.PARTS)
    return precisions(training_of(variant)) if as_ours else (variant.precision,)


def forward_in(
    precision: str, denoiser: Denoiser, given: tuple[Tensor | None, ...], graphs: bool = True
) -> Callable[[], None]:
    """A forward pass of `denoiser` on x, sigma and labels; graphs: as a CUDA graph after a few calls."""
    denoise = sample.captured(denoiser) if graphs else denoiser

    @torch.no_grad()
    def forward():
        with sample.autocast("cuda", precision, [denoiser.net]):
            denoise(*given)

    return forward


def training_of(variant: Variant, gpus: int = 1) -> config.Config:
    """The training that is measured: of a variant's network, with the settings of the lab's UNet."""
    lab = presets.PRESETS["lab/celeba64-unet"]
    settings = replace(
        lab.train,
        batch=variant.batch * gpus,
        micro_batch=variant.micro_batch,
        recompute=variant.recompute,
        precision=variant.precision,
        compile=variant.compile,
        cuda_graphs=variant.cuda_graphs,
    )
    return replace(lab, model=variant.model, data=variant.data or lab.data, train=settings)


def measure(name: str, only_compile: bool = False) -> dict:
    """Compile one variant, and time it; where it was compiled before, its kernels are found on the disk."""
    variant = TRAINED[name]
    run = training_of(variant)
    batch, settings = variant.batch, run.train
    plainly.use_kernels(variant.kernels)
    torch.backends.cudnn.benchmark = not only_compile
    torch.backends.cudnn.benchmark_limit = settings.cudnn_plans
    place = train.Place(0, 1, torch.device("cuda"))
    trainer = train.Trainer(run, place)
    for net in (trainer.net, trainer.ema):
        plainly.make_plain(net, variant.plain)
    side, channels = run.data.resolution, run.data.channels
    y = torch.randn(batch, channels, side, side, device="cuda")
    generator = torch.Generator("cuda")
    numbers = train.draw(run, 0, place, generator)
    labels = torch.arange(batch, device="cuda") % run.data.classes if run.data.classes else None
    learned = y
    if run.data.autoencoder:
        learned = torch.randn(batch, 2, 2 * channels, side, side, device="cuda")

    def step():
        trainer.train_step(learned, labels, numbers)

    sigma = torch.tensor(1.0, device="cuda")
    forwards = {
        precision: forward_in(precision, trainer.ema_denoiser, (y, sigma, labels), variant.cuda_graphs)
        for precision in (precisions_of(variant) if variant.forward else ())
    }
    began = time.perf_counter()
    for work in (step, *forwards.values()):
        for _ in range(1 if only_compile else cuda_graph.WARM_UP + 1):  # the last captures a graph
            work()
        if work is step:
            memory = torch.cuda.max_memory_allocated()
    torch.cuda.synchronize()
    seconds_to_start = round(time.perf_counter() - began, 1)
    if only_compile:
        return {"name": name, "seconds": seconds_to_start}
    flops, computed = forward_flops(run), forward_flops(run, plain=False)
    matmul = matmul_rate()
    seconds = median_seconds(step, 30, 10)
    result = {
        "name": name,
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "forward_gflop_per_image": flops / 1e9,
        "forward_gflop_computed": computed / 1e9,
        "batch": batch,
        **how_computed(variant),
        "cudnn_plans": settings.cudnn_plans,
        "matmul_tflops": matmul / 1e12,
        "train_images_per_second": batch / seconds,
        "train_tflops": 3 * flops * batch / seconds / 1e12,
        "train_share_of_matmul": 3 * flops * batch / seconds / matmul,
        "train_step_ms": seconds * 1000,
        "seconds_to_start": seconds_to_start,
        "gpu_memory_gib": memory / 2**30,
    }
    rates = {precision: batch / median_seconds(work, 30, 10) for precision, work in forwards.items()}
    result |= forward_rates(rates, flops, matmul)
    print(json.dumps(result), flush=True)
    result |= busy_times(step)
    if "fp8" in forwards:
        result |= {f"forward_{key}_fp8": value for key, value in busy_times(forwards["fp8"]).items()}
    return result


def how_computed(variant: Variant) -> dict:
    """What is recorded of how a variant's network is computed; a ViT alone has kernels to name."""
    names = ["precision", "compile", "cuda_graphs", "plain", "micro_batch", "recompute"]
    names += ["kernels"] if isinstance(variant.model, config.ViT) else []
    return {name: getattr(variant, name) for name in names}


def busy_times(work: Callable[[], None]) -> dict:
    """What is recorded of `kernel_times` of `work`."""
    busy, shares, top = kernel_times(work)
    return {
        "gpu_busy_ms": busy,
        "gpu_busy_shares": {kind: round(share, 4) for kind, share in shares.items()},
        "largest_kernels_ms": top,
    }


def write_latents(path: Path, run: config.Config, images: int = FILE_IMAGES) -> None:
    """Write moments as `repro.latents` lays them out: the same 5000 random images again and again.

    All differ in their first number, but a storage that keeps equal parts once would read them faster than
    others. Raises `ReproError` where the disk has no room for them.
    """
    shape = _latents_shape(run, images)
    wanted, free = 2 * math.prod(shape), shutil.disk_usage(path.parent).free
    if free < 1.02 * wanted:
        raise files.ReproError(
            f"{path.parent} has room for {free / 1e9:.0f} GB, and latents take {wanted / 1e9:.0f}: give "
            "another folder as --scratch"
        )
    some = np.random.default_rng(0).standard_normal((min(5000, images), *shape[1:]), np.float32)
    some = some.astype(np.float16)
    with open(path, "wb") as file:
        for first in range(0, images, 5000):
            some[:, 0, 0, 0, 0] = first / 5000
            file.write(some[: images - first].data)
        file.flush()
        os.fsync(file.fileno())


def forget_pages(path: Path) -> None:
    """Let the system forget what it keeps of a file in memory.

    Not what is mapped and was looked at, nor what Linux keeps together with such a page (a large folio).
    """
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int | None:
    """What this process has read from disks so far, as Linux counts; nothing elsewhere."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return None
    return int(counts["read_bytes"])


def check_cold(read: int | None, wanted: int) -> None:
    """Raise `ReproError` where less was read from a disk than was wanted, so that it was not cold."""
    if read is not None and read < 0.9 * wanted:
        raise files.ReproError(
            f"{wanted:,} bytes were to come from a disk, and {read:,} did: the file is on no disk, or was "
            "not forgotten; give another folder as --scratch"
        )


def read_ahead(path: Path) -> int | None:
    """How many bytes Linux reads ahead on the disk that a file is on; nothing where it does not say."""
    device = path.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (disk, disk.parent):  # a partition says it of its disk
        with suppress(OSError, ValueError):
            return 1024 * int((place / "queue" / "read_ahead_kb").read_text())
    return None


def _latents_shape(run: config.Config, images: int) -> tuple[int, ...]:
    return (images, 2, 2 * run.data.channels, run.data.resolution, run.data.resolution)


def _batches_of(path: Path, run: config.Config, images: int, place: train.Place) -> train.Batches:
    """Training batches of the latents in `path`, which is mapped into memory, and not kept on a GPU."""
    moments = np.memmap(path, np.float16, "r", shape=_latents_shape(run, images))
    labels = np.arange(images) % max(run.data.classes, 1)
    real = data.Dataset(path.stem, moments, labels, [""] * run.data.classes, {})
    return train.Batches(real, np.arange(images), run.train, place, resident=False)


def measure_from_disk(name: str, path: Path, images: int = FILE_IMAGES) -> dict | None:
    """Time training steps on the latents in `path`, read as `repro.train` reads what no GPU can hold.

    Images a second of all processes by the wall clock, in a random order: first cold, of images of which the
    system was told to forget all pages before any process mapped them, as of a file that memory does not
    hold; then warm, of the same images again. How much the first process read from disk in both tells
    whether they were. Nothing but for the first process.
    """
    how = FROM_DISK[name]
    run = training_of(VARIANTS[how.variant], how.gpus)
    torch.backends.cudnn.benchmark = True
    place = train.find_place("cuda")
    trainer = train.Trainer(run, place)
    if place.first:
        forget_pages(path)
    if place.world > 1:
        torch.distributed.barrier()
    batches = _batches_of(path, run, images, place)
    generator = torch.Generator(place.device)
    warm_up = cuda_graph.WARM_UP + 3
    count = min(DISK_STEPS, images // run.train.batch - warm_up)

    with closing(trainer), ThreadPoolExecutor(1) as loader:

        def steps(first: int, count: int) -> tuple[float, int | None]:
            torch.cuda.synchronize()
            if place.world > 1:
                torch.distributed.barrier()
            began, read = time.perf_counter(), bytes_read()
            upcoming = loader.submit(batches.fetch, first)
            for number in range(first + 1, first + count + 1):
                y, some = upcoming.result()
                if number < first + count:
                    upcoming = loader.submit(batches.fetch, number)
                trainer.train_step(y, some, train.draw(run, trainer.step, place, generator))
            torch.cuda.synchronize()
            rate = count * run.train.batch / (time.perf_counter() - began)
            return rate, None if read is None else bytes_read() - read

        steps(0, warm_up)
        cold, cold_read = steps(warm_up, count)
        warm, warm_read = steps(warm_up, count)
    if not place.first:
        return None
    size = int(batches.real.images[0].nbytes)
    wanted = count * run.train.batch // place.world * size
    check_cold(cold_read, wanted)
    return {
        "name": name,
        "variant": how.variant,
        "gpus": place.world,
        "batch": run.train.batch,
        "images": images,
        "image_bytes": size,
        "steps": count,
        "bytes_of_the_first_process": wanted,
        "read_ahead_bytes": read_ahead(path),
        "cold_images_per_second": cold,
        "cold_bytes_read": cold_read,
        "warm_images_per_second": warm,
        "warm_bytes_read": warm_read,
    }


def measure_batches(name: str, path: Path, images: int = FILE_IMAGES, seconds: float = 60) -> dict:
    """Time the reading of batches of the latents in `path` by one process, without training.

    Cold and warm as in `measure_from_disk`; and beside it, cold, as the mapped file alone is read, where
    nobody says which rows are to come, which depends on how far the system reads ahead. Each for at most so
    many seconds. Raises `ReproError` where cold was not cold.
    """
    run = training_of(VARIANTS[FROM_DISK[name].variant])
    place = train.Place(0, 1, torch.device("cpu"))
    size, batch = 2 * math.prod(_latents_shape(run, 1)), run.train.batch
    found = {}
    for told in ("mapped_alone", "cold", "warm"):
        if told != "warm":
            forget_pages(path)
        batches = _batches_of(path, run, images, place)
        began, read, steps = time.perf_counter(), bytes_read(), 0
        while steps < min(DISK_STEPS, images // batch) and time.perf_counter() - began < seconds:
            if told == "mapped_alone":
                batches.learned[batches.rows(steps)]
            else:
                batches.fetch(steps)
            steps += 1
        found |= {
            f"{told}_images_per_second": steps * batch / (time.perf_counter() - began),
            f"{told}_bytes": steps * batch * size,
            f"{told}_bytes_read": None if read is None else bytes_read() - read,
        }
        if told != "warm":
            check_cold(found[f"{told}_bytes_read"], found[f"{told}_bytes"])
        del batches  # what is mapped is not forgotten
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "images": images,
        "image_bytes": size,
        "memory_bytes": memory,
        "read_ahead_bytes": read_ahead(path),
        "batch": batch,
    } | found


@torch.no_grad()
def fill_zeros(net: nn.Module) -> None:
    """Draw anew what an initialisation left 0, in place: products of zeros take a GPU less power and time."""
    for parameter in net.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def images_through_the_network(run: config.Config) -> int:
    """How many images pass through the network for each that is drawn as `run.sample` says."""
    levels = len(schedules.grid_for(schedules.from_config(run.schedule), run.sample)) - 1
    return sample.evaluations(run.sample, levels) * (1 if run.sample.guidance == 1 else 2)


def measure_sampling(name: str, only_compile: bool = False, batches: int = 4) -> dict:
    """Time forward passes, drawing, and drawing with the features that a distance needs, in bfloat16.

    Of batches of images in turn on one GPU, weights random, network and guidance as one CUDA graph. Images a
    second are over all `batches`, from noise to uint8 images; those with features in float32 as `evaluate`
    takes them. Of a ViT, forward passes and drawing are timed in float8 too.
    """
    how = SAMPLING[name]
    run = presets.preset(how.preset)
    torch.backends.cudnn.benchmark = not only_compile
    torch.backends.cudnn.benchmark_limit = run.train.cudnn_plans
    train.find_place("cuda")
    torch.manual_seed(0)
    denoiser = runs.build(run).to("cuda", memory_format=torch.channels_last).eval().requires_grad_(False)
    fill_zeros(denoiser.net)
    denoiser.net = runs.compiled(denoiser.net)
    network = evaluate.feature_network("efficientnet_lite0", "cuda")
    shape = (how.batch, run.data.channels, run.data.resolution, run.data.resolution)
    x, sigma = torch.randn(shape, device="cuda"), torch.tensor(1.0, device="cuda")
    labels = sample.labels_for(range(how.batch), run.data.classes).cuda() if run.data.classes else None
    forwards = {
        precision: forward_in(precision, denoiser, (x, sigma, labels)) for precision in precisions(run)
    }

    def images(count: int, precision: str = "bf16"):
        return sample.generate(denoiser, run, range(count), how.batch, "cuda", precision, cuda_graphs=True)

    def seconds(work: Iterable) -> float:
        began = time.perf_counter()
        for _ in work:
            pass
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds_to_start = 0.0
    for precision, forward in forwards.items():
        seconds_to_start += seconds(forward() for _ in range(1 if only_compile else cuda_graph.WARM_UP + 1))
        guided = images(how.batch, precision)  # twice as wide
        seconds_to_start += seconds(evaluate.features_of(network, guided))
    if only_compile:
        return {"name": name, "seconds": seconds_to_start}
    flops, matmul = forward_flops(run), matmul_rate()
    rates = {precision: how.batch / median_seconds(work, 20, 5) for precision, work in forwards.items()}
    count = batches * how.batch
    drawn, *in_fp8 = (count / seconds(images(count, precision)) for precision in forwards)
    measured = count / seconds(evaluate.features_of(network, images(count)))
    through = images_through_the_network(run)
    return {
        "name": name,
        "preset": how.preset,
        "parameters": sum(p.numel() for p in denoiser.net.parameters()),
        "forward_gflop_per_image": flops / 1e9,
        "batch": how.batch,
        "matmul_tflops": matmul / 1e12,
        **forward_rates(rates, flops, matmul),
        "sample": config.sample_json(run.sample),
        "images_through_the_network": through,
        "images_per_second": drawn,
        "passes_per_second_drawing": drawn * through,
        "sampling_share_of_matmul": drawn * through * flops / matmul,
        "images_per_second_with_features": measured,
        **({"images_per_second_fp8": in_fp8[0]} if in_fp8 else {}),
        "seconds_to_start": round(seconds_to_start, 1),
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def to_compile(names: Iterable[str]) -> list[str]:
    """Of things to measure, those that are compiled before: each network once, whatever replays its kernels.

    Not what is read from disk, which warms up by itself.
    """
    found = {}
    for name in names:
        if name in TRAINED and TRAINED[name].compile:
            found.setdefault(replace(TRAINED[name], cuda_graphs=False), name)
        elif name in SAMPLING:
            found[name] = name
    return list(found.values())


def main(
    out: Path,
    variants: tuple[str, ...] = (),
    one: str | None = None,
    only_compile: bool = False,
    latents: Path | None = None,
    scratch: Path | None = None,
) -> None:
    """Measure variants of networks that train, or sampling, and write a JSON file.

    Args:
        out: File to write, anew after each variant.
        scratch: Folder for the file of latents, on a disk and not in memory; by default the system's for
            temporary files.
        variants: Names of `VARIANTS`, `MEMORY`, `STEPS`, `CONTROL`, `SAMPLING` or `FROM_DISK`, or "changes
            to" one of `CHANGES`; by default all of the first.
        one: Used by the program itself for the process of one variant.
        only_compile: Used by the program itself: leave the variant compiled on the disk.
        latents: Used by the program itself: the file of latents to train on.
    """
    if one:
        if one in FROM_DISK:
            try:
                found = (measure_from_disk if FROM_DISK[one].gpus else measure_batches)(one, latents)
            except files.ReproError as error:
                raise SystemExit(str(error)) from None
        else:
            found = (measure_sampling if one in SAMPLING else measure)(one, only_compile)
        if found is not None:
            files.write_json(out, found)
        return
    groups = {
        f"changes to {name}": [step for step in STEPS if step.startswith(f"{name}: ")] for name in CHANGES
    }
    names = [each for name in variants or VARIANTS for each in groups.get(name, [name])]
    known = {**TRAINED, **SAMPLING, **FROM_DISK}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"there is nothing called {unknown[0]!r} to measure; known: {', '.join([*known, *groups])}"
        )
    about = {
        "device": evaluate.device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": train.versions(),
        "code": provenance.code_version("import repro.bench"),
        "commit": train.git_commit(),
    }
    results, failed = [], []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = ["-m", "repro.bench", "--out", str(Path(folder) / "one.json"), "--one"]
        compilings = {
            name: subprocess.Popen([sys.executable, *command, name, "--only-compile"])
            for name in to_compile(names)
        }
        for name, compiling in compilings.items():
            if compiling.wait():  # not all may fit on the GPU at once
                print(f"{name} is compiled when it is measured: see above", file=sys.stderr)
        for name in names:
            starter, more = [sys.executable], []
            if name in FROM_DISK:
                how = FROM_DISK[name]
                path = Path(folder) / "moments.f16"  # of one shape for all
                if not path.exists():
                    try:
                        write_latents(path, training_of(VARIANTS[how.variant]))
                    except files.ReproError as error:
                        raise SystemExit(str(error)) from None
                more = ["--latents", str(path)]
                if how.gpus > 1:
                    starter += ["-m", "torch.distributed.run", "--standalone"]
                    starter += ["--nproc-per-node", str(how.gpus)]
            if subprocess.run([*starter, *command, name, *more]).returncode:
                failed.append(name)
                continue
            results.append(json.loads((Path(folder) / "one.json").read_text()))
            files.write_json(out, {**about, "variants": results})
    if failed:
        raise SystemExit(f"could not measure {', '.join(failed)}; see above")


if __name__ == "__main__":
    tyro.cli(main)

"""How fast a network trains and samples on this GPU, and where the time of a step goes.

    python -m repro.bench --out paper/bench/unet64.json

Each variant is built and compiled in a process of its own, all at once; they are timed one after the
other. FLOPs are counted by torch (2 per multiply-add, matrix products and convolutions only); a training
step counts as 3 forward passes. Rates are medians over steps timed with CUDA events, on random data.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch.utils.flop_counter import FlopCounterMode

from repro import config, evaluate, files, presets, runs, train
from repro.models.unet import GroupNorm

PROTOTYPE = config.UNet(
    channels=96, multipliers=(1, 2, 2, 2), blocks=2, attention=(16, 8), resample_in_blocks=False, heads=4
)
"""The 22M network of the first prototype, for comparison at equal FLOPs."""

_lab = presets.PRESETS["lab/celeba64-unet"].model

VARIANTS = {
    "prototype, plain group norm": (PROTOTYPE, "plain"),
    "prototype": (PROTOTYPE, "moments"),
    "lab, plain group norm": (_lab, "plain"),
    "lab": (_lab, "moments"),
    "lab 96-1222": (replace(_lab, channels=96, multipliers=(1, 2, 2, 2), head_channels=64), "moments"),
    "lab 128-1112": (replace(_lab, channels=128, multipliers=(1, 1, 1, 2)), "moments"),
}
"""Name -> network and how its group norms are computed."""


class PlainGroupNorm(GroupNorm):
    """The same norm by `F.group_norm`, as a plain implementation has it."""

    def forward(self, x, scale=None, shift=None):
        """See `GroupNorm`."""
        y = F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return y.to(x.dtype)


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a bf16 product of two random size x size matrices."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats)


def median_seconds(work, repeats: int, warm_up: int = 3) -> float:
    """Median seconds of `work()` on the GPU."""
    for _ in range(warm_up):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2] / 1000


def forward_flops(run: config.Config) -> float:
    """FLOPs of one forward pass of one image."""
    net = runs.build(run).net.to("meta")
    size = run.data.resolution
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, run.data.channels, size, size, device="meta"), torch.zeros(1, device="meta"))
    return float(counter.get_total_flops())


KINDS = {
    "convolution": ("conv", "cudnn", "xmma", "implicit", "wgrad", "dgrad", "fprop", "sm80_", "sm90_", "nhwc"),
    "matrix product": ("gemm", "nvjet", "cutlass", "splitk"),
    "attention": ("flash", "fmha", "attention"),
    "norm and other reductions": ("triton_red", "triton_per"),
    "elementwise": ("triton_poi", "elementwise", "copy", "memset", "memcpy", "cat"),
    "optimizer": ("multi_tensor", "adam", "lpnorm"),
}


def kernel_shares(work, steps: int = 3) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Share of GPU time by kind of kernel, and the ten kernels that take most (name, milliseconds a step)."""
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
    order = ["attention", "norm and other reductions", "elementwise", "optimizer", "matrix product", "convolution"]
    for name, spent in times.items():
        kind = next((k for k in order if any(part in name.lower() for part in KINDS[k])), "other")
        shares[kind] += spent / total
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    return shares, [(name[:100], spent / steps / 1000) for name, spent in top]


def measure(name: str, batch: int, lock: Path) -> dict:
    """Compile one variant, wait for its turn, and time it."""
    network, norm = VARIANTS[name]
    lab = presets.PRESETS["lab/celeba64-unet"]
    run = replace(lab, model=network, train=replace(lab.train, batch=batch))
    torch.backends.cudnn.benchmark = True
    place = train.Place(0, 1, torch.device("cuda"))
    trainer = train.Trainer(run, place)
    if norm == "plain":
        for module in [*trainer.net.modules(), *trainer.ema.modules()]:
            if isinstance(module, GroupNorm):
                module.__class__ = PlainGroupNorm
    y = torch.randn(batch, 3, 64, 64, device="cuda")
    generator = torch.Generator("cuda")
    numbers = train.draw(run, 0, place, generator)

    def step():
        trainer.train_step(y, None, numbers)

    @torch.no_grad()
    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            trainer.ema_denoiser(y, torch.tensor(1.0), None)

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    compile_train = time.perf_counter() - began
    began = time.perf_counter()
    forward()
    torch.cuda.synchronize()
    compile_forward = time.perf_counter() - began
    flops = forward_flops(run)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        matmul = matmul_rate()
        seconds = median_seconds(step, 30, 10)
        forward_seconds = median_seconds(forward, 30, 10)
        print(f"{name}: {batch / seconds:,.0f} images/s trained, {batch / forward_seconds:,.0f} forward", flush=True)
        shares, top = kernel_shares(step)
    return {
        "name": name,
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "forward_gflop_per_image": flops / 1e9,
        "batch": batch,
        "train_images_per_second": batch / seconds,
        "train_tflops": 3 * flops * batch / seconds / 1e12,
        "forwards_per_second": batch / forward_seconds,
        "forward_tflops": flops * batch / forward_seconds / 1e12,
        "matmul_tflops": matmul / 1e12,
        "train_share_of_matmul": 3 * flops * batch / seconds / matmul,
        "forward_share_of_matmul": flops * batch / forward_seconds / matmul,
        "compile_seconds": [round(compile_train, 1), round(compile_forward, 1)],
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "step_time_shares": {kind: round(share, 4) for kind, share in shares.items()},
        "largest_kernels_ms": top,
    }


def main(out: Path, variants: tuple[str, ...] = (), batch: int = 256, one: tuple[str, str] | None = None) -> None:
    """Measure variants of the UNet at 64 x 64 and write a JSON file.

    Args:
        out: File to write.
        variants: Names of `VARIANTS`; by default all.
        batch: Images per step.
        one: Used by the program itself for the process of one variant: its name and the lock file.
    """
    if one:
        files.write_json(out, measure(one[0], batch, Path(one[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock"
        results, workers = [], []
        for number, name in enumerate(variants or tuple(VARIANTS)):
            part = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "repro.bench", "--out", str(part), "--batch", str(batch)]
            workers.append((part, subprocess.Popen([*command, "--one", name, str(lock)])))
        for part, worker in workers:
            if worker.wait() == 0:
                results.append(json.loads(part.read_text()))
        about = {"device": evaluate.device_name("cuda"), "versions": train.versions(), "code": files.sha256(__file__)}
        files.write_json(out, {**about, "variants": results})
        for result in results:
            print(json.dumps(result))
        if len(results) < len(workers):
            raise SystemExit(f"{len(workers) - len(results)} variants failed; see above")


if __name__ == "__main__":
    tyro.cli(main)

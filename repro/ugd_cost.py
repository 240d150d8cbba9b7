"""What an iteration of UGD costs beside one of Min-SNR (supplement, section 4.2 and Figure 8).

    python -m repro.ugd_cost --out paper/bench/ugd.json

UGD needs the gradient of every noise level's loss, and then the weights of their shortest combination. Here
each level's is taken over the whole batch; the supplement does not say. The 250 steps on the weights may
form sum_t w_t g_t anew each time, two passes over T gradients of p numbers, or work on their Gram matrix,
formed once, where a step costs T^2 (as the code of Sener and Koltun 2018, whom the supplement follows, does
too). Either way T forward and backward passes remain, where Min-SNR takes one. Every part is timed by
itself, so that what bounds the whole can be read off.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from repro import config, cuda_graph, evaluate, files, pareto, presets, provenance, train
from repro.files import ReproError

STEPS = 250
"""On the weights, in each iteration (supplement, section 4.2)."""

NETWORKS = {
    "lab arm": presets.preset("lab/imagenet64-x0-minsnr5"),
    "lab ViT": presets.preset("lab/imagenet64-vit"),
    "ViT-B": presets.preset("paper/imagenet64-x0-minsnr5"),
}
"""Of the benchmark: the arms of Figure 1 and the ViT of Figure 10 at lab scale, and the paper's ablation."""


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Least wall-clock seconds of `work()` over repeats, after it was done once; waits for a GPU.

    What takes 10 seconds or more is done once only.
    """
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        if times[0] > 10:
            return times[0]
    return min(times[1:])


def steps_without_gram(gradients: Float[Tensor, "T p"], steps: int = STEPS) -> Float[Tensor, " T"]:
    """The weights after `steps` of Frank and Wolfe's method, each of which reads all gradients twice.

    As `pareto.frank_wolfe`, without a Gram matrix: u = sum_t w_t g_t and all <g_t, u> are formed in each
    step, in the type of the gradients. Nothing waits for a GPU. Raises `ReproError` for fewer than 1 step.
    """
    if steps < 1:
        raise ReproError(f"steps must be at least 1, not {steps}")
    w = torch.full((len(gradients),), 1 / len(gradients), dtype=torch.float64, device=gradients.device)
    for _ in range(steps):
        u = w.to(gradients.dtype) @ gradients
        products = (gradients @ u).double()
        squared_norm, worst = w @ products, products.argmin(0, keepdim=True)
        gap = squared_norm - products.index_select(0, worst)
        curvature = (gradients.index_select(0, worst)[0] - u).double().square().sum()
        move = (gap / curvature).clamp(0, 1).nan_to_num(0.0)  # 0 / 0 at the minimum
        w = ((1 - move) * w).index_add_(0, worst, move)
    return w


class LevelGradients:
    """Gradients of the mean loss of one batch at one noise level after the other, as the network is trained.

    Compiled, in bfloat16, and replayed as a CUDA graph where the run's training steps are.
    """

    def __init__(self, trainer: train.Trainer, y: Tensor, noise: Tensor, labels: Tensor | None):
        self.trainer, self.given = trainer, (y, noise, labels)
        self.at = cuda_graph.Captured(self._at) if trainer.graphs else self._at

    def _at(self, sigma: Float[Tensor, ""]) -> Float[Tensor, " p"]:
        trainer, (y, noise, labels) = self.trainer, self.given
        for p in trainer.parameters:
            p.grad = None
        with train.tf32(trainer.run.train.precision == "bf16"):
            trainer.loss_at(trainer.denoiser, y, noise, sigma.expand(len(y)), labels).mean().backward()
        return torch.cat([p.grad.flatten() for p in trainer.parameters])

    def __call__(self, sigmas: Float[Tensor, " T"], rows: Float[Tensor, "T p"]) -> None:
        """Write the gradient at each level into its row."""
        for row, sigma in zip(rows, sigmas, strict=True):
            row.copy_(self.at(sigma))


def measure(
    name: str, run: config.Config, levels: Sequence[int], batch: int, device: torch.device, steps: int = STEPS
) -> Iterator[dict]:
    """Seconds of the parts of an iteration with each number of levels: a line each.

    Of a new network and random images. `minsnr` is one training step, as `repro.train` makes it. A line says
    `too_large` where gradients of so many levels would take more than 70% of the memory that is free, or do.
    The steps on the Gram matrix are done on the CPU, copy included: on a GPU each waits for the last.
    """
    if run.train.compile:
        torch._dynamo.reset()  # what it knows of other networks counts towards a limit
    run = replace(run, train=replace(run.train, batch=batch, micro_batch=None))
    place = train.Place(0, 1, device)
    trainer = train.Trainer(run, place)
    shape = (batch, run.data.channels, run.data.resolution, run.data.resolution)
    y, noise = (
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    labels = torch.randint(run.data.classes, (batch,), device=device) if run.data.classes else None
    numbers = train.draw(run, 0, place, torch.Generator(device))
    for _ in range(5):  # compiled, and captured
        trainer.train_step(y, labels, numbers)
    one = seconds_of(lambda: trainer.train_step(y, labels, numbers), device, 20)
    trainer.close()
    gradients = LevelGradients(trainer, y, noise, labels)
    parameters = sum(p.numel() for p in trainer.parameters)
    about = {"network": name, "parameters": parameters, "batch": batch, "steps": steps, "minsnr": one}
    about["cuda_graphs"] = trainer.graphs
    few = evaluate.levels_of(trainer.denoiser.schedule, 5).to(device)
    gradients(few, torch.empty(5, parameters, device=device))  # compiled, and captured
    for T in levels:
        size, free = 4 * T * parameters, _free(device)
        if size > 0.7 * free:
            yield {**about, "levels": T, "too_large": f"{size / 2**30:.0f} GiB of gradients"}
            continue
        sigmas = evaluate.levels_of(trainer.denoiser.schedule, T).to(device)
        try:
            yield {**about, "levels": T, **_parts(gradients, sigmas, parameters, steps, device)}
        except torch.cuda.OutOfMemoryError:
            yield {
                **about,
                "levels": T,
                "too_large": f"{size / 2**30:.0f} GiB of gradients, and what they need",
            }


def _parts(
    gradients: LevelGradients, sigmas: Tensor, parameters: int, steps: int, device: torch.device
) -> dict[str, float]:
    """The parts of an iteration of so many levels, by name, in seconds."""
    T = len(sigmas)
    rows = torch.empty(T, parameters, device=device)
    taken = seconds_of(lambda: gradients(sigmas, rows), device, 1)
    w = torch.full((T,), 1 / T, device=device)
    generic = pareto.gram(torch.randn(T, 4 * T, device=device))  # on which no step is left out
    return {
        "gradients": taken,
        "without_gram": seconds_of(lambda: steps_without_gram(rows, steps), device, 1),
        "gram": seconds_of(lambda: pareto.gram(rows, 2**20), device, 1),
        "gram_steps": seconds_of(lambda: pareto.frank_wolfe(generic.cpu(), steps), device, 1),
        "exact": seconds_of(lambda: pareto.exact(generic.cpu()), device, 1),
        "combine": seconds_of(lambda: w @ rows, device, 3),
        "gradients_gib": 4 * T * parameters / 2**30,
    }


def _free(device: torch.device) -> int:
    """Bytes of memory that is free once nothing is held for later; on a CPU, 4 GiB."""
    if device.type != "cuda":
        return 4 * 2**30
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def totals(line: dict) -> dict[str, float]:
    """Seconds of an iteration by method, of a line of `measure`; none where it was too large.

    The optimizer's step is in `minsnr` alone: it is little beside the rest.
    """
    if "too_large" in line:
        return {"Min-SNR": line["minsnr"]}
    shared = line["gradients"] + line["combine"]
    return {
        "Min-SNR": line["minsnr"],
        "UGD, without Gram matrix": shared + line["without_gram"],
        "UGD, Gram matrix": shared + line["gram"] + line["gram_steps"],
    }


def main(
    out: Path,
    networks: tuple[str, ...] = tuple(NETWORKS),
    levels: tuple[int, ...] = (10, 30, 100, 300, 1000),
    batches: tuple[int, ...] = (64, 256),
    device: str | None = None,
) -> None:
    """Measure the cost of UGD and write a JSON file.

    Args:
        out: File to write, anew after each line.
        networks: Names of `NETWORKS`.
        levels: Numbers of noise levels.
        batches: Images of an iteration.
        device: By default the GPU if there is one.
    """
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise SystemExit(f"there is no network {unknown[0]!r} to measure; known: {', '.join(NETWORKS)}")
    place = train.find_place(device)
    about = {
        "device": evaluate.device_name(place.device),
        "versions": train.versions(),
        "code": provenance.code_version("import repro.ugd_cost"),
        "commit": train.git_commit(),
    }
    lines = []
    for name in networks:
        for batch in batches:
            for line in measure(name, NETWORKS[name], levels, batch, place.device):
                lines.append(line)
                files.write_json(out, {**about, "lines": lines})
                print(f"{name}, batch {batch}, {line['levels']} levels: {totals(line)}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)

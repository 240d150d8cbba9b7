"""What an iteration of UGD costs beside one of Min-SNR (supplement, section 4.2 and Figure 8).

    python -m repro.ugd_cost --out paper/bench/ugd.json

UGD needs the gradient of every noise level's loss, over the whole batch, and then the weights of their
shortest combination. Literally, each of 250 steps on the weights forms sum_t w_t g_t anew: two passes over
T gradients of p numbers. On their Gram matrix, formed once, a step costs T^2. Either way T forward and
backward passes of the batch remain, where Min-SNR takes one. Every part is timed by itself, so that what
bounds the whole can be read off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from repro import config, evaluate, files, pareto, presets, provenance, train
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
    """Least wall-clock seconds of `work()` over repeats, after it was done once; waits for a GPU."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def literal_steps(gradients: Float[Tensor, "T p"], steps: int = STEPS) -> Float[Tensor, " T"]:
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
        squared_norm, worst = w @ products, products.argmin()
        gap = squared_norm - products[worst]
        towards = gradients[worst] - u
        curvature = towards.double().square().sum()
        move = (gap / curvature).clamp(0, 1).nan_to_num(0.0)  # 0 / 0 at the minimum
        w = (1 - move) * w
        w[worst] += move
    return w


def by_level(
    trainer: train.Trainer, y: Tensor, noise: Tensor, sigmas: Tensor, labels: Tensor | None, rows: Tensor
) -> None:
    """Write the gradient of the mean loss at each level into its row, by the network as it is trained."""
    bf16 = trainer.run.train.precision == "bf16"
    for row, sigma in zip(rows, sigmas, strict=True):
        trainer.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(y.device.type, torch.bfloat16, enabled=bf16):
            loss = trainer.denoiser.loss(y, noise, sigma.expand(len(y)), labels, trainer.weight).mean()
        loss.backward()
        torch.cat([p.grad.flatten() for p in trainer.parameters], out=row)


def measure(
    name: str, run: config.Config, levels: Sequence[int], batch: int, device: torch.device, steps: int = STEPS
) -> list[dict]:
    """Seconds of the parts of an iteration with each number of levels: one line each.

    Of a new network and random images. `minsnr` is one training step, as `repro.train` makes it. A line says
    `too_large` where gradients of so many levels would take more than 70% of the device's memory.
    """
    quick = replace(run.train, batch=batch, micro_batch=None)
    run = replace(run, train=quick)
    place = train.Place(0, 1, device)
    trainer = train.Trainer(run, place)
    shape = (batch, run.data.channels, run.data.resolution, run.data.resolution)
    y, noise = torch.rand(shape, device=device) * 2 - 1, torch.randn(shape, device=device)
    labels = torch.randint(run.data.classes, (batch,), device=device) if run.data.classes else None
    numbers = train.draw(run, 0, place, torch.Generator(device))
    for _ in range(5):  # compiled, and captured
        trainer.train_step(y, labels, numbers)
    one = seconds_of(lambda: trainer.train_step(y, labels, numbers), device, 20)
    trainer.close()
    parameters = sum(p.numel() for p in trainer.parameters)
    about = {"network": name, "parameters": parameters, "batch": batch, "steps": steps, "minsnr": one}
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    lines = []
    for T in levels:
        size = 4 * T * parameters
        if size > 0.7 * free:
            lines.append({**about, "levels": T, "too_large": f"{size / 2**30:.0f} GiB of gradients"})
            continue
        sigmas = evaluate.levels_of(trainer.denoiser.schedule, T).to(device)
        rows = torch.empty(T, parameters, device=device)
        fill = seconds_of(lambda: by_level(trainer, y, noise, sigmas, labels, rows), device, 1)  # noqa: B023
        G = pareto.gram(rows, 2**20)
        w = pareto.exact(G).weights
        generic = pareto.gram(torch.randn(T, 4 * T, device=device))  # on which all steps are taken
        lines.append(
            {
                **about,
                "levels": T,
                "gradients": fill,
                "literal_steps": seconds_of(lambda: literal_steps(rows, steps), device, 1),  # noqa: B023
                "gram": seconds_of(lambda: pareto.gram(rows, 2**20), device, 1),  # noqa: B023
                "gram_steps": seconds_of(lambda: pareto.frank_wolfe(generic, steps), device, 1),  # noqa: B023
                "exact": seconds_of(lambda: pareto.exact(generic), device, 1),  # noqa: B023
                "combine": seconds_of(lambda: w.to(rows) @ rows, device, 3),  # noqa: B023
                "gradients_gib": size / 2**30,
            }
        )
        del rows
    return lines


def totals(line: dict) -> dict[str, float]:
    """Seconds of an iteration by method, of a line of `measure`; none where it was too large.

    The optimizer's step is in `minsnr` alone: it is little beside the rest.
    """
    if "too_large" in line:
        return {"Min-SNR": line["minsnr"]}
    shared = line["gradients"] + line["combine"]
    return {
        "Min-SNR": line["minsnr"],
        "UGD, literally": shared + line["literal_steps"],
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
        out: File to write, anew after each network and batch.
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
            lines += measure(name, NETWORKS[name], levels, batch, place.device)
            files.write_json(out, {**about, "lines": lines})
            print(
                f"{name}, batch {batch}: " + ", ".join(str(totals(line)) for line in lines[-1:]), flush=True
            )


if __name__ == "__main__":
    tyro.cli(main)

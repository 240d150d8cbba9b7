"""Measure of a recorded run all that Figures 10 and 11 and Sections 4.4 and 4.5 show of the flagships.

    python -m repro measure lab/imagenet64-vit --dry-run
    python -m repro measure lab/imagenet64-vit

Each piece of work is a command of its own, `evaluate` or `sample --record`, and each GPU does one after the
other. What the record has is left out, so that a measurement that was stopped goes on:

- a sweep of guidance, steps and churn, on seeds that no reported number is of;
- its best on the reported seeds, and rows of pictures: by it, without guidance, and without churn;
- samplers over their evaluations, and rows of pictures by some of them;
- blocks of samples on disjoint seeds, with the first precision, recall and nearest training images;
- smaller blocks, as many samples as of each sampler: how far apart two samplers must be to differ;
- other precisions, on the sweep's seeds: float8 too of a ViT, which needs a GPU since Ada or Hopper.
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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import torch

from repro import config, files, provenance, runs, sample, schedules
from repro.files import ReproError

SWEEPS = provenance.ROOT / "paper" / "sweeps"
"""Lists of samplers, as `evaluate --settings` takes them."""

ELSEWHERE = 3_000_000
"""The sweep's first seed, beyond those of samplers and blocks."""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn; raises `ReproError` for what cannot be measured."""

    few: int = 5_000
    """Samples by each way of a sweep, and by each sampler."""
    many: int = 50_000
    """Samples of a block."""
    blocks: int = 3
    few_blocks: int = 10
    """Blocks of `few`: their deviation is what samplers are compared by."""
    pictures: int = 12
    """In a row that shows guidance."""
    pictures_by_sampler: int = 8

    def __post_init__(self):
        if min(self.few, self.many) < 2 or min(self.blocks, self.few_blocks) < 1:
            raise ReproError("measure needs 2 samples or more each time (few, many), and 1 block or more")


@dataclass(frozen=True)
class Work:
    """One command: its arguments, without the samplers, which it reads from a file."""

    command: str
    told: str
    arguments: tuple[str, ...]
    settings: tuple[config.Sample, ...]
    passes: int
    """Of one image through the network: what the time goes with."""


def listed(name: str, own: config.Sample) -> list[config.Sample]:
    """The samplers of one file of paper/sweeps; what does not name a sampler changes the run's `own`."""
    return sample.read_settings(SWEEPS / f"{name}.json", own)


def sweep(run: runs.Run) -> list[config.Sample]:
    """The ways of drawing of which the best is chosen, each once."""
    ways = [how for name in ("imagenet64-guidance", "imagenet64-churn") for how in listed(name, run.sample)]
    return list(dict.fromkeys(ways))


def best(run: runs.Run, sizes: Sizes = Sizes()) -> config.Sample:
    """The way of the sweep with the least distance; raises `ReproError` where some are not measured yet."""
    found = {}
    for how in sweep(run):
        lines = _lines(run, how, sizes.few, ELSEWHERE)
        if not lines:
            raise ReproError(f"{run.name} lacks a distance of the sweep: measure it first")
        found[how] = lines[-1]["value"]
    return min(found, key=found.get)


def _lines(
    run: runs.Run, how: config.Sample, samples: int, first: int, precision: str | None = None
) -> list[dict]:
    """Recorded distances of the final weights, so drawn."""
    return [
        line
        for line in run.measured(how, samples, precision=precision)
        if (line["images"], line["first_seed"]) == (run.record.images, first)
    ]


def _passes(run: runs.Run, how: config.Sample) -> int:
    """Of the network, for one image."""
    levels = len(schedules.grid_for(schedules.from_config(run.config.schedule), how)) - 1
    return sample.evaluations(how, levels) * (2 if how.guidance != 1 else 1)


def first_part(run: runs.Run, sizes: Sizes = Sizes(), parts: int = 4) -> list[Work]:
    """What is missing of the sweep, in so many parts."""
    return _shared(run, "sweep", sweep(run), sizes.few, ELSEWHERE, parts)


def second_part(
    run: runs.Run, sizes: Sizes = Sizes(), parts: int = 8, device: str | None = None
) -> list[list[Work]]:
    """What is missing of the rest; work of one list is done in its order.

    device: where, as not all have float8; by default this machine's GPU, or one that has it. Raises
    `ReproError` where the sweep is not whole.
    """
    own, first = run.sample, run.config.evaluate.first_seed
    chosen, ten = best(run, sizes), run.config.evaluate.samples
    for blocks, samples in ((sizes.blocks, sizes.many), (sizes.few_blocks, sizes.few)):
        if first < ELSEWHERE < first + blocks * samples:
            raise ReproError(
                f"{blocks} blocks of {samples:,} samples would reach the sweep's seeds, from "
                f"{ELSEWHERE:,} on; take fewer"
            )
    ways = listed("imagenet64-samplers", own)
    work = _shared(run, "samplers", ways, sizes.few, first, parts)
    for block in range(sizes.blocks):
        seed, further = first + block * sizes.many, ()
        lines = _lines(run, own, sizes.many, seed)
        if block == 0:
            further = ("--neighbours", "--precision-recall")
            beside = [each for line in lines for each in run.of_the_same_samples(line)]
            # training measures the nearest images too, of fewer samples
            whole = [each for each in beside if each["samples"] == sizes.many or "k" in each]
            named = {each["name"].split()[0] for each in whole}
            lines = lines if {"nearest", "precision", "recall"} <= named else []
        if not lines:
            work.append(_evaluate(run, f"block {block}", [own], sizes.many, seed, further))
    small = [first + block * sizes.few for block in range(sizes.few_blocks)]
    measured = [bool(_lines(run, own, sizes.few, seed)) for seed in small]
    measured[0] |= own in ways  # is one of the samplers
    if sizes.few_blocks > 1 and not all(measured):
        start = measured.index(False)  # from there on all, by one command, which compiles once
        further = ("--blocks", str(len(small) - start))
        work.append(
            _evaluate(run, "small blocks", [own], sizes.few, small[start], further, len(small) - start)
        )
    for precision in ("fp32", "fp16") + (("fp8",) if sample.takes_fp8(run.config, device) else ()):
        if not _lines(run, own, sizes.few, ELSEWHERE, precision):
            further = ("--precision", precision)
            work.append(_evaluate(run, precision, [own], sizes.few, ELSEWHERE, further))
    pictures = []
    if not _lines(run, chosen, ten, first):
        pictures.append(_evaluate(run, "best of the sweep", [chosen], ten, first))
    shown = [replace(chosen, guidance=1.0, churn=0.0), chosen, replace(chosen, churn=0.0)]
    rows = (
        ("guidance", list(dict.fromkeys(shown)), sizes.pictures),
        ("samplers", listed("imagenet64-pictures", own), sizes.pictures_by_sampler),
    )
    drawn = {taken.sample: taken.cols for taken in run.record.further_samples}
    for told, ways, columns in rows:
        if left := [how for how in ways if drawn.get(how, 0) < columns]:
            drawn |= dict.fromkeys(left, columns)  # a way has one row: the longer one, which is drawn first
            arguments = ("--record", "--seeds", "0", str(columns))
            passes = columns * sum(_passes(run, how) for how in left)
            pictures.append(Work("sample", f"pictures by {told}", arguments, tuple(left), passes))
    whole = [[one] for one in work] + ([pictures] if pictures else [])
    return sorted(whole, key=lambda works: -sum(one.passes for one in works))


def _evaluate(
    run: runs.Run,
    told: str,
    ways: Sequence[config.Sample],
    samples: int,
    first: int,
    further: tuple[str, ...] = (),
    blocks: int = 1,
) -> Work:
    arguments = ("--evaluate.samples", str(samples), "--evaluate.first-seed", str(first), *further)
    passes = blocks * samples * sum(_passes(run, how) for how in ways)
    return Work("evaluate", told, arguments, tuple(ways), passes)


def _shared(
    run: runs.Run, told: str, ways: Iterable[config.Sample], samples: int, first: int, parts: int
) -> list[Work]:
    """Those of `ways` that are not measured, in parts of about as many passes, the longest first."""
    left = [how for how in dict.fromkeys(ways) if not _lines(run, how, samples, first)]
    groups: list[list[config.Sample]] = [[] for _ in range(min(parts, len(left)))]
    for how in sorted(left, key=lambda how: -_passes(run, how)):
        min(groups, key=lambda group: sum(_passes(run, each) for each in group)).append(how)
    work = [_evaluate(run, f"{told} {n}", group, samples, first) for n, group in enumerate(groups, 1)]
    return sorted(work, key=lambda one: -one.passes)


def load(name: str) -> runs.Run:
    """The recorded run.

    Raises `ReproError` where it has no weights, does not know the null class, or draws latents, which some of
    the samplers cannot.
    """
    run = runs.load_run(name)
    if run.config.data.autoencoder:
        raise ReproError(f"{name} draws latents, which have no range to clip to as samplers here do")
    if not (run.config.data.classes and getattr(run.config.model, "null_class", False)):
        raise ReproError(f"{name} knows no null class, so it has no guidance to measure; use evaluate")
    if not run.record.weights:
        raise ReproError(f"{name} is recorded without weights, so nothing can be drawn")
    return run


def missing(name: str, sizes: Sizes = Sizes(), device: str | None = None) -> list[Work]:
    """What `measure` would do; where the sweep is not whole, that alone, as its best is not known.

    device: as in `second_part`. Raises what `load` does.
    """
    run = load(name)
    left = first_part(run, sizes)
    return left or [one for works in second_part(run, sizes, device=device) for one in works]


def tell(works: Iterable[Work]) -> list[str]:
    """Of each a line, with thousands of passes through the network, and one for each of its samplers."""
    told = []
    for one in works:
        thousands = f"{math.ceil(one.passes / 1000):,} thousand passes"
        told.append(f"{one.told}: {thousands} ({one.command} {' '.join(one.arguments)})")
        told += [f"  {config.sample_told(how)}" for how in one.settings]
    return told


def measure(name: str, sizes: Sizes = Sizes(), device: str | None = None, compile: bool = True) -> None:
    """Do all that is missing of the recorded run `name`; one line of each piece, when done.

    device: by default all GPUs; else the one to use, or "cpu". compile: compile networks, which is worth it
    for thousands of images.

    Raises what `load` does, and `ReproError` without a GPU unless `device` is "cpu", under `torchrun`, where
    commands of an earlier call still run, and in the end, naming logs, where commands failed; what others
    measured is recorded then.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ReproError("measure shares its work out among GPUs by itself: start it without torchrun")
    if device is None and not torch.cuda.is_available():
        raise ReproError(
            "torch sees no GPU, and without one this takes days; --device cpu does it all the same"
        )
    run = load(name)
    devices = [device] if device else [f"cuda:{gpu}" for gpu in range(torch.cuda.device_count())]
    with files.lock(run.path) as lock:
        logs = _logs()
        print(f"what the commands say: {logs}", flush=True)
        how = {"devices": devices, "logs": logs, "lock": lock, "compile": compile}
        parts = len(devices) * math.ceil(4 / len(devices))  # as many for each
        _work_off([[one] for one in first_part(run, sizes, parts)], run, **how)
        run = load(name)  # with what was measured
        _work_off(second_part(run, sizes, 2 * parts, devices[0]), run, **how)
        shutil.rmtree(logs, ignore_errors=True)


def _logs() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="measure-"))
    except OSError as error:
        raise ReproError(f"cannot make a folder for logs: {error}") from error


def _work_off(
    works: list[list[Work]], run: runs.Run, devices: list[str], logs: Path, lock: IO, compile: bool
) -> None:
    """Run the commands, each on a device that is free."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def one_after_the_other(works: list[Work]) -> list[str]:
        device = free.get()
        try:
            for one in works:
                began = time.perf_counter()
                log = logs / f"{one.told.replace(' ', '-')}.txt"
                try:
                    well = _run(one, run, device, log, lock, compile)
                except OSError as error:  # a full disk, say
                    return [f"{one.told} ({error})"]
                if not well:
                    return [f"{one.told} ({log})"]
                print(f"{one.told}: {time.perf_counter() - began:.0f} s", flush=True)
            return []
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        failed = [each for some in pool.map(one_after_the_other, works) for each in some]
    if failed:
        raise ReproError(f"commands failed: {'; '.join(failed)}. Mend that, and the same command goes on.")


def _run(one: Work, run: runs.Run, device: str, log: Path, lock: IO, compile: bool) -> bool:
    """Run one command, which keeps the record's lock should this process be killed; whether it went well."""
    settings = log.with_suffix(".json")
    settings.write_text(json.dumps([config.sample_json(how) for how in one.settings]))
    command = [sys.executable, "-m", "repro", one.command, str(run.path), *one.arguments]
    command += ["--settings", str(settings), "--device", device]
    command += ["--compile"] * (compile and one.command == "evaluate")
    with open(log, "w") as file:
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),))
    return ended.returncode == 0

"""Command line: prepare · train · sample · evaluate · render · presets."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from repro.config import Config
from repro.files import ReproError
from repro.presets import PRESETS, preset

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]


def prepare(
    dataset: tyro.conf.Positional[Literal["celeba64", "imagenet64"]],
    /,
    source: Annotated[list[Path], tyro.conf.arg(metavar="DIR_OR_TAR ...")],
    name: str | None = None,
    root: Folder = None,
    on_corrupt: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Crop, resize and pack images into one data set.

    Args:
        dataset: How to prepare: celeba64 (unlabelled), or imagenet64 (class folders).
        source: Folder of images, or tar archives of one.
        name: Name of the result; by default that of the data set.
        root: Where data sets lie; by default $REPRO_DATA, else data/prepared.
        on_corrupt: Stop at files that cannot be read, or leave them out and list them in the manifest.
        overwrite: Replace a data set of this name that was made from another source.
        workers: Images prepared at once; by default one per core.
    """
    from repro import data

    data.prepare(
        dataset, source, root=root, name=name, on_corrupt=on_corrupt, overwrite=overwrite, workers=workers
    )


def sample(
    run: tyro.conf.Positional[str],
    /,
    out: Path,
    seeds: tuple[int, int] = (0, 64),
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 64,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    runs_root: Folder = None,
) -> None:
    """Draw images from a recorded run, one PNG per seed.

    Args:
        run: Name of the recorded run, such as lab/celeba64-unet, or its folder.
        out: Folder for <seed>.png.
        seeds: First seed, and the one after the last.
        steps: Noise levels visited; by default as recorded.
        guidance: Classifier-free guidance scale; by default as recorded.
        batch: Images at a time; does not change them.
        device: cpu, cuda or cuda:N; by default the GPU if there is one.
        precision: Of the network.
        runs_root: Where recorded runs lie; by default $REPRO_RUNS, else paper/runs.
    """
    from PIL import Image

    from repro import files, runs, train
    from repro import sample as sampling

    if seeds[1] <= seeds[0]:
        raise ReproError(f"--seeds {seeds[0]} {seeds[1]} is empty: give the first seed and the one after the last")
    recorded = runs.load_run(run, runs_root)
    changes = {"steps": steps, "guidance": guidance}
    how = replace(recorded.config.sample, **{key: value for key, value in changes.items() if value is not None})
    place = train.find_place(device)
    chosen = list(range(*seeds))[place.rank :: place.world]
    denoiser = recorded.denoiser(place.device)
    images = sampling.generate(denoiser, recorded.config, chosen, batch, place.device, precision, how)
    pending = iter(chosen)
    for group in images:
        for image in group.permute(0, 2, 3, 1).cpu().numpy():
            picture = Image.fromarray(image)
            files.replace_atomic(out / f"{next(pending)}.png", lambda path, p=picture: p.save(path, format="PNG"))
    print(f"{len(chosen)} images in {out}")


def evaluate(
    run: tyro.conf.Positional[str],
    /,
    samples: int | None = None,
    first_seed: int | None = None,
    features: Literal["efficientnet_lite0", "inception"] | None = None,
    steps: int | None = None,
    batch: int = 500,
    neighbours: bool = False,
    record: bool = True,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] = "bf16",
    compile: bool = False,
    runs_root: Folder = None,
) -> None:
    """Measure a recorded run and append the result to its metrics.jsonl.

    Args:
        run: Name of the recorded run, such as lab/celeba64-unet, or its folder.
        samples: How many images to draw; by default as recorded.
        first_seed: First sample seed; by default as recorded.
        features: Feature network; by default as recorded. A distance on Inception's is an FID.
        steps: Noise levels visited; by default as recorded.
        batch: Images at a time; does not change them.
        neighbours: Also measure how close samples are to their nearest training images.
        record: Append to metrics.jsonl; --no-record only prints.
        device: cpu, cuda or cuda:N; by default the GPU if there is one.
        precision: Of the network.
        compile: Compile the network first (worth it from some thousand images on).
        runs_root: Where recorded runs lie; by default $REPRO_RUNS, else paper/runs.
    """
    import torch

    from repro import evaluate as evaluation
    from repro import files, runs, train

    recorded = runs.load_run(run, runs_root)
    place = train.find_place(device)
    denoiser = recorded.denoiser(place.device)
    if compile:
        denoiser.net = torch.compile(denoiser.net, dynamic=False)
    how = recorded.config
    if steps is not None:
        how = replace(how, sample=replace(how.sample, steps=steps))
    lines = evaluation.evaluate(
        denoiser, how, recorded.record.images, place.device, precision, batch, samples, first_seed, features, neighbours
    )
    for line in lines if place.first else []:
        print(f"{line['name']}: {line['value']:.4f} ({line['samples']:,} samples from seed {line['first_seed']})")
        if record:
            files.append_line(recorded.path / "metrics.jsonl", line)


def render(
    ids: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    param: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"], metavar="NAME=VALUE")] = (),
    force: bool = False,
    list: bool = False,
) -> None:
    """Execute notebooks and so draw figures; what is up to date is left alone.

    Args:
        ids: Outputs to render, such as fig9_celeba64_unet; with none, all.
        param: Notebook parameters to change.
        force: Execute even where nothing has changed.
        list: Only list the ids.
    """
    from repro import render as rendering

    if list:
        print("\n".join(rendering.ids()))
        return
    overrides = rendering.parse_overrides([*param])
    for id in ids or rendering.ids():
        rendering.render(id, overrides=overrides, force=force)


def presets() -> None:
    """List the runs that can be trained."""
    for name, chosen in PRESETS.items():
        weight = chosen.weight.name + (f" {chosen.weight.gamma:g}" if chosen.weight.gamma else "")
        print(f"{name:24s} {chosen.data.name}, {chosen.model.kind}, {chosen.parameterization}, {weight}, "
              f"{chosen.train.images / 1e6:g}M images. {chosen.note}")  # fmt: skip


@dataclass
class TrainOptions:
    """Train a preset into a run folder; goes on by itself where it was stopped."""

    run: Annotated[Config, tyro.conf.arg(name="")]
    out: Folder = None
    """Run folder; by default runs/<preset>."""
    data_root: Folder = None
    """Where data sets lie; by default $REPRO_DATA, else data/prepared."""
    device: str | None = None
    """cpu or cuda; by default the GPU if there is one."""


def train() -> None:
    """Train a preset, or go on where it was stopped: python -m repro train lab/celeba64-unet --help."""
    print(f"usage: python -m repro train PRESET [--out DIR] [options]\n\nPresets: {', '.join(PRESETS)}")


def train_preset(arguments: list[str]) -> None:
    """`train PRESET ...`: the preset is named first, since the defaults of all options come from it."""
    chosen = preset(arguments[0])
    options = tyro.cli(
        TrainOptions,
        default=TrainOptions(run=chosen),
        args=arguments[1:],
        prog=f"python -m repro train {chosen.name}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    from repro.train import train as run_training

    folder = run_training(
        options.run, options.out or Path("runs") / chosen.name, options.data_root, options.device
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"recorded in {folder}")


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "render": render,
    "presets": presets,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mendable error is one line on standard error and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
            train_preset(arguments[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m repro", args=arguments)
    except ReproError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

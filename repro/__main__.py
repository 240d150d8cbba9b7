"""Command line: prepare, train, train-all, sample, evaluate, measure, gradients, encode, import, render,
claims, trace, verify, cards, report, archive, site, presets.

`train`, `sample` and `evaluate` are named what they work on first (a preset, or a recorded run), since
the defaults of all their options come from it: `python -m repro train lab/celeba64-unet --help`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

try:
    import tyro
    from pydantic import ValidationError
except ImportError as error:
    sys.exit(f"{sys.executable} has no {error.name}: run make env, then .venv/bin/python -m repro")

from repro import config
from repro.files import ReproError
from repro.presets import PRESETS, preset

if TYPE_CHECKING:
    from repro import runs, train

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Device = Annotated[str | None, tyro.conf.arg(metavar="cpu|cuda|cuda:N")]
PROG = "python -m repro"
MANY = 1_000
"""Samples that take hours on a CPU."""


def prepare(
    dataset: tyro.conf.Positional[Literal["celeba64", "imagenet64", "imagenet256"]],
    /,
    source: Annotated[list[Path], tyro.conf.arg(metavar="DIR_OR_TAR ...")],
    name: str | None = None,
    split: str | None = None,
    root: Folder = None,
    on_corrupt: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Crop, resize and pack images into one data set.

    Args:
        dataset: How to prepare: celeba64 (unlabelled), imagenet64 or imagenet256 (class folders).
        source: Folder of images, or tar archives of one.
        name: Name of the result; by default that of the data set.
        split: Prepare only this split of a source with train and val folders.
        root: Where data sets lie; by default $REPRO_DATA, else data/prepared.
        on_corrupt: Stop at files that cannot be read, or leave them out and list them in the manifest.
        overwrite: Replace a data set of this name that was made from another source.
        workers: Images prepared at once; by default one per core.
    """
    from repro.prepare import prepare as prepare_images

    prepare_images(
        dataset,
        source,
        root,
        name=name,
        split=split,
        on_corrupt=on_corrupt,
        overwrite=overwrite,
        workers=workers,
    )


@dataclass
class TrainOptions:
    """Train a preset into a run folder; goes on by itself where it was stopped."""

    run: Annotated[config.Config, tyro.conf.arg(name="")]
    out: Folder = None
    """Run folder; by default runs/<preset>."""
    data_root: Folder = None
    """Where data sets lie; by default $REPRO_DATA, else data/prepared."""
    device: Device = None
    """By default the GPU if there is one."""
    minutes: float | None = None
    """Stop after this many, measured and recorded (the last measurement comes on top); by default never."""
    from_weights: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Where --out has no state to go on from: go on from the weights of this recorded run of the same
    settings, with an optimizer that starts anew. For longer than it: with --train.images."""
    dry_run: bool = False
    """Only print what the training takes: steps, memory, arithmetic. Needs no data and no GPU and writes
    nothing. For N processes: with WORLD_SIZE=N in the environment, or under torchrun."""


def train(name: str, arguments: list[str]) -> None:
    """Train a preset, or go on where it was stopped: train PRESET [--train.lr 1e-4 ...]."""
    options = _parse("train", name, TrainOptions(run=preset(name)), arguments)
    from repro.train import train as run_training

    if options.data_root:
        os.environ["REPRO_DATA"] = str(options.data_root)
    run, out = options.run, options.out or Path("runs") / name
    if options.dry_run:
        from repro import plan
        from repro.train import check_captured

        if options.device != "cpu":  # most plans are for GPUs that are elsewhere
            check_captured(run.train)
        if os.environ.get("RANK", "0") == "0":
            print(plan.describe(run, plan.plan(run, int(os.environ.get("WORLD_SIZE", 1)))))
        return
    if out.name != name.split("/")[1]:  # a run of its own, not the preset
        kept = "" if run.record_weights else " Its weights are not recorded."
        told = run.note if run.note != preset(name).note else f"After the preset {name}.{kept}"
        run = replace(run, name=f"{name.split('/')[0]}/{out.name}", note=told)
    folder = run_training(
        run, out, options.device, minutes=options.minutes, from_weights=options.from_weights
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"recorded in {folder}")


def train_all(
    patterns: tyro.conf.Positional[tuple[str, ...]],
    /,
    out: Path = Path("runs"),
    device: Device = None,
    minutes: float | None = None,
) -> None:
    """Train several presets one after the other; several processes on the same folder share them.

    Args:
        patterns: Names of presets, also with * and ?, such as "lab/imagenet64-x0-*".
        out: Folder of <profile>/<run>. What is trained there, or is being trained, is left alone.
        device: By default the GPU if there is one.
        minutes: Stop after this many; by default when all are trained.
    """
    from repro.train import train_all as train_runs

    if not patterns:
        raise ReproError("name presets to train, such as 'lab/imagenet64-*'; all: python -m repro presets")
    chosen = [name for name in PRESETS if any(fnmatch(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in chosen):
            preset(pattern)  # raises, with the near names
    for folder in train_runs([PRESETS[name] for name in chosen], out, device, minutes):
        print(f"recorded in {folder}")


@dataclass
class SampleOptions:
    """Draw images from a recorded run, one PNG per seed, or the run's samples.png anew."""

    sample: config.Sample
    out: Path | None = None
    """Folder for <seed>.png; by default samples/<run>."""
    seeds: tuple[int, int] = (0, 64)
    """First seed, and the one after the last."""
    batch: int = 64
    """Images at a time; does not change them."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Of the network's products; fp8 is for ViTs on a GPU since Ada or Hopper, bf16 around the products."""
    record: bool = False
    """Draw the run's samples.png anew, and record it, instead of writing single images."""
    settings: Path | None = None
    """With --record: JSON file of a list of samplers, as `evaluate` takes it; beside samples.png, a row of
    the images of --seeds is drawn and recorded for each."""
    device: Device = None
    """By default the GPU if there is one."""


def sample(name: str, arguments: list[str]) -> None:
    """Draw images from a recorded run: sample RUN [--seeds 0 64 --sample.steps 30 ...]."""
    from PIL import Image

    from repro import files, runs
    from repro import sample as sampling
    from repro import train as training

    recorded = runs.load_run(name)
    options = _parse("sample", name, SampleOptions(sample=recorded.sample), arguments)
    replace(recorded.config, sample=options.sample)  # raises where the run cannot be sampled so
    first, end = options.seeds
    if not 0 <= first < end <= 2**31:
        raise ReproError(
            f"--seeds {first} {end} is no range: give the first seed, at least 0, and the one after the last"
        )
    _check_batch(options.batch)
    place = training.find_place(options.device)
    if options.settings is not None and not options.record:
        raise ReproError("--settings draws rows that are recorded: add --record")
    if options.record and options.precision != "fp32":
        raise ReproError("pictures that are recorded are drawn in fp32: leave out --precision")
    if options.settings is not None:
        record = recorded.record
        for how in _sampler_settings(options, recorded.sample) if place.first else []:
            record = training.record_further_samples(
                recorded.path, record, range(first, end), place.device, how
            )
            file = recorded.path / record.further_samples[-1].file
            print(f"recorded {file}: {config.sample_told(how)}")
        return
    if options.record:
        samples = recorded.record.samples
        grid = (samples.rows, samples.cols) if samples else (8, 8)
        if place.first:
            training.record_samples(recorded.path, recorded.record, grid, place.device, options.sample)
            print(f"recorded {recorded.path / 'samples.png'}")
        return
    out = options.out or Path("samples") / recorded.config.name
    chosen = list(range(first, end))[place.rank :: place.world]
    denoiser = recorded.denoiser(place.device)
    pending = iter(chosen)
    batch = max(1, min(options.batch, len(chosen)))  # a batch is filled up: 64 would draw 64 for 2
    for images in sampling.generate(
        denoiser, recorded.config, chosen, batch, place.device, options.precision, options.sample
    ):
        for image in images.permute(0, 2, 3, 1).cpu().numpy():
            picture = Image.fromarray(image)
            path = out / f"{next(pending)}.png"
            files.replace_atomic(path, lambda temporary, p=picture: p.save(temporary, format="PNG"))
    print(f"{len(chosen)} images in {out}")


@dataclass
class EvaluateOptions:
    """Measure a recorded run and append the result to its metrics.jsonl."""

    sample: config.Sample
    evaluate: config.Evaluate
    protocol: Literal["lab", "clean", "edm"] | None = None
    """What the distance is: lab, on EfficientNet-Lite0's features; clean, clean-fid's FID; edm, the FID of
    the Min-SNR authors, by EDM's fid.py against ADM's statistics, by default of 50,000 samples. Numbers of
    two protocols are not comparable. By default that of evaluate.features."""
    reference: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Of protocol edm: an .npz of mu and sigma instead of ADM's for imagenet64 or imagenet256, whose name is
    then in that of the distance, or ADM's file where it is here already; by default it is downloaded."""
    batch: int = 500
    """Images at a time; does not change them."""
    ema: float | None = None
    """Half-life, in images, of the average to measure: one that the run keeps; by default its main one."""
    neighbours: bool = False
    """Also measure how close samples are to their nearest training images (needs the data set)."""
    precision_recall: bool = False
    """Also measure precision and recall against training images (needs the data set)."""
    standard_errors: bool = False
    """Also measure how much the distance would vary with other samples, and with other reference images
    (needs the data set)."""
    blocks: int = 1
    """Measure so many times, each time on the next evaluate.samples seeds: how far apart the results are is
    the sampling error."""
    record: bool = True
    """Append to metrics.jsonl; --no-record only prints (but the hash of a reference that is downloaded for
    protocol edm is kept in paper/released.json, which must be writable)."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """Of the network's products; fp8 is for ViTs on a GPU since Ada or Hopper, bf16 around the products."""
    settings: Path | None = None
    """JSON file of a list of samplers, [{"sampler": "ancestral", "eta": 1}, {"steps": 30}, ...]: measure each
    in turn, on a network compiled once. What does not name a sampler changes the run's own. By default the
    run's own sampler and those of evaluate.also, as while training; with --sample.* settings, that one."""
    compile: bool = False
    """Compile the network, and replay it as a CUDA graph: worth it from some thousand images on a GPU."""
    device: Device = None
    """By default the GPU if there is one."""


def evaluate(name: str, arguments: list[str]) -> None:
    """Measure a recorded run: evaluate RUN [--evaluate.samples 10000 --sample.steps 30 ...]."""
    import torch

    from repro import data, files, official, runs
    from repro import evaluate as evaluation
    from repro import sample as drawing
    from repro import train as training

    recorded = runs.load_run(name)
    default = EvaluateOptions(
        sample=recorded.sample,
        evaluate=recorded.config.evaluate,
        precision=recorded.config.train.precision,
    )
    without_help = [each for each in arguments if each not in ("-h", "--help")]
    protocol = _parse("evaluate", name, default, without_help).protocol
    if protocol is not None:  # which has defaults of its own
        features = "efficientnet_lite0" if protocol == "lab" else "inception"
        samples = evaluation.EDM_SAMPLES if protocol == "edm" else default.evaluate.samples
        default = replace(default, evaluate=replace(default.evaluate, features=features, samples=samples))
    options = _parse("evaluate", name, default, arguments)
    if protocol is not None and options.evaluate.features != features:
        told = "Inception as it resizes images itself" if protocol == "edm" else features
        raise ReproError(
            f"protocol {protocol} measures on {told}, not on {options.evaluate.features}; leave out "
            f"--evaluate.features, or --protocol"
        )
    if options.reference is not None and protocol != "edm":
        raise ReproError("--reference is an option of --protocol edm")
    _check_batch(options.batch)
    if options.blocks < 1:
        raise ReproError(f"--blocks {options.blocks} measures nothing; give 1 or more")
    place = training.find_place(options.device)
    average = recorded.further_average(options.ema)
    if recorded.config.model.kind == "autoencoder":
        _evaluate_autoencoder(recorded, options, place)
        return
    denoiser = recorded.denoiser(place.device, average)
    first, samples = options.evaluate.first_seed, options.evaluate.samples
    if place.device.type == "cpu" and samples >= MANY:
        print(f"{samples:,} samples take hours on a CPU; a GPU is what this is for", file=sys.stderr)
    blocks = [replace(options.evaluate, first_seed=first + n * samples) for n in range(options.blocks)]
    measured = [
        replace(recorded.config, sample=how, evaluate=block)
        for how, block in itertools.product(_sampler_settings(options, recorded.sample), blocks)
    ]
    against = None
    if protocol == "edm":
        evaluation.check_edm(options.neighbours, options.precision_recall, options.standard_errors)
        against = official.fid_reference(recorded.config.data.name, options.reference)
    for run in measured:  # before the first is drawn
        drawing.check_drawn_in(denoiser, run.sample, options.precision, place.device)
    if options.compile:
        denoiser.net = runs.compiled(denoiser.net)
        plans = recorded.config.train.cudnn_plans  # tried on the first batch, as in training
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, plans
    fingerprint = recorded.record.data.fingerprint
    if recorded.record.imported and not against:  # what they were trained on is not recorded: by images here
        fingerprint = data.load(recorded.config.data.name).manifest["fingerprint"]
    fits = min(options.batch, options.evaluate.samples)
    features = against.features if against else options.evaluate.features
    network = evaluation.feature_network(features, place.device)
    for run in measured:
        lines = evaluation.evaluate(
            denoiser,
            run,
            fingerprint,
            recorded.record.images,
            place.device,
            options.precision,
            fits,
            options.neighbours,
            network,
            options.compile,
            options.precision_recall,
            options.standard_errors,
            against,
        )
        for line in lines if place.first else []:
            line |= {} if average is None else {"ema_halflife_images": average}
            print(
                f"{line['name']}: {line['value']:.4f}, {line['samples']:,} samples from seed "
                f"{line['first_seed']}, {config.sample_told(run.sample)}",
                flush=True,
            )
            if options.record:
                files.append_line(recorded.path / "metrics.jsonl", line)


def _evaluate_autoencoder(recorded: runs.Run, options: EvaluateOptions, place: train.Place) -> None:
    """Measure how well a recorded autoencoder reconstructs the val split."""
    from repro import files, latents

    fingerprint, net = recorded.record.data.fingerprint, recorded.autoencoder(place.device)
    default = EvaluateOptions(sample=options.sample, evaluate=options.evaluate)
    used = ("evaluate", "precision", "record", "device", "sample")
    for name in EvaluateOptions.__dataclass_fields__:
        if name not in used and getattr(options, name) != getattr(default, name):
            raise ReproError(
                f"{recorded.name} is an autoencoder: --{name.replace('_', '-')} has no effect on it"
            )
    run = replace(recorded.config, evaluate=options.evaluate)
    lines = latents.measure(net, run, fingerprint, recorded.record.images, place.device, options.precision)
    for line in lines if place.first else []:
        print(f"{line['name']}: {line['value']:.4f}, {line['samples']:,} val images")
        if options.record:
            files.append_line(recorded.path / "metrics.jsonl", line)


def _sampler_settings(options: EvaluateOptions | SampleOptions, own: config.Sample) -> list[config.Sample]:
    """The samplers to measure: the run's own, the one given, or those that the file `settings` lists."""
    if options.settings is None:
        return [options.sample, *(options.evaluate.also if options.sample == own else ())]
    from repro import sample as sampling

    return sampling.read_settings(options.settings, options.sample)


def measure(
    run: tyro.conf.Positional[str],
    /,
    few: int = 5_000,
    many: int = 50_000,
    blocks: int = 3,
    few_blocks: int = 10,
    dry_run: bool = False,
    compile: bool = True,
    device: Device = None,
) -> None:
    """Measure of a recorded run what Figures 10 and 11 and Sections 4.4 and 4.5 show, on all GPUs.

    Guidance, churn and steps on other seeds, the best of them on the reported ones, samplers, blocks of
    samples, precisions, rows of pictures. What is recorded is left out, so the same command goes on after a
    stop.

    Args:
        run: The recorded run; it must know classes, and the null class.
        few: Samples by each way of drawing.
        many: Samples of a block.
        blocks: Blocks of disjoint seeds.
        few_blocks: Blocks of `few` samples, by which it is told whether two samplers differ.
        dry_run: Only list what is missing (but, before the sweep is whole, not what its best is needed for).
        compile: Compile networks; --no-compile is quicker for few samples.
        device: By default all GPUs.
    """
    from repro import measure as measuring

    sizes = measuring.Sizes(few=few, many=many, blocks=blocks, few_blocks=few_blocks)
    if not dry_run:
        measuring.measure(run, sizes, device, compile)
        return
    left = measuring.missing(run, sizes, device)
    print("\n".join(measuring.tell(left)) or f"nothing is missing of {run}")


def gradients(
    run: tyro.conf.Positional[str],
    /,
    levels: int = 20,
    images: int = 256,
    batch: int = 32,
    chunk: int = 4,
    groups: int = 8,
    record: bool = True,
    device: Device = None,
) -> None:
    """Measure how a recorded run's gradients at different noise levels agree (needs the data set).

    Args:
        run: The recorded run.
        levels: Noise levels, which stand for equal shares of those trained.
        images: Training images over which each gradient is the mean.
        batch: Images at a time.
        chunk: Levels at a time.
        groups: Of images, whose differences tell how sure the result is.
        record: Append to metrics.jsonl; --no-record only prints.
        device: By default the GPU if there is one.
    """
    from repro import files, pareto, runs
    from repro import train as training

    recorded, place = runs.load_run(run), training.find_place(device)
    if place.world > 1:
        raise ReproError("gradients are measured by one process: start it without torchrun")
    line = pareto.measure(recorded, levels, images, place.device, batch, chunk, groups)
    least = "not known from so few images"
    if line["value"] is not None:
        least = f"{line['value']:.4f}, standard error {line['value_error']:.4f}"
    print(f"{line['name']}: the least cosine of any two of {levels} is {least}")
    if record:
        files.append_line(recorded.path / "metrics.jsonl", line)


def encode(
    data: tyro.conf.Positional[str],
    run: tyro.conf.Positional[str],
    /,
    batch: int = 250,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: Device = None,
) -> None:
    """Write the latents of a prepared data set, and of its val split, by a recorded autoencoder.

    Goes on where it was stopped. They lie beside the data set; a run with data.autoencoder learns them.

    Args:
        data: The prepared data set, such as imagenet64-subset.
        run: The recorded run of an autoencoder.
        batch: Images at a time.
        precision: Of the autoencoder's arithmetic.
        device: By default the GPU if there is one.
    """
    from repro import data as sets
    from repro import latents
    from repro import train as training

    _check_batch(batch)
    place = training.find_place(device)
    if place.world > 1:
        raise ReproError("latents are encoded by one process: start it without torchrun")
    val = f"{data}-val"
    for name in (data, val) if (sets.data_root() / val / "manifest.json").exists() else (data,):
        print(f"encoded in {latents.encode(name, run, place.device, batch, precision)}")


def import_(
    name: tyro.conf.Positional[str],
    /,
    file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Make a recorded run of a released checkpoint (see `repro.official`).

    Args:
        name: Of the checkpoint: minsnr-vit-l-imagenet64, minsnr-vit-xl-imagenet256, sd-vae-ft-mse,
            adm-imagenet64-unet, adm-imagenet64-classifier.
        file: The released file, where it is here already; by default it is downloaded.
    """
    from repro import official

    folder = official.import_checkpoint(name, file)
    print(f"recorded in {folder}; git ignores its weights")
    run = official.checkpoint(name).config
    if run.sample.classifier and run.model.kind in config.DRAWS:
        print(f"its samples are guided by another: {PROG} import {run.sample.classifier.split('/')[1]}")
    if run.data.autoencoder:
        print(f"its samples are decoded by another: {PROG} import {run.data.autoencoder.split('/')[1]}")
    if run.model.kind in config.DRAWS:
        print(f"to draw its samples (a GPU is of use): {PROG} sample {run.name} --record")


def render(
    ids: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    param: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"], metavar="NAME=VALUE ...")] = (),
    force: bool = False,
    list: bool = False,
) -> None:
    """Execute notebooks and so draw figures and tables; what is up to date is left alone.

    Args:
        ids: Outputs to render, such as fig9_celeba64_unet; with none, all.
        param: Notebook parameters to change; with output=NAME, since others are not drawn over what is
            committed.
        force: Execute even where nothing has changed.
        list: Only list the ids.
    """
    from repro import render as rendering

    if list:
        print("\n".join(rendering.ids()))
        return
    overrides = rendering.parse_overrides([*param])
    if overrides and "output" not in overrides and "REPRO_PAPER_OUT" not in os.environ:
        raise ReproError(
            "with other parameters an output would be drawn over the committed one of its name; add "
            "output=mine, say, to -p"
        )
    for id in ids or rendering.ids():
        rendering.render(id, overrides=overrides, force=force)


def claims(
    values: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    json: bool = False,
    total: bool = False,
) -> None:
    """Tell of each claim of the paper whether it holds, by the recorded values.

    A claim that does not hold is no error; one whose values are missing is.

    Args:
        values: Folder of the values; by default $REPRO_PAPER_OUT/values, else paper/values.
        json: Print JSON, with the whole hashes.
        total: Print only how many claims have each verdict.
    """
    from dataclasses import asdict
    from json import dumps

    from repro import claims as told
    from repro import paper

    found = told.verdicts(told.load(), told.read_reported(), values or paper.out() / "values")
    if json:
        print(dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))
    else:
        print(told.tell(found).splitlines()[-1] if total else told.tell(found))


def trace(
    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE ...")], /
) -> int:
    """Tell from a file's own record what made it, and whether that is still the same.

    Of figures (.png, .pdf), values (.json), tables (.md, .tex, .csv) and recorded samples and weights, copies
    too. Status 0 where all matches, 1 where something does not, 2 for a file that cannot be traced.

    Args:
        paths: Files, such as paper/figures/fig9_celeba64_unet.png.
    """
    from repro import trace as tracing

    if not paths:
        raise ReproError("name files to trace, such as paper/figures/fig9_celeba64_unet.png")
    status = 0
    for path in paths:
        try:
            found = tracing.trace(path)
        except ReproError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        print("\n".join(found.lines))
        status = max(status, 1 if found.problems else 0)
    return status


def verify(
    ids: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    level: Literal["records", "figures", "checkpoints"] = "figures",
    out: Folder = None,
    device: Device = None,
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> int:
    """Check that the records are whole and that the outputs follow from them. Status 1 where they do not.

    Level records takes a minute: the hashes of all recorded files, and what each figure, table and value was
    made from. Level figures, the default, also draws them anew and compares, which takes minutes. Level
    checkpoints draws each recorded run's samples again and measures them: on a GPU, minutes; on several, a
    run at a time on each.

    Args:
        ids: Outputs to draw anew (or, at level checkpoints, runs to measure); by default all.
        level: How far to go.
        out: Folder for what is drawn anew; by default build/verify.
        device: Where to draw samples at level checkpoints; by default all GPUs if there are some.
        report: Also write what was found to this JSON file.
    """
    from repro import files, provenance
    from repro import verify as verifying

    found: list[verifying.Finding] = []
    about = verifying.about(level) if report else {}
    if report:  # now, as it may be a place that cannot be written to, and nothing may be found
        files.write_json(report, verifying.report(found, about))

    def tell(findings: Iterable[verifying.Finding]) -> None:
        for finding in findings:
            found.append(finding)
            print(f"{'well ' if finding.well else 'WRONG'}  {finding.name}: {finding.told}", flush=True)
            if report:  # each time, as what comes next can be killed
                files.write_json(report, verifying.report(found, about))

    if level == "checkpoints":
        import torch

        gpus = 0 if device else torch.cuda.device_count()
        if gpus == 0 and (device is None or device == "cpu"):
            print("on a CPU a run takes hours; a GPU is what this is for", file=sys.stderr, flush=True)
        if gpus > 1:
            tell(verifying.shared_out(ids or None, [f"cuda:{gpu}" for gpu in range(gpus)]))
        else:
            tell(verifying.remeasured(ids or None, device or ("cuda" if gpus else "cpu")))
    else:
        for some in (verifying.records, verifying.traced, verifying.strays):
            tell(some())
        if level == "figures":
            from repro import render as rendering

            scratch = out or provenance.ROOT / "build" / "verify"
            tell(verifying.redrawn(ids or rendering.ids(), scratch))
    print(verifying.summary(found))
    return 0 if all(finding.well for finding in found) else 1


def cards(check: bool = False) -> int:
    """Write a model card for each recorded run, and a data card for each data set that runs name.

    Args:
        check: Only say which are not as they would be written; status 1 where some are not.
    """
    from repro import cards as writing

    wanted = writing.cards()
    found = writing.differences(wanted)
    if not check:
        writing.write(wanted)
    print("\n".join(found) or f"all {len(wanted)} cards are as the records have it")
    return 1 if check and found else 0


def report(out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None) -> None:
    """Set the replication report, a PDF, from paper/report.typ and the recorded values, figures and verdicts.

    Args:
        out: Where to write it; by default paper/report.pdf.
    """
    from repro import report as writing

    print(f"written: {writing.write(out)}")


def archive(
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    check: Annotated[Path | None, tyro.conf.arg(metavar="FILE_OR_DIR")] = None,
) -> int:
    """Pack code, records and outputs into one .zip for an archive, with checksums and a description.

    Args:
        out: The .zip; by default build/<name>-<version>.zip.
        check: Only say what is missing, changed or extra in this archive, or in the folder that it was
            unpacked to; status 1 where something is.
    """
    from repro import archive as archiving
    from repro import files

    if check:
        found = archiving.check(check)
        print("\n".join(found) or f"{check} is whole")
        return 1 if found else 0
    made = archiving.build(out)
    print(f"{made}: {made.stat().st_size / 1e6:.0f} MB, SHA-256 {files.sha256(made)}")
    return 0


def site(out: Folder = None) -> None:
    """Write executed notebooks, verdicts, samples and cards as pages that need no server and no network.

    Args:
        out: Folder of the site, which is written anew; by default build/site.
    """
    from repro import provenance
    from repro import site as pages

    print(f"{pages.build(out or provenance.ROOT / 'build' / 'site')}")


def presets(profile: Literal["lab", "paper"] | None = None) -> None:
    """List the runs that can be trained.

    Args:
        profile: Tell what each of this profile takes: parameters, FLOPs, memory and GPU-hours, counted now
            and by recorded rates (a minute or two).
    """
    if profile:
        from repro import plan

        print(plan.tell_costs(profile))
        return
    for name, run in PRESETS.items():
        weight = run.weight.name + (f" {run.weight.gamma:g}" if run.weight.gamma else "")
        weight += f" times min(SNR, {run.min_snr_factor:g})/SNR" if run.min_snr_factor else ""
        learns = f", {run.parameterization}, {weight}" if run.model.kind in config.DRAWS else ""
        about = f"{run.data.name}, {run.model.kind}{learns}, {run.train.images / 1e6:g}M images"
        print(f"{name}\n    {about}. {run.note}")


NAMED_FIRST: dict[str, tuple[Callable[[str, list[str]], None], str]] = {
    "train": (train, "PRESET"),
    "sample": (sample, "RUN"),
    "evaluate": (evaluate, "RUN"),
}


def _parse(command: str, name: str, default: object, arguments: list[str]) -> object:
    """Options of `command` with the defaults that belong to `name`."""
    return tyro.cli(
        type(default),
        default=default,
        args=arguments,
        prog=f"{PROG} {command} {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ReproError(f"--batch {batch}: give at least 1 image at a time")


def _usage(command: str) -> Callable[[], None]:
    """The entry of a command in the list of commands: how to name what it works on."""
    function, what = NAMED_FIRST[command]

    def show() -> None:
        print(f"usage: {PROG} {command} {what} [options]\n\n{function.__doc__}\n")
        print(f"All options: {PROG} {command} {what} --help. Presets: {', '.join(PRESETS)}")

    show.__doc__ = function.__doc__
    return show


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error that the user can mend is one line on standard error and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    try:
        if command not in NAMED_FIRST:
            usages = {name: _usage(name) for name in NAMED_FIRST}
            commands = {
                "prepare": prepare,
                **usages,
                "train-all": train_all,
                "measure": measure,
                "gradients": gradients,
                "encode": encode,
                "import": import_,
                "render": render,
                "claims": claims,
                "trace": trace,
                "verify": verify,
                "cards": cards,
                "report": report,
                "archive": archive,
                "site": site,
                "presets": presets,
            }
            return tyro.extras.subcommand_cli_from_dict(commands, prog=PROG, args=[command, *rest]) or 0
        elif rest and not rest[0].startswith("-"):
            NAMED_FIRST[command][0](rest[0], rest[1:])
        else:
            _usage(command)()
            return 0 if {"-h", "--help"} & {*rest} else 2  # nothing was done
    except ValidationError as error:  # of a configuration
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        print(f"error: {problems}", file=sys.stderr)
        return 1
    except ReproError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

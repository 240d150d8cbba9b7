"""Recorded runs: a folder with a configuration, weights, a log, metrics and samples, all checked by hash.

<root>/<profile>/<name>/
    run.json                            `Record`: what was run, on what, by which code, and the hashes
    weights-00001-of-0000N.safetensors  EMA weights, float16, at most 15 MiB a file; those of further averages
                                        by their half-life in images, weights-ema30000-00001-of-0000N...
    log.jsonl                           loss and speed by images seen
    metrics.jsonl                       one line per evaluation
    samples.png                         a grid of samples, with their seeds in run.json
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from repro import autoencoder, classifier, config, denoiser, evaluate, files, provenance, sample, schedules
from repro.files import ReproError
from repro.models.autoencoder import KLAutoencoder
from repro.models.unet import ADMUNet, NoisyClassifier
from repro.models.vit import ViT

RECORDED = provenance.ROOT / "paper" / "runs"
"""Where the repository keeps its recorded runs; the environment variable REPRO_RUNS overrides it."""

TRAINED = Path("runs")
"""Where `train` leaves its runs, below the working folder: looked at after the recorded ones."""

SHARD_BYTES = 15 * 2**20

SAMPLE_TOLERANCE = 0.25
"""Mean absolute difference, in grey levels of 255, within which devices draw the same image.

Samples recorded on an H200 and drawn again on a CPU differ by 0.005."""


@dataclass(frozen=True, config=config.strict)
class DataUsed:
    """The data set a run was trained on."""

    name: str
    fingerprint: str
    """SHA-256 of its pixels and labels."""
    count: int
    trained_on: int
    held_out: int
    classes: tuple[str, ...] = ()
    """Names of the classes that the network is conditioned on, position = label; older records have none."""
    autoencoder: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each weight file of the autoencoder whose latents of it were learned, where they were."""
    latents: dict[str, str] = field(default_factory=dict)
    """SHA-256 of these latents, and the precision in which they were encoded."""


@dataclass(frozen=True, config=config.strict)
class Samples:
    """The images of a file such as samples.png: row by row, sample seeds first_seed, first_seed + 1, ..."""

    file: str
    sha256: str
    rows: int
    cols: int
    first_seed: int
    sample: config.Sample
    precision: str
    device: str
    code: str = "unknown"
    """Content hash of the library that drew them."""


@dataclass(frozen=True, config=config.strict)
class Session:
    """One uninterrupted part of a training, where it ran and by which code."""

    first_image: int
    """Images seen before it."""
    device: str
    processes: int
    versions: dict[str, str]
    commit: str
    """As in `Record`."""
    code: str
    """As in `Record`."""
    from_run: str | None = None
    """The recorded run whose weights, float16, it began from, with an optimizer that knew nothing."""
    from_weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each of that run's weight files."""


@dataclass(frozen=True, config=config.strict)
class Record:
    """What run.json holds; an unknown key is an error."""

    config: config.Config
    data: DataUsed
    images: int
    """Images seen by the recorded weights."""
    seconds: float
    """Seconds of training, compilation included, without evaluations and what comes before the first step."""
    device: str
    processes: int
    versions: dict[str, str]
    commit: str
    """Git commit the code was at, "+" where files were changed; "unknown" outside git."""
    code: str
    """Content hash of the library (`provenance.code_version`)."""
    parameters: int
    """Number of parameters of the network."""
    weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each weight file, of the main average and of further ones (see `weights_stem`)."""
    samples: Samples | None = None
    further_samples: tuple[Samples, ...] = ()
    """Images of the same weights drawn in other ways, one file each."""
    imported: dict[str, str | int] | None = None
    """Address, size and SHA-256 of the file of others that the weights come from, where they were not trained
    here (`repro.official`): then images and all else that is said of a training, in the configuration too, is
    not known."""
    earlier: tuple[Session, ...] = ()
    """Parts of a resumed training that ran elsewhere or by other code; above stands the last one."""
    first_image: int = 0
    """As in `Session`, of the last one."""
    from_run: str | None = None
    """As in `Session`, of the last one."""
    from_weights: dict[str, str] = field(default_factory=dict)
    """As in `Session`, of the last one."""

    @property
    def sessions(self) -> list[Session]:
        """All parts of the training, the last one too."""
        last = {name: getattr(self, name) for name in Session.__dataclass_fields__}
        return [*self.earlier, Session(**last)]


_record = TypeAdapter(Record)


def gpu_seconds(
    parts: Sequence[tuple[int, int]], seconds: float, lines: Iterable[dict], since: float = 0.0
) -> float:
    """Seconds of a training in parts, each part's as often as processes worked on it.

    parts: of each its first image and its processes, in order. seconds: of the whole. lines: of
    metrics.jsonl, whose `training_seconds` tell when a part began: exactly where a measurement ended the one
    before, as one does but where a killed training went on elsewhere. since: what is not counted, as it is
    another training's too.
    """
    told = [(line["images"], line["training_seconds"]) for line in lines if line.get("training_seconds")]
    began = [max((at for images, at in told if images <= first), default=0.0) for first, _ in parts]
    ended = [*began[1:], seconds]
    return sum(
        processes * max(0.0, end - max(start, since))
        for (_, processes), start, end in zip(parts, began, ended, strict=True)
    )


class Run:
    """A recorded run on disk. Every file read through it is noted for provenance."""

    def __init__(self, name: str, path: Path, record: Record):
        self.name, self.path, self.record = name, path, record

    @property
    def config(self) -> config.Config:
        """The full configuration of the run."""
        return self.record.config

    @property
    def gpu_seconds(self) -> float:
        """Seconds of training, each as often as GPUs (or other processes) worked then."""
        parts = [(part.first_image, part.processes) for part in self.record.sessions]
        return gpu_seconds(parts, self.record.seconds, self.metrics)

    @cached_property
    def log(self) -> list[dict]:
        """Lines of log.jsonl: images, loss, images_per_second, ..."""
        return self._lines("log.jsonl")

    @cached_property
    def metrics(self) -> list[dict]:
        """Lines of metrics.jsonl, one per evaluation (see `repro.evaluate`)."""
        return self._lines("metrics.jsonl")

    def _lines(self, name: str) -> list[dict]:
        return files.read_lines(path) if (path := provenance.used(self.path / name)).exists() else []

    def further_average(self, ema: float | None) -> float | None:
        """`ema`, the half-life in images of an average, or none where that is the main one.

        Raises `ReproError` where the run keeps no average of that half-life.
        """
        train = self.config.train
        if ema is None or ema == train.ema_halflife_images:
            return None
        if ema not in train.also_ema_halflife_images:
            known = ", ".join(
                map(halflife_label, (train.ema_halflife_images, *train.also_ema_halflife_images))
            )
            raise ReproError(
                f"{self.name} keeps no average with a half-life of {halflife_label(ema)} images; "
                f"it keeps those of {known}"
            )
        return ema

    def weights(self, ema: float | None = None) -> dict[str, torch.Tensor]:
        """The recorded weights, float32, by parameter name.

        ema: half-life in images of the average that is meant; by default the main one. Raises `ReproError`
        where the run keeps no such average, and naming the file that is missing, or whose bytes are not those
        recorded.
        """
        pattern = f"{weights_stem(self.further_average(ema))}-[0-9]*"
        recorded_files = {n: sha for n, sha in self.record.weights.items() if fnmatchcase(n, pattern)}
        if not recorded_files:
            raise ReproError(
                f"the run {self.name} was recorded without weights; only its log and metrics exist"
            )
        tensors = {}
        for name, recorded in recorded_files.items():
            path = self.path / name
            if not path.exists():
                again = "git checkout, or copy the run folder again"
                if self.record.imported:
                    again = f"python -m repro import {self.config.name.split('/')[1]}"
                raise ReproError(
                    f"{path} is missing: {self.name} needs all of {', '.join(recorded_files)}. "
                    f"Restore it ({again})."
                )
            if (found := files.sha256(path)) != recorded:
                raise ReproError(
                    f"{path} is damaged: its SHA-256 is {found[:16]}…, run.json says {recorded[:16]}…. "
                    f"Restore the file (git checkout, or copy the run folder again)."
                )
            provenance.used(path)
            tensors.update(load_file(path))
        return {name: tensor.float() for name, tensor in tensors.items()}

    def denoiser(self, device: str | torch.device = "cpu", ema: float | None = None) -> denoiser.Denoiser:
        """The recorded network as a denoiser in evaluation mode, float32, on `device`.

        ema: as in `weights`. Raises `ReproError` where the run is one of a classifier, or its weights are not
        whole.
        """
        kind = self.config.model.kind
        if kind not in config.DRAWS:
            article = "an" if kind[0] in "aeiou" else "a"
            raise ReproError(f"{self.name} is {article} {kind}: it draws no images. Name a run that does.")
        name = None if self.record.imported else self.config.data.autoencoder  # of others' it is not recorded
        if name and load_run(name).record.weights != self.record.data.autoencoder:
            raise ReproError(
                f"{self.name} learned the latents of {name} with other weights than are recorded there now: "
                f"what it draws could not be decoded. Restore that run (git checkout)."
            )
        return self._built(device, ema)

    def classifier(self, device: str | torch.device = "cpu") -> classifier.Classifier:
        """The recorded noisy classifier in evaluation mode, float32, on `device`.

        Raises `ReproError` where the run is not one of a classifier, or its weights are not whole.
        """
        if self.config.model.kind != "classifier":
            raise ReproError(f"{self.name} is no classifier. Name the run of one.")
        return self._built(device)

    def autoencoder(self, device: str | torch.device = "cpu") -> KLAutoencoder:
        """The recorded network of an autoencoder in evaluation mode, float32, on `device`.

        Raises `ReproError` where the run is not one of an autoencoder, or its weights are not whole.
        """
        if self.config.model.kind != "autoencoder":
            raise ReproError(f"{self.name} is no autoencoder. Name the run of one.")
        return self._network(device)

    def _built(
        self, device: str | torch.device, ema: float | None = None
    ) -> denoiser.Denoiser | classifier.Classifier:
        return joined(self.config, self._network(device, ema)).eval().requires_grad_(False)

    def _network(self, device: str | torch.device, ema: float | None = None) -> torch.nn.Module:
        net = network(self.config)
        try:
            net.load_state_dict(self.weights(ema))
        except RuntimeError as error:
            raise ReproError(f"the weights of {self.name} do not fit its configuration: {error}") from error
        return net.to(device).eval().requires_grad_(False)

    def samples(self, how: config.Sample | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """The recorded sample images, uint8, in the order of their seeds; checked by hash.

        how: by default samples.png, else those that were drawn so (`Record.further_samples`). Raises
        `ReproError` where there are none, or the file is not the recorded one.
        """
        recorded = self.drawn(how)
        path = self.path / recorded.file
        if not path.exists() or files.sha256(path) != recorded.sha256:
            raise ReproError(
                f"{path} is missing or not the file that was recorded; restore it (git checkout)"
            )
        grid = np.asarray(Image.open(provenance.used(path)).convert("RGB"))
        height, width = grid.shape[0] // recorded.rows, grid.shape[1] // recorded.cols
        tiles = grid.reshape(recorded.rows, height, recorded.cols, width, 3).swapaxes(1, 2)
        return tiles.reshape(-1, height, width, 3)

    def drawn(self, how: config.Sample | None = None) -> Samples:
        """What is recorded of the sample images drawn as `how` says, by default of samples.png."""
        known = [samples for samples in (self.record.samples, *self.record.further_samples) if samples]
        found = [samples for samples in known if how in (None, samples.sample)]
        if (how is None and self.record.samples is None) or not found:
            told = "" if how is None else f" drawn by {how.sampler} with {how.steps} steps and such settings"
            raise ReproError(
                f"the run {self.name} was recorded without samples{told}; python -m repro sample {self.name} "
                f"--record draws and records them, with --settings in several ways"
            )
        return found[0]

    @property
    def sample(self) -> config.Sample:
        """How images of this run are drawn: as the recorded samples were, else as configured."""
        return self.record.samples.sample if self.record.samples else self.config.sample

    def draw(
        self, seeds: Sequence[int], how: config.Sample | None = None, device: str | torch.device = "cpu"
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Images drawn from the recorded weights in float32, one for each sample seed.

        how: by default as the recorded samples were drawn.
        """
        how = how or self.sample
        denoiser = self.denoiser(device)
        images = list(sample.generate(denoiser, self.config, seeds, min(64, len(seeds)), device, sample=how))
        return torch.cat(images).permute(0, 2, 3, 1).cpu().numpy()

    def check_samples(
        self, count: int, device: str | torch.device = "cpu", how: config.Sample | None = None
    ) -> dict:
        """Draw `count` of the recorded samples again and compare: is the record true?

        The images checked are spread evenly over samples.png, or those drawn as `how` says. Returns
        the largest of the images' mean absolute differences, in grey levels of 255, the tolerance, and the
        seeds. Raises `ReproError` where an image differs by more than `SAMPLE_TOLERANCE`, and for a count
        that there is not.
        """
        recorded, about = self.samples(how), self.drawn(how)
        if not 1 <= count <= len(recorded):
            raise ReproError(
                f"{count} of the recorded samples cannot be checked: there are {len(recorded)}; give 1 to all"
            )
        chosen = [i * len(recorded) // count for i in range(count)]
        seeds = [about.first_seed + i for i in chosen]
        drawn = self.draw(seeds, about.sample, device).astype(float)
        apart = np.abs(drawn - recorded[chosen]).mean(axis=(1, 2, 3))
        if apart.max() > SAMPLE_TOLERANCE:
            worst = seeds[int(apart.argmax())]
            raise ReproError(
                f"the samples recorded for {self.name} are not what its weights draw: with seed {worst} the "
                f"mean difference is {apart.max():.2f} grey levels, more than {SAMPLE_TOLERANCE}. Weights, "
                f"samples or the code that samples have changed since the record was made."
            )
        return {"seeds": seeds, "largest_mean_difference": float(apart.max()), "tolerance": SAMPLE_TOLERANCE}

    def distances(
        self,
        how: config.Sample,
        samples: int | None = None,
        ema: float | None = None,
        protocol: str | None = None,
    ) -> list[dict]:
        """Lines of metrics.jsonl that are Fréchet distances of images drawn as `how` says, by images seen.

        samples: how many were drawn; by default as the run's configuration says. ema: half-life in images of
        the average that was measured; by default the main one. protocol: by which it was measured; by default
        that of the run's own feature network. Only lines with the run's own first seed and precision; of
        several at the same number of images, the last. Raises `ReproError` where other runs (a classifier,
        say) of different weights took part, and where there is no such average or protocol.
        """
        own = self.config.evaluate.first_seed
        last = {
            line["images"]: line
            for line in self.measured(how, samples, ema, protocol)
            if line["first_seed"] == own
        }
        for other in ("classifier", "low_noise", "autoencoder"):
            if len({json.dumps(line.get(other), sort_keys=True) for line in last.values()}) > 1:
                name = getattr(how, other, self.config.data.autoencoder)
                raise ReproError(
                    f"{self.path / 'metrics.jsonl'} has distances of {name} with different weights, which "
                    f"are no curve; measure them again (python -m repro evaluate {self.name})"
                )
        return [last[images] for images in sorted(last)]

    def curve(self, how: config.Sample, ema: float | None = None) -> tuple[list[int], list[float]]:
        """Images seen and the distance there, of images drawn as `how` says (see `distances`)."""
        lines = self.distances(how, ema=ema)
        return [line["images"] for line in lines], [line["value"] for line in lines]

    def of_the_same_samples(self, line: dict) -> list[dict]:
        """Lines of metrics.jsonl measured of the samples of `line`, one of them, or of the first of these.

        From the same weights, sampler and first seed, on the same features; by their number, ascending.
        """

        def samples(line: dict) -> tuple:
            about = ("images", "ema_halflife_images", "first_seed", "features", "precision")
            others = ("classifier", "low_noise", "autoencoder")
            return config.sample_from_json(line["sample"]), *map(line.get, about + others)

        same = [other for other in self.metrics if "sample" in other and samples(other) == samples(line)]
        return sorted(
            (other for other in same if other["samples"] <= line["samples"]),
            key=lambda other: other["samples"],
        )

    def blocks(
        self, how: config.Sample, samples: int | None = None, protocol: str | None = None
    ) -> list[float]:
        """Distances at the end of training, of blocks of sample seeds, the run's own among them.

        How far they are apart is the sampling error (`python -m repro evaluate RUN --evaluate.first-seed N
        --blocks 3`). samples: how many in a block; by default as the run's configuration says. protocol: as
        in `distances`. Of the main average, by first seed; of a block measured twice the last line, and of
        blocks that share seeds the first.
        """
        first_seeds, values = [], {}
        for line in self.measured(how, samples, None, protocol):
            first = line["first_seed"]
            shares = any(abs(first - other) < line["samples"] for other in first_seeds)
            if line["images"] == self.record.images and (first in values or not shares):
                first_seeds.append(first)
                values[first] = line["value"]
        return [values[first] for first in sorted(values)]

    def at_the_end(self, samples: int | None = None) -> list[tuple[config.Sample, dict]]:
        """Each way of drawing that was measured at the end of training, and its last line of metrics.jsonl.

        Of the main average, in the order in which they were measured first; samples: as in `distances`.
        """
        ways: dict[str, config.Sample] = {}
        for line in self.metrics:
            if "sample" in line and line["images"] == self.record.images:
                how = config.sample_from_json(line["sample"])
                ways.setdefault(json.dumps(config.sample_json(how), sort_keys=True), how)
        found = [(how, self.distances(how, samples)) for how in ways.values()]
        return [
            (how, lines[-1]) for how, lines in found if lines and lines[-1]["images"] == self.record.images
        ]

    def standard_errors(self, how: config.Sample, samples: int | None = None) -> dict | None:
        """The last line that is a distance's standard error at the end of training, of the main average.

        As `python -m repro evaluate RUN --standard-errors` measures it; samples: as in `distances`. None
        where nobody has.
        """
        lines = self.measured(how, samples, None, of="standard error of ")
        return next((line for line in reversed(lines) if line["images"] == self.record.images), None)

    def measured(
        self,
        how: config.Sample,
        samples: int | None = None,
        ema: float | None = None,
        protocol: str | None = None,
        of: str = "",
        precision: str | None = None,
    ) -> list[dict]:
        """Lines of distances from any seed, as `distances` describes, or of what else is called by them.

        precision: by default that of training.
        """
        own, average = self.config, self.further_average(ema)
        name = of + evaluate.title(protocol or evaluate.PROTOCOLS[own.evaluate.features])
        number = samples or own.evaluate.samples
        return [
            line
            for line in self.metrics
            if line["name"] == name
            and line.get("ema_halflife_images") == average
            and (config.sample_from_json(line["sample"]), line["samples"]) == (how, number)
            and line["precision"] == (precision or own.train.precision)
        ]

    @property
    def finished(self) -> bool:
        """Whether the recorded weights have seen all images that were planned, or come from others."""
        return self.record.imported is not None or self.record.images >= self.config.train.images


def root_folder(root: str | Path | None = None) -> Path:
    """The folder of recorded runs: `root`, else the environment variable REPRO_RUNS, else paper/runs."""
    return Path(root or os.environ.get("REPRO_RUNS") or RECORDED)


def names(root: str | Path | None = None) -> list[str]:
    """Names `<profile>/<run>` of the recorded runs, sorted."""
    base = root_folder(root)
    return sorted(path.parent.relative_to(base).as_posix() for path in base.glob("*/*/run.json"))


def load_run(name: str | Path, root: str | Path | None = None) -> Run:
    """The recorded run `<profile>/<name>` of the runs folder, or of `runs/`, where `train` leaves it, or the
    one in the folder that is named.

    Raises `ReproError` where there is none (with the near names), or where run.json cannot be read,
    has an unknown key or a bad value.
    """
    path = Path(name) if (Path(name) / "run.json").is_file() else root_folder(root) / name
    if root is None and not (path / "run.json").is_file():
        path = TRAINED / name
    if not (path / "run.json").is_file():
        near = difflib.get_close_matches(str(name), names(root), n=3, cutoff=0.3)
        hint = (
            f"Near names: {', '.join(near)}."
            if near
            else f"Recorded are: {', '.join(names(root)) or 'none'}."
        )
        raise ReproError(
            f"there is no recorded run {name} in {root_folder(root)}. {hint} "
            f"To make it: python -m repro train {name}; where runs lie elsewhere, set REPRO_RUNS to that."
        )
    return Run(str(name), path, read_record(provenance.used(path / "run.json")))


def read_record(path: Path) -> Record:
    """The record in a run.json; raises `ReproError` naming each unknown key or bad value."""
    try:
        return _record.validate_python(json.loads(path.read_bytes()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReproError(f"{path} is not JSON: {error}. Restore the file.") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ReproError(f"{path} does not fit this version of the package: {problems}") from error


def write_record(path: Path, record: Record) -> None:
    """Write run.json, atomically."""
    files.write_json(path / "run.json", _record.dump_python(record, mode="json"))


NETWORKS = {"unet": ADMUNet, "vit": ViT, "classifier": NoisyClassifier, "autoencoder": KLAutoencoder}


def network(run: config.Config) -> torch.nn.Module:
    """The network that `run` describes, freshly initialised."""
    return NETWORKS[run.model.kind](run.model, run.data.resolution, run.data.channels, run.data.classes)


Joined = denoiser.Denoiser | classifier.Classifier | autoencoder.Autoencoder


def build(run: config.Config) -> Joined:
    """The network that `run` describes, freshly initialised, as a denoiser, classifier or autoencoder."""
    return joined(run, network(run))


def joined(run: config.Config, net: torch.nn.Module) -> Joined:
    """The network of `run` joined to what it needs: as a denoiser, a classifier or an autoencoder."""
    if run.model.kind == "classifier":
        return classifier.Classifier(net, schedules.from_config(run.schedule))
    if run.model.kind == "autoencoder":
        return autoencoder.Autoencoder(net, run.model, schedules.from_config(run.schedule))
    return denoiser.Denoiser(
        net,
        schedules.from_config(run.schedule),
        denoiser.parameterization(run.parameterization, run.sigma_data),
    )


def compiled(net: torch.nn.Module) -> torch.nn.Module:
    """`net` compiled as one graph for one shape of inputs.

    What cannot be compiled is an error, since a network in pieces would be compiled anew at each call.
    """
    return torch.compile(net, dynamic=False, fullgraph=True)


def halflife_label(halflife: float) -> str:
    """A half-life in images as names of files and tensors have it: 30000.0 as "30000"."""
    return f"{halflife:.15g}"


def weights_stem(ema: float | None) -> str:
    """How the names of weight files begin, before their number: by the half-life of a further average."""
    return "weights" if ema is None else f"weights-ema{halflife_label(ema)}"


def save_weights(
    path: Path,
    state: dict[str, torch.Tensor],
    run: config.Config,
    ema: float | None = None,
    dtype: torch.dtype = torch.float16,
    limit: int | None = None,
) -> dict[str, str]:
    """Write `state` as safetensors files of at most `limit` bytes, and return the SHA-256 of each.

    The configuration is in each header, so that the weights alone can be used. The files of the same average
    that were there are replaced, or removed, only when all new ones are whole. ema: half-life in images of a
    further average; none for the main one. dtype: of what is written. limit: by default 15 MiB; a tensor that
    is larger has a file to itself. Raises `ReproError` for a tensor that is not finite in that type.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    size, room = 0, (limit or SHARD_BYTES) - 2**17  # besides the header
    for name in sorted(state):
        # channels-last strides are a property of the device, not of the record
        tensor = state[name].detach().to("cpu", dtype).contiguous(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensor).all():
            raise ReproError(
                f"the tensor {name} is not finite in {str(dtype).removeprefix('torch.')}; the run cannot be "
                f"recorded"
            )
        if shards[-1] and size + tensor.nbytes > room:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    header = {"config": json.dumps(config.to_json(run))}  # one entry: safetensors writes several in any order
    hashes = {}
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=files.PARTIAL, dir=path) as staging:
        for number, shard in enumerate(shards, start=1):
            name = f"{weights_stem(ema)}-{number:05d}-of-{len(shards):05d}.safetensors"
            new = Path(staging) / name
            files.replace_atomic(new, lambda temporary, shard=shard: save_file(shard, temporary, header))
            hashes[name] = files.sha256(new)
        for name in hashes:
            os.replace(Path(staging) / name, path / name)
    for old in path.glob(f"{weights_stem(ema)}-[0-9]*.safetensors"):
        if old.name not in hashes:
            old.unlink()
    return hashes


def forget_weights(path: Path, record: Record) -> Record:
    """Remove the weights of a recorded run, of all averages, and return the record, which then names none."""
    record = replace(record, weights={})
    write_record(path, record)
    for file in path.glob("weights-*.safetensors"):
        file.unlink()
    return record


def save_samples(
    path: Path, images: UInt8[np.ndarray, "n h w 3"], rows: int, cols: int, name: str = "samples.png"
) -> str:
    """Write rows * cols images as one PNG without gaps, atomically, and return its SHA-256."""
    n, height, width, _ = images.shape
    if n != rows * cols:
        raise ValueError(f"{n} images do not fill {rows} rows of {cols}")
    tiles = images.reshape(rows, cols, height, width, 3).swapaxes(1, 2)
    grid = Image.fromarray(tiles.reshape(rows * height, cols * width, 3))
    files.replace_atomic(path / name, lambda temporary: grid.save(temporary, format="PNG"))
    return files.sha256(path / name)


def further_samples_file(how: config.Sample) -> str:
    """Name of the file of samples drawn as `how` says; options that are added to `config.Sample` keep it."""
    default = config.sample_json(config.Sample())
    changed = {key: value for key, value in config.sample_json(how).items() if value != default[key]}
    return f"samples-{hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]}.png"


def forget_samples(path: Path, record: Record) -> None:
    """Remove the files of further samples in a run's folder that its record does not name."""
    named = {samples.file for samples in record.further_samples}
    for file in path.glob("samples-*.png"):
        if file.name not in named and re.fullmatch(r"samples-[0-9a-f]{8}\.png", file.name):
            file.unlink()


EXECUTION = (
    "train.state_every_images",
    "train.log_every_images",
    "train.compile",
    "train.cuda_graphs",
    "train.cudnn_plans",
    "train.micro_batch",
    "train.recompute",
)
"""Settings of how a training is executed and logged. They change its result by rounding and dropout alone."""


def check_comparable(some: Sequence[Run], may_differ: Sequence[str]) -> None:
    """Raise `ReproError` where runs differ in more than is compared, naming the run and the setting.

    may_differ: dotted names of settings, or of groups of them ("weight"). Besides these, `EXECUTION`, and the
    runs' names and notes, all must have the same settings, the same pixels, and have seen as many images.
    """
    free = ("name", "note", "record_weights", *EXECUTION, *may_differ)
    for run in some[1:]:
        apart = [
            name
            for name in differences(some[0].config, run.config)
            if not any(name == known or name.startswith(f"{known}.") for known in free)
        ]
        if some[0].record.data.fingerprint != run.record.data.fingerprint:
            apart.append("the data's pixels")
        if some[0].record.data.latents != run.record.data.latents:
            apart.append("the data's latents")
        if some[0].record.images != run.record.images:
            apart.append("images seen")
        if apart:
            raise ReproError(
                f"{run.name} and {some[0].name} cannot be compared: they differ in {', '.join(apart)}"
            )


def differences(one: config.Config, other: config.Config) -> list[str]:
    """Dotted names of the settings in which two configurations differ."""

    def flat(value: object, prefix: str) -> dict[str, object]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}".strip(".")).items()
        }

    a, b = flat(asdict(one), ""), flat(asdict(other), "")
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def load_shards(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one safetensors file; raises `ReproError` where the file is cut or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ReproError(f"{path} cannot be read ({error}); remove it to start anew") from error

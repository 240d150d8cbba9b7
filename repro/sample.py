"""From sample seeds to images: a seed gives the same noise for any batch size and number of devices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from operator import attrgetter
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from repro import classifier, config, cuda_graph, guidance, provenance, samplers, schedules
from repro.denoiser import Denoiser
from repro.files import ReproError
from repro.models import vit_fused
from repro.models.vit import ViT

LABEL_SEEDS = 2**31
"""Added to a seed for its label's generator. torch's CPU generator looks at the low 32 bits of a seed
only, so sample seeds are kept below this number and labels share no generator with any noise."""


def _generator(seed: int, offset: int = 0) -> torch.Generator:
    if not 0 <= seed < LABEL_SEEDS:
        raise ReproError(f"a sample seed must lie in [0, 2**31), not {seed}")
    return torch.Generator().manual_seed(seed + offset)


class SeedNoise:
    """Standard normal noise with one CPU generator per sample seed.

    Each call gives the next draw, [n, *shape] float32 on `device`: image i depends on seeds[i] alone.
    A GPU's generator would differ between GPU models and batch sizes. Raises `ReproError` for a seed
    outside [0, 2**31).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        device: str | torch.device = "cpu",
        ahead: bool = False,
    ):
        """ahead: draw the next noise while this one is used; for samplers that ask again and again."""
        self.ahead = ahead
        self.generators = [_generator(int(seed)) for seed in seeds]
        self.shape, self.device = shape, torch.device(device)
        self.upcoming: Future | None = None

    def __call__(self) -> Float[Tensor, "n *shape"]:
        """The next draw of each seed."""
        noise = self._draw() if self.upcoming is None else self.upcoming.result()
        if self.ahead:
            self.upcoming = _ahead().submit(self._draw)
        return noise.to(self.device, non_blocking=True)

    def _draw(self) -> Float[Tensor, "n *shape"]:
        on_gpu = self.device.type == "cuda"
        with torch.inference_mode(False):  # in which no thread is that draws
            noise = torch.empty(len(self.generators), *self.shape, pin_memory=on_gpu)

        def draw(some: range) -> None:  # torch draws outside Python's lock, so threads do share the work
            for i in some:
                torch.randn(self.shape, generator=self.generators[i], out=noise[i])

        everyone = range(len(self.generators))
        list(_drawers().map(draw, (everyone[first::DRAWERS] for first in range(DRAWERS))))
        return noise


DRAWERS = min(8, os.cpu_count() or 1)
"""Threads that draw noise."""


@lru_cache
def _drawers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(DRAWERS, "noise")


@lru_cache
def _ahead() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "noise ahead")


def _forget_threads() -> None:
    """A forked process has none of its parent's threads."""
    _drawers.cache_clear()
    _ahead.cache_clear()


os.register_at_fork(after_in_child=_forget_threads)


def read_settings(path: Path, own: config.Sample) -> list[config.Sample]:
    """The samplers that a JSON file lists; what does not name a sampler changes `own`.

    Raises `ReproError` where the file cannot be read or holds no list of samplers.
    """
    try:
        changes = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReproError(f"the samplers of {path} cannot be read: {error}") from error
    if not isinstance(changes, list) or not changes or not all(isinstance(each, dict) for each in changes):
        raise ReproError(
            f"{path} must hold a list of samplers, such as "
            f'[{{"steps": 18}}, {{"sampler": "ancestral", "eta": 1}}]'
        )
    given = config.sample_json(own)
    return [
        config.sample_from_json(change if "sampler" in change else {**given, **change}) for change in changes
    ]


def labels_for(seeds: Sequence[int], classes: int) -> Int[Tensor, " n"]:
    """A class for each seed, uniform in [0, classes), independent of the noise of the same seed."""
    generators = (_generator(int(seed), LABEL_SEEDS) for seed in seeds)
    drawn = [int(torch.randint(classes, (), generator=g)) for g in generators]
    return torch.tensor(drawn, dtype=torch.long)


def guided(denoiser: Denoiser, sample: config.Sample) -> guidance.LabelledDenoiser:
    """The denoiser under the guidance that `sample` asks for, with the network for low noise that it names.

    Raises `ReproError` where a run that it names is not recorded.
    """
    net = getattr(denoiser.net, "_orig_mod", denoiser.net)
    null_label = net.classes if net.classes and net.null_class else None
    compiled = hasattr(denoiser.net, "_orig_mod")
    device = next(denoiser.net.parameters()).device if sample.classifier or sample.low_noise else None
    plain = denoiser
    if sample.low_noise is not None:
        low = _recorded(sample.low_noise, _hashes(sample.low_noise), device, compiled)
        plain = guidance.below(denoiser, low, sample.low_noise_below)
    inside = guidance.cfg(plain, sample.guidance, null_label)
    if sample.guidance_interval is not None and sample.guidance != 1:
        inside = guidance.interval(inside, plain, *sample.guidance_interval)
    if sample.clip:  # before the classifier, as ADM does
        inside = guidance.clip(inside)
    if sample.classifier is None:
        return inside
    found = _recorded(sample.classifier, _hashes(sample.classifier), device, compiled, True)
    return guidance.classifier(inside, found, sample.classifier_scale)


def check_low_noise(run: config.Config, sample: config.Sample) -> None:
    """Raise `ReproError` where the network for low noise that `sample` names cannot take over from `run`'s.

    It must be trained to its end, on the same data and noise levels, and know the null class under guidance.
    """
    from repro import runs  # which imports this module

    if sample.low_noise is None:
        return
    low = runs.load_run(sample.low_noise)
    low.weights()  # raises where they are not whole
    of_data = ("name", "classes", "resolution", "channels", "autoencoder")
    differ = [
        name
        for name in (*(f"data.{each}" for each in of_data), "schedule")
        if attrgetter(name)(low.config) != attrgetter(name)(run)
    ]
    if low.config.model.kind not in config.DRAWS:
        differ.insert(0, f"model.kind, which is that of the {low.config.model.kind}")
    if sample.guidance != 1 and not getattr(low.config.model, "null_class", False):
        differ.append("model.null_class, which guidance needs")
    if differ:
        raise ReproError(
            f"{sample.low_noise} cannot take over from {run.name} where noise is low: "
            f"they differ in {differ[0]}"
        )
    if not low.finished:
        raise ReproError(f"{sample.low_noise} is not trained to its end yet")


def _hashes(name: str) -> tuple[tuple[str, str], ...]:
    """Of the weights of the recorded run of that name."""
    from repro import runs  # which imports this module

    return tuple(runs.load_run(name).record.weights.items())


@lru_cache(maxsize=4)
def _recorded(
    name: str,
    hashes: tuple[tuple[str, str], ...],
    device: torch.device,
    compiled: bool,
    classifying: bool = False,
) -> Denoiser | classifier.Classifier:
    """A recorded denoiser or classifier with those weights, compiled where the network beside it is."""
    from repro import runs

    run = runs.load_run(name)
    found = run.classifier(device) if classifying else run.denoiser(device)
    if not compiled:
        return found
    return found.with_net(runs.compiled(found.net.to(memory_format=torch.channels_last)))


def _networks(denoiser: Denoiser, sample: config.Sample) -> list[nn.Module]:
    """Those that drawing as `sample` says asks: the denoiser's, that of low noise, and the classifier's."""
    if sample.low_noise is None and sample.classifier is None:
        return [denoiser.net]
    asked, device = [denoiser], next(denoiser.net.parameters()).device
    compiled = hasattr(denoiser.net, "_orig_mod")
    if sample.low_noise is not None:
        asked.append(_recorded(sample.low_noise, _hashes(sample.low_noise), device, compiled))
    if sample.classifier is not None:
        asked.append(_recorded(sample.classifier, _hashes(sample.classifier), device, compiled, True))
    return [each.net for each in asked]


def captured(denoise: guidance.LabelledDenoiser) -> guidance.LabelledDenoiser:
    """The same denoiser, after a few calls as one CUDA graph: network, guidance and a classifier's gradient.

    For inputs of one shape on one GPU, and sigma one number. Weights must not require gradients: autocast
    would keep cast ones for a while only, and the graph would read them later.
    """
    replay = cuda_graph.Captured(lambda x, sigma, labels=None: denoise(x, sigma, labels))

    def replayed(
        x: Float[Tensor, "n c h w"], sigma: Float[Tensor, ""], labels: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "n c h w"]:
        return replay(x, sigma.to(x.device), *(() if labels is None else (labels,)))

    return replayed


@torch.no_grad()
def sample_batch(
    denoiser: Denoiser,
    sample: config.Sample,
    noise: Callable[[], Float[Tensor, "n c h w"]],
    labels: Int[Tensor, " n"] | None = None,
    labelled: guidance.LabelledDenoiser | None = None,
) -> Float[Tensor, "n c h w"]:
    """One batch of images, float64 about [-1, 1]. `noise` gives the start, then what the sampler needs.

    labelled: the denoiser under its guidance, where the caller has it.
    """
    sigmas = schedules.grid_for(denoiser.schedule, sample)
    labelled = labelled or guided(denoiser, sample)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return labelled(x, sigma, labels)

    start = noise().double() * sigmas[0]
    if sample.sampler == "heun":
        return samplers.heun(denoise, start, sigmas, churn=sample.churn, fresh_noise=noise)
    if sample.sampler == "dpm_solver":
        return samplers.dpm_solver(denoise, start, sigmas, sample.order, sample.multistep)
    if sample.sampler == "euler_maruyama":
        return samplers.euler_maruyama(denoise, start, sigmas, fresh_noise=noise)
    return samplers.ancestral(denoise, start, sigmas, eta=sample.eta, fresh_noise=noise)


def evaluations(sample: config.Sample, levels: int) -> int:
    """Times that the sampler asks the denoiser on a grid of `levels` noise levels besides 0.

    The last step, to 0, takes one.
    """
    a_step = {
        "heun": 2,
        "ancestral": 1,
        "euler_maruyama": 1,
        "dpm_solver": 1 if sample.multistep else sample.order,
    }
    return a_step[sample.sampler] * (levels - 1) + 1


def generate(
    denoiser: Denoiser,
    run: config.Config,
    seeds: Sequence[int],
    batch: int,
    device: str | torch.device,
    precision: str = "fp32",
    sample: config.Sample | None = None,
    labels: Int[Tensor, " all"] | None = None,
    cuda_graphs: bool = False,
) -> Iterator[UInt8[Tensor, "n c h w"]]:
    """Images for `seeds`, in order, as uint8 batches on `device`; of latents, decoded.

    denoiser: on `device`, possibly with a compiled network. precision: as in `autocast`.
    sample: how to sample; by default as the run's configuration says. labels: a class for each seed;
    by default drawn from the seeds. Every batch has exactly `batch` images, the last one filled up by
    repeating its last seed and cut again, since a compiled network has fixed shapes. cuda_graphs: on a GPU,
    replay network and guidance as a CUDA graph; worth it from some ten steps on. Without effect on a limited
    guidance interval and on another network of low noise, which look at sigma.

    Raises, before it draws, `ReproError` for what cannot be drawn so, such as "fp8" but by ViTs.
    """
    from repro import latents  # which imports this module

    seeds = list(seeds)
    sample = sample or run.sample
    shape = (run.data.channels, run.data.resolution, run.data.resolution)
    if labels is None and run.data.classes:
        labels = labels_for(seeds, run.data.classes)
    check_low_noise(run, sample)
    nets = check_drawn_in(denoiser, sample, precision, device)
    labelled = guided(denoiser, sample)
    looks_at_sigma = sample.guidance_interval is not None or sample.low_noise is not None
    if cuda_graphs and torch.device(device).type == "cuda" and not looks_at_sigma:
        labelled = captured(labelled)
    stochastic = sample.sampler == "euler_maruyama" or sample.eta > 0 or sample.churn > 0
    for first in range(0, len(seeds), batch):
        chosen = list(range(first, min(first + batch, len(seeds))))
        padded = chosen + [chosen[-1]] * (batch - len(chosen))
        noise = SeedNoise([seeds[i] for i in padded], shape, device, ahead=stochastic)
        some = None if labels is None else labels[padded].to(device)
        with autocast(device, precision, nets):
            images = sample_batch(denoiser, sample, noise, some, labelled)
            if run.data.autoencoder:
                images = latents.decode(images, run.data.autoencoder)
        if not torch.isfinite(images).all():  # which would pass for black as uint8
            others = "bf16 or fp32" if precision in ("fp16", "fp8") else "fp32"
            raise ReproError(
                f"an image drawn in {precision} is not finite; try the precision {others}, or fewer steps "
                "from a lower sigma_max"
            )
        yield to_uint8(images[: len(chosen)])


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Precisions, and what the network's products are computed in where that is not float32.

"fp8": of a ViT's blocks but the first, three products of four are of float8 numbers; the rest is in bfloat16.
"""


def check_precision(device: str | torch.device, precision: str, nets: Sequence[nn.Module] = ()) -> None:
    """Raise `ReproError` for an unknown precision, and for "fp8" where not all of `nets` can compute in it.

    They must be ViTs of sizes that `vit_fused.check_fp8` takes, on a GPU that it takes.
    """
    if precision not in AUTOCAST:
        raise ReproError(f"unknown precision {precision!r}; known are {', '.join(AUTOCAST)}")
    if precision != "fp8":
        return
    plain = [getattr(net, "_orig_mod", net) for net in nets]
    others = [type(net).__name__ for net in plain if not isinstance(net, ViT)]
    if others or not plain:
        raise ReproError(
            "the precision fp8 is for drawing with ViTs alone (model.kind vit), without a classifier"
            + (f", and this takes a network of another kind, {others[0]}" if others else "")
            + ": take bf16"
        )
    for net in plain:
        net.check_fp8(device)


def check_drawn_in(
    denoiser: Denoiser, sample: config.Sample, precision: str, device: str | torch.device
) -> list[nn.Module]:
    """For "fp8" all networks that drawing as `sample` says asks, else none.

    Raises what `check_precision` does of them.
    """
    nets = _networks(denoiser, sample) if precision == "fp8" else []
    check_precision(device, precision, nets)
    return nets


def takes_fp8(run: config.Config, device: str | torch.device | None = None) -> bool:
    """Whether the network of `run` can draw in "fp8" on `device`.

    device: by default this machine's GPU; without one, whether it could on a GPU that has float8.
    """
    if run.model.kind != "vit":
        return False
    if device is None and not torch.cuda.is_available():
        return True
    from repro import runs  # which imports this module

    with torch.device("meta"):
        net = runs.network(run)
    try:
        check_precision(device or "cuda", "fp8", [net])
    except ReproError:
        return False
    return True


@contextmanager
def autocast(device: str | torch.device, precision: str, nets: Sequence[nn.Module] = ()) -> Iterator[None]:
    """A block in which networks run in that precision on `device`.

    precision: "fp32"; "bf16" or "fp16" for autocast; or "fp8", to sample with `nets`: products qkv, fc1 and
    fc2 of all blocks but the first are then of float8 numbers and the rest as in "bf16", and gradients are
    refused. Raises what `check_precision` does.
    """
    check_precision(device, precision, nets)
    dtype = AUTOCAST[precision]
    # Up to torch 2.11, what is cached of a compiled network says that it runs in half precision, but not in
    # which of the two: another process's bfloat16 would be taken for float16 (pytorch/pytorch, pull request
    # 181564).
    told = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", ""), _operators(), precision
    torch.compiler.config.cache_key_tag = "".join(told)
    kind = torch.device(device).type
    with (
        vit_fused.products(float8=precision == "fp8"),
        torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        yield


@lru_cache
def _operators() -> str:
    """Version of our own operators, of which torch's cache of compiled networks knows the names alone.

    What it kept would fail, or be wrong, after a change of the shapes that they give.
    """
    return provenance.code_version("import repro.models.vit_kernels, repro.models.norm_kernels")


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0..255, rounded and clipped; the inverse of `from_uint8`."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0..255 to [-1, 1], float32."""
    return images.float() / 127.5 - 1

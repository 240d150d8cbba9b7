"""What a run is: one frozen configuration, checked, written to disk as JSON beside its weights.

Pydantic dataclasses: an unknown key or an ill-typed value is an error that names it, and
`dataclasses.replace` derives one run from another.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, field_validator, model_validator
from pydantic.dataclasses import dataclass

strict = ConfigDict(extra="forbid")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=strict)
class Data:
    """A prepared data set and what of it is used."""

    name: str
    """Folder of the prepared set below the data directory, such as `celeba64`."""
    resolution: int = 64
    """Side of the square images, pixels."""
    channels: int = 3
    classes: Count = 0
    """Number of classes the network is conditioned on; 0 for unconditional."""
    holdout: Count = 0
    """Images never trained on (drawn once with a fixed seed): they measure memorisation."""
    flip: bool = True
    """Mirror each training image left to right with probability 1/2."""
    autoencoder: str | None = None
    """Recorded run of an autoencoder: learn its latents of the images, as `python -m repro encode` left them;
    resolution and channels are then those of the latents."""


@dataclass(frozen=True, config=strict)
class _SplitsHeads:
    """What the options of all networks with ADM's attention obey."""

    @model_validator(mode="after")
    def _one_way_to_split_heads(self):
        if (self.head_channels is None) == (self.heads is None):
            raise ValueError("give exactly one of head_channels and heads")
        return self


@dataclass(frozen=True, config=strict)
class UNet(_SplitsHeads):
    """The UNet of ADM (Dhariwal and Nichol 2021), or that of LDM (Rombach et al. 2022) where it has
    transformers."""

    kind: Literal["unet"] = "unet"
    channels: int = 192
    """Width at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Width of each resolution over `channels`; each entry after the first halves the side."""
    blocks: int = 3
    """Residual blocks per resolution (the decoder has one more)."""
    attention: tuple[int, ...] = (8, 16)
    """Sides, in pixels, of the feature maps that get self-attention."""
    head_channels: int | None = None
    """Channels per attention head; excludes `heads`."""
    heads: int | None = 4
    """Attention heads; excludes `head_channels`."""
    scale_shift_norm: bool = True
    """Condition by scale and shift after the second norm, rather than by addition before it."""
    resample_in_blocks: bool = True
    """Halve and double inside residual blocks, rather than by strided and plain convolutions."""
    dropout: Share = 0.0
    """In residual blocks."""
    null_class: bool = True
    """One more class, the last, that means "no label"."""
    transformer_depth: Annotated[int, Field(ge=1)] | None = None
    """Blocks of the transformer that takes the place of each self-attention, as in LDM (none: ADM's)."""
    context_width: Annotated[int, Field(ge=1)] | None = None
    """Width of the token of the class, to which these transformers attend; the class then enters nowhere
    else."""

    @model_validator(mode="after")
    def _transformers_attend_to_a_class(self):
        if (self.transformer_depth is None) != (self.context_width is None):
            raise ValueError("transformer_depth and context_width are given together")
        return self


@dataclass(frozen=True, config=strict)
class ViT:
    """The plain vision transformer of the paper (Table 1)."""

    kind: Literal["vit"] = "vit"
    patch: int = 4
    """Side of a patch, pixels."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    time_rows: int = 1000
    """Rows of the learned time table."""
    null_class: bool = True
    """One more class, the last, that means "no label"."""


@dataclass(frozen=True, config=strict)
class NoisyClassifier(_SplitsHeads):
    """ADM's noisy classifier: half a UNet with attention pooling. Its options are the UNet's."""

    kind: Literal["classifier"] = "classifier"
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 4
    attention: tuple[int, ...] = (32, 16, 8)
    head_channels: int | None = 64
    heads: int | None = None
    scale_shift_norm: bool = True
    resample_in_blocks: bool = True
    dropout: Share = 0.0


@dataclass(frozen=True, config=strict)
class Autoencoder:
    """The KL autoencoder of LDM (Rombach et al. 2022, section 3.1), as diffusers' AutoencoderKL builds it."""

    kind: Literal["autoencoder"] = "autoencoder"
    channels: tuple[Annotated[int, Field(ge=1)], ...] = (128, 256, 512, 512)
    """Width of each resolution; each entry after the first halves the side."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """Residual blocks per resolution (the decoder has one more)."""
    latent_channels: Annotated[int, Field(ge=1)] = 4
    groups: Annotated[int, Field(ge=1)] = 32
    """Of its group norms."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    """Of the divergence of the latents' distribution from a standard normal one, in its loss."""
    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the difference of features, in its loss (see `repro.autoencoder.Autoencoder`)."""

    @model_validator(mode="after")
    def _groups_divide(self):
        if odd := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"groups ({self.groups}) must divide each of channels, and does not {odd[0]}")
        return self


Model = Annotated[UNet | ViT | NoisyClassifier | Autoencoder, Field(discriminator="kind")]
DRAWS = ("unet", "vit")
"""Kinds of networks that draw images; the others serve them."""


@dataclass(frozen=True, config=strict)
class Schedule:
    """Which noise levels are trained: a discrete VP schedule, or EDM's distribution."""

    name: Literal["cosine_vp", "linear_vp", "edm"] = "cosine_vp"
    steps: int = 1000
    """Noise levels of a VP schedule (ignored by edm)."""
    P_mean: float = -1.2
    """EDM only: mean of ln sigma."""
    P_std: Positive = 1.2
    """EDM only: standard deviation of ln sigma."""


@dataclass(frozen=True, config=strict)
class Weight:
    """A loss weight, a function of SNR in x0-space (see `repro.weights`)."""

    name: Literal["constant", "snr", "truncated_snr", "min_snr", "soft_min_snr", "p2", "edm", "ugd"] = (
        "min_snr"
    )
    gamma: float | None = None
    """The gamma of min_snr and soft_min_snr (5 in the paper), or the exponent of p2 (1)."""
    k: float | None = None
    """The offset k of p2 (1)."""
    bins: Annotated[int, Field(ge=1)] | None = None
    """Of ugd: in how many bins, of noise levels that are trained equally often, the weight is one number."""
    every_images: Annotated[int, Field(ge=1)] | None = None
    """Of ugd: after how many images the bins' weights are computed anew."""
    probe_images: Annotated[int, Field(ge=1)] | None = None
    """Of ugd: of how many images of the batch the bins' gradients of the loss in x0 are then taken, in
    float32: that needs the memory of bins * parameters numbers, and of the activations of so many images."""
    ridge: float | None = None
    """Of ugd: how much uneven weights cost, see `repro.pareto.ridged`; none: nothing, as in Theorem 1."""


@dataclass(frozen=True, config=strict)
class Sample:
    """How images are drawn."""

    sampler: Literal["heun", "ancestral", "dpm_solver", "euler_maruyama"] = "heun"
    steps: int = 18
    """Noise levels visited; Heun calls the network 2 * steps - 1 times (see `repro.sample.evaluations`)."""
    grid: Literal["karras", "uniform"] = "karras"
    """Which noise levels: EDM's grid, or those of evenly spaced timesteps of a schedule that counts them."""
    grid_sections: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Of the uniform grid, to space each of several equal sections of the timesteps by itself: the levels of
    each, least noise first, which add up to `steps` (none: all timesteps are one section)."""
    sigma_min: Positive = 0.002
    """Smallest noise level of EDM's grid (raised to the smallest trained one)."""
    sigma_max: Positive = 80.0
    """Largest noise level of EDM's grid (lowered to the largest trained one)."""
    rho: Annotated[float, Field(ge=0.1, le=100)] = 7.0
    eta: float = 0.0
    """Of the ancestral sampler: 0 is DDIM, 1 is ancestral DDPM."""
    churn: float = 0.0
    """Of Heun: EDM's S_churn; 0 is deterministic."""
    order: Annotated[int, Field(ge=1, le=3)] | None = None
    """Of dpm_solver, which has 2 by default."""
    multistep: bool = False
    """Of dpm_solver: take what a step needs besides one network call from the steps before."""
    clip: bool = False
    """Clip each denoised image to [-1, 1], as DDPM and ADM do; not for latents. What an epsilon-network needs
    on the uniform grid, which starts at the largest trained noise level."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is off and costs one network call."""
    guidance_interval: tuple[float, float] | None = None
    """Classifier-free guidance only where sigma lies in this closed interval."""
    classifier: str | None = None
    """Recorded run of a noisy classifier that guides too, such as lab/imagenet64-classifier."""
    classifier_scale: Annotated[float, Field(ge=0)] = 0.0
    """What its gradient is multiplied by; 0 is off."""
    low_noise: str | None = None
    """Recorded run whose network (its main average) takes the place of the run's own where sigma is below
    low_noise_below: at which noise levels is one of the two better?"""
    low_noise_below: Annotated[float, Field(ge=0)] = 0.0
    """A noise level, sigma; 0 is off."""

    @model_validator(mode="after")
    def _no_option_without_effect(self):
        if self.eta and self.sampler != "ancestral":
            raise ValueError(f"eta is an option of the ancestral sampler; {self.sampler} has none")
        if self.churn and self.sampler != "heun":
            raise ValueError(f"churn is an option of the heun sampler; {self.sampler} has none")
        if self.sampler == "dpm_solver" and self.order is None:
            object.__setattr__(self, "order", 2)  # one sampler, one way to say it
        if (self.order or self.multistep) and self.sampler != "dpm_solver":
            raise ValueError(f"order and multistep are options of dpm_solver; {self.sampler} has none")
        if self.guidance_interval and self.guidance == 1:
            raise ValueError("guidance 1 is off: a guidance_interval has no effect on it")
        if (self.classifier is None) != (self.classifier_scale == 0):
            raise ValueError("classifier and classifier_scale are given together")
        if (self.low_noise is None) != (self.low_noise_below == 0):
            raise ValueError("low_noise and low_noise_below are given together")
        if self.steps < 2:
            raise ValueError(f"a sampler needs at least 2 steps, not {self.steps}")
        unused = {name: getattr(Sample, name) for name in ("sigma_min", "sigma_max", "rho")}  # the defaults
        if self.grid == "uniform" and any(getattr(self, name) != unused[name] for name in unused):
            raise ValueError(
                f"{', '.join(unused)} have no effect on the uniform grid, which goes over all trained "
                f"timesteps; leave them at {', '.join(f'{value:g}' for value in unused.values())}"
            )
        if self.grid_sections and self.grid != "uniform":
            raise ValueError(f"grid_sections is an option of the uniform grid; {self.grid} has none")
        if len(self.grid_sections) == 1:
            raise ValueError("a single one of grid_sections is the uniform grid without; give more or none")
        if self.grid_sections and sum(self.grid_sections) != self.steps:
            total = sum(self.grid_sections)
            raise ValueError(f"grid_sections add up to {total}, but steps is {self.steps}; make them equal")
        return self


@dataclass(frozen=True, config=strict)
class Evaluate:
    """When and how a run is measured while it trains."""

    at: tuple[int, ...] = ()
    """Images seen at which an evaluation is made."""
    samples: int = 10_000
    features: Literal["efficientnet_lite0", "inception"] = "efficientnet_lite0"
    first_seed: int = 1_000_000
    """Sample seeds are first_seed, first_seed + 1, ...; the drawn grid uses 0, 1, ..."""
    also: tuple[Sample, ...] = ()
    """Other samplers measured at each evaluation, besides the run's own."""
    levels: Count = 0
    """Noise levels at which the val split of the data set is measured: the error, at the last evaluation (0:
    not at all), or a classifier's accuracy, at each (0: 25)."""

    @model_validator(mode="after")
    def _enough_for_a_covariance(self):
        if self.samples < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.samples}")
        return self


@dataclass(frozen=True, config=strict)
class Train:
    """The optimisation; every length is counted in images."""

    images: int
    batch: int = 256
    """Images per step, over all processes."""
    micro_batch: Annotated[int, Field(gt=0)] | None = None
    """Images that a process takes through the network at once; it sums the gradients of its share of a step
    (none: the share at once). Changes what is learned by rounding, and by other dropout masks."""
    recompute: bool = False
    """Keep only what enters each block of the network until the backward pass, which computes the block
    again (activation checkpointing): less memory for a third more arithmetic."""
    lr: Positive = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_images: Count = 0
    """Linear warm-up of the learning rate."""
    ema_halflife_images: Positive = 500_000.0
    also_ema_halflife_images: tuple[Positive, ...] = ()
    """Half-lives of further averages of the weights, each measured and recorded beside the main one."""
    ema_rampup: Positive | None = 0.05
    """A half-life is at most this fraction of the images seen so far (none: never shortened)."""
    grad_clip: Positive | None = 1.0
    """Largest gradient norm."""
    label_drop: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of training an image with the null class."""
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    cuda_graphs: bool = False
    """Replay the compiled step as CUDA graphs: worth it where launching kernels takes longer than they do."""
    cudnn_plans: Annotated[int, Field(ge=0)] = 30
    """Plans that cuDNN tries for each convolution, best guesses first; 0 tries all, which takes minutes."""
    state_every_images: int = 500_000
    """Images between two state files, from which a killed run resumes."""
    log_every_images: int = 25_600
    seed: int = 0

    @field_validator("images", "batch")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value <= 0:
            raise ValueError("must be positive")
        return value

    @model_validator(mode="after")
    def _each_average_once(self):
        halflives = (self.ema_halflife_images, *self.also_ema_halflife_images)
        if len(set(halflives)) < len(halflives):
            raise ValueError(f"also_ema_halflife_images and ema_halflife_images must differ: {halflives}")
        return self


@dataclass(frozen=True, config=strict)
class Config:
    """One run, whole. `name` is `<profile>/<run>`."""

    name: str
    data: Data
    model: Model
    train: Train
    schedule: Schedule = Schedule()
    parameterization: Literal["x0", "eps", "v", "edm"] = "eps"
    sigma_data: Positive = 0.5
    """Of the edm parameterization and weight: standard deviation of the data."""
    weight: Weight = Weight("min_snr", gamma=5.0)
    min_snr_factor: Positive | None = None
    """The gamma of a factor min(SNR, gamma) / SNR on the weight (none: no factor)."""
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    record_weights: bool = True
    """Whether the record of the finished run keeps the weights; further seeds need not."""
    note: str = ""
    """What a reader must know about this run."""

    @model_validator(mode="after")
    def _parts_fit_each_other(self):
        if self.train.label_drop and not (self.data.classes and getattr(self.model, "null_class", False)):
            raise ValueError("train.label_drop needs data.classes and model.null_class")
        if self.model.kind == "unet" and self.model.context_width and not self.data.classes:
            raise ValueError("model.context_width is that of a class token: it needs data.classes")
        if self.model.kind == "vit" and self.schedule.name == "edm":
            raise ValueError("a vit's time table needs a schedule of counted steps, not edm")
        if self.model.kind not in DRAWS and (self.min_snr_factor or self.train.also_ema_halflife_images):
            raise ValueError(
                f"the {self.model.kind} has no min_snr_factor and no train.also_ema_halflife_images"
            )
        if self.data.autoencoder and self.model.kind not in DRAWS:
            raise ValueError(f"the {self.model.kind} works on images: it has no data.autoencoder")
        if self.data.autoencoder and (
            self.sample.clip or self.sample.classifier or any(how.clip for how in self.evaluate.also)
        ):
            raise ValueError("latents have no range to clip to, and no classifier guides them here")
        if self.model.kind == "vit" and self.model.time_rows < self.schedule.steps:
            raise ValueError(
                f"model.time_rows is {self.model.time_rows}, too few for {self.schedule.steps} schedule.steps"
            )
        return self


_adapter = TypeAdapter(Config)
_sample_adapter = TypeAdapter(Sample)


def to_json(config: Config) -> dict:
    """`config` as a dictionary of JSON values."""
    return _adapter.dump_python(config, mode="json")


def sample_json(sample: Sample) -> dict:
    """`sample` as a dictionary of JSON values, as metrics.jsonl has it."""
    return _sample_adapter.dump_python(sample, mode="json")


def sample_told(how: Sample) -> str:
    """A sampler in few words: its steps, and its settings that are not the default ones."""
    values, default = sample_json(how), sample_json(Sample())
    told = {key: value for key, value in values.items() if value != default[key]}
    return ", ".join(f"{key} {value}" for key, value in {"steps": how.steps, **told}.items())


def sample_from_json(values: dict) -> Sample:
    """What `sample_json` wrote; options that came later have their defaults."""
    return _sample_adapter.validate_python(values)


def from_json(values: dict) -> Config:
    """The configuration written by `to_json`; raises `ValueError` naming each unknown or bad key."""
    return _adapter.validate_python(values)

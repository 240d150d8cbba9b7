"""Every run of both profiles by name, each derived from a few bases.

`lab`: small networks that one GPU trains in minutes, recorded in this repository. `paper`: the
supplement's settings, for a cluster.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from repro.config import (
    Autoencoder,
    Config,
    Data,
    Evaluate,
    NoisyClassifier,
    Sample,
    Schedule,
    Train,
    UNet,
    ViT,
    Weight,
)
from repro.files import ReproError

_lab_celeba64_unet = Config(
    name="lab/celeba64-unet",
    data=Data("celeba64", holdout=1000),
    model=UNet(
        channels=64,
        multipliers=(1, 2, 3, 4),
        blocks=1,
        attention=(16, 8),
        heads=None,
        head_channels=64,
        resample_in_blocks=False,
        dropout=0.05,
    ),
    train=Train(
        images=12_000_000,
        batch=256,
        lr=4e-4,
        warmup_images=100_000,
        ema_halflife_images=1_500_000,
        ema_rampup=0.1,
        cuda_graphs=True,
        state_every_images=1_000_000,
    ),
    parameterization="eps",
    weight=Weight("min_snr", gamma=5.0),
    # An error in a predicted eps is multiplied by sigma in D: after a short training, starting from
    # sigma = 80 leaves colours wrong, and 40 lowers the distance (metrics.jsonl of lab/celeba64-unet-2M).
    sample=Sample(steps=18, sigma_max=40.0),
    evaluate=Evaluate(at=tuple(int(1e6 * m) for m in (0.25, 0.5, 1, 2, 4, 6, 8, 10, 12))),
    note="Figure 9 at lab scale: a small UNet on 16,469 CelebA faces.",
)

_paper_celeba64_unet = replace(
    _lab_celeba64_unet,
    name="paper/celeba64-unet",
    data=Data("celeba64"),
    model=UNet(channels=192, multipliers=(1, 2, 2, 2), blocks=3, attention=(8, 16), heads=4, dropout=0.1),
    train=Train(
        images=128 * 500_000,
        batch=128,
        lr=2e-4,
        betas=(0.9, 0.999),
        weight_decay=0.03,
        warmup_images=128 * 5_000,
        ema_halflife_images=887_000,  # a decay of 0.9999 a step
        ema_rampup=None,
        state_every_images=1_280_000,
    ),
    sample=Sample(steps=30),
    evaluate=Evaluate(at=tuple(128 * 50_000 * n for n in range(1, 11)), samples=50_000, features="inception"),
    note="Figure 9's settings. The supplement gives backbone (UNet) and optimizer; batch, iterations, "
    "learning rate and warm-up are those of U-ViT on CelebA (Bao et al. 2022).",
)

# Figure 1 (supplement, section 4.1): targets and loss weights on ImageNet 64 x 64 -----------------------

_imagenet64_subset = Data("imagenet64-subset", classes=20)


def _log_spaced(images: int) -> tuple[int, ...]:
    """Eight numbers of images seen, the last `images`, each the one before times the root of 2."""
    return tuple(round(images / 2 ** (n / 2)) for n in range(7, -1, -1))


def _further(run: Config, suffix: str, told: str = "", **changes: object) -> Config:
    """The same training with these options of `Train`, by another name and recorded without weights."""
    return replace(
        run,
        name=f"{run.name}{suffix}",
        train=replace(run.train, **changes),
        record_weights=False,
        note=f"{run.note.removesuffix('.')}{told}. Its weights are not recorded.",
    )


_lab_imagenet64_classifier = Config(
    name="lab/imagenet64-classifier",
    data=_imagenet64_subset,
    model=NoisyClassifier(channels=32, blocks=1, attention=(16, 8), head_channels=32, dropout=0.1),
    train=Train(
        images=1_000_000,
        lr=1e-3,
        weight_decay=0.05,
        warmup_images=50_000,
        ema_halflife_images=200_000,
        ema_rampup=0.1,
        cuda_graphs=True,
    ),
    evaluate=Evaluate(at=tuple(int(1e6 * m) for m in (0.125, 0.25, 0.5, 1)), levels=25),
    note="Guides the samples of Figure 1 at lab scale: ADM's noisy classifier, small, on 20 classes.",
)

_paper_imagenet64_classifier = replace(
    _lab_imagenet64_classifier,
    name="paper/imagenet64-classifier",
    data=Data("imagenet64", classes=1000),
    model=NoisyClassifier(),
    train=Train(
        images=256 * 300_000,
        lr=3e-4,
        weight_decay=0.05,
        ema_halflife_images=887_000 * 2,  # a decay of 0.9999 a step
        ema_rampup=None,
        state_every_images=2_560_000,
    ),
    evaluate=Evaluate(at=tuple(256 * 50_000 * n for n in range(1, 7)), levels=25),
    note="ADM's noisy classifier for 64 x 64. Batch, iterations, learning rate and weight decay are what "
    "guided-diffusion's README gives for its 128 x 128 one; without its falling learning rate and random "
    "crops, and with averaged weights and clipped gradients.",
)

ARMS: dict[str, tuple[str, Weight]] = {
    "x0-constant": ("x0", Weight("constant")),
    "x0-minsnr5": ("x0", Weight("min_snr", gamma=5.0)),
    "eps-constant": ("eps", Weight("constant")),
    "eps-minsnr5": ("eps", Weight("min_snr", gamma=5.0)),
    "x0-snr": ("x0", Weight("snr")),
    "x0-truncated": ("x0", Weight("truncated_snr")),
    "eps-p2": ("eps", Weight("p2", gamma=1.0, k=1.0)),
    "v-constant": ("v", Weight("constant")),
    "v-minsnr5": ("v", Weight("min_snr", gamma=5.0)),
    "x0-minsnr1": ("x0", Weight("min_snr", gamma=1.0)),
    "x0-minsnr10": ("x0", Weight("min_snr", gamma=10.0)),
    "x0-minsnr20": ("x0", Weight("min_snr", gamma=20.0)),
}
"""Target and loss weight of each arm. The paper's Figure 1 has x0 and eps, with and without Min-SNR-5, which
come first and are trained with three seeds; the others stand beside them."""

SEEDED = tuple(ARMS)[:4]
REPEATED = SEEDED[:2]
"""Arms trained twice from the same seed: how far apart they end is the study's noise floor."""
UNCLIPPED = ("x0-snr", "x0-truncated")
"""Arms whose large weights make gradients that are clipped, trained without clipping too: is it that?"""

_lab_arm = Config(
    name="lab/imagenet64-arm",
    data=_imagenet64_subset,
    model=ViT(width=192, depth=6, heads=3, null_class=False),
    train=Train(
        images=2_000_000,
        lr=5e-4,
        betas=(0.99, 0.99),
        weight_decay=0.03,
        warmup_images=50_000,
        ema_halflife_images=500_000,
        ema_rampup=0.1,
        cuda_graphs=True,
        state_every_images=2_000_000,
    ),
    sample=Sample("dpm_solver", order=2, multistep=True, steps=20),  # the supplement states no order or steps
    evaluate=Evaluate(
        at=_log_spaced(2_000_000),
        also=(
            Sample(
                "dpm_solver",
                order=2,
                multistep=True,
                steps=20,
                classifier="lab/imagenet64-classifier",
                classifier_scale=1.0,
            ),
        ),
        levels=40,
    ),
)

_paper_arm = replace(
    _lab_arm,
    name="paper/imagenet64-arm",
    data=Data("imagenet64", classes=1000),
    model=ViT(null_class=False),
    train=Train(
        images=512 * 800_000,
        batch=512,
        lr=1e-4,
        betas=(0.99, 0.99),
        weight_decay=0.03,
        ema_halflife_images=887_000 * 4,  # a decay of 0.9999 a step
        ema_rampup=None,
        state_every_images=5_120_000,
    ),
    evaluate=Evaluate(
        at=tuple(512 * 100_000 * n for n in range(1, 9)),
        samples=50_000,
        features="inception",
        also=tuple(replace(how, classifier="paper/imagenet64-classifier") for how in _lab_arm.evaluate.also),
        levels=40,
    ),
    note=" By the supplement: ViT-B, batch, iterations, betas, DPM-Solver, 50,000 samples, and a guide as "
    "ADM's (its pre-trained one there, one trained after it here). Ours: weight decay, clipping, average, "
    "the solver's order, steps and start, the guide's scale, no dropped labels, and when it is measured.",
)


def _arms() -> list[Config]:
    """Every arm of Figure 1 in the order of training: each once, repeats, more seeds, without clipping."""

    def arm(base: Config, name: str) -> Config:
        target, weight = ARMS[name]
        note = "Figure 1" if name in SEEDED else "Beside Figure 1"
        note += f": {target}-prediction, {weight.name} weight"
        note += f" (gamma {weight.gamma:g})" if weight.gamma else ""
        return replace(
            base,
            name=f"{base.name.removesuffix('arm')}{name}",
            parameterization=target,
            weight=weight,
            note=f"{note}.{base.note}",
        )

    lab = {name: arm(_lab_arm, name) for name in ARMS}
    further = [_further(lab[name], "-again", ", trained again from the same seed") for name in REPEATED]
    further += [_further(lab[name], f"-seed{seed}", seed=seed) for seed in (1, 2) for name in SEEDED]
    further += [
        _further(lab[name], "-unclipped", ", without gradient clipping", grad_clip=None) for name in UNCLIPPED
    ]
    return [*lab.values(), *further, *(arm(_paper_arm, name) for name in ARMS)]


# Figure 8 (supplement, section 4.2): a weight that follows from gradients while training --------------------

_lab_ugd = replace(
    _lab_arm,
    name="lab/imagenet64-ugd",
    parameterization="x0",
    weight=Weight("ugd", bins=20, every_images=25_600, probe_images=256),
    note="Beside Figure 8: an arm of Figure 1 that predicts x0; its weight is Theorem 1's, of the losses in "
    "x0 of 20 bins of noise levels, computed anew every 100 steps.",
)


_lab_ugd_ridge = replace(
    _lab_ugd,
    name="lab/imagenet64-ugd-ridge",
    weight=replace(_lab_ugd.weight, ridge=1.0),
    record_weights=False,
    note="Beside lab/imagenet64-ugd, to be trained on the same GPU: the same, with a cost of uneven weights, "
    "which is ours; as large as it takes for most bins of recorded arms to have a weight. Its weights are "
    "not recorded.",
)


def _ugd_runs() -> list[Config]:
    """The runs of UGD, and the same training with fixed weights: what each is worth in time on one GPU."""
    fixed = {"minsnr5": Weight("min_snr", gamma=5.0), "constant": Weight("constant")}
    beside = [
        replace(
            _lab_ugd,
            name=f"{_lab_ugd.name}-{name}",
            weight=weight,
            record_weights=False,
            note=f"Beside lab/imagenet64-ugd, to be trained on the same GPU: {weight.name} weight. Its "
            "weights are not recorded.",
        )
        for name, weight in fixed.items()
    ]
    return [_lab_ugd, _lab_ugd_ridge, *beside]


# Figure 2 (supplement, section 4.1.1): Min-SNR inside EDM on ImageNet 64 x 64 ----------------------------

_adm = UNet(
    channels=192,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention=(32, 16, 8),
    heads=None,
    head_channels=64,
    dropout=0.1,
)
"""ADM's network for 64 x 64 (Dhariwal and Nichol 2021)."""

_paper_edm = Config(
    name="paper/imagenet64-edm",
    data=Data("imagenet64", classes=1000, flip=False),
    model=replace(_adm, null_class=False),
    train=Train(
        images=2_500_000_000,
        batch=4096,
        lr=1e-4,
        warmup_images=10_000_000,
        ema_halflife_images=50_000_000,
        grad_clip=None,
        state_every_images=10_000_000,
    ),
    schedule=Schedule("edm"),
    parameterization="edm",
    weight=Weight("edm"),
    evaluate=Evaluate(
        at=tuple(int(1e6 * m) for m in (25, 50, 100, 200, 400, 800, 1600, 2500)),
        samples=50_000,
        features="inception",
        levels=40,
    ),
    note="Figure 2's baseline: the ImageNet-64 training of NVlabs/edm (README and train.py), which the "
    "supplement keeps, but ends before its 2500M images. Ours: bfloat16, not float16; a loss that is the "
    "mean over pixels, not 100 times their sum; when it is measured.",
)

_lab_edm = replace(
    _paper_edm,
    name="lab/imagenet64-edm",
    data=_imagenet64_subset,
    model=UNet(
        channels=32,
        multipliers=(2, 2, 3, 3),
        blocks=1,
        attention=(16, 8),
        heads=None,
        head_channels=32,
        dropout=0.05,
        null_class=False,
    ),
    train=Train(
        images=4_000_000,
        lr=2e-3,  # of two tried, recorded as lab/edm-lr1e-3 and lab/edm-lr2e-3: the lower distance at 0.25M
        warmup_images=50_000,
        ema_halflife_images=80_000,  # 1/50 of the training, as EDM's 50M of 2500M
        also_ema_halflife_images=(320_000,),
        ema_rampup=0.1,
        grad_clip=None,
        cuda_graphs=True,
        state_every_images=4_000_000,
    ),
    evaluate=Evaluate(at=_log_spaced(4_000_000), levels=40),
    note="Figure 2's baseline at lab scale: EDM with a small ADM UNet on 20 classes. Besides sizes, data and "
    "learning rate, what differs from the paper preset are dropout 0.05, mirrored images, and an EMA ramp-up "
    "of 0.1, not 0.05.",
)


def _minsnr(base: Config, gamma: float) -> Config:
    """EDM times min(SNR, gamma) / SNR; gamma 5, the supplement's, has no number in its name."""
    other = {1: ". Beside Figure 2", 20: ", or 5 where SNR is sigma_data^2 / sigma^2. Beside Figure 2"}
    return replace(
        base,
        name=f"{base.name}-minsnr{'' if gamma == 5 else f'{gamma:g}'}",
        min_snr_factor=gamma,
        note=f"{base.note} Its weight times min(SNR, gamma) / SNR, gamma {gamma:g}{other.get(gamma, '')}.",
    )


def _edm_runs() -> list[Config]:
    """Both arms of Figure 2, a second seed of the two, and other gammas beside them."""
    pair = [_lab_edm, _minsnr(_lab_edm, 5.0)]
    again = [_further(run, "-seed1", seed=1) for run in pair]
    beside = [_further(_minsnr(_lab_edm, gamma), "") for gamma in (1.0, 20.0)]
    return [*pair, *again, *beside, _paper_edm, _minsnr(_paper_edm, 5.0)]


# Figures 10 and 11 (supplement, section 4.3): class-conditional ImageNet 64 x 64 ------------------------

_guided = Sample(steps=20, guidance=1.5)
"""20 Heun steps (supplement, section 3.3); the scale is that of the authors' script for the ViT."""

_paper_imagenet64_vit = Config(
    name="paper/imagenet64-vit",
    data=Data("imagenet64", classes=1000),
    model=ViT(width=1024, depth=21, heads=16),
    train=Train(
        images=1024 * 900_000,
        batch=1024,
        lr=1e-4,
        betas=(0.99, 0.99),
        weight_decay=0.03,
        ema_halflife_images=887_000 * 8,  # a decay of 0.9999 a step
        ema_rampup=None,
        label_drop=0.15,
        state_every_images=10_240_000,
    ),
    parameterization="eps",
    weight=Weight("min_snr", gamma=5.0),
    sample=_guided,
    evaluate=Evaluate(
        at=tuple(1024 * 100_000 * n for n in range(1, 10)), samples=50_000, features="inception", levels=40
    ),
    note="Figure 10's settings: ViT-Large, its sampler and betas by the supplement; target, learning rate, "
    "weight decay, label drop, average and guidance as in the authors' released code. Ours: batch and "
    "iterations, which the supplement leaves to the paper (here its UNet's; the released script's batch is "
    "256); bfloat16; clipped gradients.",
)

_paper_imagenet64_unet = replace(
    _paper_imagenet64_vit,
    name="paper/imagenet64-unet",
    model=_adm,
    train=replace(_paper_imagenet64_vit.train, betas=(0.9, 0.999)),
    note="Figure 11's settings: ADM's network, 900K iterations of 1024 images, betas and sampler by the "
    "supplement, ADM's dropout. Ours: the rest as for the ViT of Figure 10, guidance too, where the "
    "supplement states nothing for the UNet; 3 output channels, as no variance is learned.",
)

_lab_imagenet64_vit = replace(
    _paper_imagenet64_vit,
    name="lab/imagenet64-vit",
    data=replace(_imagenet64_subset, holdout=1000),
    model=ViT(width=384, depth=8, heads=6),
    train=Train(
        images=42_000_384,
        batch=512,
        lr=1e-3,  # of two tried, lab/vit-lr1e-3 and lab/vit-lr5e-4: the lower held-out loss at 1M images
        betas=(0.99, 0.99),
        weight_decay=0.03,
        warmup_images=100_000,
        ema_halflife_images=1_000_000,
        ema_rampup=0.1,
        label_drop=0.15,
        cuda_graphs=True,
        state_every_images=2_000_000,
    ),
    sample=replace(_guided, sigma_max=40.0),  # not 80, for the reason given at lab/celeba64-unet
    evaluate=Evaluate(
        # the first as of the learning rates
        at=tuple(512 * n for n in (1954, 7813, 15625, 23438, 35157, 42969, 50782, 66407, 82032)),
        also=(Sample(steps=20, sigma_max=40.0),),
        levels=40,
    ),
    note="Figure 10 at lab scale: a small ViT on 17,494 images of 20 classes. Ours: all sizes and lengths, "
    "learning rate, and where sampling starts.",
)

_lab_imagenet64_unet = replace(
    _lab_imagenet64_vit,
    name="lab/imagenet64-unet",
    model=replace(_lab_celeba64_unet.model, dropout=0.1),
    train=replace(
        _lab_imagenet64_vit.train,
        images=24_500_224,
        betas=(0.9, 0.999),  # its rate: tried as lab/unet-lr1e-3 alone
    ),
    evaluate=replace(
        _lab_imagenet64_vit.evaluate,
        at=(1_000_448, 4_000_256, 8_000_000, 12_000_256, 16_742_400, 20_500_480, 24_500_224),
    ),
    note="Figure 11 at lab scale: a small ADM UNet on 17,494 images of 20 classes. Ours: all sizes and "
    "lengths, learning rate, and where sampling starts.",
)

# Figure 12 (supplement, section 4.3): ImageNet 256 x 256 in the latents of an autoencoder -------------------

_lab_autoencoder = Config(
    name="lab/imagenet64-autoencoder",
    data=replace(_imagenet64_subset, holdout=1000),  # those that lab/imagenet64-latent-vit holds out
    model=Autoencoder(channels=(64, 128, 128), groups=16),
    train=Train(
        images=2_000_128,
        batch=256,
        lr=4e-4,
        betas=(0.9, 0.99),
        warmup_images=50_000,
        ema_halflife_images=100_000,
        state_every_images=1_000_192,
    ),
    evaluate=Evaluate(at=(1_000_192, 2_000_128)),
    note="The autoencoder that takes Stable Diffusion's place at lab scale: 64 x 64 pixels as 16 x 16 "
    "latents of 4 channels. Ours: everything but its kind; its loss has no discriminator, and its features "
    "are of the network by which distances are measured, which favours it there.",
)

_lab_latent_vit = replace(
    _lab_imagenet64_vit,
    name="lab/imagenet64-latent-vit",
    data=replace(
        _lab_imagenet64_vit.data, resolution=16, channels=4, autoencoder="lab/imagenet64-autoencoder"
    ),
    model=ViT(patch=1, width=320, depth=6, heads=5),
    train=replace(_lab_imagenet64_vit.train, images=12_000_256),
    parameterization="x0",
    sample=Sample(steps=50, guidance=1.5, sigma_max=40.0),
    evaluate=replace(
        _lab_imagenet64_vit.evaluate,
        at=(4_000_256, 12_000_256),
        also=(Sample(steps=50, sigma_max=40.0),),
    ),
    note="Figure 12 at lab scale: a small ViT that predicts x0 on the latents of lab/imagenet64-autoencoder, "
    "with as many patches as the paper's. Ours: all sizes and lengths, learning rate, and where sampling "
    "starts.",
)

_latents = Data("imagenet256", resolution=32, channels=4, classes=1000, autoencoder="paper/sd-vae-ft-mse")
"""ImageNet 256 x 256 by an autoencoder that makes 4 x 32 x 32 of an image, as LDM's (Rombach et al. 2022)."""

_vit_xl = ViT(patch=2, width=1152, depth=28, heads=16)

_paper_imagenet256_vit = replace(
    _paper_imagenet64_vit,
    name="paper/imagenet256-vit",
    data=_latents,
    model=_vit_xl,
    train=replace(
        _paper_imagenet64_vit.train,
        images=256 * 7_000_000,
        batch=256,
        ema_halflife_images=887_000 * 2,  # a decay of 0.9999 a step
    ),
    parameterization="x0",
    sample=Sample(steps=50, guidance=1.5),
    evaluate=replace(
        _paper_imagenet64_vit.evaluate, at=tuple(256 * 500_000 * n for n in range(1, 15)), levels=0
    ),
    note="Figure 12's settings: ViT-XL on latents of Stable Diffusion's autoencoder, 50 Heun steps and betas "
    "by the supplement; target, learning rate, weight decay, batch, label drop, average, guidance as in the "
    "authors' released code. Ours: iterations (DiT-XL's, whose size it is, Peebles and Xie 2023); latents "
    "drawn from their distribution (theirs: its means), of mirrored images too; bfloat16; clipped gradients.",
)

TABLE_1 = {
    "ViT-Small": (ViT(patch=4, width=512, depth=13, heads=8), Data("celeba64")),
    "ViT-Base": (ViT(patch=2, width=768, depth=12, heads=12), _latents),
    "ViT-Large": (_paper_imagenet64_vit.model, _paper_imagenet64_vit.data),
    "ViT-XL": (_vit_xl, _latents),
}
"""The ViTs of the supplement's Table 1, each with data that it is used on; ViT-Small with the 8 heads of
U-ViT-S (Bao et al. 2022), since the table's 6 do not divide its width."""

ABLATION_UNET = (UNet(channels=192, multipliers=(1, 2, 2, 2), blocks=3, attention=(8, 16), heads=4), _latents)
"""The UNet of the supplement's section 3.1 for ablations, with data."""

LDM_UNET = (
    UNet(
        channels=256,
        multipliers=(1, 2, 4),
        blocks=2,
        attention=(8, 16, 32),
        heads=None,
        head_channels=32,
        scale_shift_norm=False,
        resample_in_blocks=False,
        transformer_depth=1,
        context_width=512,
    ),
    _latents,
)
"""The UNet that the supplement's section 3.1 names for ImageNet 256 x 256, with data: LDM's, of 395M
parameters (Rombach et al. 2022; configuration cin-ldm-vq-f8.yaml of CompVis/latent-diffusion)."""

# Settings of the supplement's section 3 that none of its figures has ------------------------------------

_paper_celeba64_vit = replace(
    _paper_celeba64_unet,
    name="paper/celeba64-vit",
    model=TABLE_1["ViT-Small"][0],
    train=replace(_paper_celeba64_unet.train, betas=(0.99, 0.99)),
    note="ViT-Small on CelebA. By the supplement: layers, width, betas, Heun. Those of U-ViT-S/4 on CelebA "
    "(Bao et al. 2022): 8 heads, as the supplement's 6 do not divide the width, patch, batch, iterations, "
    "learning rate, weight decay and warm-up. Ours: target, average, clipped gradients, bfloat16; 30 steps, "
    "which the supplement states for its ablations.",
)

_paper_imagenet256_vit_base = replace(
    _paper_imagenet256_vit,
    name="paper/imagenet256-vit-base",
    model=TABLE_1["ViT-Base"][0],
    train=replace(_paper_imagenet256_vit.train, images=256 * 1_000_000),
    sample=Sample(steps=30, guidance=1.5),
    evaluate=replace(
        _paper_imagenet256_vit.evaluate,
        at=tuple(256 * 100_000 * n for n in range(1, 11)),
        also=(Sample(steps=30),),
    ),
    note="The default of the paper's ablations. By the supplement: ViT-Base, latents, 30 Heun steps, betas. "
    "As in the authors' released code for ViT-XL: autoencoder, patch, target, learning rate, weight decay, "
    "batch, label drop, average, guidance. Ours: iterations, which the supplement leaves to the paper; "
    "distances without guidance too; and, as for Figure 12, latents drawn from their distribution, of "
    "mirrored images too, bfloat16, clipped gradients.",
)

_paper_imagenet256_unet_ablation = replace(
    _paper_imagenet256_vit_base,
    name="paper/imagenet256-unet-ablation",
    model=ABLATION_UNET[0],
    train=replace(_paper_imagenet256_vit_base.train, betas=(0.9, 0.999)),
    note="The UNet of the paper's ablations, which has 129M parameters here. By the supplement: widths, "
    "blocks, attention, heads, 30 Heun steps, betas; it calls its parameters close to ViT-Base's 88M. As in "
    "ADM (Dhariwal and Nichol 2021): scale and shift, resampling in residual blocks. Ours: no dropout, and "
    "the rest as for paper/imagenet256-vit-base.",
)

_paper_imagenet256_unet = replace(
    _paper_imagenet256_vit,
    name="paper/imagenet256-unet",
    model=LDM_UNET[0],
    train=replace(_paper_imagenet256_vit.train, betas=(0.9, 0.999)),
    note="LDM's UNet on ImageNet 256. By the supplement: its 395M parameters, 4 x 32 x 32 latents, 50 Heun "
    "steps, betas. By LDM's configuration (Rombach et al. 2022): the network. Ours: the rest as for the ViT "
    "of Figure 12, iterations too; so the latents are of Stable Diffusion's autoencoder, where LDM's own "
    "quantizes.",
)

PRESETS: dict[str, Config] = {
    preset.name: preset
    for preset in (
        _lab_celeba64_unet,
        _paper_celeba64_unet,
        _paper_celeba64_vit,
        _lab_imagenet64_classifier,
        _paper_imagenet64_classifier,
        *_arms(),
        *_ugd_runs(),
        *_edm_runs(),
        _lab_imagenet64_vit,
        _paper_imagenet64_vit,
        _lab_imagenet64_unet,
        _paper_imagenet64_unet,
        _lab_autoencoder,
        _lab_latent_vit,
        _paper_imagenet256_vit,
        _paper_imagenet256_vit_base,
        _paper_imagenet256_unet_ablation,
        _paper_imagenet256_unet,
    )
}


def preset(name: str) -> Config:
    """The preset `<profile>/<run>`; raises `ReproError` listing the near names for any other."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.6)
        hint = f"Near ones: {', '.join(near)}. " if near else ""
        raise ReproError(f"there is no preset {name!r}. {hint}All: python -m repro presets")
    return PRESETS[name]

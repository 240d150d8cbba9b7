"""Every run of both profiles by name, each derived from a few bases.

`lab`: small networks that one GPU trains in minutes, recorded in this repository. `paper`: the
supplement's settings, for a cluster.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from repro.config import Config, Data, Evaluate, Sample, Train, UNet, Weight
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
        images=8_000_000,
        batch=256,
        lr=4e-4,
        warmup_images=100_000,
        ema_halflife_images=300_000,
        ema_rampup=0.08,
    ),
    parameterization="eps",
    weight=Weight("min_snr", gamma=5.0),
    sample=Sample(steps=18),
    evaluate=Evaluate(at=(250_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 6_000_000, 8_000_000)),
    note="Figure 9 at lab scale: a small UNet on 16,469 CelebA faces; the paper trains on all of CelebA.",
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
    note="Figure 9's settings. The supplement gives the backbone (UNet) and the optimizer; batch, iterations, "
    "learning rate and warm-up are those of U-ViT on CelebA (Bao et al. 2022), whose protocol the paper follows.",
)

PRESETS: dict[str, Config] = {preset.name: preset for preset in (_lab_celeba64_unet, _paper_celeba64_unet)}


def preset(name: str) -> Config:
    """The preset `<profile>/<run>`; raises `ReproError` listing the near names for any other."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3) or list(PRESETS)
        raise ReproError(f"there is no preset {name!r}. Near ones: {', '.join(near)}. All: python -m repro presets")
    return PRESETS[name]

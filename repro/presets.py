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

PRESETS: dict[str, Config] = {preset.name: preset for preset in (_lab_celeba64_unet, _paper_celeba64_unet)}


def preset(name: str) -> Config:
    """The preset `<profile>/<run>`; raises `ReproError` listing the near names for any other."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3) or list(PRESETS)
        raise ReproError(
            f"there is no preset {name!r}. Near ones: {', '.join(near)}. All: python -m repro presets"
        )
    return PRESETS[name]

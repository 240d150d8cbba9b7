"""Images as the latents of an autoencoder: the autoencoder's loss, a data set's latents, and pictures again.

<data set>/latents-<hash>/moments.f16    float16 [n, 2, 2 * channels, h, w]: of each image, and of its mirror
                                         image, means and log variances of the latents, scaled
                          manifest.json  of which pixels, by which recorded weights

Beside each prepared data set, since a diffusion model is asked for its latents by name of the data set and of
the autoencoder's recorded run. <hash> is that of the autoencoder's weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from repro import config, data, evaluate, files, provenance, runs, sample
from repro.files import ReproError
from repro.models.autoencoder import KLAutoencoder

SCALE_IMAGES = 5000
"""Training images whose latents tell the scale."""


# The autoencoder, measured ------------------------------------------------------------------------


@torch.no_grad()
def measure(
    net: KLAutoencoder,
    run: config.Config,
    fingerprint: str,
    images_seen: int,
    device: str | torch.device,
    precision: str,
    network: nn.Module | None = None,
) -> list[dict]:
    """How well images of the val split are reconstructed, from their latents' means: lines for metrics.jsonl.

    The Fréchet distance of the reconstructions to the val images, and the mean absolute error of a pixel, in
    grey levels of 255, with the peak signal-to-noise ratio in decibels. fingerprint: of the pixels that `run`
    was trained on. precision: of encoding; decoded in float32. Raises `ReproError` where the val split is not
    prepared.
    """
    began = time.perf_counter()
    real = data.load(f"{run.data.name}-val")
    network = network or evaluate.feature_network(run.evaluate.features, device)
    known = evaluate.reference(real.name, real.manifest["fingerprint"], run.evaluate.features, device)
    moments = evaluate.Moments(network.dimension, device, origin=known.mean)
    absolute = squared = 0.0
    for images in evaluate.batches(real.images, at_once(run.data.resolution), device):
        with sample.autocast(device, precision):
            means = net.encode(sample.from_uint8(images))[0]
        again = sample.to_uint8(pictures(net, means.float()))
        moments.add(network(again).float())
        apart = again.double() - images.double()
        absolute += float(apart.abs().sum())
        squared += float(apart.square().mean((1, 2, 3)).clamp(min=1e-9).log10().sum())
    mean, covariance = moments.statistics()
    about = {
        "images": images_seen,
        "features": run.evaluate.features,
        "samples": len(real.images),
        "precision": precision,
        "reference": known.describe(),
        "trained_on": fingerprint,
        "device": evaluate.device_name(device),
        "code": provenance.code_version("import repro.train"),
    }
    value = evaluate.frechet_distance(mean, covariance, known.mean.to(mean), known.covariance.to(mean))
    return [
        {
            "name": f"reconstruction {network.title}",
            "value": value,
            **about,
            "seconds": round(time.perf_counter() - began, 1),
        },
        {
            "name": "reconstruction error",
            "value": absolute / real.images.size,
            "psnr": 10 * (2 * math.log10(255) - squared / len(real.images)),
            **about,
        },
    ]


@torch.no_grad()
def find_scale(
    net: KLAutoencoder,
    images: UInt8[np.ndarray, "n c h w"],
    indices: Int[np.ndarray, " some"],
) -> float:
    """1 / the standard deviation of the latents of `images[indices]` (Rombach et al. 2022, appendix G).

    Of at most `SCALE_IMAGES`, spread evenly over their order, as they are drawn: over all their numbers.
    """
    number = min(len(indices), SCALE_IMAGES)
    chosen = indices[np.arange(number) * len(indices) // number]
    count = total = squares = 0.0
    for rows in np.array_split(chosen, math.ceil(len(chosen) / at_once(images.shape[-1]))):
        x = sample.from_uint8(torch.from_numpy(images[rows])).to(net.scale.device)
        mean, log_variance = (each.double() for each in net.encode(x))
        count += mean.numel()
        total += float(mean.sum())
        squares += float((mean.square() + log_variance.exp()).sum())
    return 1 / math.sqrt(squares / count - (total / count) ** 2)


# A data set's latents -------------------------------------------------------------------------------


def trained(autoencoder: str) -> runs.Run:
    """The recorded run of an autoencoder; raises `ReproError` where it is none, or not trained to its end."""
    run = runs.load_run(autoencoder)
    run.autoencoder()  # raises where it is none
    if not run.finished:
        raise ReproError(f"the autoencoder {autoencoder} is not trained to its end yet")
    return run


def folder(dataset: str, weights: dict[str, str], root: str | Path | None = None) -> Path:
    """Where the latents of a prepared data set by the autoencoder of these weight hashes lie."""
    told = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:8]
    return data.data_root(root) / dataset / f"latents-{told}"


def encode(
    dataset: str, autoencoder: str, device: str | torch.device = "cpu", batch: int = 250,
    precision: str = "fp32", root: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write the latents of a prepared data set by a recorded autoencoder; returns their folder.

    Goes on where it was stopped, and leaves alone what is whole. Raises `ReproError` where the data set is
    not prepared, the run is no autoencoder for such images, another process encodes the same, or the disk is
    full.
    """
    recorded, real = trained(autoencoder), data.load(dataset, root)
    net = recorded.autoencoder(device)
    shape = (recorded.config.data.channels, recorded.config.data.resolution)
    if real.images.shape[1:3] != shape:
        raise ReproError(
            f"{autoencoder} is for {shape[0]} channels of side {shape[1]}; {dataset} holds images of "
            f"{real.images.shape[1:]}"
        )
    out = folder(dataset, recorded.record.weights, root)
    about = {
        "shape": [len(real.images), 2, 2 * recorded.config.model.latent_channels, net.side, net.side],
        "pixels": real.manifest["fingerprint"],
        "autoencoder": recorded.config.name,
        "weights": recorded.record.weights,
        "scale": float(net.scale),
        "precision": precision,
    }
    row = 2 * math.prod(about["shape"][1:])  # bytes
    size, begun = row * len(real.images), out / "begun.json"
    with files.lock(out):
        if (out / "manifest.json").exists():
            whole = files.read_json(out / "manifest.json")
            if {**whole, "sha256": ""} == {**about, "sha256": ""} and _size(out / "moments.f16") == size:
                return out
            raise ReproError(
                f"{out} holds latents that are not whole, or were encoded otherwise (of other pixels, or in "
                f"{whole['precision']} and not {precision}): remove it, and encode {dataset} anew"
            )
        try:
            if not begun.exists() or files.read_json(begun) != about:
                for name in ("moments.partial", "moments.f16"):
                    (out / name).unlink(missing_ok=True)
                files.write_json(begun, about)
            if _size(out / "moments.f16") != size:  # or it was killed before the manifest was written
                with open(out / "moments.partial", "ab") as file:
                    os.ftruncate(file.fileno(), file.tell() // row * row)
                    steps = range(file.tell() // row, len(real.images), batch)
                    for first in tqdm(steps, desc=dataset, unit="batch", disable=None):
                        images = torch.from_numpy(np.array(real.images[first : first + batch])).to(device)
                        file.write(_moments(net, images, precision).cpu().numpy().tobytes())
                        file.flush()
                        os.fsync(file.fileno())  # or after a crash of the machine, holes would count as done
                os.replace(out / "moments.partial", out / "moments.f16")
            files.write_json(out / "manifest.json", {**about, "sha256": files.sha256(out / "moments.f16")})
            begun.unlink()
        except OSError as error:
            raise ReproError(
                f"cannot write {out}: {error}. Free some space and give the same command, which goes on."
            ) from error
    return out


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    return path.stat().st_size if path.exists() else -1


@torch.no_grad()
def _moments(
    net: KLAutoencoder, images: UInt8[Tensor, "n c h w"], precision: str
) -> Float[Tensor, "n 2 l2 h2 w2"]:
    """Scaled means and log variances of images and their mirror images, float16."""
    views = []
    for view in (images, images.flip(3)):
        with sample.autocast(images.device, precision):
            mean, log_variance = net.encode(sample.from_uint8(view))
        views.append(torch.cat([mean.float() * net.scale, log_variance.float() + 2 * net.scale.log()], dim=1))
    found = torch.stack(views, dim=1).half()
    if not torch.isfinite(found).all():
        raise ReproError("latents are not finite in float16: the autoencoder's are too large")
    return found


def _encoded(dataset: str, autoencoder: str, root: str | Path | None) -> tuple[Path, dict]:
    """A data set's moments.f16 by a recorded autoencoder, and its manifest; raises as `load` says."""
    recorded, real = runs.load_run(autoencoder), data.load(dataset, root)
    out = folder(dataset, recorded.record.weights, root)
    command = f"python -m repro encode {dataset.removesuffix('-val')} {autoencoder}"
    if not (out / "manifest.json").exists():
        raise ReproError(f"the latents of {dataset} by {autoencoder} are not there. Run: {command}")
    manifest = files.read_json(out / "manifest.json")
    size = 2 * math.prod(manifest["shape"])
    if manifest["pixels"] != real.manifest["fingerprint"] or _size(out / "moments.f16") != size:
        raise ReproError(f"{out} is not whole, or of other pixels. Remove it and run: {command}")
    return out / "moments.f16", manifest


def load(
    dataset: str, autoencoder: str, root: str | Path | None = None
) -> Shaped[np.ndarray, "n 2 l2 h2 w2"]:
    """The latents of a prepared data set by a recorded autoencoder: moments.f16, mapped, not read.

    Raises `ReproError` where there are none, with the command that makes them, or where they are not whole or
    of other pixels.
    """
    path, manifest = _encoded(dataset, autoencoder, root)
    return np.memmap(path, np.float16, "r", shape=tuple(manifest["shape"]))


def verify(dataset: str, autoencoder: str, root: str | Path | None = None) -> dict[str, str]:
    """SHA-256 of a prepared data set's latents, from all bytes, and their precision, as a record has them.

    Raises `ReproError` where they are not those that were encoded, besides what `load` raises.
    """
    path, manifest = _encoded(dataset, autoencoder, root)
    if (found := files.sha256(path)) != manifest["sha256"]:
        raise ReproError(f"{path} changed since it was encoded: remove {path.parent} and encode anew")
    return {"sha256": found, "precision": manifest["precision"]}


def of_run(run: config.Config, real: data.Dataset) -> Shaped[np.ndarray, "n *shape"]:
    """What a run learns of a data set: its images, uint8, or their latents' moments, float16."""
    return load(real.name, run.data.autoencoder) if run.data.autoencoder else real.images


def plain(rows: Shaped[Tensor, "n *shape"]) -> Float[Tensor, "n c h w"]:
    """What is learned, without chance: images in [-1, 1], or the scaled means of moments; float32."""
    if rows.dtype == torch.uint8:
        return sample.from_uint8(rows)
    return rows[:, 0].float().chunk(2, dim=1)[0]


def drawn(
    moments: Float[Tensor, "n 2 l2 h w"], mirrored: Shaped[Tensor, " n"], noise: Float[Tensor, "n l h w"]
) -> Float[Tensor, "n l h w"]:
    """Scaled latents drawn from their distribution, of the mirror image where `mirrored`; float32."""
    chosen = torch.where(mirrored[:, None, None, None], moments[:, 1], moments[:, 0]).float()
    mean, log_variance = chosen.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * noise


# Pictures again -------------------------------------------------------------------------------------


@torch.no_grad()
def decode(latents: Float[Tensor, "n l h w"], autoencoder: str) -> Float[Tensor, "n c h2 w2"]:
    """The images of scaled latents by a recorded autoencoder, float32 about [-1, 1], on the latents' device.

    Raises `ReproError` where it is not recorded.
    """
    run = runs.load_run(autoencoder)
    net = _recorded(autoencoder, tuple(run.record.weights.items()), latents.device)
    parts = (latents.float() / net.scale).split(at_once(run.config.data.resolution))
    return torch.cat([pictures(net, part) for part in parts])


def pictures(net: KLAutoencoder, latents: Float[Tensor, "n l h w"]) -> Float[Tensor, "n c h2 w2"]:
    """The images of latents that are not scaled, in float32 whatever surrounds it: half precision would round
    them to half a grey level."""
    with torch.autocast(latents.device.type, enabled=False):
        return net.decode(latents)


def at_once(side: int) -> int:
    """Images of a side that are encoded or decoded together: as many as have the pixels of 250 of side 64."""
    return max(1, 250 * 64**2 // side**2)


@lru_cache(maxsize=2)
def _recorded(name: str, hashes: tuple[tuple[str, str], ...], device: torch.device) -> KLAutoencoder:
    """A recorded autoencoder with those weights."""
    return runs.load_run(name).autoencoder(device)

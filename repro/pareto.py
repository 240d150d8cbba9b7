"""The shortest convex combination of gradients, one a noise level: the direction that lowers every loss.

Supplement, section 1 (Theorem 1). With g_t the gradient of the loss at noise level t and w on the simplex,
u = sum_t w_t g_t of least norm has <g_t, u> >= |u|^2 for all t, so -u lowers all losses, or is 0 where no
direction does. It depends on the gradients through their inner products alone, so that all methods here
work on the Gram matrix G[s, t] = <g_s, g_t>, and a step of theirs costs T^2 however large the network is:

    minimise f(w) = w' G w / 2    over    w >= 0, sum_t w_t = 1.

`Combination.gap` tells for any w how far from the minimum it is, since f is convex (Jaggi 2013, "Revisiting
Frank-Wolfe").
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import optimize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from repro import config, data, evaluate, latents, provenance, runs, sample, weights
from repro.denoiser import X0, Denoiser, Parameterization
from repro.files import ReproError
from repro.models import vit_fused
from repro.models.norm import GroupNorm


@dataclass(frozen=True, eq=False)
class Combination:
    """A convex combination u = sum_t w_t g_t of gradients."""

    weights: Float[Tensor, " T"]
    """w: at least 0, of sum 1; float64."""
    squared_norm: float
    """|u|^2 = w' G w, at least 0."""
    products: Float[Tensor, " T"]
    """<g_t, u> for all t: to first order, what a step along -u takes from each loss."""
    steps: int
    """That the method took."""

    @property
    def gap(self) -> float:
        """|u|^2 - min_t <g_t, u>: at least 0, and at least |u|^2 / 2 less its minimum; 0 at the minimum."""
        return self.squared_norm - float(self.products.min())


class _Loss(nn.Module):
    """The mean loss of images at one noise level, as a module: torch.func calls it with given parameters."""

    def __init__(self, denoiser: Denoiser, weight: weights.Weight):
        super().__init__()
        self.denoiser, self.weight = denoiser, weight

    def forward(self, y: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """As `Denoiser.loss`, for one sigma of all images, or one each."""
        return self.denoiser.loss(y, noise, sigma.expand(len(y)), labels, self.weight).mean()


def gradients(
    denoiser: Denoiser,
    y: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    sigmas: Float[Tensor, " T"] | Float[Tensor, "T n"],
    weight: weights.Weight,
    labels: Int[Tensor, " n"] | None = None,
    chunk: int = 4,
) -> Float[Tensor, "T p"]:
    """Of the mean loss over the images, by all parameters of the network: one row a noise level.

    sigmas: one level a row, or one for each image of a row. All rows see the same images and noise, so that
    they differ in nothing else. `chunk` rows pass through the network at a time (torch.func.vmap): that takes
    the activations of chunk * n images and chunk * p numbers, and the result is T * p of them. The network is
    used in the mode it is in: dropout belongs switched off. Raises `ReproError` for levels that are not above
    0, shapes that differ, and gradients that are not finite.
    """
    if not (torch.isfinite(sigmas).all() and (sigmas > 0).all() and len(sigmas)):
        raise ReproError("noise levels must be finite, above 0, and one or more")
    if y.shape != noise.shape:
        raise ReproError(f"images of {tuple(y.shape)} and noise of {tuple(noise.shape)} differ in shape")
    if chunk < 1:
        raise ReproError(f"chunk must be at least 1, not {chunk}")
    loss = _Loss(denoiser, weight)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}

    def of_level(given: dict[str, Tensor], sigma: Tensor) -> Tensor:
        return torch.func.functional_call(loss, given, (y, noise, sigma, labels))

    sigmas = sigmas.to(y.device)
    denoiser.schedule.network_time(sigmas)  # which keeps a table on the device: not one made under vmap
    of_some = torch.func.vmap(torch.func.grad(of_level), in_dims=(None, 0))
    sizes = [p.numel() for p in parameters.values()]
    rows = torch.empty(len(sigmas), sum(sizes), device=y.device)
    with _plainly():
        for first in range(0, len(sigmas), chunk):
            found = of_some(parameters, sigmas[first : first + chunk])
            into = rows[first : first + chunk].split(sizes, dim=1)
            for part, name in zip(into, parameters, strict=True):
                part.copy_(found[name].flatten(1))
    if broken := (~torch.isfinite(rows).all(1)).nonzero()[:, 0].tolist():
        raise ReproError(f"the gradient at sigma = {float(sigmas[broken[0]].flatten()[0]):.4g} is not finite")
    return rows


@contextmanager
def _plainly() -> Iterator[None]:
    """Within a block group norms and attention are computed by what torch.func can vectorise, in float32."""
    before = GroupNorm.fused, vit_fused.enabled, torch.backends.cudnn.allow_tf32
    GroupNorm.fused, vit_fused.enabled, torch.backends.cudnn.allow_tf32 = False, False, False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        GroupNorm.fused, vit_fused.enabled, torch.backends.cudnn.allow_tf32 = before


def gram(gradients: Float[Tensor, "T p"], chunk: int = 2**20) -> Float[Tensor, "T T"]:
    """Inner products of gradients in float64, on their device, over `chunk` parameters at a time.

    Besides the gradients it needs T * (chunk + T) numbers of 8 bytes. Raises `ReproError` for gradients that
    are not finite, or whose squares are not, naming the first.
    """
    total = _products(gradients, gradients, chunk)
    if broken := (~torch.isfinite(total.diagonal())).nonzero()[:, 0].tolist():
        raise ReproError(f"the gradient at position {broken[0]} is not finite, or its square is not")
    return total


def _products(one: Float[Tensor, "T p"], other: Float[Tensor, "T p"], chunk: int) -> Float[Tensor, "T T"]:
    """Inner products of the rows of both, in float64, over `chunk` columns at a time."""
    if chunk < 1:
        raise ReproError(f"chunk must be at least 1, not {chunk}")
    total = torch.zeros(len(one), len(other), dtype=torch.float64, device=one.device)
    for first in range(0, one.shape[1], chunk):
        part = one[:, first : first + chunk].double()
        beside = part if other is one else other[:, first : first + chunk].double()
        total.addmm_(part, beside.T)
    return total


def combine(gram: Float[Tensor, "T T"], weights: Float[Tensor, " T"], steps: int = 0) -> Combination:
    """The combination of given weights, which are scaled to sum 1; raises `ReproError` for unfit ones."""
    G = _checked(gram)
    w = weights.to(G)
    if len(w) != len(G):
        raise ReproError(f"{len(w)} weights do not fit a Gram matrix of {len(G)} gradients")
    if not (torch.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise ReproError("weights must be finite, at least 0, and not all 0")
    w = w / w.sum()
    products = G @ w
    return Combination(w, max(float(w @ products), 0.0), products, steps)


def exact(gram: Float[Tensor, "T T"]) -> Combination:
    """The minimum, by an active-set method: non-negative least squares (Lawson and Hanson 1974, by SciPy).

    With G = A'A, minimise |A x|^2 + (c sum x - 1)^2 over x >= 0, for any c > 0. For x = s w with w on the
    simplex that is s^2 |A w|^2 + (c s - 1)^2, which is least at s = c / (c^2 + |A w|^2), where it grows with
    |A w|, so that w = x / sum x is the w of least |A w|. Solved for y_t = |g_t| x_t, by gradients of
    length 1, so that short ones count beside long ones; c is the shortest length.
    """
    G = _checked(gram)
    lengths = G.diagonal().sqrt()
    if lengths.min() == 0:  # one is stationary: nothing is shorter
        return combine(G, (lengths == 0).double())
    values, vectors = np.linalg.eigh((G / lengths.outer(lengths)).cpu().numpy())
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    shares = (lengths.min() / lengths).cpu().numpy()
    try:
        y, _ = optimize.nnls(np.vstack([root, shares]), np.append(np.zeros(len(G)), 1.0))
    except RuntimeError as error:
        raise ReproError(
            f"no minimum was found for {len(G)} gradients ({error}); frank_wolfe comes near it"
        ) from error
    return combine(G, torch.from_numpy(y * shares))


def ridged(gram: Float[Tensor, "T T"], ridge: float) -> Combination:
    """The combination whose squared length plus ridge * m * |w|^2 is least, m the gradients' mean square.

    Ours: at the minimum of `exact` most weights are 0 where gradients agree and are of very different
    lengths, and levels of weight 0 are not trained. The larger the ridge, the more even the weights, and the
    less is left of Theorem 1: a level's loss may then rise. 0 is `exact`. Raises `ReproError` for a ridge
    that is negative or not finite.
    """
    if not 0 <= ridge < math.inf:
        raise ReproError(f"a ridge is at least 0 and finite, not {ridge}")
    G = _checked(gram)
    if ridge == 0 or G.diagonal().max() == 0:
        return exact(G)
    return combine(G, exact(G + ridge * G.diagonal().mean() * torch.eye(len(G)).to(G)).weights)


def frank_wolfe(
    gram: Float[Tensor, "T T"], steps: int = 250, tolerance: float = 0.0, start: Sequence[float] | None = None
) -> Combination:
    """Frank and Wolfe's method with exact line search, as in multi-task learning (Sener and Koltun 2018).

    Each step moves towards the gradient that agrees least with u; from equal weights, or `start`. Stops
    where the gap is at most tolerance * |u|^2, or after `steps`: 250 there, and so in the supplement (4.2).
    """
    G = _checked(gram)
    _check_steps(steps)
    w = combine(G, torch.ones(len(G)) if start is None else torch.as_tensor(start)).weights
    taken = 0
    for taken in range(1, steps + 1):
        products = G @ w  # anew in each step: a running sum would drift
        squared_norm, worst = w @ products, int(products.argmin())
        gap = squared_norm - products[worst]
        curvature = G[worst, worst] - 2 * products[worst] + squared_norm  # |g_worst - u|^2
        if gap <= tolerance * squared_norm or curvature <= 0:
            taken -= 1
            break
        move = float((gap / curvature).clamp(max=1))
        w = (1 - move) * w
        w[worst] += move
    return combine(G, w, taken)


def by_softmax(gram: Float[Tensor, "T T"], steps: int = 250, rate: float = 0.1) -> Combination:
    """Gradient steps on a, where w = softmax(a): Adam's, from equal weights, as one would train a network.

    df/da = w (G w - w' G w). G is scaled by its largest diagonal element: the minimum stays where it is.
    A weight of 0 is reached in the limit only.
    """
    G = _checked(gram)
    _check_steps(steps)
    scaled = G / (G.diagonal().max() or 1.0)
    a = torch.zeros(len(G), dtype=torch.float64, device=G.device, requires_grad=True)
    optimizer = torch.optim.Adam([a], lr=rate)
    for _ in range(steps):
        w = a.detach().softmax(0)
        products = scaled @ w
        a.grad = w * (products - w @ products)
        optimizer.step()
    return combine(G, a.detach().softmax(0), steps)


def max_min(gram: Float[Tensor, "T T"]) -> tuple[float, float, Float[Tensor, " T"]]:
    """Equation 2 of the supplement as it stands, over u: max min_t <g_t, u> - |u|^2 / 2; |u|^2; all <g_t, u>.

    By sequential quadratic programming (Kraft 1988, SciPy's SLSQP) over u and s, of s - |u|^2 / 2 where no
    <g_t, u> is below s, in coordinates of the gradients' span: what of u is orthogonal to all of them only
    costs. It knows nothing of weights: Theorem 1 says that u is that of `exact`, and the value |u|^2 / 2.
    Raises `ReproError` where the search does not arrive.
    """
    G = _checked(gram)
    unit = float(G.diagonal().max()) or 1.0  # the longest gradient has length 1 within
    values, vectors = np.linalg.eigh((G / unit).cpu().numpy())
    rows = vectors * np.sqrt(values.clip(min=0))  # g_t in these coordinates
    constraint = np.hstack([rows, -np.ones((len(G), 1))])  # <g_t, u> - s >= 0
    gradient_of_s = np.append(np.zeros(len(G)), 1.0)
    found = optimize.minimize(
        lambda z: z[:-1] @ z[:-1] / 2 - z[-1],
        np.zeros(len(G) + 1),
        jac=lambda z: np.append(z[:-1], 0.0) - gradient_of_s,
        constraints={"type": "ineq", "fun": lambda z: constraint @ z, "jac": lambda _: constraint},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    if not found.success:
        raise ReproError(f"the largest minimum of {len(G)} gradients was not found ({found.message})")
    u = found.x[:-1]
    return float(-found.fun * unit), float(u @ u * unit), torch.from_numpy(rows @ u * unit)


def of_bins(
    denoiser: Denoiser,
    y: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    uniform: Float[Tensor, " n"],
    bins: int,
    labels: Int[Tensor, " n"] | None = None,
    chunk: int = 4,
    ridge: float = 0.0,
) -> Combination:
    """Theorem 1's weights of bins of noise levels that are trained equally often, on the loss in x0.

    Each image is seen at one level of every bin: where `uniform`, in [0, 1), says within the bin. ridge: as
    in `ridged`. Memory and errors are those of `gradients`.
    """
    within = (torch.arange(bins, device=uniform.device)[:, None] + uniform.double()) / bins
    on_x0 = weights.from_config(config.Weight("constant"), X0)
    rows = gradients(denoiser, y, noise, denoiser.schedule.draw(within), on_x0, labels, chunk)
    return ridged(gram(rows, 2**18), ridge)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ReproError(f"steps must be at least 1, not {steps}")


def _checked(gram: Tensor) -> Float[Tensor, "T T"]:
    """`gram` in float64; raises `ReproError` where it is no Gram matrix by what is seen at once."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ReproError(f"a Gram matrix is square and not empty, not of shape {tuple(gram.shape)}")
    G = gram.detach().double()
    if not torch.isfinite(G).all():
        raise ReproError("the Gram matrix is not finite: a gradient is not, or overflows in its product")
    largest = float(G.diagonal().max())
    if (G.diagonal() < 0).any() or float((G - G.T).abs().max()) > 1e-6 * max(largest, 0.0):
        raise ReproError("a Gram matrix is symmetric and has no negative square: build it with pareto.gram")
    return (G + G.T) / 2


# Of a recorded run ----------------------------------------------------------------------------------


def agreement(products: Float[Tensor, "K K T T"]) -> dict[str, Tensor]:
    """How the gradients of T noise levels agree, from inner products of those of K disjoint groups of images.

    products[a, b, s, t] is that of group a's gradient at level s and group b's at t, of mean losses. `gram`
    is the Gram matrix of the mean over all images given. A gradient of few images is longer than that of all
    they are drawn from, and its inner product with itself too large; products of different groups are not:
    `between`, their mean, estimates the inner products of the gradients of all, and `cosines` their cosines,
    NaN at levels that are not `known`: whose squared length is not above 3 of its standard errors.
    `..._errors` are standard errors, by the jackknife that leaves out a group at a time. Raises `ReproError`
    for fewer than 3 groups.
    """
    groups = len(products)
    if groups < 3:
        raise ReproError(f"standard errors need 3 groups of images or more, not {groups}")

    def between(some: Tensor) -> Tensor:
        K = len(some)
        return (some.sum((0, 1)) - some.diagonal().sum(-1)) / (K * (K - 1))

    def cosines(inner: Tensor) -> Tensor:
        length = inner.diagonal().clamp(min=0).sqrt()
        return inner / length.outer(length)

    def error(left_out: list[Tensor]) -> Tensor:
        values = torch.stack(left_out)
        return ((groups - 1) / groups * (values - values.mean(0)).square().sum(0)).sqrt()

    rest = [[b for b in range(groups) if b != a] for a in range(groups)]
    without = [between(products[keep][:, keep]) for keep in rest]
    whole, errors = between(products), error(without)
    known = whole.diagonal() > 3 * errors.diagonal()
    both = known.outer(known)
    gram = products.mean((0, 1))
    return {
        "gram": (gram + gram.T) / 2,
        "between": whole,
        "between_errors": errors,
        "cosines": cosines(whole).where(both, torch.nan),
        "cosine_errors": error([cosines(inner) for inner in without]).where(both, torch.nan),
        "known": known,
    }


def measure(
    recorded: runs.Run,
    levels: int = 20,
    images: int = 256,
    device: str | torch.device = "cpu",
    batch: int = 32,
    chunk: int = 4,
    groups: int = 8,
) -> dict:
    """Inner products of a recorded network's gradients by noise level: a line for metrics.jsonl.

    Of the mean over `images` training images, spread evenly over their order, of the loss that is constant
    on the network's own output, at `levels` noise levels that stand for equal shares of those trained. With a
    weight w_t on that output, element s, t of a matrix of inner products is w_s w_t times what is recorded:
    `of_weight`. The line has what `agreement` gives of `groups` interleaved groups of the images; its value
    is the least cosine of two known levels, with its standard error, none where there are not two.

    Image i, never mirrored, has the same noise at every level and for every run. Computed in float32, for
    `batch` images of `chunk` levels at a time, in the memory of (groups + 1) * levels * parameters numbers
    besides. Raises `ReproError` where the run is none of a denoiser or has no weights, where the prepared
    data are other ones, and for numbers that cannot be.
    """
    began = time.perf_counter()
    if levels < 1 or batch < 1 or groups < 3 or images < groups * batch or images % (groups * batch):
        raise ReproError(
            f"gradients of {images} images at {levels} levels cannot be taken: give at least 1 level, 3 "
            f"groups or more, and a multiple of {groups} times the {batch} images that are taken at once"
        )
    run, about = recorded.config, recorded.record.data
    D = recorded.denoiser(device)
    real = evaluate.load_same(about.name, about.fingerprint)
    train, _ = data.holdout_split(len(real.images), run.data.holdout)
    if images > len(train):
        raise ReproError(f"{images} images were asked for, but {about.name} has {len(train)} to train on")
    rows, learned = train[np.arange(images) * len(train) // images], latents.of_run(run, real)
    sigmas = evaluate.levels_of(D.schedule, levels)
    weight = weights.from_config(config.Weight("constant"), D.parameterization, run.sigma_data)
    means: list[Tensor] = []
    for group in (rows[first::groups] for first in range(groups)):
        total = None
        for first in range(0, len(group), batch):
            some = group[first : first + batch]
            y = latents.plain(torch.from_numpy(data.rows_of(learned, some))).to(device)
            noise = sample.SeedNoise([NOISE_SEED + int(i) for i in some], y.shape[1:], device)()
            labels = torch.from_numpy(real.labels[some]).to(device) if run.data.classes else None
            found = gradients(D, y, noise, sigmas, weight, labels, chunk).mul_(batch / len(group))
            total = found if total is None else total.add_(found)
        means.append(total)
    products = torch.empty(groups, groups, levels, levels, dtype=torch.float64)
    for a, b in itertools.combinations_with_replacement(range(groups), 2):
        inner = _products(means[a], means[b], 2**18).cpu()
        products[a, b], products[b, a] = inner, inner.T
    found = agreement(products)
    cosines = found["cosines"].clone().fill_diagonal_(torch.nan)
    least = None
    if bool(torch.isfinite(cosines).any()):
        least = int(cosines.nan_to_num(torch.inf).argmin())
    plain = {
        name: [[None if math.isnan(x) else x for x in row] for row in found[name].tolist()]
        for name in ("gram", "between", "between_errors", "cosines", "cosine_errors")
    }
    return {
        "name": "gradients by noise level",
        "value": None if least is None else float(cosines.flatten()[least]),
        "value_error": None if least is None else float(found["cosine_errors"].flatten()[least]),
        "images": recorded.record.images,
        "sigmas": sigmas.tolist(),
        "timesteps": D.schedule.network_time(sigmas).tolist(),
        **plain,
        "known": found["known"].tolist(),
        "groups": groups,
        "count": images,
        "dataset": {"name": real.name, "fingerprint": about.fingerprint},
        "device": evaluate.device_name(device),
        "code": provenance.code_version("import repro.pareto"),
        "seconds": round(time.perf_counter() - began, 1),
    }


NOISE_SEED = 2**29
"""The sample seed whose noise image 0 of a data set gets in `measure`; image i gets the i-th after it."""


def of_weight(line: dict, weight: weights.Weight, parameterization: Parameterization) -> dict[str, Tensor]:
    """`gram`, `between` and its errors of a line of `measure` with a loss weight (of SNR) on x0."""
    on_output = parameterization.network_weight(weight, torch.tensor(line["sigmas"], dtype=torch.float64))
    both = on_output.double().outer(on_output.double())
    matrices = ("gram", "between", "between_errors")
    return {name: torch.tensor(line[name], dtype=torch.float64) * both for name in matrices}

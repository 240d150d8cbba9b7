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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import optimize
from torch import Tensor

from repro.files import ReproError


@dataclass(frozen=True, eq=False)
class Combination:
    """A convex combination u = sum_t w_t g_t of gradients."""

    weights: Float[Tensor, " T"]
    """w: at least 0, of sum 1; float64."""
    squared_norm: float
    """|u|^2 = w' G w."""
    products: Float[Tensor, " T"]
    """<g_t, u> for all t: to first order, what a step along -u takes from each loss."""
    steps: int
    """That the method took."""

    @property
    def gap(self) -> float:
        """|u|^2 - min_t <g_t, u>: at least 0, and at least |u|^2 / 2 less its minimum; 0 at the minimum."""
        return self.squared_norm - float(self.products.min())

    @property
    def descends(self) -> bool:
        """Whether -u lowers every loss, or leaves it as it is, to first order."""
        return bool(self.products.min() >= 0)


def gram(gradients: Float[Tensor, "T p"], chunk: int = 2**20) -> Float[Tensor, "T T"]:
    """Inner products of gradients in float64, on their device, over `chunk` parameters at a time.

    Besides the gradients it needs T * (chunk + T) numbers of 8 bytes. Raises `ReproError` for gradients that
    are not finite, naming the first.
    """
    levels, parameters = gradients.shape
    total = torch.zeros(levels, levels, dtype=torch.float64, device=gradients.device)
    for first in range(0, parameters, chunk):
        part = gradients[:, first : first + chunk].double()
        total.addmm_(part, part.T)
    if broken := (~torch.isfinite(total.diagonal())).nonzero()[:, 0].tolist():
        raise ReproError(f"the gradient at position {broken[0]} is not finite")
    return total


def combine(gram: Float[Tensor, "T T"], weights: Float[Tensor, " T"], steps: int = 0) -> Combination:
    """The combination of given weights, which are scaled to sum 1; raises `ReproError` for unfit ones."""
    G = _checked(gram)
    w = weights.to(G)
    if not (torch.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise ReproError("weights must be finite, at least 0, and not all 0")
    w = w / w.sum()
    products = G @ w
    return Combination(w, float(w @ products), products, steps)


def exact(gram: Float[Tensor, "T T"]) -> Combination:
    """The minimum, by an active-set method: non-negative least squares (Lawson and Hanson 1974, by SciPy).

    With G = A'A, minimise |A x|^2 + (sum x - 1)^2 over x >= 0. For x = s w with w on the simplex that is
    s^2 |A w|^2 + (s - 1)^2, which is least at s = 1 / (1 + |A w|^2), where it is |A w|^2 / (1 + |A w|^2): it
    grows with |A w|, so that w = x / sum x is the w of least |A w|.
    """
    G = _checked(gram)
    levels, scale = len(G), float(G.diagonal().max())
    if scale == 0:
        return combine(G, torch.ones(levels))
    values, vectors = np.linalg.eigh(G.cpu().numpy() / scale)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    try:
        x, _ = optimize.nnls(np.vstack([root, np.ones(levels)]), np.append(np.zeros(levels), 1.0))
    except RuntimeError as error:
        raise ReproError(f"no minimum was found for {levels} gradients: {error}") from error
    return combine(G, torch.from_numpy(x))


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

"""Samplers: from noise to images along a descending grid of noise levels.

Each takes `denoise(x, sigma) -> D_x` with sigma one number, the start x = sigmas[0] * n, and `sigmas`,
a descending grid that ends in 0. The state is float64; the network runs in its own precision.
`fresh_noise()` gives a new standard normal tensor like x, needed only where a sampler is stochastic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from repro.files import ReproError

Denoise = Callable[[Tensor, Tensor], Tensor]
FreshNoise = Callable[[], Tensor]


def heun(
    denoise: Denoise,
    x: Float[Tensor, "n c h w"],
    sigmas: Float[Tensor, " steps_and_zero"],
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    fresh_noise: FreshNoise | None = None,
) -> Float[Tensor, "n c h w"]:
    """EDM's second-order sampler (Karras et al. 2022, Algorithms 1 and 2).

    2 * steps - 1 network calls, since the last step, to 0, is Euler's. `churn` (S_churn) adds noise
    before each step whose sigma lies in `churn_range`, scaled by `churn_noise`; 0 is deterministic.
    """
    _check(sigmas, churn, fresh_noise)
    x, sigmas = x.double(), sigmas.double()
    steps = len(sigmas) - 1
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        if churn > 0 and churn_range[0] <= sigma <= churn_range[1]:
            sigma_hat = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
            x = x + (sigma_hat**2 - sigma**2).sqrt() * churn_noise * fresh_noise().to(x)
            sigma = sigma_hat
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (sigma_next - sigma) * slope
        if sigma_next == 0:
            return euler
        slope_next = (euler - denoise(euler, sigma_next)) / sigma_next
        x = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x


def ancestral(
    denoise: Denoise,
    x: Float[Tensor, "n c h w"],
    sigmas: Float[Tensor, " steps_and_zero"],
    eta: float = 0.0,
    fresh_noise: FreshNoise | None = None,
) -> Float[Tensor, "n c h w"]:
    """DDIM (eta = 0) to ancestral DDPM (eta = 1), in EDM's frame; one network call a step.

    Song et al. 2021, Eq. 12 and 16, divided by alpha: from s to s' the noise put back has standard
    deviation sigma_up = eta * (s' / s) * sqrt(s^2 - s'^2), and the rest, sigma_down, keeps the
    total at s'. At eta = 0 this is Euler's method on EDM's ODE. Raises `ReproError` for eta above 1,
    where the noise put back can exceed s'.
    """
    if eta > 1:
        raise ReproError(f"eta must lie in [0, 1], got {eta}")
    _check(sigmas, eta, fresh_noise)
    x, sigmas = x.double(), sigmas.double()
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        D_x = denoise(x, sigma)
        sigma_up = eta * (sigma_next / sigma) * (sigma**2 - sigma_next**2).clamp(min=0).sqrt()
        sigma_down = (sigma_next**2 - sigma_up**2).clamp(min=0).sqrt()
        x = D_x + sigma_down * (x - D_x) / sigma
        if eta > 0 and sigma_next > 0:
            x = x + sigma_up * fresh_noise().to(x)
    return x


def _check(sigmas: Tensor, stochastic: float, fresh_noise: FreshNoise | None) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] != 0 or (sigmas.diff() > 0).any() or sigmas[-2] <= 0:
        raise ReproError("sigmas must descend and end in a single 0")
    if stochastic < 0:
        raise ReproError(f"churn and eta must not be negative, got {stochastic}")
    if stochastic > 0 and fresh_noise is None:
        raise ReproError("a stochastic sampler needs fresh_noise")

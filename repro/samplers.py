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


def euler_maruyama(
    denoise: Denoise,
    x: Float[Tensor, "n c h w"],
    sigmas: Float[Tensor, " steps_and_zero"],
    fresh_noise: FreshNoise,
) -> Float[Tensor, "n c h w"]:
    """Euler-Maruyama on the reverse VP SDE (Song et al. 2021b, Eq. 6 and 11); one network call a step.

    What is discretised is dz = -beta/2 z dt + sqrt(beta) dw of the VP state z = alpha * x, as U-ViT does
    (Bao et al. 2022, EM-1000), alpha = 1 / sqrt(1 + sigma^2). Backwards, with the score of z,
    -(z - alpha D) / (1 - alpha^2), a step is

        z' = (1 + b / 2) z - b (z - alpha D) / (1 - alpha^2) + sqrt(b) n,
        b = ln((1 + s^2) / (1 + s'^2)) = 2 ln(alpha' / alpha),

    and the last one, to 0, adds no noise. b is beta integrated over the step, exactly: a grid of sigmas says
    no more. U-ViT's own steps take beta at the noisy end times the length, which differs by O(length^2).

    Euler-Maruyama depends on the variable: in x itself, where the SDE has no linear drift, a step would be
    D + (s'/s)^2 (x - D) + sqrt(s^2 - s'^2) n. All of these, and `ancestral` with eta = 1, agree in the limit
    of small b, and err by O(b) in mean and variance. It needs many steps: where noise dominates, z' is
    (1 - b / 2) z + sqrt(b) n, which grows for b > 4; the first of all 1000 steps of `cosine_vp` has b = 6.9.
    A network does not answer so far out as the score would: there D must be clipped (`guidance.clip`).
    """
    _check(sigmas, 0.0, fresh_noise)
    x, sigmas = x.double(), sigmas.double()
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        D_x = denoise(x, sigma)
        beta = (sigma**2).log1p() - (sigma_next**2).log1p()
        # the step of z, divided by alpha; then x' = z' / alpha'
        x = (1 + beta / 2) * x - beta * (1 + sigma**-2) * (x - D_x)
        x = (-beta / 2).exp() * x
        if sigma_next > 0:
            x = x + (beta * (1 + sigma_next**2)).sqrt() * fresh_noise().to(x)
    return x


def dpm_solver(
    denoise: Denoise,
    x: Float[Tensor, "n c h w"],
    sigmas: Float[Tensor, " steps_and_zero"],
    order: int = 2,
    multistep: bool = False,
) -> Float[Tensor, "n c h w"]:
    """DPM-Solver of order 1, 2 or 3; in EDM's frame, where alpha is 1 and lambda = -ln(sigma).

    Singlestep (Lu et al. 2022, Algorithms 1 and 2, and Eq. 3.7; noise prediction): `order` network
    calls a step, all between its two noise levels. Multistep (Lu et al. 2022b, DPM-Solver++, Algorithm 2
    and Appendix A; data prediction): one call a step, the others taken from the steps before, so the first
    steps are of lower order. The last step, to sigma = 0 where lambda is infinite, is of order 1 in both.
    Order 1 is DDIM. Singlestep asks between the grid's levels, where a network of counted timesteps is told
    the nearest one. Raises `ReproError` for another order.
    """
    if order not in (1, 2, 3):
        raise ReproError(f"dpm_solver has the orders 1, 2 and 3, not {order}")
    _check(sigmas, 0.0, None)
    x, sigmas = x.double(), sigmas.double()
    earlier: list[tuple[Tensor, Tensor]] = []  # sigma and D_x of the steps before, the last one first
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        if sigma_next == sigma:  # a level visited twice: no step
            continue
        D_x = denoise(x, sigma)
        if sigma_next == 0:
            return D_x.double()
        if multistep:
            earlier = [(sigma, D_x.double()), *earlier][:order]
            x = _multistep(x, earlier, sigma_next)
        else:
            x = _singlestep(denoise, x, (x - D_x) / sigma, sigma, sigma_next, order)
    return x


def _singlestep(
    denoise: Denoise, x: Tensor, noise: Tensor, sigma: Tensor, sigma_next: Tensor, order: int
) -> Tensor:
    """One step from x at sigma, where `noise` is predicted. sigma_t (e^h - 1) is sigma - sigma_t here."""
    h = (sigma / sigma_next).log()

    def predicted(x: Tensor, at: Tensor) -> Tensor:
        return (x - denoise(x, at)) / at

    if order == 1:
        return x + (sigma_next - sigma) * noise
    if order == 2:
        middle = sigma * (-h / 2).exp()
        return x + (sigma_next - sigma) * predicted(x + (middle - sigma) * noise, middle)
    first, second = sigma * (-h / 3).exp(), sigma * (-2 * h / 3).exp()
    change = predicted(x + (first - sigma) * noise, first) - noise
    # phi_2: (e^h - 1) / h - 1, times sigma at the end of the part stepped over
    phi = (sigma - second) / (2 * h / 3) - second
    at_second = x + (second - sigma) * noise - 2 * phi * change
    change = predicted(at_second, second) - noise
    phi = (sigma - sigma_next) / h - sigma_next
    return x + (sigma_next - sigma) * noise - 1.5 * phi * change


def _multistep(x: Tensor, earlier: list[tuple[Tensor, Tensor]], sigma_next: Tensor) -> Tensor:
    """One step to sigma_next from (sigma, D_x) here and at up to two steps before.

    D over lambda is taken as the parabola through the three, D + slope * u + bend * u^2 with u in units of
    h, which the exact solution integrates. DPM-Solver's own code, and diffusers', have half of the last term:
    that makes their third-order step one of order 2 (tests/test_samplers.py measures it).
    """
    sigma, D_x = earlier[0]
    h = (sigma / sigma_next).log()
    shrunk = sigma_next / sigma  # e^-h
    x = shrunk * x + (1 - shrunk) * D_x
    if len(earlier) == 1:
        return x
    # divided differences of D over lambda, in units of h
    gaps = [(after / at).log() / h for (after, _), (at, _) in zip(earlier[1:], earlier[:-1], strict=True)]
    slopes = [
        (D_at - D_before) / gap
        for (_, D_at), (_, D_before), gap in zip(earlier[:-1], earlier[1:], gaps, strict=True)
    ]
    if len(earlier) == 2:
        return x + (1 - shrunk) / 2 * slopes[0]
    bend = (slopes[0] - slopes[1]) / (gaps[0] + gaps[1])
    slope = slopes[0] + gaps[0] * bend
    return x + ((shrunk - 1) / h + 1) * slope - 2 * ((shrunk - 1 + h) / h**2 - 0.5) * bend


def _check(sigmas: Tensor, stochastic: float, fresh_noise: FreshNoise | None) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] != 0 or (sigmas.diff() > 0).any() or sigmas[-2] <= 0:
        raise ReproError("sigmas must descend and end in a single 0")
    if stochastic < 0:
        raise ReproError(f"churn and eta must not be negative, got {stochastic}")
    if stochastic > 0 and fresh_noise is None:
        raise ReproError("a stochastic sampler needs fresh_noise")

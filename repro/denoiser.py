"""A network, its noise levels and what it predicts, joined into one denoiser D(x, sigma).

Everything meets here: D returns the clean image whatever the network predicts, so samplers and
guidance never know the target, and one loss serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repro import schedules, weights
from repro.files import ReproError


@dataclass(frozen=True)
class Parameterization:
    """What the network predicts: D = c_skip * x + c_out * F(c_in * x), F trained towards F*.

    With x = y + sigma * n the target is linear, F* = on_y * y + on_noise * n, which avoids the
    cancellation of (y - c_skip * x) / c_out at large sigma. All four targets have
    c_out^2 = 1 / (a * SNR + b), which gives every loss weight its limits (see `network_weight`).
    """

    name: str
    a: float
    b: float
    coefficients: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """sigma -> (c_skip, c_out, c_in)."""
    target: Callable[[Tensor], tuple[Tensor, Tensor]]
    """sigma -> (on_y, on_noise)."""

    def inverse_c_out2(self, snr: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """1 / c_out^2 as a function of SNR: the x0-space weight of an unweighted network loss."""
        return self.a * snr + self.b if self.a else torch.full_like(snr, self.b)  # 0 * infinity is NaN

    def network_weight(self, weight: weights.Weight, sigma: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """The weight on ||F - F*||^2 that means weight(SNR) on ||D - y||^2: w * c_out^2, float32.

        sigma in [0, infinity], both ends included. SNR is kept within [1e-100, 1e100] in float64, so
        that a quotient such as min(SNR, gamma) / SNR reaches its limit at either end instead of 0/0;
        limits that are 0 or infinite become so when rounded to float32.
        """
        snr = (1 / sigma.double() ** 2).clamp(1e-100, 1e100)
        return (weight(snr) / self.inverse_c_out2(snr)).float()


def _vp_c_in(sigma: Tensor) -> Tensor:
    return 1 / (1 + sigma**2).sqrt()


X0 = Parameterization(
    "x0",
    a=0.0,
    b=1.0,
    coefficients=lambda s: (torch.zeros_like(s), torch.ones_like(s), _vp_c_in(s)),
    target=lambda s: (torch.ones_like(s), torch.zeros_like(s)),
)
"""The network predicts the clean image: D = F."""

EPS = Parameterization(
    "eps",
    a=1.0,
    b=0.0,
    coefficients=lambda s: (torch.ones_like(s), -s, _vp_c_in(s)),
    target=lambda s: (torch.zeros_like(s), torch.ones_like(s)),
)
"""The network predicts the noise: D = x - sigma * F (supplement, section 2)."""

V = Parameterization(
    "v",
    a=1.0,
    b=1.0,
    coefficients=lambda s: (_vp_c_in(s) ** 2, -s * _vp_c_in(s), _vp_c_in(s)),
    target=lambda s: (-s * _vp_c_in(s), _vp_c_in(s)),
)
"""The network predicts v = alpha * eps - sigma_vp * x0 (Salimans and Ho 2022; supplement, section 2)."""


def edm(sigma_data: float = 0.5) -> Parameterization:
    """EDM's preconditioning (Karras et al. 2022, Table 1) for data of standard deviation `sigma_data`."""
    if sigma_data <= 0:
        raise ReproError(f"sigma_data must be positive, not {sigma_data}")

    def coefficients(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s**2 + sigma_data**2
        return sigma_data**2 / total, s * sigma_data / total.sqrt(), 1 / total.sqrt()

    def target(s: Tensor) -> tuple[Tensor, Tensor]:
        root = (s**2 + sigma_data**2).sqrt()
        return s / (sigma_data * root), -sigma_data / root

    return Parameterization("edm", a=1.0, b=1 / sigma_data**2, coefficients=coefficients, target=target)


def parameterization(name: str, sigma_data: float = 0.5) -> Parameterization:
    """The parameterization of that name: x0, eps, v or edm. Raises `ReproError` for any other."""
    known = {"x0": X0, "eps": EPS, "v": V, "edm": edm(sigma_data)}
    if name not in known:
        raise ReproError(f"unknown parameterization {name!r}; known are {', '.join(known)}")
    return known[name]


class Denoiser(nn.Module):
    """`net` as a denoiser: D(x, sigma, labels) estimates y from x = y + sigma * n.

    net: called as net(c_in * x, time, labels) with x [n, c, h, w], time [n] as the schedule tells it,
    labels [n] or none.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: schedules.DiscreteVP | schedules.EDM,
        parameterization: Parameterization,
    ):
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.parameterization = parameterization

    def with_net(self, net: nn.Module) -> Denoiser:
        """The same with another network."""
        return Denoiser(net, self.schedule, self.parameterization)

    def forward(
        self,
        x: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " *n"],
        labels: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n c h w"]:
        """The estimated clean image, in the precision of `x`. sigma > 0: one number, or one per image."""
        sigma = sigma.to(x.device, torch.float64).expand(len(x))
        c_skip, c_out, c_in = (_per_image(c, x.dtype) for c in self.parameterization.coefficients(sigma))
        F_x = self.net((c_in * x).float(), self.schedule.network_time(sigma), labels)
        return c_skip * x + c_out * F_x.to(x.dtype)

    def loss(
        self,
        y: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, " n"] | None,
        weight: weights.Weight,
    ) -> Float[Tensor, " n"]:
        """weight(SNR) * mean((D - y)^2) for each image, formed in network space without cancellation."""
        sigma = sigma.double()
        c_in = _per_image(self.parameterization.coefficients(sigma)[2], y.dtype)
        on_y, on_noise = (_per_image(c, y.dtype) for c in self.parameterization.target(sigma))
        x = y + _per_image(sigma, y.dtype) * noise
        F_x = self.net((c_in * x).float(), self.schedule.network_time(sigma), labels).to(y.dtype)
        error = (F_x - on_y * y - on_noise * noise).square().mean(dim=(1, 2, 3))
        return self.parameterization.network_weight(weight, sigma).to(y.dtype) * error


def _per_image(values: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n 1 1 1"]:
    return values.to(dtype)[:, None, None, None]

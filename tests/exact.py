"""Data whose denoiser is known in closed form: the oracle that the tests compare the package with.

Nothing here imports repro: each formula is derived from the definition x = y + sigma * n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor, nn


def per_image(values: Tensor) -> Tensor:
    """[n] or [] -> [n or 1, 1, 1, 1]."""
    return values.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Gaussian:
    """Every pixel is drawn from N(mean, std^2), independently."""

    mean: float = 0.3
    std: float = 0.5

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[y | x]: y and x are jointly normal, Cov(y, x) = std^2, Var(x) = std^2 + sigma^2."""
        sigma = per_image(sigma.to(x.dtype))
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the probability-flow ODE dx/dsigma = (x - D) / sigma takes x from sigma = start to end.

        (x - D) / sigma = sigma (x - mean) / (std^2 + sigma^2), so (x - mean) / sqrt(std^2 + sigma^2)
        is constant.
        """
        ratio = math.sqrt((self.std**2 + end**2) / (self.std**2 + start**2))
        return self.mean + ratio * (x - self.mean)


@dataclass(frozen=True)
class Mixture:
    """Every pixel is drawn from a mixture of N(means[k], stds[k]^2) with the given shares, independently.

    As labelled data, class k is component k, and the null class is the whole mixture.
    """

    means: tuple[float, ...] = (-0.6, 0.4, 0.8)
    stds: tuple[float, ...] = (0.15, 0.1, 0.3)
    shares: tuple[float, ...] = (0.5, 0.3, 0.2)

    @property
    def null_label(self) -> int:
        return len(self.means)

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln p(x; sigma) of each pixel: each component is widened to std_k^2 + sigma^2."""
        return self._joint(x, sigma).logsumexp(-1)

    def _joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        means, stds, shares = (torch.tensor(v, dtype=x.dtype) for v in (self.means, self.stds, self.shares))
        spread = torch.sqrt(stds**2 + per_image(sigma.to(x.dtype))[..., None] ** 2)
        return torch.distributions.Normal(means, spread).log_prob(x[..., None]) + shares.log()

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[y | x, label]: the components' posterior means, weighed by what x says about the component."""
        each = torch.stack(
            [Gaussian(m, s).denoise(x, sigma) for m, s in zip(self.means, self.stds, strict=True)], dim=-1
        )
        whole = (self._joint(x, sigma).softmax(-1) * each).sum(-1)
        if labels is None:
            return whole
        return torch.stack([torch.cat([each, whole[..., None]], -1)[i, ..., k] for i, k in enumerate(labels)])

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """The flow of one pixel keeps the order of pixels, so it keeps their quantiles."""

        def cdf(value: float, sigma: float) -> float:
            # both tails at once: the difference keeps its digits where either is near 0
            scale = np.hypot(self.stds, sigma)
            z = (value - np.array(self.means)) / scale
            return float(np.dot(self.shares, stats.norm.cdf(z) - stats.norm.sf(z)))

        moved = [
            optimize.brentq(lambda y, v=v: cdf(y, end) - cdf(v, start), -20, 20, xtol=1e-15, rtol=1e-14)
            for v in x.flatten().tolist()
        ]
        return torch.tensor(moved, dtype=x.dtype).view_as(x)


class ExactNet(nn.Module):
    """The best network for `data`: from what it is given, what it should predict, in float64.

    It knows the noise level only as the network would: by its time, a row of `sigmas` (a VP schedule)
    or ln(sigma) / 4 (EDM's). `predicts` is x0, eps, v or edm. `calls` lists the batch sizes it was
    called with, `dtypes` the precisions of its input.
    """

    def __init__(
        self, data: Gaussian | Mixture, predicts: str, sigmas: Tensor | None = None, sigma_data: float = 0.5
    ):
        super().__init__()
        self.data, self.predicts, self.sigmas, self.sigma_data = data, predicts, sigmas, sigma_data
        self.classes = data.null_label if isinstance(data, Mixture) else 0
        self.null_class = True
        self.calls: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append(len(x))
        self.dtypes.add(x.dtype)
        sigma = (4 * t.double()).exp() if self.sigmas is None else self.sigmas[t.long()]
        s = per_image(sigma)
        # a VP network is given x_t = alpha * x with alpha^2 + (alpha * sigma)^2 = 1, EDM's a unit variance
        scale = torch.sqrt(s**2 + (self.sigma_data**2 if self.predicts == "edm" else 1))
        x = x.double() * scale
        y = self.data.denoise(x, sigma, labels)
        noise = (x - y) / s
        if self.predicts == "x0":
            return y
        if self.predicts == "eps":
            return noise
        if self.predicts == "v":  # alpha * eps - (alpha * sigma) * x0
            return (noise - s * y) / scale
        # Karras et al. 2022, Eq. 8: (y - c_skip x) / c_out
        c_skip, c_out = self.sigma_data**2 / scale**2, s * self.sigma_data / scale
        return (y - c_skip * x) / c_out

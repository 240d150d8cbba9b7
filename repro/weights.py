"""Loss weights: functions of SNR = 1 / sigma^2 that multiply ||D - y||^2 (x0-space).

What a weight is for a network that predicts something else follows from the parameterization
(`Parameterization.network_weight`); there is no second formula. Every function takes SNR > 0 of any
shape and returns the same shape; a user's own weight is any such function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from repro import config, schedules
from repro.files import ReproError

if TYPE_CHECKING:
    from repro.denoiser import Parameterization

Weight = Callable[[Tensor], Tensor]


def constant(snr: Float[Tensor, " *n"], parameterization: Parameterization) -> Float[Tensor, " *n"]:
    """1 in the network's own space: 1 for x0, SNR for eps, SNR + 1 for v (supplement, section 2)."""
    return parameterization.inverse_c_out2(snr)


def snr(snr: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
    """SNR: the unweighted eps loss (Ho et al. 2020), in x0-space."""
    return snr


def truncated_snr(snr: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
    """max(SNR, 1) (Salimans and Ho 2022)."""
    return snr.clamp(min=1)


def min_snr(snr: Float[Tensor, " *n"], gamma: float = 5.0) -> Float[Tensor, " *n"]:
    """min(SNR, gamma): the paper's weight, with gamma = 5."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Float[Tensor, " *n"], gamma: float = 5.0) -> Float[Tensor, " *n"]:
    """SNR * gamma / (SNR + gamma) (Crowson et al. 2024), half the harmonic mean of SNR and gamma."""
    return gamma / (1 + gamma / snr)


def p2(snr: Float[Tensor, " *n"], gamma: float = 1.0, k: float = 1.0) -> Float[Tensor, " *n"]:
    """SNR / (k + SNR)^gamma: 1 / (k + SNR)^gamma in eps-space (Choi et al. 2022)."""
    return (k + snr) ** (1 - gamma) / (1 + k / snr)  # neither factor is 0 * infinity at either end


def edm(snr: Float[Tensor, " *n"], sigma_data: float = 0.5) -> Float[Tensor, " *n"]:
    """SNR + 1 / sigma_data^2 = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2 (Karras et al. 2022)."""
    return snr + 1 / sigma_data**2


def min_snr_factor(snr: Float[Tensor, " *n"], gamma: float = 5.0) -> Float[Tensor, " *n"]:
    """min(SNR, gamma) / SNR = min(1, gamma / SNR), in [0, 1]: 1 at SNR = 0, 0 at infinity. gamma > 0.

    No weight but a factor for one: with it the supplement multiplies EDM's loss (section 4.1.1), with gamma
    = 5. It does not say whether SNR is there that of unit data, 1 / sigma^2, as everywhere in this package,
    or that of EDM's data, sigma_data^2 / sigma^2 = sigma_data^2 * SNR. Under the second reading the factor is
    min(1, gamma / (sigma_data^2 * SNR)): the first one's with gamma / sigma_data^2, which is 20 for gamma = 5
    and sigma_data = 1/2. So a run with gamma = 20 is the other reading.
    """
    return (gamma / snr).clamp(max=1)


@dataclass(eq=False)
class Table:
    """A weight that is one number in each bin of noise levels; training may change the numbers in place.

    edges: ascending sigmas between the bins, float64, one fewer than bins. values: one a bin, from the lowest
    noise to the highest, at least 0, float64.
    """

    edges: Float[Tensor, " edges"]
    values: Float[Tensor, " bins"]

    def __call__(self, snr: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """The number of the bin in which sigma = 1 / sqrt(SNR) lies, in the type of `snr`."""
        bins = torch.bucketize(1 / snr.double().sqrt(), self.edges, right=True)
        return self.values[bins].to(snr.dtype)

    def to(self, device: str | torch.device) -> Table:
        """The same on a device."""
        return Table(self.edges.to(device), self.values.to(device))


def table(schedule: schedules.DiscreteVP | schedules.EDM, bins: int) -> Table:
    """A `Table` of ones, whose bins hold noise levels that are trained equally often. bins at least 1."""
    firsts = schedule.draw(torch.arange(1, bins, dtype=torch.float64) / bins)
    edges = firsts * (1 - 1e-6)  # a bin's first level lies within it, also by an SNR in float32
    return Table(edges, torch.ones(bins, dtype=torch.float64))


UGD = ("bins", "every_images", "probe_images")
"""Options that the weight `ugd` needs; it may have a `ridge` too."""


def from_config(weight: config.Weight, parameterization: Parameterization, sigma_data: float = 0.5) -> Weight:
    """The weight that a configuration names, as a function of SNR alone.

    Raises `ReproError` for an option that the weight does not have, and for a gamma or k that is not
    positive and finite: a number that is silently ignored would make two runs look different that are not.
    """
    takes = {
        "min_snr": ("gamma",),
        "soft_min_snr": ("gamma",),
        "p2": ("gamma", "k"),
        "ugd": (*UGD, "ridge"),
    }.get(weight.name, ())
    options = ("gamma", "k", *UGD, "ridge")
    given = {key: value for key in options if (value := getattr(weight, key)) is not None}
    for key, value in given.items():
        if key not in takes:
            raise ReproError(f"the weight {weight.name!r} has no {key}; leave it out")
        if not 0 < value < math.inf:
            raise ReproError(f"{key} of the weight {weight.name!r} must be positive and finite, not {value}")
    if weight.name == "ugd":
        raise ReproError("the weight 'ugd' follows from gradients while a network is trained: use of_run")
    if weight.name == "constant":
        return partial(constant, parameterization=parameterization)
    if weight.name == "edm":
        return partial(edm, sigma_data=sigma_data)
    functions = {"snr": snr, "truncated_snr": truncated_snr, "min_snr": min_snr,
                 "soft_min_snr": soft_min_snr, "p2": p2}  # fmt: skip
    return partial(functions[weight.name], **given)


def of_run(run: config.Config, parameterization: Parameterization) -> Weight:
    """The loss weight of a run: its `weight`, times `min_snr_factor` where it has one, a function of SNR.

    parameterization: the run's, for the weight that is constant in the network's space. SNR in [0, infinity],
    limits included, any float type, which is kept. `ugd` is a `Table` of ones, for training to change.
    Raises `ReproError` as `from_config` does, and for a `ugd` without one of its options, or with the factor.
    """
    if run.weight.name == "ugd":
        if missing := [o for o in UGD if getattr(run.weight, o) is None]:
            raise ReproError(f"the weight 'ugd' needs {', '.join(missing)}")
        if run.weight.gamma is not None or run.weight.k is not None or run.min_snr_factor is not None:
            raise ReproError("the weight 'ugd' has no gamma, k or min_snr_factor; leave them out")
        if run.weight.ridge is not None and not 0 < run.weight.ridge < math.inf:
            raise ReproError(f"ridge of the weight 'ugd' must be positive and finite, not {run.weight.ridge}")
        return table(schedules.from_config(run.schedule), run.weight.bins)
    weight, gamma = from_config(run.weight, parameterization, run.sigma_data), run.min_snr_factor
    if gamma is None:
        return weight

    def product(snr: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        finite = snr.double().clamp(max=1e100)  # at infinity one may be infinite and the other 0
        return (weight(finite) * min_snr_factor(finite, gamma)).to(snr.dtype)

    return product

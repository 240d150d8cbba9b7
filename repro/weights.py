"""Loss weights: functions of SNR = 1 / sigma^2 that multiply ||D - y||^2 (x0-space).

What a weight is for a network that predicts something else follows from the parameterization
(`Parameterization.network_weight`); there is no second formula. Every function takes SNR > 0 of any
shape and returns the same shape; a user's own weight is any such function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from repro import config
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


def from_config(weight: config.Weight, parameterization: Parameterization, sigma_data: float = 0.5) -> Weight:
    """The weight that a configuration names, as a function of SNR alone.

    Raises `ReproError` for an option that the weight does not have, and for a gamma or k that is not
    positive and finite: a number that is silently ignored would make two runs look different that are not.
    """
    takes = {"min_snr": ("gamma",), "soft_min_snr": ("gamma",), "p2": ("gamma", "k")}.get(weight.name, ())
    given = {key: value for key in ("gamma", "k") if (value := getattr(weight, key)) is not None}
    for key, value in given.items():
        if key not in takes:
            raise ReproError(f"the weight {weight.name!r} has no {key}; leave it out")
        if not 0 < value < math.inf:
            raise ReproError(f"{key} of the weight {weight.name!r} must be positive and finite, not {value}")
    if weight.name == "constant":
        return partial(constant, parameterization=parameterization)
    if weight.name == "edm":
        return partial(edm, sigma_data=sigma_data)
    functions = {"snr": snr, "truncated_snr": truncated_snr, "min_snr": min_snr,
                 "soft_min_snr": soft_min_snr, "p2": p2}  # fmt: skip
    return partial(functions[weight.name], **given)

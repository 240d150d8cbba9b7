"""Noise levels: the trained ones (a schedule) and the visited ones (a step grid).

Everything is in EDM's frame, x = y + sigma * n, so SNR = 1 / sigma^2 and a VP schedule's
alpha = 1 / sqrt(1 + sigma^2).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repro import config
from repro.files import ReproError


@dataclass(frozen=True, eq=False)
class DiscreteVP:
    """A finite set of trained noise levels, drawn uniformly; the network is told the index.

    `sigmas`: [T], ascending, float64, positive and finite.
    """

    sigmas: Float[Tensor, " T"]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        sigmas = self.sigmas
        if not (torch.isfinite(sigmas).all() and (sigmas > 0).all() and (sigmas.diff() > 0).all()):
            raise ReproError("the sigmas of a schedule must be positive, finite and ascending")

    @property
    def sigma_min(self) -> float:
        """The smallest trained noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The largest trained noise level."""
        return float(self.sigmas[-1])

    def _on(self, device: torch.device) -> Float[Tensor, " T"]:
        """The table on a device: copied there once, since each copy waits for the GPU."""
        if device not in self._copies:
            self._copies[device] = self.sigmas.to(device)
        return self._copies[device]

    def nearest(self, sigma: Float[Tensor, " *n"]) -> Int[Tensor, " *n"]:
        """Index in [0, T) of the trained noise level closest to each sigma (in absolute distance)."""
        table = self._on(sigma.device)
        wanted = sigma.to(table.dtype).contiguous()
        above = torch.searchsorted(table, wanted).clamp(max=len(table) - 1)
        below = (above - 1).clamp(min=0)
        return torch.where(wanted - table[below] <= table[above] - wanted, below, above)

    def round(self, sigma: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """The trained noise level closest to each sigma, float64."""
        return self._on(sigma.device)[self.nearest(sigma)]

    def network_time(self, sigma: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """What the network is told: the timestep's index, as float32."""
        return self.nearest(sigma).float()

    def draw(self, uniform: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """Training noise levels from numbers uniform in [0, 1): each trained sigma equally often."""
        index = (uniform.double() * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        return self._on(uniform.device)[index]


@dataclass(frozen=True)
class EDM:
    """EDM's training distribution, ln sigma ~ N(P_mean, P_std^2); every noise level is trained.

    Karras et al. 2022, Table 1. The network is told ln(sigma) / 4.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def round(self, sigma: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """Sigma itself, float64: every noise level is trained."""
        return sigma.double()

    def network_time(self, sigma: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """What the network is told, c_noise = ln(sigma) / 4, as float32."""
        return (sigma.double().log() / 4).float()

    def draw(self, uniform: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """Training noise levels from numbers uniform in [0, 1), by the inverse normal distribution."""
        inside = uniform.double().clamp(1e-9, 1 - 1e-9)
        return (self.P_mean + self.P_std * torch.special.ndtri(inside)).exp()


def _from_alpha_bar(alpha_bar: Float[Tensor, " T"]) -> DiscreteVP:
    # SNR = alpha_bar / (1 - alpha_bar) and SNR = 1 / sigma^2
    return DiscreteVP(((1 - alpha_bar) / alpha_bar).sqrt())


def cosine_vp(steps: int = 1000, offset: float = 0.008, largest_beta: float = 0.999) -> DiscreteVP:
    """The cosine schedule of Nichol and Dhariwal 2021 (Eq. 17), with beta clipped at `largest_beta`."""

    def alpha_bar(t: Tensor) -> Tensor:
        return ((t + offset) / (1 + offset) * math.pi / 2).cos() ** 2

    edges = alpha_bar(torch.arange(steps + 1, dtype=torch.float64) / steps)
    betas = (1 - edges[1:] / edges[:-1]).clamp(max=largest_beta)
    return _from_alpha_bar((1 - betas).cumprod(0))


def linear_vp(steps: int = 1000, first_beta: float = 1e-4, last_beta: float = 0.02) -> DiscreteVP:
    """The linear schedule of Ho et al. 2020, its betas scaled by 1000 / steps."""
    betas = torch.linspace(first_beta, last_beta, steps, dtype=torch.float64) * (1000 / steps)
    if betas[-1] >= 1:
        raise ReproError(f"linear_vp of {steps} steps has a beta of {float(betas[-1]):.2f}; use more steps")
    return _from_alpha_bar((1 - betas).cumprod(0))


def from_config(schedule: config.Schedule) -> DiscreteVP | EDM:
    """The schedule that a configuration names."""
    if schedule.name == "edm":
        return EDM(schedule.P_mean, schedule.P_std)
    return {"cosine_vp": cosine_vp, "linear_vp": linear_vp}[schedule.name](schedule.steps)


def karras_grid(
    sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0
) -> Float[Tensor, " steps_and_zero"]:
    """EDM's grid (Karras et al. 2022, Eq. 5): [steps + 1] float64, sigma_max down to sigma_min, then 0."""
    if steps < 2 or not 0 < sigma_min < sigma_max:
        raise ReproError(f"need steps >= 2, 0 < sigma_min < sigma_max; got {steps}, {sigma_min}, {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    grid = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([grid, grid.new_zeros(1)])


def spaced_timesteps(timesteps: int, sections: tuple[int, ...]) -> Int[Tensor, " steps"]:
    """Which of the timesteps 0 ... `timesteps` - 1 are visited: ascending, evenly spaced in each section.

    `sections` are the numbers visited in each of equal sections, least noise first, at least 2: the first and
    last timestep of a section always are. This is ADM's respacing, `space_timesteps` of its code
    (openai/guided-diffusion): where sections cannot be equal, the first ones are longer by one; positions are
    added up from a section's start and rounded, halves to even. One section is the spacing of Nichol and
    Dhariwal 2021, section 4. Of five, (90, 60, 60, 20, 20) are the best for LSUN in Dhariwal and Nichol 2021,
    Table 15, which also knows sections without a step. Raises `ReproError` for fewer than 2 steps in a
    section, or more than it has timesteps.

    The supplement (4.5) says that "iDDPM even adopts a two-stage non-uniform sampling", and neither where it
    says so nor how many steps each stage has; its code's README has one section. Two are our reading.
    """
    if not sections or min(sections) < 2:
        raise ReproError(f"a section of timesteps needs at least 2 steps; got {sections}")
    length, longer = divmod(timesteps, len(sections))
    visited, first = [], 0
    for i, steps in enumerate(sections):
        size = length + (i < longer)
        if steps > size:
            raise ReproError(f"a section of {size} of the {timesteps} timesteps cannot have {steps} steps")
        stride = (size - 1) / (steps - 1)
        # added up, not multiplied: rounding errors decide some halves, as they do in ADM's
        positions = itertools.accumulate(itertools.repeat(stride, steps - 1), initial=0.0)
        visited += [first + round(position) for position in positions]
        first += size
    return torch.tensor(visited)


def uniform_grid(schedule: DiscreteVP | EDM, sections: tuple[int, ...]) -> Float[Tensor, " steps_and_zero"]:
    """Noise levels at evenly spaced timesteps (see `spaced_timesteps`): [sum(sections) + 1] float64.

    From the largest trained level down to the smallest, all of them trained ones, then 0. Raises `ReproError`
    for a schedule that has no timesteps.
    """
    if not isinstance(schedule, DiscreteVP):
        raise ReproError("the uniform grid needs a schedule of counted steps, not edm; use the grid karras")
    visited = schedule.sigmas[spaced_timesteps(len(schedule.sigmas), sections)]
    return torch.cat([visited.flip(0), visited.new_zeros(1)])


def grid_for(schedule: DiscreteVP | EDM, sample: config.Sample) -> Float[Tensor, " steps_and_zero"]:
    """The noise levels a sampler visits, trained ones, and 0: those of `uniform_grid`, or of EDM's grid.

    EDM's grid is kept within the trained range, and each level rounded to a trained one, as the released code
    of the paper does: sigma_min = max(0.002, smallest trained), sigma_max = min(80, largest trained). Levels
    of a fine grid rounded to the same one are visited once, so there can be fewer than `sample.steps`.
    """
    if sample.grid == "uniform":
        return uniform_grid(schedule, sample.grid_sections or (sample.steps,))
    grid = karras_grid(
        max(sample.sigma_min, schedule.sigma_min),
        min(sample.sigma_max, schedule.sigma_max),
        sample.steps,
        sample.rho,
    )
    return torch.cat([schedule.round(grid[:-1]).unique_consecutive(), grid[-1:]])

"""Guidance: functions that take a denoiser and return a denoiser, so samplers never know.

A denoiser here is anything called as D(x, sigma, labels), such as `repro.denoiser.Denoiser`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repro.files import ReproError

LabelledDenoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def cfg(denoise: LabelledDenoiser, scale: float, null_label: int | None) -> LabelledDenoiser:
    """Classifier-free guidance (Ho and Salimans 2022): D_null + scale * (D_labels - D_null).

    Scale 1 is off and returns `denoise` itself: one network call a step instead of two halves of a
    doubled batch. Scale 0 is the unconditional denoiser. `null_label` is the class that means "no
    label"; without one (an unconditional network) any scale but 1 raises `ReproError`.
    """
    if scale == 1:
        return denoise
    if null_label is None:
        raise ReproError(f"guidance {scale} needs a network with classes and a null class; use guidance 1")

    def guided(
        x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " *n"], labels: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "n c h w"]:
        if labels is None:
            raise ReproError(f"guidance {scale} needs labels")
        both = torch.cat([labels, torch.full_like(labels, null_label)])
        twice = sigma if sigma.ndim == 0 else torch.cat([sigma, sigma])
        D_labels, D_null = denoise(torch.cat([x, x]), twice, both).chunk(2)
        return D_null + scale * (D_labels - D_null)

    return guided


def clip(denoise: LabelledDenoiser) -> LabelledDenoiser:
    """D clipped to [-1, 1], the range of pixels: `clip_denoised` of ADM's code, the default there.

    An epsilon-network's error is multiplied by sigma in D. Schedules of counted steps go up to a sigma of
    20,000 (`cosine_vp` of 1000 steps), where D without this is far outside of what images are.
    """

    def clipped(
        x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " *n"], labels: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "n c h w"]:
        return denoise(x, sigma, labels).clamp(-1, 1)

    return clipped


def classifier(
    denoise: LabelledDenoiser, log_probabilities: Callable[[Tensor, Tensor], Tensor], scale: float
) -> LabelledDenoiser:
    """Guidance by a noisy classifier (Dhariwal and Nichol 2021, Algorithm 2), in EDM's frame.

    The score of x is (D - x) / sigma^2, and guidance adds scale * grad log p(label | x) to it, so it adds
    scale * sigma^2 * grad log p(label | x) to D. `log_probabilities(x, sigma)` is [n, classes], and is
    asked for its gradient by x. With scale 1, an unconditional D and exact probabilities the result is
    the exact conditional D. Scale 0 is off and returns `denoise` itself.
    """
    if scale == 0:
        return denoise

    def guided(
        x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " *n"], labels: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "n c h w"]:
        if labels is None:
            raise ReproError("guidance by a classifier needs labels")
        with torch.inference_mode(False), torch.enable_grad():
            at = x.detach().clone().requires_grad_()
            chosen = log_probabilities(at, sigma).gather(1, labels[:, None])
            (gradient,) = torch.autograd.grad(chosen.sum(), at)
        variance = sigma.to(x).reshape(-1, 1, 1, 1) ** 2
        return denoise(x, sigma, labels) + scale * variance * gradient

    return guided


def below(denoise: LabelledDenoiser, low: LabelledDenoiser, sigma_below: float) -> LabelledDenoiser:
    """`low` where sigma < sigma_below and `denoise` elsewhere: two networks that share the noise levels.

    As the expert denoisers of eDiff-I (Balaji et al. 2022), here to see at which noise levels one network is
    better than the other. sigma must be one number for the whole batch, as samplers give it.
    """
    return interval(low, denoise, 0.0, math.nextafter(sigma_below, 0.0))


def interval(
    inside: LabelledDenoiser, outside: LabelledDenoiser, low: float, high: float
) -> LabelledDenoiser:
    """`inside` where low <= sigma <= high and `outside` elsewhere (Kynkäänniemi et al. 2024).

    With inside = cfg(D, scale, null) and outside = D the second network call is made only within the
    interval. sigma must be one number for the whole batch, as samplers give it.
    """
    if not 0 <= low <= high:
        raise ReproError(f"need 0 <= low <= high; got {low}, {high}")

    def limited(
        x: Float[Tensor, "n c h w"], sigma: Float[Tensor, ""], labels: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "n c h w"]:
        chosen = inside if low <= float(sigma) <= high else outside
        return chosen(x, sigma, labels)

    return limited

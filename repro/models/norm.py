"""Group normalisation together with what stands beside it: scale and shift, SiLU, dropout.

`GroupNorm` computes it plainly in PyTorch, and on a GPU by the kernels of `norm_kernels`: there the
norms of a UNet are bound by memory, and fused they read and write each activation as seldom as
possible (see `paper/bench`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repro.files import ReproError

try:
    from repro.models import norm_kernels
except ImportError:  # no Triton: on macOS and Windows
    norm_kernels = None


class GroupNorm(nn.Module):
    """Group normalisation in float32, and after it, where asked for, scale and shift, SiLU and dropout.

    Equal to `F.group_norm(x + offset, groups, weight, bias, eps) * (1 + scale) + shift`, but formed from
    the first two moments of each channel. In channels-last memory a group is a few adjacent numbers of
    every pixel, and reducing it directly wastes most of each memory access; reducing a channel does not.
    The variance is E[x^2] - E[x]^2 in float32: a group whose mean is 1000 times its standard deviation
    loses all digits. Activations of these networks stay below 10 times.
    """

    fused = True
    """Use the kernels where they can run: in float32 and below, on a GPU. False to compare with."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        if channels % groups:
            raise ReproError(f"{channels} channels cannot be split into {groups} groups of equal size")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        *parts: Float[Tensor, "n _ h w"],
        scale: Float[Tensor, "n c"] | None = None,
        shift: Float[Tensor, "n c"] | None = None,
        offset: Float[Tensor, "*n c"] | None = None,
        silu: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "n c h w"]:
        """The normalised map, in the precision of its parts or in `dtype`.

        parts: the map, or several to be joined along their channels. offset: added first, [c] or [n, c]
        (the bias of the convolution before). scale, shift: multiply by (1 + scale), then add `shift`.
        dropout: probability of setting an element to 0 (the rest is scaled up); the caller knows
        whether it trains.
        """
        if self._can_fuse(parts):
            return self._fused(parts, scale, shift, offset, silu, dropout, dtype or parts[0].dtype)
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        n, c = x.shape[:2]
        wide = x.double() if x.dtype == torch.float64 else x.float()
        if offset is not None:
            wide = wide + offset.to(wide.dtype).expand(n, c)[:, :, None, None]
        by_group = (n, self.groups, c // self.groups)
        first = wide.mean((2, 3)).view(by_group).mean(2)  # n groups
        second = wide.square().mean((2, 3)).view(by_group).mean(2)  # n groups
        rstd = ((second - first.square()).clamp(min=0) + self.eps).rsqrt()
        a = _spread(rstd, c) * self.weight  # n c
        b = self.bias - _spread(first, c) * a  # n c
        if scale is not None:
            a, b = a * (1 + scale.to(a.dtype)), b * (1 + scale.to(a.dtype))
        if shift is not None:
            b = b + shift
        y = (wide * a[:, :, None, None] + b[:, :, None, None]).to(dtype or x.dtype)
        y = F.silu(y) if silu else y
        return F.dropout(y, dropout) if dropout else y

    def beside(
        self, *parts: Float[Tensor, "n _ h w"], silu: bool = False
    ) -> tuple[Float[Tensor, "n c h w"], tuple[Float[Tensor, "n _ h w"], ...]]:
        """The normalised map, and the parts for what runs beside it (a residual connection).

        The same as using the parts again, but their two gradients are then added where the norm's is
        formed, which saves a pass over memory.
        """
        if not self._can_fuse(parts):
            return self(*parts, silu=silu), parts
        y, *parts = self._fused(parts, None, None, None, silu, 0.0, parts[0].dtype, beside=True)
        return y, tuple(parts)

    def _can_fuse(self, parts: tuple[Tensor, ...]) -> bool:
        return self.fused and norm_kernels is not None and norm_kernels.can_take(parts)

    def _fused(self, parts, scale, shift, offset, silu, dropout, dtype, beside=False):
        n, c = len(parts[0]), len(self.weight)
        shapes = {(len(part), *part.shape[2:]) for part in parts}
        if len(shapes) > 1 or sum(part.shape[1] for part in parts) != c:  # kernels would write elsewhere
            given = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ReproError(f"maps of {given} do not join to {c} channels")
        k = torch.ones_like(self.weight).expand(n, c) if scale is None else 1 + scale.float()
        t = torch.zeros_like(k) if shift is None else shift.float()
        o = torch.zeros_like(k) if offset is None else offset.float().expand(n, c)
        seed = torch.randint(2**31 - 1, (1,), device=k.device) if dropout else None
        first, second = parts if len(parts) == 2 else (parts[0], None)
        how = (self.groups, self.eps, silu, dropout, dtype, beside)
        return _FusedGroupNorm.apply(first, second, self.weight, self.bias, k, t, o, seed, how)


class _FusedGroupNorm(torch.autograd.Function):
    """silu(a * x + b) with dropout, where a and b [n, c] follow from the sums of x over the pixels.

    With m = x + o, mean and variance taken over a group, u = weight / sqrt(variance + eps):
    a = u * k and b = (bias - mean * u) * k + t + a * o. With `beside`, also returns
    the parts (see `GroupNorm.beside`).
    """

    @staticmethod
    def forward(ctx, first, second, weight, bias, k, t, o, seed, how):
        groups, eps, silu, dropout, dtype, beside = how
        parts = [part for part in (first, second) if part is not None]
        pixels = first.shape[2] * first.shape[3]
        n, c = k.shape
        sums = [norm_kernels.sums(part) for part in parts]
        sums = (sums[0] if len(sums) == 1 else torch.cat(sums, dim=2)) / pixels  # n 2 c
        m1 = sums[:, 0] + o
        m2 = sums[:, 1] + 2 * o * sums[:, 0] + o.square()
        mean, square = (
            m1.view(n, groups, c // groups).mean(2),
            m2.view(n, groups, c // groups).mean(2),
        )  # n groups
        rstd = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
        u = _spread(rstd, c) * weight
        a = u * k
        b = (bias - _spread(mean, c) * u) * k + t + a * o
        ctx.save_for_backward(first, second, weight, bias, k, o, seed, m1, mean, rstd, a, b)
        ctx.how = how
        y = norm_kernels.apply(first, second, a, b, seed, silu, dropout, dtype)
        # only where they are used: compiled, an unused output's gradient is a map full of zeros
        return (y, *[part.view_as(part) for part in parts]) if beside else y

    @staticmethod
    def backward(ctx, dy, *dbeside):
        first, second, weight, bias, k, o, seed, m1, mean, rstd, a, b = ctx.saved_tensors
        groups, _, silu, dropout, *_ = ctx.how
        parts = [part for part in (first, second) if part is not None]
        pixels = first.shape[2] * first.shape[3]
        n, c = k.shape
        size = c // groups
        dy = dy.contiguous(memory_format=torch.channels_last)
        starts = [0, first.shape[1]][: len(parts)]
        sums = [
            norm_kernels.grad_sums(x, start, a, b, dy, seed, silu, dropout)
            for x, start in zip(parts, starts, strict=True)
        ]
        sums = sums[0] if len(sums) == 1 else torch.cat(sums, dim=2)  # n 2 c
        db, dxb = sums[:, 0], sums[:, 1]  # of z = a * x + b: the sums of dz and of dz * x
        da = dxb + o * db
        wide_mean, wide_rstd = _spread(mean, c), _spread(rstd, c)
        u = wide_rstd * weight
        dk = da * u + db * (bias - wide_mean * u)
        du = (da - db * wide_mean) * k
        dvariance = -0.5 * rstd**3 * (du * weight).view(n, groups, size).sum(2)
        dmean = -(db * u * k).view(n, groups, size).sum(2) - 2 * mean * dvariance
        dm2 = _spread(dvariance, c) / size
        dm1 = _spread(dmean, c) / size
        do = a * db + dm1 + 2 * dm2 * m1
        q = 2 * dm2 / pixels
        p = dm1 / pixels + q * o
        dparts = [
            norm_kernels.grad(x, start, a, b, p, q, dy, beside, seed, silu, dropout)
            for x, start, beside in zip(parts, starts, dbeside or [None] * len(parts), strict=True)
        ]
        dsecond = dparts[1] if len(parts) > 1 else None
        return dparts[0], dsecond, (du * wide_rstd).sum(0), (db * k).sum(0), dk, db, do, None, None


def _spread(values: Tensor, channels: int) -> Tensor:
    """[n, groups] to [n, channels]."""
    n, groups = values.shape
    return values[:, :, None].expand(n, groups, channels // groups).reshape(n, channels)

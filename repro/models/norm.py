"""Group normalisation together with what stands beside it: scale and shift, SiLU, dropout.

`GroupNorm` computes it plainly in PyTorch, and on a GPU by the kernels of `norm_kernels`: there the norms of
a UNet are bound by memory, and fused they read and write each activation as seldom as possible (see
`paper/bench`).
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
        more: tuple[Float[Tensor, "n _ h w"], ...] = (),
    ) -> Float[Tensor, "n c h w"]:
        """The normalised map, in the precision of its parts.

        parts: the map, or several to be joined along their channels. more: up to two maps that are first
        added to the first part, here, since it is read here anyway. offset: added first, [c] or [n, c]
        (the bias of the convolution before). scale, shift: multiply by (1 + scale), then add `shift`.
        dropout: probability of setting an element to 0 (the rest is scaled up); the caller knows
        whether it trains.
        """
        if self._can_fuse(parts, more):
            return self._fused(parts, more, scale, shift, offset, silu, dropout)
        parts = added(parts, more)
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        n, c = x.shape[:2]
        wide = x.double() if x.dtype == torch.float64 else x.float()
        by_group = (n, self.groups, c // self.groups)
        first, second = wide.mean((2, 3)), wide.square().mean((2, 3))  # n c
        if offset is not None:
            o = offset.to(wide.dtype).expand(n, c)
            first, second = first + o, second + 2 * o * first + o.square()
        first, second = first.view(by_group).mean(2), second.view(by_group).mean(2)  # n groups
        rstd = ((second - first.square()).clamp(min=0) + self.eps).rsqrt()
        a = _spread(rstd, c) * self.weight  # n c
        b = self.bias - (_spread(first, c) if offset is None else _spread(first, c) - o) * a  # n c
        if scale is not None:
            a, b = a * (1 + scale.to(a.dtype)), b * (1 + scale.to(a.dtype))
        if shift is not None:
            b = b + shift
        y = (wide * a[:, :, None, None] + b[:, :, None, None]).to(x.dtype)
        y = F.silu(y) if silu else y
        return F.dropout(y, dropout) if dropout else y

    def beside(
        self,
        *parts: Float[Tensor, "n _ h w"],
        offset: Float[Tensor, "*n c"] | None = None,
        silu: bool = False,
        copies: int = 1,
        more: tuple[Float[Tensor, "n _ h w"], ...] = (),
    ) -> tuple[Float[Tensor, "n c h w"], tuple[Float[Tensor, "n _ h w"], ...]]:
        """The normalised map, and the parts for what runs beside it (a residual connection).

        The same as using the parts again, but their two gradients are then added where the norm's is
        formed, which saves a pass over memory. copies: 2 gives a single part twice, for two uses. more: as in
        `forward`; the first part is given with them.
        """
        if copies > 1 and len(parts) > 1:
            raise ReproError("only a single part can be given twice")
        if not self._can_fuse(parts, more):
            parts = added(parts, more)
            return self(*parts, offset=offset, silu=silu), parts * copies
        y, *parts = self._fused(parts, more, None, None, offset, silu, 0.0, copies)
        return y, tuple(parts)

    def _can_fuse(self, parts: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> bool:
        return (
            self.fused
            and norm_kernels is not None
            and len(more) <= 2
            and all((one.shape, one.dtype) == (parts[0].shape, parts[0].dtype) for one in more)
            and norm_kernels.can_take(parts)
        )

    def _fused(self, parts, more, scale, shift, offset, silu, dropout, copies=0):
        n, c = len(parts[0]), len(self.weight)
        shapes = {(len(part), *part.shape[2:]) for part in parts}
        if len(shapes) > 1 or sum(part.shape[1] for part in parts) != c:  # kernels would write elsewhere
            given = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ReproError(f"maps of {given} do not join to {c} channels")
        k = None if scale is None else 1 + scale.float()
        t = None if shift is None else shift.float()
        o = None if offset is None else offset.float().expand(n, c)
        seed = torch.randint(2**31 - 1, (1,), device=parts[0].device) if dropout else None
        first, second = parts if len(parts) == 2 else (parts[0], None)
        more_1, more_2 = (*more, None, None)[:2]
        how = (self.groups, self.eps, silu, dropout, copies)
        return _FusedGroupNorm.apply(
            first, second, more_1, more_2, self.weight, self.bias, k, t, o, seed, how
        )


class _FusedGroupNorm(torch.autograd.Function):
    """dropout(silu(a * x + b)) by the kernels; the letters are those of `norm_kernels`.

    Also returns the parts, `copies` times (see `GroupNorm.beside`).
    """

    @staticmethod
    def forward(ctx, first, second, more_1, more_2, weight, bias, k, t, o, seed, how):
        groups, eps, silu, dropout, copies = how
        y, stats, total = norm_kernels.normalise(
            first, second, more_1, more_2, weight, bias, k, t, o, seed, groups, eps, silu, dropout
        )
        first = first if more_1 is None else total
        ctx.save_for_backward(first, second, weight, bias, k, seed, stats)
        ctx.how, ctx.given = how, [given is not None for given in (more_1, more_2, t, o)]
        # only where they are used: compiled, an unused output's gradient is a map full of zeros
        parts = [part for part in (first, second) if part is not None]
        return (y, *[part.view_as(part) for part in parts * copies]) if copies else y

    @staticmethod
    def backward(ctx, dy, *dbeside):
        first, second, weight, bias, k, seed, stats = ctx.saved_tensors
        groups, _, silu, dropout, *_ = ctx.how
        summed, summed_2, shifted, moved = ctx.given
        beside_1, beside_2 = (*dbeside, None, None)[:2]
        dfirst, dsecond, found = norm_kernels.normalise_grad(
            first, second, dy, beside_1, beside_2, seed, stats, groups, silu, dropout
        )
        db, du, do = found[:, 0], found[:, 1], found[:, 2]  # n c; u is weight * k
        if k is None:
            dbias, dweight = found[:, :2].sum(0)  # one kernel for both
            dk = None
        else:
            dbias, dweight = (found[:, :2] * k[:, None]).sum(0)
            dk = du * weight + db * bias
        return (
            dfirst, None if second is None else dsecond, dfirst if summed else None,
            dfirst if summed_2 else None, dweight, dbias,
            dk, db if shifted else None, do if moved else None, None, None,
        )  # fmt: skip


def added(parts: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parts, with `more` added to the first."""
    return (sum(more, parts[0]), *parts[1:])


def _spread(values: Tensor, channels: int) -> Tensor:
    """[n, groups] to [n, channels]."""
    n, groups = values.shape
    return values[:, :, None].expand(n, groups, channels // groups).reshape(n, channels)

"""Networks computed plainly, to measure beside our own ways: what they compute is the same."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from repro.files import ReproError
from repro.models import vit_fused
from repro.models.norm import GroupNorm, added
from repro.models.unet import InputConvolution, OutputConvolution, Resample


class PlainGroupNorm(GroupNorm):
    """The same norm by `F.group_norm`, as a plain implementation has it, of maps that are joined first."""

    def beside(self, *parts, offset=None, silu=False, copies=1, more=()):
        """See `GroupNorm`."""
        parts = added(parts, more)
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return self(x, offset=offset, silu=silu), (x,) * copies

    def forward(self, *parts, scale=None, shift=None, offset=None, silu=False, dropout=0.0, more=()):
        """See `GroupNorm`."""
        parts = added(parts, more)
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if offset is not None:
            x = x + offset.to(x.dtype).expand(x.shape[:2])[:, :, None, None]
        y = F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps)
        if scale is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        y = y.to(x.dtype)
        y = F.silu(y) if silu else y
        return F.dropout(y, dropout) if dropout else y


class PlainResample(Resample):
    """The same resampling with the doubled map formed, as the network is defined."""

    def forward(self, x):
        """See `Resample`."""
        if self.factor == "down" or self.conv is None:
            return super().forward(x)
        n, c, h, w = x.shape
        doubled = x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)
        return F.conv2d(doubled, self.conv.weight, padding=1)


class PlainOutputConvolution(OutputConvolution):
    """The same convolution, in float32."""

    def forward(self, h):
        """See `OutputConvolution`."""
        return super().forward(h.to(self.weight.dtype))


class PlainInputConvolution(InputConvolution):
    """The same convolution, by cuDNN."""

    def forward(self, x):
        """See `InputConvolution`."""
        return F.conv2d(x, self.weight, padding=1)


BLOCKS = {
    "norms": {GroupNorm: PlainGroupNorm},
    "convolutions": {
        InputConvolution: PlainInputConvolution,
        Resample: PlainResample,
        OutputConvolution: PlainOutputConvolution,
    },
}
"""Parts of a UNet that we compute in ways of our own: their classes, and the plain ones."""


def make_plain(net: nn.Module, parts: Collection[str] = tuple(BLOCKS)) -> None:
    """Let these parts of `net` compute plainly, in place; raises `ReproError` for an unknown one."""
    if unknown := sorted(set(parts) - set(BLOCKS)):
        raise ReproError(f"UNets have no part {unknown[0]!r}; known: {', '.join(BLOCKS)}")
    plain = {ours: other for part in parts for ours, other in BLOCKS[part].items()}
    for module in net.modules():
        module.__class__ = plain.get(type(module), type(module))


class _Biased(torch.autograd.Function):
    """x, to which a bias is added already, which has its gradient from here."""

    @staticmethod
    def forward(ctx, x, bias):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, _sum_tokens(dx)


@torch.library.custom_op("repro::sum_tokens", mutates_args=(), schema="(Tensor x) -> Tensor")
def _sum_tokens(x: torch.Tensor) -> torch.Tensor:
    """Sums over tokens, [n, s, d] to [d], by PyTorch's kernel.

    This comes before the products' own gradients, unlike in a plain network, so that Inductor would compute
    GELU's gradient within the sum, and once more for the products (which took 6.6 ms a step of ViT-B/2 for
    the 1.7 of a plain network, as an earlier paper/bench/changes.json has it).
    """
    return x.sum((0, 1))


@_sum_tokens.register_fake
def _(x):
    return x.new_empty(x.shape[2:])


class PlainAttention:
    """What `vit_fused` attends by, by PyTorch's own kernels."""

    @staticmethod
    def apply(qkv, q_bias, v_bias, heads):
        """See `vit_fused`; [n, s, 3 d] to [n, s, d]."""
        qkv = _Biased.apply(qkv, torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)))
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class PlainAddNorm:
    """A sum and its layer norm, as PyTorch has them."""

    @staticmethod
    def apply(z, branch, branch_bias, weight, bias, eps, dtype):
        """See `vit_fused`; two of [n, s, d]."""
        total = z if branch is None else z + _Biased.apply(branch, branch_bias)
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(dtype)


def plain_hidden(y, fc1):
    """See `vit_fused._hidden`; [n, s, d] to [n, s, hidden], by PyTorch's own kernels."""
    return F.gelu(_Biased.apply(F.linear(y, fc1.weight, fc1.bias.detach()), fc1.bias))


PARTS = {
    "attention": ("_Attention", PlainAttention),
    "sum and norm": ("_AddNorm", PlainAddNorm),
    "GELU": ("_hidden", plain_hidden),
}
"""What `vit_fused` has kernels for: what it calls, and a plain substitute."""


WIRING = "wiring"
"""A part that is no kernel: blocks as `vit_fused` wires them, be it of substitutes alone."""


def use_kernels(parts: Collection[str]) -> None:
    """Let ViTs of this process have these kernels of `PARTS` alone; without any, all is as in `vit.Block`.

    `WIRING` is a part too. To be called once, before a network is compiled. Raises `ReproError` for an
    unknown part.
    """
    known = (*PARTS, WIRING)
    if unknown := sorted(set(parts) - set(known)):
        raise ReproError(f"ViTs have no kernel for {unknown[0]!r}; known: {', '.join(known)}")
    vit_fused.enabled = bool(parts)
    for part, (name, substitute) in PARTS.items():
        if part not in parts:
            setattr(vit_fused, name, substitute)

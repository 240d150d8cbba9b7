"""The blocks of a ViT by the kernels of `vit_kernels`: what is computed is that of `vit.Block`.

A sum is formed where it is normalised, by the kernel that reads it. The gradient of a bias is a sum over all
tokens of what some kernel writes; that kernel gives it too, so products take their biases without a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

try:
    from repro.models import vit_kernels
except ImportError:  # no Triton: on macOS and Windows
    vit_kernels = None


enabled = True
"""False to compute the blocks plainly: to compare with, and for torch.func, which cannot go through these."""


def can_take(z: Tensor, heads: int) -> bool:
    """Whether the blocks can take z [n, s, d]: float32 on an NVIDIA GPU, under autocast to half precision.

    Of few tokens, and heads of 16 to 128 numbers (see `vit_kernels.can_attend`).
    """
    if not enabled or vit_kernels is None or not z.is_cuda or not torch.is_autocast_enabled("cuda"):
        return False
    dtype = torch.get_autocast_dtype("cuda")
    return z.dtype == torch.float32 and vit_kernels.can_attend(z, dtype, heads)


def run(blocks: nn.ModuleList, z: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
    """z after all blocks, float32; products in the precision of autocast."""
    branch, bias = None, None
    for block in blocks:
        z, y = _add_norm(z, branch, bias, block.norm1)  # [n, s, d] each
        branch, bias = _attend(y, block.attn)  # [n, s, d], [d]
        z, y = _add_norm(z, branch, bias, block.norm2)
        branch, bias = _mlp(y, block.mlp)
    return z + branch if bias is None else _AddBias.apply(z, branch, bias)


def _add_norm(z, branch, bias, norm):
    """z + branch, and its layer norm; bias: whose gradient is that of the branch, summed."""
    dtype = torch.get_autocast_dtype("cuda")
    return _AddNorm.apply(z, branch, bias, norm.weight, norm.bias, norm.eps, dtype)


def _attend(y, attn):
    bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))  # [3 d]
    qkv = F.linear(y, attn.qkv.weight, bias.detach())  # [n, s, 3 d]
    x = _Attention.apply(qkv, attn.q_bias, attn.v_bias, attn.heads)  # [n, s, d]
    return F.linear(x, attn.proj.weight, attn.proj.bias.detach()), attn.proj.bias


def _mlp(y, mlp):
    x = _GELU.apply(F.linear(y, mlp.fc1.weight, mlp.fc1.bias.detach()), mlp.fc1.bias)  # [n, s, hidden]
    return F.linear(x, mlp.fc2.weight, mlp.fc2.bias.detach()), mlp.fc2.bias


class _AddNorm(torch.autograd.Function):
    """Sum and layer norm, of a branch to which its bias is added already."""

    @staticmethod
    def forward(ctx, z, branch, branch_bias, weight, bias, eps, dtype):
        total, y, mean, rstd = vit_kernels.add_norm(z, branch, weight, bias, eps, dtype)
        total = z.view_as(z) if branch is None else total
        ctx.save_for_backward(total, mean, rstd, weight)
        ctx.dtype = None if branch is None else branch.dtype
        return total, y

    @staticmethod
    def backward(ctx, dsum, dy):
        total, mean, rstd, weight = ctx.saved_tensors
        dz, dbranch, partial = vit_kernels.add_norm_grad(total, mean, rstd, weight, dy, dsum, ctx.dtype)
        dweight, dbias, dbranch_bias = partial.sum(0)
        if ctx.dtype is None:
            dbranch, dbranch_bias = None, None
        return dz, dbranch, dbranch_bias, dweight, dbias, None, None


class _AddBias(torch.autograd.Function):
    """z + branch, to which its bias is added already."""

    @staticmethod
    def forward(ctx, z, branch, bias):
        ctx.dtype = branch.dtype
        return z + branch

    @staticmethod
    def backward(ctx, dz):
        return dz, dz.to(ctx.dtype), dz.sum((0, 1))


class _Attention(torch.autograd.Function):
    """Attention, of queries, keys and values to which their biases are added already."""

    @staticmethod
    def forward(ctx, qkv, q_bias, v_bias, heads):
        out, lse = vit_kernels.attention(qkv, heads)
        ctx.save_for_backward(qkv, out, lse)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx, dout):
        dqkv, queries, values = vit_kernels.attention_grad(*ctx.saved_tensors, dout, ctx.heads)
        return dqkv, queries.sum(0), values.sum(0), None


class _GELU(torch.autograd.Function):
    """GELU, of x to which its bias is added already."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x)
        return vit_kernels.gelu(x)

    @staticmethod
    def backward(ctx, dy):
        dx, sums = vit_kernels.gelu_grad(*ctx.saved_tensors, dy)
        return dx, sums.sum(0)

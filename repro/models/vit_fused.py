"""The blocks of a ViT by the kernels of `vit_kernels`: what is computed is that of `vit.Block`.

A sum is formed where it is normalised, by the kernel that reads it. The gradient of a bias is a sum over all
tokens of what some kernel writes; that kernel gives it too, so products take their biases without a gradient.

To sample, products can be of float8 (e4m3) numbers, at twice the rate of half precision: within `products`.
Each row of activations has a scale, and each output channel of weights, so that their greatest number is 448.
The kernel that forms a row scales it. Attention forms the numbers of a row in different programs, one for
each head: the product that follows, a twelfth of them all, stays in bfloat16. So does the whole first block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repro.files import ReproError
from repro.models import recompute

try:
    from repro.models import vit_kernels
except ImportError:  # no Triton: on macOS and Windows
    vit_kernels = None


enabled = True
"""False to compute the blocks plainly: to compare with, and for torch.func, which cannot go through these."""

fp8 = False
"""Whether products are of float8 numbers, as `products` sets it. A compiled ViT is compiled for each."""

FP8_CAPABILITY = (8, 9)
"""Of the first NVIDIA GPUs that multiply float8 numbers."""

FP8_MULTIPLE = 16
"""What sizes of such a product must be multiples of."""

FP8_FROM = 1
"""The first block whose products are of float8 numbers."""


@contextmanager
def products(float8: bool) -> Iterator[None]:
    """A block in which ViTs take products qkv, fc1 and fc2 of float8 numbers, or not; in all threads.

    In the blocks from `FP8_FROM` on. They do so under autocast on a GPU, without gradients, and raise
    `ReproError` elsewhere.
    """
    global fp8
    before, fp8 = fp8, float8
    try:
        yield
    finally:
        fp8 = before


def check_fp8(device: str | torch.device, tokens: int, width: int, heads: int, hidden: int) -> None:
    """Raise `ReproError` where blocks of that size cannot take products of float8 numbers on `device`."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None:
        raise ReproError(f"the precision fp8 needs an NVIDIA GPU, and this is {device}: take fp32 or bf16")
    if vit_kernels is None:
        raise ReproError("the precision fp8 needs Triton, which is not installed: take bf16")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ReproError(
            f"the precision fp8 needs a GPU of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or "
            f"more, such as an H100, and this one has {capability[0]}.{capability[1]}: take bf16"
        )
    if width % FP8_MULTIPLE or hidden % FP8_MULTIPLE:
        raise ReproError(
            f"the precision fp8 needs a ViT of widths that are multiples of {FP8_MULTIPLE}, and this one is "
            f"{width} wide, {hidden} between: take bf16"
        )
    if not vit_kernels.fit(tokens, heads, width):
        raise ReproError(
            f"the precision fp8 needs a ViT of at most {vit_kernels.MOST_TOKENS} tokens, and heads of 16, "
            f"24, ... 128 numbers; this one has {tokens} tokens, and heads of {width // heads}: take bf16"
        )


def can_take(z: Tensor, heads: int) -> bool:
    """Whether the blocks can take z [n, s, d]: float32 on an NVIDIA GPU, under autocast to half precision.

    Of few tokens, and heads of 16 to 128 numbers (see `vit_kernels.can_attend`). Raises `ReproError` where
    they cannot within `products` of float8, which plain blocks have none of.
    """
    taken = _can_take(z, heads)
    if fp8 and not taken:
        raise ReproError(
            "products of float8 numbers need a ViT on a GPU under autocast: use sample.autocast with fp8"
        )
    return taken


def _can_take(z: Tensor, heads: int) -> bool:
    if not enabled or vit_kernels is None or not z.is_cuda or not torch.is_autocast_enabled("cuda"):
        return False
    dtype = torch.get_autocast_dtype("cuda")
    return z.dtype == torch.float32 and vit_kernels.can_attend(z, dtype, heads)


def run(blocks: nn.ModuleList, z: Float[Tensor, "n s d"], again: bool = False) -> Float[Tensor, "n s d"]:
    """z after all blocks, float32; products in the precision of autocast, or within `products` of float8.

    again: blocks are computed again in the backward pass (see `recompute`).
    """
    if fp8:
        _check_no_gradient(blocks, z)
    branch, bias = None, None
    for index, block in enumerate(blocks):
        if fp8 and index >= FP8_FROM:
            (z, branch), bias = _block_fp8(block, z, branch), None
            continue
        z, branch = recompute.block(again, _block, block, z, branch, bias)  # [n, s, d] each
        bias = block.mlp.fc2.bias  # [d]
    return z + branch if bias is None else _AddBias.apply(z, branch, bias)


def _block(block, z, branch, bias):
    """A block of z + branch, whose bias has its gradient from here: z before its last branch, and that."""
    z, y = _add_norm(z, branch, bias, block.norm1)  # [n, s, d] each
    branch, bias = _attend(y, block.attn)  # [n, s, d], [d]
    z, y = _add_norm(z, branch, bias, block.norm2)
    return z, _mlp(y, block.mlp)


def _add_norm(z, branch, bias, norm):
    """z + branch, and its layer norm; bias: whose gradient is that of the branch, summed."""
    dtype = torch.get_autocast_dtype("cuda")
    return _AddNorm.apply(z, branch, bias, norm.weight, norm.bias, norm.eps, dtype)


def _attend(y, attn):
    qkv = F.linear(y, attn.qkv.weight, _qkv_bias(attn).detach())  # [n, s, 3 d]
    x = _Attention.apply(qkv, attn.q_bias, attn.v_bias, attn.heads)  # [n, s, d]
    return F.linear(x, attn.proj.weight, attn.proj.bias.detach()), attn.proj.bias


def _qkv_bias(attn):
    return torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))  # [3 d]


def _mlp(y, mlp):
    x = _hidden(y, mlp.fc1)  # [n, s, hidden]
    return F.linear(x, mlp.fc2.weight, mlp.fc2.bias.detach())  # its bias: see `_block`, of the next


def _hidden(y, fc1):
    """GELU of a product, by one kernel where that pays: a gradient would need what GELU is of."""
    if not torch.is_grad_enabled() and vit_kernels.can_multiply(y, fc1.weight):
        return vit_kernels.gelu_of_product(y, fc1.weight.to(y.dtype), fc1.bias)
    return _GELU.apply(F.linear(y, fc1.weight, fc1.bias.detach()), fc1.bias)


def _check_no_gradient(blocks, z):
    if torch.is_grad_enabled() and (z.requires_grad or any(p.requires_grad for p in blocks.parameters())):
        raise ReproError("products of float8 numbers have no gradient: use torch.no_grad, or bf16")


def _block_fp8(block, z, branch):
    """A block of z + branch, without a gradient: z before its last branch, and that branch; [n, s, d]."""
    attn, mlp = block.attn, block.mlp
    z, y, scale = _add_norm_fp8(z, branch, block.norm1)  # [n, s, d] each, [n, s, 1]
    qkv = _linear_fp8(y, scale, attn.qkv.weight, _qkv_bias(attn))  # [n, s, 3 d]
    x, _ = vit_kernels.attention(qkv, attn.heads)  # [n, s, d]
    z, y, scale = _add_norm_fp8(z, F.linear(x, attn.proj.weight, attn.proj.bias), block.norm2)
    y, scale = vit_kernels.gelu_fp8(_linear_fp8(y, scale, mlp.fc1.weight, mlp.fc1.bias))  # [n, s, hidden]
    return z, _linear_fp8(y, scale, mlp.fc2.weight, mlp.fc2.bias)


def _add_norm_fp8(z, branch, norm):
    total, y, scale = vit_kernels.add_norm_fp8(z, branch, norm.weight, norm.bias, norm.eps)
    return (z if branch is None else total), y, scale


def _linear_fp8(x, scale, weight, bias):
    """x weight^T + bias, bfloat16, of float8 x [n, s, d] over the scale [n, s, 1] of each row.

    Sums within the GPU's matrix products keep some 14 bits, which is far more than their factors have.
    """
    w, w_scale = _weight_fp8(weight)
    y = torch._scaled_mm(
        x.flatten(0, 1),
        w.t(),
        scale_a=scale.flatten(0, 1),
        scale_b=w_scale,
        bias=bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y.unflatten(0, x.shape[:2])


def _weight_fp8(weight):
    """A weight [out, in] in float8 over a scale [1, out] of each output channel, float32.

    Formed at each call, so that no state has to follow the weights: 5 bytes of memory traffic a weight.
    """
    most = weight.abs().amax(1).clamp(min=vit_kernels.FP8_LEAST)  # [out]
    scaled = weight * (vit_kernels.FP8_MOST / most)[:, None]
    return scaled.to(vit_kernels.FP8), (most / vit_kernels.FP8_MOST)[None]


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

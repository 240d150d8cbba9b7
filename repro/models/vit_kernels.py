"""Triton kernels of what stands between a ViT's matrix products: sum and layer norm, GELU, and attention.

The first two are bound by memory. Compiled from PyTorch, the gradient of a layer norm reads the residual
stream more often than once, that of GELU forms its output again, and erf takes longer than the memory does.

Attention here is over few tokens: 256 patches, the time and the class. cuDNN's kernels cut 258 of them into
tiles of 64 or 128, so that much of the last tile is thrown away, and pad heads of 72 to 128. These take the
last tokens in a tile of their own size, read queries, keys and values where the product before left them, and
give the gradients in the same place, with the sums that are the gradients of the biases.

The residual stream z is float32 [rows, width]; branches, and what the products take, are half precision.
Each kernel is an operator of its own, which `torch.compile` calls as it is.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from repro.models.norm_kernels import COMPILED, INTERPRETED

HALF = (torch.bfloat16, torch.float16)
PROGRAMS = 8
"""Of a gradient on each multiprocessor: each adds up what many rows give the parameters."""
NORM_ROWS = 1
"""Of a gradient, that a program takes at a time."""
GELU_BLOCK = 4096
GELU_PROGRAMS = 8
"""Of its gradient on each multiprocessor."""
GELU_GRAD = dict(ROWS=4, COLUMNS=1024, num_warps=8)


@triton.jit
def _add_norm_kernel(
    z_ptr, branch_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, width, eps,
    BRANCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: sum = z + branch, y = layer norm of it."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    x = tl.load(z_ptr + row * width + c, mask=inside, other=0.0)
    if BRANCH:
        x += tl.load(branch_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * width + c, x, mask=inside)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row * width + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _add_norm_grad_kernel(
    sum_ptr, mean_ptr, rstd_ptr, weight_ptr, dy_ptr, dsum_ptr, dz_ptr, dbranch_ptr, partial_ptr,
    rows, width, BRANCH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every so many-th tile of rows: gradient of z, also as the branch's; sums as in `add_norm_grad`."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    inside = c < width
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    wide = program.to(tl.int64) * 0  # addresses of 64 bits
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < rows
        at = (wide + row)[:, None] * width + c[None, :]
        mask = there[:, None] & inside[None, :]
        x = tl.load(sum_ptr + at, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        beside = tl.load(dsum_ptr + at, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)[:, None]
        mean = tl.load(mean_ptr + row, mask=there, other=0.0)[:, None]
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        dweight += dy * normed
        dbias += dy
        dnormed = dy * weight
        along = tl.sum(dnormed * normed, 1)[:, None] / width
        level = tl.sum(dnormed, 1)[:, None] / width
        dz = rstd * (dnormed - level - normed * along) + beside
        tl.store(dz_ptr + at, dz, mask=mask)
        if BRANCH:
            tl.store(dbranch_ptr + at, dz.to(dbranch_ptr.dtype.element_ty), mask=mask)
            total += dz
    at = program * 3 * width + c
    tl.store(partial_ptr + at, tl.sum(dweight, 0), mask=inside)
    tl.store(partial_ptr + at + width, tl.sum(dbias, 0), mask=inside)
    tl.store(partial_ptr + at + 2 * width, tl.sum(total, 0), mask=inside)


@triton.jit
def _parts_of_gelu(x):
    """The normal distribution function of x, and exp(-x^2 / 2).

    By Abramowitz and Stegun 1964, formula 7.1.26, off by at most 1.5e-7 in erf.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * z)
    bell = tl.exp(-z * z)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half_tail = 0.5 * tail * bell
    return tl.where(x < 0, half_tail, 1 - half_tail), bell


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    phi, _ = _parts_of_gelu(x)
    tl.store(y_ptr + at, (x * phi).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_grad_kernel(
    x_ptr, dy_ptr, dx_ptr, partial_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Some columns of every so many-th tile of rows, and the sums of these columns."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program, programs = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    wide = program.to(tl.int64) * 0  # addresses of 64 bits
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = (wide + row)[:, None] * width + c[None, :]
        mask = (row < rows)[:, None] & (c < width)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        phi, bell = _parts_of_gelu(x)
        dx = dy * (phi + x * bell * 0.3989422804014327)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += dx
    tl.store(partial_ptr + program * width + c, tl.sum(total, 0), mask=c < width)


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _sizes(z: Tensor) -> tuple[int, int, dict]:
    width = z.shape[-1]
    block = triton.next_power_of_2(width)
    return z.numel() // width, width, dict(BLOCK=block, num_warps=2)


@torch.library.custom_op("repro::add_norm", mutates_args=())
def add_norm(
    z: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z + branch (empty without a branch), its layer norm of type `dtype`, and the mean and 1 / deviation of
    each row, float32."""
    z = z.contiguous()
    branch = None if branch is None else branch.contiguous()
    total, y, mean, rstd = _add_norm_like(z, branch, weight, bias, eps, dtype)
    rows, width, how = _sizes(z)
    with torch.cuda.device_of(z):
        _add_norm_kernel[(rows,)](
            z, z if branch is None else branch, weight, bias, z if branch is None else total, y, mean, rstd,
            width, eps, BRANCH=branch is not None, **how,
        )  # fmt: skip
    return total, y, mean, rstd


@add_norm.register_fake
def _add_norm_like(z, branch, weight, bias, eps, dtype):
    total = z.new_empty(0) if branch is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    y = torch.empty_like(z, dtype=dtype, memory_format=torch.contiguous_format)
    return total, y, z.new_empty(z.shape[:-1]), z.new_empty(z.shape[:-1])


@torch.library.custom_op("repro::add_norm_grad", mutates_args=())
def add_norm_grad(
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dy: Tensor,
    dsum: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, of the branch (empty without a type), and [programs, 3, width]: sums that add up to
    those of weight and bias, and to the sum over rows of the branch's gradient (0 without a branch).
    """
    total, dy, dsum = total.contiguous(), dy.contiguous(), dsum.contiguous()
    dz, dbranch, partial = _add_norm_grad_like(total, mean, rstd, weight, dy, dsum, branch_dtype)
    rows, width, how = _sizes(total)
    with torch.cuda.device_of(total):
        _add_norm_grad_kernel[(len(partial),)](
            total, mean, rstd, weight, dy, dsum, dz, dz if branch_dtype is None else dbranch, partial,
            rows, width, BRANCH=branch_dtype is not None, ROWS=NORM_ROWS, **how,
        )  # fmt: skip
    return dz, dbranch, partial


@add_norm_grad.register_fake
def _add_norm_grad_like(total, mean, rstd, weight, dy, dsum, branch_dtype):
    dz = torch.empty_like(total, memory_format=torch.contiguous_format)
    dbranch = total.new_empty(0) if branch_dtype is None else torch.empty_like(dz, dtype=branch_dtype)
    return dz, dbranch, total.new_empty(PROGRAMS * _multiprocessors(total), 3, total.shape[-1])


@torch.library.custom_op("repro::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x, in the type of x."""
    x = x.contiguous()
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _gelu_kernel[(triton.cdiv(x.numel(), GELU_BLOCK),)](x, y, x.numel(), BLOCK=GELU_BLOCK, num_warps=8)
    return y


@gelu.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("repro::gelu_grad", mutates_args=())
def gelu_grad(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gelu` by x, in the type of x, and [programs, width]: its sums over rows, in parts."""
    x, dy = x.contiguous(), dy.contiguous()
    dx, partial = _gelu_grad_like(x, dy)
    width = x.shape[-1]
    grid = (triton.cdiv(width, GELU_GRAD["COLUMNS"]), len(partial))
    with torch.cuda.device_of(x):
        _gelu_grad_kernel[grid](x, dy, dx, partial, x.numel() // width, width, **GELU_GRAD)
    return dx, partial


@gelu_grad.register_fake
def _gelu_grad_like(x, dy):
    columns = triton.cdiv(x.shape[-1], GELU_GRAD["COLUMNS"])
    programs = max(1, GELU_PROGRAMS * _multiprocessors(x) // columns)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(programs, x.shape[-1], dtype=torch.float32),
    )


# Attention ------------------------------------------------------------------------------------------
#
# qkv is [n, s, 3, heads, d]: n images of s tokens. A program keeps some rows of one head of one image
# (queries, or keys and values) and goes over all rows of the other kind. Both are cut into blocks of equal
# size, of which a program keeps one; what is left over is a tail of its own, smaller size.
#
# A head of d numbers is read in two parts, of D1 and (masked) D2, both powers of two; D2 is 0 where d is one.
# lse is the logarithm, to the base 2, of the sum of a query's exponentials; with it p = 2^(logits - lse)
# without another pass. delta is the sum of gradient times output of a query.


@dataclass(frozen=True)
class Blocks:
    """How a kernel shares out its work: rows that a program keeps and rows it goes over at a time."""

    kept: int
    over: int
    num_warps: int
    num_stages: int


FORWARD = {False: Blocks(64, 64, 4, 3), True: Blocks(128, 64, 4, 3)}
QUERIES = {False: Blocks(64, 64, 4, 2), True: Blocks(128, 64, 4, 3)}
KEYS = {False: Blocks(64, 32, 4, 3), True: Blocks(64, 64, 4, 3)}
"""Of attention, of its gradient by queries, and of that by keys and values: for heads whose size is a power
of two, and (True) for those in two parts. The fastest of those tried on an H200 with 258 tokens."""

MOST_TOKENS = 1024
"""With more, a kernel for long sequences is the better one."""

LOG2_E = 1.4426950408889634


def can_attend(x: Tensor, dtype: torch.dtype, heads: int) -> bool:
    """Whether the kernels take tokens x [n, s, heads d] in the half precision `dtype`: on an NVIDIA GPU of
    compute capability 8 or more, few tokens, d in 16 to 128."""
    d = x.shape[-1] // heads
    there = INTERPRETED or (x.is_cuda and torch.version.hip is None and _is_new(x.device.index))
    few = 0 < x.shape[1] <= MOST_TOKENS and heads <= 65_535
    return there and x.numel() > 0 and dtype in HALF and few and 16 <= d <= 128 and d % 8 == 0


@torch.compiler.assume_constant_result
def _is_new(gpu: int | None) -> bool:
    return torch.cuda.get_device_properties(gpu).major >= 8


def _parts(d: int) -> dict[str, int]:
    """The parts in which a head of d numbers is read."""
    first = 1 << (d.bit_length() - 1)
    return dict(D=d, D1=first, D2=0 if first == d else max(16, triton.next_power_of_2(d - first)))


def _tail(tokens: int, block: int) -> int:
    """Rows of the tile that takes what is left of `tokens` after whole blocks; 0 where nothing is."""
    left = tokens % block
    return max(16, triton.next_power_of_2(left)) if left else 0


@triton.jit
def _load(
    at, row, stride, S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASK: tl.constexpr
):
    """Rows of one head, in two parts [rows, D1] and [rows, D2] (the first again where there is no second)."""
    where = at + row[:, None] * stride
    if MASK:
        first = tl.load(where + tl.arange(0, D1)[None, :], mask=(row < S)[:, None], other=0.0)
    else:
        first = tl.load(where + tl.arange(0, D1)[None, :])
    second = first
    if D2:
        c = D1 + tl.arange(0, D2)
        second = tl.load(where + c[None, :], mask=(row < S)[:, None] & (c < D)[None, :], other=0.0)
    return first, second


@triton.jit
def _store(
    at, row, stride, first, second, S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr
):
    """The reverse of `_load`, in the type of where it goes."""
    inside = (row < S)[:, None]
    where = at + row[:, None] * stride
    tl.store(where + tl.arange(0, D1)[None, :], first.to(at.dtype.element_ty), mask=inside)
    if D2:
        c = D1 + tl.arange(0, D2)
        tl.store(where + c[None, :], second.to(at.dtype.element_ty), mask=inside & (c < D)[None, :])


@triton.jit
def _store_sums(at, first, second, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """One number for each of the d."""
    tl.store(at + tl.arange(0, D1), first)
    if D2:
        c = D1 + tl.arange(0, D2)
        tl.store(at + c, second, mask=c < D)


@triton.jit
def _product(a, b, beside):
    """a b + beside, float32."""
    if COMPILED:
        return tl.dot(a, b, beside)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), beside)  # the interpreter's takes no bfloat16


@triton.jit
def _along(a1, a2, b1, b2, D2: tl.constexpr):
    """Products of all rows of a with all rows of b."""
    product = _product(a1, tl.trans(b1), tl.zeros((a1.shape[0], b1.shape[0]), tl.float32))
    if D2:
        product = _product(a2, tl.trans(b2), product)
    return product


@triton.jit
def _where(width, BLOCKS: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """Of a program: its block, and where its head of its image is in qkv, in out, in lse and in the sums."""
    program, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    image = program // BLOCKS
    return (
        (program % BLOCKS).to(tl.int32), image * S * 3 * width + head * D, image * S * width + head * D,
        (image * heads + head) * S, program * width + head * D,
    )  # fmt: skip


@triton.jit
def _attend_to(
    acc1, acc2, most, total, q1, q2, k1, k2, v1, v2, key, scale,
    S: tl.constexpr, D2: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Go on with more keys: sums of values, weighted by exponentials relative to the greatest logit."""
    logits = _along(q1, q2, k1, k2, D2)
    if MASK:
        logits = tl.where((key < S)[None, :], logits, float("-inf"))
    greater = tl.maximum(most, tl.max(logits, 1) * scale)
    p = tl.exp2(logits * scale - greater[:, None])
    less = tl.exp2(most - greater)
    half = p.to(v1.dtype)
    acc1 = _product(half, v1, acc1 * less[:, None])
    if D2:
        acc2 = _product(half, v2, acc2 * less[:, None])
    return acc1, acc2, greater, total * less + tl.sum(p, 1)


@triton.jit
def _attend(
    q_at, k_at, v_at, out_at, lse_at, stride, out_stride, start, scale,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEPT: tl.constexpr,
    MASK: tl.constexpr, OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """KEPT queries from `start` on."""
    row = start + tl.arange(0, KEPT)
    q1, q2 = _load(q_at, row, stride, S, D, D1, D2, MASK)
    acc1, acc2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2 if D2 else 1), tl.float32)
    most, total = tl.full((KEPT,), float("-inf"), tl.float32), tl.zeros((KEPT,), tl.float32)
    for first in range(0, S // OVER * OVER, OVER):
        key = first + tl.arange(0, OVER)
        k1, k2 = _load(k_at, key, stride, S, D, D1, D2, False)
        v1, v2 = _load(v_at, key, stride, S, D, D1, D2, False)
        acc1, acc2, most, total = _attend_to(
            acc1, acc2, most, total, q1, q2, k1, k2, v1, v2, key, scale, S, D2, False
        )
    if OVER_TAIL:
        key = S // OVER * OVER + tl.arange(0, OVER_TAIL)
        k1, k2 = _load(k_at, key, stride, S, D, D1, D2, True)
        v1, v2 = _load(v_at, key, stride, S, D, D1, D2, True)
        acc1, acc2, most, total = _attend_to(
            acc1, acc2, most, total, q1, q2, k1, k2, v1, v2, key, scale, S, D2, True
        )
    one = (1 / total)[:, None]
    _store(out_at, row, out_stride, acc1 * one, acc2 * one, S, D, D1, D2)
    tl.store(lse_at + row, most + tl.log2(total), mask=row < S)


@triton.jit
def _attention_kernel(
    qkv_ptr, out_ptr, lse_ptr, width, scale,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCKS: tl.constexpr,
    KEPT: tl.constexpr, KEPT_TAIL: tl.constexpr, OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Attention of a block of queries of one head of one image."""
    block, at, out_at, lse_at, _ = _where(width, BLOCKS, S, D)
    q_at = qkv_ptr + at
    k_at, v_at = q_at + width, q_at + 2 * width
    if block * KEPT + KEPT <= S:
        _attend(
            q_at, k_at, v_at, out_ptr + out_at, lse_ptr + lse_at, 3 * width, width, block * KEPT, scale,
            S, D, D1, D2, KEPT, False, OVER, OVER_TAIL,
        )  # fmt: skip
    elif KEPT_TAIL:
        _attend(
            q_at, k_at, v_at, out_ptr + out_at, lse_ptr + lse_at, 3 * width, width, block * KEPT, scale,
            S, D, D1, D2, KEPT_TAIL, True, OVER, OVER_TAIL,
        )  # fmt: skip


@triton.jit
def _start_of_gradient(
    q_at, out_at, dout_at, lse_at, delta_at, row, stride, out_stride,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Queries, gradients of their outputs, lse, and delta, which is written too."""
    do1, do2 = _load(dout_at, row, out_stride, S, D, D1, D2, MASK)
    o1, o2 = _load(out_at, row, out_stride, S, D, D1, D2, MASK)
    delta = tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
    if D2:
        delta += tl.sum(do2.to(tl.float32) * o2.to(tl.float32), 1)
    tl.store(delta_at + row, delta, mask=row < S)
    lse = tl.load(lse_at + row, mask=row < S, other=0.0)
    q1, q2 = _load(q_at, row, stride, S, D, D1, D2, MASK)
    return q1, q2, do1, do2, lse, delta


@triton.jit
def _query_gradient_from(
    dq1, dq2, q1, q2, do1, do2, lse, delta, k1, k2, v1, v2, key, scale,
    S: tl.constexpr, D2: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Go on with more keys."""
    p = tl.exp2(_along(q1, q2, k1, k2, D2) * scale - lse[:, None])
    if MASK:
        p = tl.where((key < S)[None, :], p, 0.0)
    dlogits = (p * (_along(do1, do2, v1, v2, D2) - delta[:, None])).to(k1.dtype)
    dq1 = _product(dlogits, k1, dq1)
    if D2:
        dq2 = _product(dlogits, k2, dq2)
    return dq1, dq2


@triton.jit
def _query_gradient(
    q_at, k_at, v_at, out_at, dout_at, lse_at, delta_at, dq_at, sum_at, stride, out_stride, start, scale,
    back, S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEPT: tl.constexpr,
    MASK: tl.constexpr, OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Of KEPT queries from `start` on."""
    row = start + tl.arange(0, KEPT)
    q1, q2, do1, do2, lse, delta = _start_of_gradient(
        q_at, out_at, dout_at, lse_at, delta_at, row, stride, out_stride, S, D, D1, D2, MASK
    )
    dq1, dq2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2 if D2 else 1), tl.float32)
    for first in range(0, S // OVER * OVER, OVER):
        key = first + tl.arange(0, OVER)
        k1, k2 = _load(k_at, key, stride, S, D, D1, D2, False)
        v1, v2 = _load(v_at, key, stride, S, D, D1, D2, False)
        dq1, dq2 = _query_gradient_from(
            dq1, dq2, q1, q2, do1, do2, lse, delta, k1, k2, v1, v2, key, scale, S, D2, False
        )
    if OVER_TAIL:
        key = S // OVER * OVER + tl.arange(0, OVER_TAIL)
        k1, k2 = _load(k_at, key, stride, S, D, D1, D2, True)
        v1, v2 = _load(v_at, key, stride, S, D, D1, D2, True)
        dq1, dq2 = _query_gradient_from(
            dq1, dq2, q1, q2, do1, do2, lse, delta, k1, k2, v1, v2, key, scale, S, D2, True
        )
    # rows outside have no gradient: do and delta are 0
    dq1, dq2 = dq1 * back, dq2 * back
    _store(dq_at, row, stride, dq1, dq2, S, D, D1, D2)
    sum1, sum2 = tl.sum(dq1, 0), tl.sum(dq2, 0)
    _store_sums(sum_at, sum1, sum2, D, D1, D2)


@triton.jit
def _query_gradient_kernel(
    qkv_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, sum_ptr, width, scale, back,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCKS: tl.constexpr,
    KEPT: tl.constexpr, KEPT_TAIL: tl.constexpr, OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, their sum, and delta."""
    block, at, out_at, lse_at, sum_at = _where(width, BLOCKS, S, D)
    q_at = qkv_ptr + at
    k_at, v_at = q_at + width, q_at + 2 * width
    if block * KEPT + KEPT <= S:
        _query_gradient(
            q_at, k_at, v_at, out_ptr + out_at, dout_ptr + out_at, lse_ptr + lse_at, delta_ptr + lse_at,
            dqkv_ptr + at, sum_ptr + sum_at, 3 * width, width, block * KEPT, scale, back,
            S, D, D1, D2, KEPT, False, OVER, OVER_TAIL,
        )  # fmt: skip
    elif KEPT_TAIL:
        _query_gradient(
            q_at, k_at, v_at, out_ptr + out_at, dout_ptr + out_at, lse_ptr + lse_at, delta_ptr + lse_at,
            dqkv_ptr + at, sum_ptr + sum_at, 3 * width, width, block * KEPT, scale, back,
            S, D, D1, D2, KEPT_TAIL, True, OVER, OVER_TAIL,
        )  # fmt: skip


@triton.jit
def _key_gradient_from(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q1, q2, do1, do2, lse, delta, scale, D2: tl.constexpr,
):  # fmt: skip
    """Go on with more queries; outside, do and delta are 0."""
    p = tl.exp2(_along(k1, k2, q1, q2, D2) * scale - lse[None, :])  # [keys, queries]
    half = p.to(q1.dtype)
    dv1 = _product(half, do1, dv1)
    if D2:
        dv2 = _product(half, do2, dv2)
    dlogits = (p * (_along(v1, v2, do1, do2, D2) - delta[None, :])).to(q1.dtype)
    dk1 = _product(dlogits, q1, dk1)
    if D2:
        dk2 = _product(dlogits, q2, dk2)
    return dk1, dk2, dv1, dv2


@triton.jit
def _load_queries(
    q_at, dout_at, lse_at, delta_at, row, stride, out_stride,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    q1, q2 = _load(q_at, row, stride, S, D, D1, D2, MASK)
    do1, do2 = _load(dout_at, row, out_stride, S, D, D1, D2, MASK)
    if MASK:
        lse = tl.load(lse_at + row, mask=row < S, other=0.0)
        delta = tl.load(delta_at + row, mask=row < S, other=0.0)
    else:
        lse, delta = tl.load(lse_at + row), tl.load(delta_at + row)
    return q1, q2, do1, do2, lse, delta


@triton.jit
def _key_gradient(
    q_at, k_at, v_at, dout_at, lse_at, delta_at, dk_at, dv_at, sum_at, stride, out_stride, start, scale, back,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEPT: tl.constexpr,
    MASK: tl.constexpr, OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Of KEPT keys from `start` on."""
    key = start + tl.arange(0, KEPT)
    k1, k2 = _load(k_at, key, stride, S, D, D1, D2, MASK)
    v1, v2 = _load(v_at, key, stride, S, D, D1, D2, MASK)
    dk1, dk2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2 if D2 else 1), tl.float32)
    dv1, dv2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2 if D2 else 1), tl.float32)
    for first in range(0, S // OVER * OVER, OVER):
        q1, q2, do1, do2, lse, delta = _load_queries(
            q_at, dout_at, lse_at, delta_at, first + tl.arange(0, OVER), stride, out_stride,
            S, D, D1, D2, False,
        )  # fmt: skip
        dk1, dk2, dv1, dv2 = _key_gradient_from(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, q1, q2, do1, do2, lse, delta, scale, D2
        )
    if OVER_TAIL:
        q1, q2, do1, do2, lse, delta = _load_queries(
            q_at, dout_at, lse_at, delta_at, S // OVER * OVER + tl.arange(0, OVER_TAIL), stride, out_stride,
            S, D, D1, D2, True,
        )  # fmt: skip
        dk1, dk2, dv1, dv2 = _key_gradient_from(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, q1, q2, do1, do2, lse, delta, scale, D2
        )
    _store(dk_at, key, stride, dk1 * back, dk2 * back, S, D, D1, D2)
    _store(dv_at, key, stride, dv1, dv2, S, D, D1, D2)
    # keys outside are zeros, to which queries give a gradient all the same
    there = (key < S)[:, None]
    sum1, sum2 = tl.sum(tl.where(there, dv1, 0.0), 0), tl.sum(tl.where(there, dv2, 0.0), 0)
    _store_sums(sum_at, sum1, sum2, D, D1, D2)


@triton.jit
def _key_gradient_kernel(
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, sum_ptr, width, scale, back,
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCKS: tl.constexpr,
    KEPT: tl.constexpr, KEPT_TAIL: tl.constexpr, OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and of their values, and the sum of the latter."""
    block, at, out_at, lse_at, sum_at = _where(width, BLOCKS, S, D)
    q_at = qkv_ptr + at
    k_at, v_at = q_at + width, q_at + 2 * width
    dk_at = dqkv_ptr + at + width
    if block * KEPT + KEPT <= S:
        _key_gradient(
            q_at, k_at, v_at, dout_ptr + out_at, lse_ptr + lse_at, delta_ptr + lse_at,
            dk_at, dk_at + width, sum_ptr + sum_at, 3 * width, width, block * KEPT, scale, back,
            S, D, D1, D2, KEPT, False, OVER, OVER_TAIL,
        )  # fmt: skip
    elif KEPT_TAIL:
        _key_gradient(
            q_at, k_at, v_at, dout_ptr + out_at, lse_ptr + lse_at, delta_ptr + lse_at,
            dk_at, dk_at + width, sum_ptr + sum_at, 3 * width, width, block * KEPT, scale, back,
            S, D, D1, D2, KEPT_TAIL, True, OVER, OVER_TAIL,
        )  # fmt: skip


def _launch(qkv: Tensor, heads: int, sizes: dict[bool, Blocks]) -> tuple[tuple[int, int], dict]:
    """Grid and constants of a kernel."""
    n, tokens, d = len(qkv), qkv.shape[1], qkv.shape[-1] // (3 * heads)
    parts = _parts(d)
    how = sizes[parts["D2"] > 0]
    if parts["D2"] > 32:  # more would not fit the 99 KB that a program has on GPUs of 8.6, 8.9 and 12.0
        how = replace(how, kept=64)
    blocks = triton.cdiv(tokens, how.kept)
    tails = dict(KEPT_TAIL=_tail(tokens, how.kept), OVER_TAIL=_tail(tokens, how.over))
    return (n * blocks, heads), dict(
        S=tokens,
        BLOCKS=blocks,
        KEPT=how.kept,
        OVER=how.over,
        **parts,
        **tails,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
    )


@torch.library.custom_op("repro::attention", mutates_args=())
def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of [n, s, 3 heads d], queries, keys and values: attention [n, s, heads d], and lse [n, heads, s].

    Logits are scaled by d^-1/2.
    """
    qkv = qkv.contiguous()
    out, lse = _attention_like(qkv, heads)
    grid, how = _launch(qkv, heads, FORWARD)
    with torch.cuda.device_of(qkv):
        _attention_kernel[grid](qkv, out, lse, out.shape[-1], LOG2_E * how["D"] ** -0.5, **how)
    return out, lse


@attention.register_fake
def _attention_like(qkv, heads):
    n, tokens, width = len(qkv), qkv.shape[1], qkv.shape[-1] // 3
    return qkv.new_empty(n, tokens, width), qkv.new_empty(n, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("repro::attention_grad", mutates_args=())
def attention_grad(
    qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by qkv, and sums that add up to those of queries and of values, [n blocks, heads d]."""
    qkv, out, dout = qkv.contiguous(), out.contiguous(), dout.contiguous()
    dqkv, query_sums, value_sums = _attention_grad_like(qkv, out, lse, dout, heads)
    delta, width = torch.empty_like(lse), out.shape[-1]
    for_queries, how = _launch(qkv, heads, QUERIES)
    for_keys, how_keys = _launch(qkv, heads, KEYS)
    back = how["D"] ** -0.5
    with torch.cuda.device_of(qkv):
        _query_gradient_kernel[for_queries](
            qkv, out, dout, lse, delta, dqkv, query_sums, width, LOG2_E * back, back, **how
        )
        _key_gradient_kernel[for_keys](
            qkv, dout, lse, delta, dqkv, value_sums, width, LOG2_E * back, back, **how_keys
        )
    return dqkv, query_sums, value_sums


@attention_grad.register_fake
def _attention_grad_like(qkv, out, lse, dout, heads):
    programs = [_launch(qkv, heads, sizes)[0][0] for sizes in (QUERIES, KEYS)]
    sums = [qkv.new_empty(n, out.shape[-1], dtype=torch.float32) for n in programs]
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), *sums

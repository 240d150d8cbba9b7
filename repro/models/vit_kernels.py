"""Triton kernels of what stands between a ViT's matrix products: sum and layer norm, GELU, and attention.

The first two are bound by memory. Compiled from PyTorch, the gradient of a layer norm reads the residual
stream more often than once, that of GELU forms its output again, and erf takes longer than the memory does.
Where no gradient asks for what GELU is of, a product can form it: slower than cuBLAS by itself, faster than
both apart.

Attention here is over few tokens: 256 patches, the time and the class. cuDNN's kernels cut 258 of them into
tiles of 64 or 128, so that much of the last tile is thrown away, and pad heads of 72 to 128. These take the
last tokens in a tile of their own size, read queries, keys and values where the product before left them, and
give the gradients in the same place, with the sums that are the gradients of the biases.

The residual stream z is float32 [rows, width]; branches, and what the products take, are half precision, or
float8 where no gradient is asked for: a kernel that has a whole row at hand gives it a scale of its own.
Each kernel is an operator of its own, which `torch.compile` calls as it is.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from repro.models.norm_kernels import COMPILED, INTERPRETED

HALF = (torch.bfloat16, torch.float16)
NORM = dict(num_warps=4)
NORM_GRAD = dict(STAGES=3, num_warps=4)
NORM_PROGRAMS = 4
"""Of a gradient on each multiprocessor: each adds up what many rows give the parameters. All run at once."""
GELU = dict(BLOCK=1024, num_warps=4)
GELU_GRAD = dict(ROWS=4, COLUMNS=512, STAGES=1, num_warps=4)
GELU_PROGRAMS = 20
"""Of its gradient on each multiprocessor."""
GELU_OF_PRODUCT = dict(ROWS=256, COLUMNS=128, DEPTH=64, num_warps=8, num_stages=3)
"""A tile of the output, and so much of rows and weights at a time: the fastest of those tried on an H200."""
GELU_OF_PRODUCT_TILES = 16
"""Of its output, for each multiprocessor, at least: of fewer, the last round leaves much of a GPU idle."""
NORM_FP8 = dict(num_warps=1)
GELU_FP8 = dict(TOGETHER=4, num_warps=4)

FP8 = torch.float8_e4m3fn
FP8_MOST = torch.finfo(FP8).max
"""448."""
FP8_LEAST = 1e-30
"""A row's greatest number counts as no less: so a row of zeros has a scale too, with a finite reciprocal."""
_MOST, _LEAST = tl.constexpr(FP8_MOST), tl.constexpr(FP8_LEAST)


@triton.jit
def _load_row(at, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TOGETHER: tl.constexpr = 4):
    """D numbers, float32, in parts of D1 and (masked, if they are more) D2; the first again without a D2.

    A thread takes so many at a time, of half precision too, so that no number has to change threads.
    """
    first = tl.load(at + tl.max_contiguous(tl.arange(0, D1), TOGETHER)).to(tl.float32)
    second = first
    if D2:
        c = D1 + tl.arange(0, D2)
        second = tl.load(at + c, mask=(c < D) | (D1 + D2 == D), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_row(
    at, first, second, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TOGETHER: tl.constexpr = 4
):
    """The reverse of `_load_row`, in the type of where it goes."""
    tl.store(at + tl.max_contiguous(tl.arange(0, D1), TOGETHER), first.to(at.dtype.element_ty))
    if D2:
        c = D1 + tl.arange(0, D2)
        tl.store(at + c, second.to(at.dtype.element_ty), mask=(c < D) | (D1 + D2 == D))


@triton.jit
def _mean(first, second, D: tl.constexpr, D2: tl.constexpr):
    """Of D numbers in two parts, of which those outside are 0."""
    total = tl.sum(first, 0)
    if D2:
        total += tl.sum(second, 0)
    return total / D


@triton.jit
def _most(first, second, D2: tl.constexpr):
    """The greatest absolute value of a row in two parts, of which those outside are 0."""
    most = tl.max(tl.abs(first), 0)
    if D2:
        most = tl.maximum(most, tl.max(tl.abs(second), 0))
    return tl.maximum(most, _LEAST)


@triton.jit
def _add_norm_kernel(
    z_ptr, branch_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, scale_ptr, eps,
    BRANCH: tl.constexpr, SCALED: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """A row a program: sum = z + branch, y = layer norm of it; SCALED: y over a scale, which is stored."""
    row = tl.program_id(0).to(tl.int64)
    x1, x2 = _load_row(z_ptr + row * D, D, D1, D2)
    if BRANCH:
        b1, b2 = _load_row(branch_ptr + row * D, D, D1, D2)
        x1, x2 = x1 + b1, x2 + b2
        _store_row(sum_ptr + row * D, x1, x2, D, D1, D2)
    mean = _mean(x1, x2, D, D2)
    x1, x2 = x1 - mean, x2 - mean
    if D2:
        x2 = tl.where((D1 + tl.arange(0, D2) < D) | (D1 + D2 == D), x2, 0.0)
    rstd = 1 / tl.sqrt(_mean(x1 * x1, x2 * x2, D, D2) + eps)
    w1, w2 = _load_row(weight_ptr, D, D1, D2)
    b1, b2 = _load_row(bias_ptr, D, D1, D2)
    y1, y2 = x1 * rstd * w1 + b1, x2 * rstd * w2 + b2
    if SCALED:
        most = _most(y1, y2, D2)
        tl.store(scale_ptr + row, most / _MOST)
        y1, y2 = y1 * (_MOST / most), y2 * (_MOST / most)
    else:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    _store_row(y_ptr + row * D, y1, y2, D, D1, D2)


@triton.jit
def _add_norm_grad_kernel(
    sum_ptr, mean_ptr, rstd_ptr, weight_ptr, dy_ptr, dsum_ptr, dz_ptr, dbranch_ptr, partial_ptr, rows,
    BRANCH: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so many-th row: gradient of z, also as the branch's; sums as in `add_norm_grad`.

    A row's numbers are on their way, to shared memory, while the one before is worked on.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    w1, w2 = _load_row(weight_ptr, D, D1, D2)
    dweight1, dweight2 = tl.zeros_like(w1), tl.zeros_like(w2)
    dbias1, dbias2 = tl.zeros_like(w1), tl.zeros_like(w2)
    total1, total2 = tl.zeros_like(w1), tl.zeros_like(w2)
    wide = program.to(tl.int64) * 0  # addresses of 64 bits
    for row in tl.range(program, rows, programs, num_stages=STAGES):
        at = (wide + row) * D
        x1, x2 = _load_row(sum_ptr + at, D, D1, D2)
        dy1, dy2 = _load_row(dy_ptr + at, D, D1, D2)
        beside1, beside2 = _load_row(dsum_ptr + at, D, D1, D2)
        rstd, mean = tl.load(rstd_ptr + row), tl.load(mean_ptr + row)
        x1, x2 = (x1 - mean) * rstd, (x2 - mean) * rstd  # outside, dy is 0
        dweight1 += dy1 * x1
        dbias1 += dy1
        if D2:
            dweight2 += dy2 * x2
            dbias2 += dy2
        dy1, dy2 = dy1 * w1, dy2 * w2
        sums = tl.sum(tl.join(dy1 * x1, dy1), 0)
        if D2:
            sums += tl.sum(tl.join(dy2 * x2, dy2), 0)
        along, level = tl.split(sums / D)
        dz1 = rstd * (dy1 - level - x1 * along) + beside1
        dz2 = rstd * (dy2 - level - x2 * along) + beside2
        _store_row(dz_ptr + at, dz1, dz2, D, D1, D2)
        if BRANCH:
            _store_row(dbranch_ptr + at, dz1, dz2, D, D1, D2)
            total1 += dz1
            if D2:
                total2 += dz2
    partial_ptr += program * 3 * D
    _store_row(partial_ptr, dweight1, dweight2, D, D1, D2)
    _store_row(partial_ptr + D, dbias1, dbias2, D, D1, D2)
    _store_row(partial_ptr + 2 * D, total1, total2, D, D1, D2)


@triton.jit
def _exp2(x):
    """2^x, or 0 where that is less than a normal number, in one instruction instead of four."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _tail_of_normal(a):
    """1 less the normal distribution function of a >= 0, off by at most 7e-8 in float32.

    The logarithm of this tail, to the base 2, is nearly a parabola: here a polynomial, fitted such that the
    largest error of its power is the least possible (1.6e-8), and at most 0.2% of the tail up to 5.5.
    """
    power = -1.7992355e-6 * a + 2.8154905e-5
    power = power * a - 0.00013848803
    power = power * a - 0.00023872404
    power = power * a + 0.007179452
    power = power * a - 0.052565515
    power = power * a - 0.45918843
    power = power * a - 1.1511073
    power = power * a - 0.99999994
    return _exp2(power)


@triton.jit
def _gelu_of(x):
    a = tl.abs(x)
    return tl.maximum(x, 0.0) - a * _tail_of_normal(a)


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    c = tl.arange(0, BLOCK)
    inside = (start + c < count) | WHOLE
    x = tl.load(x_ptr + start + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + c, _gelu_of(x).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_of_product_kernel(
    x, weight, bias_ptr, y, rows, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Every so many-th tile of y, each the GELU of a product and its bias. What is beyond x, weight and y is
    read as zeros, and not written."""
    across = tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0), flatten=True):
        row, column = (tile // across) * ROWS, (tile % across) * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            total = _product(x.load([row, k]), tl.trans(weight.load([column, k])), total)
        c = column + tl.arange(0, COLUMNS)
        total += tl.load(bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
        y.store([row, column], _gelu_of(total).to(y.dtype))


@triton.jit
def _gelu_fp8_kernel(
    x_ptr, y_ptr, scale_ptr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A row a program: GELU over a scale, and that scale."""
    row = tl.program_id(0).to(tl.int64)
    x1, x2 = _load_row(x_ptr + row * D, D, D1, D2, TOGETHER)
    y1, y2 = _gelu_of(x1), _gelu_of(x2)
    most = _most(y1, y2, D2)
    tl.store(scale_ptr + row, most / _MOST)
    _store_row(y_ptr + row * D, y1 * (_MOST / most), y2 * (_MOST / most), D, D1, D2, TOGETHER)


@triton.jit
def _gelu_grad_kernel(
    x_ptr, dy_ptr, dx_ptr, partial_ptr, rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Some columns of every so many-th tile of rows, and the sums of these columns."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program, programs = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    tile_row = tl.arange(0, ROWS)
    own = tile_row[:, None] * width + c[None, :]
    wide = program.to(tl.int64) * 0  # addresses of 64 bits
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        start = (wide + tile * ROWS) * width
        mask = ((tile * ROWS + tile_row < rows)[:, None] & (c < width)[None, :]) | WHOLE
        x = tl.load(x_ptr + start + own, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + own, mask=mask, other=0.0).to(tl.float32)
        a = tl.abs(x)
        density = _exp2(a * -0.7213475204444817 * a - 1.3257480647361593)
        slope = _tail_of_normal(a) - a * density  # of x < 0, and 1 less that of x > 0
        dx = dy * tl.where(x < 0, slope, 1 - slope)
        tl.store(dx_ptr + start + own, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += dx
    tl.store(partial_ptr + program * width + c, tl.sum(total, 0), mask=(c < width) | WHOLE)


def _multiprocessors(x: Tensor) -> int:
    return _processors(x.device.index) if x.is_cuda else 1


@torch.compiler.assume_constant_result
def _processors(gpu: int | None) -> int:
    return torch.cuda.get_device_properties(gpu).multi_processor_count


def _parts(d: int) -> dict[str, int]:
    """The parts in which d numbers, of a row or a head, are read: less is thrown away than in one."""
    first = 1 << (d.bit_length() - 1)
    return dict(D=d, D1=first, D2=0 if first == d else max(16, triton.next_power_of_2(d - first)))


@torch.library.custom_op("repro::add_norm", mutates_args=())
def add_norm(
    z: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z + branch (empty without a branch), its layer norm of type `dtype`, and the mean and 1 / deviation of
    each row, float32."""
    z = z.contiguous()
    branch = None if branch is None else branch.contiguous()
    total, y, mean, rstd = _add_norm_like(z, branch, weight, bias, eps, dtype)
    with torch.cuda.device_of(z):
        _add_norm_kernel[(mean.numel(),)](
            z, z if branch is None else branch, weight, bias, z if branch is None else total, y, mean, rstd,
            mean, eps, BRANCH=branch is not None, SCALED=False, **_parts(z.shape[-1]), **NORM,
        )  # fmt: skip
    return total, y, mean, rstd


@add_norm.register_fake
def _add_norm_like(z, branch, weight, bias, eps, dtype):
    total = z.new_empty(0) if branch is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    y = torch.empty_like(z, dtype=dtype, memory_format=torch.contiguous_format)
    return total, y, z.new_empty(z.shape[:-1]), z.new_empty(z.shape[:-1])


@torch.library.custom_op("repro::add_norm_fp8", mutates_args=())
def add_norm_fp8(
    z: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z + branch (empty without a branch), and its layer norm in float8 over a float32 scale of each row.

    The scale, [..., 1], is the row's greatest absolute value over 448; a row with a NaN is NaN.
    """
    z = z.contiguous()
    branch = None if branch is None else branch.contiguous()
    total, y, scale = _add_norm_fp8_like(z, branch, weight, bias, eps)
    with torch.cuda.device_of(z):
        _add_norm_kernel[(scale.numel(),)](
            z, z if branch is None else branch, weight, bias, z if branch is None else total, y, scale, scale,
            scale, eps, BRANCH=branch is not None, SCALED=True, **_parts(z.shape[-1]), **NORM_FP8,
        )  # fmt: skip
    return total, y, scale


@add_norm_fp8.register_fake
def _add_norm_fp8_like(z, branch, weight, bias, eps):
    total = z.new_empty(0) if branch is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    y = torch.empty_like(z, dtype=FP8, memory_format=torch.contiguous_format)
    return total, y, z.new_empty(*z.shape[:-1], 1)


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
    with torch.cuda.device_of(total):
        _add_norm_grad_kernel[(len(partial),)](
            total, mean, rstd, weight, dy, dsum, dz, dz if branch_dtype is None else dbranch, partial,
            mean.numel(), BRANCH=branch_dtype is not None, **_parts(total.shape[-1]), **NORM_GRAD,
        )  # fmt: skip
    return dz, dbranch, partial


@add_norm_grad.register_fake
def _add_norm_grad_like(total, mean, rstd, weight, dy, dsum, branch_dtype):
    dz = torch.empty_like(total, memory_format=torch.contiguous_format)
    dbranch = total.new_empty(0) if branch_dtype is None else torch.empty_like(dz, dtype=branch_dtype)
    return dz, dbranch, total.new_empty(NORM_PROGRAMS * _multiprocessors(total), 3, total.shape[-1])


@torch.library.custom_op("repro::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x, in the type of x; NaN where x is infinite."""
    x = x.contiguous()
    y = torch.empty_like(x)
    count, block = x.numel(), GELU["BLOCK"]
    with torch.cuda.device_of(x):
        _gelu_kernel[(triton.cdiv(count, block),)](x, y, count, WHOLE=count % block == 0, **GELU)
    return y


@gelu.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether `gelu_of_product` is for tokens x [n, s, k] and weight [d, k]: on an NVIDIA GPU of compute
    capability 9, where it was measured, of enough tiles for each multiprocessor."""
    width, depth = weight.shape
    tiles = x.numel() // depth * width // (GELU_OF_PRODUCT["ROWS"] * GELU_OF_PRODUCT["COLUMNS"])
    there = INTERPRETED or (
        x.is_cuda
        and torch.version.hip is None
        and _major(x.device.index) == 9
        and tiles >= GELU_OF_PRODUCT_TILES * _processors(x.device.index)
    )
    return there and x.numel() > 0 and x.dtype in HALF and width % 8 == 0 and depth % 8 == 0


@torch.library.custom_op("repro::gelu_of_product", mutates_args=())
def gelu_of_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu` of x weight^T + bias, for x [..., k] and weight [d, k] of one half precision; [..., d].

    What GELU is of is not rounded in between. k and d must be multiples of 8: see `can_multiply`. Raises
    `ValueError` for other shapes, and for x and weight of two types.
    """
    (width, depth), how = weight.shape, GELU_OF_PRODUCT
    if x.shape[-1] != depth or bias.shape != (width,) or x.dtype != weight.dtype:
        shapes = f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"no product is of {shapes}, in {x.dtype} and {weight.dtype}")
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = x.new_empty(*x.shape[:-1], width)
    rows = x.numel() // depth
    tiles = triton.cdiv(rows, how["ROWS"]) * triton.cdiv(width, how["COLUMNS"])
    with torch.cuda.device_of(x):
        _gelu_of_product_kernel[(min(tiles, _multiprocessors(x)),)](
            TensorDescriptor.from_tensor(x.view(rows, depth), [how["ROWS"], how["DEPTH"]]),
            TensorDescriptor.from_tensor(weight, [how["COLUMNS"], how["DEPTH"]]),
            bias,
            TensorDescriptor.from_tensor(y.view(rows, width), [how["ROWS"], how["COLUMNS"]]),
            rows, width, depth, **how,
        )  # fmt: skip
    return y


@gelu_of_product.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("repro::gelu_fp8", mutates_args=())
def gelu_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu` of half precision x in float8 over a scale of each row, and the scale, as in `add_norm_fp8`."""
    x = x.contiguous()
    y, scale = _gelu_fp8_like(x)
    with torch.cuda.device_of(x):
        _gelu_fp8_kernel[(scale.numel(),)](x, y, scale, **_parts(x.shape[-1]), **GELU_FP8)
    return y, scale


@gelu_fp8.register_fake
def _gelu_fp8_like(x):
    y = torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format)
    return y, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("repro::gelu_grad", mutates_args=())
def gelu_grad(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gelu` by x, in the type of x, and [programs, width]: its sums over rows, in parts."""
    x, dy = x.contiguous(), dy.contiguous()
    dx, partial = _gelu_grad_like(x, dy)
    width = x.shape[-1]
    rows, columns = x.numel() // width, GELU_GRAD["COLUMNS"]
    whole = rows % GELU_GRAD["ROWS"] == 0 and width % columns == 0
    grid = (triton.cdiv(width, columns), len(partial))
    with torch.cuda.device_of(x):
        _gelu_grad_kernel[grid](x, dy, dx, partial, rows, width, WHOLE=whole, **GELU_GRAD)
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
QUERIES = {False: Blocks(64, 64, 4, 3), True: Blocks(128, 64, 4, 3)}
KEYS = {False: Blocks(64, 32, 4, 3), True: Blocks(64, 64, 4, 3)}
"""Of attention, of its gradient by queries, and of that by keys and values: for heads whose size is a power
of two, and (True) for those in two parts. The fastest of those tried on an H200 with 258 tokens."""

FEW = Blocks(16, 32, 1, 2)
"""Of the gradients of so few rows that blocks leave over."""

MOST_TOKENS = 1024
"""With more, a kernel for long sequences is the better one."""

LOG2_E = 1.4426950408889634


def can_attend(x: Tensor, dtype: torch.dtype, heads: int) -> bool:
    """Whether the kernels take tokens x [n, s, heads d] in the half precision `dtype`: on an NVIDIA GPU of
    compute capability 8 or more, few tokens, d in 16 to 128."""
    there = INTERPRETED or (x.is_cuda and torch.version.hip is None and _major(x.device.index) >= 8)
    return there and x.numel() > 0 and dtype in HALF and fit(x.shape[1], heads, x.shape[-1])


def fit(tokens: int, heads: int, width: int) -> bool:
    """Whether attention of that size is what the kernels are for: see `can_attend`."""
    d = width // heads
    return 0 < tokens <= MOST_TOKENS and heads <= 65_535 and 16 <= d <= 128 and d % 8 == 0


@torch.compiler.assume_constant_result
def _major(gpu: int | None) -> int:
    return torch.cuda.get_device_properties(gpu).major


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
def _where(
    width, FIRST: tl.constexpr, PROGRAMS: tl.constexpr, BLOCKS: tl.constexpr, S: tl.constexpr, D: tl.constexpr
):
    """Of a program: its block, and where its head of its image is in qkv, in out, in lse and in the sums.

    There are BLOCKS an image, and programs for PROGRAMS of them, from the FIRST on.
    """
    program, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    image, block = program // PROGRAMS, FIRST + program % PROGRAMS
    return (
        block.to(tl.int32), image * S * 3 * width + head * D, image * S * width + head * D,
        (image * heads + head) * S, (image * BLOCKS + block) * width + head * D,
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
    block, at, out_at, lse_at, _ = _where(width, 0, BLOCKS, BLOCKS, S, D)
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
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FIRST: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCKS: tl.constexpr, EACH: tl.constexpr, KEPT: tl.constexpr, MASK: tl.constexpr,
    OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of KEPT queries of a block of EACH, their sum, and delta."""
    block, at, out_at, lse_at, sum_at = _where(width, FIRST, PROGRAMS, BLOCKS, S, D)
    q_at = qkv_ptr + at
    k_at, v_at = q_at + width, q_at + 2 * width
    _query_gradient(
        q_at, k_at, v_at, out_ptr + out_at, dout_ptr + out_at, lse_ptr + lse_at, delta_ptr + lse_at,
        dqkv_ptr + at, sum_ptr + sum_at, 3 * width, width, block * EACH, scale, back,
        S, D, D1, D2, KEPT, MASK, OVER, OVER_TAIL,
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
    S: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FIRST: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCKS: tl.constexpr, EACH: tl.constexpr, KEPT: tl.constexpr, MASK: tl.constexpr,
    OVER: tl.constexpr, OVER_TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of KEPT keys of a block of EACH and of their values, and the sum of the latter."""
    block, at, out_at, lse_at, sum_at = _where(width, FIRST, PROGRAMS, BLOCKS, S, D)
    q_at = qkv_ptr + at
    k_at, v_at = q_at + width, q_at + 2 * width
    dk_at = dqkv_ptr + at + width
    _key_gradient(
        q_at, k_at, v_at, dout_ptr + out_at, lse_ptr + lse_at, delta_ptr + lse_at,
        dk_at, dk_at + width, sum_ptr + sum_at, 3 * width, width, block * EACH, scale, back,
        S, D, D1, D2, KEPT, MASK, OVER, OVER_TAIL,
    )  # fmt: skip


def _launch(qkv: Tensor, heads: int, sizes: dict[bool, Blocks]) -> tuple[tuple[int, int], dict]:
    """Grid and constants of a kernel."""
    n, tokens, d = len(qkv), qkv.shape[1], qkv.shape[-1] // (3 * heads)
    parts = _parts(d)
    how = sizes[parts["D2"] > 0]
    # more would not fit the 99 KB that a program has on GPUs of 8.6, 8.9 and 12.0
    if parts["D2"] > 32:
        how = replace(how, kept=64)
    elif d == 128:
        how = replace(how, num_stages=2)
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


def _launches(
    qkv: Tensor, heads: int, sizes: dict[bool, Blocks]
) -> list[tuple[tuple[int, int], dict[str, int | bool]]]:
    """Grids and constants of a gradient's kernel: for whole blocks, and for what they leave over.

    A few rows that are left over read as much as a whole block: best by programs of one warp, many of which
    run at once.
    """
    _, how = _launch(qkv, heads, sizes)
    n, each, tail = len(qkv), how.pop("KEPT"), how.pop("KEPT_TAIL")
    whole, how["EACH"] = how["S"] // each, each
    launches = []
    if whole:
        at = dict(FIRST=0, PROGRAMS=whole, KEPT=each, MASK=False)
        launches.append(((n * whole, heads), how | at))
    if tail:
        at = dict(FIRST=whole, PROGRAMS=1, KEPT=tail, MASK=True)
        if tail <= FEW.kept:
            at |= dict(OVER=FEW.over, OVER_TAIL=_tail(how["S"], FEW.over))
            at |= dict(num_warps=FEW.num_warps, num_stages=FEW.num_stages)
        launches.append(((n, heads), how | at))
    return launches


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
    back = (width // heads) ** -0.5
    factors = width, LOG2_E * back, back
    with torch.cuda.device_of(qkv):
        for grid, how in _launches(qkv, heads, QUERIES):
            _query_gradient_kernel[grid](qkv, out, dout, lse, delta, dqkv, query_sums, *factors, **how)
        for grid, how in _launches(qkv, heads, KEYS):
            _key_gradient_kernel[grid](qkv, dout, lse, delta, dqkv, value_sums, *factors, **how)
    return dqkv, query_sums, value_sums


@attention_grad.register_fake
def _attention_grad_like(qkv, out, lse, dout, heads):
    programs = [_launch(qkv, heads, sizes)[0][0] for sizes in (QUERIES, KEYS)]
    sums = [qkv.new_empty(n, out.shape[-1], dtype=torch.float32) for n in programs]
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), *sums

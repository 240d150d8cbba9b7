"""Triton kernels of `GroupNorm`: sums over pixels, and an affine map with SiLU and dropout.

Maps are channels-last [n, c, h, w]; coefficients are float32 [n, c]. With z = a * x + b,
y = dropout(silu(z)) and dz the gradient that reaches z:
`sums` and `grad_sums` reduce over pixels, `apply` forms y, `grad` forms a * dz + p + q * x + beside.

Each is an operator of its own, which `torch.compile` calls as it is. Dropout hashes the position of an
element with a seed, so that the gradient finds the same mask without storing it.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1), as the tests have it."""


def can_take(parts: tuple[Tensor, ...]) -> bool:
    """Whether the kernels take these maps: one or two of one type, on a GPU, of float32 or less.

    A launch counts images and tiles of pixels in 16 bits, so a batch is at most 65,535 images and a map
    1,000,000 pixels.
    """
    n, _, height, width = parts[0].shape
    return (
        len(parts) <= 2
        and parts[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(part.dtype == parts[0].dtype and (part.is_cuda or INTERPRETED) for part in parts)
        and 0 < n <= 65_535
        and 0 < height * width <= 1_000_000
    )


WARPS = 4
"""Warps of each program."""


@triton.jit
def _mixed(x):
    """32 well mixed bits of 32 (multiplicative hash `lowbias32` of C. Wellons, public domain)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _image_seed(seed_ptr, image):
    seed = tl.load(seed_ptr).to(tl.uint32)
    return _mixed(seed ^ _mixed(image.to(tl.uint32) + 0x9E3779B9))


@triton.jit
def _kept(seed, pixel, channel, all_channels, threshold, scale):
    """`scale` where an element is kept, 0 where it is dropped: its 32 bits are below the threshold."""
    position = pixel[:, None] * all_channels + channel[None, :]
    bits = _mixed(position.to(tl.uint32) ^ seed).to(tl.int32, bitcast=True)
    return tl.where(bits >= threshold, scale, 0.0)


@triton.jit
def _read(pointers, mask, WHOLE: tl.constexpr):
    """What lies at `pointers`, float32; where tiles are whole, without the cost of a mask."""
    if WHOLE:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sums_kernel(
    x_ptr, dy_ptr, a_ptr, b_ptr, seed_ptr, out_ptr,
    pixels, channels, all_channels, start, per_split, threshold, scale,
    BACKWARD: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # from the last image to the first: the last ones may still be cached from the kernel that wrote
    # them, and the first ones are when the next kernel starts with them
    image, split = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    x_ptr += image.to(tl.int64) * pixels * channels
    if BACKWARD:
        dy_ptr += image.to(tl.int64) * pixels * all_channels
        a = tl.load(a_ptr + image * all_channels + start + c, mask=inside, other=0.0)[None, :]
        b = tl.load(b_ptr + image * all_channels + start + c, mask=inside, other=0.0)[None, :]
        if DROPOUT:
            seed = _image_seed(seed_ptr, image)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for offset in range(0, per_split, BLOCK_P):
        p = split * per_split + offset + tl.arange(0, BLOCK_P)
        mask = (p < pixels)[:, None] & inside[None, :]
        x = _read(x_ptr + p[:, None] * channels + c[None, :], mask, WHOLE)
        if BACKWARD:
            at = p[:, None] * all_channels + (start + c)[None, :]
            g = _read(dy_ptr + at, mask, WHOLE)
            if SILU:
                z = a * x + b
                s = tl.sigmoid(z)
                g *= s * (1 + z * (1 - s))
            if DROPOUT:
                g *= _kept(seed, p, start + c, all_channels, threshold, scale)
            first += g
            second += g * x
        else:
            first += x
            second += x * x
    out = out_ptr + ((image * tl.num_programs(2) + split) * 2).to(tl.int64) * channels + c
    tl.store(out, tl.sum(first, 0), mask=inside)
    tl.store(out + channels, tl.sum(second, 0), mask=inside)


@triton.jit
def _map_kernel(
    x_ptr, dy_ptr, a_ptr, b_ptr, p_ptr, q_ptr, beside_ptr, seed_ptr, out_ptr,
    pixels, channels, all_channels, start, threshold, scale,
    BACKWARD: tl.constexpr, BESIDE: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = c < channels
    mask = (pixel < pixels)[:, None] & inside[None, :]
    narrow = image.to(tl.int64) * pixels * channels + pixel[:, None] * channels + c[None, :]
    wide = image.to(tl.int64) * pixels * all_channels + pixel[:, None] * all_channels + (start + c)[None, :]
    coefficient = image * all_channels + start + c
    a = tl.load(a_ptr + coefficient, mask=inside, other=0.0)[None, :]
    b = tl.load(b_ptr + coefficient, mask=inside, other=0.0)[None, :]
    x = _read(x_ptr + narrow, mask, WHOLE)
    z = a * x + b
    if BACKWARD:
        out = _read(dy_ptr + wide, mask, WHOLE)
        if SILU:
            s = tl.sigmoid(z)
            out *= s * (1 + z * (1 - s))
    else:
        out = z
        if SILU:
            out = z * tl.sigmoid(z)
    if DROPOUT:
        out *= _kept(_image_seed(seed_ptr, image), pixel, start + c, all_channels, threshold, scale)
    if BACKWARD:
        p = tl.load(p_ptr + coefficient, mask=inside, other=0.0)[None, :]
        q = tl.load(q_ptr + coefficient, mask=inside, other=0.0)[None, :]
        out = a * out + p + q * x
        if BESIDE:
            out += _read(beside_ptr + narrow, mask, WHOLE)
        tl.store(out_ptr + narrow, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + wide, out.to(out_ptr.dtype.element_ty), mask=mask)


def _block(channels: int) -> tuple[int, int]:
    """Channels and pixels of a tile: whole memory accesses, and 2048 elements."""
    width = channels & -channels  # the largest power of two that divides it
    width = min(width, 128) if width >= 16 else min(128, triton.next_power_of_2(channels))
    return width, max(16, 2048 // width)


def _threshold(dropout: float) -> tuple[int, float]:
    """Where the bits of a kept element start, as a signed number, and what it is multiplied by."""
    return min(int(dropout * 2**32) - 2**31, 2**31 - 1), 1 / (1 - dropout) if dropout < 1 else 0.0


def _launch_sums(x, start, a, b, dy, seed, silu, dropout) -> Tensor:
    n, channels, height, width = x.shape
    pixels = height * width
    block_c, block_p = _block(channels)
    columns = triton.cdiv(channels, block_c)
    splits = max(1, min(pixels // 256, 1024 // max(n * columns, 1)))
    per_split = triton.cdiv(triton.cdiv(pixels, splits), block_p) * block_p
    splits = triton.cdiv(pixels, per_split)
    out = torch.empty(n, splits, 2, channels, device=x.device)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(x):
        _sums_kernel[columns, n, splits](
            x, x if dy is None else dy, x if a is None else a, x if b is None else b,
            x if seed is None else seed, out, pixels, channels,
            channels if dy is None else dy.shape[1], start, per_split, *_threshold(dropout),
            BACKWARD=dy is not None, SILU=silu, DROPOUT=dropout > 0, BLOCK_P=block_p, BLOCK_C=block_c,
            WHOLE=channels % block_c == 0 and pixels == splits * per_split, num_warps=WARPS,
        )  # fmt: skip
    return out.sum(1) if splits > 1 else out.view(n, 2, channels)


def _launch_map(x, start, a, b, p, q, dy, beside, seed, silu, dropout, out) -> None:
    n, channels, height, width = x.shape
    pixels = height * width
    block_c, block_p = _block(channels)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(x):
        _map_kernel[triton.cdiv(channels, block_c), triton.cdiv(pixels, block_p), n](
            x, x if dy is None else dy, a, b, a if p is None else p, a if q is None else q,
            x if beside is None else beside.contiguous(memory_format=torch.channels_last),
            x if seed is None else seed, out, pixels, channels, a.shape[1], start, *_threshold(dropout),
            BACKWARD=dy is not None, BESIDE=beside is not None, SILU=silu, DROPOUT=dropout > 0,
            BLOCK_P=block_p, BLOCK_C=block_c, WHOLE=channels % block_c == 0 and pixels % block_p == 0,
            num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op("repro::norm_sums", mutates_args=())
def sums(x: Tensor) -> Tensor:
    """Sums over the pixels of x and of x^2: [n, c, h, w] to float32 [n, 2, c]."""
    return _launch_sums(x, 0, None, None, None, None, False, 0.0)


@sums.register_fake
def _(x):
    return x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("repro::norm_apply", mutates_args=())
def apply(
    first: Tensor,
    second: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    silu: bool,
    dropout: float,
    dtype: torch.dtype,
) -> Tensor:
    """dropout(silu(a * x + b)) for x = `first` and `second` joined: [n, c, h, w] of `dtype`."""
    out = _like(first, a.shape[1], dtype)
    _launch_map(first, 0, a, b, None, None, None, None, seed, silu, dropout, out)
    if second is not None:
        _launch_map(second, first.shape[1], a, b, None, None, None, None, seed, silu, dropout, out)
    return out


@apply.register_fake
def _(first, second, a, b, seed, silu, dropout, dtype):
    return _like(first, a.shape[1], dtype)


@torch.library.custom_op("repro::norm_grad_sums", mutates_args=())
def grad_sums(
    x: Tensor, start: int, a: Tensor, b: Tensor, dy: Tensor, seed: Tensor | None, silu: bool, dropout: float
) -> Tensor:
    """Sums over the pixels of dz and of dz * x, for the channels of dy from `start`: float32 [n, 2, c]."""
    return _launch_sums(x, start, a, b, dy, seed, silu, dropout)


@grad_sums.register_fake
def _(x, start, a, b, dy, seed, silu, dropout):
    return x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("repro::norm_grad", mutates_args=())
def grad(
    x: Tensor,
    start: int,
    a: Tensor,
    b: Tensor,
    p: Tensor,
    q: Tensor,
    dy: Tensor,
    beside: Tensor | None,
    seed: Tensor | None,
    silu: bool,
    dropout: float,
) -> Tensor:
    """a * dz + p + q * x + beside, the gradient of x, for the channels of dy from `start`: like x."""
    out = _like(x, x.shape[1])
    _launch_map(x, start, a, b, p, q, dy, beside, seed, silu, dropout, out)
    return out


@grad.register_fake
def _(x, start, a, b, p, q, dy, beside, seed, silu, dropout):
    return _like(x, x.shape[1])


def _like(x: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)

"""Triton kernels of `GroupNorm` with scale, shift, SiLU and dropout: `normalise` and its gradient.

Many programs share an image, each with a tile of it. Each gives the sums over its tile; the last one of an
image to do so turns all sums into coefficients, for which the others wait, and then all go over their tiles
again, which the GPU's L2 cache still holds. So a map comes from memory once, where one kernel for the sums
and another for the result read it twice. Waiting works because a GPU starts programs in order, and all of
one image run at once: `share_out` sees to that.

Maps are channels-last [n, c, h, w], coefficients float32 [n, c]. For x in one or two parts (the first
may be a sum that is formed here), m = x + o, and mean and variance of m over a group:

    z = a * x + b    with  a = weight * k / sqrt(variance + eps),  b = bias * k + t - a * e,  e = mean - o
    y = dropout(silu(z))

Dropout hashes the position of an element with a seed, so that the gradient finds the same mask without
storing it. Each kernel is an operator of its own, which `torch.compile` calls as it is.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton runs its kernels on the CPU (TRITON_INTERPRET=1), as the tests have it."""

COMPILED = tl.constexpr(not INTERPRETED)

LAUNCHES = range(2 if INTERPRETED else 1)
"""The interpreter runs programs one after another, so none can wait: the second launch finds all sums."""

WARPS, REGISTERS = 8, 64
"""Of each program, and of each thread at most: so four programs run on a multiprocessor of any GPU."""

FORWARD_TILE, BACKWARD_TILE = 16_384, 32_768
"""Elements of a program's tile: small enough that the tiles of all running programs stay in L2."""

CHUNK = 2_048
"""Elements of a tile that a program takes at a time: 16 bytes a thread in bfloat16."""


# How the work is shared out -------------------------------------------------------------------------


def can_take(parts: tuple[Tensor, ...]) -> bool:
    """Whether the kernels take these maps: one or two of one type, on an NVIDIA GPU, of float32 or less.

    A launch counts images in 16 bits, so a batch is at most 65,535 of them. Tiles lie in one part, so parts
    whose widths share no large power of two would take more programs an image than run at once.
    """
    n, _, height, width = parts[0].shape
    return (
        len(parts) <= 2
        and torch.version.hip is None
        and parts[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(part.dtype == parts[0].dtype and (part.is_cuda or INTERPRETED) for part in parts)
        and 0 < n <= 65_535
        and 0 < height * width <= 1_000_000
        and sum(part.shape[1] for part in parts) // _tile_width(parts)
        <= _programs_that_may_wait(parts[0].device.index)
    )


@dataclass(frozen=True)
class Share:
    """Each program takes `chunks` times `pixels` by `channels`; an image has `splits` by `columns`."""

    pixels: int
    channels: int
    chunks: int
    splits: int
    columns: int


def share_out(parts: tuple[Tensor, ...], tile: int) -> Share:
    """Tiles of `tile` elements of these maps, or larger ones where the programs of an image would be too
    many to run at once (twice as many as may wait for each other always do)."""
    widths = [part.shape[1] for part in parts]
    pixels = parts[0].shape[2] * parts[0].shape[3]
    channels = _tile_width(parts)
    chunk = min(CHUNK // channels, triton.next_power_of_2(pixels))
    columns = sum(widths) // channels
    most = _programs_that_may_wait(parts[0].device.index)
    chunks = max(1, tile // channels // chunk)
    while (splits := triton.cdiv(pixels, chunks * chunk)) * columns > most and splits > 1:
        chunks *= 2  # ends: can_take sees to it that one split fits
    return Share(chunk, channels, min(chunks, triton.cdiv(pixels, chunk)), splits, columns)


def _tile_width(parts: tuple[Tensor, ...]) -> int:
    """Channels of a tile: the largest power of two, up to 64, that divides each part."""
    return min(64, *(part.shape[1] & -part.shape[1] for part in parts))


@torch.compiler.assume_constant_result
def _programs_that_may_wait(gpu: int | None) -> int:
    return 1024 if INTERPRETED else 2 * torch.cuda.get_device_properties(gpu).multi_processor_count


def _threshold(dropout: float) -> tuple[int, float]:
    """Where the bits of a kept element start, as a signed number, and what it is multiplied by."""
    return min(int(dropout * 2**32) - 2**31, 2**31 - 1), 1 / (1 - dropout) if dropout < 1 else 0.0


# Parts of both kernels ------------------------------------------------------------------------------


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)) to float32's last digits, in four instructions instead of twelve."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.ftz.f32 e, $1, 0fBFB8AA3B;  // -1 / ln 2
            ex2.approx.ftz.f32 e, e;
            add.ftz.f32 e, e, 0f3F800000;  // 1
            rcp.approx.ftz.f32 $0, e;
            }""",
            "=r,r",
            [z],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(z)


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
    """`scale` where an element is kept, 0 where it is dropped: its 32 bits are below the threshold.

    The bits are those of `_mixed` but for its first and last line: of a well mixed seed and a position, the
    high bits, which decide, are as good without, and here each instruction counts.
    """
    position = pixel[:, None] * all_channels + channel[None, :]
    bits = (position.to(tl.uint32) ^ seed) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return tl.where(bits.to(tl.int32, bitcast=True) >= threshold, scale, 0.0)


@triton.jit
def _read(pointers, mask, WHOLE: tl.constexpr):
    """What lies at `pointers`, float32; where tiles are whole, without the cost of a mask."""
    if WHOLE:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointers, values, mask, WHOLE: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit
def _add_pairs(first, second, other_first, other_second):
    return first + other_first, second + other_second


@triton.jit
def _give_sums(first, second, partial_ptr, counter_ptr, image, split, channel, channels: tl.constexpr,
               SPLITS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Store this tile's sums over its pixels; true for the last of the image's programs to do so."""
    if COMPILED:
        first, second = tl.reduce((first, second), 0, _add_pairs)  # both at once: half the barriers
    else:
        first, second = tl.sum(first, 0), tl.sum(second, 0)
    partial_ptr += (image * SPLITS + split).to(tl.int64) * 2 * channels + channel
    tl.store(partial_ptr, first)
    tl.store(partial_ptr + channels, second)
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(counter_ptr + image, 1, sem="acq_rel") % (SPLITS * COLUMNS) == SPLITS * COLUMNS - 1


@triton.jit
def _all_sums(partial_ptr, image, groups: tl.constexpr, size: tl.constexpr,
              GROUPS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """All channels as groups by members, which of them there are, and the sums of all tiles of an image."""
    channels: tl.constexpr = groups * size
    g, inner = tl.arange(0, GROUPS)[:, None], tl.arange(0, SIZE)[None, :]
    every, inside = g * size + inner, (g < groups) & (inner < size)
    partial_ptr += (image * SPLITS).to(tl.int64) * 2 * channels + every
    first, second = tl.zeros(every.shape, tl.float32), tl.zeros(every.shape, tl.float32)
    for split in tl.range(SPLITS, loop_unroll_factor=4):
        from_ptr = partial_ptr + split * 2 * channels
        first += tl.load(from_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        second += tl.load(from_ptr + channels, mask=inside, other=0.0, cache_modifier=".cg")
    return every, inside, first, second


@triton.jit
def _announce(flag_ptr, image):
    """Let the image's programs go on: all that this one has stored is there."""
    tl.debug_barrier()
    tl.atomic_add(flag_ptr + image, 1, sem="release")


@triton.jit
def _wait(flag_ptr, image, WAIT: tl.constexpr):
    """Wait for the image's last program; what it stored is then visible."""
    if WAIT:
        while tl.atomic_add(flag_ptr + image, 0, sem="acquire") == 0:
            pass
    tl.debug_barrier()


# Forwards -------------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    first_ptr, second_ptr, more_1_ptr, more_2_ptr, weight_ptr, bias_ptr, k_ptr, t_ptr, o_ptr, seed_ptr,
    partial_ptr, counter_ptr, flag_ptr, stats_ptr, y_ptr, total_ptr,
    o_row, eps, threshold, scale,
    MORE: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr,
    DROPOUT: tl.constexpr, pixels: tl.constexpr, channels_1: tl.constexpr, channels: tl.constexpr,
    groups: tl.constexpr, size: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    # from the last image to the first: the last ones may still be cached from the kernel that wrote
    # them, and the first ones are when the next kernel starts with them
    image = tl.num_programs(1) - 1 - tl.program_id(1)
    column, split = tl.program_id(0) % COLUMNS, tl.program_id(0) // COLUMNS
    if column * BLOCK_C < channels_1:
        _norm_program(
            first_ptr, more_1_ptr, more_2_ptr, weight_ptr, bias_ptr, k_ptr, t_ptr, o_ptr, seed_ptr,
            partial_ptr, counter_ptr, flag_ptr, stats_ptr, y_ptr, total_ptr, o_row, eps, threshold, scale,
            image, column, split, 0, channels_1,
            MORE, SCALED, SHIFTED, OFFSET, SILU, DROPOUT, pixels, channels, groups, size, GROUPS, SIZE,
            BLOCK_P, BLOCK_C, CHUNKS, SPLITS, COLUMNS, WHOLE, WAIT,
        )  # fmt: skip
    elif channels_1 < channels:
        _norm_program(
            second_ptr, second_ptr, second_ptr, weight_ptr, bias_ptr, k_ptr, t_ptr, o_ptr, seed_ptr,
            partial_ptr, counter_ptr, flag_ptr, stats_ptr, y_ptr, total_ptr, o_row, eps, threshold, scale,
            image, column, split, channels_1, channels - channels_1,
            0, SCALED, SHIFTED, OFFSET, SILU, DROPOUT, pixels, channels, groups, size, GROUPS, SIZE,
            BLOCK_P, BLOCK_C, CHUNKS, SPLITS, COLUMNS, WHOLE, WAIT,
        )  # fmt: skip


@triton.jit
def _norm_program(
    x_ptr, more_1_ptr, more_2_ptr, weight_ptr, bias_ptr, k_ptr, t_ptr, o_ptr, seed_ptr,
    partial_ptr, counter_ptr, flag_ptr, stats_ptr, y_ptr, total_ptr, o_row, eps, threshold, scale,
    image, column, split, start: tl.constexpr, own_channels: tl.constexpr,
    MORE: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, OFFSET: tl.constexpr, SILU: tl.constexpr,
    DROPOUT: tl.constexpr, pixels: tl.constexpr, channels: tl.constexpr,
    groups: tl.constexpr, size: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One tile of the part x of the map, whose channels start at `start`."""
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    from_pixel = split * (CHUNKS * BLOCK_P)
    own = image.to(tl.int64) * (pixels * own_channels) + (c - start)[None, :]
    x_ptr, more_1_ptr, more_2_ptr = x_ptr + own, more_1_ptr + own, more_2_ptr + own
    total_ptr += own
    y_ptr += image.to(tl.int64) * (pixels * channels) + c[None, :]
    stats_ptr += image * 5 * channels
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for chunk in tl.range(CHUNKS, loop_unroll_factor=2 if MORE else 4):
        p = from_pixel + chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None]
        x = _read(x_ptr + p[:, None] * own_channels, inside, WHOLE)
        if MORE > 0:
            x += _read(more_1_ptr + p[:, None] * own_channels, inside, WHOLE)
            if MORE > 1:
                x += _read(more_2_ptr + p[:, None] * own_channels, inside, WHOLE)
            _write(total_ptr + p[:, None] * own_channels, x, inside, WHOLE)
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)  # as it is read again
        first += x
        second += x * x
    if _give_sums(first, second, partial_ptr, counter_ptr, image, split, c, channels, SPLITS, COLUMNS):
        every, inside, sum_x, sum_xx = _all_sums(partial_ptr, image, groups, size, GROUPS, SIZE, SPLITS)
        m, mm = sum_x / pixels, sum_xx / pixels
        tl.store(stats_ptr + 4 * channels + every, m, mask=inside)
        if OFFSET:
            o = tl.load(o_ptr + image * o_row + every, mask=inside, other=0.0)
            mm += 2 * o * m + o * o
            m += o
        mean, square = tl.sum(m, 1) / size, tl.sum(mm, 1) / size
        rstd = (1 / tl.sqrt_rn(tl.maximum(square - mean * mean, 0.0) + eps))[:, None]
        every_a = rstd * tl.load(weight_ptr + every, mask=inside, other=0.0)
        every_b = tl.load(bias_ptr + every, mask=inside, other=0.0)
        if SCALED:
            k = tl.load(k_ptr + image * channels + every, mask=inside, other=0.0)
            every_a *= k
            every_b *= k
        if SHIFTED:
            every_b += tl.load(t_ptr + image * channels + every, mask=inside, other=0.0)
        e = mean[:, None] + tl.zeros(every.shape, tl.float32)
        if OFFSET:
            e -= o
        tl.store(stats_ptr + every, every_a, mask=inside)
        tl.store(stats_ptr + channels + every, every_b - every_a * e, mask=inside)
        tl.store(stats_ptr + 2 * channels + every, rstd + tl.zeros(every.shape, tl.float32), mask=inside)
        tl.store(stats_ptr + 3 * channels + every, e, mask=inside)
        _announce(flag_ptr, image)
    _wait(flag_ptr, image, WAIT)
    a = tl.load(stats_ptr + c, cache_modifier=".cg")[None, :]
    b = tl.load(stats_ptr + channels + c, cache_modifier=".cg")[None, :]
    if DROPOUT:
        seed = _image_seed(seed_ptr, image)
    if MORE > 0:
        x_ptr = total_ptr
    for chunk in tl.range(CHUNKS, loop_unroll_factor=4):
        p = from_pixel + chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None]
        z = a * _read(x_ptr + p[:, None] * own_channels, inside, WHOLE) + b
        if SILU:
            z *= _sigmoid(z)
        if DROPOUT:
            z *= _kept(seed, p, c, channels, threshold, scale)
        _write(y_ptr + p[:, None] * channels, z, inside, WHOLE)


# The gradient ---------------------------------------------------------------------------------------


@triton.jit
def _grad_kernel(
    first_ptr, second_ptr, dy_ptr, beside_1_ptr, beside_2_ptr, seed_ptr,
    partial_ptr, counter_ptr, flag_ptr, stats_ptr, found_ptr, dfirst_ptr, dsecond_ptr,
    threshold, scale,
    BESIDE: tl.constexpr, SILU: tl.constexpr,
    DROPOUT: tl.constexpr, pixels: tl.constexpr, channels_1: tl.constexpr, channels: tl.constexpr,
    groups: tl.constexpr, size: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    image = tl.num_programs(1) - 1 - tl.program_id(1)
    column, split = tl.program_id(0) % COLUMNS, tl.program_id(0) // COLUMNS
    if column * BLOCK_C < channels_1:
        _grad_program(
            first_ptr, dy_ptr, beside_1_ptr, beside_2_ptr, seed_ptr,
            partial_ptr, counter_ptr, flag_ptr, stats_ptr, found_ptr, dfirst_ptr, threshold, scale,
            image, column, split, 0, channels_1,
            BESIDE, SILU, DROPOUT, pixels, channels, groups, size, GROUPS, SIZE,
            BLOCK_P, BLOCK_C, CHUNKS, SPLITS, COLUMNS, WHOLE, WAIT,
        )  # fmt: skip
    elif channels_1 < channels:
        _grad_program(
            second_ptr, dy_ptr, beside_2_ptr, beside_2_ptr, seed_ptr,
            partial_ptr, counter_ptr, flag_ptr, stats_ptr, found_ptr, dsecond_ptr, threshold, scale,
            image, column, split, channels_1, channels - channels_1,
            BESIDE, SILU, DROPOUT, pixels, channels, groups, size, GROUPS, SIZE,
            BLOCK_P, BLOCK_C, CHUNKS, SPLITS, COLUMNS, WHOLE, WAIT,
        )  # fmt: skip


@triton.jit
def _dz(x, dy, a, b, seed, pixel, channel, all_channels, threshold, scale,
        SILU: tl.constexpr, DROPOUT: tl.constexpr):  # fmt: skip
    """The gradient of z, from that of y."""
    if SILU:
        z = a * x + b
        s = _sigmoid(z)
        dy *= s * (1 + z * (1 - s))
    if DROPOUT:
        dy *= _kept(seed, pixel, channel, all_channels, threshold, scale)
    return dy


@triton.jit
def _grad_program(
    x_ptr, dy_ptr, beside_ptr, again_ptr, seed_ptr, partial_ptr, counter_ptr, flag_ptr, stats_ptr, found_ptr,
    dx_ptr, threshold, scale, image, column, split, start: tl.constexpr, own_channels: tl.constexpr,
    BESIDE: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, pixels: tl.constexpr,
    channels: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One tile of the part x of the map, whose channels start at `start`."""
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    from_pixel = split * (CHUNKS * BLOCK_P)
    own = image.to(tl.int64) * (pixels * own_channels) + (c - start)[None, :]
    x_ptr, dx_ptr, beside_ptr, again_ptr = x_ptr + own, dx_ptr + own, beside_ptr + own, again_ptr + own
    dy_ptr += image.to(tl.int64) * (pixels * channels) + c[None, :]
    stats_ptr += image * 5 * channels
    found_ptr += image * 5 * channels
    a, b = tl.load(stats_ptr + c)[None, :], tl.load(stats_ptr + channels + c)[None, :]
    seed = tl.zeros([], tl.uint32)
    if DROPOUT:
        seed = _image_seed(seed_ptr, image)
    first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for chunk in tl.range(CHUNKS, loop_unroll_factor=2):
        p = from_pixel + chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None]
        x = _read(x_ptr + p[:, None] * own_channels, inside, WHOLE)
        dy = _read(dy_ptr + p[:, None] * channels, inside, WHOLE)
        dz = _dz(x, dy, a, b, seed, p, c, channels, threshold, scale, SILU, DROPOUT)
        first += dz
        second += dz * x
    if _give_sums(first, second, partial_ptr, counter_ptr, image, split, c, channels, SPLITS, COLUMNS):
        every, inside, db, dxb = _all_sums(partial_ptr, image, groups, size, GROUPS, SIZE, SPLITS)
        every_a = tl.load(stats_ptr + every, mask=inside, other=0.0)
        rstd = tl.load(stats_ptr + 2 * channels + every, mask=inside, other=0.0)
        e = tl.load(stats_ptr + 3 * channels + every, mask=inside, other=0.0)
        mean = tl.load(stats_ptr + 4 * channels + every, mask=inside, other=0.0)
        # what reaches each element of a group through the group's mean, and through its variance
        by_mean = (tl.sum(db * every_a, 1) / size)[:, None]
        by_spread = rstd * rstd * (tl.sum((dxb - e * db) * every_a, 1) / size)[:, None]
        tl.store(found_ptr + every, db, mask=inside)
        tl.store(found_ptr + channels + every, (dxb - e * db) * rstd, mask=inside)
        do = every_a * db - by_mean - by_spread * (mean - e)
        tl.store(found_ptr + 2 * channels + every, do, mask=inside)
        tl.store(found_ptr + 3 * channels + every, (by_spread * e - by_mean) / pixels, mask=inside)
        tl.store(found_ptr + 4 * channels + every, -by_spread / pixels, mask=inside)
        _announce(flag_ptr, image)
    _wait(flag_ptr, image, WAIT)
    constant = tl.load(found_ptr + 3 * channels + c, cache_modifier=".cg")[None, :]
    by_x = tl.load(found_ptr + 4 * channels + c, cache_modifier=".cg")[None, :]
    for chunk in tl.range(CHUNKS, loop_unroll_factor=2):
        p = from_pixel + chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < pixels)[:, None]
        x = _read(x_ptr + p[:, None] * own_channels, inside, WHOLE)
        dy = _read(dy_ptr + p[:, None] * channels, inside, WHOLE)
        dz = _dz(x, dy, a, b, seed, p, c, channels, threshold, scale, SILU, DROPOUT)
        dx = a * dz + constant + by_x * x
        if BESIDE > 0:
            dx += _read(beside_ptr + p[:, None] * own_channels, inside, WHOLE)
        if BESIDE > 1:
            dx += _read(again_ptr + p[:, None] * own_channels, inside, WHOLE)
        _write(dx_ptr + p[:, None] * own_channels, dx, inside, WHOLE)


# As operators ---------------------------------------------------------------------------------------


def _channels_last(map: Tensor) -> Tensor:
    return map.contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, channels: int) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _total_like(first: Tensor, more: Tensor | None) -> Tensor:
    return first.new_empty(0) if more is None else _like(first, first.shape[1])


def _like_second(first: Tensor, second: Tensor | None) -> Tensor:
    return first.new_empty(0) if second is None else _like(second, second.shape[1])


def _numbers(share: Share, first: Tensor, channels: int, groups: int) -> dict:
    """The compile-time numbers of both kernels: also sizes, so that addresses take few registers."""
    pixels, size = first.shape[2] * first.shape[3], channels // groups
    return dict(
        pixels=pixels,
        channels_1=first.shape[1],
        channels=channels,
        groups=groups,
        size=size,
        GROUPS=triton.next_power_of_2(groups),
        SIZE=triton.next_power_of_2(size),
        BLOCK_P=share.pixels,
        BLOCK_C=share.channels,
        CHUNKS=share.chunks,
        SPLITS=share.splits,
        COLUMNS=share.columns,
        WHOLE=pixels % (share.pixels * share.chunks) == 0,
        WAIT=share.splits * share.columns > 1 and not INTERPRETED,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )


def _scratch(share: Share, n: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs leave their sums, count themselves, and find that they may go on."""
    counter, flag = torch.zeros(2, n, dtype=torch.int32, device=device)
    return torch.empty(n, share.splits, 2, channels, device=device), counter, flag


@torch.library.custom_op("repro::normalise", mutates_args=())
def normalise(
    first: Tensor,
    second: Tensor | None,
    more_1: Tensor | None,
    more_2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    k: Tensor | None,
    t: Tensor | None,
    o: Tensor | None,
    seed: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [n, c, h, w]; what the gradient needs: a, b, 1/deviation, e, mean of x, [n, 5, c]; and the first part
    with `more_1` and `more_2` added to it, where they are (else it is empty)."""
    parts = (first,) if second is None else (first, second)
    n, channels = len(first), len(weight)
    share = share_out(parts, FORWARD_TILE)
    scratch = _scratch(share, n, channels, first.device)
    first = _channels_last(first)
    second = first if second is None else _channels_last(second)
    more = [None if given is None else _channels_last(given) for given in (more_1, more_2)]
    k, t = (None if given is None else given.contiguous() for given in (k, t))
    o = o if o is None or o.stride(1) == 1 else o.contiguous()
    y, total = _like(first, channels), _total_like(first, more_1)
    stats = torch.empty(n, 5, channels, device=first.device)
    with torch.cuda.device_of(first):
        for _ in LAUNCHES:
            _norm_kernel[share.splits * share.columns, n](
                first, second, *(first if given is None else given for given in more),
                weight, bias, *(weight if given is None else given for given in (k, t, o)),
                weight if seed is None else seed, *scratch, stats, y, y if more_1 is None else total,
                0 if o is None else o.stride(0), eps, *_threshold(dropout),
                MORE=(more_1 is not None) + (more_2 is not None), SCALED=k is not None, SHIFTED=t is not None,
                OFFSET=o is not None, SILU=silu, DROPOUT=dropout > 0,
                **_numbers(share, first, channels, groups),
            )  # fmt: skip
    return y, stats, total


@normalise.register_fake
def _(first, second, more_1, more_2, weight, bias, k, t, o, seed, groups, eps, silu, dropout):
    stats = weight.new_empty(len(first), 5, len(weight), dtype=torch.float32)
    return _like(first, len(weight)), stats, _total_like(first, more_1)


@torch.library.custom_op("repro::normalise_grad", mutates_args=())
def normalise_grad(
    first: Tensor,
    second: Tensor | None,
    dy: Tensor,
    beside_1: Tensor | None,
    beside_2: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the parts (plus what is beside them), and [n, 5, c]: gradients of bias * k, weight * k and
    o (and two coefficients of the gradient).

    Without a second part its gradient is empty, and `beside_2` is added to the first's too.
    """
    parts = (first,) if second is None else (first, second)
    n, channels = len(first), dy.shape[1]
    share = share_out(parts, BACKWARD_TILE)
    scratch = _scratch(share, n, channels, first.device)
    dfirst, dsecond = _like(first, first.shape[1]), _like_second(first, second)
    found = torch.empty(n, 5, channels, device=first.device)
    first, dy = _channels_last(first), _channels_last(dy)
    second = first if second is None else _channels_last(second)
    beside = [None if given is None else _channels_last(given) for given in (beside_1, beside_2)]
    copies = 0 if beside_1 is None else 1 if beside_2 is None or len(parts) == 2 else 2
    with torch.cuda.device_of(first):
        for _ in LAUNCHES:
            _grad_kernel[share.splits * share.columns, n](
                first, second, dy, *(first if given is None else given for given in beside),
                stats if seed is None else seed, *scratch, stats, found, dfirst,
                dsecond if len(parts) == 2 else dfirst, *_threshold(dropout),
                BESIDE=copies, SILU=silu, DROPOUT=dropout > 0, **_numbers(share, first, channels, groups),
            )  # fmt: skip
    return dfirst, dsecond, found


@normalise_grad.register_fake
def _(first, second, dy, beside_1, beside_2, seed, stats, groups, silu, dropout):
    found = stats.new_empty(len(first), 5, dy.shape[1])
    return _like(first, first.shape[1]), _like_second(first, second), found

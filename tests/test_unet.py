"""The ADM UNet against the released tensors' shapes, and against an independent float64 computation."""

import dataclasses
import math
from collections import Counter

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from released import listed
from torch.utils._python_dispatch import TorchDispatchMode

from repro import config, presets
from repro.models.norm import GroupNorm
from repro.models.unet import (
    ADMUNet,
    Attention,
    InputConvolution,
    Map,
    OutputConvolution,
    Resample,
    ResidualBlock,
    SpatialTransformer,
    sinusoids,
)  # fmt: skip

# ADM's ImageNet-64 network (openai/guided-diffusion), whose head also predicts a variance
ADM64 = config.UNet(
    channels=192,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention=(32, 16, 8),
    head_channels=64,
    heads=None,
    dropout=0.1,
    null_class=False,
)
TINY = config.UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)
LDM = dict(scale_shift_norm=False, resample_in_blocks=False, transformer_depth=1, context_width=12)
"""What makes of it an LDM's network, which `test_ldm` tests."""


def on_meta(
    model: config.UNet, resolution: int, in_channels: int, classes: int, out_channels=None
) -> ADMUNet:
    with torch.device("meta"):
        return ADMUNet(model, resolution, in_channels, classes, out_channels)


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def scramble(net: torch.nn.Module) -> torch.nn.Module:
    """`net` in float64, evaluating, with random values in every parameter (at its start many are zero)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            std = 0.5 if parameter.ndim == 1 else 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return net.double().eval()


def tiny(classes: int = 5, resolution: int = 8, **changes) -> ADMUNet:
    return scramble(ADMUNet(dataclasses.replace(TINY, **changes), resolution, 3, classes))


def noise(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TIMES = torch.tensor([0.0, 999.0, 250.5])
LABELS = torch.tensor([4, 0, 5])


# Against the released checkpoint


def test_shapes_are_those_of_the_released_adm_network():
    file = listed("adm-imagenet64-unet (64x64_diffusion.pt)")
    net = on_meta(ADM64, 64, 3, classes=1000, out_channels=6)
    ours = Counter(tuple(value.shape) for value in net.state_dict().values())
    # ADM's attention has 1-D convolutions of kernel 1 where ours has linear layers
    theirs = Counter(
        tuple(shape[:2] if name.endswith(("qkv.weight", "proj_out.weight")) else shape)
        for name, shape in file["state_dict"].items()
    )
    assert ours == theirs
    assert count(net) == file["parameters"]


def test_parameter_count_of_the_released_adm_network():
    assert count(on_meta(ADM64, 64, 3, classes=1000, out_channels=6)) == 295_904_454


@pytest.mark.parametrize(
    "scale_shift_norm, resample_in_blocks, millions",
    [(False, False, 111), (True, True, 129)],
)
def test_the_ablation_network_is_larger_than_the_88m_of_vit_base(
    scale_shift_norm, resample_in_blocks, millions
):
    how = {"scale_shift_norm": scale_shift_norm, "resample_in_blocks": resample_in_blocks}
    model, data = presets.ABLATION_UNET
    net = on_meta(dataclasses.replace(model, **how), data.resolution, data.channels, data.classes)
    assert round(count(net) / 1e6) == millions


# Group norm


def group_norm_inputs(dtype, mean=0.0):
    """Images whose channels differ in mean and spread, and a scale and a shift per image."""
    spread = torch.linspace(0.5, 2, 64, dtype=torch.float64)[None, :, None, None]
    offset = noise(1, 64, 1, 1, seed=3)
    x = (noise(3, 64, 5, 7) * spread + offset + mean).to(dtype)
    return x, 0.3 * noise(3, 64, seed=4).to(dtype), noise(3, 64, seed=5).to(dtype)


def reference_group_norm(norm, x, scale=None, shift=None):
    y = F.group_norm(x, 32, norm.weight, norm.bias, 1e-5)
    return y if scale is None else y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    "dtype, mean, tolerance",
    [
        (torch.float64, 0, 1e-12),
        (torch.float64, 1000, 1e-7),
        (torch.float32, 0, 1e-5),
        (torch.float32, 10, 1e-3),
        (torch.float32, -10, 1e-3),
    ],
)
def test_group_norm_and_its_gradients(dtype, mean, tolerance, modulated):
    norm = scramble(GroupNorm(64))
    inputs = [tensor.requires_grad_() for tensor in group_norm_inputs(dtype, mean)]
    upstream = noise(3, 64, 5, 7, seed=6)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = reference_group_norm(norm, *(exact if modulated else exact[:1]))
    wanted = (exact if modulated else exact[:1]) + list(norm.parameters())
    expected_grads = torch.autograd.grad((expected * upstream).sum(), wanted)

    norm = norm.to(dtype)
    y = norm(inputs[0], **(dict(zip(("scale", "shift"), inputs[1:], strict=True)) if modulated else {}))
    grads = torch.autograd.grad(
        (y * upstream.to(dtype)).sum(), (inputs if modulated else inputs[:1]) + list(norm.parameters())
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    for grad, wanted_grad in zip(grads, expected_grads, strict=True):
        atol = tolerance * wanted_grad.abs().max().item()
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=0, atol=atol)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.1])
def test_group_norm_of_a_constant_is_its_bias(value):
    norm = scramble(GroupNorm(64)).float()
    y = norm(torch.full((2, 64, 5, 7), value))
    torch.testing.assert_close(y, norm.bias[None, :, None, None].expand_as(y), rtol=0, atol=1e-3)


def test_group_norm_stays_finite_where_rounding_makes_the_variance_negative():
    norm = scramble(GroupNorm(64)).float()
    x = torch.linspace(100, 10_000, 64)[None, :, None, None].expand(2, 64, 5, 7).clone()
    x[:, 1::2] = x[:, ::2]  # each group of two channels is constant
    x.requires_grad_()
    moments = x.mean((2, 3)), x.square().mean((2, 3))
    assert (moments[1] - moments[0].square()).min() < -1e-5
    y = norm(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_group_norm_of_bfloat16_is_computed_in_float32():
    norm = scramble(GroupNorm(64)).float()
    x = group_norm_inputs(torch.bfloat16, mean=3)[0]
    expected = reference_group_norm(norm, x.float()).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert (y != expected).float().mean() < 0.01  # a few roundings may fall the other way
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-4)


# Against plain primitives, written from the published description of the network


def plain_norm(x, norm, eps=1e-5):
    n, c, height, width = x.shape
    grouped = x.reshape(n, 32, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal.reshape(n, c, height, width) * norm.weight[:, None, None] + norm.bias[:, None, None]


def plain_silu(x):
    return x / (1 + (-x).exp())


def plain_resample(x, factor):
    n, c, height, width = x.shape
    if factor == "up":
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x.reshape(n, c, height // 2, 2, width // 2, 2).sum((3, 5)) / 4


def plain_conv(x, conv, stride=1):
    """A convolution as a sum over the shifts of its kernel."""
    side = conv.weight.shape[-1]
    padded = F.pad(x, [side // 2] * 4)
    height, width = x.shape[2:]
    out = conv.bias[None, :, None, None]
    for row in range(side):
        for col in range(side):
            shifted = padded[:, :, row : row + height : stride, col : col + width : stride]
            out = out + torch.einsum("oi,nihw->nohw", conv.weight[:, :, row, col], shifted)
    return out


def plain_residual(block, x, emb, scale_shift, factor=None):
    h = plain_silu(plain_norm(x, block.norm_in))
    if factor:
        h, x = plain_resample(h, factor), plain_resample(x, factor)
    h = plain_conv(h, block.conv_in)
    condition = (plain_silu(emb) @ block.emb.weight.T + block.emb.bias)[:, :, None, None]
    if scale_shift:
        channels = h.shape[1]
        h = plain_norm(h, block.norm_out) * (1 + condition[:, :channels]) + condition[:, channels:]
    else:
        h = plain_norm(h + condition, block.norm_out)
    h = plain_conv(plain_silu(h), block.conv_out)
    return h + (x if x.shape == h.shape else plain_conv(x, block.skip))


def plain_attention(block, x, heads):
    n, c, height, width = x.shape
    size = c // heads
    tokens = plain_norm(x, block.norm).reshape(n, c, -1).transpose(1, 2)
    projected = tokens @ block.qkv.weight.T + block.qkv.bias
    mixed = []
    for head in range(heads):  # rows of the projection: head by head, its query, key and value
        start = 3 * size * head
        q, k, v = (projected[:, :, start + part * size : start + (part + 1) * size] for part in range(3))
        share = (q @ k.transpose(1, 2) / math.sqrt(size)).exp()
        mixed.append(share / share.sum(-1, keepdim=True) @ v)
    out = torch.cat(mixed, dim=2) @ block.proj.weight.T + block.proj.bias
    return x + out.transpose(1, 2).reshape(n, c, height, width)


def plain_unet(net, model, x, t, labels, attend=plain_attention):
    """The whole network. Only parameters are taken from `net`, in the order of its blocks.

    labels: those whose embedding is added to the time's. attend: what stands where attention does.
    """
    kinds = ResidualBlock | Attention | SpatialTransformer | Resample
    found = [m for m in net.modules() if isinstance(m, kinds)]
    inside = {id(block.resample) for block in found if isinstance(block, ResidualBlock)}
    blocks = iter([block for block in found if id(block) not in inside])
    half = model.channels // 2
    angles = t.double()[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    emb = torch.cat([angles.cos(), angles.sin()], dim=1)
    emb = (
        plain_silu(emb @ net.time_in.weight.T + net.time_in.bias) @ net.time_out.weight.T + net.time_out.bias
    )
    if labels is not None:
        emb = emb + net.label_table.weight[labels]

    def residual(h, factor=None):
        block = next(blocks)
        assert isinstance(block, ResidualBlock)
        return plain_residual(block, h, emb, model.scale_shift_norm, factor)

    def attention(h):
        heads = model.heads or h.shape[1] // model.head_channels
        return attend(next(blocks), h, heads)

    def resampled(h, factor):
        if model.resample_in_blocks:
            return residual(h, factor)
        if factor == "down":
            return plain_conv(h, next(blocks).conv, stride=2)
        return plain_conv(plain_resample(h, "up"), next(blocks).conv)

    levels = len(model.multipliers)
    h = plain_conv(x, net.conv_in)
    skips = [h]
    for level in range(levels):
        for _ in range(model.blocks):
            h = residual(h)
            assert h.shape[1] == model.channels * model.multipliers[level]
            h = attention(h) if h.shape[-1] in model.attention else h
            skips.append(h)
        if level < levels - 1:
            h = resampled(h, "down")
            skips.append(h)
    h = residual(attention(residual(h)))
    for level in reversed(range(levels)):
        for block in range(model.blocks + 1):
            h = residual(torch.cat([h, skips.pop()], dim=1))
            h = attention(h) if h.shape[-1] in model.attention else h
            if level > 0 and block == model.blocks:
                h = resampled(h, "up")
    assert not skips and next(blocks, None) is None
    return plain_conv(plain_silu(plain_norm(h, net.norm_out)), net.conv_out)


def as_map(x, seed=9):
    """A map that is `x`, as a part of it and an offset."""
    offset = noise(x.shape[1], seed=seed)
    return Map(x - offset[:, None, None], offset)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("factor", [None, "up", "down"])
@pytest.mark.parametrize("channels_out", [32, 64])
def test_residual_block(scale_shift, factor, channels_out):
    block = scramble(ResidualBlock(32, channels_out, 16, 0.1, scale_shift, factor))
    x, emb = noise(3, 32, 6, 4), noise(3, 16, seed=3)
    y, kept = block(as_map(x), block.emb(plain_silu(emb)), keep=True)
    torch.testing.assert_close(kept.whole(), x, rtol=0, atol=1e-14)
    y = y.whole()
    sides = {None: (6, 4), "up": (12, 8), "down": (3, 2)}[factor]
    assert y.shape == (3, channels_out, *sides)
    expected = plain_residual(block, x, emb, scale_shift, factor)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention(heads):
    block = scramble(Attention(64, heads))
    x = noise(3, 64, 4, 5)
    expected = plain_attention(block, x, heads)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(block(as_map(x)).whole(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_shift_norm": False},
        {"resample_in_blocks": False},
        {"scale_shift_norm": False, "resample_in_blocks": False},
        {"heads": None, "head_channels": 16},
        {"attention": ()},
        {"attention": (8,)},
        {"attention": (8, 4, 2), "multipliers": (2, 1, 2), "blocks": 2},
        {"multipliers": (1,), "attention": (8,)},
    ],
)
@pytest.mark.parametrize("classes", [0, 5])
def test_network_equals_a_plain_float64_computation(changes, classes):
    net = tiny(classes, **changes)
    x, labels = noise(3, 3, 8, 8), LABELS if classes else None
    expected = plain_unet(net, dataclasses.replace(TINY, **changes), x, TIMES, labels)
    assert expected.abs().max() > 0.5
    # the embedding of t is computed in float32
    torch.testing.assert_close(
        net(x, TIMES, labels), expected, rtol=0, atol=1e-3 * expected.abs().max().item()
    )
    exact = plain_unet(net, dataclasses.replace(TINY, **changes), x, torch.zeros(3), labels)
    torch.testing.assert_close(net(x, torch.zeros(3), labels), exact, rtol=0, atol=1e-11)


def test_the_time_embedding():
    t = torch.tensor([0.0, 1.0, 999.0, math.log(0.002) / 4])
    width = 32
    angles = t.double().numpy()[:, None] * np.power(10_000.0, -np.arange(width // 2) / (width // 2))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(sinusoids(t, width).numpy(), expected, rtol=0, atol=1e-4)


# Options


def kinds(net: ADMUNet, kind: type) -> list:
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("attention, blocks", [((), 1), ((8,), 4), ((4,), 4), ((4, 8), 7)])
def test_attention_is_where_it_is_asked_for_and_in_the_middle(attention, blocks):
    # one block in the encoder and two in the decoder at each side asked for
    assert len(kinds(tiny(attention=attention), Attention)) == blocks


def test_heads_by_number_or_by_width():
    by_number = kinds(tiny(attention=(8, 4), heads=2), Attention)
    by_width = kinds(tiny(attention=(8, 4), heads=None, head_channels=16), Attention)
    assert {block.heads for block in by_number} == {2}
    assert {(block.qkv.in_features, block.heads) for block in by_width} == {(32, 2), (64, 4)}


def test_dropout_acts_in_training_alone():
    net = tiny(dropout=0.5)
    x = noise(3, 3, 8, 8)
    torch.manual_seed(0)
    assert torch.equal(net(x, TIMES, LABELS), net(x, TIMES, LABELS))
    assert torch.equal(net(x, TIMES, LABELS), tiny(dropout=0.0)(x, TIMES, LABELS))
    net.train()
    assert not torch.allclose(net(x, TIMES, LABELS), net(x, TIMES, LABELS))


def test_dropout_comes_before_the_last_convolution():
    block = scramble(ResidualBlock(32, 32, 16, 1.0, True)).train()
    x = noise(3, 32, 4, 4)
    expected = x + block.conv_out.bias[:, None, None]
    y, _ = block(as_map(x), block.emb(noise(3, 16)))
    torch.testing.assert_close(y.whole(), expected, rtol=0, atol=1e-14)


def test_classes_and_the_null_class():
    net = tiny(classes=5)
    x = noise(3, 3, 8, 8)
    null = net(x, TIMES, torch.full((3,), 5))
    assert torch.equal(net(x, TIMES, None), null)
    assert not torch.allclose(net(x, TIMES, torch.full((3,), 4)), null)
    assert net.label_table.num_embeddings == 6
    assert tiny(classes=5, null_class=False).label_table.num_embeddings == 5
    assert tiny(classes=0).label_table is None


def test_time_matters_and_images_of_a_batch_do_not_mix():
    net = tiny()
    x = noise(3, 3, 8, 8)
    y = net(x, TIMES, LABELS)
    assert (net(x, TIMES + 1, LABELS) - y).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(net(x[1:2], TIMES[1:2], LABELS[1:2]), y[1:2], rtol=0, atol=1e-12)


def test_output_channels_and_memory_format():
    net = scramble(ADMUNet(TINY, 8, 3, 5, out_channels=6))
    x = noise(3, 3, 8, 8)
    y = net(x, TIMES, LABELS)
    assert y.shape == (3, 6, 8, 8)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), TIMES, LABELS)
    torch.testing.assert_close(last, y, rtol=0, atol=1e-11)


# Start, gradients, precision, compilation


def test_starts_at_zero_and_blocks_start_as_the_identity():
    torch.manual_seed(0)
    net = ADMUNet(TINY, 8, 3, 5)
    assert (net(noise(3, 3, 8, 8).float(), TIMES, LABELS) == 0).all()
    x, condition = noise(3, 32, 4, 4).float(), noise(3, 64).float()
    h = Map(x, torch.zeros(32))
    assert torch.equal(ResidualBlock(32, 32, 16, 0.0, True)(h, condition)[0].whole(), x)
    assert torch.equal(Attention(32, 2)(h).whole(), x)


def test_gradients_reach_the_output_at_the_start_and_every_parameter_after():
    torch.manual_seed(0)
    net = ADMUNet(TINY, 8, 3, 5)
    x = noise(3, 3, 8, 8).float()
    net(x, TIMES, LABELS).sub(1).square().sum().backward()
    assert net.conv_out.weight.grad.abs().max() > 0
    for changes in ({}, {"scale_shift_norm": False, "resample_in_blocks": False}):
        net = tiny(
            channels=64, **changes
        )  # with one channel per group a norm would cancel the bias before it
        net(x.double(), TIMES, LABELS).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def check_less_precision(net: torch.nn.Module, x: torch.Tensor) -> None:
    """Outputs in float32, and under bfloat16 autocast, are float32 and near those in float64."""
    exact = net(x, TIMES, LABELS)
    net = net.float()
    single = net(x.float(), TIMES, LABELS)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-4 * exact.abs().max()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x.float(), TIMES, LABELS)
    assert half.dtype == torch.float32
    assert 1e-5 < (half - exact).abs().max() / exact.abs().max() < 0.1


def test_float32_and_bfloat16_autocast_stay_close_to_float64():
    check_less_precision(tiny(), noise(3, 3, 8, 8))


@pytest.mark.parametrize("outputs", [3, 6])
def test_the_last_convolution_of_a_bfloat16_map_rounds_nothing_but_its_inputs(outputs):
    convolution = OutputConvolution(64, outputs, 3, padding=1)
    h = noise(2, 64, 5, 7).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = noise(2, outputs, 5, 7, seed=1).bfloat16()
    with torch.no_grad():  # numbers that bfloat16 has: what is left are roundings of float32
        convolution.weight.copy_(convolution.weight.bfloat16())
    y = convolution(h)
    assert y.dtype == torch.float32
    grads = torch.autograd.grad((y * upstream).sum(), [h, *convolution.parameters()])
    wide = [tensor.detach().double().requires_grad_() for tensor in (h, *convolution.parameters())]
    expected = F.conv2d(*wide, padding=1)
    wanted = torch.autograd.grad((expected * upstream).sum(), wide)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    for grad, exact, rounding in zip(grads, wanted, (2**-8, 1e-6, 1e-6), strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=0, atol=rounding * exact.abs().max().item())


@pytest.mark.parametrize("channels", [3, 4])
def test_the_first_convolution_in_bfloat16_is_a_convolution(channels):
    convolution = InputConvolution(channels, 64, 3, padding=1)
    x, upstream = noise(2, channels, 5, 7).bfloat16().float(), noise(2, 64, 5, 7, seed=1).bfloat16()
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(x)
        by_convolution = convolution(x.clone().requires_grad_())
    assert y.dtype == by_convolution.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad((y * upstream).sum(), convolution.weight)
    weight = convolution.weight.detach().double().requires_grad_()
    expected = F.conv2d(x.double(), weight, padding=1)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), weight)
    for found, exact in ((y, expected), (by_convolution, expected), (grad, wanted)):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2**-8 * exact.abs().max().item())


def test_the_output_of_a_network_in_bfloat16_is_not_rounded_to_it():
    net = tiny().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = net(noise(3, 3, 8, 8).float(), TIMES, LABELS)
    assert y.dtype == torch.float32 and (y != y.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("changes", [{}, {"transformer_depth": 1, "context_width": 12}])
def test_compiles_to_one_graph(changes):
    net = tiny(**changes)
    x = noise(3, 3, 8, 8)
    jaxtyping.config.update("jaxtyping_disable", True)  # its checks, installed for the tests, break graphs
    torch.compiler.reset()
    try:
        out = torch.compile(net, fullgraph=True, backend="eager")(x, TIMES, LABELS)  # a graph break raises
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    torch.testing.assert_close(out, net(x, TIMES, LABELS), rtol=0, atol=1e-12)


# Errors


@pytest.mark.parametrize(
    "changes, resolution, message",
    [
        ({}, 9, "a side of 9 pixels cannot be halved 1 time"),
        ({"multipliers": (1, 1, 1, 1), "attention": ()}, 12, "a side of 12 pixels cannot be halved 3 times"),
        ({"attention": (16,)}, 8, r"no feature map has the side \[16\].*there are \[8, 4\]"),
        ({"heads": 3}, 8, "64 channels cannot be split into 3 attention heads"),
        ({"heads": None, "head_channels": 48}, 8, "64 channels do not divide into heads of 48"),
        ({"channels": 40}, 8, "40 channels cannot be split into 32 groups"),
    ],
)
def test_sizes_that_do_not_fit(changes, resolution, message):
    with pytest.raises(ValueError, match=message):
        ADMUNet(dataclasses.replace(TINY, **changes), resolution, 3, 0)


def test_labels_it_cannot_take():
    x = noise(3, 3, 8, 8)
    with pytest.raises(ValueError, match="labels were given to a network without classes"):
        tiny(classes=0)(x, TIMES, LABELS)
    with pytest.raises(ValueError, match="no null class: it needs labels"):
        tiny(null_class=False)(x, TIMES, None)


@pytest.mark.parametrize("changes", [{}, {"resample_in_blocks": False}, LDM])
def test_every_convolution_finds_and_leaves_its_maps_channels_last(changes):
    """A map in the other order would be copied before each convolution, which costs as much as a norm."""
    wrong, seen = [], Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            results = operator(*arguments, **(keywords or {}))
            name = str(operator)
            if name == "aten.convolution.default":
                maps = [arguments[0], results]  # not the kernel, which is small
            elif name == "aten.convolution_backward.default":
                maps = [arguments[0], arguments[1], results[0]]
            else:
                return results
            seen[name] += 1
            wrong.extend(
                (name, tuple(m.shape), m.stride())
                for m in maps
                if m is not None and not m.is_contiguous(memory_format=torch.channels_last)
            )
            return results

    net = tiny(**changes).float().to(memory_format=torch.channels_last).train()
    x = noise(2, 3, 8, 8).float().contiguous(memory_format=torch.channels_last)
    with Watch():
        net(x, torch.zeros(2)).square().sum().backward()
    assert len(seen) == 2 and seen.total() >= 2 * 14
    assert not wrong

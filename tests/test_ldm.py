"""The UNet of LDM against its published size, independent float64 computations, and diffusers' network."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unet import (
    LABELS,
    LDM,
    TIMES,
    TINY,
    as_map,
    check_less_precision,
    count,
    noise,
    on_meta,
    plain_norm,
    plain_unet,
    scramble,
)

from repro import presets
from repro.models.unet import ADMUNet, SpatialTransformer, TransformerBlock

LDM8, LATENTS = presets.LDM_UNET
SMALL = dataclasses.replace(TINY, **LDM)


def small(classes: int = 5, **changes) -> ADMUNet:
    return scramble(ADMUNet(dataclasses.replace(SMALL, **changes), 8, 4, classes))


# Size


def by_hand(base=256, time=1024, context=512):
    """Parameters of LDM-8's network, without its table of classes, from widths alone."""

    def linear(width_in, width_out, bias=True):
        return width_in * width_out + bias * width_out

    def convolution(width_in, width_out):
        return 9 * width_in * width_out + width_out

    def residual(width_in, width):
        skip = linear(width_in, width) if width_in != width else 0
        convolutions = convolution(width_in, width) + convolution(width, width)
        return 2 * width_in + 2 * width + convolutions + linear(time, width) + skip

    def transformer(c):
        to_itself = 3 * linear(c, c, bias=False) + linear(c, c)
        to_context = linear(c, c, bias=False) + 2 * linear(context, c, bias=False) + linear(c, c)
        feed_forward = linear(c, 2 * 4 * c) + linear(4 * c, c)
        return 2 * c + 2 * linear(c, c) + 3 * 2 * c + to_itself + to_context + feed_forward

    total = linear(base, time) + linear(time, time) + convolution(4, base) + 2 * base + convolution(base, 4)
    down = [(256, 256), (256, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024)]
    # on the way up maps are joined: from below, and kept on the way down
    up = [(1024 + kept, 1024) for kept in (1024, 1024, 512)]
    up += [(1024 + 512, 512), (512 + 512, 512), (512 + 256, 512)]
    up += [(512 + 256, 256), (256 + 256, 256), (256 + 256, 256)]
    total += sum(residual(*widths) + transformer(widths[1]) for widths in (*down, *up))
    total += 2 * residual(1024, 1024) + transformer(1024)
    return total + sum(convolution(c, c) for c in (256, 512, 1024, 512))  # halving and doubling


def test_parameters_of_ldm_8_are_the_published_395m():
    net = on_meta(LDM8, LATENTS.resolution, LATENTS.channels, LATENTS.classes)
    table = 1001 * 512
    assert count(net) - table == by_hand() == 394_984_196
    assert round(count(net) / 1e6) == round(by_hand() / 1e6) == 395


# Against plain primitives, written from the published description


def plain_layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_linear(x, layer):
    y = torch.einsum("...i,oi->...o", x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def plain_mixture(block, x, others, heads):
    """Attention of the tokens x to `others`, head by head."""
    size = x.shape[-1] // heads
    q = plain_linear(x, block.q)
    k, v = plain_linear(others, block.kv).chunk(2, dim=-1)
    mixed = []
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        share = (torch.einsum("nsd,nkd->nsk", q[..., at], k[..., at]) / math.sqrt(size)).exp()
        mixed.append(torch.einsum("nsk,nkd->nsd", share / share.sum(-1, keepdim=True), v[..., at]))
    return plain_linear(torch.cat(mixed, dim=-1), block.proj)


def plain_transformer(block, x, heads, context):
    n, c, height, width = x.shape
    z = plain_norm(x, block.norm, eps=1e-6).reshape(n, c, -1).transpose(1, 2)
    z = plain_linear(z, block.proj_in)
    for one in block.blocks:
        own = plain_layer_norm(z, one.norm_self)
        z = z + plain_mixture(one.attend_self, own, own, heads)
        z = z + plain_mixture(one.attend_context, plain_layer_norm(z, one.norm_context), context, heads)
        wide = plain_linear(plain_layer_norm(z, one.norm_mlp), one.gated)
        hidden, gate = wide[..., : 4 * c], wide[..., 4 * c :]
        gate = gate * (1 + torch.special.erf(gate / math.sqrt(2))) / 2
        z = z + plain_linear(hidden * gate, one.mlp_out)
    return x + plain_linear(z, block.proj_out).transpose(1, 2).reshape(n, c, height, width)


def plain_ldm(net, model, x, t, labels):
    """The wiring of ADM's network, with transformers, whose context is the only place of the class."""
    attend = functools.partial(plain_transformer, context=net.label_table.weight[labels][:, None])
    return plain_unet(net, model, x, t, None, attend)


@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    depth=st.integers(1, 2),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tokens=st.integers(1, 4),
    context_width=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_spatial_transformer(heads, depth, sides, tokens, context_width):
    block = scramble(SpatialTransformer(64, heads, depth, context_width))
    x, context = noise(2, 64, *sides), noise(2, tokens, context_width, seed=3)
    expected = plain_transformer(block, x, heads, context)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(block(as_map(x), context).whole(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer_depth": 2, "context_width": 1},
        {"heads": None, "head_channels": 16, "attention": (8, 4, 2), "multipliers": (2, 1, 2), "blocks": 2},
        {"attention": ()},  # in the middle alone
        {"scale_shift_norm": True, "resample_in_blocks": True},
    ],
)
def test_network_and_its_gradients_equal_a_plain_float64_computation(changes):
    net, model = small(**changes), dataclasses.replace(SMALL, **changes)
    x, t = noise(3, 4, 8, 8).requires_grad_(), torch.zeros(3)  # which is embedded in float32: 0 exactly
    upstream = noise(3, 4, 8, 8, seed=8)
    wanted = [x, *net.parameters()]
    outputs = [net(x, t, LABELS), plain_ldm(net, model, x, t, LABELS)]
    found, expected = outputs
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    grads = [torch.autograd.grad((y * upstream).sum(), wanted) for y in outputs]
    for grad, exact in zip(*grads, strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-11 * max(1, exact.abs().max().item()))
    later = plain_ldm(net, model, x, TIMES, LABELS)
    atol = 1e-3 * later.abs().max().item()
    torch.testing.assert_close(net(x, TIMES, LABELS), later, rtol=0, atol=atol)


# Against diffusers


def copy_attention(theirs, ours) -> None:
    theirs.to_q.weight.copy_(ours.q.weight)
    for theirs_, ours_ in zip((theirs.to_k, theirs.to_v), ours.kv.weight.chunk(2), strict=True):
        theirs_.weight.copy_(ours_)
    theirs.to_out[0].load_state_dict(ours.proj.state_dict())


@torch.no_grad()
def copy_block(theirs, ours: TransformerBlock) -> None:
    theirs.norm1.load_state_dict(ours.norm_self.state_dict())
    theirs.norm2.load_state_dict(ours.norm_context.state_dict())
    theirs.norm3.load_state_dict(ours.norm_mlp.state_dict())
    copy_attention(theirs.attn1, ours.attend_self)
    copy_attention(theirs.attn2, ours.attend_context)
    theirs.ff.net[0].proj.load_state_dict(ours.gated.state_dict())
    theirs.ff.net[2].load_state_dict(ours.mlp_out.state_dict())


@pytest.mark.parametrize("heads, tokens", [(1, 1), (2, 3), (4, 5)])
def test_transformer_block_is_that_of_diffusers(heads, tokens):
    from diffusers.models.attention import BasicTransformerBlock  # takes seconds to import

    ours = scramble(TransformerBlock(32, heads, 12))
    theirs = BasicTransformerBlock(32, heads, 32 // heads, cross_attention_dim=12, activation_fn="geglu")
    theirs = theirs.double().eval()
    copy_block(theirs, ours)
    x, context = noise(2, 7, 32), noise(2, tokens, 12, seed=3)
    expected = theirs(x, encoder_hidden_states=context)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(ours(x, context), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def copy_network(theirs, ours: ADMUNet) -> None:
    """The parameters of `ours` into diffusers' network of the same wiring, in the order of computation."""
    pairs = [
        (theirs.time_embedding.linear_1, ours.time_in),
        (theirs.time_embedding.linear_2, ours.time_out),
        (theirs.conv_in, ours.conv_in),
        (theirs.conv_norm_out, ours.norm_out),
        (theirs.conv_out, ours.conv_out),
    ]
    blocks = iter([block for step in (*ours.encoder, ours.middle, *ours.decoder) for block in step])

    def residual(theirs):
        one = next(blocks)
        pairs.extend(
            [
                (theirs.norm1, one.norm_in),
                (theirs.conv1, one.conv_in),
                (theirs.time_emb_proj, one.emb),
                (theirs.norm2, one.norm_out),
                (theirs.conv2, one.conv_out),
            ]
        )
        if theirs.conv_shortcut is not None:
            pairs.append((theirs.conv_shortcut, one.skip))

    def transformer(theirs):
        one = next(blocks)
        pairs.append((theirs.norm, one.norm))
        for layer, own in (
            (theirs.proj_in, one.proj_in),
            (theirs.proj_out, one.proj_out),
        ):  # convolutions 1 x 1
            layer.weight.copy_(own.weight[:, :, None, None])
            layer.bias.copy_(own.bias)
        for block, own in zip(theirs.transformer_blocks, one.blocks, strict=True):
            copy_block(block, own)

    def level(theirs, resamplers):
        for place, block in enumerate(theirs.resnets):
            residual(block)
            if hasattr(theirs, "attentions"):
                transformer(theirs.attentions[place])
        for resampler in resamplers or ():
            pairs.append((resampler.conv, next(blocks).conv))

    for block in theirs.down_blocks:
        level(block, block.downsamplers)
    residual(theirs.mid_block.resnets[0])
    transformer(theirs.mid_block.attentions[0])
    residual(theirs.mid_block.resnets[1])
    for block in theirs.up_blocks:
        level(block, block.upsamplers)
    assert next(blocks, None) is None
    for layer, own in pairs:
        layer.load_state_dict(own.state_dict())


@contextmanager
def without_torchvision():
    """A block in which nothing finds torchvision, which it does not need and which may not fit this torch."""
    find, version = importlib.util.find_spec, importlib.metadata.version

    def absent(name, *more):
        return None if name.startswith("torchvision") else find(name, *more)

    def unknown(name):
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    importlib.util.find_spec, importlib.metadata.version = absent, unknown
    try:
        from diffusers.utils import import_utils

        known, import_utils._torchvision_available = import_utils._torchvision_available, False
        yield
        import_utils._torchvision_available = known
    finally:
        importlib.util.find_spec, importlib.metadata.version = find, version


def of_diffusers(widths, heads, attends, blocks, context):
    """diffusers' UNet, with transformers at the levels that attend."""
    with without_torchvision():
        from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        layers_per_block=blocks,
        attention_head_dim=heads,  # which is their number, whatever its name
        cross_attention_dim=context,
    )


def test_network_is_that_of_diffusers():
    changes = {"multipliers": (1, 2, 4), "blocks": 2, "attention": (8, 2), "heads": None, "head_channels": 16}
    net = small(**changes)
    theirs = of_diffusers((32, 64, 128), (2, 4, 8), (True, False, True), 2, 12).double().eval()
    copy_network(theirs, net)
    x, context = noise(3, 4, 8, 8), net.label_table(LABELS)[:, None]
    for t, tolerance in ((torch.zeros(3), 1e-11), (TIMES, 1e-4)):  # embedded in float32
        expected = theirs(x, t, encoder_hidden_states=context).sample
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(net(x, t, LABELS), expected, rtol=0, atol=tolerance)


def test_parameters_of_ldm_8_are_as_many_as_diffusers_counts():
    with torch.device("meta"):
        theirs = of_diffusers((256, 512, 1024), (8, 16, 32), (True,) * 3, 2, 512)
    assert count(theirs) == by_hand()


# Classes


def test_the_class_enters_by_cross_attention_alone():
    net, x = small(), noise(3, 4, 8, 8)
    null = net(x, TIMES, torch.full((3,), 5))
    assert torch.equal(net(x, TIMES, None), null)
    assert (net(x, TIMES, torch.full((3,), 4)) - null).abs().amax((1, 2, 3)).min() > 1e-3
    assert net.label_table.weight.shape == (6, SMALL.context_width)
    for module in net.modules():
        if isinstance(module, TransformerBlock):
            torch.nn.init.zeros_(module.attend_context.kv.weight)
    assert torch.equal(net(x, TIMES, LABELS), net(x, TIMES, None))


def test_images_of_a_batch_do_not_mix():
    net, x = small(), noise(3, 4, 8, 8)
    alone = net(x[1:2], TIMES[1:2], LABELS[1:2])
    torch.testing.assert_close(alone, net(x, TIMES, LABELS)[1:2], rtol=0, atol=1e-12)


def test_what_it_cannot_take():
    with pytest.raises(
        ValueError, match=r"transformers that attend to a class \(context_width\) need data with"
    ):
        ADMUNet(SMALL, 8, 4, classes=0)
    with pytest.raises(ValueError, match="no null class: it needs labels"):
        small(null_class=False)(noise(3, 4, 8, 8), TIMES)
    with pytest.raises(ValueError, match="64 channels cannot be split into 3 attention heads"):
        ADMUNet(dataclasses.replace(SMALL, heads=3), 8, 4, classes=5)


# Start, gradients, precision


def test_starts_at_zero_and_transformers_start_as_the_identity():
    torch.manual_seed(0)
    assert (ADMUNet(SMALL, 8, 4, 5)(noise(3, 4, 8, 8).float(), TIMES, LABELS) == 0).all()
    h = as_map(noise(3, 32, 4, 4))
    block = SpatialTransformer(32, 2, 1, 12).double()
    torch.testing.assert_close(block(h, noise(3, 1, 12)).whole(), h.whole(), rtol=0, atol=1e-14)


def test_gradients_reach_every_parameter_but_those_that_choose_among_one_token():
    net = small(channels=64)  # with one channel per group a norm would cancel the bias before it
    net(noise(3, 4, 8, 8), TIMES, LABELS).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name in [name for name in grads if name.endswith("attend_context.kv.weight")]:
        grads[f"{name}, keys"], grads[f"{name}, values"] = grads.pop(name).chunk(2)
    choose = ("norm_context", "attend_context.q", "keys")
    largest = {name: grad.abs().max().item() for name, grad in grads.items()}
    assert {name for name in grads if largest[name] < 1e-12} == {
        name for name in grads if any(part in name for part in choose)
    }
    assert not [name for name in grads if 1e-12 <= largest[name] < 1e-9]


def test_of_several_tokens_gradients_reach_every_parameter():
    block = scramble(SpatialTransformer(64, 2, 2, 12))
    block(as_map(noise(2, 64, 3, 3)), noise(2, 3, 12, seed=3)).whole().square().sum().backward()
    assert all(part.abs().max() > 1e-9 for p in block.parameters() for part in p.grad.chunk(2))


def test_float32_and_bfloat16_autocast_stay_close_to_float64():
    check_less_precision(small(), noise(3, 4, 8, 8))

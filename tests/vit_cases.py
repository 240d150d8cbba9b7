"""What the ViT's kernels compute, on the GPU, or by Triton's interpreter: for a process of its own.

Prints one JSON object: for each case, the error of each result beside PyTorch's own functions in float64,
relative to the size of that result.
"""

import copy
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import compiles, patch_once, round_to_float8
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from repro import config, plainly, plan
from repro.models import recompute, vit_fused, vit_kernels
from repro.models.vit import Block, ViT

DEVICE = "cpu" if vit_kernels.INTERPRETED else "cuda"
torch.set_default_device(DEVICE)
if vit_kernels.INTERPRETED:
    patch_once()
    round_to_float8()


def draw(*shape, seed, dtype=torch.float16, scale=1.0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device="cpu")).to(DEVICE, dtype)


def errors(found, exact):
    """Norms of differences, over the norm of what is exact, which may not be 0."""
    pairs = zip(found, exact, strict=True)
    return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]


def attention(n, tokens, heads, d, dtype=torch.float16, shift=0.0):
    """Attention, its gradient, and the gradients' sums of queries and of values."""
    qkv = draw(n, tokens, 3 * heads * d, seed=1, dtype=dtype, scale=1.5) + shift
    dout = draw(n, tokens, heads * d, seed=2, dtype=dtype)
    out, lse = vit_kernels.attention(qkv, heads)
    dqkv, queries, values = vit_kernels.attention_grad(qkv, out, lse, dout, heads)
    exact = qkv.double().requires_grad_()
    q, k, v = exact.unflatten(2, (3, heads, d)).permute(2, 0, 3, 1, 4).unbind()
    logits = q @ k.transpose(2, 3) * d**-0.5
    y = (logits.softmax(3) @ v).transpose(1, 2).flatten(2)
    (gradient,) = torch.autograd.grad(y, exact, dout.double())
    width = heads * d
    sums = gradient.sum((0, 1))
    of_lse = logits.logsumexp(3) / torch.tensor(2.0).double().log()
    return errors(
        (out, lse, dqkv, queries.sum(0), values.sum(0)),
        (y, of_lse, gradient, sums[:width], sums[2 * width :]),
    )


def add_norm(rows, width, branch):
    """Sum, norm, and gradients by z, weight, bias, and by the branch and its bias."""
    z, dtotal = draw(2, rows, width, seed=1, dtype=torch.float32), draw(2, rows, width, seed=2)
    dtotal, dy = dtotal.float(), draw(2, rows, width, seed=3)
    weight, bias, of_branch = (draw(width, seed=4 + i, dtype=torch.float32) for i in range(3))
    b = draw(2, rows, width, seed=7) if branch else None
    given = [z, weight, bias] + ([b, of_branch] if branch else [])
    mine = [each.clone().requires_grad_() for each in given]
    z_, weight_, bias_, *others = mine
    b_, of_branch_ = others or (None, None)
    found = vit_fused._AddNorm.apply(z_, b_, of_branch_, weight_, bias_, 1e-6, torch.float16)
    grads = torch.autograd.grad(found, mine, (dtotal, dy))
    mine = [each.double().requires_grad_() for each in given]
    z_, weight_, bias_, *others = mine
    total = z_
    if branch:  # which has its bias already
        total = z_ + others[0] + others[1] - others[1].detach()
    exact = total, F.layer_norm(total, (width,), weight_, bias_, 1e-6)
    return errors(
        (*found, *grads), (*exact, *torch.autograd.grad(exact, mine, (dtotal.double(), dy.double())))
    )


def gelu(rows, width):
    """GELU, its gradient, and the sums of that over rows."""
    x, dy = draw(2, rows, width, seed=1, scale=3.0), draw(2, rows, width, seed=2)
    y = vit_kernels.gelu(x)
    dx, sums = vit_kernels.gelu_grad(x, dy)
    exact = x.double().requires_grad_()
    of_x = F.gelu(exact)
    (gradient,) = torch.autograd.grad(of_x, exact, dy.double())
    return errors((y, dx, sums.sum(0)), (of_x, gradient, gradient.sum((0, 1))))


def gelu_of_product(rows, depth, width, dtype=torch.float16):
    """GELU of a product and its bias."""
    x, weight = draw(2, rows, depth, seed=1, dtype=dtype), draw(width, depth, seed=2, dtype=dtype)
    bias = draw(width, seed=3, dtype=torch.float32)
    y = vit_kernels.gelu_of_product(x, weight * depth**-0.5, bias)
    exact = x.double() @ (weight * depth**-0.5).double().T + bias.double()
    return errors([y], [F.gelu(exact)])


def no_product():
    """What is said of a bias, and of a weight, that do not fit."""
    x, weight, bias = (draw(*shape, seed=1) for shape in ((3, 16), (24, 16), (24,)))
    told = []
    for given in ((x, weight, bias[:8]), (x, weight[:, :8], bias), (x, weight.bfloat16(), bias)):
        try:
            vit_kernels.gelu_of_product(*given)
        except ValueError as error:
            told.append(str(error))
    return told


def all_of_gelu():
    """The largest errors, in float32, of GELU and its slope at any float16, the former over |x| where that is
    more than 1; and of GELU over itself, from -5.5 to 0."""
    bits = torch.arange(-(2**15), 2**15, device="cpu", dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16)
    x = x[x.isfinite()].float().to(DEVICE)[None]
    exact = x.double().requires_grad_()
    of_x = F.gelu(exact)
    (slope,) = torch.autograd.grad(of_x.sum(), exact)
    y, (dx, _) = vit_kernels.gelu(x), vit_kernels.gelu_grad(x, torch.ones_like(x))
    largest = [((y - of_x) / exact.abs().clamp(min=1)).abs().max(), (dx - slope).abs().max()]
    tail = (x >= -5.5) & (x < 0)
    return [float(each) for each in (*largest, (y / of_x - 1)[tail].abs().max())]


@contextmanager
def having(parts):
    """A block in which ViTs have the kernels of some parts alone."""
    kernels = {name: getattr(vit_fused, name) for name, _ in plainly.PARTS.values()}
    plainly.use_kernels(parts)
    yield
    for name, kernel in kernels.items():
        setattr(vit_fused, name, kernel)


def blocks(tokens, heads, d, parts=tuple(plainly.PARTS), again=False):
    """Two blocks, with the kernels of some parts: their output, and all gradients, beside the same blocks in
    float64. again: computed again in the backward pass."""
    width = heads * d
    stack = nn.ModuleList(Block(width, heads, 2.0) for _ in range(2))
    with torch.no_grad():
        for i, parameter in enumerate(stack.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i, dtype=torch.float32, scale=0.2))
            if parameter.ndim == 1:
                parameter += 0.5
    exact = copy.deepcopy(stack).double()
    z = draw(2, tokens, width, seed=50, dtype=torch.float32).requires_grad_()
    dz = draw(2, tokens, width, seed=51, dtype=torch.float32)
    torch.set_autocast_dtype("cuda", torch.float16)
    with having(parts):
        with torch.autocast(DEVICE, torch.float16):
            out = vit_fused.run(stack, z, again)
        found = out, *torch.autograd.grad(out, [z, *stack.parameters()], dz)
    z = z.detach().double().requires_grad_()
    out = z
    for block in exact:
        out = block(out)
    wanted = out, *torch.autograd.grad(out, [z, *exact.parameters()], dz.double())
    return errors(found, wanted)


def drawing(parts):
    """Two blocks where no gradient is asked for, with the kernels of some parts: their output beside float64,
    and how often the product and GELU were one kernel."""
    stack = nn.ModuleList(Block(48, 3, 2.0) for _ in range(2)).requires_grad_(False)
    for i, parameter in enumerate(stack.parameters()):
        parameter.copy_(draw(*parameter.shape, seed=i, dtype=torch.float32, scale=0.2))
    z = draw(2, 19, 48, seed=50, dtype=torch.float32)
    as_it_is, is_for, count = vit_kernels.gelu_of_product, vit_kernels.can_multiply, 0

    def counted(*given):
        nonlocal count
        count += 1
        return as_it_is(*given)

    vit_kernels.gelu_of_product, vit_kernels.can_multiply = counted, lambda x, weight: True  # so small, too
    torch.set_autocast_dtype("cuda", torch.float16)
    with having(parts), torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        out = vit_fused.run(stack, z)
    vit_kernels.gelu_of_product, vit_kernels.can_multiply = as_it_is, is_for
    return *errors([out], [nn.Sequential(*copy.deepcopy(stack).double())(z.double())]), count


def compiled(again):
    """Of a compiled ViT, blocks of which may be computed again: the bytes that it keeps for its backward
    pass, over tokens, width and blocks, and the kernels of ours that this pass runs, in their order."""
    net = ViT(config.ViT(patch=4, width=64, depth=4, heads=2), resolution=16, in_channels=3, classes=4)
    recompute.allow(net, again)
    hook = plan.Kept(plan.storages_of(net))
    vit_fused._can_take = lambda z, heads: True
    torch.compiler.reset()
    call = torch.compile(net, fullgraph=True, dynamic=False)
    given = draw(3, 3, 16, 16, seed=0, dtype=torch.float32), torch.arange(3.0), torch.arange(3)
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_default_device(None)  # which is a mode, in which less can be traced
    with torch.autocast(DEVICE, torch.float16):
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor):
            out = call(*given)
    out.sum().backward()  # is compiled at first, which runs kernels too
    with torch.autocast(DEVICE, torch.float16):
        out = call(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    torch.set_default_device(DEVICE)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    run = [event.name.removeprefix("repro::") for event in events if event.name.startswith("repro::")]
    return hook.bytes / (3 * 18 * 64 * 4), run


def rounded(y):
    """Float64 rows over their scales, rounded to float8, and the scales: what the kernels are to give."""
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (y / scale).to(torch.float8_e4m3fn), scale


def beside_rounded(found, scale, y):
    """Of float8 rows beside those of exact y: the share of numbers that differ, the most that one does, over
    its size, and the largest error of a scale; and the error of all, each row's over its scale, over that of
    rounding exactly."""
    wanted, exact = rounded(y)
    a, b = found.double(), wanted.double()
    apart = ((a - b).abs() / b.abs().clamp(min=2**-6))[a != b]  # from there on down, numbers are 2^-9 apart
    (all_, least) = (
        float(((each * of - y) / exact).norm()) for each, of in ((a, scale.double()), (b, exact))
    )
    return [
        float((a != b).double().mean()),
        float(apart.max()) if len(apart) else 0.0,
        float((scale.double() / exact - 1).abs().max()),
        all_ / least,
    ]


def add_norm_fp8(rows, width, branch):
    """Float8 rows and their scales, and the error of the sums of rows that are not large."""
    z, weight, bias = (draw(*shape, seed=n, dtype=torch.float32) for n, shape in
                       enumerate([(2, rows, width), (width,), (width,)]))  # fmt: skip
    z[0, 0], z[1, 1] = 0.0, 1e15  # a row of nothing but its bias, and one of large numbers
    z[1, 1, ::2] *= -1
    b = draw(2, rows, width, seed=7, dtype=torch.bfloat16) if branch else None
    total, y, scale = vit_kernels.add_norm_fp8(z, b, weight, bias, 1e-6)
    exact = z.double() + (b.double() if branch else 0.0)
    normed = F.layer_norm(exact, (width,), weight.double(), bias.double(), 1e-6)
    return [*beside_rounded(y, scale, normed), errors(total[:1], exact[:1])[0] if branch else 0.0]


def gelu_fp8(rows, width):
    """Float8 rows and their scales, of rows of any size."""
    x = draw(2, rows, width, seed=1, dtype=torch.bfloat16, scale=3.0)
    x[0, 0] *= 1e30
    x[0, 1] *= 1e-3
    y, scale = vit_kernels.gelu_fp8(x)
    return beside_rounded(y, scale, F.gelu(x.double()))


def rows_of_float8_that_are_special():
    """Of rows of zeros, and with a NaN or an infinity in the first or the second part: what becomes of them.

    By row, for GELU and for a norm: how many numbers are 0, how many NaN, and whether the scale is finite.
    """
    x = draw(1, 8, 96, seed=3, dtype=torch.bfloat16)
    x[0, 0] = 0.0
    x[0, 1, 5], x[0, 2, 90] = float("nan"), float("nan")
    x[0, 3, 5], x[0, 4, 90] = float("inf"), float("-inf")
    ones = torch.ones(96, dtype=torch.float32)
    _, normed, of_norm = vit_kernels.add_norm_fp8(x.float(), None, ones, torch.zeros_like(ones), 1e-6)

    def told(y, scale):
        y = y[0].float()
        counts = (y == 0).sum(1).tolist(), y.isnan().sum(1).tolist(), scale[0, :, 0].isfinite().tolist()
        return list(zip(*counts, strict=True))

    return told(*vit_kernels.gelu_fp8(x)), told(normed, of_norm)


def blocks_fp8(tokens, heads, d):
    """Three blocks, with products of float8 numbers: their output beside the same blocks in float64, over
    what the blocks add to their input; beside an emulation in float64 that rounds to float8 only, in all
    blocks but the first; and beside one that rounds in all."""
    width = heads * d
    stack = nn.ModuleList(Block(width, heads, 2.0) for _ in range(3)).requires_grad_(False)
    for i, (name, parameter) in enumerate(stack.named_parameters()):
        parameter.copy_(draw(*parameter.shape, seed=i, dtype=torch.float32, scale=0.2))
        if "norm" in name:
            parameter += 0.5
        elif parameter.ndim == 2:  # output channels of very different sizes: each needs a scale of its own
            parameter *= torch.logspace(-1.5, 0.5, len(parameter))[:, None]
    z = draw(2, tokens, width, seed=50, dtype=torch.float32)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16), vit_fused.products(float8=True):
        out = vit_fused.run(stack, z)
    exact, but_first, emulated = (copy.deepcopy(stack).double() for _ in range(3))
    for block in (*but_first[1:], *emulated):
        for product, name in ((block.attn, "qkv"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            linear = getattr(product, name)
            weight, scale = rounded(linear.weight)
            linear.weight.copy_(weight.double() * scale)
            linear.register_forward_pre_hook(_round_input)
    found = [nn.Sequential(*blocks)(z.double()) for blocks in (exact, but_first, emulated)]
    added = (found[0] - z).norm()
    return [float((out - each).norm() / added) for each in found]


def _round_input(_, given):
    x, scale = rounded(given[0])
    return (x.double() * scale,)


small = {False: vit_kernels.Blocks(32, 16, 4, 2), True: vit_kernels.Blocks(16, 32, 4, 2)}
cases = {
    "258 tokens": attention(1, 258, 1, 64),
    "heads of 72": attention(1, 66, 2, 72),
    "whole blocks": attention(2, 128, 1, 32),
    "fewer tokens than a block": attention(2, 17, 2, 24),
    "large logits": attention(1, 37, 2, 16, shift=-20.0),
    "bfloat16": attention(1, 40, 1, 64, torch.bfloat16),
}
vit_kernels.FORWARD = vit_kernels.QUERIES = vit_kernels.KEYS = small
cases |= {
    "other blocks": attention(2, 70, 2, 32),
    "other blocks, heads of 40": attention(1, 53, 2, 40),
    "a long tail": attention(2, 54, 1, 32),
    "a long tail, heads of 24": attention(1, 29, 2, 24),
    "sum and norm": add_norm(37, 96, True),
    "sum and norm, one part": add_norm(3, 128, True),
    "sum and norm, masked": add_norm(3, 200, True),
    "norm alone": add_norm(5, 200, False),
    "gelu": gelu(37, 96),
    "gelu, wide": gelu(3, 1300),
    "gelu, whole tiles": gelu(6, 1024),
    "gelu of all": all_of_gelu(),
    "gelu of product": gelu_of_product(37, 96, 104),
    "gelu of product, whole tiles": gelu_of_product(256, 128, 256),
    "gelu of product, narrow": gelu_of_product(3, 24, 16),
    "gelu of product, tiles 2 down and 3 across": gelu_of_product(130, 32, 264),
    "no product": no_product(),
    "gelu of product, bfloat16": gelu_of_product(150, 72, 136, torch.bfloat16),
    "blocks": blocks(19, 3, 16),
    "blocks, heads of 24": blocks(21, 2, 24),
    "blocks, computed again": blocks(19, 3, 16, again=True),
    "compiled": [compiled(False), compiled(True)] if compiles() else None,
    "blocks, without our attention": blocks(19, 3, 16, ("sum and norm", "GELU")),
    "blocks, without our sum and norm": blocks(19, 3, 16, ("attention", "GELU")),
    "blocks, without our GELU": blocks(19, 3, 16, ("attention", "sum and norm")),
    "blocks, without our kernels": blocks(19, 3, 16, (plainly.WIRING,)),
    "drawing": drawing(tuple(plainly.PARTS)),
    "drawing, without our GELU": drawing(("attention", "sum and norm")),
}
if vit_kernels.INTERPRETED or torch.cuda.get_device_capability() >= vit_fused.FP8_CAPABILITY:
    cases |= {
        "fp8 sum and norm": add_norm_fp8(37, 96, True),
        "fp8 sum and norm, one part": add_norm_fp8(3, 128, True),
        "fp8 sum and norm, masked": add_norm_fp8(3, 208, True),
        "fp8 norm alone": add_norm_fp8(5, 208, False),
        "fp8 gelu": gelu_fp8(37, 96),
        "fp8 gelu, one part": gelu_fp8(3, 256),
        "fp8 gelu, masked": gelu_fp8(3, 1360),
        "fp8 rows that are special": rows_of_float8_that_are_special(),
        "fp8 blocks": blocks_fp8(19, 3, 16),
        "fp8 blocks, heads of 24": blocks_fp8(21, 2, 24),
    }
print(json.dumps(cases))

"""What the norm's kernels compute, on the GPU, or by Triton's interpreter: for a process of its own.

Prints one JSON object: for each case, the largest error of each result beside PyTorch's own functions in
float64, relative to the largest value of that result.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import patch_once

sys.path.insert(0, str(Path(__file__).parents[1]))

from repro import config
from repro.files import ReproError
from repro.models import norm_kernels
from repro.models.norm import GroupNorm
from repro.models.unet import ADMUNet, Map, ResidualBlock

torch.set_default_device("cpu" if norm_kernels.INTERPRETED else "cuda")
if norm_kernels.INTERPRETED:
    patch_once()


def draw(*shape, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def maps(n, widths, sides, dtype=torch.float32):
    """Parts of one map, channels-last, whose channels differ in mean and spread."""
    parts = []
    for at, width in enumerate(widths):
        spread = torch.linspace(0.5, 2, width, dtype=torch.float64)[None, :, None, None]
        x = draw(n, width, *sides, seed=at) * spread + draw(1, width, 1, 1, seed=10 + at)
        parts.append(x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_())
    return parts


def of_norm(channels):
    norm = GroupNorm(channels)
    with torch.no_grad():
        norm.weight.copy_(draw(channels, seed=20))
        norm.bias.copy_(draw(channels, seed=21))
    return norm


def expected(parts, norm, scale, shift, offset, silu):
    """By PyTorch's own functions."""
    x = torch.cat(parts, dim=1)
    x = x if offset is None else x + offset.expand(x.shape[:2])[:, :, None, None]
    y = F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
    y = y if scale is None else y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


def errors(results, exact):
    assert len(results) == len(exact)
    return [
        float((result.double() - right).detach().abs().max() / right.detach().abs().max())
        for result, right in zip(results, exact, strict=True)
    ]


def forward_and_gradients(
    widths=(64, 32),
    sides=(5, 7),
    n=3,
    modulated=True,
    offset="n c",
    silu=True,
    dtype=torch.float32,
    compiled=False,
):
    channels = sum(widths)
    norm = of_norm(channels)
    parts = maps(n, widths, sides, dtype)
    scale = (0.3 * draw(n, channels, seed=30)).float() if modulated else None
    shift = draw(n, channels, seed=31).float() if modulated else None
    offset = {"n c": draw(n, channels, seed=32), "c": draw(channels, seed=32), None: None}[offset]
    offset = None if offset is None else offset.float()
    inputs = parts + [given.requires_grad_() for given in (scale, shift, offset) if given is not None]
    upstream = draw(n, channels, *sides, seed=40)

    call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
    y = call(*parts, scale=scale, shift=shift, offset=offset, silu=silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad((y * upstream).sum(), inputs + list(norm.parameters()))

    norm = norm.double()
    wide = {id(given): given.detach().double().requires_grad_() for given in inputs}
    given = [None if g is None else wide[id(g)] for g in (scale, shift, offset)]
    exact = expected([wide[id(part)] for part in parts], norm, *given, silu)
    wanted = torch.autograd.grad((exact * upstream).sum(), [*wide.values(), *norm.parameters()])
    return errors([y, *gradients], [exact, *wanted])


def beside():
    norm, results = of_norm(64), []
    parts = maps(2, (32, 32), (32, 32))
    for fused in (True, False):
        norm.fused = fused
        y, again = norm.beside(*parts, silu=True)
        loss = (y * draw(*y.shape, seed=50)).sum() + sum((part**2).sum() for part in again)
        results.append([y, *torch.autograd.grad(loss, parts + list(norm.parameters()))])
    return errors(results[0], [result.double() for result in results[1]])


def beside_alone():
    """Only what runs beside the norm has a gradient."""
    norm = of_norm(64)
    parts = maps(2, (64,), (6, 4))
    _, (again,) = norm.beside(*parts)
    return errors(torch.autograd.grad((again**2).sum(), parts), [2 * parts[0].double()])


def beside_twice():
    """A single part, given for two uses."""
    norm, results = of_norm(64), []
    (x,), offset = maps(2, (64,), (6, 4)), draw(64, seed=51).float().requires_grad_()
    for fused in (True, False):
        norm.fused = fused
        y, (one, two) = norm.beside(x, offset=offset, silu=True, copies=2)
        loss = (y * draw(*y.shape, seed=50)).sum() + (one**2).sum() + (two**3).sum()
        results.append([y, *torch.autograd.grad(loss, [x, offset, *norm.parameters()])])
    return errors(results[0], [result.double() for result in results[1]])


def added():
    """Maps that are added to the first part: one or two, of one part or of two, over several tiles."""
    results = []
    for widths, sides, many in (((64,), (5, 7), 1), ((64, 32), (20, 30), 2), ((32, 32), (16, 8), 2)):
        norm, found = of_norm(sum(widths)), []
        parts, offset = maps(2, widths, sides), draw(sum(widths), seed=60).float().requires_grad_()
        more = [m.detach().requires_grad_() for m in maps(2, widths[:1] * many, sides)]
        for fused in (True, False):
            norm.fused = fused
            y, again = norm.beside(*parts, more=tuple(more), offset=offset, silu=True)
            alone = norm(*parts, more=tuple(more), offset=offset)
            loss = (y * draw(*y.shape, seed=50)).sum() + sum((part**2).sum() for part in again)
            loss = loss + (alone * draw(*y.shape, seed=51)).sum()
            inputs = [*parts, *more, offset, *norm.parameters()]
            found.append([y, alone, again[0], *torch.autograd.grad(loss, inputs)])
        results += errors(found[0], [result.double() for result in found[1]])
    return results


def network():
    """A whole UNet, compiled, and its parameters' gradients, beside float64 without the kernels."""
    model = config.UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)
    results = []
    for resample_in_blocks in (True, False):
        torch.manual_seed(0)
        net = ADMUNet(replace(model, resample_in_blocks=resample_in_blocks), 8)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(0.1 * draw(*parameter.shape, seed=parameter.numel()))
        net = net.to(memory_format=torch.channels_last)
        x, t = draw(2, 3, 8, 8, seed=70), torch.tensor([3.0, 700.0])
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x.float(), t)
        grads = torch.autograd.grad((y * x.float()).sum(), list(net.parameters()))
        exact = copy.deepcopy(net).double()
        wide = exact(x, t)
        wanted = torch.autograd.grad((wide * x).sum(), list(exact.parameters()))
        # beside the largest gradient: those of biases before a norm of one channel a group are 0
        largest = max(float(grad.abs().max()) for grad in wanted)
        apart = [float((a.double() - b).abs().max()) / largest for a, b in zip(grads, wanted, strict=True)]
        results += [*errors([y], [wide]), *apart]
    return results


def read():
    """How many maps the kernels read, of each kind, in a compiled block's backward pass."""
    launch, seen = norm_kernels.normalise_grad, []

    def watch(first, second, dy, beside_1, beside_2, *others):
        given = [tensor for tensor in (first, second, dy, beside_1, beside_2) if tensor is not None]
        seen.append([tensor.is_contiguous(memory_format=torch.channels_last) for tensor in given])
        return launch(first, second, dy, beside_1, beside_2, *others)

    norm_kernels.normalise_grad = watch
    block = ResidualBlock(64, 32, 16, 0.1, True).to(memory_format=torch.channels_last)
    parts = maps(2, (32, 32), (6, 4))
    h, skip = (Map(part, torch.zeros(32)) for part in parts)
    y, _ = torch.compile(block, backend="aot_eager")(h, torch.zeros(2, 64), skip)
    y.whole().sum().backward()
    norm_kernels.normalise_grad = launch
    return seen


def dropout():
    """The same seed drops the same elements, forwards and backwards; others drop others, 30% of them."""
    norm = of_norm(64)
    (x,) = maps(4, (64,), (32, 32))
    torch.manual_seed(3)
    y = norm(x, silu=True, dropout=0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.manual_seed(3)
    assert torch.equal(norm(x, silu=True, dropout=0.3), y)
    kept = y != 0
    plain = expected([x], norm, None, None, None, True)
    (wanted,) = torch.autograd.grad((plain * kept / 0.7).sum(), x)
    other = norm(x, silu=True, dropout=0.3) != 0
    by_image = [float((~kept[a] & ~kept[b]).double().mean()) for a in range(4) for b in range(4) if a < b]
    neighbours = [float((~kept & ~kept.roll(1, dim)).double().mean()) for dim in (1, 2, 3)]
    return {
        "errors": errors([y, gradient], [(plain * kept / 0.7).double(), wanted.double()]),
        "dropped": float((~kept).double().mean()),
        "dropped_twice": [*by_image, *neighbours, float((~kept & ~other).double().mean())],
        "all": float(norm(x, dropout=1.0).detach().abs().max()),
    }


CASES = {
    "two parts": dict(),
    "one part": dict(widths=(96,)),
    "shift and scale absent": dict(modulated=False, offset="c"),
    "nothing but the norm": dict(widths=(64,), modulated=False, offset=None, silu=False),
    "no activation": dict(silu=False),
    "several tiles": dict(widths=(128, 64), sides=(20, 30), n=1),
    "whole tiles": dict(widths=(64, 64), sides=(16, 8)),
    "odd widths": dict(widths=(40, 24), sides=(9, 7)),
    "one pixel": dict(sides=(1, 1)),
    "many tiles": dict(widths=(64, 32), sides=(40, 40), n=2),
    "whole groups": dict(widths=(64, 64), sides=(32, 32), n=2, offset="c"),
    "narrow": dict(widths=(36, 28), sides=(3, 50)),
    "odd pixels": dict(widths=(96,), sides=(23, 29), modulated=False, offset=None, silu=False),
}


def refused():
    """Messages for maps that do not join."""
    norm, messages = of_norm(64), []
    for widths, sides in (((32, 32), ((4, 4), (3, 3))), ((32, 16), ((4, 4), (4, 4)))):
        parts = [torch.zeros(2, width, *side) for width, side in zip(widths, sides, strict=True)]
        try:
            norm(*parts)
        except ReproError as error:
            messages.append(str(error))
    return messages


def taken():
    """Whether the kernels take maps of these types and numbers of images."""
    map = torch.zeros(2, 8, 4, 4)
    many = map[:1].expand(70_000, -1, -1, -1)
    cases = [(map,), (map, map), (map,) * 3, (map.double(),), (map, map.bfloat16()), (map[:0],), (many,)]
    return [norm_kernels.can_take(case) for case in cases]


if __name__ == "__main__":
    found = {name: forward_and_gradients(**case) for name, case in CASES.items()}
    found["compiled"] = forward_and_gradients(compiled=True)
    found["bfloat16"] = forward_and_gradients(dtype=torch.bfloat16)
    found |= {
        check.__name__: check()
        for check in (beside, beside_alone, beside_twice, added, network, read, refused, taken, dropout)
    }
    print(json.dumps(found))

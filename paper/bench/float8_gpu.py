"""What only a GPU can tell of float8 in the ViT: correctness, configurations, rates of products, forward passes.

    python paper/bench/float8_gpu.py out.json [--parts acbd] [--budget 115]
    TRITON_INTERPRET=1 python paper/bench/float8_gpu.py out.json --tiny     (rehearsal on a CPU)

Parts: a correctness; b kernel configurations in GB/s; c rates of products; d forward passes; w weights' cost.
Forward passes are compiled by processes of their own from the start on, while a runs; timings wait for them.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from repro import bench, config, runs, sample
from repro.models import vit_fused, vit_kernels
from repro.models.vit import ViT

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--tiny", action="store_true")
parser.add_argument("--parts", default="abcwd")
parser.add_argument("--budget", type=float, default=115)
parser.add_argument("--compile", nargs=2)
args = parser.parse_args()
BEGAN = time.perf_counter()
DEVICE = "cpu" if args.tiny else "cuda"
TOKENS, BATCH = (18, 2) if args.tiny else (258, 256)
ROWS = TOKENS * BATCH
NETWORKS = {"ViT-XL/2": (1152, 4608, 28, 16), "ViT-B/2": (768, 3072, 12, 12)}
if args.tiny:
    NETWORKS = {"tiny": (48, 96, 2, 3)}
    vit_fused.check_fp8 = lambda *_: None
    vit_fused._can_take = lambda z, heads: True
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    sys.path.insert(0, "tests")
    from kernels import round_to_float8  # the interpreter's own rounding is wrong

    round_to_float8()
RESULT = {
    "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "parts": {},
}


def elapsed():
    return round(time.perf_counter() - BEGAN, 1)


def note(part, key, value):
    RESULT["parts"].setdefault(part, {})[key] = value
    RESULT["seconds"] = elapsed()
    with open(args.out, "w") as file:
        json.dump(RESULT, file, indent=1)
    print(f"[{elapsed():6.1f}] {part} {key}: {json.dumps(value)[:300]}", flush=True)


def tried(part, key, work):
    """Record what `work()` gives, or its error."""
    if elapsed() > args.budget:
        return note(part, key, "not run: out of time")
    try:
        note(part, key, work())
    except Exception as error:
        traceback.print_exc()
        note(part, key, f"FAILED {type(error).__name__}: {str(error)[:400]}")


def seconds(work, repeats=20, warm_up=3):
    if DEVICE == "cuda":
        return bench.median_seconds(work, repeats, warm_up)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rounded(y):
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (y / scale).to(torch.float8_e4m3fn), scale


def random(*shape, dtype=torch.bfloat16, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


# a. Correctness -------------------------------------------------------------------------------------


def beside(y, scale, exact):
    wanted, of = rounded(exact)
    a, b = y.double(), wanted.double()
    return {
        "share_that_differs": float((a != b).double().mean()),
        "scale_error": float((scale.double() / of - 1).abs().max()),
        "error": float(((a * scale.double() - exact) / of).norm() / (exact / of).norm()),
        "error_of_exact_rounding": float(((b * of - exact) / of).norm() / (exact / of).norm()),
        "nan": int(a.isnan().sum()),
    }


def norm_is_right(width, branch):
    rows = min(ROWS, 4099)
    z, weight, bias = random(1, rows, width, dtype=torch.float32), *random(2, width, dtype=torch.float32)
    z[0, 0], z[0, 1] = 0, 1e15
    z[0, 1, ::2] *= -1
    b = random(1, rows, width) if branch else None
    total, y, scale = vit_kernels.add_norm_fp8(z, b, weight, bias, 1e-6)
    exact = z.double() + (b.double() if branch else 0)
    found = beside(y, scale, F.layer_norm(exact, (width,), weight.double(), bias.double(), 1e-6))
    return found | ({"sum": float((total[:, 2:] - exact[:, 2:]).abs().max())} if branch else {})


def gelu_is_right(width):
    x = random(1, min(ROWS, 4099), width, scale=3.0)
    x[0, 0], x[0, 1] = 0, x[0, 1] * 1e30
    return beside(*vit_kernels.gelu_fp8(x), F.gelu(x.double()))


def special_rows():
    """Of rows with 0 alone, a NaN, an infinity: NaNs after GELU, and after the product, of 64 numbers."""
    x = random(1, 5, 1536)
    x[0, 0], x[0, 1, 3], x[0, 2, 1500], x[0, 3, 7] = 0, float("nan"), float("nan"), float("inf")
    y, scale = vit_kernels.gelu_fp8(x)
    out = vit_fused._linear_fp8(y, scale, random(64, 1536, dtype=torch.float32), torch.zeros(64, device=DEVICE))
    return {
        "zeros": int((y.float() == 0).sum(2)[0, 0]), "nan": y.float().isnan().sum(2).tolist(),
        "nan_of_product": out.isnan().sum(2).tolist(), "product_of_zeros": float(out[0, 0].abs().max()),
    }


def product_is_right(n, tokens, width, out):
    x, scale = rounded(random(n, tokens, width, dtype=torch.float32))
    weight = random(out, width, dtype=torch.float32) * torch.logspace(-3, 3, out, device=DEVICE)[:, None]
    bias = random(out, dtype=torch.float32)
    found = vit_fused._linear_fp8(x, scale, weight, bias)
    w, w_scale = vit_fused._weight_fp8(weight)
    w_own, of_own = rounded(weight.double())
    exact = (x.double() * scale) @ (w.double() * w_scale.double().t()).t() + bias.bfloat16().double()
    size = exact.norm(dim=(0, 1))
    return {
        "error": float(((found - exact).norm(dim=(0, 1)) / size).max()),
        "bf16_rounding": float(((exact.bfloat16() - exact).norm(dim=(0, 1)) / size).max()),
        "weights_that_differ": float((w.float() != w_own.float()).double().mean()),
        "of_weights_scale": float((w_scale[0] / of_own[:, 0] - 1).abs().max()), "dtype": str(found.dtype),
    }


def network_is_right(width, heads, compiled):
    torch.manual_seed(0)
    side = 8 if args.tiny else 32
    net = ViT(config.ViT(patch=2, width=width, depth=3, heads=heads), side, 4, 5).to(DEVICE)
    net.requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x, t = random(5, 4, side, side, dtype=torch.float32), torch.tensor([0, 1, 10, 100, 999], device=DEVICE)
    labels = torch.arange(5, device=DEVICE)
    exact = copy.deepcopy(net).double()
    vit_fused_enabled, vit_fused.enabled = vit_fused.enabled, False
    can, vit_fused._can_take = vit_fused._can_take, lambda *_: False
    exact = exact(x.double(), t.double(), labels)
    vit_fused.enabled, vit_fused._can_take = vit_fused_enabled, can
    asked = runs.compiled(net) if compiled else net
    errors = {}
    for precision in ("bf16", "fp8", "bf16"):
        with torch.no_grad(), sample.autocast(DEVICE, precision, [asked]):
            out = asked(x, t.float(), labels).double()
        errors[precision] = float((out - exact).norm() / exact.norm())
    return errors


# b. Configurations ----------------------------------------------------------------------------------


@triton.jit
def _gelu_rows_kernel(
    x_ptr, y_ptr, scale_ptr, rows,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, TOGETHER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_gelu_fp8_kernel`, of every so many-th row."""
    wide = tl.program_id(0).to(tl.int64) * 0
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        at = (wide + row) * D
        x1, x2 = vit_kernels._load_row(x_ptr + at, D, D1, D2, TOGETHER)
        y1, y2 = vit_kernels._gelu_of(x1), vit_kernels._gelu_of(x2)
        most = vit_kernels._most(y1, y2, D2)
        tl.store(scale_ptr + row, most / 448.0)
        vit_kernels._store_row(y_ptr + at, y1 * (448.0 / most), y2 * (448.0 / most), D, D1, D2, TOGETHER)


@contextmanager
def changed(name, **values):
    before = getattr(vit_kernels, name)
    setattr(vit_kernels, name, values)
    try:
        yield
    finally:
        setattr(vit_kernels, name, before)


def gelu_speed(x, warps, together):
    with changed("GELU_FP8", TOGETHER=together, num_warps=warps):
        spent = seconds(lambda: vit_kernels.gelu_fp8(x))
    return {"ms": 1e3 * spent, "GB/s": 3 * x.numel() / spent / 1e9}


def gelu_rows_speed(x, warps, together, stages, programs):
    y, scale = vit_kernels._gelu_fp8_like(x)
    grid = (programs * vit_kernels._multiprocessors(x),)
    parts = vit_kernels._parts(x.shape[-1])

    def work():
        _gelu_rows_kernel[grid](
            x, y, scale, scale.numel(), **parts, TOGETHER=together, STAGES=stages, num_warps=warps
        )

    spent = seconds(work)
    same = torch.equal(y.view(torch.uint8), vit_kernels.gelu_fp8(x)[0].view(torch.uint8))
    return {"ms": 1e3 * spent, "GB/s": 3 * x.numel() / spent / 1e9, "same": same}


def norm_speed(z, b, fp8, warps):
    ones, zeros = torch.ones(z.shape[-1], device=DEVICE), torch.zeros(z.shape[-1], device=DEVICE)
    with changed("NORM_FP8" if fp8 else "NORM", num_warps=warps):
        if fp8:
            spent = seconds(lambda: vit_kernels.add_norm_fp8(z, b, ones, zeros, 1e-6))
        else:
            spent = seconds(lambda: vit_kernels.add_norm(z, b, ones, zeros, 1e-6, torch.bfloat16))
    return {"ms": 1e3 * spent, "GB/s": (11 if fp8 else 12) * z.numel() / spent / 1e9}


def configurations():
    for name, (width, hidden, *_) in NETWORKS.items():
        x = random(BATCH, TOKENS, hidden, scale=2.0)
        tried("b", f"{name} gelu bf16", lambda x=x: (lambda s: {"ms": 1e3 * s, "GB/s": 4 * x.numel() / s / 1e9})(
            seconds(lambda: vit_kernels.gelu(x))))  # fmt: skip
        for warps in (2, 4, 8, 16):
            for together in (4, 8, 16):
                key = f"{name} gelu fp8, {warps} warps, {together} together"
                tried("b", key, lambda w=warps, t=together, x=x: gelu_speed(x, w, t))
        for warps, programs in ((4, 8), (8, 4)):
            for stages in (1, 2):
                key = f"{name} gelu fp8 in a loop, {warps} warps, {programs} programs, {stages} stages"
                tried("b", key, lambda w=warps, p=programs, s=stages, x=x: gelu_rows_speed(x, w, 8, s, p))
        del x
        z, b = random(BATCH, TOKENS, width, dtype=torch.float32), random(BATCH, TOKENS, width)
        tried("b", f"{name} norm bf16, 4 warps", lambda z=z, b=b: norm_speed(z, b, False, 4))
        for warps in (1, 2, 4, 8):
            tried("b", f"{name} norm fp8, {warps} warps", lambda w=warps, z=z, b=b: norm_speed(z, b, True, w))


# c. Products ----------------------------------------------------------------------------------------


def product_speed(width, out):
    x = random(BATCH, TOKENS, width)
    weight, bias = random(out, width), random(out)
    x8, scale = (each.flatten(0, 1) for each in rounded(x.float()))
    w8, w_scale = rounded(weight.float())
    w_scale, one = w_scale.t().contiguous(), torch.ones((), device=DEVICE)
    flops, found = 2 * ROWS * width * out, {}

    def scaled(bias, fast, a=scale, b=w_scale):
        return torch._scaled_mm(
            x8, w8.t(), scale_a=a, scale_b=b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    ways = {
        "bf16": lambda: F.linear(x, weight, bias),
        "fp8": lambda: scaled(bias, True),
        "fp8, slow sums": lambda: scaled(bias, False),
        "fp8, no bias": lambda: scaled(None, True),
        "fp8, one scale": lambda: scaled(bias, True, one, one),
    }
    for name, work in ways.items():
        try:
            spent = seconds(work, 15)
            found[name] = {"ms": round(1e3 * spent, 4), "TFLOP/s": round(flops / spent / 1e12, 1)}
        except Exception as error:
            found[name] = f"FAILED {str(error)[:200]}"
    exact = (x8[:300].double() * scale[:300]) @ (w8.double() * w_scale.t()).t() + bias.double()
    for fast in (True, False):
        try:
            got = scaled(bias, fast)[:300]
            found[f"error, fast {fast}"] = float((got - exact).norm() / exact.norm())
        except Exception as error:
            found[f"error, fast {fast}"] = f"FAILED {str(error)[:200]}"
    return found


def products():
    for name, (width, hidden, *_) in NETWORKS.items():
        sizes = {"qkv": (width, 3 * width), "fc1": (width, hidden), "fc2": (hidden, width), "proj": (width, width)}
        for product, (k, n) in sizes.items():
            tried("c", f"{name} {product} [{ROWS}, {k}] to {n}", lambda k=k, n=n: product_speed(k, n))


def weights():
    """Milliseconds to form all weights of a network in float8, compiled."""
    for name, (width, hidden, depth, _) in NETWORKS.items():
        sizes = [(3 * width, width), (hidden, width), (width, hidden)]
        given = [random(*size, dtype=torch.float32) for size in sizes]

        def all_of(given):
            return [vit_fused._weight_fp8(weight) for weight in given]

        def cost(given=given, depth=depth, sizes=sizes):
            compiled = all_of if args.tiny else torch.compile(all_of, dynamic=False)
            many = [[w.clone() for w in given] for _ in range(min(depth, 8))]  # so that L2 has none of them
            spent = seconds(lambda: [compiled(some) for some in many], 10) / len(many) * depth
            count = depth * sum(a * b for a, b in sizes)
            return {"ms_of_all": 1e3 * spent, "GB/s_at_5_bytes": 5 * count / spent / 1e9}

        tried("w", name, cost)


# d. Forward passes ----------------------------------------------------------------------------------


def forward_of(name, precision):
    """As `bench.measure` times it, with random weights."""
    torch.manual_seed(0)
    if args.tiny:
        width, _, depth, heads = NETWORKS[name]
        data = config.Data("none", resolution=8, channels=4, classes=5)
        run = bench.training_of(bench.Variant(config.ViT(patch=2, width=width, depth=depth, heads=heads, mlp_ratio=2.0), data, batch=BATCH))
    else:
        run = bench.training_of(bench.VARIANTS[name])
    denoiser = runs.build(run).to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)
    bench.fill_zeros(denoiser.net)
    if not args.tiny:
        denoiser.net = runs.compiled(denoiser.net)
    side = run.data.resolution
    x = torch.randn(BATCH, run.data.channels, side, side, device=DEVICE)
    labels = torch.arange(BATCH, device=DEVICE) % run.data.classes
    given = (x, torch.tensor(1.0, device=DEVICE), labels)
    if not args.tiny:
        return bench.forward_in(precision, denoiser, given)

    @torch.no_grad()
    def forward():
        with sample.autocast(DEVICE, precision, [denoiser.net]):
            denoiser(*given)

    return forward


def forward_speed(name, precision):
    began = time.perf_counter()
    work = forward_of(name, precision)
    for _ in range(4):
        work()
    started = time.perf_counter() - began
    spent = seconds(work, 30, 10)
    found = {"ms": 1e3 * spent, "forwards_per_second": BATCH / spent, "seconds_to_start": round(started, 1)}
    note("d", f"{name} {precision}", found)
    if DEVICE == "cuda":
        found |= bench.busy_times(work)
        found["largest_kernels_ms"] = found["largest_kernels_ms"][:14]
        found["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


FORWARDS = [(name, precision) for precision in ("fp8", "bf16") for name in NETWORKS]


def main():
    if args.compile:
        forward_of(*args.compile)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return
    compilings = []
    if "d" in args.parts:
        for one in FORWARDS:
            command = [sys.executable, __file__, args.out, *["--tiny"] * args.tiny, "--compile", *one]
            log = f"{args.out}.{len(compilings)}.log"
            with open(log, "w") as file:
                compilings.append((one, log, subprocess.Popen(command, stdout=file, stderr=file)))
    if "a" in args.parts:
        for name, (width, hidden, _, heads) in NETWORKS.items():
            for branch in (True, False):
                tried("a", f"{name} norm, branch {branch}", lambda w=width, b=branch: norm_is_right(w, b))
            tried("a", f"{name} gelu", lambda h=hidden: gelu_is_right(h))
            for n, tokens in ((2, TOKENS), (5, TOKENS), (1, 17)):
                key = f"{name} product of {n} x {tokens}"
                tried("a", key, lambda n=n, t=tokens, w=width, h=hidden: product_is_right(n, t, w, h))
        tried("a", "gelu of 1536", lambda: gelu_is_right(1536))
        tried("a", "rows that are special", special_rows)
        for width, heads in ((48, 3),) if args.tiny else ((384, 6), (144, 2)):
            for compiled in (False,) if args.tiny else (False, True):
                key = f"ViT of {width}, compiled {compiled}"
                tried("a", key, lambda w=width, h=heads, c=compiled: network_is_right(w, h, c))
    for one, log, compiling in compilings:
        try:
            compiling.wait(timeout=max(5, args.budget - elapsed()))
        except subprocess.TimeoutExpired:
            compiling.kill()
        well = compiling.wait() == 0
        note("d", f"compiling {' '.join(one)}", "well" if well else "FAILED " + open(log).read()[-1500:])
    if "c" in args.parts:
        products()
    if "d" in args.parts:
        for one in FORWARDS:
            tried("d", " ".join(one), lambda one=one: forward_speed(*one))
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    if "w" in args.parts:
        weights()
    if "b" in args.parts:
        configurations()
    note("end", "all", elapsed())


if __name__ == "__main__":
    main()

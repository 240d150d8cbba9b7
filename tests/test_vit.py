"""The ViT against the released tensors' shapes, and against an independent float64 computation."""

import copy
import dataclasses
import math
import re
from typing import ClassVar, NamedTuple

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import of_kernels
from released import listed
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from repro import config, plainly, presets, sample
from repro.files import ReproError
from repro.models import vit_fused
from repro.models.vit import ViT, unpatchify

SIZES = {name: (model, data.resolution, data.channels) for name, (model, data) in presets.TABLE_1.items()}

TINY = config.ViT(patch=2, width=24, depth=3, heads=3, time_rows=20)


def on_meta(name: str, classes: int, time_rows: int) -> ViT:
    """A model of Table 1 without memory for its weights."""
    model, resolution, channels = SIZES[name]
    with torch.device("meta"):
        return ViT(dataclasses.replace(model, time_rows=time_rows), resolution, channels, classes)


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def scrambled(classes: int = 5, dtype: torch.dtype = torch.float64, **changes) -> ViT:
    """A small ViT for 8 x 8 images in which every parameter matters (at its start many are zero)."""
    net = ViT(dataclasses.replace(TINY, **changes), resolution=8, in_channels=3, classes=classes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net.to(dtype)


def inputs(n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.tensor([0.0, 19.0, 7.0, 7.0])[:n]
    return x, t, torch.tensor([4, 0, 5, 2])[:n]


# Against the released checkpoints


@pytest.mark.parametrize(
    "name, key",
    [
        ("ViT-Large", "minsnr-vit-l-imagenet64 (ema_0.9999_large.pt)"),
        ("ViT-XL", "minsnr-vit-xl-imagenet256-latent (ema_0.9999_xl.pt)"),
        ("ViT-Base", "minsnr-vit-b-imagenet256-latent (training config)"),
    ],
)
def test_every_released_tensor_has_its_place_by_name_and_shape(name, key):
    file = listed(key)
    net = on_meta(name, classes=1000, time_rows=4000)
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == file["state_dict"]
    assert count(net) == file["parameters"]


@pytest.mark.parametrize(
    "name, parameters",
    [("ViT-Base", 89_109_520), ("ViT-Large", 269_983_792), ("ViT-XL", 452_390_416)],
)
def test_parameter_counts_of_the_released_networks(name, parameters):
    assert count(on_meta(name, classes=1000, time_rows=4000)) == parameters


@pytest.mark.parametrize(
    "name, millions", [("ViT-Small", 43), ("ViT-Base", 88), ("ViT-Large", 269), ("ViT-XL", 451)]
)
def test_table_1_counts_a_time_table_of_4000_rows_and_no_class_table(name, millions):
    assert round(count(on_meta(name, classes=0, time_rows=4000)) / 1e6) == millions


# Against plain NumPy, written from the published description of the network


def numpy_vit(net: ViT, x: np.ndarray, t: list[int], labels: list[int] | None, heads: int) -> np.ndarray:
    """The same function in float64: loops over images, patches and heads, an explicit softmax."""
    w = {name: value.detach().double().numpy() for name, value in net.state_dict().items()}
    patch = w["patch_embed.proj.weight"].shape[-1]
    depth = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    n, channels, side, _ = x.shape
    width = w["pos_embed"].shape[-1]
    erf = np.vectorize(math.erf)

    def norm(z, prefix):
        centred = z - z.mean(-1, keepdims=True)
        std = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred / std * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]

    def linear(z, prefix):
        return z @ w[f"{prefix}.weight"].T + w[f"{prefix}.bias"]

    def attention(z, prefix):
        q, k, v = np.split(z @ w[f"{prefix}.qkv.weight"].T, 3, axis=-1)
        q, v = q + w[f"{prefix}.q_bias"], v + w[f"{prefix}.v_bias"]
        size = width // heads
        mixed = np.empty_like(z)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[:, part] @ k[:, part].T / math.sqrt(size)
            share = np.exp(logits - logits.max(-1, keepdims=True))
            mixed[:, part] = share / share.sum(-1, keepdims=True) @ v[:, part]
        return linear(mixed, f"{prefix}.proj")

    def mlp(z, prefix):
        hidden = linear(z, f"{prefix}.fc1")
        return linear(0.5 * hidden * (1 + erf(hidden / math.sqrt(2))), f"{prefix}.fc2")

    out = np.empty_like(x)
    for image in range(n):
        tokens = [w["time_embedding.weight"][t[image]]]
        if labels is not None:
            tokens.append(w["class_embedding.weight"][labels[image]])
        first = len(tokens)
        corners = [(row, col) for row in range(0, side, patch) for col in range(0, side, patch)]
        for row, col in corners:
            pixels = x[image, :, row : row + patch, col : col + patch]
            kernel = w["patch_embed.proj.weight"]
            tokens.append((kernel * pixels).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
        z = np.stack(tokens) + w["pos_embed"][0]
        for layer in range(depth):
            z = z + attention(norm(z, f"blocks.{layer}.norm1"), f"blocks.{layer}.attn")
            z = z + mlp(norm(z, f"blocks.{layer}.norm2"), f"blocks.{layer}.mlp")
        for (row, col), token in zip(corners, z[first:], strict=True):
            pixels = linear(token, "linear_projection").reshape(patch, patch, channels)
            out[image, :, row : row + patch, col : col + patch] = pixels.transpose(2, 0, 1)
    return out


@pytest.mark.parametrize(
    "classes, changes",
    [(5, {}), (0, {}), (5, {"patch": 4, "heads": 2}), (6, {"null_class": False}), (5, {"mlp_ratio": 1.5})],
)
def test_equals_a_plain_float64_computation(classes, changes):
    net = scrambled(classes, **changes)
    x, t, labels = inputs()
    labels = labels if classes else None
    expected = numpy_vit(
        net, x.numpy(), [0, 19, 7, 7], labels.tolist() if classes else None, changes.get("heads", TINY.heads)
    )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(net(x, t, labels).detach().numpy(), expected, rtol=0, atol=1e-11)


def test_float32_stays_close_to_float64():
    x, t, labels = inputs()
    exact = scrambled()(x, t, labels)
    single = scrambled(dtype=torch.float32)(x.float(), t, labels)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 2e-6 * exact.abs().max()


@given(
    patch=st.integers(1, 5),
    side=st.integers(1, 4),
    channels=st.integers(1, 4),
    n=st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_unpatchify_inverts_cutting_into_patches(patch, side, channels, n):
    size = patch * side
    image = torch.arange(float(n * channels * size * size)).view(n, channels, size, size)
    # F.unfold gives (channels, p, p) per patch; the network's output is (p, p, channels).
    patches = F.unfold(image, patch, stride=patch).view(n, channels, patch, patch, side * side)
    tokens = patches.permute(0, 4, 2, 3, 1).reshape(n, side * side, patch * patch * channels)
    assert torch.equal(unpatchify(tokens, patch, size), image)


# Time and class


def test_a_timestep_means_its_nearest_row():
    net = scrambled()
    x, t, labels = inputs()
    assert torch.equal(net(x, t + 0.4, labels)[:1], net(x, t, labels)[:1])
    shifted = t + torch.tensor([0.6, -0.6, 0.0, 0.0])
    assert torch.equal(net(x, shifted, labels), net(x, torch.tensor([1.0, 18.0, 7.0, 7.0]), labels))
    assert not torch.allclose(net(x, shifted, labels)[:2], net(x, t, labels)[:2])


def test_no_labels_is_the_null_class_for_all():
    net = scrambled(classes=5)
    x, t, _ = inputs()
    null = net(x, t, torch.full((4,), 5))
    assert torch.equal(net(x, t, None), null)
    assert net.class_embedding.num_embeddings == 6
    assert not torch.allclose(net(x, t, torch.full((4,), 4)), null)


def test_unconditional_tokens_are_time_and_patches():
    net = scrambled(classes=0)
    assert net.class_embedding is None
    assert net.pos_embed.shape == (1, 1 + 16, TINY.width)
    assert scrambled(classes=5).pos_embed.shape == (1, 2 + 16, TINY.width)


def test_images_of_a_batch_do_not_mix():
    net = scrambled()
    x, t, labels = inputs()
    torch.testing.assert_close(net(x, t, labels)[2:3], net(x[2:3], t[2:3], labels[2:3]), rtol=0, atol=1e-12)


# Start and gradients


def test_initialisation():
    torch.manual_seed(0)
    model = config.ViT(patch=4, width=256, depth=4, heads=4)
    net = ViT(model, resolution=32, in_channels=3, classes=100)

    def assert_normal(weight, std):
        """Mean and standard deviation as those of a normal sample, to five standard errors."""
        error = std / math.sqrt(weight.numel())
        assert abs(weight.mean().item()) < 5 * error
        assert abs(weight.std().item() - std) < 5 * error / math.sqrt(2)

    for layer, block in enumerate(net.blocks, start=1):
        assert_normal(block.attn.qkv.weight, 0.02)
        assert_normal(block.mlp.fc1.weight, 0.02)
        assert_normal(block.attn.proj.weight, 0.02 / math.sqrt(2 * layer))
        assert_normal(block.mlp.fc2.weight, 0.02 / math.sqrt(2 * layer))
        for norm in (block.norm1, block.norm2):
            assert (norm.weight == 1).all() and (norm.bias == 0).all() and norm.eps == 1e-6
        for zero in (block.attn.q_bias, block.attn.v_bias, block.attn.proj.bias, block.mlp.fc1.bias):
            assert (zero == 0).all()
        assert (block.mlp.fc2.bias == 0).all()
    assert_normal(net.pos_embed, 0.02)
    assert_normal(net.linear_projection.weight, 0.001 * 0.02)
    assert (net.linear_projection.bias == 0).all()
    assert_normal(net.time_embedding.weight, 1.0)
    assert_normal(net.class_embedding.weight, 1.0)
    out = net(torch.randn(2, 3, 32, 32), torch.tensor([3.0, 900.0]), torch.tensor([1, 100]))
    assert 0 < out.abs().max() < 0.01


def test_gradients_reach_every_parameter_and_only_the_rows_looked_up():
    torch.manual_seed(0)
    net = ViT(TINY, resolution=8, in_channels=3, classes=5)
    x, t, labels = inputs(dtype=torch.float32)
    net(x, t, labels).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    used = net.time_embedding.weight.grad.abs().amax(1).nonzero().flatten().tolist()
    assert used == [0, 7, 19]
    assert net.class_embedding.weight.grad.abs().amax(1).nonzero().flatten().tolist() == [0, 2, 4, 5]


# Precision and compilation


class DtypesSeen(TorchDispatchMode):
    """Records, in order, the dtype in which norms, matrix products and GELU are computed."""

    operators: ClassVar = {
        "native_layer_norm": ("norm", 0),
        "mm": ("product", 0),
        "bmm": ("product", 0),
        "addmm": ("product", 1),
        "gelu": ("gelu", 0),
    }

    def __init__(self):
        super().__init__()
        self.seen = {"norm": [], "product": [], "gelu": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.operators:
            kind, argument = self.operators[name]
            self.seen[kind].append(args[argument].dtype)
        return func(*args, **(kwargs or {}))


def test_under_autocast_norms_and_pixels_are_float32_and_the_blocks_bfloat16():
    net = scrambled(dtype=torch.float32)
    x, t, labels = inputs(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), DtypesSeen() as calls:
        out = net(x, t, labels)
    assert out.dtype == torch.float32
    assert calls.seen["norm"] == [torch.float32] * 2 * TINY.depth
    products = [torch.float32] + [torch.bfloat16] * 4 * TINY.depth + [torch.float32]  # pixels enter and leave
    assert calls.seen["product"] == products
    exact = scrambled()(*inputs())
    assert 1e-5 < (out - exact).abs().max() / exact.abs().max() < 0.05


def test_norms_are_float32_in_a_bfloat16_network_too():
    net = scrambled(dtype=torch.bfloat16)
    x, t, labels = inputs(dtype=torch.bfloat16)
    with torch.no_grad(), DtypesSeen() as calls:
        assert net(x, t, labels).dtype == torch.bfloat16
    assert calls.seen["norm"] == [torch.float32] * 2 * TINY.depth
    assert calls.seen["gelu"] == [torch.bfloat16] * TINY.depth


@pytest.mark.parametrize("with_labels", [True, False])
def test_compiles_to_one_graph(with_labels):
    net = scrambled()
    x, t, labels = inputs()
    labels = labels if with_labels else None
    jaxtyping.config.update("jaxtyping_disable", True)  # its checks, installed for the tests, break graphs
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")  # a graph break raises
    try:
        out = compiled(x, t, labels)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    torch.testing.assert_close(out, net(x, t, labels), rtol=0, atol=1e-12)


def test_runs_on_meta_for_counting():
    with torch.device("meta"):
        net = ViT(TINY, resolution=8, in_channels=3, classes=5)
        out = net(torch.empty(2, 3, 8, 8), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert out.shape == (2, 3, 8, 8)


# Errors


@pytest.mark.parametrize(
    "changes, resolution, message",
    [
        ({"patch": 3}, 64, "patch 3 cannot cover images of side 64"),
        ({"patch": 0}, 64, "patch 0 cannot cover images of side 64"),
        ({"width": 512, "heads": 6}, 64, "width 512 cannot be split into 6 heads.*such as 4 or 8"),
        ({"width": 7, "heads": 6}, 64, "width 7 cannot be split into 6 heads.*such as 7"),
        ({"heads": 0}, 64, "cannot be split into 0 heads"),
    ],
)
def test_sizes_that_do_not_fit(changes, resolution, message):
    with pytest.raises(ReproError, match=message):
        ViT(dataclasses.replace(TINY, **changes), resolution, in_channels=3, classes=0)


def test_labels_it_cannot_take():
    x, t, labels = inputs()
    with pytest.raises(ReproError, match="unconditional .classes = 0.: call it with labels = None"):
        scrambled(classes=0)(x, t, labels)
    with pytest.raises(ReproError, match="5 classes and no null class: pass labels"):
        scrambled(classes=5, null_class=False)(x, t, None)
    with pytest.raises(ReproError, match="label lies outside .* 0 to 4"):
        scrambled(classes=5, null_class=False)(x, t, labels)  # 5 would be the null class
    with pytest.raises(ReproError, match="label lies outside .* 0 to 5"):
        scrambled(classes=5)(x, t, labels + 1)


@pytest.mark.parametrize("timestep", [20.0, 19.6, -1.0, float("nan"), float("inf")])
def test_timesteps_outside_the_table(timestep):
    x, t, labels = inputs()
    t[1] = timestep
    with pytest.raises(ReproError, match="timestep lies outside .* 0 to 19"):
        scrambled()(x, t, labels)


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 1, 8, 8), (4, 3, 8, 4)])
def test_images_of_another_size(shape):
    _, t, labels = inputs()
    size = " x ".join(map(str, shape[1:]))
    with pytest.raises(ReproError, match=f"takes images of 3 x 8 x 8 .* not {size}"):
        scrambled()(torch.zeros(shape, dtype=torch.float64), t, labels)


# The kernels


@pytest.fixture(scope="module")
def by_kernels():
    if vit_fused.vit_kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    return of_kernels("vit_cases.py")


@pytest.mark.parametrize(
    "case",
    ["258 tokens", "heads of 72", "whole blocks", "fewer tokens than a block", "other blocks",
     "other blocks, heads of 40", "a long tail", "a long tail, heads of 24"],
)  # fmt: skip
def test_attention_by_kernels_is_attention_to_half_precision(by_kernels, case):
    out, lse, gradient, queries, values = by_kernels[case]
    assert max(out, gradient, queries, values) < 6e-4 and lse < 1e-6  # float16 rounds to 5e-4 at most


def test_attention_by_kernels_of_large_logits_and_of_bfloat16(by_kernels):
    out, lse, gradient, *_ = by_kernels["large logits"]  # of -20: gradients of two logits nearly cancel
    assert out < 6e-4 and lse < 1e-6 and gradient < 2e-2
    assert 1e-3 < max(by_kernels["bfloat16"]) < 1e-2


@pytest.mark.parametrize(
    "case",
    ["sum and norm", "sum and norm, one part", "sum and norm, masked", "norm alone", "gelu", "gelu, wide",
     "gelu, whole tiles"],
)  # fmt: skip
def test_what_stands_between_products_is_rounded_once(by_kernels, case):
    """Half precision where a product or a branch takes it, and float32 elsewhere: sums for parameters too."""
    found = by_kernels[case]
    half, results = {"sum": ([1, 5], 7), "norm": ([1], 5), "gelu": ([0, 1], 3)}[re.match(r"\w+", case)[0]]
    assert len(found) == results
    for at, error in enumerate(found):
        assert error < (3e-4 if at in half else 1e-6)


def test_gelu_and_its_slope_are_near_at_every_number_of_half_precision(by_kernels):
    *absolute, of_the_tail = by_kernels["gelu of all"]
    assert max(absolute) < 4e-7  # a GPU's powers of 2 are off by up to 2e-7 of them
    assert of_the_tail < 2.5e-3


@pytest.mark.parametrize(
    "case",
    ["gelu of product", "gelu of product, whole tiles", "gelu of product, narrow",
     "gelu of product, tiles 2 down and 3 across", "gelu of product, bfloat16"],
)  # fmt: skip
def test_gelu_of_a_product_is_rounded_once(by_kernels, case):
    (error,) = by_kernels[case]
    assert error < (4e-3 if "bfloat16" in case else 2.5e-4)  # the interpreter cuts bfloat16 off


def test_factors_that_make_no_product_are_named(by_kernels):
    assert by_kernels["no product"] == [
        "no product is of (3, 16), (24, 16) and (8,), in torch.float16 and torch.float16",
        "no product is of (3, 16), (24, 8) and (24,), in torch.float16 and torch.float16",
        "no product is of (3, 16), (24, 16) and (24,), in torch.float16 and torch.bfloat16",
    ]


def test_where_no_gradient_is_asked_for_gelu_is_formed_with_its_product(by_kernels):
    error, count = by_kernels["drawing"]
    without, never = by_kernels["drawing, without our GELU"]
    assert count == 2 and never == 0
    assert max(error, without) < 2e-3 and error != without


@pytest.mark.parametrize(
    "case",
    ["blocks", "blocks, heads of 24", "blocks, computed again", "blocks, without our attention",
     "blocks, without our sum and norm", "blocks, without our GELU", "blocks, without our kernels"],
)  # fmt: skip
def test_blocks_by_kernels_give_every_parameter_its_gradient(by_kernels, case):
    assert len(by_kernels[case]) == 2 + 2 * 13
    found = by_kernels[case]
    assert found[17] < 1e-2  # of the second block's queries' bias, which nearly cancels
    assert max(found[:17] + found[18:]) < 2e-3


def test_kernels_are_taken_away_one_by_one_and_blocks_computed_again_are_the_blocks(by_kernels):
    cases = {case: found for case, found in by_kernels.items() if re.fullmatch("blocks(, without.*)?", case)}
    assert len({tuple(found) for found in cases.values()}) == len(cases) == 2 + len(plainly.PARTS)
    assert by_kernels["blocks, computed again"] == by_kernels["blocks"]


def test_an_unknown_kernel_is_named():
    with pytest.raises(ReproError, match="ViTs have no kernel for 'norm'; known: attention, sum and norm, G"):
        plainly.use_kernels(("attention", "norm"))


def test_a_compiled_vit_computes_each_block_again_just_before_its_gradients(by_kernels, inductor):
    """By token and width it keeps 4 bytes of the sum that enters each of four blocks, and 2 of each block's
    branch; what enters the patches' product comes on top. Else all would be live at once."""
    (alone, plainly_run), (kept, run) = by_kernels["compiled"]
    assert 4 + 2 <= kept < 6.5 and alone > 36
    assert "attention" not in plainly_run and plainly_run.count("attention_grad") == 4
    forward, backward = ["add_norm", "attention", "add_norm", "gelu"], ["gelu_grad", "attention_grad"]
    in_order = [name for name in run if name not in ("copy", "add_norm_grad")]
    assert in_order == 4 * (forward + backward)


SMALL_GPU = 99 * 1024
"""Bytes of shared memory that a program has at most on GPUs of compute capability 8.6, 8.9 and 12.0."""


def shared_memory(kernel, how):
    """Bytes that a kernel of attention needs, in bfloat16, compiled without a GPU for capability 8.6."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    how = dict(how)
    options = {name: how.pop(name) for name in ("num_warps", "num_stages")}
    kinds = {"qkv_ptr": "*bf16", "out_ptr": "*bf16", "dout_ptr": "*bf16", "dqkv_ptr": "*bf16", "width": "i32"}
    kinds |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "sum_ptr": "*fp32", "scale": "fp32", "back": "fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in how else kinds[name] for name in names}
    constants = {(names.index(name),): value for name, value in how.items()}
    aligned = [at for at, name in enumerate(names) if name == "width" or name.endswith("_ptr")]
    source = ASTSource(kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 86, 32), options=options).metadata.shared


@pytest.mark.parametrize("d", [16, 40, 64, 72, 80, 96, 104, 120, 128])
def test_attention_fits_small_gpus(d):
    """By the largest of its kernels: forward, and of both gradients, for whole blocks and what is left."""
    kernels = vit_fused.vit_kernels
    if kernels is None or kernels.INTERPRETED:
        pytest.skip("needs Triton's compiler")
    qkv = torch.empty(256, 258, 3 * 8 * d, dtype=torch.bfloat16, device="meta")
    todo = [(kernels._attention_kernel, kernels._launch(qkv, 8, kernels.FORWARD))]
    for kernel, sizes in (
        (kernels._query_gradient_kernel, kernels.QUERIES),
        (kernels._key_gradient_kernel, kernels.KEYS),
    ):
        todo += [(kernel, launch) for launch in kernels._launches(qkv, 8, sizes)]
    assert len(todo) == 5
    assert 0 < max(shared_memory(kernel, how) for kernel, (_, how) in todo) <= SMALL_GPU


# The kernels, and products, of float8 numbers


@pytest.fixture(scope="module")
def in_fp8(by_kernels):
    if "fp8 blocks" not in by_kernels:
        pytest.skip("this GPU multiplies no float8 numbers")
    return by_kernels


@pytest.mark.parametrize(
    "case",
    ["fp8 sum and norm", "fp8 sum and norm, one part", "fp8 sum and norm, masked", "fp8 norm alone",
     "fp8 gelu", "fp8 gelu, one part", "fp8 gelu, masked"],
)  # fmt: skip
def test_rows_of_float8_are_rounded_once_over_scales_of_their_own(in_fp8, case):
    """Beside float64 rounded so: but for some numbers about halfway between two, which may be the other."""
    share, most, of_scale, of_all, *of_sum = in_fp8[case]
    assert share < 5e-3 and most <= 0.125  # a step, of a number right above a power of 2
    assert of_scale < 2e-6 and abs(of_all - 1) < 1e-3
    assert all(error < 1e-6 for error in of_sum)


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so(in_fp8):
    of_gelu, of_norm = in_fp8["fp8 rows that are special"]
    assert of_gelu[0] == of_norm[0] == [96, 0, True]
    for row in range(1, 5):  # a NaN or an infinity in one place
        assert of_gelu[row][1] >= 1 and of_norm[row][1] == 96
    assert of_gelu[5:] == of_norm[5:] == [[0, 0, True]] * 3


@pytest.mark.parametrize("case", ["fp8 blocks", "fp8 blocks, heads of 24"])
def test_blocks_in_float8_are_off_by_its_rounding_alone(in_fp8, case):
    """Of what three blocks add. Float8 keeps 4 bits: both factors of a product are off by some 2.6% a number.

    The first block is in bfloat16, which alone would put them off by 0.9%; the scales of neighbouring
    channels, by 30%.
    """
    exact, emulated, emulated_in_all = in_fp8[case]
    assert 0.015 < exact < 0.06
    assert emulated < 0.8 * exact  # in float64 too, with the same factors rounded to float8
    assert emulated < 0.8 * emulated_in_all


def test_weights_in_float8_have_a_scale_for_each_output_channel():
    if vit_fused.vit_kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 64, generator=generator) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0
    found, scale = vit_fused._weight_fp8(weight)
    assert found.dtype == torch.float8_e4m3fn and scale.shape == (1, 7) and scale.is_contiguous()
    exact = weight.double()
    others = [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(scale[0, others], exact.abs().amax(1)[others] / 448, rtol=1e-6)
    assert not found[3].float().any() and scale[0, 3] > 0
    wanted = (exact[others] / exact[others].abs().amax(1, keepdim=True) * 448).to(torch.float8_e4m3fn)
    assert (found[others].float() != wanted.float()).double().mean() < 5e-3
    again = found.double() * scale.double().t()
    # half a step: 1/16 of a number, or of the least normal one, 2^-6, over its scale
    assert ((again - exact).abs() <= 1.001 * torch.maximum(exact.abs(), scale.t() * 2**-6) / 16).all()
    weight[0, 0], weight[1, 1] = float("nan"), float("inf")
    found, scale = vit_fused._weight_fp8(weight)
    assert ((found.float() * scale.t()).isnan().any(1) == torch.tensor([True, True] + [False] * 5)).all()


def test_float8_is_for_a_block_of_code_even_where_that_fails_or_holds_another():
    assert not vit_fused.fp8
    with vit_fused.products(float8=True):
        assert vit_fused.fp8
        with vit_fused.products(float8=False):
            assert not vit_fused.fp8
        assert vit_fused.fp8
    with pytest.raises(KeyError), vit_fused.products(float8=True):
        raise KeyError
    assert not vit_fused.fp8


def test_a_compiled_vit_is_compiled_again_for_float8(monkeypatch, unchecked):
    """In one graph each; what the blocks compute is replaced, as it needs a GPU."""
    monkeypatch.setattr(vit_fused, "_can_take", lambda z, heads: True)
    monkeypatch.setattr(vit_fused, "_block_fp8", lambda block, z, branch: (2 * z, z))
    monkeypatch.setattr(vit_fused, "_attend", lambda y, attn: (0 * y, None))
    monkeypatch.setattr(vit_fused, "_mlp", lambda y, mlp: y)
    monkeypatch.setattr(vit_fused, "_add_norm", lambda z, branch, bias, norm: (z, 0 * z))
    net = scrambled(dtype=torch.float32)
    x, t, labels = inputs(dtype=torch.float32)
    torch.compiler.reset()
    traced = []

    def eager(graph, inputs):
        traced.append(graph)
        return graph

    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend=eager)
    found = []
    with torch.no_grad():
        for float8 in (False, True, False, True):
            with vit_fused.products(float8=float8):
                found.append(compiled(x, t, labels))
                torch.testing.assert_close(found[-1], net(x, t, labels))
    assert len(traced) == 2
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.allclose(found[0], found[1])


def test_float8_is_refused_where_blocks_would_be_plain_or_a_gradient_is_asked_for(monkeypatch):
    net = scrambled(dtype=torch.float32)
    given = inputs(dtype=torch.float32)
    with vit_fused.products(float8=True):
        with pytest.raises(ReproError, match="need a ViT on a GPU under autocast"):
            net(*given)
        monkeypatch.setattr(vit_fused, "_can_take", lambda z, heads: True)
        for frozen in ((), ("time_embedding", "class_embedding", "patch_embed", "pos_embed")):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
            with pytest.raises(ReproError, match="have no gradient: use torch.no_grad, or bf16"):
                net(*given)


@pytest.mark.parametrize(
    "sizes, capability, message",
    [
        ((258, 1152, 16, 4608), (9, 0), None),
        ((258, 768, 12, 3072), (8, 9), None),
        ((258, 384, 6, 1536), (12, 0), None),
        ((258, 768, 12, 3072), (8, 6), "compute capability 8.9 or more, .* this one has 8.6: take bf16"),
        ((258, 72, 3, 288), (9, 0), "multiples of 16, and this one is 72 wide, 288 between"),
        ((258, 768, 12, 3000), (9, 0), "multiples of 16, and this one is 768 wide, 3000 between"),
        ((258, 1024, 4, 4096), (9, 0), "at most 1024 tokens, and heads of .*258 tokens, and heads of 256"),
        ((1026, 768, 12, 3072), (9, 0), "this one has 1026 tokens, and heads of 64"),
    ],
)
def test_which_vits_and_gpus_float8_is_for(monkeypatch, sizes, capability, message):
    if vit_fused.vit_kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if message is None:
        vit_fused.check_fp8("cuda:1", *sizes)
        return
    with pytest.raises(ReproError, match=message):
        vit_fused.check_fp8("cuda:1", *sizes)


def test_float8_needs_triton_and_a_gpu(monkeypatch):
    net = scrambled()
    monkeypatch.setattr(vit_fused, "vit_kernels", object())
    with pytest.raises(ReproError, match="fp8 needs an NVIDIA GPU, and this is cpu: take fp32 or bf16"):
        net.check_fp8("cpu")
    monkeypatch.setattr(vit_fused, "vit_kernels", None)
    with pytest.raises(ReproError, match="fp8 needs Triton, which is not installed: take bf16"):
        net.check_fp8("cuda")
    seen = []
    monkeypatch.setattr(vit_fused, "check_fp8", lambda *given: seen.append(given))
    net.check_fp8("cuda")
    assert seen == [("cuda", 18, 24, 3, 96)]


@pytest.mark.parametrize(
    "images, depth, width, dtype, major, taken",
    [
        (88, 768, 3072, torch.bfloat16, 9, True),
        (88, 768, 3072, torch.float16, 9, True),
        (87, 768, 3072, torch.bfloat16, 9, False),  # fewer than 16 tiles for each multiprocessor
        (88, 768, 3072, torch.bfloat16, 8, False),
        (88, 768, 3072, torch.bfloat16, 10, False),
        (88, 768, 3072, torch.float32, 9, False),
        (99, 768, 3076, torch.bfloat16, 9, False),  # whose rows lie at odd addresses
        (99, 764, 3072, torch.bfloat16, 9, False),
        (0, 768, 3072, torch.bfloat16, 9, False),
    ],
)
def test_what_forms_gelu_with_its_product(images, depth, width, dtype, major, taken, monkeypatch):
    """On a GPU as an H200 is, of 132 multiprocessors, and on others."""
    kernels = vit_fused.vit_kernels
    if kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "_major", lambda gpu: major)
    monkeypatch.setattr(kernels, "_processors", lambda gpu: 132)
    with FakeTensorMode():
        x = torch.empty(images, 258, depth, dtype=dtype, device="cuda:0")
        weight = torch.empty(width, depth, device="cuda:0")
        assert kernels.can_multiply(x, weight) == taken
        assert not kernels.can_multiply(x.to("meta"), weight)


class OnGPU(torch.Tensor):
    is_cuda = True


def test_kernels_are_for_gpus_under_autocast_alone(monkeypatch):
    if vit_fused.vit_kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    monkeypatch.setattr(vit_fused.vit_kernels, "can_attend", lambda *_: True)
    z = torch.zeros(1, 4, 64)
    gpu = z.as_subclass(OnGPU)
    assert not vit_fused.can_take(gpu, 1)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert vit_fused.can_take(gpu, 1)
    assert not vit_fused.can_take(z, 1)
    assert not vit_fused.can_take(gpu.double(), 1)


@pytest.mark.parametrize(
    "shape, dtype, heads, taken",
    [
        ((2, 258, 768), torch.bfloat16, 12, True),
        ((2, 258, 1152), torch.float16, 16, True),
        ((2, 258, 768), torch.float32, 12, False),
        ((2, 258, 24), torch.bfloat16, 3, False),  # heads of 8
        ((2, 258, 36), torch.bfloat16, 2, False),  # of 18, which lie at odd addresses
        ((2, 258, 512), torch.bfloat16, 2, False),  # of 256
        ((2, 1025, 768), torch.bfloat16, 12, False),
        ((0, 258, 768), torch.bfloat16, 12, False),
    ],
)
def test_what_the_attention_kernels_take(shape, dtype, heads, taken, monkeypatch):
    kernels = vit_fused.vit_kernels
    if kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # meta tensors lie on no GPU
    assert kernels.can_attend(torch.empty(shape, device="meta"), dtype, heads) == taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("with_class, width, heads", [(True, 192, 3), (False, 192, 3), (True, 144, 2)])
def test_on_a_gpu_the_kernels_are_as_near_to_float64_as_plain_blocks(with_class, width, heads, monkeypatch):
    """Outputs and all gradients under autocast, of 256 patches and heads of 64 and 72."""
    model = config.ViT(patch=2, width=width, depth=3, heads=heads)
    net = ViT(model, resolution=32, in_channels=4, classes=5 if with_class else 0).cuda()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).cuda())
    x, dy = (torch.randn(6, 4, 32, 32, generator=generator).cuda() for _ in range(2))
    t = torch.tensor([0, 1, 10, 100, 500, 999]).cuda()
    labels = torch.tensor([0, 1, 2, 3, 4, 5]).cuda() if with_class else None

    def all_of(net, dtype):
        out = net(x.to(dtype), t.to(dtype), labels)
        grads = torch.autograd.grad(out, list(net.parameters()), dy.to(out.dtype))
        return [each.detach().double() for each in (out, *grads)]

    exact = all_of(copy.deepcopy(net).double(), torch.float64)
    errors, kernels = {}, vit_fused.vit_kernels
    for fused in (True, False):
        monkeypatch.setattr(vit_fused, "vit_kernels", kernels if fused else None)
        with torch.autocast("cuda", torch.bfloat16):
            found = all_of(net, torch.float32)
        errors[fused] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    for name, mine, plain in zip(
        ["output", *(n for n, _ in net.named_parameters())], errors[True], errors[False], strict=True
    ):
        assert mine < max(2 * plain, 1e-3), f"{name}: {mine} beside {plain}"
    assert sum(errors[True]) < 1.1 * sum(errors[False])
    assert errors[True] != errors[False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_gelu_is_formed_with_its_product_where_that_pays(compiled, unchecked, monkeypatch):
    """Of enough tokens, here few, and where no gradient is asked for: as near to float64 as apart."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("one kernel for both is for GPUs of compute capability 9")
    monkeypatch.setattr(vit_fused.vit_kernels, "GELU_OF_PRODUCT_TILES", 1)
    net = ViT(config.ViT(patch=2, width=384, depth=3, heads=6), 32, 4, 5).cuda().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).cuda())
    x = torch.randn(24, 4, 32, 32, generator=generator).cuda()
    t, labels = torch.arange(24.0).cuda(), (torch.arange(24) % 5).cuda()
    asked = torch.compile(net, dynamic=False, fullgraph=True) if compiled else net
    counts, errors = [], []
    for images, enabled in ((24, False), (24, True), (1, False)):
        given = x[:images], t[:images], labels[:images]
        exact = copy.deepcopy(net).double()(given[0].double(), given[1].double(), given[2])
        with torch.set_grad_enabled(enabled), torch.autocast("cuda", torch.bfloat16):
            asked(*given)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                out = asked(*given).double()
        counts.append([event.name for event in profile.events()].count("repro::gelu_of_product"))
        errors.append(float((out - exact).norm() / exact.norm()))
    assert counts == [3, 0, 0]
    assert errors[0] < 1.02 * errors[1] and errors[0] != errors[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width, heads", [(192, 3), (144, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_float8_is_off_by_its_rounding_alone(width, heads, compiled, unchecked):
    """Outputs beside float64's, of 256 patches and heads of 64 and 72; an odd batch."""
    if torch.cuda.get_device_capability() < vit_fused.FP8_CAPABILITY:
        pytest.skip("this GPU multiplies no float8 numbers")
    net = ViT(config.ViT(patch=2, width=width, depth=3, heads=heads), 32, 4, 5).cuda().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).cuda())
    x = torch.randn(5, 4, 32, 32, generator=generator).cuda()
    t, labels = torch.tensor([0, 1, 10, 100, 999]).cuda(), torch.arange(5).cuda()
    exact = copy.deepcopy(net).double()(x.double(), t.double(), labels)
    asked = torch.compile(net, dynamic=False, fullgraph=True) if compiled else net
    errors = {}
    for precision in ("bf16", "fp8", "bf16"):
        with sample.autocast("cuda", precision, [asked]):
            out = asked(x, t.float(), labels).double()
        errors[precision] = float((out - exact).norm() / exact.norm())
    assert 1.5 * errors["bf16"] < errors["fp8"] < 0.06


class Product(NamedTuple):
    """What a substitute reads of a product."""

    weight: torch.Tensor
    bias: torch.Tensor


@pytest.mark.parametrize("part", plainly.PARTS)
def test_what_stands_in_for_a_kernel_has_the_gradients_of_a_plain_network_compiled_too(
    part, unchecked, inductor
):
    """Biases are added before, by the product, and have their gradients from what stands in."""
    torch.manual_seed(0)
    x, z = torch.randn(2, 2, 5, 24, dtype=torch.float64)
    biases = [torch.randn(24, dtype=torch.float64) for _ in range(3)]
    _, substitute = plainly.PARTS[part]

    def attend(x, q_bias, v_bias, stand_in):
        bias = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
        if stand_in:
            return substitute.apply(x.repeat(1, 1, 3) + bias.detach(), q_bias, v_bias, 3)
        q, k, v = (x.repeat(1, 1, 3) + bias).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind()
        return ((q @ k.mT / 8**0.5).softmax(3) @ v).transpose(1, 2).flatten(2)

    def add_norm(x, bias, weight, stand_in):
        if stand_in:
            sums = substitute.apply(z, x + bias.detach(), bias, weight, biases[2], 1e-6, x.dtype)
        else:
            sums = z + x + bias, F.layer_norm(z + x + bias, (24,), weight, biases[2], 1e-6)
        return torch.stack(sums)

    def gelu(x, bias, weight, stand_in):
        return substitute(x, Product(weight, bias)) if stand_in else F.gelu(F.linear(x, weight, bias))

    function = {"attention": attend, "sum and norm": add_norm, "GELU": gelu}[part]
    third = torch.randn(24, 24, dtype=torch.float64) if part == "GELU" else biases[1]
    given = [tensor.clone().requires_grad_() for tensor in (x, biases[0], third)]
    exact = function(*given, False)
    dy = torch.randn_like(exact)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=inductor)
    for call in (function, compiled):
        found = call(*given, True)
        pairs = [(found, exact)]
        gradients = [torch.autograd.grad(y, given, dy, retain_graph=True) for y in (found, exact)]
        for one, other in [*pairs, *zip(*gradients, strict=True)]:
            torch.testing.assert_close(one, other)

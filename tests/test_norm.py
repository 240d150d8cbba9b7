"""The norm's kernels against PyTorch's own functions, on a GPU if there is one, or else interpreted."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import of_kernels

from repro.models.norm import GroupNorm, norm_kernels

FLOAT32 = (
    "two parts", "one part", "shift and scale absent", "nothing but the norm", "no activation",
    "several tiles", "whole tiles", "odd widths", "one pixel", "many tiles", "whole groups", "odd pixels",
    "narrow", "beside", "beside_alone", "beside_twice", "added", "compiled",
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    if norm_kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    return of_kernels("norm_cases.py")


@pytest.mark.parametrize("module", ["norm_kernels", "vit_kernels"])
def test_a_kernel_finds_what_it_names_beside_it(module):
    """Triton, compiling, looks a name up where its function is from: not if the tests' checks wrapped it."""
    if norm_kernels is None:
        pytest.skip("Triton is not installed: `make kernels` adds it")
    module = importlib.import_module(f"repro.models.{module}")
    kernels = [each for each in vars(module).values() if isinstance(each, triton_function())]
    assert len(kernels) > 10
    for kernel in kernels:
        assert kernel.fn.__globals__ is vars(module)
    assert GroupNorm.forward.__globals__["__name__"].startswith("jaxtyping")  # others are checked


def triton_function():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return JITFunction, InterpretedFunction


@pytest.mark.parametrize("case", FLOAT32)
def test_the_kernels_and_their_gradients_are_exact_to_float32(found, case):
    assert max(found[case]) < 1e-5


def test_in_bfloat16_only_inputs_and_outputs_are_rounded(found):
    assert 1e-4 < max(found["bfloat16"]) < 2e-2


def test_a_whole_network_with_the_kernels_is_the_network(found):
    assert max(found["network"]) < 1e-4  # float32 through a dozen blocks


def test_every_case_is_looked_at(found):
    assert set(found) == {*FLOAT32, "bfloat16", "dropout", "network", "read", "refused", "taken"}


def test_dropout_drops_as_often_as_asked_and_independently(found):
    dropout = found["dropout"]
    assert max(dropout["errors"]) < 1e-5
    elements = 4 * 64 * 32 * 32
    assert abs(dropout["dropped"] - 0.3) < 5 * (0.3 * 0.7 / elements) ** 0.5
    for twice in dropout["dropped_twice"]:  # of two images, neighbouring elements, two calls
        assert abs(twice - 0.09) < 5 * (0.09 * 0.91 / (elements / 4)) ** 0.5
    assert dropout["all"] == 0


def test_compiled_the_kernels_read_nothing_in_vain(found):
    """Each map channels-last, and beside the second norm, which nothing runs beside, no gradient of zeros."""
    assert found["read"] == [[True] * 2, [True] * 5]


def test_maps_that_do_not_join_are_refused(found):
    sides, widths = found["refused"]
    assert sides == "maps of (2, 32, 4, 4) and (2, 32, 3, 3) do not join to 64 channels"
    assert widths == "maps of (2, 32, 4, 4) and (2, 16, 4, 4) do not join to 64 channels"


@pytest.mark.skipif(norm_kernels is None, reason="Triton is not installed: `make kernels` adds it")
@given(
    widths=st.lists(st.integers(1, 700) | st.integers(1, 40).map(lambda n: 16 * n), min_size=1, max_size=2),
    sides=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    tile=st.sampled_from([1024, 8192, 16_384]),
    most=st.sampled_from([40, 264]),
)
def test_programs_share_out_a_whole_map_and_all_of_an_image_run_at_once(widths, sides, tile, most):
    parts = tuple(torch.empty(1, width, *sides, device="meta") for width in widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm_kernels, "_programs_that_may_wait", lambda gpu: most)
        patch.setattr(norm_kernels, "INTERPRETED", True)  # meta tensors lie on no GPU
        taken = norm_kernels.can_take(parts)
        share = norm_kernels.share_out(parts, tile)
    assert share.columns * share.channels == sum(widths)
    assert all(width % share.channels == 0 for width in widths)  # a tile lies in one part
    pixels = sides[0] * sides[1]
    tall = share.pixels * share.chunks
    assert (share.splits - 1) * tall < pixels <= share.splits * tall  # covered, and no program is idle
    assert taken == (share.splits * share.columns <= most)


def test_what_the_kernels_cannot_do_is_left_to_pytorch(found):
    assert found["taken"] == [True, True, False, False, False, False, False]


@pytest.mark.parametrize("given", ["scale", "shift"])
def test_scale_and_shift_stand_alone(given):
    norm = GroupNorm(64).double()
    x = torch.randn(2, 64, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide, plain = value[:, :, None, None], norm(x)
    expected = plain * (1 + wide) if given == "scale" else plain + wide
    torch.testing.assert_close(norm(x, **{given: value}), expected)


def test_no_images_give_no_images():
    assert GroupNorm(64)(torch.zeros(0, 64, 3, 3)).shape == (0, 64, 3, 3)

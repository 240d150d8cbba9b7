"""Loss weights against their papers' formulas, in every space, with limits worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import config, denoiser, weights

quick = settings(deadline=None, max_examples=40)

INF = math.inf
SIGMA_DATA = 0.5
TARGETS = ("x0", "eps", "v", "edm")

# Each weight in x0-space, and what turns it into the network's space, in plain Python. c_out^2 is the square
# of what the network's output is multiplied by: 1, -sigma, -sigma / sqrt(1 + sigma^2),
# sigma sigma_data / sqrt(sigma^2 + sigma_data^2).
IN_X0_SPACE = {
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: max(snr, 1),
    "min_snr": lambda snr: min(snr, 5),
    "soft_min_snr": lambda snr: 5 * snr / (snr + 5),
    "p2": lambda snr: snr / (1 + snr),
    "edm": lambda snr: (1 / snr + SIGMA_DATA**2) / (1 / snr * SIGMA_DATA**2),
}
C_OUT_SQUARED = {
    "x0": lambda sigma: 1,
    "eps": lambda sigma: sigma**2,
    "v": lambda sigma: sigma**2 / (1 + sigma**2),
    "edm": lambda sigma: (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2),
}
WEIGHTS = ("constant", *IN_X0_SPACE)

# (at SNR 0, at SNR infinity) of the network-space weight w(S) / (1 / c_out^2), where 1 / c_out^2 is
# x0: 1    eps: S    v: S + 1    edm: S + 4 (sigma_data = 1/2); gamma = 5, P2 with k = gamma = 1.
LIMITS = {
    #                x0         eps        v       edm
    "constant":      ((1, 1),   (1, 1),    (1, 1), (1, 1)),
    "snr":           ((0, INF), (1, 1),    (0, 1), (0, 1)),
    "truncated_snr": ((1, INF), (INF, 1),  (1, 1), (0.25, 1)),
    "min_snr":       ((0, 5),   (1, 0),    (0, 0), (0, 0)),
    "soft_min_snr":  ((0, 5),   (1, 0),    (0, 0), (0, 0)),
    "p2":            ((0, 1),   (1, 0),    (0, 0), (0, 0)),
    "edm":           ((4, INF), (INF, 1),  (4, 1), (1, 1)),
}  # fmt: skip


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def named(weight: str, target: str = "x0", **options) -> weights.Weight:
    return weights.from_config(
        config.Weight(weight, **options), denoiser.parameterization(target, SIGMA_DATA), SIGMA_DATA
    )


def in_network_space(weight: str, target: str, sigma, **options) -> torch.Tensor:
    parameterization = denoiser.parameterization(target, SIGMA_DATA)
    return parameterization.network_weight(named(weight, target, **options), f64(sigma))


# In the network's space


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", WEIGHTS)
@quick
@given(log_sigma=st.lists(st.floats(-8, 11), min_size=1, max_size=8))
def test_network_weight_is_w_times_c_out_squared(weight, target, log_sigma):
    sigma = np.exp(log_sigma)
    wanted = [
        1 if weight == "constant" else IN_X0_SPACE[weight](1 / s**2) * C_OUT_SQUARED[target](s) for s in sigma
    ]
    np.testing.assert_allclose(in_network_space(weight, target, sigma), wanted, rtol=5e-7)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("column, target", list(enumerate(TARGETS)))
def test_limits_at_snr_0_and_infinity(weight, column, target):
    at_0, at_infinity = LIMITS[weight][column]
    found = in_network_space(weight, target, [INF, 0.0])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, [at_0, at_infinity], rtol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
def test_never_nan_or_negative_from_end_to_end(weight, target):
    sigma = f64([0.0, 5e-324, *np.geomspace(1e-300, 1e300, 301), INF])
    found = in_network_space(weight, target, sigma)
    assert not found.isnan().any()
    assert (found >= 0).all()


@pytest.mark.parametrize(
    "options, limits",
    [
        # S / (3 + S)^2 over 1, S, S + 1, S + 4
        ({"gamma": 2.0, "k": 3.0}, ((0, 0), (1 / 9, 0), (0, 0), (0, 0))),
        # S / (2 + S)^(1/2) over the same
        ({"gamma": 0.5, "k": 2.0}, ((0, INF), (2**-0.5, 0), (0, 0), (0, 0))),
        # S / (2 + S)^6 over the same
        ({"gamma": 6.0, "k": 2.0}, ((0, 0), (1 / 64, 0), (0, 0), (0, 0))),
    ],
)
@pytest.mark.parametrize("column, target", list(enumerate(TARGETS)))
def test_limits_of_p2_with_other_options(options, limits, column, target):
    found = in_network_space("p2", target, [INF, 0.0], **options)
    np.testing.assert_allclose(found, limits[column], rtol=1e-6)


# In the space each paper gives it


@quick
@given(st.floats(-7, 7), st.floats(0.1, 50))
def test_min_snr_for_eps_x0_and_v(log_sigma, gamma):
    """The paper: min(SNR, gamma) for x0, min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v."""
    sigma = math.exp(log_sigma)
    snr = sigma**-2
    for target, divisor in {"x0": 1, "eps": snr, "v": snr + 1}.items():
        found = in_network_space("min_snr", target, [sigma], gamma=gamma)
        assert float(found) == pytest.approx(min(snr, gamma) / divisor, rel=5e-7)


@quick
@given(st.floats(-7, 7), st.floats(0.1, 3), st.floats(0.1, 20))
def test_p2_in_eps_space(log_sigma, gamma, k):
    """Choi et al. 2022: 1 / (k + SNR)^gamma on the eps loss."""
    sigma = math.exp(log_sigma)
    found = in_network_space("p2", "eps", [sigma], gamma=gamma, k=k)
    assert float(found) == pytest.approx((k + sigma**-2) ** -gamma, rel=5e-7)


@quick
@given(st.floats(-7, 7), st.floats(0.1, 50))
def test_soft_min_snr_is_half_the_harmonic_mean_and_below_min_snr(log_sigma, gamma):
    snr = f64([math.exp(-2 * log_sigma)])
    soft = float(weights.soft_min_snr(snr, gamma))
    assert soft == pytest.approx(1 / (1 / float(snr) + 1 / gamma), rel=1e-12)
    hard = float(weights.min_snr(snr, gamma))
    assert hard / 2 <= soft * (1 + 1e-12) and soft <= hard


def test_truncated_snr_for_x0_turns_at_snr_1():
    np.testing.assert_array_equal(weights.truncated_snr(f64([0.25, 1.0, 4.0])), [1, 1, 4])


@quick
@given(st.floats(-7, 7), st.floats(0.05, 3))
def test_edm_weight_is_karras_table_1(log_sigma, sigma_data):
    sigma = math.exp(log_sigma)
    found = weights.edm(f64([sigma**-2]), sigma_data)
    assert float(found) == pytest.approx((sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2, rel=1e-12)


def test_defaults_are_the_papers():
    snr = f64(np.geomspace(1e-3, 1e3, 13))
    assert torch.equal(named("min_snr")(snr), named("min_snr", gamma=5.0)(snr))
    assert torch.equal(named("soft_min_snr")(snr), named("soft_min_snr", gamma=5.0)(snr))
    assert torch.equal(named("p2")(snr), named("p2", gamma=1.0, k=1.0)(snr))


def test_gamma_changes_min_snr_only_above_the_smaller_gamma():
    snr = f64([0.5, 1.0, 3.0, 10.0])
    assert named("min_snr", gamma=1.0)(snr).tolist() == [0.5, 1, 1, 1]
    assert named("min_snr", gamma=20.0)(snr).tolist() == [0.5, 1, 3, 10]


# A factor for a weight: Min-SNR inside EDM (supplement, section 4.1.1)


def product(weight: str = "edm", target: str = "edm", gamma: float | None = 5.0) -> weights.Weight:
    """The weight of a run whose `weight` is multiplied by min(SNR, gamma) / SNR."""
    run = config.Config(
        "lab/x", config.Data("drawn"), config.UNet(), config.Train(images=1), parameterization=target,
        sigma_data=SIGMA_DATA, weight=config.Weight(weight), min_snr_factor=gamma,
    )  # fmt: skip
    return weights.of_run(run, denoiser.parameterization(target, SIGMA_DATA))


@quick
@given(st.floats(-12, 12), st.floats(0.1, 50))
def test_the_factor_is_min_snr_over_snr(log_snr, gamma):
    snr = math.exp(log_snr)
    found = weights.min_snr_factor(f64([snr]), gamma)
    assert float(found) == pytest.approx(min(snr, gamma) / snr, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_has_its_limits(dtype):
    found = weights.min_snr_factor(torch.tensor([0.0, 5e-45, 1e38, INF], dtype=dtype), 5.0)
    assert found.dtype == dtype and not found.isnan().any()
    np.testing.assert_allclose(found, [1, 1, 5e-38, 0], rtol=1e-6)


def test_edm_times_the_factor_at_points_worked_out_by_hand():
    # (S + 4) * min(1, 5 / S): 4.25, (1 + 4), (5 + 4), 24 / 4, 104 / 20, and 4 and 5 at the ends
    snr = f64([0.0, 0.25, 1.0, 5.0, 20.0, 100.0, INF])
    np.testing.assert_allclose(product()(snr), [4, 4.25, 5, 9, 6, 5.2, 5], rtol=1e-14)


@quick
@given(st.floats(-7, 9), st.sampled_from([1.0, 5.0, 20.0]))
def test_in_edms_network_space_the_product_is_the_factor_and_edm_alone_is_1(log_sigma, gamma):
    sigma = math.exp(log_sigma)
    edm = denoiser.edm(SIGMA_DATA)
    alone = edm.network_weight(product(gamma=None), f64([sigma]))
    assert float(alone) == pytest.approx(1, rel=1e-6)
    found = edm.network_weight(product(gamma=gamma), f64([sigma]))
    assert float(found) == pytest.approx(min(1, gamma * sigma**2), rel=1e-6)


@quick
@given(st.floats(-7, 7), st.floats(0.1, 50), st.floats(0.05, 3))
def test_snr_of_edms_data_is_the_same_factor_with_another_gamma(log_sigma, gamma, sigma_data):
    """With SNR = sigma_data^2 / sigma^2 the factor is ours with gamma / sigma_data^2: 20 for 5 and 1/2."""
    sigma = math.exp(log_sigma)
    other_snr = sigma_data**2 / sigma**2
    found = weights.min_snr_factor(f64([1 / sigma**2]), gamma / sigma_data**2)
    assert float(found) == pytest.approx(min(other_snr, gamma) / other_snr, rel=1e-12)


def test_gamma_20_is_gamma_5_for_snr_of_edms_data():
    sigma = np.geomspace(0.002, 80, 41)
    snr = 0.25 / sigma**2
    np.testing.assert_allclose(
        weights.min_snr_factor(f64(1 / sigma**2), 20.0), np.minimum(snr, 5) / snr, rtol=1e-12
    )


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("target", TARGETS)
def test_any_weight_times_the_factor_is_the_product_and_never_nan(weight, target):
    alone, both = product(weight, target, gamma=None), product(weight, target)
    snr = f64(np.geomspace(1e-6, 1e6, 13))
    np.testing.assert_allclose(both(snr), alone(snr) * (5 / snr).clamp(max=1), rtol=1e-12)
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, INF], dtype=dtype)
        found = both(ends)
        assert found.dtype == dtype and found[0] == alone(ends)[0]
        # at infinity 5 times the limit of w / S: that is c for a weight that grows like c S, else 0
        grows = weight in ("snr", "truncated_snr", "edm") or (weight == "constant" and target != "x0")
        np.testing.assert_allclose(found[1], 5 if grows else 0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, -5.0, math.nan, INF])
def test_a_factor_needs_a_positive_finite_gamma(gamma):
    with pytest.raises(ValueError, match="min_snr_factor"):
        product(gamma=gamma)


# Called directly


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_themselves_have_their_limits_and_keep_dtype_and_shape(weight, target, dtype):
    snr = torch.tensor([[0.0], [INF]], dtype=dtype)
    found = named(weight, target)(snr)
    assert found.dtype == dtype and found.shape == snr.shape
    if weight == "constant":  # 1 / c_out^2
        wanted = {"x0": (1, 1), "eps": (0, INF), "v": (1, INF), "edm": (4, INF)}[target]
    else:
        wanted = LIMITS[weight][0]
    np.testing.assert_allclose(found.flatten(), wanted)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 6.0])
def test_p2_itself_has_its_limits_for_any_gamma(gamma):
    found = weights.p2(f64([0.0, INF]), gamma=gamma, k=3.0)
    assert found.tolist() == [0, {0.5: INF, 1.0: 1}.get(gamma, 0)]


def test_a_weight_of_ones_own_is_a_plain_function():
    own = denoiser.EPS.network_weight(lambda snr: snr**2, f64([2.0, 0.5]))
    np.testing.assert_allclose(own, [0.25, 4.0])


# By configuration


@pytest.mark.parametrize("weight", ["constant", "snr", "truncated_snr", "edm"])
@pytest.mark.parametrize("option", ["gamma", "k"])
def test_options_that_a_weight_does_not_have_are_refused(weight, option):
    with pytest.raises(ValueError, match=f"'{weight}' has no {option}; leave it out"):
        named(weight, **{option: 5.0})


@pytest.mark.parametrize("weight", ["min_snr", "soft_min_snr"])
def test_k_is_of_p2_alone(weight):
    with pytest.raises(ValueError, match=f"'{weight}' has no k"):
        named(weight, gamma=5.0, k=1.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, INF])
@pytest.mark.parametrize("weight, option", [("min_snr", "gamma"), ("soft_min_snr", "gamma"), ("p2", "k")])
def test_options_that_are_no_positive_number_are_refused(weight, option, bad):
    with pytest.raises(ValueError, match=f"{option} of the weight '{weight}' must be positive"):
        named(weight, **{option: bad})


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="'min_snr'.*'soft_min_snr'.*input_value='min_snr_5'"):
        config.Weight("min_snr_5")
    with pytest.raises(ValueError, match="gama"):
        config.Weight("min_snr", gama=5.0)

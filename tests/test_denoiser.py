"""Denoisers against exact ones, and losses in the network's space against losses of the clean image."""

import math

import numpy as np
import pytest
import torch
from exact import ExactNet, Gaussian, Mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repro import config, denoiser, schedules, weights

quick = settings(deadline=None, max_examples=30)

SIGMA_DATA = 0.5
TARGETS = ("x0", "eps", "v", "edm")
WEIGHTS = ("constant", "snr", "truncated_snr", "min_snr", "soft_min_snr", "p2", "edm")
SCHEDULES = {"cosine": schedules.cosine_vp(), "linear": schedules.linear_vp(), "edm": schedules.EDM()}
DATA = {"gaussian": Gaussian(), "mixture": Mixture()}


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(data, target: str, schedule) -> denoiser.Denoiser:
    """The exact network for `data`, as the package wraps it."""
    net = ExactNet(data, target, getattr(schedule, "sigmas", None), SIGMA_DATA)
    return denoiser.Denoiser(net, schedule, denoiser.parameterization(target, SIGMA_DATA))


class SomeNet(nn.Module):
    """A float64 network that is wrong in its own way for every input, time and label."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(f64(0.7))

    def forward(self, x, t, labels):
        shift = 0.1 if labels is None else labels[:, None, None, None] / 3
        return (self.scale * x.double() + t.double()[:, None, None, None] / 100).sin() + shift


def wrapped(target: str, schedule=SCHEDULES["edm"]) -> denoiser.Denoiser:
    return denoiser.Denoiser(SomeNet(), schedule, denoiser.parameterization(target, SIGMA_DATA))


# The oracle itself


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 6.0])
def test_exact_denoisers_obey_tweedies_formula(data, sigma):
    """D = x + sigma^2 * d ln p(x; sigma) / dx, with the density from its own formula."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3).requires_grad_()
    if isinstance(data, Mixture):
        log_p = data.log_density(x, f64(sigma))
    else:
        log_p = -((x - data.mean) ** 2) / (2 * (data.std**2 + sigma**2))
    (score,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(data.denoise(x, f64(sigma)), x + sigma**2 * score, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_exact_flows_solve_their_equation(data):
    """d flow / d sigma = (x - D) / sigma, by central differences."""
    x, step = normal(0, 1, 1, 3, 3), 1e-4
    at = data.flow(x, 2.0, 0.5)
    slope = (data.flow(x, 2.0, 0.5 + step) - data.flow(x, 2.0, 0.5 - step)) / (2 * step)
    torch.testing.assert_close(slope, (at - data.denoise(at, f64(0.5))) / 0.5, rtol=1e-5, atol=1e-7)


# D is the clean image, whatever the network predicts


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_exact_network_gives_the_posterior_mean(target, schedule, data):
    sigma = schedule.round(f64([0.02, 0.1, 0.5, 1.0, 3.0, 40.0]))
    x = data.mean if isinstance(data, Gaussian) else 0.0
    x = x + normal(1, len(sigma), 2, 3, 3) * (0.25 + sigma[:, None, None, None] ** 2).sqrt()
    D_x = exact(data, target, schedule)(x, sigma)
    assert D_x.dtype == torch.float64
    # the network's input is float32: its own error is multiplied by c_out and by D's slope
    wanted = data.denoise(x, sigma)
    error = (D_x - wanted).abs().amax((1, 2, 3))
    allowed = 1e-6 * (1 + sigma) * (20 if isinstance(data, Mixture) else 1)
    assert (error < allowed).all(), error / allowed


@pytest.mark.parametrize("target", TARGETS)
def test_labels_reach_the_network(target):
    data, schedule = DATA["mixture"], SCHEDULES["cosine"]
    x, sigma, labels = normal(2, 4, 1, 2, 2), schedule.round(f64([0.4])).expand(4), torch.tensor([0, 2, 3, 1])
    D_x = exact(data, target, schedule)(x, sigma, labels)
    torch.testing.assert_close(D_x, data.denoise(x, sigma, labels), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(D_x[0], exact(data, target, schedule)(x, sigma, None)[0], atol=1e-2)


@pytest.mark.parametrize("target", TARGETS)
def test_one_sigma_for_the_batch_or_one_per_image(target):
    D, x = wrapped(target), normal(3, 3, 1, 2, 2)
    assert torch.equal(D(x, f64(0.8)), D(x, f64([0.8, 0.8, 0.8])))
    one_by_one = torch.cat([D(x[i : i + 1], f64(s)) for i, s in enumerate([0.1, 2.0, 30.0])])
    assert torch.equal(D(x, f64([0.1, 2.0, 30.0])), one_by_one)


def test_the_network_sees_float32_and_the_answer_keeps_the_precision_of_x():
    D = exact(Gaussian(), "eps", SCHEDULES["cosine"])
    for dtype in (torch.float32, torch.float64):
        assert D(torch.zeros(2, 1, 2, 2, dtype=dtype), f64(1.0)).dtype == dtype
    assert D.net.dtypes == {torch.float32}


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_a_vp_network_is_given_x_t_and_the_index(target):
    """x_t = sqrt(alpha_bar) y + sqrt(1 - alpha_bar) n of the VP frame, for x = y + sigma n."""
    seen = {}

    class Spy(nn.Module):
        def forward(self, x, t, labels):
            seen.update(x=x, t=t)
            return torch.zeros_like(x)

    schedule = SCHEDULES["cosine"]
    y, noise, index = normal(4, 3, 1, 2, 2), normal(5, 3, 1, 2, 2), torch.tensor([0, 500, 998])
    sigma = schedule.sigmas[index]
    alpha_bar = (1 / (1 + sigma**2))[:, None, None, None]
    x = y + sigma[:, None, None, None] * noise
    denoiser.Denoiser(Spy(), schedule, denoiser.parameterization(target))(x, sigma)
    assert seen["t"].tolist() == [0, 500, 998]
    x_t = alpha_bar.sqrt() * y + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(seen["x"], x_t.float(), rtol=1e-5, atol=1e-6)


# The coefficients


@quick
@given(st.sampled_from(TARGETS), st.floats(-7, 11), st.floats(0.1, 2))
def test_the_target_gives_back_the_clean_image(target, log_sigma, sigma_data):
    """c_skip * x + c_out * F* = y: of y in total 1, of the noise c_skip sigma + c_out on_noise = 0."""
    sigma = f64([math.exp(log_sigma)])
    chosen = denoiser.parameterization(target, sigma_data)
    (c_skip, c_out, _), (on_y, on_noise) = chosen.coefficients(sigma), chosen.target(sigma)
    assert float(c_skip + c_out * on_y) == pytest.approx(1, rel=1e-12)
    # relative to its two terms, which are as large as sigma for eps
    assert float((c_skip * sigma + c_out * on_noise) / (1 + sigma)) == pytest.approx(0, abs=1e-14)
    assert float(chosen.inverse_c_out2(sigma**-2) * c_out**2) == pytest.approx(1, rel=1e-12)


@quick
@given(st.floats(-7, 11))
def test_targets_are_those_of_their_papers(log_sigma):
    sigma = f64([math.exp(log_sigma)])
    alpha_vp, sigma_vp = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    torch.testing.assert_close(torch.cat(denoiser.X0.target(sigma)), f64([1.0, 0.0]))
    torch.testing.assert_close(torch.cat(denoiser.EPS.target(sigma)), f64([0.0, 1.0]))
    # v = alpha eps - sigma x0
    torch.testing.assert_close(torch.cat(denoiser.V.target(sigma)), torch.cat([-sigma_vp, alpha_vp]))


@quick
@given(st.floats(-7, 9), st.floats(0.1, 2))
def test_edm_preconditioning(log_sigma, sigma_data):
    """Karras et al. 2022, appendix B.6: what the preconditioning was derived from."""
    sigma = f64([math.exp(log_sigma)])
    edm = denoiser.edm(sigma_data)
    (c_skip, c_out, c_in), (on_y, on_noise) = edm.coefficients(sigma), edm.target(sigma)
    # for data of variance sigma_data^2, input and target have unit variance
    assert float(c_in**2 * (sigma_data**2 + sigma**2)) == pytest.approx(1, rel=1e-12)
    assert float(on_y**2 * sigma_data**2 + on_noise**2) == pytest.approx(1, rel=1e-12)
    # c_skip makes c_out smallest: c_out^2 = Var(y - c_skip x), and its derivative by c_skip is 0
    left = float((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2)
    assert left == pytest.approx(float(c_out**2), rel=1e-8)
    assert float(-(1 - c_skip) * sigma_data**2 + c_skip * sigma**2) == pytest.approx(0, abs=1e-12)
    # Table 1: the loss weight 1 / c_out^2 makes every noise level's loss 1 at the start (F = 0)
    assert float(weights.edm(sigma**-2, sigma_data) * c_out**2) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("target, row", [("x0", (0, 1)), ("eps", (1, -2)), ("v", (0.2, -2 / 5**0.5))])
def test_the_rows_at_sigma_2(target, row):
    c_skip, c_out, c_in = denoiser.parameterization(target).coefficients(f64([2.0]))
    np.testing.assert_allclose([float(c_skip), float(c_out), float(c_in)], [*row, 5**-0.5], rtol=1e-14)


# The loss


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", WEIGHTS)
@quick
@given(log_sigma=st.lists(st.floats(-5, 6), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_the_loss_is_the_weighed_error_of_the_clean_image(target, weight, log_sigma, seed):
    """loss = w(SNR) * mean((D - y)^2) for each image; a constant weight is 1 / c_out^2 in this space."""
    D, sigma, n = wrapped(target), f64(log_sigma).exp(), len(log_sigma)
    y, noise, labels = normal(seed, n, 2, 3, 3), normal(seed + 100, n, 2, 3, 3), torch.arange(n)
    w = weights.from_config(config.Weight(weight), D.parameterization, SIGMA_DATA)
    with torch.no_grad():
        loss = D.loss(y, noise, sigma, labels, w)
        D_x = D(y + sigma[:, None, None, None] * noise, sigma, labels)
    snr = 1 / sigma**2
    in_x0_space = {
        "constant": {"x0": snr**0, "eps": snr, "v": snr + 1, "edm": snr + 4}[target],
        "snr": snr,
        "truncated_snr": snr.clamp(min=1),
        "min_snr": snr.clamp(max=5),
        "soft_min_snr": 5 * snr / (5 + snr),
        "p2": snr / (1 + snr),
        "edm": snr + 4,
    }[weight]
    torch.testing.assert_close(loss, in_x0_space * (D_x - y).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_constant_weight_leaves_the_networks_own_loss(target):
    """mean((F - F*)^2) with F from the same input, F* as the papers define it."""
    D, sigma = wrapped(target), f64([0.01, 0.3, 1.0, 20.0])
    y, noise, s = normal(6, 4, 1, 3, 3), normal(7, 4, 1, 3, 3), sigma[:, None, None, None]
    x = y + s * noise
    variance = SIGMA_DATA**2 if target == "edm" else 1
    F_x = D.net((x / (s**2 + variance).sqrt()).float(), sigma.log().float() / 4, None)
    wanted = {
        "x0": y,
        "eps": noise,
        "v": (noise - s * y) / (1 + s**2).sqrt(),
        "edm": (y - x * variance / (s**2 + variance)) * (s**2 + variance).sqrt() / (s * SIGMA_DATA),
    }[target]
    w = weights.from_config(config.Weight("constant"), D.parameterization)
    loss = D.loss(y, noise, sigma, None, w)
    torch.testing.assert_close(loss, (F_x - wanted).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


class Constant(nn.Module):
    """A network that predicts the same number everywhere, and keeps what it was given."""

    def __init__(self, output: float):
        super().__init__()
        self.output = output

    def forward(self, x, t, labels):
        self.given = x, t
        return torch.full_like(x, self.output)


def edm_run(gamma: float | None) -> config.Config:
    return config.Config(
        "lab/x", config.Data("drawn"), config.UNet(), config.Train(images=1), config.Schedule("edm"), "edm",
        SIGMA_DATA, config.Weight("edm"), gamma,
    )  # fmt: skip


@pytest.mark.parametrize(
    "gamma, wanted", [(None, 1.96), (20.0, 1.96), (5.0, 1.96 * 0.703125), (1.0, 1.96 * 0.140625)]
)
def test_edms_loss_worked_out_by_hand_alone_and_times_the_factor(gamma, wanted):
    """sigma = 3/8, sigma_data = 1/2, so sqrt(sigma^2 + sigma_data^2) = 5/8, and y = 0.2, n = 0.8, F = 1.

    c_skip = (1/4) / (25/64) = 0.64, c_out = (3/16) / (5/8) = 0.3, c_in = 1.6. x = 0.2 + 0.3 = 0.5, the
    network is given 0.8, D = 0.32 + 0.3 = 0.62, (D - y)^2 = 0.42^2 = 0.1764, times 1 / c_out^2 = 1 / 0.09:
    1.96.
    SNR = 64/9: the factor is 1, or 5 * 9/64 = 0.703125 for gamma = 5, 9/64 for 1, and 1 for 20.
    """
    net, run = Constant(1.0), edm_run(gamma)
    D = denoiser.Denoiser(net, SCHEDULES["edm"], denoiser.edm(SIGMA_DATA))
    y, noise = torch.full((1, 3, 2, 2), 0.2), torch.full((1, 3, 2, 2), 0.8)
    weight = weights.of_run(run, D.parameterization)
    loss = D.loss(y.double(), noise.double(), f64([0.375]), None, weight)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    x, t = net.given
    np.testing.assert_allclose(x, 0.8, rtol=1e-6)
    assert float(t) == pytest.approx(math.log(0.375) / 4, rel=1e-6)


@quick
@given(st.floats(-7, 7), st.sampled_from([None, 1.0, 5.0, 20.0]))
def test_before_it_learns_edms_loss_is_1_and_its_input_of_unit_variance(log_sigma, gamma):
    """Data of variance sigma_data^2 and noise, each of two values of equal size in all four combinations, so
    that all moments are exact: with F = 0 the loss is 1 at every sigma, and min(1, gamma sigma^2) with the
    factor."""
    sigma = math.exp(log_sigma)
    y = SIGMA_DATA * f64([1, 1, -1, -1]).view(1, 1, 2, 2)
    noise = f64([1, -1, 1, -1]).view(1, 1, 2, 2)
    net, run = Constant(0.0), edm_run(gamma)
    D = denoiser.Denoiser(net, SCHEDULES["edm"], denoiser.edm(SIGMA_DATA))
    loss = D.loss(y, noise, f64([sigma]), None, weights.of_run(run, D.parameterization))
    assert float(loss) == pytest.approx(1 if gamma is None else min(1, gamma * sigma**2), rel=1e-6)
    assert float(net.given[0].double().square().mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 1.0, 9.0])
def test_relations_between_targets(sigma):
    """Supplement, section 2, in its own VP terms: from one x0 estimate, the eps loss is SNR times the x0 loss
    and the v loss SNR + 1 times."""
    alpha_t, sigma_t = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    snr = alpha_t**2 / sigma_t**2
    x0, noise, x0_hat = normal(8, 1, 1, 4, 4), normal(9, 1, 1, 4, 4), normal(10, 1, 1, 4, 4)
    x_t = alpha_t * x0 + sigma_t * noise
    eps_hat = (x_t - alpha_t * x0_hat) / sigma_t
    v_hat = alpha_t * eps_hat - sigma_t * x0_hat
    predictions = {"x0": x0_hat, "eps": eps_hat, "v": v_hat}

    class Fixed(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x, t, labels):
            return self.output

    losses = {}
    for target, output in predictions.items():
        D = denoiser.Denoiser(Fixed(output), schedules.EDM(), denoiser.parameterization(target))
        w = weights.from_config(config.Weight("constant"), D.parameterization)
        losses[target] = float(D.loss(x0, noise, f64([sigma]), None, w))
        # and each of the three networks is the same denoiser
        torch.testing.assert_close(D(x_t / alpha_t, f64(sigma)), x0_hat)
    assert losses["x0"] == pytest.approx(float((x0_hat - x0).square().mean()), rel=1e-6)
    assert losses["eps"] == pytest.approx(snr * losses["x0"], rel=1e-6)
    assert losses["v"] == pytest.approx((snr + 1) * losses["x0"], rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_the_exact_network_has_the_smallest_possible_loss(target):
    """E (D - y)^2 is the posterior variance std^2 sigma^2 / (std^2 + sigma^2)."""
    data, schedule, n = Gaussian(), SCHEDULES["cosine"], 64
    sigma = schedule.round(f64([0.5])).expand(n)
    y, noise = data.mean + data.std * normal(11, n, 3, 16, 16), normal(12, n, 3, 16, 16)
    loss = exact(data, target, schedule).loss(y, noise, sigma, None, torch.ones_like)
    wanted = data.std**2 * sigma[0] ** 2 / (data.std**2 + sigma[0] ** 2)
    # a mean of 49152 squares of normal numbers: relative deviation sqrt(2 / 49152)
    assert float(loss.mean()) == pytest.approx(float(wanted), rel=5 * math.sqrt(2 / 49152))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_float32_loss_keeps_its_digits_at_every_trained_sigma(target, weight):
    """Formed as D - y it would lose them all: at sigma = 20,000 the rounding of x alone is 1e-3."""
    D, schedule = wrapped(target, SCHEDULES["cosine"]), SCHEDULES["cosine"]
    sigma = schedule.sigmas[[0, 10, 500, 990, 999]]
    y, noise = normal(13, 5, 1, 4, 4), normal(14, 5, 1, 4, 4)
    w = weights.from_config(config.Weight(weight), D.parameterization, SIGMA_DATA)
    coarse = D.loss(y.float(), noise.float(), sigma, None, w)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse.double(), D.loss(y, noise, sigma, None, w), rtol=1e-4, atol=0)


def test_gradients_reach_the_network_through_the_loss():
    """d loss / d scale by central differences."""
    D, sigma = wrapped("v"), f64([0.5, 3.0])
    y, noise = normal(15, 2, 1, 3, 3), normal(16, 2, 1, 3, 3)

    def loss() -> torch.Tensor:
        return D.loss(y, noise, sigma, None, weights.min_snr).sum()

    loss().backward()
    with torch.no_grad():
        D.net.scale += 1e-5
        above = loss()
        D.net.scale -= 2e-5
        below = loss()
    assert float(D.net.scale.grad) == pytest.approx(float(above - below) / 2e-5, rel=1e-6)


# By name


def test_unknown_parameterizations_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown parameterization 'epsilon'; known are x0, eps, v, edm"):
        denoiser.parameterization("epsilon")


@pytest.mark.parametrize("bad", [0.0, -0.5])
def test_sigma_data_must_be_positive(bad):
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        denoiser.parameterization("edm", bad)

"""Samplers against exact solutions: the ODE's path where no noise is added, the variance where some is."""

import functools
import math

import numpy as np
import pytest
import torch
from exact import ExactNet, Gaussian, Mixture
from scipy import stats

from repro import config, denoiser, sample, samplers, schedules

START = 10.0
GAUSSIAN, MIXTURE = Gaussian(), Mixture()


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(steps: int, sigma_max: float = START) -> torch.Tensor:
    """The last step, to 0, is always Euler's: sigma_min is so small that its error does not count."""
    return schedules.karras_grid(1e-5, sigma_max, steps)


def measured_order(steps: list[int], errors: list[float]) -> float:
    """The slope of -ln(error) over ln(steps)."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


class Recorder:
    """An exact denoiser that keeps what it was asked."""

    def __init__(self, data=GAUSSIAN):
        self.data, self.asked = data, []

    def __call__(self, x, sigma):
        self.asked.append((x.clone(), float(sigma)))
        return self.data.denoise(x, sigma)


class Given:
    """Fresh noise from a list made beforehand."""

    def __init__(self, shape, count: int, seed: int = 0):
        self.noises = list(normal(seed, count, *shape))
        self.used = 0

    def __call__(self):
        self.used += 1
        return self.noises[self.used - 1]


EULER_MARUYAMA = functools.partial(samplers.euler_maruyama, fresh_noise=lambda: torch.ones(1, 1, 1, 1))
DETERMINISTIC = {"heun": (samplers.heun, 2), "ancestral, eta 0": (samplers.ancestral, 1)}
DPM_SOLVERS = {
    f"order {order}, {'multistep' if multistep else 'singlestep'}": (
        functools.partial(samplers.dpm_solver, order=order, multistep=multistep),
        order,
    )
    for order in (1, 2, 3)
    for multistep in (False, True)
}


# The ODE


@pytest.mark.parametrize("sampler, order", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_order_of_convergence_on_gaussian_data(sampler, order):
    x = START * normal(0, 4, 1, 3, 3)
    exact = GAUSSIAN.flow(x, START, 0.0)
    steps = [32, 64, 128, 256]
    errors = [float((sampler(GAUSSIAN.denoise, x, grid(n)) - exact).abs().max()) for n in steps]
    assert measured_order(steps, errors) == pytest.approx(order, abs=0.1)
    assert errors[-1] < {1: 2e-2, 2: 2e-4}[order]


@pytest.mark.parametrize("sampler, order", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_order_of_convergence_on_a_mixture(sampler, order):
    """Here the denoiser is not linear; the exact path follows from the quantiles."""
    x = f64([-13.0, -6.0, -1.0, 0.5, 3.0, 9.0, 14.0]).view(7, 1, 1, 1)
    exact = MIXTURE.flow(x, START, 0.0)
    steps = [64, 128, 256, 512]
    errors = [float((sampler(MIXTURE.denoise, x, grid(n)) - exact).abs().mean()) for n in steps]
    assert measured_order(steps, errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("sampler, order", DPM_SOLVERS.values(), ids=DPM_SOLVERS)
def test_order_of_convergence_of_dpm_solver(sampler, order):
    x = START * normal(0, 4, 1, 3, 3)
    exact = GAUSSIAN.flow(x, START, 0.0)
    steps = [8, 16, 32] if sampler.keywords == {"order": 3, "multistep": False} else [32, 64, 128]
    errors = [float((sampler(GAUSSIAN.denoise, x, grid(n)) - exact).abs().max()) for n in steps]
    assert measured_order(steps, errors) > order - 0.1
    assert errors[-1] < {1: 3e-2, 2: 1e-3, 3: 1e-4}[order]

    x = f64([-13.0, -6.0, -1.0, 0.5, 3.0, 9.0, 14.0]).view(7, 1, 1, 1)
    exact = MIXTURE.flow(x, START, 0.0)
    steps = [64, 128, 256, 512]
    errors = [float((sampler(MIXTURE.denoise, x, grid(n)) - exact).abs().mean()) for n in steps]
    assert measured_order(steps, errors) == pytest.approx(order, abs=0.2)


def test_dpm_solver_of_order_1_is_ddim_and_2_asks_halfway_in_lambda():
    x, sigmas = 9 * normal(3, 2, 1, 2, 2), f64([9.0, 4.0, 1.5, 0.3, 0.0])
    ddim = samplers.ancestral(GAUSSIAN.denoise, x, sigmas)
    for multistep in (False, True):
        one = samplers.dpm_solver(GAUSSIAN.denoise, x, sigmas, 1, multistep)
        torch.testing.assert_close(one, ddim, rtol=1e-12, atol=1e-12)
    recorder = Recorder()
    samplers.dpm_solver(recorder, x, sigmas, 2)
    asked = [sigma for _, sigma in recorder.asked]
    assert asked == pytest.approx([9, 6, 4, 6**0.5, 1.5, 0.45**0.5, 0.3])


@pytest.mark.parametrize("order, multistep", [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_dpm_solver_asks_as_often_as_it_says(order, multistep):
    recorder = Recorder()
    samplers.dpm_solver(recorder, START * normal(0, 1, 1, 2, 2), grid(7), order, multistep)
    how = config.Sample(sampler="dpm_solver", steps=7, order=order, multistep=multistep)
    assert len(recorder.asked) == sample.evaluations(how, 7)


def of_diffusers(order: int, steps: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' multistep solver makes of x = sigmas[0] * n on Gaussian data, and its sigmas."""
    from diffusers import DPMSolverMultistepScheduler  # takes seconds to import

    scheduler = DPMSolverMultistepScheduler(solver_order=order, use_lu_lambdas=True, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    x_t = (x * scheduler.sigmas[0] / (1 + scheduler.sigmas[0] ** 2).sqrt()).double()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        alpha = 1 / (1 + sigma**2).sqrt()
        D_x = GAUSSIAN.denoise(x_t / alpha, sigma)
        x_t = scheduler.step((x_t / alpha - D_x) / sigma, t, x_t).prev_sample.double()
    return x_t, scheduler.sigmas.double()


@pytest.mark.parametrize("order", [1, 2])
def test_multistep_agrees_with_diffusers(order):
    x = normal(5, 4, 1, 3, 3)
    theirs, sigmas = of_diffusers(order, 20, x)
    ours = samplers.dpm_solver(GAUSSIAN.denoise, x * sigmas[0], sigmas, order, multistep=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # theirs is float32


def test_the_third_order_of_diffusers_is_half_a_term_short(monkeypatch):
    """With that half, ours is theirs, and of order 2; with the whole term it is of order 3 (above)."""
    x = normal(5, 4, 1, 3, 3)
    theirs, sigmas = of_diffusers(3, 20, x)
    ours = samplers.dpm_solver(GAUSSIAN.denoise, x * sigmas[0], sigmas, 3, multistep=True)
    assert (ours - theirs).abs().max() > 1e-3

    whole = samplers._multistep

    def halved(x, earlier, sigma_next):
        made = whole(x, earlier, sigma_next)
        if len(earlier) < 3:
            return made
        (s0, D0), (s1, D1), (s2, D2) = earlier
        h, h0, h1 = (s0 / sigma_next).log(), (s1 / s0).log(), (s2 / s1).log()
        bend = ((D0 - D1) / h0 - (D1 - D2) / h1) * h**2 / (h0 + h1)
        return made + ((sigma_next / s0 - 1 + h) / h**2 - 0.5) * bend

    monkeypatch.setattr(samplers, "_multistep", halved)
    made = samplers.dpm_solver(GAUSSIAN.denoise, x * sigmas[0], sigmas, 3, multistep=True)
    start, steps = START * normal(0, 4, 1, 3, 3), [64, 128, 256, 512]
    exact = GAUSSIAN.flow(start, START, 0.0)
    errors = [
        float((samplers.dpm_solver(GAUSSIAN.denoise, start, grid(n), 3, True) - exact).abs().max())
        for n in steps
    ]
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-4)
    assert measured_order(steps, errors) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "edm"])
@pytest.mark.parametrize("schedule", [schedules.cosine_vp(), schedules.linear_vp(), schedules.EDM()])
def test_every_parameterization_and_schedule_ends_at_the_same_image(schedule, target):
    """The whole chain: network, parameterization, rounded grid, Heun."""
    net = ExactNet(GAUSSIAN, target, getattr(schedule, "sigmas", None))
    D = denoiser.Denoiser(net, schedule, denoiser.parameterization(target))
    sigmas = schedule.round(schedules.karras_grid(max(0.002, schedule.sigma_min), 80.0, 60)[:-1])
    sigmas = torch.cat([sigmas, f64([0.0])])
    x = float(sigmas[0]) * normal(1, 4, 1, 3, 3)
    torch.testing.assert_close(
        samplers.heun(D, x, sigmas), GAUSSIAN.flow(x, float(sigmas[0]), 0.0), rtol=0, atol=5e-3
    )
    assert net.dtypes == {torch.float32}


def test_heun_is_exact_where_the_data_are_one_point():
    """D is constant and every path a straight line to it."""
    out = samplers.heun(lambda x, sigma: torch.full_like(x, 0.7), START * normal(2, 2, 1, 2, 2), grid(5))
    torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=1e-12, atol=0)


def test_ancestral_with_eta_0_is_ddim():
    """Song et al. 2021, Eq. 12 with sigma_t = 0, in the VP frame: x_t = x / sqrt(1 + sigma^2)."""
    recorder, sigmas = Recorder(), f64([9.0, 4.0, 1.5, 0.3, 0.0])
    out = samplers.ancestral(recorder, 9 * normal(3, 2, 1, 2, 2), sigmas)
    path = [x for x, _ in recorder.asked] + [out]
    for i in range(4):
        alpha_bar, before = (float(1 / (1 + s**2)) for s in (sigmas[i], sigmas[i + 1]))
        x_t = path[i] * math.sqrt(alpha_bar)
        x_0 = GAUSSIAN.denoise(path[i], sigmas[i])
        eps = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
        wanted = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
        torch.testing.assert_close(path[i + 1] * math.sqrt(before), wanted, rtol=1e-12, atol=1e-12)


# Noise put back


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_is_song_eq_12_and_at_eta_1_the_ddpm_posterior(eta):
    recorder, sigmas, noise = Recorder(), f64([9.0, 4.0, 1.5, 0.3, 0.0]), Given((2, 1, 2, 2), 3)
    samplers.ancestral(recorder, 9 * normal(4, 2, 1, 2, 2), sigmas, eta=eta, fresh_noise=noise)
    assert noise.used == 3  # none in the step to 0
    for i in range(3):
        alpha_bar, before = (float(1 / (1 + s**2)) for s in (sigmas[i], sigmas[i + 1]))
        beta = 1 - alpha_bar / before
        x_t = recorder.asked[i][0] * math.sqrt(alpha_bar)
        x_0 = GAUSSIAN.denoise(recorder.asked[i][0], sigmas[i])
        eps = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
        std = eta * math.sqrt((1 - before) / (1 - alpha_bar)) * math.sqrt(beta)
        mean = math.sqrt(before) * x_0 + math.sqrt(1 - before - std**2) * eps
        found = recorder.asked[i + 1][0] * math.sqrt(before)
        torch.testing.assert_close(found, mean + std * noise.noises[i], rtol=1e-12, atol=1e-12)
        if eta == 1:  # Ho et al. 2020, Eq. 7
            posterior = math.sqrt(before) * beta / (1 - alpha_bar) * x_0
            posterior = posterior + math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar) * x_t
            torch.testing.assert_close(mean, posterior, rtol=1e-10, atol=1e-12)


def exact_variance(sampler, steps: int, sigma_max: float = START, **options) -> float:
    """The variance of a sampler's output on Gaussian data, not drawn: the output is linear in its noises.

    Image 0 starts one standard deviation from the mean; image k alone gets the k-th fresh noise, of size 1.
    """
    count = steps + 1
    x = torch.full((count, 1, 1, 1), GAUSSIAN.mean, dtype=torch.float64)
    x[0] += math.hypot(sigma_max, GAUSSIAN.std)
    unit = iter(torch.eye(count, dtype=torch.float64)[1:].view(-1, count, 1, 1, 1))
    out = sampler(GAUSSIAN.denoise, x, grid(steps, sigma_max), fresh_noise=lambda: next(unit), **options)
    return float((out - GAUSSIAN.mean).square().sum())


STOCHASTIC = {
    "ancestral, eta 0.5": (samplers.ancestral, {"eta": 0.5}, 1),
    "ancestral, eta 1": (samplers.ancestral, {"eta": 1.0}, 1),
    "heun, churn 10": (samplers.heun, {"churn": 10.0}, 2),
    "heun, churn within a range": (samplers.heun, {"churn": 20.0, "churn_range": (0.05, 5.0)}, 2),
}


@pytest.mark.parametrize("sampler, options, order", STOCHASTIC.values(), ids=STOCHASTIC)
def test_stochastic_samplers_converge_to_the_variance_of_the_data(sampler, options, order):
    steps = [128, 256, 512]
    errors = [abs(exact_variance(sampler, n, **options) / GAUSSIAN.std**2 - 1) for n in steps]
    assert measured_order(steps, errors) > order - 0.2
    assert errors[-1] < {1: 5e-2, 2: 2e-3}[order]


@pytest.mark.parametrize("sampler, options, order", STOCHASTIC.values(), ids=STOCHASTIC)
def test_stochastic_samplers_draw_from_the_data_distribution(sampler, options, order):
    """20,000 images of one pixel, from pure noise at sigma = 80."""
    shape, seeds = (20_000, 1, 1, 1), iter(range(100, 1000))
    x, steps = 80 * normal(99, *shape), 150
    out = sampler(
        GAUSSIAN.denoise, x, grid(steps, 80.0), fresh_noise=lambda: normal(next(seeds), *shape), **options
    )
    std = math.sqrt(exact_variance(sampler, steps, 80.0, **options))
    assert std == pytest.approx(GAUSSIAN.std, rel=0.1 if order == 1 else 0.01)
    pixels = out.flatten().numpy()
    assert pixels.mean() == pytest.approx(GAUSSIAN.mean, abs=4 * GAUSSIAN.std / math.sqrt(len(pixels)))
    assert pixels.var() == pytest.approx(std**2, rel=4 * math.sqrt(2 / len(pixels)))
    assert stats.kstest(pixels, stats.norm(GAUSSIAN.mean, std).cdf).pvalue > 0.01


# Euler-Maruyama on the reverse VP SDE, on Gaussian data whose three pixels are correlated

PIXEL_MEANS, EYE = f64([0.3, -0.5, 0.1]), torch.eye(3, dtype=torch.float64)
PIXEL_COVARIANCE = f64([[0.3, 0.1, -0.05], [0.1, 0.2, 0.08], [-0.05, 0.08, 0.15]])


def denoise_pixels(x, sigma):
    """E[y | x] of [n, 1, 1, 3]: y and x are jointly normal, Cov(y, x) = C, Cov(x) = C + sigma^2."""
    gain = PIXEL_COVARIANCE @ torch.linalg.inv(PIXEL_COVARIANCE + sigma**2 * EYE)
    return PIXEL_MEANS + (x - PIXEL_MEANS) @ gain.T


def pixels_at(sigma):
    """Mean and covariance of the VP state z = alpha * (y + sigma * n)."""
    alpha = 1 / (1 + sigma**2).sqrt()
    return alpha * PIXEL_MEANS, alpha**2 * (PIXEL_COVARIANCE + sigma**2 * EYE)


def moments_of_euler_maruyama(sigmas):
    """Mean and covariance of the chain's end, which starts with those of the data at sigmas[0].

    In VP coordinates, dz = -beta/2 z dt + sqrt(beta) dw, with the exact score of z; one step backwards is
    z + b/2 z + b score + sqrt(b) n, b the integral of beta = -2 (ln alpha)'.
    """
    mean, covariance = pixels_at(sigmas[0])
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        b = 2 * (torch.sqrt(1 + sigma**2).log() - torch.sqrt(1 + sigma_next**2).log())
        of_data, spread = pixels_at(sigma)
        precision = torch.linalg.inv(spread)  # the score is -precision (z - of_data)
        step = (1 + b / 2) * EYE - b * precision
        mean = step @ mean + b * precision @ of_data
        covariance = step @ covariance @ step.T + (b * EYE if sigma_next > 0 else 0)
    return mean, covariance


def response(sampler, sigmas):
    """What an affine chain makes of its start and noises: [1 + 3 * steps, 3]. First of the start's mean; then
    what one standard deviation along each axis of the start's Gaussian, and each pixel of each noise, add."""
    steps = len(sigmas) - 1
    x = PIXEL_MEANS.repeat(1 + 3 * steps, 1, 1, 1)
    x[1:4] += torch.linalg.cholesky(PIXEL_COVARIANCE + sigmas[0] ** 2 * EYE).T[:, None, None]
    units = torch.eye(1 + 3 * steps, dtype=torch.float64)
    noises = iter(units[:, k : k + 3, None, None].transpose(1, 3) for k in range(4, 1 + 3 * steps, 3))
    out = sampler(denoise_pixels, x, sigmas, fresh_noise=lambda: next(noises))[:, 0, 0]
    return torch.cat([out[:1], out[1:] - out[:1]])


@pytest.mark.parametrize("sigmas", [grid(12), f64([5.0, 2.0, 2.0, 0.3, 0.0]), f64([0.7, 0.0])])
def test_euler_maruyama_is_the_chain_in_vp_coordinates(sigmas):
    made = response(samplers.euler_maruyama, sigmas)
    mean, covariance = moments_of_euler_maruyama(sigmas)
    torch.testing.assert_close(made[0], mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made[1:].T @ made[1:], covariance, rtol=1e-9, atol=1e-9)


def test_euler_maruyama_draws_from_the_distribution_of_its_chain():
    """40,000 images from sigma = 80, in steps so few that it is not the data's."""
    shape, seeds, sigmas = (40_000, 1, 1, 3), iter(range(200, 1000)), grid(40, 80.0)
    scale = torch.linalg.cholesky(PIXEL_COVARIANCE + 80**2 * EYE)
    x = PIXEL_MEANS + normal(199, *shape) @ scale.T
    out = samplers.euler_maruyama(denoise_pixels, x, sigmas, lambda: normal(next(seeds), *shape))[:, 0, 0]
    mean, covariance = moments_of_euler_maruyama(sigmas)
    variances = covariance.diag()
    assert ((out.mean(0) - mean).abs() < 4 * (variances / len(out)).sqrt()).all()
    bound = 4 * ((variances[:, None] * variances + covariance**2) / len(out)).sqrt()
    assert ((out.T.cov() - covariance).abs() < bound).all()
    assert ((covariance - PIXEL_COVARIANCE).abs() > 2 * bound).any()  # the bound tells the two apart
    for pixel, m, v in zip(out.T, mean, variances, strict=True):
        assert stats.kstest(pixel.numpy(), stats.norm(float(m), float(v.sqrt())).cdf).pvalue > 0.01


def test_euler_maruyama_converges_weakly_with_order_1():
    steps, means, covariances = [128, 256, 512, 1024], [], []
    for n in steps:
        mean, covariance = moments_of_euler_maruyama(grid(n))
        means.append(float((mean - PIXEL_MEANS).abs().max()))
        covariances.append(float((covariance - PIXEL_COVARIANCE).abs().max()))
    assert measured_order(steps, means) == pytest.approx(1, abs=0.1)
    assert measured_order(steps, covariances) == pytest.approx(1, abs=0.1)
    assert means[-1] < 2e-3 and covariances[-1] < 5e-3


def test_euler_maruyama_agrees_with_ancestral_sampling_in_small_steps():
    """The same start and noises: their paths approach each other with order 1."""
    steps, apart = [32, 64, 128, 256], []
    for n in steps:
        ours = response(samplers.euler_maruyama, grid(n))
        theirs = response(functools.partial(samplers.ancestral, eta=1.0), grid(n))
        apart.append(float((ours - theirs).square().sum().sqrt()))
    assert measured_order(steps, apart) == pytest.approx(1, abs=0.15)


def test_euler_maruyama_is_u_vits_to_first_order():
    """U-ViT: beta(t) = 0.1 + 19.9 t, t evenly spaced from 1 to 1e-3 and then 0, beta not integrated but taken
    at the noisy end of each step. Bao et al. 2022; the SDE is Song et al. 2021b's, appendix C."""
    steps, apart = [125, 250, 500, 1000], []
    for n in steps:
        t = torch.cat([torch.linspace(1, 1e-3, n, dtype=torch.float64), f64([0.0])])
        sigmas = torch.expm1(0.1 * t + 19.9 / 2 * t**2).sqrt()
        start, noise = normal(1, 500, 1, 1, 1), Given((500, 1, 1, 1), n - 1)
        z = start
        for i in range(n):
            beta, alpha = 0.1 + 19.9 * t[i], 1 / (1 + sigmas[i] ** 2).sqrt()
            variance = alpha**2 * (GAUSSIAN.std**2 + sigmas[i] ** 2)
            score = -(z - alpha * GAUSSIAN.mean) / variance
            z = z + (beta / 2 * z + beta * score) * (t[i] - t[i + 1])
            if i < n - 1:
                z = z + (beta * (t[i] - t[i + 1])).sqrt() * noise.noises[i]
        x = start * (1 + sigmas[0] ** 2).sqrt()
        ours = samplers.euler_maruyama(GAUSSIAN.denoise, x, sigmas, noise)
        assert noise.used == n - 1
        apart.append(float((ours - z).square().mean().sqrt()))
    assert measured_order(steps, apart) == pytest.approx(1, abs=0.1)
    assert apart[-1] < 0.01 * GAUSSIAN.std


def test_euler_maruyama_grows_in_a_step_of_more_than_4():
    """As the first of all steps of cosine_vp is, whose beta of 0.999 is an integral of 6.9."""
    sigmas = schedules.cosine_vp().sigmas.flip(0)[:2]
    b = float(((1 + sigmas[0] ** 2) / (1 + sigmas[1] ** 2)).log())
    assert b == pytest.approx(-math.log(0.001), rel=1e-9)
    x = torch.zeros(1, 1, 1, 1) + sigmas[0]  # z = 1
    recorder = Recorder()
    samplers.euler_maruyama(recorder, x, torch.cat([sigmas, f64([0.0])]), lambda: torch.zeros(1, 1, 1, 1))
    z = recorder.asked[1][0] / (1 + sigmas[1] ** 2).sqrt()
    assert float(z) == pytest.approx(1 - b / 2, abs=1e-3)


# Churn


def test_churn_noise_scales_the_noise_added():
    """Twice the added standard deviation is four times the added variance, in the first step already."""
    sigmas = f64([5.0, 0.0])
    ends = {}
    for scale in (0.0, 1.0, 2.0):
        recorder = Recorder()
        samplers.heun(
            recorder,
            torch.zeros(1, 1, 1, 1),
            sigmas,
            churn=0.3,
            churn_noise=scale,
            fresh_noise=lambda: torch.ones(1, 1, 1, 1),
        )
        ((x, sigma_hat),) = recorder.asked
        assert sigma_hat == pytest.approx(5 * 1.3)
        ends[scale] = float(x)
    assert ends[0.0] == 0
    assert ends[1.0] == pytest.approx(math.sqrt((5 * 1.3) ** 2 - 5**2))
    assert ends[2.0] == pytest.approx(2 * ends[1.0])


@pytest.mark.parametrize("churn, gamma", [(1.0, 0.2), (50.0, math.sqrt(2) - 1)])
def test_churn_raises_sigma_within_its_closed_range_only(churn, gamma):
    """Karras et al. 2022, Algorithm 2: gamma = min(S_churn / N, sqrt(2) - 1)."""
    recorder, noise = Recorder(), Given((1, 1, 1, 1), 5)
    samplers.heun(
        recorder,
        torch.zeros(1, 1, 1, 1),
        f64([16.0, 8.0, 4.0, 2.0, 1.0, 0.0]),
        churn=churn,
        churn_range=(2.0, 8.0),
        fresh_noise=noise,
    )
    up = 1 + gamma
    wanted = [16, 8, 8 * up, 4, 4 * up, 2, 2 * up, 1, 1]
    assert [sigma for _, sigma in recorder.asked] == pytest.approx(wanted)
    assert noise.used == 3


def test_without_churn_or_eta_no_noise_is_drawn():
    def never():
        raise AssertionError("noise was drawn")

    x = START * normal(5, 1, 1, 2, 2)
    samplers.heun(GAUSSIAN.denoise, x, grid(4), fresh_noise=never)
    samplers.ancestral(GAUSSIAN.denoise, x, grid(4), fresh_noise=never)


# Calls, precision, input


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_network_calls(steps):
    x = START * normal(6, 2, 1, 2, 2)
    for sampler, calls in (
        (samplers.heun, 2 * steps - 1),
        (samplers.ancestral, steps),
        (EULER_MARUYAMA, steps),
    ):
        recorder = Recorder()
        sampler(recorder, x, grid(steps))
        assert len(recorder.asked) == calls


@pytest.mark.parametrize("sampler", [samplers.heun, samplers.ancestral, EULER_MARUYAMA])
def test_the_state_is_float64_and_the_start_is_left_alone(sampler):
    x = (START * normal(7, 2, 1, 2, 2)).float()
    kept, recorder = x.clone(), Recorder()
    out = sampler(recorder, x, grid(6).float())
    assert out.dtype == torch.float64 and {x.dtype for x, _ in recorder.asked} == {torch.float64}
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "sampler",
    [samplers.heun, samplers.ancestral, EULER_MARUYAMA, *[sampler for sampler, _ in DPM_SOLVERS.values()]],
    ids=["heun", "ancestral", "euler_maruyama", *DPM_SOLVERS],
)
def test_a_level_visited_twice_changes_nothing(sampler):
    """Rounding to few trained levels can repeat one; no noise is to be added there."""
    x, once, twice = (
        4 * normal(8, 2, 1, 2, 2),
        f64([4.0, 2.0, 1.0, 0.0]),
        f64([4.0, 4.0, 2.0, 2.0, 2.0, 1.0, 0.0]),
    )
    torch.testing.assert_close(sampler(GAUSSIAN.denoise, x, twice), sampler(GAUSSIAN.denoise, x, once))
    recorder = Recorder()
    samplers.ancestral(recorder, x, f64([4.0, 4.0, 0.0]), eta=1.0, fresh_noise=lambda: torch.ones_like(x))
    torch.testing.assert_close(recorder.asked[1][0], x)


@pytest.mark.parametrize("sampler", [samplers.heun, samplers.ancestral, EULER_MARUYAMA])
@pytest.mark.parametrize("bad", [[2.0, 1.0], [1.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0], [[2.0, 0.0]]])
def test_a_grid_that_does_not_end_in_a_single_0_is_refused(sampler, bad):
    # a grid of two dimensions is caught by the annotation already where those are checked
    with pytest.raises(Exception, match="descend and end in a single 0|sigmas"):
        sampler(GAUSSIAN.denoise, torch.zeros(1, 1, 1, 1), f64(bad))


def test_noise_that_is_negative_too_much_or_missing_is_refused():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        samplers.heun(GAUSSIAN.denoise, x, grid(3), churn=-1.0, fresh_noise=lambda: x)
    with pytest.raises(ValueError, match="must not be negative, got -0.5"):
        samplers.ancestral(GAUSSIAN.denoise, x, grid(3), eta=-0.5, fresh_noise=lambda: x)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        samplers.ancestral(GAUSSIAN.denoise, x, grid(3), eta=1.5, fresh_noise=lambda: x)
    for sampler, option in ((samplers.heun, "churn"), (samplers.ancestral, "eta")):
        with pytest.raises(ValueError, match="a stochastic sampler needs fresh_noise"):
            sampler(GAUSSIAN.denoise, x, grid(3), **{option: 1.0})

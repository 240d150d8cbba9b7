"""Noise levels against independent computations from the papers' formulas, in numpy."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repro import config, schedules

quick = settings(deadline=None, max_examples=60)

VP = {
    "cosine": schedules.cosine_vp(),
    "linear": schedules.linear_vp(),
    "cosine of 50": schedules.cosine_vp(50),
    "linear of 250": schedules.linear_vp(250),
}


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def sigma_by_product(betas) -> np.ndarray:
    """sigma_t / alpha_t with alpha_t^2 = prod (1 - beta) and alpha_t^2 + sigma_t^2 = 1, step by step."""
    sigmas, alpha_bar = [], 1.0
    for beta in betas:
        alpha_bar *= 1 - beta
        sigmas.append(math.sqrt(1 - alpha_bar) / math.sqrt(alpha_bar))
    return np.array(sigmas)


def cosine_betas(steps: int) -> list[float]:
    """Nichol and Dhariwal 2021: alpha_bar(t) = f(t) / f(0), beta = 1 - alpha_bar(t) / alpha_bar(t - 1)."""

    def f(t: int) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - (f(t) / f(0)) / (f(t - 1) / f(0)), 0.999) for t in range(1, steps + 1)]


# The two VP schedules


@pytest.mark.parametrize("steps", [10, 1000, 4000])
def test_cosine_from_its_betas(steps):
    np.testing.assert_allclose(
        schedules.cosine_vp(steps).sigmas, sigma_by_product(cosine_betas(steps)), rtol=1e-9
    )


def test_cosine_is_its_closed_form_where_beta_is_not_clipped():
    """Without clipping alpha_bar = f(t) / f(0), so sigma^2 = f(0) / f(t) - 1."""
    f = (
        np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    )  # t = 0 .. 999, below the clipped one
    np.testing.assert_allclose(schedules.cosine_vp().sigmas[:-1] ** 2, f[0] / f[1:] - 1, rtol=1e-9)
    assert schedules.cosine_vp().sigmas[-1] ** 2 == pytest.approx((f[0] / f[-1]) / 0.001 - 1, rel=1e-9)


@pytest.mark.parametrize("steps", [100, 1000])
def test_linear_from_its_betas(steps):
    betas = np.linspace(1e-4, 0.02, steps) * 1000 / steps
    np.testing.assert_allclose(schedules.linear_vp(steps).sigmas, sigma_by_product(betas), rtol=1e-10)


def test_linear_ends_at_the_known_alpha_bar():
    """Ho et al. 2020: the last alpha_bar of the 1000 steps is 4.04e-5."""
    assert 1 / (1 + schedules.linear_vp().sigma_max ** 2) == pytest.approx(4.0358e-5, rel=1e-4)


def test_too_few_linear_steps_are_refused():
    with pytest.raises(ValueError, match="use more steps"):
        schedules.linear_vp(20)
    schedules.linear_vp(21)


@pytest.mark.parametrize("bad", [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, math.inf], [1.0, math.nan]])
def test_sigmas_that_are_no_schedule_are_refused(bad):
    with pytest.raises(ValueError, match="positive, finite and ascending"):
        schedules.DiscreteVP(f64(bad))


# Nearest trained noise level


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
def test_every_trained_sigma_is_its_own_nearest(schedule):
    index = torch.arange(len(schedule.sigmas))
    assert torch.equal(schedule.nearest(schedule.sigmas), index)
    assert torch.equal(schedule.round(schedule.sigmas), schedule.sigmas)
    assert torch.equal(schedule.network_time(schedule.sigmas), index.float())


@quick
@given(st.sampled_from(sorted(VP)), st.lists(st.floats(-15, 15), min_size=1, max_size=20))
def test_nearest_is_the_brute_force_nearest_and_rounding_is_idempotent(name, log_sigma):
    schedule, sigma = VP[name], f64(log_sigma).exp()
    brute = (sigma[:, None] - schedule.sigmas).abs().argmin(1)
    assert torch.equal(schedule.nearest(sigma), brute)
    assert torch.equal(schedule.nearest(schedule.round(sigma)), brute)
    assert torch.equal(schedule.round(schedule.round(sigma)), schedule.round(sigma))


@quick
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 140), min_size=1, max_size=10),
)
def test_nearest_on_whole_numbers_where_ties_abound(table, halves):
    """Many halves are equally far from two levels: the smaller one wins. One level is enough."""
    schedule, sigma = schedules.DiscreteVP(f64(sorted(table))), f64(halves) / 2
    brute = [min(range(len(table)), key=lambda i: (abs(sorted(table)[i] - s), i)) for s in sigma.tolist()]
    assert schedule.nearest(sigma).tolist() == brute


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
def test_sigma_outside_the_trained_range_goes_to_its_ends(schedule):
    outside = f64([0.0, schedule.sigma_min / 2, schedule.sigma_max * 2, 1e30, math.inf])
    assert schedule.nearest(outside).tolist() == [0, 0] + 3 * [len(schedule.sigmas) - 1]


def test_nearest_keeps_shape_and_takes_float32_and_expanded_tensors():
    schedule = schedules.cosine_vp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedule.nearest(f64(1.0)).shape == ()
        assert schedule.nearest(f64(1.0).expand(3)).shape == (3,)
        assert schedule.nearest(torch.ones(2, 3).T).shape == (3, 2)
    assert torch.equal(schedule.nearest(schedule.sigmas.float()), torch.arange(1000))
    assert schedule.round(torch.ones(2)).dtype == torch.float64
    assert schedule.network_time(f64([1.0])).dtype == torch.float32


def test_edm_trains_every_sigma_and_tells_a_quarter_of_its_logarithm():
    sigma = torch.tensor([0.002, 1.0, 80.0])
    assert torch.equal(schedules.EDM().round(sigma), sigma.double())
    time = schedules.EDM().network_time(sigma)
    assert time.dtype == torch.float32
    np.testing.assert_allclose(time, [math.log(0.002) / 4, 0, math.log(80) / 4], rtol=1e-6)


# Drawing noise levels


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
def test_each_trained_sigma_is_drawn_equally_often(schedule):
    steps = len(schedule.sigmas)
    uniform = (torch.arange(8 * steps, dtype=torch.float64) + 0.5) / (8 * steps)
    shuffled = uniform[torch.randperm(8 * steps, generator=torch.Generator().manual_seed(0))]
    drawn, counts = schedule.draw(shuffled).unique(return_counts=True)
    assert torch.equal(drawn, schedule.sigmas)
    assert (counts == 8).all()


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
def test_the_ends_of_the_unit_interval_draw_the_ends_of_the_schedule(schedule):
    assert schedule.draw(f64([0.0, 1 - 2**-53])).tolist() == [schedule.sigma_min, schedule.sigma_max]
    largest_float32 = torch.tensor([1 - 2**-24])
    assert schedule.draw(largest_float32).tolist() == [schedule.sigma_max]


@pytest.mark.parametrize("P_mean, P_std", [(-1.2, 1.2), (-0.4, 1.0)])
def test_edm_draws_a_log_normal(P_mean, P_std):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    log_sigma = schedules.EDM(P_mean, P_std).draw(uniform).log()
    assert stats.kstest(log_sigma.numpy(), stats.norm(P_mean, P_std).cdf).pvalue > 0.01
    np.testing.assert_allclose(
        log_sigma[:100], stats.norm.ppf(uniform[:100].double(), P_mean, P_std), rtol=1e-9
    )


def test_edm_draws_finite_sigmas_at_the_ends_of_the_unit_interval():
    low, middle, high = schedules.EDM().draw(f64([0.0, 0.5, 1 - 2**-53])).tolist()
    assert 0 < low < math.exp(-1.2 - 5 * 1.2) and math.exp(-1.2 + 5 * 1.2) < high < math.inf
    assert middle == pytest.approx(math.exp(-1.2), rel=1e-12)


# The step grid


def test_karras_grid_is_eq_5():
    grid = schedules.karras_grid(0.002, 80.0, 18)
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    by_hand = [(a + i / 17 * (b - a)) ** 7 for i in range(18)] + [0.0]
    np.testing.assert_allclose(grid, by_hand, rtol=1e-12)
    assert grid.dtype == torch.float64


def test_karras_grid_with_rho_1_is_evenly_spaced():
    np.testing.assert_allclose(schedules.karras_grid(1.0, 5.0, 5, rho=1.0), [5, 4, 3, 2, 1, 0], rtol=1e-14)


@quick
@given(st.floats(1e-4, 1), st.floats(1.01, 1e3), st.integers(2, 300), st.floats(1, 10))
def test_karras_grid_descends_from_sigma_max_to_sigma_min_to_0(low, ratio, steps, rho):
    grid = schedules.karras_grid(low, low * ratio, steps, rho)
    assert len(grid) == steps + 1 and grid[-1] == 0
    assert float(grid[0]) == pytest.approx(low * ratio, rel=1e-12)
    assert float(grid[-2]) == pytest.approx(low, rel=1e-9)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    "low, high, steps", [(0.002, 80.0, 1), (0.0, 80.0, 5), (-1.0, 80.0, 5), (2.0, 1.0, 5)]
)
def test_a_grid_that_cannot_be_is_refused(low, high, steps):
    with pytest.raises(ValueError, match="need steps >= 2"):
        schedules.karras_grid(low, high, steps)


def test_grid_for_edm_is_the_plain_grid_within_what_is_asked():
    plain = schedules.grid_for(schedules.EDM(), config.Sample(steps=18))
    assert torch.equal(plain, schedules.karras_grid(0.002, 80.0, 18))
    narrow = schedules.grid_for(
        schedules.EDM(), config.Sample(steps=9, sigma_min=0.1, sigma_max=7.0, rho=3.0)
    )
    assert torch.equal(narrow, schedules.karras_grid(0.1, 7.0, 9, 3.0))


@pytest.mark.parametrize("schedule", VP.values(), ids=VP)
@pytest.mark.parametrize("steps", [2, 18, 1000])
def test_grid_for_vp_visits_only_trained_levels_nearest_to_the_grid(schedule, steps):
    grid = schedules.grid_for(schedule, config.Sample(steps=steps))
    assert len(grid) <= steps + 1 and grid[-1] == 0 and grid.dtype == torch.float64
    assert set(grid[:-1].tolist()) <= set(schedule.sigmas.tolist())
    assert (grid.diff() < 0).all()  # none twice, where a fine grid is rounded
    wanted = schedules.karras_grid(max(0.002, schedule.sigma_min), min(80.0, schedule.sigma_max), steps)
    nearest = (wanted[:-1, None] - schedule.sigmas).abs().argmin(1)
    assert torch.equal(grid[:-1], schedule.sigmas[nearest.unique_consecutive()])
    assert len(grid) == steps + 1 or steps == 1000 or len(schedule.sigmas) < 100


def test_grid_for_starts_and_ends_at_trained_levels_where_the_schedule_is_narrower():
    schedule = schedules.DiscreteVP(f64([0.01, 0.1, 0.5, 2.0, 10.0]))
    grid = schedules.grid_for(schedule, config.Sample(steps=30))
    assert float(grid[0]) == 10.0 and float(grid[-2]) == 0.01 and len(grid) == 6


# Evenly spaced timesteps


@pytest.mark.parametrize(
    "timesteps, sections, wanted",
    [
        (10, (10,), range(10)),
        (10, (2,), [0, 9]),
        (10, (4,), [0, 3, 6, 9]),
        (10, (3,), [0, 4, 9]),  # 4.5 is rounded to even
        (12, (3,), [0, 6, 11]),  # and so is 5.5
        (10, (3, 2), [0, 2, 4, 5, 9]),
        (11, (4, 2), [0, 2, 3, 5, 6, 10]),  # sections of 6 and 5
        (8, (2, 2, 2), [0, 2, 3, 5, 6, 7]),  # of 3, 3 and 2
        (300, (3, 4, 5), [0, 50, 99, 100, 133, 166, 199, 200, 225, 250, 274, 299]),
    ],
)
def test_spaced_timesteps_by_hand(timesteps, sections, wanted):
    assert schedules.spaced_timesteps(timesteps, sections).tolist() == list(wanted)


@pytest.mark.parametrize("timesteps", [50, 1000, 4000])
def test_one_section_is_what_diffusers_calls_linspace(timesteps):
    """Multiplied out there and added up here, so a half, if there is one, can fall to either side."""
    from diffusers import DDIMScheduler, DDPMScheduler  # takes seconds to import

    differ = 0
    for steps in range(2, 51):
        ours = schedules.spaced_timesteps(timesteps, (steps,))
        for scheduler in (DDIMScheduler, DDPMScheduler):
            theirs = scheduler(num_train_timesteps=timesteps, timestep_spacing="linspace")
            theirs.set_timesteps(steps)
            apart = (ours - theirs.timesteps.flip(0)).abs()
            exact = np.arange(steps) * (timesteps - 1) * 2  # half timesteps, times steps - 1
            half = (exact % (steps - 1) == 0) & (exact // (steps - 1) % 2 == 1)
            assert (apart <= torch.from_numpy(half)).all()
            differ += int(apart.sum())
    assert differ < 20


def test_a_half_falls_where_adding_up_takes_it_as_in_adm():
    """10 strides of 999 / 20 are 499.5, which is rounded to 500; added up, they are a little less."""
    *_, added_up = itertools.accumulate([999 / 20] * 10)  # `sum` would correct for rounding
    assert 10 * (999 / 20) == 499.5 and added_up < 499.5
    assert schedules.spaced_timesteps(1000, (21,))[10] == 499


@st.composite
def sectioned(draw):
    """A number of timesteps, and sections that fit into it."""
    sections = draw(st.lists(st.integers(2, 40), min_size=1, max_size=6))
    return draw(st.integers(len(sections) * max(sections), 1000)), tuple(sections)


@quick
@given(sectioned())
def test_spaced_timesteps_are_evenly_spaced_in_each_section(case):
    timesteps, sections = case
    visited = schedules.spaced_timesteps(timesteps, sections).numpy()
    assert len(visited) == sum(sections) and (np.diff(visited) > 0).all()
    assert (visited[0], visited[-1]) == (0, timesteps - 1)
    whole = np.array_split(np.arange(timesteps), len(sections))  # the first ones longer, too
    for section, own in zip(whole, np.split(visited, np.cumsum(sections)[:-1]), strict=True):
        ideal = np.linspace(section[0], section[-1], len(own))
        np.testing.assert_allclose(own, ideal, atol=0.5 + 1e-6)


@quick
@given(sectioned(), st.sampled_from([schedules.cosine_vp, schedules.linear_vp]))
def test_the_uniform_grid_goes_over_trained_levels_from_the_largest_to_the_smallest_and_to_0(case, make):
    timesteps, sections = case
    schedule = make(max(timesteps, 30))
    grid = schedules.uniform_grid(schedule, sections)
    assert len(grid) == sum(sections) + 1 and grid.dtype == torch.float64
    assert (grid.diff() < 0).all() and grid[-1] == 0
    assert (grid[0], grid[-2]) == (schedule.sigma_max, schedule.sigma_min)
    assert set(grid[:-1].tolist()) <= set(schedule.sigmas.tolist())
    how = config.Sample(
        grid="uniform", steps=sum(sections), grid_sections=sections if len(sections) > 1 else ()
    )
    assert torch.equal(schedules.grid_for(schedule, how), grid)
    assert len(grid) == len(schedules.grid_for(schedule, how).unique())


def test_a_network_is_told_the_timesteps_of_the_uniform_grid():
    for schedule in VP.values():
        grid = schedules.grid_for(schedule, config.Sample(grid="uniform", steps=20))
        told = schedule.network_time(grid[:-1])
        assert torch.equal(told.flip(0), schedules.spaced_timesteps(len(schedule.sigmas), (20,)).float())
        every = schedules.grid_for(schedule, config.Sample(grid="uniform", steps=len(schedule.sigmas)))
        assert torch.equal(every[:-1].flip(0), schedule.sigmas)


@pytest.mark.parametrize(
    "timesteps, sections, message",
    [
        (10, (11,), "a section of 10 of the 10 timesteps cannot have 11 steps"),
        (10, (2, 6), "a section of 5 of the 10 timesteps cannot have 6 steps"),
        (10, (2, 1), r"at least 2 steps; got \(2, 1\)"),
        (10, (), r"at least 2 steps; got \(\)"),
    ],
)
def test_timesteps_that_cannot_be_spaced_are_refused(timesteps, sections, message):
    with pytest.raises(ValueError, match=message):
        schedules.spaced_timesteps(timesteps, sections)


def test_edm_has_no_timesteps_to_space():
    with pytest.raises(ValueError, match="needs a schedule of counted steps, not edm; use the grid karras"):
        schedules.grid_for(schedules.EDM(), config.Sample(grid="uniform"))


# By configuration


def test_schedules_by_name():
    def named(**values):
        return schedules.from_config(config.Schedule(**values))

    assert torch.equal(named(name="cosine_vp", steps=40).sigmas, schedules.cosine_vp(40).sigmas)
    assert torch.equal(named(name="linear_vp", steps=40).sigmas, schedules.linear_vp(40).sigmas)
    assert named(name="edm", P_mean=-0.5, P_std=1.5) == schedules.EDM(-0.5, 1.5)


def test_an_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cosine_vp', 'linear_vp' or 'edm'"):
        config.Schedule(name="cosine")

"""The min-norm point against closed forms, and the certificate that any convex problem has: its gap."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from repro import config, pareto, runs, weights
from repro.files import ReproError

DATA = config.Data("none", resolution=8, classes=3)
NETWORKS = {
    "vit": config.ViT(patch=4, width=16, depth=2, heads=2),
    "unet": config.UNet(channels=32, multipliers=(1, 1), blocks=1, attention=(4,), heads=2),
}


def denoiser_and_images(kind, parameterization="v"):
    run = config.Config("test/run", DATA, NETWORKS[kind], config.Train(images=1))
    run = dataclasses.replace(run, parameterization=parameterization)
    generator = torch.Generator().manual_seed(0)
    D = runs.build(run).eval()
    with torch.no_grad():
        for parameter in D.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    y, noise = torch.randn(2, 3, 3, 8, 8, generator=generator, dtype=torch.float64)
    return run, D, y, noise, torch.tensor([2, 0, 1])


@pytest.mark.filterwarnings("error:There is a performance drop")  # of what is not vectorised
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_gradients_by_level_are_those_of_a_plain_loop(kind, parameterization):
    run, D, y, noise, labels = denoiser_and_images(kind, parameterization)
    weight = weights.of_run(run, D.parameterization)
    sigmas = D.schedule.sigmas[[0, 10, 400, 700, 999]]
    expected = []
    for sigma in sigmas:
        D.zero_grad()
        D.loss(y, noise, sigma.expand(3), labels, weight).mean().backward()
        expected.append(torch.cat([p.grad.flatten() for p in D.parameters()]))
    expected = torch.stack(expected)
    for chunk in (1, 2, 100):
        found = pareto.gradients(D, y, noise, sigmas, weight, labels, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_gradient_of_the_mean_loss_is_the_mean_of_the_gradients():
    run, D, y, noise, labels = denoiser_and_images("vit")
    weight, sigmas = weights.of_run(run, D.parameterization), D.schedule.sigmas[[3, 300, 600]]
    rows = pareto.gradients(D, y, noise, sigmas, weight, labels)
    D.zero_grad()
    sum(D.loss(y, noise, sigma.expand(3), labels, weight).mean() for sigma in sigmas).div(3).backward()
    whole = torch.cat([p.grad.flatten() for p in D.parameters()])
    torch.testing.assert_close(rows.mean(0), whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_gradients_that_cannot_be_are_refused(unchecked):
    run, D, y, noise, labels = denoiser_and_images("vit")
    weight, sigmas = weights.of_run(run, D.parameterization), D.schedule.sigmas[[3, 300]]
    for bad in (sigmas * 0, sigmas * float("nan"), sigmas[:0]):
        with pytest.raises(ReproError, match="noise levels must be finite, above 0, and one or more"):
            pareto.gradients(D, y, noise, bad, weight, labels)
    with pytest.raises(ReproError, match=r"images of \(3, 3, 8, 8\) and noise of \(2, 3, 8, 8\) differ"):
        pareto.gradients(D, y, noise[:2], sigmas, weight, labels)
    with pytest.raises(ReproError, match="chunk must be at least 1, not 0"):
        pareto.gradients(D, y, noise, sigmas, weight, labels, 0)
    broken = y.clone()
    broken[0, 0, 0, 0] = float("inf")
    with pytest.raises(ReproError, match="the gradient at sigma = .* is not finite"):
        pareto.gradients(D, broken, noise, sigmas, weight, labels)


@st.composite
def gradients(draw, most=9):
    """A few gradients: generic, duplicated, opposing, zero, or of fewer dimensions than there are of them."""
    levels, dimensions = draw(st.integers(1, most)), draw(st.integers(1, 7))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g = random.normal(size=(levels, dimensions)) * 10.0 ** draw(st.integers(-6, 6))
    g += draw(st.sampled_from([0.0, 0.5, 3.0])) * np.abs(g).max()  # with a common direction, or without
    for _ in range(draw(st.integers(0, 3))):
        source, target = random.integers(levels, size=2)
        g[target] = draw(st.sampled_from([1.0, -1.0, 0.0, 1e-5, 1e3])) * g[source]
    return torch.from_numpy(g)


def scale(G) -> float:
    return max(float(G.diagonal().max()), 1e-300)


@settings(max_examples=2000, deadline=None)
@given(gradients())
def test_the_exact_point_has_no_gap_and_descends_for_all(g):
    G = pareto.gram(g)
    found = pareto.exact(G)
    assert found.weights.min() >= 0 and float(found.weights.sum()) == pytest.approx(1)
    assert found.gap <= 1e-9 * scale(G)
    assert found.products.min() >= -1e-9 * scale(G) and found.squared_norm >= 0
    u = found.weights @ g  # the same formed from the gradients themselves
    assert float(u @ u) == pytest.approx(found.squared_norm, rel=1e-6, abs=1e-9 * scale(G))


@settings(max_examples=200, deadline=None)
@given(gradients(), st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
def test_a_ridge_is_at_its_own_minimum_and_evens_out_the_weights(g, ridge):
    G = pareto.gram(g)
    found, longer = pareto.ridged(G, ridge), pareto.ridged(G, 1e9)
    mean = float(G.diagonal().mean())
    marginal = G @ found.weights + ridge * mean * found.weights  # half the gradient of what is least
    assert float(marginal.min()) >= float(found.weights @ marginal) - 1e-9 * scale(G)
    torch.testing.assert_close(found.products, G @ found.weights)  # of the combination, without the ridge
    assert found.squared_norm >= pareto.exact(G).squared_norm - 1e-9 * scale(G)
    if mean and not (G.diagonal() == 0).any():
        torch.testing.assert_close(
            longer.weights, torch.full_like(longer.weights, 1 / len(G)), atol=1e-6, rtol=0
        )
        more = pareto.ridged(G, 10 * ridge).weights
        assert float(more @ more) <= float(found.weights @ found.weights) + 1e-9
    torch.testing.assert_close(pareto.ridged(G, 0.0).weights, pareto.exact(G).weights)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_that_cannot_be_is_refused(ridge):
    with pytest.raises(ReproError, match="a ridge is at least 0 and finite"):
        pareto.ridged(torch.eye(2), ridge)


@settings(max_examples=500, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(0, 7))
def test_short_gradients_count_beside_long_ones(levels, seed, spread):
    """Of full rank, lengths up to 10^7 apart: the gap is small beside |u|^2, which is that of a short one."""
    random = np.random.default_rng(seed)
    g = random.normal(size=(levels, 30)) * 10.0 ** random.uniform(0, spread, size=(levels, 1))
    found = pareto.exact(pareto.gram(torch.from_numpy(g)))
    assert found.gap <= 1e-5 * found.squared_norm
    assert found.products.min() > 0


@settings(max_examples=300, deadline=None)
@given(gradients())
def test_no_method_goes_below_the_exact_point_and_the_gap_bounds_the_rest(g):
    G = pareto.gram(g)
    least = pareto.exact(G).squared_norm
    for found in (pareto.frank_wolfe(G, 100), pareto.by_softmax(G, 60)):
        assert found.squared_norm >= least - 1e-9 * scale(G)
        assert found.squared_norm / 2 - least / 2 <= found.gap + 1e-12 * scale(G)


@settings(max_examples=200, deadline=None)
@given(gradients())
def test_frank_wolfe_arrives_as_fast_as_is_proven(g):
    """f - f* <= 2 C / (k + 2), C at most the squared diameter of the gradients (Jaggi 2013, Theorem 1)."""
    G = pareto.gram(g)
    found, diameter = pareto.frank_wolfe(G, 200), float(torch.cdist(g, g).max()) ** 2
    assert found.squared_norm / 2 - pareto.exact(G).squared_norm / 2 <= 2 * diameter / 202 + 1e-9 * scale(G)


@settings(max_examples=300, deadline=None)
@given(gradients(), st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_neither_order_nor_unit_changes_the_point(g, seed, factor):
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(g)))
    one, other = pareto.exact(pareto.gram(g)), pareto.exact(pareto.gram(factor * g[order]))
    # weights may differ where gradients depend on each other; u does not
    torch.testing.assert_close(
        one.weights @ g, other.weights @ g[order], rtol=0, atol=1e-4 * float(g.abs().max())
    )


@settings(max_examples=300, deadline=None)
@given(arrays(float, (2, 3), elements=st.floats(-10, 10).map(lambda value: round(value, 6))))
def test_of_two_gradients_the_point_is_known_in_closed_form(pair):
    """Sener and Koltun 2018, Algorithm 1: the foot of the perpendicular, within the segment."""
    one, other = torch.from_numpy(pair)
    apart = float((one - other).square().sum())
    share = 0.5 if apart == 0 else float(np.clip(float((other - one) @ other) / apart, 0, 1))
    found = pareto.exact(pareto.gram(torch.stack([one, other])))
    u = share * one + (1 - share) * other
    assert found.squared_norm == pytest.approx(
        float(u @ u), rel=1e-6, abs=1e-8 * float(np.square(pair).max())
    )
    walked = pareto.frank_wolfe(
        pareto.gram(torch.stack([one, other])), 2
    )  # a line: one exact search suffices
    assert walked.squared_norm == pytest.approx(
        float(u @ u), rel=1e-6, abs=1e-8 * float(np.square(pair).max())
    )


def test_orthogonal_gradients_count_by_their_inverse_squares():
    lengths = torch.tensor([1.0, 2.0, 5.0, 0.5], dtype=torch.float64)
    expected = lengths**-2 / (lengths**-2).sum()
    for method in (
        pareto.exact,
        lambda G: pareto.frank_wolfe(G, 20_000),
        lambda G: pareto.by_softmax(G, 5000),
    ):
        found = method(pareto.gram(torch.diag(lengths)))
        torch.testing.assert_close(found.weights, expected, rtol=0, atol=2e-3)
        assert found.squared_norm == pytest.approx(1 / float((lengths**-2).sum()), rel=1e-3)


def test_theorem_1_on_a_grid_of_directions():
    """max_u min_t <g_t, u> - |u|^2 / 2 is half the least squared norm, and u is where it is reached.

    With the half of the supplement's Eq. 7, u = sum w g / 2, it is less.
    """
    g = torch.tensor([[2.0, 0.5], [0.3, 1.5], [3.0, 3.0]], dtype=torch.float64)
    found = pareto.exact(pareto.gram(g))
    steps = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    u = torch.cartesian_prod(steps, steps)
    value = (u @ g.T).amin(1) - u.square().sum(1) / 2
    best = found.squared_norm / 2
    assert best - 1e-3 < float(value.max()) <= best + 1e-12
    torch.testing.assert_close(u[value.argmax()], found.weights @ g, rtol=0, atol=0.01)
    half = found.weights @ g / 2
    assert float((g @ half).min() - half @ half / 2) == pytest.approx(0.75 * best)


@settings(max_examples=300, deadline=None)
@given(gradients())
def test_theorem_1_by_another_solver(g):
    """Equation 2, solved over directions by a method that knows no weights, has the value of Equation 8."""
    G = pareto.gram(g)
    value, squared_norm, products = pareto.max_min(G)
    found = pareto.exact(G)
    room = 1e-6 * scale(G)
    assert value == pytest.approx(found.squared_norm / 2, abs=room)
    assert squared_norm == pytest.approx(found.squared_norm, abs=10 * room)
    # f is strongly convex in u: a value so near is reached only so near u, and products differ by less
    slack = (2 * max(found.squared_norm / 2 - value, 0) * scale(G)) ** 0.5 + 1e-3 * scale(G)
    assert float((products - found.products).abs().max()) <= slack


@pytest.mark.parametrize(
    "g, least",
    [
        ([[1.0, 2.0], [-1.0, -2.0]], 0.0),  # opposing: no direction lowers both
        ([[1.0, 0.0], [0.0, 0.0]], 0.0),  # one is stationary already
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
        ([[3.0, 4.0]], 25.0),
        ([[3.0, 4.0]] * 4, 25.0),
    ],
)
def test_degenerate_gradients(g, least):
    G = pareto.gram(torch.tensor(g, dtype=torch.float64))
    for found in (pareto.exact(G), pareto.frank_wolfe(G), pareto.by_softmax(G, 3000)):
        assert found.squared_norm == pytest.approx(least, abs=2e-3)
        assert float(found.weights.sum()) == pytest.approx(1)


def test_a_thousand_gradients_of_a_network_of_few_dimensions():
    """Rank 30 of 1000, with a common part, as gradients of neighbouring noise levels are."""
    random = np.random.default_rng(0)
    smooth = np.cumsum(random.normal(size=(1000, 30)), 0)
    g = torch.from_numpy(
        smooth / np.linalg.norm(smooth, axis=1, keepdims=True) + 0.4 * random.normal(size=30)
    )
    G = pareto.gram(g)
    found = pareto.exact(G)
    assert found.gap <= 1e-9 * scale(G)
    assert (found.weights > 0).sum() <= 31  # a corner of the polytope of that dimension
    walked = pareto.frank_wolfe(G, 5000, tolerance=1e-2)
    assert walked.steps < 5000 and walked.gap <= 1e-2 * walked.squared_norm
    assert walked.squared_norm == pytest.approx(found.squared_norm, rel=2e-2)


def test_the_gram_matrix_does_not_depend_on_chunks():
    g = torch.randn(5, 1003, generator=torch.Generator().manual_seed(0))
    whole = g.double() @ g.double().T
    for chunk in (1, 100, 1003, 2**20):
        torch.testing.assert_close(pareto.gram(g, chunk), whole, rtol=1e-12, atol=1e-12)


def test_what_is_no_gram_matrix_is_refused(unchecked):
    good = torch.eye(3)
    with pytest.raises(ReproError, match=r"square and not empty, not of shape \(2, 3\)"):
        pareto.exact(torch.ones(2, 3))
    with pytest.raises(ReproError, match=r"not of shape \(0, 0\)"):
        pareto.frank_wolfe(torch.zeros(0, 0))
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[1, 1] = bad
        with pytest.raises(ReproError, match="the Gram matrix is not finite"):
            pareto.by_softmax(broken)
    with pytest.raises(ReproError, match="symmetric and has no negative square"):
        pareto.exact(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ReproError, match="symmetric and has no negative square"):
        pareto.exact(-good)
    with pytest.raises(ReproError, match="2 weights do not fit a Gram matrix of 3 gradients"):
        pareto.frank_wolfe(good, start=[1.0, 0.0])
    with pytest.raises(ReproError, match="chunk must be at least 1, not 0"):
        pareto.gram(good, 0)
    with pytest.raises(ReproError, match="the gradient at position 2 is not finite"):
        pareto.gram(torch.tensor([[1.0], [2.0], [float("inf")]]))
    for unfit in ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 0.0]):
        with pytest.raises(ReproError, match="weights must be finite, at least 0, and not all 0"):
            pareto.combine(good, torch.tensor(unfit))
    for method in (pareto.frank_wolfe, pareto.by_softmax):
        with pytest.raises(ReproError, match="steps must be at least 1, not 0"):
            method(good, 0)


# How sure it is ---------------------------------------------------------------------------------------


def groups_of(truth, noise, K, seed):
    """Inner products of gradients of K groups: `truth` [T, p] plus noise of that length."""
    random = torch.Generator().manual_seed(seed)
    g = truth + noise * torch.randn(K, *truth.shape, generator=random, dtype=torch.float64)
    return torch.einsum("asp,btp->abst", g, g), g


def test_products_of_different_groups_are_without_bias_and_their_errors_are_what_they_are():
    """Gaussian gradients of known mean: over 400 draws, means and standard deviations are as estimated."""
    truth = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0]], dtype=torch.float64)
    truth = torch.cat((truth, torch.zeros(2, 96, dtype=torch.float64)), 1)  # noise lies in 100 dimensions
    found = [pareto.agreement(groups_of(truth, 0.1, 8, seed)[0]) for seed in range(400)]
    means = {
        name: torch.stack([one[name] for one in found]).mean(0) for name in ("gram", "between", "cosines")
    }
    torch.testing.assert_close(means["between"], truth @ truth.T, rtol=0, atol=0.01)
    assert float(means["gram"][0, 0]) == pytest.approx(1 + 100 * 0.01 / 8, abs=0.01)  # too long by the noise
    assert float(means["cosines"][0, 1]) == pytest.approx(0.6, abs=0.01)
    for name, errors in (("between", "between_errors"), ("cosines", "cosine_errors")):
        spread = torch.stack([one[name] for one in found])[:, 0, 1].std()
        told = torch.stack([one[errors] for one in found])[:, 0, 1].square().mean().sqrt()
        assert float(told) == pytest.approx(float(spread), rel=0.25)


def test_a_level_whose_gradient_drowns_in_noise_is_not_known():
    truth = torch.zeros(3, 100, dtype=torch.float64)
    truth[:2, 0] = 1.0  # the third level's is 0
    known = [pareto.agreement(groups_of(truth, 0.15, 8, seed)[0])["known"].tolist() for seed in range(200)]
    assert np.mean(known, axis=0)[0] > 0.95 and np.mean(known, axis=0)[2] < 0.03
    found = pareto.agreement(groups_of(truth, 0.15, 8, 0)[0])
    assert found["known"].tolist() == [True, True, False]
    assert torch.isnan(found["cosines"][2]).all() and torch.isfinite(found["cosines"][:2, :2]).all()
    with pytest.raises(ReproError, match="standard errors need 3 groups of images or more, not 2"):
        pareto.agreement(groups_of(truth, 0.3, 2, 0)[0])

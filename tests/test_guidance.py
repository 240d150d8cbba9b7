"""Guidance against its closed formula, on labelled data whose denoisers are exact; calls are counted."""

import pytest
import torch
from exact import ExactNet, Gaussian, Mixture

from repro import denoiser, guidance, samplers, schedules

DATA = Mixture()
NULL = DATA.null_label


def f64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled() -> denoiser.Denoiser:
    return denoiser.Denoiser(ExactNet(DATA, "v"), schedules.EDM(), denoiser.V)


X, LABELS = normal(0, 4, 2, 3, 3), torch.tensor([0, 2, 1, 0])


def test_scale_1_is_off_and_costs_one_call():
    D = labelled()
    guided = guidance.cfg(D, 1.0, NULL)
    assert torch.equal(guided(X, f64(0.5), LABELS), D(X, f64(0.5), LABELS))
    assert D.net.calls == [4, 4]  # ours and the one compared with: never a doubled batch


def test_scale_1_needs_neither_null_class_nor_labels():
    D = labelled()
    assert torch.equal(guidance.cfg(D, 1.0, None)(X, f64(0.5), None), D(X, f64(0.5), None))


def test_scale_0_is_the_unconditional_denoiser():
    D = labelled()
    found = guidance.cfg(D, 0.0, NULL)(X, f64(0.5), LABELS)
    torch.testing.assert_close(found, D(X, f64(0.5), torch.full((4,), NULL)), rtol=0, atol=0)
    torch.testing.assert_close(found, DATA.denoise(X, f64(0.5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("sigma", [0.1, 0.8, 12.0])
def test_any_scale_extrapolates_from_the_unconditional_through_the_conditional(scale, sigma):
    D = labelled()
    found = guidance.cfg(D, scale, NULL)(X, f64(sigma), LABELS)
    conditional, whole = DATA.denoise(X, f64(sigma), LABELS), DATA.denoise(X, f64(sigma))
    torch.testing.assert_close(found, (1 - scale) * whole + scale * conditional, rtol=1e-3, atol=1e-4 * sigma)
    assert D.net.calls == [8]  # both halves in one call


def test_each_image_keeps_its_own_sigma_and_label():
    sigma = f64([0.1, 0.5, 2.0, 9.0])
    found = guidance.cfg(labelled(), 3.0, NULL)(X, sigma, LABELS)
    alone = [guidance.cfg(labelled(), 3.0, NULL)(X[i : i + 1], sigma[i], LABELS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_guidance_without_null_class_or_labels_is_refused():
    with pytest.raises(ValueError, match="guidance 1.5 needs a network with classes and a null class"):
        guidance.cfg(labelled(), 1.5, None)
    with pytest.raises(ValueError, match="guidance 1.5 needs labels"):
        guidance.cfg(labelled(), 1.5, NULL)(X, f64(0.5), None)


# The limited interval


@pytest.mark.parametrize(
    "sigma, inside", [(0.1999, False), (0.2, True), (1.0, True), (5.0, True), (5.0001, False)]
)
def test_the_interval_holds_both_its_bounds(sigma, inside):
    D = labelled()
    both = guidance.cfg(D, 2.0, NULL)
    found = guidance.interval(both, D, 0.2, 5.0)(X, f64(sigma), LABELS)
    assert D.net.calls == [8 if inside else 4]
    assert torch.equal(found, (both if inside else D)(X, f64(sigma), LABELS))


def test_the_interval_saves_the_second_half_of_the_batch_outside():
    """Six steps of Euler at 32, 16, 8, 4, 2, 1, guided from 2 to 8."""
    D = labelled()
    limited = guidance.interval(guidance.cfg(D, 2.0, NULL), D, 2.0, 8.0)
    samplers.ancestral(
        lambda x, sigma: limited(x, sigma, LABELS), 32 * X, f64([32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.0])
    )
    assert D.net.calls == [4, 4, 8, 8, 8, 4]


@pytest.mark.parametrize("low, high", [(-1.0, 2.0), (3.0, 2.0)])
def test_an_interval_that_cannot_be_is_refused(low, high):
    with pytest.raises(ValueError, match="need 0 <= low <= high"):
        guidance.interval(labelled(), labelled(), low, high)


def test_samplers_never_know():
    """Heun guided with scale 0 ends where it ends with the unconditional denoiser."""
    D = labelled()
    guided = guidance.cfg(D, 0.0, NULL)
    sigmas = schedules.karras_grid(0.01, 10.0, 12)
    with_labels = samplers.heun(lambda x, s: guided(x, s, LABELS), 10 * X, sigmas)
    without = samplers.heun(lambda x, s: D(x, s, None), 10 * X, sigmas)
    torch.testing.assert_close(with_labels, without, rtol=1e-9, atol=1e-9)


# Another network for low noise


def test_the_flow_is_that_of_one_network_down_to_a_level_and_of_the_other_below_it():
    """Both flows are known in closed form; the level itself still belongs to the first."""
    above, below = Gaussian(0.7, 0.3), Gaussian(-0.4, 0.1)
    sigmas = schedules.karras_grid(1e-3, 20.0, 400)
    at = float(sigmas[200])
    both = guidance.below(lambda x, s, _: above.denoise(x, s), lambda x, s, _: below.denoise(x, s), at)
    found = samplers.heun(lambda x, s: both(x, s, None), 20 * X, sigmas)
    expected = below.flow(above.flow(20 * X, 20.0, at), at, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # the step from that level asks both
    assert torch.equal(both(X, f64(at), None), above.denoise(X, f64(at)))
    assert torch.equal(both(X, f64(at * (1 - 1e-12)), None), below.denoise(X, f64(at * (1 - 1e-12))))


def test_guidance_is_that_of_the_network_which_has_its_turn():
    below = denoiser.Denoiser(ExactNet(Mixture(means=(-1.0, 0.0, 1.0)), "v"), schedules.EDM(), denoiser.V)
    guided = guidance.cfg(guidance.below(labelled(), below, 0.5), 2.0, NULL)
    for sigma, own in ((0.5, labelled()), (0.4, below)):
        expected = guidance.cfg(own, 2.0, NULL)(X, f64(sigma), LABELS)
        assert torch.equal(guided(X, f64(sigma), LABELS), expected)


# A classifier

PIXELS = torch.linspace(-3, 3, 25, dtype=torch.float64).view(25, 1, 1, 1)


def exact_classifier(x, sigma):
    """ln p(component | x) of images of one pixel."""
    return DATA._joint(x, sigma).flatten(1).log_softmax(1)


def unconditional(x, sigma, labels):
    return DATA.denoise(x, sigma)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_an_exact_classifier_at_scale_1_makes_the_conditional_denoiser(sigma, label):
    labels = torch.full((25,), label)
    guided = guidance.classifier(unconditional, exact_classifier, 1.0)
    with torch.no_grad():  # as samplers run
        found = guided(PIXELS, f64(sigma), labels)
    expected = DATA.denoise(PIXELS, f64(sigma), labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * max(1, sigma**2))
    assert not found.requires_grad


def test_a_classifiers_scale_multiplies_what_it_adds_to_the_score():
    labels, sigma = torch.arange(25) % 3, torch.linspace(0.2, 5, 25, dtype=torch.float64)
    whole, conditional = DATA.denoise(PIXELS, sigma), DATA.denoise(PIXELS, sigma, labels)
    found = guidance.classifier(unconditional, exact_classifier, 2.5)(PIXELS, sigma, labels)
    torch.testing.assert_close(found, whole + 2.5 * (conditional - whole), rtol=1e-9, atol=1e-9)


def test_sampling_under_an_exact_classifier_ends_in_the_component():
    """The flow of the guided denoiser is that of the component alone, known in closed form."""
    labels, sigmas = torch.full((25,), 2), schedules.karras_grid(1e-4, 20.0, 200)
    guided = guidance.classifier(unconditional, exact_classifier, 1.0)
    found = samplers.heun(lambda x, s: guided(x, s, labels), 20 * PIXELS, sigmas)
    component = Gaussian(DATA.means[2], DATA.stds[2])
    torch.testing.assert_close(found, component.flow(20 * PIXELS, 20.0, 0.0), rtol=0, atol=2e-3)


def test_a_classifier_at_scale_0_is_off_and_without_labels_refused():
    assert guidance.classifier(unconditional, exact_classifier, 0.0) is unconditional
    with pytest.raises(ValueError, match="guidance by a classifier needs labels"):
        guidance.classifier(unconditional, exact_classifier, 1.0)(PIXELS, f64(1.0), None)

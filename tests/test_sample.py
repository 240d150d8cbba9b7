"""From seeds to images: what a seed's image depends on, and what it does not."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from exact import ExactNet, Gaussian, Mixture
from scipy import stats

from repro import config, denoiser, presets, runs, sample, samplers, schedules
from repro.files import ReproError
from repro.models import vit_fused

MIXTURE = Mixture()
RUN = config.Config(
    name="test/mixture",
    data=config.Data("none", resolution=4, channels=2, classes=3),
    model=config.UNet(),
    train=config.Train(images=1),
    parameterization="v",
    sample=config.Sample(steps=6),
)
UNLABELLED = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, classes=0))


def with_sample(run: config.Config, **changes) -> config.Config:
    return dataclasses.replace(run, sample=dataclasses.replace(run.sample, **changes))


def exact(data=MIXTURE) -> denoiser.Denoiser:
    schedule = schedules.cosine_vp()
    return denoiser.Denoiser(ExactNet(data, "v", schedule.sigmas), schedule, denoiser.V)


def images_of(seeds, batch=4, run=RUN, D=None, **options) -> torch.Tensor:
    return torch.cat(list(sample.generate(D or exact(), run, seeds, batch, "cpu", **options)))


# Noise


def test_noise_of_a_seed_does_not_depend_on_its_neighbours():
    together = sample.SeedNoise([5, 0, 9], (2, 4, 4))
    first, second = together(), together()
    for i, seed in enumerate([5, 0, 9]):
        alone = sample.SeedNoise([seed], (2, 4, 4))
        assert torch.equal(alone()[0], first[i])
        assert torch.equal(alone()[0], second[i])
    assert first.shape == (3, 2, 4, 4) and first.dtype == torch.float32
    assert not torch.equal(first, second)


def test_noise_is_standard_normal_within_an_image_and_across_seeds():
    noise = sample.SeedNoise(range(4000), (1, 4, 4))()
    assert stats.kstest(noise[:250].flatten().numpy(), "norm").pvalue > 0.01
    for pixel in (noise[:, 0, 0, 0], noise[:, 0, 3, 3]):
        assert stats.kstest(pixel.numpy(), "norm").pvalue > 0.01
        neighbours = np.corrcoef(pixel[:-1], pixel[1:])[0, 1]
        assert abs(neighbours) < 4 / math.sqrt(4000)


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 2**63])
def test_seeds_that_would_repeat_anothers_noise_are_refused(seed):
    """torch's CPU generator looks at 32 bits only: 2**32 would be seed 0 again."""
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\*\*31\)"):
        sample.SeedNoise([0, seed], (1, 2, 2))
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\*\*31\)"):
        sample.labels_for([0, seed], 10)


def test_the_first_and_last_seed_give_their_own_noise():
    a, b = sample.SeedNoise([0, 2**31 - 1], (1, 4, 4))()
    assert not torch.equal(a, b)


# Labels


@pytest.mark.parametrize("classes", [1, 3, 1000])
def test_labels_are_uniform_and_in_range(classes):
    labels = sample.labels_for(range(30_000), classes)
    assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < classes
    if classes > 1:
        assert stats.chisquare(torch.bincount(labels, minlength=classes).numpy()).pvalue > 1e-3


def test_a_label_is_the_same_whatever_the_other_seeds():
    assert sample.labels_for([7, 3, 100], 10).tolist() == [
        int(sample.labels_for([s], 10)[0]) for s in (7, 3, 100)
    ]
    assert sample.labels_for([], 10).dtype == torch.int64


def test_labels_and_noise_of_one_seed_are_independent():
    """The generators differ, and neither the first pixel nor the mean of an image tells its label."""
    seeds = range(4000)
    noise, labels = sample.SeedNoise(seeds, (1, 4, 4))(), sample.labels_for(seeds, 4).numpy()
    for seed in (0, 1, 12345):
        own = sample.SeedNoise([seed], (16,))()[0]
        of_label = torch.randn(16, generator=torch.Generator().manual_seed(sample.LABEL_SEEDS + seed))
        assert not torch.equal(own, of_label)
    for number in (*noise.flatten(1).T[:4], noise.mean((1, 2, 3))):
        groups = [number.numpy()[labels == label] for label in range(4)]
        assert stats.kruskal(*groups).pvalue > 1e-3


def test_asking_for_labels_does_not_change_the_noise():
    data = Gaussian()  # its denoiser does not look at labels
    assert torch.equal(
        images_of(range(3), run=RUN, D=exact(data)), images_of(range(3), run=UNLABELLED, D=exact(data))
    )


# Images


SAMPLERS = {
    "heun": {},
    "heun with churn": {"churn": 2.0},
    "ddim": {"sampler": "ancestral"},
    "ancestral": {"sampler": "ancestral", "eta": 1.0},
    "euler_maruyama": {"sampler": "euler_maruyama"},
    "ancestral on the uniform grid": {"sampler": "ancestral", "eta": 1.0, "grid": "uniform"},
    "heun on sections": {"grid": "uniform", "grid_sections": (4, 2)},
    "guided": {"guidance": 2.0},
    "guided within an interval": {"guidance": 2.0, "guidance_interval": (0.1, 2.0)},
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_images_do_not_depend_on_batch_size_or_on_the_split_over_processes(options):
    run, seeds = with_sample(RUN, **options), [3, 1, 4, 15, 9, 2, 6]
    one_by_one = images_of(seeds, 1, run)
    assert one_by_one.shape == (7, 2, 4, 4) and one_by_one.dtype == torch.uint8
    for batch in (3, 7, 16):
        assert torch.equal(images_of(seeds, batch, run), one_by_one)
    halves = images_of(seeds[0::2], 3, run), images_of(seeds[1::2], 2, run)
    assert torch.equal(halves[0], one_by_one[0::2]) and torch.equal(halves[1], one_by_one[1::2])
    assert len({image.numpy().tobytes() for image in one_by_one}) == 7


@pytest.mark.parametrize("options", [{"churn": 2.0}, {"sampler": "ancestral", "eta": 1.0}])
def test_churn_and_eta_reach_the_sampler(options):
    """Made by hand: the start, then each further draw of the seed's noise."""
    D, seeds, labels = exact(), [4, 2], torch.tensor([0, 2])
    noise, sigmas = sample.SeedNoise(seeds, (2, 4, 4)), schedules.grid_for(D.schedule, RUN.sample)
    start = noise().double() * sigmas[0]
    sampler = samplers.ancestral if "eta" in options else samplers.heun
    amount = {key: value for key, value in options.items() if key != "sampler"}
    by_hand = sampler(lambda x, s: D(x, s, labels), start, sigmas, fresh_noise=noise, **amount)
    images = images_of(seeds, 2, with_sample(RUN, **options), labels=labels)
    assert torch.equal(images, sample.to_uint8(by_hand))
    without = {**options, "churn": 0.0, "eta": 0.0}
    assert not torch.equal(images, images_of(seeds, 2, with_sample(RUN, **without), labels=labels))


def test_euler_maruyama_reaches_the_sampler():
    D, seeds, labels = exact(), [4, 2], torch.tensor([0, 2])
    noise, sigmas = sample.SeedNoise(seeds, (2, 4, 4)), schedules.grid_for(D.schedule, RUN.sample)
    start = noise().double() * sigmas[0]
    by_hand = samplers.euler_maruyama(lambda x, s: D(x, s, labels), start, sigmas, noise)
    images = images_of(seeds, 2, with_sample(RUN, sampler="euler_maruyama"), labels=labels)
    assert torch.equal(images, sample.to_uint8(by_hand))


def test_every_batch_has_the_same_size_and_the_filling_is_cut_off():
    D = exact()
    batches = list(sample.generate(D, RUN, range(10, 17), 3, "cpu"))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert set(D.net.calls) == {3}
    assert list(sample.generate(D, RUN, [], 3, "cpu")) == []


def test_given_labels_are_used_in_the_order_of_the_seeds():
    """Each class of this data has a mean of its own, and the images show it."""
    labels = torch.tensor([0, 2, 0, 2, 0, 2, 0])
    images = sample.from_uint8(images_of(range(7), 3, with_sample(RUN, steps=20), labels=labels))
    assert (images.mean((1, 2, 3)) > 0.1).int().tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_labels_by_default_are_those_of_the_seeds():
    own = images_of(range(20, 27), 3)
    assert torch.equal(own, images_of(range(20, 27), 3, labels=sample.labels_for(range(20, 27), 3)))
    assert not torch.equal(own, images_of(range(20, 27), 3, labels=torch.zeros(7, dtype=torch.long)))


def test_the_start_is_the_first_noise_of_the_seed_at_the_largest_sigma():
    """Gaussian data: the image is the exact end of the path that starts there, to a grey level."""
    data, D = Gaussian(), exact(Gaussian())
    images = images_of([8, 5], 2, with_sample(UNLABELLED, steps=60), D)
    largest = float(schedules.grid_for(D.schedule, RUN.sample)[0])
    start = largest * sample.SeedNoise([8, 5], (2, 4, 4))().double()
    wanted = data.flow(start, largest, 0.0).clamp(-1, 1) * 127.5 + 127.5
    assert (images - wanted).abs().max() < 1


def test_sample_batch_is_float64_while_the_network_sees_float32():
    D = exact()
    out = sample.sample_batch(D, RUN.sample, sample.SeedNoise([0, 1], (2, 4, 4)), torch.tensor([0, 1]))
    assert out.dtype == torch.float64 and not out.requires_grad
    assert D.net.dtypes == {torch.float32}


def test_another_way_to_sample_can_be_asked_for():
    other = config.Sample(sampler="ancestral", steps=9, eta=0.5)
    assert torch.equal(
        images_of(range(3), sample=other),
        images_of(range(3), run=with_sample(RUN, sampler="ancestral", steps=9, eta=0.5)),
    )
    assert not torch.equal(images_of(range(3), sample=other), images_of(range(3)))


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, 11 * [2]),
        ({"sampler": "ancestral"}, 6 * [2]),
        ({"sampler": "euler_maruyama"}, 6 * [2]),
        ({"guidance": 3.0}, 11 * [4]),
        # calls at 80, 2 x each of the four between and the smallest once more; guided is all below 1
        ({"guidance": 3.0, "guidance_interval": (0.0, 1.0)}, None),
    ],
)
def test_network_calls_and_their_sizes(options, wanted):
    D, run = exact(), with_sample(RUN, **options)
    images_of([0, 1], 2, run, D)
    if wanted is None:
        visited = schedules.grid_for(D.schedule, run.sample)[:-1].tolist()
        visited = [visited[0]] + [s for s in visited[1:] for _ in range(2)]
        wanted = [4 if s <= 1 else 2 for s in visited]
        assert 2 in wanted and 4 in wanted
    assert D.net.calls == wanted


@pytest.mark.parametrize("profile", ["lab", "paper"])
def test_edms_18_heun_steps_ask_35_times_from_80_down_to_0_002(profile):
    run, asked = presets.preset(f"{profile}/imagenet64-edm"), []

    def denoise(x, sigma, labels):
        asked.append(float(sigma))
        return 0.5 * x

    D = denoiser.Denoiser(torch.nn.Identity(), schedules.from_config(run.schedule), denoiser.edm())
    sample.sample_batch(D, run.sample, lambda: torch.ones(1, 1, 2, 2), labelled=denoise)
    assert len(asked) == sample.evaluations(run.sample, 18) == 35
    assert (asked[0], asked[-1]) == (pytest.approx(80), pytest.approx(0.002))


@pytest.mark.parametrize(
    "options, calls",
    [
        ({}, 39),
        ({"sampler": "ancestral"}, 20),
        ({"sampler": "euler_maruyama"}, 20),
        ({"sampler": "dpm_solver", "order": 3}, 58),
        ({"sampler": "dpm_solver", "multistep": True}, 20),
    ],
)
@pytest.mark.parametrize("grid", [{}, {"grid": "uniform"}, {"grid": "uniform", "grid_sections": (15, 5)}])
def test_evaluations_are_the_network_calls(options, calls, grid):
    D, how = exact(Gaussian()), config.Sample(steps=20, **options, **grid)
    sample.sample_batch(D, how, sample.SeedNoise([0], (1, 2, 2)))
    levels = len(schedules.grid_for(D.schedule, how)) - 1
    assert len(D.net.calls) == sample.evaluations(how, levels) == calls


def test_clipping_reaches_the_sampler_and_keeps_each_denoised_image_within_its_range():
    D, how = exact(Mixture((-1.5, 0.4, 1.5))), config.Sample(steps=6, guidance=2.0, clip=True)
    labels = torch.tensor([0, 2, 1])
    x, sigma = torch.zeros(3, 2, 4, 4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    plain = sample.guided(D, dataclasses.replace(how, clip=False))(x, sigma, labels)
    assert plain.abs().max() > 1
    assert torch.equal(sample.guided(D, how)(x, sigma, labels), plain.clamp(-1, 1))
    drawn = [images_of(range(3), D=D, sample=dataclasses.replace(how, clip=clip)) for clip in (False, True)]
    assert not torch.equal(*drawn)


def test_clipping_makes_up_for_an_error_of_epsilon_at_large_noise():
    """Errors of 0.05 in epsilon are 1,000 in D at the uniform grid's start. ADM's network is clipped, too."""
    data, schedule = Gaussian(0.3, 0.1), schedules.cosine_vp()
    net = ExactNet(data, "eps", schedule.sigmas)
    net.register_forward_hook(lambda _, inputs, out: out.clamp(-3, 3) + 0.05)
    D = denoiser.Denoiser(net, schedule, denoiser.EPS)
    ends = {}
    for clip in (False, True):
        how = config.Sample(sampler="ancestral", eta=1.0, steps=50, grid="uniform", clip=clip)
        ends[clip] = sample.sample_batch(D, how, sample.SeedNoise(range(50), (1, 2, 2)))
    assert (ends[True] - 0.3).abs().mean() < 0.2 < 1 < (ends[False] - 0.3).abs().mean()


def test_guidance_finds_the_null_class_of_a_compiled_network():
    class Compiled(torch.nn.Module):  # torch.compile keeps the network as _orig_mod
        def __init__(self, net):
            super().__init__()
            self._orig_mod = net

        def forward(self, *inputs):
            return self._orig_mod(*inputs)

    plain, compiled = exact(), exact()
    compiled.net = Compiled(compiled.net)
    run = with_sample(RUN, guidance=2.0)
    assert torch.equal(images_of(range(2), run=run, D=plain), images_of(range(2), run=run, D=compiled))


def test_guidance_of_an_unconditional_network_is_refused():
    with pytest.raises(ValueError, match="guidance 2.0 needs a network with classes and a null class"):
        images_of(range(2), run=with_sample(UNLABELLED, guidance=2.0), D=exact(Gaussian()))


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown precision 'fp4'; known are fp32, bf16, fp16, fp8"):
        images_of(range(2), precision="fp4")


@pytest.fixture
def no_noise(monkeypatch):
    """Nothing may be drawn."""
    monkeypatch.setattr(sample, "SeedNoise", lambda *_, **__: pytest.fail("noise is drawn"))


@pytest.mark.parametrize(
    "name, kind", [("lab/imagenet64-unet", "ADMUNet"), ("lab/imagenet64-x0-minsnr5", None)]
)
def test_float8_is_refused_to_networks_that_have_none_by_name(name, kind, no_noise):
    """A UNet, and a ViT that a classifier guides."""
    recorded = runs.load_run(name)
    how, D = recorded.config.sample, recorded.denoiser()
    if kind is None:
        how = dataclasses.replace(recorded.config.evaluate.also[0], steps=3)
        assert how.classifier
    message = "fp8 is for drawing with ViTs alone .* takes a network of another kind, "
    with pytest.raises(ReproError, match=message + (kind or "")) as raised:
        next(sample.generate(D, recorded.config, [0], 1, "cpu", "fp8", how))
    assert str(raised.value).endswith(": take bf16")


@pytest.mark.parametrize("compiled", [False, True])
def test_float8_is_refused_on_a_cpu_before_anything_is_drawn(no_noise, compiled):
    recorded = runs.load_run("lab/imagenet64-vit")
    D = recorded.denoiser()
    if compiled:
        D.net = torch.compile(D.net)
    with pytest.raises(ReproError, match="the precision fp8 needs an NVIDIA GPU, and this is cpu"):
        next(sample.generate(D, recorded.config, [0], 1, "cpu", "fp8"))


def test_float8_is_refused_where_no_network_is_named():
    """As where an autoencoder encodes, or a loss is measured."""
    with pytest.raises(ReproError, match="the precision fp8 is for drawing with ViTs alone"):
        with sample.autocast("cuda", "fp8"):
            pass


def test_float8_reaches_a_vit_that_draws_and_ends_with_it(monkeypatch):
    """And the network for low noise: both are checked before, for their sizes."""
    seen, checked = [], []
    monkeypatch.setattr(vit_fused, "check_fp8", lambda *sizes: checked.append(sizes))

    def can_take(z, heads):
        seen.append((vit_fused.fp8, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return False

    monkeypatch.setattr(vit_fused, "can_take", can_take)
    recorded = runs.load_run("lab/imagenet64-vit")
    low = dict(low_noise="lab/imagenet64-x0-minsnr5", low_noise_below=1.0)
    how = dataclasses.replace(recorded.sample, steps=2, guidance=1.0, **low)
    monkeypatch.setattr(sample, "check_low_noise", lambda *_: None)
    drawing = sample.generate(recorded.denoiser(), recorded.config, range(2), 1, "cpu", "fp8", how)
    next(drawing)
    assert set(seen) == {(True, True, torch.bfloat16)}
    assert {*checked} == {("cpu", 258, 384, 6, 1536), ("cpu", 258, 192, 3, 768)}
    assert not vit_fused.fp8  # while the images are looked at
    next(drawing)
    with sample.autocast("cpu", "fp8", [recorded.denoiser().net]):
        with sample.autocast("cpu", "bf16"):
            assert not vit_fused.fp8
        assert vit_fused.fp8


def test_an_image_that_is_not_finite_is_no_black_image():
    class Broken(torch.nn.Module):
        classes, null_class = 0, False

        def forward(self, x, t, labels):
            return x * float("nan")

    D = denoiser.Denoiser(Broken(), schedules.cosine_vp(), denoiser.EPS)
    with pytest.raises(
        ReproError, match="an image drawn in fp16 is not finite; try the precision bf16 or fp32"
    ):
        images_of(range(2), run=UNLABELLED, D=D, precision="fp16")


def test_half_precisions_reach_the_networks_multiplications_and_change_little():
    seen, drawn = set(), {}

    class Linear(torch.nn.Module):
        classes, null_class = 0, False

        def forward(self, x, t, labels):
            out = x.flatten(1) @ torch.eye(x[0].numel())
            seen.add(out.dtype)
            return out.view_as(x)

    for precision in ("fp32", "bf16", "fp16"):
        D = denoiser.Denoiser(Linear(), schedules.cosine_vp(), denoiser.EPS)
        drawn[precision] = images_of(range(2), run=UNLABELLED, D=D, precision=precision).float()
    assert seen == {torch.float32, torch.bfloat16, torch.float16}
    apart = {precision: float((drawn[precision] - drawn["fp32"]).abs().mean()) for precision in drawn}
    assert 0 < apart["fp16"] < apart["bf16"] / 3  # three bits more


# Bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_from_uint8(dtype):
    every = torch.arange(256, dtype=torch.uint8)
    images = sample.from_uint8(every)
    assert images.dtype == torch.float32 and float(images[0]) == -1 and float(images[255]) == 1
    np.testing.assert_allclose(images, np.linspace(-1, 1, 256), atol=1e-7)
    assert torch.equal(sample.to_uint8(images.to(dtype)), every)


def test_to_uint8_rounds_to_the_nearest_level_and_clips():
    level = 1 / 127.5
    images = torch.tensor(
        [-1.5, -1 + 0.49 * level, -1 + 0.51 * level, 1 - 0.51 * level, 1 - 0.49 * level, 7.0]
    )
    assert sample.to_uint8(images).tolist() == [0, 0, 1, 254, 255, 255]


def test_noise_drawn_ahead_is_the_same_noise():
    plain, ahead = (sample.SeedNoise([3, 8], (2, 4), ahead=ahead) for ahead in (False, True))
    for _ in range(4):
        torch.testing.assert_close(ahead(), plain(), rtol=0, atol=0)
    assert plain.upcoming is None and ahead.upcoming is not None


def test_only_stochastic_samplers_draw_ahead(monkeypatch):
    asked = []
    noise = sample.SeedNoise

    def watched(*arguments, ahead=False):
        asked.append(ahead)
        return noise(*arguments, ahead=ahead)

    monkeypatch.setattr(sample, "SeedNoise", watched)
    for changes in (
        {},
        {"churn": 1.0},
        {"sampler": "ancestral", "eta": 1.0},
        {"sampler": "ancestral"},
        {"sampler": "euler_maruyama"},
    ):
        images_of([0], 1, run=with_sample(RUN, **changes))
    assert asked == [False, True, True, False, True]


def test_noise_in_inference_mode():
    expected = sample.SeedNoise([0, 1], (3, 8, 8))()
    with torch.inference_mode():
        torch.testing.assert_close(sample.SeedNoise([0, 1], (3, 8, 8))(), expected, rtol=0, atol=0)


def test_what_is_cached_of_a_compiled_network_tells_its_precision(monkeypatch):
    """Which torch 2.11 by itself does not: its cache gives bfloat16's kernels for float16."""
    monkeypatch.setattr(sample, "check_precision", lambda *_: None)
    tags = set()
    for precision in sample.AUTOCAST:
        with sample.autocast("cpu", precision):
            tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == len(sample.AUTOCAST)


def test_what_is_cached_of_a_compiled_network_tells_the_code_of_our_operators(monkeypatch):
    """Else a cache from before an operator's output changed its shape would be used, and fail."""
    tags = []
    for version in ("before", "after", "after"):
        monkeypatch.setattr(sample.provenance, "code_version", lambda source, version=version: version)
        sample._operators.cache_clear()
        with sample.autocast("cpu", "bf16"):
            tags.append(torch.compiler.config.cache_key_tag)
    sample._operators.cache_clear()
    assert tags[0] != tags[1] == tags[2]


def test_compiled_networks_draw_what_they_draw_uncompiled(monkeypatch, unchecked):
    """A recorded network and the classifier whose gradient guides it, traced as one graph each."""
    traced = []

    def eager(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(
        runs, "compiled", lambda net: torch.compile(net, dynamic=False, fullgraph=True, backend=eager)
    )
    recorded = runs.load_run("lab/imagenet64-x0-minsnr5")
    how = dataclasses.replace(recorded.config.evaluate.also[0], steps=3)
    assert how.classifier
    plain, D = recorded.denoiser(), recorded.denoiser()
    D.net = runs.compiled(D.net)
    one, other = (
        next(sample.generate(net, recorded.config, [0, 1], 2, "cpu", sample=how)) for net in (plain, D)
    )
    assert (one.int() - other.int()).abs().max() <= 1 and len(traced) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_sampling_by_a_cuda_graph_is_sampling(precision, compiled, unchecked):
    """Of a recorded network, with its classifier and without: two batches, the last not whole."""
    recorded = runs.load_run("lab/imagenet64-x0-minsnr5")
    D = recorded.denoiser("cuda")
    if compiled:
        D.net = runs.compiled(D.net)
    fresh = config.Sample(sampler="ancestral", steps=9, eta=1.0)  # whose noise a thread draws meanwhile
    sde = config.Sample(sampler="euler_maruyama", steps=9, grid="uniform", clip=True)
    for how in (*recorded.config.evaluate.also, recorded.config.sample, fresh, sde):
        one, other = (
            torch.cat(
                list(
                    sample.generate(
                        D, recorded.config, range(7), 4, "cuda", precision, how, cuda_graphs=graphs
                    )
                )
            ).float()
            for graphs in (True, False)  # the graph first: what it needs is compiled while it warms up
        )
        assert (one - other).abs().mean() < (0.05 if precision == "fp32" else 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of float8 numbers need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_float8_changes_images_a_little(compiled, unchecked):
    """By a CUDA graph and without, guided, and beside bfloat16 drawn before and after by the same network."""
    if torch.cuda.get_device_capability() < vit_fused.FP8_CAPABILITY:
        pytest.skip("this GPU multiplies no float8 numbers")
    recorded = runs.load_run("lab/imagenet64-vit")
    D = recorded.denoiser("cuda")
    if compiled:
        D.net = runs.compiled(D.net)

    def images(precision, graphs=True):
        drawn = sample.generate(
            D, recorded.config, range(7), 4, "cuda", precision, recorded.sample, cuda_graphs=graphs
        )
        return torch.cat(list(drawn)).float()

    before, float8, plain, after = images("bf16"), images("fp8"), images("fp8", False), images("bf16")
    assert torch.equal(before, after)
    assert 0.05 < (float8 - before).abs().mean() < 8
    assert (float8 - plain).abs().mean() < 0.5 * (float8 - before).abs().mean()

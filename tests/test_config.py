"""Configurations: what cannot mean anything is refused, and presets are whole."""

import dataclasses
import itertools

import pytest
import torch

from repro import config, denoiser, presets, runs, weights
from repro.config import Config, Data, Sample, Schedule, Train, UNet, ViT
from repro.files import ReproError


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_survive_json_and_build(name):
    run = presets.preset(name)
    assert run.name == name
    assert config.from_json(config.to_json(run)) == run
    with torch.device("meta"):
        net = runs.NETWORKS[run.model.kind](
            run.model, run.data.resolution, run.data.channels, run.data.classes
        )
    assert sum(p.numel() for p in net.parameters()) > 1e6


def test_a_run_at_lab_scale_is_another_run_than_the_papers():
    lab, paper = (presets.preset(f"{profile}/celeba64-unet") for profile in ("lab", "paper"))
    differ = runs.differences(lab, paper)
    assert {"name", "model.channels", "train.images", "train.batch", "evaluate.features"} <= set(differ)
    assert (lab.weight, lab.parameterization, lab.schedule) == (
        paper.weight, paper.parameterization, paper.schedule,
    )  # fmt: skip


def test_recorded_weights_of_the_lab_preset_fit_into_32_megabytes():
    run = presets.preset("lab/celeba64-unet")
    with torch.device("meta"):
        net = runs.ADMUNet(run.model)
    assert 2 * sum(p.numel() for p in net.parameters()) < 32e6


def test_an_unknown_preset_names_the_near_ones():
    with pytest.raises(ReproError, match="no preset 'lab/celeba-unet'. Near ones: lab/celeba64-unet"):
        presets.preset("lab/celeba-unet")


def uniform(**options) -> dict:
    """Settings of a sampler on the uniform grid: those of EDM's grid are the default ones."""
    return {"grid": "uniform", "sigma_max": 80.0, **options}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["train"].update(lrr=1), "train.lrr"),
        (lambda c: c["train"].update(lr="fast"), "train.lr"),
        (lambda c: c["train"].update(batch=0), "must be positive"),
        (lambda c: c["weight"].update(name="min_snr_5"), "weight.name"),
        (lambda c: c["model"].update(heads=4, head_channels=64), "exactly one of head_channels and heads"),
        (lambda c: c["model"].update(transformer_depth=1), "transformer_depth and context_width are given"),
        (lambda c: c["model"].update(context_width=8), "transformer_depth and context_width are given"),
        (lambda c: c["model"].update(transformer_depth=0, context_width=8), "transformer_depth"),
        (lambda c: c["model"].update(transformer_depth=1, context_width=0), "context_width"),
        (lambda c: c["model"].update(transformer_depth=1, context_width=8), "it needs data.classes"),
        (lambda c: c["sample"].update(eta=1.0), "eta is an option of the ancestral sampler"),
        (lambda c: c["sample"].update(sampler="ancestral", churn=1.0), "churn is an option of the heun"),
        (lambda c: c["sample"].update(order=2), "order and multistep are options of dpm_solver"),
        (lambda c: c["sample"].update(multistep=True), "order and multistep are options of dpm_solver"),
        (lambda c: c["sample"].update(sampler="dpm_solver", order=4), "sample.order"),
        (lambda c: c["sample"].update(sampler="euler_maruyama", eta=1.0), "euler_maruyama has none"),
        (lambda c: c["sample"].update(sampler="euler_maruyama", churn=1.0), "euler_maruyama has none"),
        (lambda c: c["sample"].update(sampler="euler_maruyama", order=1), "euler_maruyama has none"),
        (lambda c: c["sample"].update(grid="even"), "sample.grid"),
        (lambda c: c["sample"].update(grid="uniform"), "sigma_max, rho have no effect.*at 0.002, 80, 7"),
        (lambda c: c["sample"].update(uniform(sigma_min=0.01)), "sigma_min, sigma_max, rho have no effect"),
        (lambda c: c["sample"].update(uniform(rho=5)), "sigma_min, sigma_max, rho have no effect"),
        (lambda c: c["sample"].update(grid_sections=[9, 9]), "of the uniform grid; karras has none"),
        (lambda c: c["sample"].update(uniform(grid_sections=[18])), "a single one of grid_sections"),
        (lambda c: c["sample"].update(uniform(grid_sections=[9, 8])), "add up to 17, but steps is 18"),
        (lambda c: c["sample"].update(uniform(grid_sections=[17, 1])), "sample.grid_sections"),
        (lambda c: c["sample"].update(guidance_interval=[0, 1]), "guidance 1 is off"),
        (lambda c: c["sample"].update(steps=1), "at least 2 steps"),
        (lambda c: c["evaluate"].update(samples=1), "a covariance needs at least 2 samples, not 1"),
        (lambda c: c["train"].update(label_drop=0.1), "label_drop needs data.classes"),
        (lambda c: c["sample"].update(rho=0), "sample.rho"),
        (lambda c: c["sample"].update(rho=float("inf")), "sample.rho"),
        (lambda c: c["train"].update(lr=float("nan")), "train.lr"),
        (lambda c: c["sample"].update(sigma_min=0), "sample.sigma_min"),
        (lambda c: c["data"].update(holdout=-1), "data.holdout"),
        (lambda c: c["model"].update(dropout=1.5), "dropout"),
        (lambda c: c["train"].update(lr=-1e-4), "train.lr"),
        (lambda c: c["train"].update(ema_halflife_images=0), "train.ema_halflife_images"),
        (lambda c: c["train"].update(also_ema_halflife_images=[0]), "train.also_ema_halflife_images"),
        (lambda c: c["train"].update(also_ema_halflife_images=[7, 7]), "must differ"),
        (lambda c: c["train"].update(also_ema_halflife_images=[1_500_000]), "must differ"),
        (lambda c: c["train"].update(micro_batch=0), "train.micro_batch"),
        (lambda c: c.update(min_snr_factor=0), "min_snr_factor"),
    ],
)
def test_what_means_nothing_is_refused_by_name(change, message):
    values = config.to_json(presets.preset("lab/celeba64-unet"))
    change(values)
    with pytest.raises(ValueError, match=message):
        config.from_json(values)


@pytest.mark.parametrize(
    "schedule, rows, message",
    [(Schedule("edm"), 1000, "not edm"), (Schedule(steps=1000), 500, "500, too few for 1000 schedule.steps")],
)
def test_a_time_table_needs_a_row_for_each_step(schedule, rows, message):
    with pytest.raises(ValueError, match=message):
        Config("lab/x", Data("celeba64"), ViT(time_rows=rows), Train(images=1), schedule=schedule)


@pytest.mark.parametrize("change", [{"min_snr_factor": 5}, {"train": {"also_ema_halflife_images": [5]}}])
def test_a_classifier_has_no_factor_and_one_average(change):
    values = config.to_json(presets.preset("lab/imagenet64-classifier"))
    values = {**values, **change, "train": {**values["train"], **change.get("train", {})}}
    with pytest.raises(ValueError, match="the classifier has no min_snr_factor and no train.also_ema"):
        config.from_json(values)


def test_a_configuration_from_before_an_option_means_what_it_meant():
    run = presets.preset("lab/celeba64-unet")
    values = config.to_json(run)
    del values["min_snr_factor"], values["train"]["micro_batch"], values["train"]["also_ema_halflife_images"]
    for option in ("grid", "grid_sections", "clip"):
        del values["sample"][option]
    for option in ("transformer_depth", "context_width"):
        del values["model"][option]
    assert config.from_json(values) == run and runs.differences(config.from_json(values), run) == []
    assert config.sample_from_json(values["sample"]) == run.sample


def test_a_sampler_recorded_before_grids_is_the_same_one():
    """The first line of a record's metrics.jsonl: it has none of the later options."""
    recorded = runs.load_run("lab/celeba64-unet")
    assert "grid" not in recorded.metrics[0]["sample"]
    assert config.sample_from_json(recorded.metrics[0]["sample"]) == recorded.config.sample
    assert recorded.distances(recorded.config.sample)[0] == recorded.metrics[0]
    even = dataclasses.replace(recorded.config.sample, sigma_max=80.0, grid="uniform")
    assert recorded.distances(even) == []


@pytest.mark.parametrize("sections", [(), (12, 6)])
def test_the_uniform_grid_survives_json(sections):
    how = Sample(sampler="ancestral", eta=1.0, grid="uniform", grid_sections=sections)
    assert config.sample_from_json(config.sample_json(how)) == how


def test_differences_are_named():
    run = Config("lab/x", Data("celeba64"), UNet(), Train(images=1))
    other = dataclasses.replace(run, train=Train(images=2), sample=Sample(steps=30))
    assert runs.differences(run, other) == ["sample.steps", "train.images"]
    assert runs.differences(run, run) == []


def test_a_sampler_has_one_way_to_be_said():
    assert Sample(sampler="dpm_solver") == Sample(sampler="dpm_solver", order=2)
    assert config.sample_from_json(config.sample_json(Sample(sampler="dpm_solver"))).order == 2


# Figure 8


def test_the_runs_of_figure_8_are_arms_of_figure_1_and_differ_in_the_weight_alone():
    ugd, *beside = [run for name, run in presets.PRESETS.items() if "imagenet64-ugd" in name]
    arm = presets.preset("lab/imagenet64-x0-minsnr5")
    weight = {"weight.name", "weight.bins", "weight.every_images", "weight.probe_images", "weight.gamma"}
    assert set(runs.differences(ugd, arm)) == {"name", "note", *weight}
    for run in beside:
        assert set(runs.differences(ugd, run)) <= {"name", "note", "record_weights", "weight.ridge", *weight}
        assert not run.record_weights and "not recorded" in run.note
    ridged = dataclasses.replace(ugd.weight, ridge=1.0)
    assert [run.weight for run in beside] == [ridged, arm.weight, config.Weight("constant")]


# The arms of Figure 1


@pytest.mark.parametrize("profile", ["lab", "paper"])
def test_the_arms_of_figure_1_differ_in_target_weight_and_seed_alone(profile):
    arms = [run for name, run in presets.PRESETS.items() if name.startswith(f"{profile}/imagenet64-")]
    arms = [run for run in arms if run.model.kind == "vit"]
    arms = [run for run in arms if "imagenet64-vit" not in run.name and "imagenet64-ugd" not in run.name]
    arms = [run for run in arms if not run.data.autoencoder]
    seeds = {f"{name}-seed{seed}" for seed in (1, 2) for name in presets.SEEDED}
    more = seeds | {f"{name}-again" for name in presets.REPEATED}
    more = more | {f"{name}-unclipped" for name in presets.UNCLIPPED} if profile == "lab" else set()
    assert {run.name.removeprefix(f"{profile}/imagenet64-") for run in arms} == {*presets.ARMS, *more}
    for run in arms:
        first = run.name.endswith(tuple(presets.ARMS))  # further seeds are recorded without weights
        assert run.record_weights == first
        allowed = {"name", "note", "parameterization", "record_weights", "train.seed"}
        allowed |= {"weight.name", "weight.gamma", "weight.k"}
        allowed |= {"train.grad_clip"} if run.name.endswith("-unclipped") else set()
        assert set(runs.differences(arms[0], run)) <= allowed
        assert len(run.evaluate.at) >= 8
        assert run.evaluate.also[0].classifier == f"{profile}/imagenet64-classifier"
        weights.from_config(run.weight, denoiser.parameterization(run.parameterization))


def test_arms_that_are_trained_again_are_told_apart_by_their_names_alone():
    for name in presets.REPEATED:
        once, again = (presets.preset(f"lab/imagenet64-{name}{end}") for end in ("", "-again"))
        assert runs.differences(once, again) == ["name", "note", "record_weights"]
        assert once.record_weights and not again.record_weights


def test_the_lab_arms_see_two_million_images_and_take_six_megabytes():
    run = presets.preset("lab/imagenet64-x0-minsnr5")
    assert run.train.images >= 2_000_000
    parameters = sum(p.numel() for p in runs.build(run).net.parameters())
    assert 2 * parameters < 6e6  # float16
    assert (run.model.patch, run.evaluate.at[-1]) == (4, run.train.images)


# Min-SNR inside EDM: Figure 2


def test_the_runs_of_figure_2_differ_in_the_factor_and_the_seed_alone():
    for profile in ("lab", "paper"):
        name = f"{profile}/imagenet64-edm"
        runs_of = [run for other, run in presets.PRESETS.items() if other.startswith(name)]
        ends = ["", "-minsnr", "-seed1", "-minsnr-seed1", "-minsnr1", "-minsnr20"]
        assert [run.name.removeprefix(name) for run in runs_of] == ends[: len(runs_of)]
        assert len(runs_of) == {"lab": 6, "paper": 2}[profile]
        for run in runs_of:
            seeded = run.name.endswith("-seed1")
            assert run.train.seed == int(seeded)
            assert run.record_weights == (not seeded and not run.name.endswith(("-minsnr1", "-minsnr20")))
            gamma = {"": None, "-minsnr": 5, "-minsnr1": 1, "-minsnr20": 20}
            assert run.min_snr_factor == gamma[run.name.removesuffix("-seed1").removeprefix(name)]
            assert set(runs.differences(runs_of[0], run)) <= {
                "name", "note", "record_weights", "train.seed", "min_snr_factor",
            }  # fmt: skip
            assert (run.schedule.name, run.parameterization, run.weight) == (
                "edm",
                "edm",
                config.Weight("edm"),
            )
            assert run.evaluate.at[-1] == run.train.images and len(run.evaluate.at) == 8
            assert ("not recorded" in run.note) != run.record_weights


def test_the_lab_network_of_figure_2_is_small():
    run = presets.preset("lab/imagenet64-edm")
    assert 3.6e6 < sum(p.numel() for p in runs.build(run).net.parameters()) < 4.0e6


def test_the_paper_network_of_figure_2_is_adms():
    """295.9M parameters with ADM's 6 output channels (openai/guided-diffusion), of which EDM keeps 3."""
    run = presets.preset("paper/imagenet64-edm")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in runs.network(run).parameters())
    assert parameters + 3 * (192 * 9 + 1) == pytest.approx(295.9e6, abs=0.05e6)


def test_what_differs_between_edm_at_lab_scale_and_in_the_paper_is_known():
    lab, paper = (presets.preset(f"{profile}/imagenet64-edm") for profile in ("lab", "paper"))
    apart = {name for name in runs.differences(lab, paper) if not name.startswith(("model.", "data."))}
    assert apart == {
        "name", "note", "train.images", "train.batch", "train.lr", "train.warmup_images",
        "train.ema_halflife_images", "train.also_ema_halflife_images", "train.ema_rampup",
        "train.cuda_graphs", "train.state_every_images", "evaluate.at", "evaluate.samples",
        "evaluate.features",
    }  # fmt: skip
    share = [run.train.ema_halflife_images / run.train.images for run in (lab, paper)]
    assert share == [1 / 50, 1 / 50]


def test_arms_without_clipping_differ_in_that_alone():
    for arm in presets.UNCLIPPED:
        one, other = (presets.preset(f"lab/imagenet64-{arm}{end}") for end in ("", "-unclipped"))
        assert set(runs.differences(one, other)) == {"name", "note", "record_weights", "train.grad_clip"}
        assert (
            other.train.grad_clip is None and "without gradient clipping. Its weights are not" in other.note
        )


# Class-conditional ImageNet: Figures 10 and 11


FIGURES = ("imagenet64-vit", "imagenet64-unet")


def parameters(run):
    with torch.device("meta"):
        return sum(p.numel() for p in runs.network(run).parameters())


@pytest.mark.parametrize("profile", ["lab", "paper"])
def test_figures_10_and_11_differ_in_backbone_and_betas_alone(profile):
    vit, unet = (presets.preset(f"{profile}/{name}") for name in FIGURES)
    differ = {name for name in runs.differences(vit, unet) if not name.startswith("model.")}
    lengths = {"train.images", "evaluate.at"} if profile == "lab" else set()  # as the time allowed
    assert differ == {"name", "note", "train.betas"} | lengths
    assert (vit.train.betas, unet.train.betas) == ((0.99, 0.99), (0.9, 0.999))  # supplement, section 3.2
    assert (vit.model.kind, unet.model.kind) == ("vit", "unet")


@pytest.mark.parametrize("name", FIGURES)
def test_figures_10_and_11_at_lab_scale_train_and_sample_as_the_papers(name):
    lab, paper = (presets.preset(f"{profile}/{name}") for profile in ("lab", "paper"))
    for run in (lab, paper):
        assert (run.parameterization, run.weight.name, run.weight.gamma) == ("eps", "min_snr", 5)
        assert (run.schedule.name, run.schedule.steps, run.train.label_drop) == ("cosine_vp", 1000, 0.15)
        assert run.model.null_class and run.data.classes
        assert (run.sample.sampler, run.sample.steps, run.sample.guidance) == ("heun", 20, 1.5)
        assert run.train.weight_decay == 0.03 and run.evaluate.levels == 40
        assert run.evaluate.at[-1] == run.train.images
    assert dataclasses.replace(paper.sample, sigma_max=40.0) == lab.sample != paper.sample
    assert lab.train.betas == paper.train.betas
    assert (lab.evaluate.features, paper.evaluate.features) == ("efficientnet_lite0", "inception")


def test_the_paper_networks_of_figures_10_and_11_have_the_published_sizes():
    vit, unet = (presets.preset(f"paper/{name}") for name in FIGURES)
    d, depth, patch = 1024, 21, 4 * 4 * 3  # Table 1
    block = 3 * d * d + 2 * d  # query, key and value; the key has no bias
    block += d * d + d  # projection
    block += 4 * d * d + 4 * d + 4 * d * d + d  # MLP
    block += 2 * 2 * d  # two norms
    embeddings = patch * d + d + 1000 * d + 1001 * d + (16 * 16 + 2) * d  # patches, time, class, position
    assert parameters(vit) == depth * block + embeddings + d * patch + patch == 266_911_792
    # ADM's 295.9M (openai/guided-diffusion) have 6 output channels, no null class
    assert parameters(unet) + 3 * (192 * 9 + 1) - 768 == pytest.approx(295.9e6, abs=0.05e6)
    edm = presets.preset("paper/imagenet64-edm").model
    assert dataclasses.replace(unet.model, null_class=False) == edm
    for run in (vit, unet):
        assert (run.train.images, run.train.batch) == (921_600_000, 1024)
        steps = run.train.ema_halflife_images / run.train.batch
        assert 0.5 ** (1 / steps) == pytest.approx(0.9999, abs=1e-7)


@pytest.mark.parametrize("name", FIGURES)
def test_the_lab_networks_of_figures_10_and_11_fit_into_32_megabytes(name):
    run = presets.preset(f"lab/{name}")
    assert 14e6 < parameters(run) < 16e6
    assert run.train.ema_halflife_images == 1e6 and run.train.ema_rampup == 0.1
    at = run.evaluate.at
    assert all(b > a for a, b in itertools.pairwise(at))
    recorded = runs.load_run(f"lab/{name}")
    assert [m["images"] for m in recorded.distances(run.sample)][:-1] == list(at[:-1])
    trials = [runs.load_run(other) for other in runs.names() if other.startswith(f"lab/{name[11:]}-lr")]
    assert trials and all(trial.record.images == at[0] for trial in trials)
    (plain,) = run.evaluate.also
    assert dataclasses.replace(run.sample, guidance=1.0) == plain
    assert run.train.cuda_graphs and run.data.holdout == 1000
    assert f"{18_494 - run.data.holdout:,} images of 20 classes" in run.note


# The other settings of the supplement's section 3


@pytest.mark.parametrize("kind, betas", [("unet", (0.9, 0.999)), ("vit", (0.99, 0.99))])
def test_betas_of_the_papers_backbones(kind, betas):
    """Section 3.2."""
    of_kind = [run for run in presets.PRESETS.values() if run.model.kind == kind]
    assert {run.train.betas for run in of_kind if run.name.startswith("paper/")} == {betas}


@pytest.mark.parametrize(
    "vit, unet",
    [
        ("celeba64-vit", "celeba64-unet"),
        ("imagenet256-vit-base", "imagenet256-unet-ablation"),
        ("imagenet256-vit", "imagenet256-unet"),
    ],
)
def test_backbones_on_the_same_data_differ_in_the_network_and_betas_alone(vit, unet):
    one, other = (presets.preset(f"paper/{name}") for name in (vit, unet))
    assert (one.model.kind, other.model.kind) == ("vit", "unet")
    differ = {name for name in runs.differences(one, other) if not name.startswith("model.")}
    assert differ == {"name", "note", "train.betas"}


@pytest.mark.parametrize("name", ["imagenet256-vit-base", "imagenet256-unet-ablation"])
def test_the_ablations_differ_from_figure_12_in_network_steps_and_length(name):
    run, figure = (presets.preset(f"paper/{other}") for other in (name, "imagenet256-vit"))
    differ = {key for key in runs.differences(run, figure) if not key.startswith("model.")}
    differ -= {"train.betas"}
    assert differ == {"name", "note", "train.images", "sample.steps", "evaluate.at", "evaluate.also"}
    assert (run.parameterization, run.weight) == ("x0", config.Weight("min_snr", gamma=5.0))
    assert (run.sample.sampler, run.sample.steps, figure.sample.steps) == ("heun", 30, 50)  # section 3.3
    assert run.evaluate.also == (dataclasses.replace(run.sample, guidance=1.0),)
    assert run.evaluate.at[-1] == run.train.images


def test_celeba_with_vit_small_is_trained_as_u_vit():
    """Bao et al. 2022: batch 128, 500K steps, warm-up of 5,000, learning rate 2e-4, weight decay 0.03."""
    train = presets.preset("paper/celeba64-vit").train
    assert (train.images, train.batch, train.warmup_images) == (64_000_000, 128, 640_000)
    assert (train.lr, train.weight_decay) == (2e-4, 0.03)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("celeba64-vit", 41.7),  # Table 1: 43, which has 4,000 rows of time
        ("imagenet256-vit-base", 86.8),  # Table 1: 88, which has them too, and no classes
        ("imagenet256-unet-ablation", 129.1),  # section 3.1: close to ViT-Base
        ("imagenet256-unet", 395.5),  # section 3.1: 395, besides the table of classes
    ],
)
def test_parameters_of_the_other_settings(name, millions):
    run = presets.preset(f"paper/{name}")
    assert parameters(run) == pytest.approx(millions * 1e6, abs=0.05e6)
    if name == "imagenet256-unet-ablation":
        assert f"has {millions:.0f}M parameters here" in run.note

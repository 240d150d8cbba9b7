"""Configurations: what cannot mean anything is refused, and presets are whole."""

import dataclasses

import pytest
import torch

from repro import config, presets, runs
from repro.config import Config, Data, Sample, Schedule, Train, UNet, ViT
from repro.files import ReproError


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_survive_json_and_build(name):
    run = presets.preset(name)
    assert run.name == name
    assert config.from_json(config.to_json(run)) == run
    with torch.device("meta"):
        net = runs.ADMUNet(run.model, run.data.resolution, run.data.channels, run.data.classes)
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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["train"].update(lrr=1), "train.lrr"),
        (lambda c: c["train"].update(lr="fast"), "train.lr"),
        (lambda c: c["train"].update(batch=0), "must be positive"),
        (lambda c: c["weight"].update(name="min_snr_5"), "weight.name"),
        (lambda c: c["model"].update(heads=4, head_channels=64), "exactly one of head_channels and heads"),
        (lambda c: c["sample"].update(eta=1.0), "eta is an option of the ancestral sampler"),
        (lambda c: c["sample"].update(sampler="ancestral", churn=1.0), "churn is an option of the heun"),
        (lambda c: c["sample"].update(order=2), "order and multistep are options of dpm_solver"),
        (lambda c: c["sample"].update(multistep=True), "order and multistep are options of dpm_solver"),
        (lambda c: c["sample"].update(sampler="dpm_solver", order=4), "sample.order"),
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


def test_differences_are_named():
    run = Config("lab/x", Data("celeba64"), UNet(), Train(images=1))
    other = dataclasses.replace(run, train=Train(images=2), sample=Sample(steps=30))
    assert runs.differences(run, other) == ["sample.steps", "train.images"]
    assert runs.differences(run, run) == []


def test_a_sampler_has_one_way_to_be_said():
    assert Sample(sampler="dpm_solver") == Sample(sampler="dpm_solver", order=2)
    assert config.sample_from_json(config.sample_json(Sample(sampler="dpm_solver"))).order == 2

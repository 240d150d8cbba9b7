"""The notebooks, executed for real: what is committed is what they make, and they notice a false record."""

import json
import shutil
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from repro import config, files, paper, presets, provenance, render, runs, sample, train
from repro.files import ReproError

ID = "fig9_celeba64_unet"
COMMITTED = provenance.ROOT / "paper"

pytestmark = pytest.mark.timeout(900)  # the first test renders every output, beside another worker's tests


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, worker_id):
    """A folder into which every output of paper/figures.toml was rendered anew, once for all workers.

    A worker that takes over a test of these from another finds each output up to date, or waits for it.
    """
    alone, base = worker_id == "master", tmp_path_factory.getbasetemp()
    out = tmp_path_factory.mktemp("paper") if alone else base.parent / "drawn"
    for id in render.ids():
        # of the faces no sample is drawn again here: 250 steps take as long as all that other notebooks do
        render.render(id, out=out, overrides={"recompute": 0} if id == ID else None)
    return out


def without_provenance(path):
    values = json.loads(path.read_text())
    values.pop("provenance", None)
    return values


def test_committed_values_are_what_the_notebooks_make(drawn):
    for path in sorted((drawn / "values").glob("*.json")):
        assert without_provenance(path) == without_provenance(COMMITTED / "values" / path.name)


def test_committed_figures_are_what_the_notebooks_draw(drawn):
    for path in sorted((drawn / "figures").glob("*.png")):
        new, old = (
            np.asarray(Image.open(p).convert("RGB")) for p in (path, COMMITTED / "figures" / path.name)
        )
        np.testing.assert_array_equal(new, old)


def test_committed_tables_are_what_the_notebooks_make(drawn):
    for path in sorted((drawn / "tables").glob("*.csv")):
        assert path.read_text() == (COMMITTED / "tables" / path.name).read_text()


def test_figures_name_the_run_and_the_hash_of_each_weight_file(drawn):
    about = paper.read_provenance(drawn / "figures" / f"{ID}.png")
    assert about["runs"] == {"lab/celeba64-unet": runs.load_run("lab/celeba64-unet").record.weights}


def test_another_runs_samples_stop_the_notebook(tmp_path, monkeypatch):
    """A record whose samples do not come from its weights: the picture mirrored, its hash put right."""
    name = "lab/imagenet64-x0-minsnr5"  # whose samples take the fewest seconds
    folder = tmp_path / "runs" / name
    shutil.copytree(runs.RECORDED / name, folder)
    record = runs.read_record(folder / "run.json")
    images = runs.load_run(name).samples()[:, :, ::-1]
    samples = {**json.loads((folder / "run.json").read_text())["samples"]}
    samples["sha256"] = runs.save_samples(
        folder, np.ascontiguousarray(images), samples["rows"], samples["cols"]
    )
    values = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**values, "samples": samples}))
    assert runs.read_record(folder / "run.json") != record
    with pytest.raises(ReproError, match="not what its weights draw"):
        runs.load_run(name, tmp_path / "runs").check_samples(1)


def test_a_grid_of_classes_names_each_and_says_what_was_measured(tmp_path, monkeypatch):
    name = "lab/imagenet64-eps-minsnr5"
    folder = tmp_path / "runs" / name
    shutil.copytree(runs.RECORDED / name, folder)
    values = json.loads((folder / "run.json").read_text())
    ids = [f"n{label:08d}" for label in range(20)]
    ids[0] = "n01440764"
    values["data"]["classes"] = ids
    (folder / "run.json").write_text(json.dumps(values))
    recorded = runs.load_run(name, tmp_path / "runs")
    distance = recorded.distances(recorded.sample)[-1]
    half = {"k": 3, "real": 9247, "samples": 9247, "real_halves": 0.75}
    for kind, value in (("precision", 0.625), ("recall", 0.25)):
        line = {**distance, **half, "name": f"{kind} (EfficientNet-Lite0, k = 3)", "value": value}
        files.append_line(folder / "metrics.jsonl", line)
        files.append_line(
            folder / "metrics.jsonl", {**line, "value": 0.5, "first_seed": 7}
        )  # of other samples
    # a sweep on other seeds, whose best was drawn too, and a short training with another learning rate
    ways = {steps: replace(recorded.sample, steps=steps) for steps in (5, 10, 15)}
    for steps, value in ((5, 250.0), (10, 200.0), (15, 220.0)):
        line = {**distance, "sample": config.sample_json(ways[steps]), "samples": 2000, "value": value}
        files.append_line(folder / "metrics.jsonl", {**line, "first_seed": 3_000_000})
    record = runs.read_record(folder / "run.json")
    train.record_further_samples(folder, record, range(2), torch.device("cpu"), ways[10])
    short = runs.Run("lab/eps-minsnr5-lr1e-3", tmp_path / "runs" / "lab" / "eps-minsnr5-lr1e-3", record)
    shorter = replace(record.config, name=short.name, train=replace(record.config.train, lr=1e-3))
    runs.write_record(short.path, replace(record, config=shorter, weights={}, samples=None, images=500_224))
    early = next(m for m in recorded.distances(recorded.sample) if m["images"] == 500_224)
    files.append_line(short.path / "metrics.jsonl", {**early, "value": 321.0})
    # two that were trained further: from where they part, and one that shares nothing
    curve = recorded.distances(recorded.sample)
    further = [{**m, "images": m["images"] + 1000, "value": 10.0 + n} for n, m in enumerate(curve[-2:])]
    losses = [{"name": "loss on training images", "images": m["images"], "value": 0.5} for m in further]
    for name, lines in {"-longer": curve[:-1] + further + losses, "-longer-other": further}.items():
        longer = replace(record.config, name=f"lab/eps-minsnr5{name}")
        folder_of_it = tmp_path / "runs" / longer.name
        last = replace(record, config=longer, weights={}, samples=None, images=further[-1]["images"])
        runs.write_record(folder_of_it, last)
        for line in lines:
            files.append_line(folder_of_it / "metrics.jsonl", line)
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    changes = {"run": "imagenet64-eps-minsnr5", "output": "fig10_imagenet64_vit", "recompute": 1}
    executed = render.render(ID, out=tmp_path / "paper", overrides=changes)
    found = json.loads((tmp_path / "paper" / "values" / "fig10_imagenet64_vit.json").read_text())["values"]
    labels = sample.labels_for(range(64), 20).tolist()
    assert found["classes"] == ["tench" if label == 0 else ids[label] for label in labels]
    assert 0 in labels and found["paper"]["value"] == 2.28
    measured = {kind: (m["value"], m["real_halves"]) for kind, m in found["precision_recall"].items()}
    assert measured == {"precision": (0.625, 0.75), "recall": (0.25, 0.75)}
    assert found["distance"]["value"] == pytest.approx(distance["value"], rel=1e-5)
    best = found["best_of_sweep"]
    assert (best["in_the_sweep"], best["first_seed"], best["reported"]) == (200, 3_000_000, None)
    assert "10 steps" in best["sampler"]
    assert list(found["longer"]) == ["eps-minsnr5-longer"]
    assert "lab/eps-minsnr5-longer-other is left out: it shares no measurement" in executed.read_text()
    (of_it,) = found["longer"].values()
    assert [(m["images"], m["value"]) for m in of_it["curve"]] == [
        (m["images"], m["value"]) for m in further if m["images"] > curve[-2]["images"]
    ]
    assert len(of_it["curve"]) == 2 and [m["value"] for m in of_it["losses"]] == [0.5, 0.5]
    tables = tmp_path / "paper" / "tables"
    rates = pd.read_csv(tables / "fig10_imagenet64_vit_trials.csv")
    rates = rates[~rates["sampler"].str.contains("classifier")]
    assert list(rates["learning rate"]) == [0.001, 0.0005] and set(rates["images"]) == {"0.50M"}
    assert rates.iloc[0, -1] == 321 and rates.iloc[1, -1] == pytest.approx(early["value"], abs=0.05)
    tried = pd.read_csv(tables / "fig10_imagenet64_vit_samplers.csv")
    assert set(tried["first seed"]) >= {3_000_000, 1_000_000}
    rows = Image.open(tmp_path / "paper" / "figures" / "fig10_imagenet64_vit_guidance.png")
    assert rows.width / rows.height == pytest.approx(2 / (1.3 * 2), rel=0.2)  # two rows of two images
    picture = Image.open(tmp_path / "paper" / "figures" / "fig10_imagenet64_vit.png")
    assert picture.height / picture.width == pytest.approx(0.6 * 82 / 64, abs=0.01)  # room for the names


BETWEEN_BLOCKS = 0.01 * np.std([0, 0, 1, 2], ddof=1)
"""Of a made-up arm's distances: the run's own block of samples, and three more, the last two 1% apart."""


def made_up_arm(folder, arm, suffix, scale, error, guided=True, starts=None):
    """A record of the arm: a distance that falls as a power of images, each reached `scale` times later."""
    source, starts = runs.load_run("lab/imagenet64-x0-constant", runs.RECORDED), starts or {}
    known = presets.preset(f"lab/imagenet64-{arm}")
    name = f"{known.name}{suffix}"
    record = replace(source.record, config=replace(known, name=name), weights={}, samples=None)
    runs.write_record(folder / name, record)
    for line in source.metrics:
        if line.get("classifier") and not guided or line["name"].startswith("standard error"):
            continue
        if "sample" in line and (line["sample"]["sigma_max"] != 80 or line["sample"].get("clip")):
            continue  # the recorded run's own starts
        if "sample" in line:
            block = (
                max(0, line["first_seed"] - 2_000_000) // line["samples"]
            )  # 0 (and the run's own), 1, 2: 1% apart
            line = {**line, "value": 300 * (line["images"] / 1e6 / scale) ** -0.8 * np.exp(0.01 * block)}
            for start, value in starts.items():
                change = {"clip": True} if start == "clipped" else {"sigma_max": start}
                lower = {**line, "sample": {**line["sample"], **change}, "value": value}
                files.append_line(folder / name / "metrics.jsonl", lower)
        elif "errors" in line:
            line = {**line, "errors": [error] * len(line["errors"])}
        files.append_line(folder / name / "metrics.jsonl", line)


def test_the_ablation_finds_the_speed_up_that_is_in_the_records(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    (folder / "lab").mkdir(parents=True)
    shutil.copytree(runs.RECORDED / "lab" / "imagenet64-classifier", folder / "lab" / "imagenet64-classifier")
    for suffix, luck in (("", 1.0), ("-seed1", 1.05), ("-seed2", 1 / 1.05)):
        made_up_arm(folder, "x0-minsnr5", suffix, luck, 0.1)
        made_up_arm(folder, "x0-constant", suffix, 1.5 / luck, 0.2)
    made_up_arm(folder, "x0-minsnr5", "-again", 1.02, 0.1)
    made_up_arm(folder, "eps-minsnr5", "", 1.0, 0.1, starts={40.0: 90.0, 20.0: 80.0, "clipped": 85.0})
    made_up_arm(folder, "v-minsnr5", "", 2.0, 0.1, starts={40.0: 90.0})
    made_up_arm(folder, "eps-constant", "", 1.01, 0.1)
    made_up_arm(folder, "v-constant", "", 1.0, 0.1)
    made_up_arm(folder, "x0-snr", "", 3.0, 0.1)
    made_up_arm(folder, "x0-snr", "-unclipped", 2.0, 0.1)
    for norm in (4.0, 8.0):
        files.append_line(folder / "lab/imagenet64-x0-snr-unclipped/log.jsonl", {"gradient_norm": norm})
    monkeypatch.setenv("REPRO_RUNS", str(folder))
    render.render("fig1_pixel_ablation", out=tmp_path / "paper")
    values = json.loads((tmp_path / "paper" / "values" / "fig1_pixel_ablation.json").read_text())["values"]
    found = values["speed_ups"]["guided"]
    verdicts = {pair: way["verdict"] for pair, way in found.items()}
    assert verdicts == {
        "x0-minsnr5/x0-constant": "faster",
        "x0-minsnr5/x0-snr": None,
        "x0-snr/eps-constant": None,
        "eps-minsnr5/eps-constant": None,  # one seed
        "v-minsnr5/v-constant": None,
    }
    way = found["x0-minsnr5/x0-constant"]
    assert way["ratio"] == pytest.approx(1.5, rel=1e-4)
    half = stats.t.ppf(0.975, 4) * np.log(1.05) * np.sqrt(2 / 3)  # both arms' deviation is ln 1.05
    assert way["interval"] == pytest.approx([1.5 * np.exp(-half), 1.5 * np.exp(half)], rel=1e-4)
    assert (
        way["leads_from"] == pytest.approx(176_896, rel=1e-5)
        and found["v-minsnr5/v-constant"]["leads_from"] is None
    )
    half = (
        stats.t.ppf(0.975, 2) * 2 * np.log(1.05) / np.sqrt(3)
    )  # what is luck to one is bad luck to the other
    assert way["paired"] == pytest.approx([1.5 * np.exp(-half), 1.5 * np.exp(half)], rel=1e-4)
    at = values["speed_up_at"]["x0"]  # at all distances the same, all curves being lines
    assert at["ratios"] == pytest.approx([1.5] * 40, rel=1e-4) and at["distances"][-1] < at["distances"][0]
    np.testing.assert_allclose(at["intervals"], [way["paired"]] * 40, rtol=1e-4)  # the wider one
    assert values["speed_up_at"]["v"]["intervals"] == [None] * len(values["speed_up_at"]["v"]["ratios"])
    deviation = 0.8 * np.log(1.02) / np.sqrt(2)
    assert values["noise"]["same_training_seed_trained_twice"] == pytest.approx(
        {"half_way": deviation, "end": deviation}, rel=1e-4
    )
    assert values["missing"] == [
        arm for arm in presets.ARMS if arm.split("-")[1] not in ("constant", "minsnr5", "snr")
    ]
    assert values["runs"] == 11
    last = [300 * (2.000128 / scale) ** -0.8 for scale in (3, 2)]
    expected = {"clipped": last[0], "not_clipped": last[1], "gradient_norm": 6.0}
    assert values["clipping"]["x0-snr"] == pytest.approx(expected, rel=1e-4)
    end = values["last_distance"]["unguided"]["eps-minsnr5"][0]  # of the other, not all was measured
    assert values["starts"] == {"eps-minsnr5": {"80": end, "40": 90.0, "20": 80.0, "clipped": 85.0}}
    assert values["noise"]["sampling_seeds"]["half_way"] is None
    assert values["noise"]["sampling_seeds"]["end"] == pytest.approx(BETWEEN_BLOCKS, rel=1e-4)


def test_the_ablation_without_a_classifier(tmp_path, monkeypatch):
    """A user's arms need not be guided: then the notebook says so, or draws what was measured."""
    folder = tmp_path / "runs"
    for arm, scale in (("x0-minsnr5", 1.0), ("x0-constant", 1.25)):
        made_up_arm(folder, arm, "", scale, 0.1, guided=False)
    monkeypatch.setenv("REPRO_RUNS", str(folder))
    with pytest.raises(ReproError, match="not every arm was measured with the classifier"):
        render.render("fig1_pixel_ablation", out=tmp_path / "paper")
    render.render("fig1_pixel_ablation", out=tmp_path / "paper", overrides={"guided": False})
    values = json.loads((tmp_path / "paper" / "values" / "fig1_pixel_ablation.json").read_text())["values"]
    assert list(values["speed_ups"]) == ["unguided"]
    assert values["speed_ups"]["unguided"]["x0-minsnr5/x0-constant"]["ratio"] == pytest.approx(1.25, rel=1e-4)


def made_up_edm(folder, end, scales, error, images=(5e5, 1e6, 2e6, 4e6)):
    """A record of a run of Figure 2: each average's distance falls as a power of images, scaled in images.

    Returns a line of its metrics.
    """
    source = runs.load_run("lab/imagenet64-x0-constant", runs.RECORDED)
    known = presets.preset(f"lab/imagenet64-edm{end}")
    record = replace(source.record, config=known, images=int(images[-1]), weights={}, samples=None)
    runs.write_record(folder / known.name, record)
    (level,) = (line for line in source.metrics if "errors" in line)
    line = {
        **next(line for line in source.metrics if "sample" in line),
        "sample": config.sample_json(known.sample), "first_seed": known.evaluate.first_seed,
    }  # fmt: skip
    lines = [
        {**line, "images": int(n), "value": 300 * (n / 1e6 / scale) ** -0.8}
        | ({} if average is None else {"ema_halflife_images": average})
        for n in images
        for average, scale in zip((None, *known.train.also_ema_halflife_images), scales, strict=True)
    ]
    if error is not None:
        lines.append({**level, "images": int(images[-1]), "errors": [error] * len(level["errors"])})
    for one in lines:
        files.append_line(folder / known.name / "metrics.jsonl", one)
    return line


def lower_network(line, other, level, value, weights):
    """The line of a run's metrics where the network of `other` drew below a noise level."""
    way = {**line["sample"], "low_noise": f"lab/imagenet64-{other}", "low_noise_below": level}
    used = {"run": way["low_noise"], "weights": weights}
    return {**line, "images": 4_000_000, "value": value, "sample": way, "low_noise": used}


def test_figure_2_finds_the_speed_up_of_each_average(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "paper").mkdir()
    shutil.copy(provenance.ROOT / "notebooks" / "fig2_edm.ipynb", tmp_path / "notebooks")
    figures = tmp_path / "paper" / "figures.toml"
    figures.write_text('[fig2_edm]\nnotebook = "notebooks/fig2_edm.ipynb"\ntime_limit = 300\n')
    monkeypatch.setenv("REPRO_RUNS", str(folder))
    line = made_up_edm(folder, "", (1.5, 1.0), 0.2)
    with pytest.raises(ReproError, match="EDM and an arm beside it are not recorded"):
        render.render("fig2_edm", figures)
    made_up_edm(folder, "-seed1", (1.5 * 1.02, 1.02), 0.2)
    made_up_edm(folder, "-minsnr", (1.0, 1.2), 0.1)
    made_up_edm(folder, "-minsnr-seed1", (1.02, 1.2 * 1.02), 0.1)
    made_up_edm(folder, "-minsnr20", (1.5 * 1.5, 1.5), 0.3)
    metrics = {run: folder / "lab" / f"imagenet64-{run}" / "metrics.jsonl" for run in ("edm", "edm-minsnr")}
    for level, value in ((2.0, 70.0), (0.1, 80.0)):
        files.append_line(metrics["edm"], lower_network(line, "edm-minsnr", level, value, {}))
        files.append_line(metrics["edm-minsnr"], lower_network(line, "edm", level, 180 - value, {}))
    render.render("fig2_edm", figures)
    values = json.loads((tmp_path / "paper" / "values" / "fig2_edm.json").read_text())["values"]
    main, longer = (values["speed_ups"][key] for key in ("80000", "320000"))
    assert [way["Min-SNR-5"]["verdict"] for way in (main, longer)] == ["faster", "slower"]
    assert [way["Min-SNR-20"]["verdict"] for way in (main, longer)] == [None, None]  # one seed
    assert main["Min-SNR-20"]["ratio"] == pytest.approx(np.sqrt(1.02) / 1.5, rel=1e-4)
    assert main["Min-SNR-5"]["ratio"] == pytest.approx(1.5, rel=1e-4)
    half = stats.t.ppf(0.975, 2) * np.log(1.02) / np.sqrt(2)  # two arms of two seeds, both ln 1.02 apart
    assert main["Min-SNR-5"]["interval"] == pytest.approx([1.5 * np.exp(-half), 1.5 * np.exp(half)], rel=1e-4)
    assert values["verdict_is_the_same_for_each_average"] == {"Min-SNR-5": False}
    assert (values["missing"], values["runs"]) == (["Min-SNR-1"], 5)
    switched = values["switched"]
    assert {arm: (line["sigma"], line["value"]) for arm, line in switched.items()} == {
        "EDM": ([0.1, 2.0], [80.0, 70.0]),
        "Min-SNR-5": ([0.1, 2.0], [100.0, 110.0]),
    }
    edm, other = (values["curves"]["80000"][arm][0]["values"][-1] for arm in ("EDM", "Min-SNR-5"))
    assert switched["EDM"]["share_made_below"][0] == pytest.approx((80 - edm) / (other - edm), rel=1e-3)
    assert switched["Min-SNR-5"]["share_made_below"][1] == pytest.approx(
        (110 - other) / (edm - other), rel=1e-3
    )
    # E[min(1, gamma sigma^2)] for ln sigma ~ N(m, s^2), by the normal distribution
    m, s = -1.2, 1.2
    for arm, gamma in (("Min-SNR-1", 1), ("Min-SNR-5", 5), ("Min-SNR-20", 20)):
        end = -np.log(gamma) / 2
        mean = stats.norm.sf((end - m) / s)
        mean += gamma * np.exp(2 * m + 2 * s**2) * stats.norm.cdf((end - m - 2 * s**2) / s)
        assert values["trained_levels"][arm]["mean_weight"] == pytest.approx(mean, rel=1e-3)
    ends = {key: np.exp(m + s * stats.norm.ppf(q)) for key, q in (("from_σ", 0.05), ("to_σ", 0.95))}
    expected = {"mean_weight": 1, "median_σ": np.exp(m), **ends}
    assert values["trained_levels"]["EDM"] == pytest.approx(expected, rel=1e-3)

    files.append_line(metrics["edm"], lower_network(line, "edm-minsnr", 0.5, 75.0, {"of": "others"}))
    with pytest.raises(ReproError, match="other weights of lab/imagenet64-edm-minsnr than those recorded"):
        render.render("fig2_edm", figures)


def test_the_best_sampler_is_the_one_in_the_records(tmp_path, monkeypatch):
    """Distances that fall with evaluations as a law of each solver says, on a recorded network."""
    name, folder = "lab/imagenet64-x0-minsnr5", tmp_path / "runs"
    for other in (name, "lab/imagenet64-classifier"):
        shutil.copytree(runs.RECORDED / other, folder / other)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "paper").mkdir()
    shutil.copy(provenance.ROOT / "notebooks" / "sec4_5_samplers.ipynb", tmp_path / "notebooks")
    figures = tmp_path / "paper" / "figures.toml"
    figures.write_text(
        '[sec4_5_samplers]\nnotebook = "notebooks/sec4_5_samplers.ipynb"\ntime_limit = 300\n'
        "[sec4_5_samplers.parameters]\nsamples = 50\nbudgets = [4, 10, 40, 99]\ncolumns = 2\n"
        f'names = ["{name.removeprefix("lab/")}"]\n'
    )
    monkeypatch.setenv("REPRO_RUNS", str(folder))
    with pytest.raises(ReproError, match="was not measured with several samplers and 50 samples: python -m"):
        render.render("sec4_5_samplers", figures)
    run = runs.load_run(name)
    line = {**run.distances(run.sample)[-1], "samples": 50}
    laws = {  # of the distance over evaluations
        config.Sample(steps=2): lambda n: 100 / n,
        config.Sample(sampler="ancestral", steps=2): lambda n: 30 / n**0.5,
        config.Sample(sampler="dpm_solver", steps=2, multistep=True, clip=True): lambda n: 150 / n + 0.5,
    }
    for how, law in laws.items():
        for steps in (2, 5, 20, 40):
            this = replace(how, steps=steps)
            evaluations = sample.evaluations(this, steps)
            told = {"sample": config.sample_json(this), "evaluations": evaluations, "steps": steps}
            line |= {"value": law(evaluations), "seconds": 0.1 * evaluations, **told}
            files.append_line(run.path / "metrics.jsonl", line)
    guided = {"guidance": 2.0, "guidance_interval": [0.0, 3.0]}
    for changes in (guided, {"guidance": 1.5}):  # better than all, but no sampler's merit
        told = {"sample": config.sample_json(replace(config.Sample(steps=2), **changes)), "value": 0.1}
        files.append_line(run.path / "metrics.jsonl", {**line, **told, "evaluations": 3})
    blocks = (10.0, 11.0, 10.5, 10.2, 10.8)  # of the run's own sampler
    for block, value in zip(range(2_000_000, 2_000_250, 50), blocks, strict=True):
        told = {"sample": config.sample_json(run.sample), "first_seed": block, "value": value}
        files.append_line(run.path / "metrics.jsonl", {**line, **told})
    for how in (config.Sample(steps=2), config.Sample(sampler="ancestral", steps=2)):
        run = runs.load_run(name)
        train.record_further_samples(run.path, run.record, range(3, 5), torch.device("cpu"), how)
    render.render("sec4_5_samplers", figures)
    out = tmp_path / "paper"
    values = json.loads((out / "values" / "sec4_5_samplers.json").read_text())["values"]
    # by hand: Heun's 2, 5, 20, 40 steps take 3, 9, 39, 79 evaluations, those of the others as many as steps
    found = [(row["best_sampler"].split(",")[0], row["its_distance"]) for row in values["best"]]
    expected = [("DDIM", 30 / 2**0.5), *(("Heun", 100 / n) for n in (9, 39, 79))]
    assert found == [(solver, pytest.approx(value, rel=1e-4)) for solver, value in expected]
    above = [row["Heun_above_the_best_percent"] for row in values["best"]]
    assert above == pytest.approx([100 * (100 / 3 / expected[0][1] - 1), 0, 0, 0], rel=1e-4)
    deviation = np.std(np.log(blocks), ddof=1)
    assert values["sampling_deviation"] == pytest.approx(deviation, rel=1e-4)
    low, high = (deviation * (4 / stats.chi2.ppf(level, 4)) ** 0.5 for level in (0.975, 0.025))
    assert values["sampling_interval"] == pytest.approx([low, high], rel=1e-4)
    assert values["unmeasured"] == {"imagenet64-x0-minsnr5": {"count": 0, "ways": []}}
    beyond = 100 * (np.exp(stats.t.ppf(0.975, 4) * 2**0.5 * deviation) - 1)
    assert values["worse_beyond_percent"] == pytest.approx(beyond, rel=1e-4)
    assert values["sampling_freedom"] == 4 and above[0] > beyond  # so that it is worse, beyond noise
    assert [row["Heun_is"] for row in values["best"]] == ["worse", "best", "best", "best"]
    assert len(values["measured"]["imagenet64-x0-minsnr5"]) == 14
    assert (out / "figures" / "sec4_5_samplers_vit.png").exists()
    assert "Heun, 2 steps from σ = 80" in (out / "tables" / "sec4_5_samplers_all.md").read_text()


def test_what_is_not_measured_of_a_network_is_what_is_of_the_other():
    values = json.loads((COMMITTED / "values" / "sec4_5_samplers.json").read_text())["values"]
    ways = {name: {row["sampler"] for row in rows} for name, rows in values["measured"].items()}
    one, other = ways
    for name, expected in ((one, ways[other] - ways[one]), (other, ways[one] - ways[other])):
        assert set(values["unmeasured"][name]["ways"]) == expected
        assert values["unmeasured"][name]["count"] == len(expected)


def test_theorem_1_of_gradients_that_are_known(tmp_path, monkeypatch):
    """Orthogonal gradients of lengths 1, 2 and 4; and two early ones of which one nearly undoes the other."""
    source = runs.load_run("lab/imagenet64-x0-constant")
    shared = {"name": "gradients by noise level", "count": 8, "device": "cpu"}
    grams = {"x0-constant": torch.diag(torch.tensor([1.0, 4.0, 16.0]))}
    opposed = torch.tensor([[1.0, 0.0], [-0.9, 0.1]])
    grams["x0-constant-early"] = opposed @ opposed.T
    for name, G in grams.items():
        folder = tmp_path / "runs" / "lab" / f"imagenet64-{name}"
        renamed = replace(source.config, name=f"lab/imagenet64-{name}")
        runs.write_record(folder, replace(source.record, config=renamed, weights={}, samples=None))
        length = G.diagonal().sqrt()
        known = [level > 0 or name != "x0-constant" for level in range(len(G))]
        cosine = [
            [float(G[s, t] / length[s] / length[t]) if known[s] and known[t] else None for t in range(len(G))]
            for s in range(len(G))
        ]
        errors = [[None if c is None else 0.1 for c in row] for row in cosine]
        line = {
            **shared, "images": 1000, "sigmas": [0.1, 1.0, 10.0][: len(G)], "gram": G.tolist(),
            "between": (G / 2).tolist(), "between_errors": (G / 50).tolist(), "cosines": cosine,
            "cosine_errors": errors, "known": known, "value": min(c for c in cosine[-1] if c is not None),
            "value_error": 0.1,
        }  # fmt: skip
        files.append_line(folder / "metrics.jsonl", line)
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "paper").mkdir()
    shutil.copy(provenance.ROOT / "notebooks" / "sec1_pareto.ipynb", tmp_path / "notebooks")
    figures = tmp_path / "paper" / "figures.toml"
    figures.write_text('[sec1_pareto]\nnotebook = "notebooks/sec1_pareto.ipynb"\ntime_limit = 300\n')
    render.render("sec1_pareto", figures)
    values = json.loads((tmp_path / "paper" / "values" / "sec1_pareto.json").read_text())["values"]
    late, early = "imagenet64-x0-constant", "imagenet64-x0-constant-early"
    shares = np.array([1, 1 / 4, 1 / 16]) / (1 + 1 / 4 + 1 / 16)
    np.testing.assert_allclose(values["weights"][late]["UGD of losses in x₀"], shares, rtol=1e-4)
    # in epsilon the gradients are 100, 2 and 0.04 long; as weights on x0 those of their squares times SNR
    on_eps = np.array([1e-4, 1 / 4, 1 / 0.04**2]) * [100, 1, 0.01]
    np.testing.assert_allclose(
        values["weights"][late]["UGD of losses in ε"], on_eps / on_eps.sum(), rtol=1e-4
    )
    # SNR is 100, 1 and 0.01; min(SNR, 5) is 5, 1 and 0.01
    np.testing.assert_allclose(values["weights"][late]["Min-SNR-5"], np.array([5, 1, 0.01]) / 6.01, rtol=1e-4)
    descent = {(row["run"], row["weight"]): row for row in values["descent"]}
    assert all(row["levels_lowered"] == row["of"] for (run, _), row in descent.items() if run == late)
    # of the early two, the SNR weight takes nearly all from the first, and raises the second's loss
    assert descent[early, "constant on ε"]["levels_lowered"] == 1
    assert descent[early, "constant on ε"]["lowered_of_all_images"] == 1
    assert descent[early, "UGD of losses in x₀"]["levels_lowered"] == 2
    assert descent[early, "UGD of losses in ε"]["levels_lowered"] == 2
    assert values["eq_4"]["apart"] < 1e-12 and values["eq_4"]["below"] < 0
    assert max(values["eq_3"]["apart"].values()) < 1e-5 and "random" in values["eq_3"]["of"]
    assert values["concave"]["in_u"]["min"] > -1e-12 and values["concave"]["in_u"]["max"] > 0.01
    assert values["concave"]["in_u_and_w"]["min"] < -0.01 < 0.01 < values["concave"]["in_u_and_w"]["max"]
    conflicts = values["conflicts"]
    assert conflicts[late]["levels_known"] == "2 of 3"
    assert conflicts[late]["least_cosine_of_these_images"] == 0
    apart = -0.9 / np.hypot(0.9, 0.1)
    for kind in ("these_images", "all_images"):
        assert conflicts[early][f"least_cosine_of_{kind}"] == pytest.approx(apart, rel=1e-4)
    assert conflicts[early]["pairs_below_0_by_2_standard_errors"] == 100
    assert conflicts[late]["pairs_below_0_by_2_standard_errors"] == 0
    assert conflicts[early]["share_of_the_squared_length"] == pytest.approx(50)
    theorem = {row["gradients"]: row for row in values["theorem"]}
    least = 1 / (1 + 1 / 4 + 1 / 16)  # |u|^2; the mean squared length is 7
    assert theorem[late]["eq_2"] == pytest.approx(least / 2 / 7, rel=1e-4)
    assert values["weights_above_0"][late] == 3 and values["lowered_by_min_snr"][late] == 3
    assert values["eq_7"] == {"at_one_half": pytest.approx(0.375), "largest": pytest.approx(0.5)}


def test_the_cost_of_ugd_and_what_bounds_it_are_those_of_the_measurement(tmp_path, monkeypatch):
    """Gradients that cost a Min-SNR iteration a level, the steps as much again; curves 2 times apart."""
    lines = [
        {
            "network": "made up", "parameters": 3_000_000, "batch": 64, "steps": 250, "minsnr": 0.01,
            "levels": T, "gradients": 0.01 * T, "without_gram": 0.01 * T, "gram": 1e-6 * T**2,
            "gram_steps": 0.005, "exact": 0.001, "combine": 1e-9, "gradients_gib": 1.0,
        }
        for T in (10, 100)
    ]  # fmt: skip
    about = {key: lines[0][key] for key in ("network", "parameters", "batch", "steps", "minsnr")}
    lines.append({**about, "levels": 1000, "too_large": "11 GiB of gradients"})
    bench = tmp_path / "ugd.json"
    files.write_json(bench, {"device": "made-up GPU", "code": "0123456789abcdef", "lines": lines})
    source = runs.load_run("lab/imagenet64-x0-minsnr5")
    for name, weight, seconds in (
        ("imagenet64-ugd", presets.preset("lab/imagenet64-ugd").weight, 2.0),
        ("imagenet64-ugd-minsnr5", source.config.weight, 1.0),
    ):
        folder = tmp_path / "runs" / "lab" / name
        renamed = replace(source.config, name=f"lab/{name}", weight=weight)
        runs.write_record(folder, replace(source.record, config=renamed, weights={}, samples=None))
        for m in source.distances(source.config.sample):
            files.append_line(
                folder / "metrics.jsonl", {**m, "training_seconds": seconds * m["images"] / 1e4}
            )
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path / "runs"))
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "paper").mkdir()
    shutil.copy(provenance.ROOT / "notebooks" / "fig8_ugd_cost.ipynb", tmp_path / "notebooks")
    figures = tmp_path / "paper" / "figures.toml"
    parameters = f'measured = "{bench}"\nlevels = [2, 4]\nimages = 2\n'
    figures.write_text(
        '[fig8_ugd_cost]\nnotebook = "notebooks/fig8_ugd_cost.ipynb"\ntime_limit = 300\n'
        f"[fig8_ugd_cost.parameters]\n{parameters}"
    )
    render.render("fig8_ugd_cost", figures)
    values = json.loads((tmp_path / "paper" / "values" / "fig8_ugd_cost.json").read_text())["values"]
    (row,) = values["rows"]
    assert (row["levels"], row["too_large_not_timed"]) == (100, "1000 levels: 11 GiB of gradients")
    assert row["gradients_times"] == pytest.approx(100, rel=1e-4)
    assert row["ugd_without_gram_matrix_times"] == pytest.approx(200, rel=1e-4)
    assert row["ugd_gram_matrix_times"] == pytest.approx(100 + 1 + 0.5, rel=1e-4)
    exponents = [row[f"exponent_of_{part}"] for part in ("gradients", "gram_matrix", "250_steps_on_it")]
    assert exponents == pytest.approx([1, 2, 0], abs=1e-4)
    ugd, other = (values["training"][name] for name in ("imagenet64-ugd", "imagenet64-ugd-minsnr5"))
    assert ugd["training_seconds"][-1] == pytest.approx(2 * other["training_seconds"][-1])
    assert (tmp_path / "paper" / "figures" / "fig8_ugd_cost_training.png").is_file()
    assert values["paper"]["ugd_seconds"] / values["paper"]["minsnr_seconds"] == pytest.approx(990)


def test_parameters_of_table_1_follow_from_layers_and_widths():
    """Counted by hand: key, query and value of which the key has no bias, MLPs of ratio 4, no last norm."""
    values = json.loads((COMMITTED / "values" / "table1_architectures.json").read_text())["values"]
    for name, printed in values["paper"]["vits"].items():
        model, data = presets.TABLE_1[name]
        d, patch = printed["width"], model.patch**2 * data.channels
        block = 12 * d * d + (2 + 1 + 5 + 4) * d  # weights; biases of query and value, projection, MLP, norms
        tokens = (data.resolution // model.patch) ** 2 + (2 if data.classes else 1)
        ends = patch * d + d + d * patch + patch  # in and out
        for time in (1000, 4000):
            for classes in {data.classes, 0}:
                rows = (
                    tokens
                    - (1 if data.classes and not classes else 0)
                    + time
                    + (classes + 1 if classes else 0)
                )
                key = f"{time} timesteps, {'classes' if classes else 'no classes'}"
                found = values["vits"][name]["counts"][key]
                assert found == printed["layers"] * block + ends + rows * d
                by_table = round(found / 1e6) == printed["millions"]
                assert by_table == (time == 4000 and not classes)  # what Table 1 counts


def test_notebooks_hold_no_outputs_functions_or_classes():
    for path in sorted((provenance.ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert any("parameters" in cell.metadata.get("tags", []) for cell in code), path.name
        for cell in code:
            assert not cell.outputs and cell.execution_count is None, path.name
            assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines()), (
                path.name
            )


def test_each_source_of_variation_is_as_large_as_in_the_records(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    monkeypatch.setenv("REPRO_RUNS", str(folder))
    for arm in presets.SEEDED:
        for suffix, luck in (("", 1.0), ("-seed1", 1.05), ("-seed2", 1 / 1.05)):
            made_up_arm(folder, arm, suffix, luck, 0.1)
    with pytest.raises(
        ReproError, match="nothing was measured twice with 50 samples: .* evaluate lab/imagenet64-x0"
    ):
        render.render("sec4_4_seeds", out=tmp_path / "paper", overrides={"samples": 50, "output": "other"})
    run = runs.load_run("lab/imagenet64-x0-constant")
    (*_, line) = run.distances(run.sample)
    of = {"of_reference": 0.03 * line["value"], "of_samples": 0.02 * line["value"], "groups": 20}
    files.append_line(run.path / "metrics.jsonl", {**line, "name": f"standard error of {line['name']}", **of})
    render.render("sec4_4_seeds", out=tmp_path / "paper")
    found = json.loads((tmp_path / "paper" / "values" / "sec4_4_seeds.json").read_text())["values"]
    assert sorted(found["training"]) == sorted(presets.SEEDED) and len(found["sampling"]) == 2
    spread = 0.8 * np.log(1.05)
    assert found["deviations"]["training"] == pytest.approx(spread, rel=1e-4)
    assert found["deviations"]["sampling"] == pytest.approx(BETWEEN_BLOCKS, rel=1e-4)
    low, high = found["intervals"]["training"]  # 4 arms of three seeds: 8 degrees of freedom
    assert stats.chi2.cdf(8 * (spread / np.array([low, high])) ** 2, 8) == pytest.approx(
        [0.975, 0.025], rel=1e-3
    )

    parts = np.array([BETWEEN_BLOCKS, spread, 0.03]) ** 2
    shares = [found["shares"][source] for source in ("sampling", "training", "reference")]
    assert shares == pytest.approx(parts / parts.sum(), rel=1e-3)
    assert found["jackknife_of_samples"] == pytest.approx(0.02, rel=1e-4)

    seed = folder / "lab" / "imagenet64-x0-constant-seed1"
    other = runs.read_record(seed / "run.json")
    runs.write_record(
        seed, replace(other, config=replace(other.config, train=replace(other.config.train, lr=0.5)))
    )
    with pytest.raises(ReproError, match="train.lr"):
        render.render("sec4_4_seeds", out=tmp_path / "paper")

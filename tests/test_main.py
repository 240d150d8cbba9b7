"""The command line: from images to a measured run, help for every command, and errors on one line."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repro import config, data, paper, pareto, runs, sample, weights
from repro import evaluate as evaluation
from repro.__main__ import main
from repro.files import ReproError
from repro.presets import PRESETS

PROJECT = Path(__file__).parents[1]
NAME = "lab/celeba64-unet"
TINY = """
    --model.channels 32 --model.multipliers 1 1 1 --model.blocks 1 --model.attention
    --model.head-channels None --model.heads 1 --data.holdout 3 --parameterization x0
    --train.images 16 --train.batch 4 --train.precision fp32 --train.no-compile --train.lr 0.01
    --train.warmup-images 0 --train.ema-halflife-images 1 --sample.sampler ancestral --sample.steps 2
    --evaluate.at --evaluate.samples 4 --device cpu
""".split()
"""A small network trained for four steps that are long enough for its images to differ."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with 12 images and the environment that keeps everything inside it."""
    home = tmp_path_factory.mktemp("home")
    (home / "images").mkdir()
    for i, blocks in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)):
        Image.fromarray(blocks).resize((64, 64), 0).save(home / "images" / f"{i:03}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in ("data", "runs", "reference"):
            patch.setenv(f"REPRO_{name.upper()}", str(home / name))
        yield home


@pytest.fixture(scope="module")
def trained(home):
    """The run that `prepare` and `train` make of the 12 images."""
    assert main(["prepare", "celeba64", "--source", str(home / "images"), "--workers", "1"]) == 0
    assert main(["train", NAME, "--out", str(home / "runs" / NAME), *TINY]) == 0
    return runs.load_run(NAME)


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """The same run in a folder of its own, to be changed."""
    shutil.copytree(trained.path, tmp_path / NAME)
    monkeypatch.setenv("REPRO_RUNS", str(tmp_path))
    return tmp_path / NAME


def run(*arguments):
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "repro", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def refused(capsys, *arguments) -> str:
    """The message of a command that ends with status 1; nothing but it is printed."""
    capsys.readouterr()
    assert main([*arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.endswith("\n")
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("error: ").rstrip("\n")


def images_in(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())}


# From images to a measured run ----------------------------------------------------------------------


def test_options_change_the_preset_and_are_recorded(trained):
    record = trained.record
    assert record.images == 16 and record.config.name == NAME and len(trained.log) > 0
    assert (record.data.name, record.data.count, record.data.held_out) == ("celeba64", 12, 3)
    model, preset = record.config.model, PRESETS[NAME]
    assert (model.channels, model.multipliers, model.attention, model.heads) == (32, (1, 1, 1), (), 1)
    assert record.config.evaluate.at == () and record.config.sample.steps == 2
    assert record.config.train.lr == 0.01 and record.config.weight == preset.weight
    assert record.config.train.grad_clip == preset.train.grad_clip


def test_the_same_seeds_give_the_images_of_the_record_in_a_process_of_its_own(trained, tmp_path):
    options = ["--seeds", "3", "6", "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "drawn")]
    done = run("sample", NAME, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"3 images in {tmp_path / 'drawn'}\n"
    drawn = images_in(tmp_path / "drawn")
    assert list(drawn) == ["3.png", "4.png", "5.png"]
    recorded = trained.samples()
    assert recorded.shape == (64, 64, 64, 3)
    for seed, image in zip(range(3, 6), drawn.values(), strict=True):
        # one grey level: another batch size may round another way
        assert np.abs(image.astype(int) - recorded[seed]).max() <= 1
    assert np.abs(recorded[3].astype(int) - recorded[4]).mean() > 5


def test_sample_takes_another_sampler_for_this_time_only(copied, tmp_path):
    before = (copied / "run.json").read_bytes()
    out = tmp_path / "drawn"
    options = ["--seeds", "0", "2", "--device", "cpu"]
    assert main(["sample", NAME, *options, "--out", str(out)]) == 0
    assert main(["sample", NAME, *options, "--out", str(out / "more"), "--sample.steps", "4"]) == 0
    few, more = np.asarray(Image.open(out / "0.png")), np.asarray(Image.open(out / "more" / "0.png"))
    assert np.abs(few.astype(int) - more).max() > 1
    assert (copied / "run.json").read_bytes() == before


def test_sample_record_draws_the_grid_anew_and_records_how(copied):
    old = runs.load_run(NAME)
    samples = dataclasses.replace(old.record.samples, rows=2, cols=3)
    runs.write_record(copied, dataclasses.replace(old.record, samples=samples))
    assert main(["sample", NAME, "--record", "--sample.steps", "3", "--device", "cpu"]) == 0
    new = runs.load_run(NAME)
    assert (old.record.samples.sample.steps, new.record.samples.sample.steps) == (2, 3)
    assert old.record.samples.sha256 != new.record.samples.sha256
    assert new.samples().shape == (6, 64, 64, 3)
    assert new.check_samples(2)["seeds"] == [0, 3]  # its hash, and that the weights draw these images
    assert new.record.weights == old.record.weights and new.record.config == old.record.config


def test_sample_records_rows_drawn_in_several_ways(copied, tmp_path, capsys):
    settings = tmp_path / "ways.json"
    settings.write_text('[{"steps": 3}, {"sampler": "ancestral", "steps": 4, "eta": 1}]')
    command = ["sample", NAME, "--seeds", "5", "8", "--settings", str(settings), "--device", "cpu"]
    before = runs.load_run(NAME).record
    assert main(command) == 1
    assert "add --record" in capsys.readouterr().err
    (copied / "samples-0badf00d.png").write_bytes(b"of a record that was replaced")
    for _ in range(2):  # a second time in the place of the first
        assert main([*command, "--record"]) == 0
    out = capsys.readouterr().out
    run = runs.load_run(NAME)
    three, ancestral = run.record.further_samples
    assert dataclasses.replace(run.record, further_samples=()) == before
    assert (three.sample.steps, ancestral.sample.sampler, ancestral.first_seed) == (3, "ancestral", 5)
    assert {path.name for path in copied.glob("samples-*.png")} == {three.file, ancestral.file}
    assert three.file != ancestral.file and f"{ancestral.file}: steps 4, sampler ancestral" in out
    for way in (three, ancestral):
        assert run.samples(way.sample).shape == (3, 64, 64, 3)
        np.testing.assert_array_equal(run.samples(way.sample), run.draw(range(5, 8), way.sample))
        assert run.check_samples(2, how=way.sample)["seeds"] == [5, 6]
    assert len(run.samples()) == before.samples.rows * before.samples.cols

    (copied / three.file).write_bytes((copied / ancestral.file).read_bytes())
    with pytest.raises(ReproError, match=f"{three.file} is missing or not the file that was recorded"):
        run.samples(three.sample)
    with pytest.raises(ReproError, match=f"without samples drawn by {three.sample.sampler} with 9 steps"):
        run.samples(dataclasses.replace(three.sample, steps=9))
    # a row that its weights do not draw is found out
    false = dataclasses.replace(three, sha256=ancestral.sha256)
    runs.write_record(copied, dataclasses.replace(run.record, further_samples=(false, ancestral)))
    with pytest.raises(ReproError, match="are not what its weights draw"):
        runs.load_run(NAME).check_samples(1, how=three.sample)


def test_evaluate_prints_and_records_unless_told_not_to(copied, home, capsys):
    options = ["--evaluate.samples", "4", "--precision", "fp32", "--device", "cpu", "--batch", "3"]
    capsys.readouterr()
    assert main(["evaluate", NAME, *options, "--no-record"]) == 0
    said = r"FD \(EfficientNet-Lite0\): (\d+\.\d{4}), 4 samples from seed 1000000"
    (only,) = re.findall(said, capsys.readouterr().out)
    assert not (copied / "metrics.jsonl").exists()
    assert len(list((home / "reference").glob("celeba64-*-efficientnet_lite0.npz"))) == 1

    assert main(["evaluate", NAME, *options, "--neighbours"]) == 0
    out = capsys.readouterr().out
    assert re.findall(said, out) == [only] and "nearest training image: " in out
    distance, nearest = runs.load_run(NAME).metrics
    assert distance["value"] == pytest.approx(float(only), abs=1e-4)
    assert "FD (EfficientNet-Lite0)" in paper.describe_metric(distance, run=NAME)
    assert (distance["samples"], distance["steps"], distance["images"]) == (4, 2, 16)
    assert nearest["held_out"] == 3
    assert runs.load_run(NAME).distances(runs.load_run(NAME).config.sample) == [distance]


def test_gradients_are_measured_by_noise_level(copied, home, capsys):
    options = ["--levels", "3", "--images", "8", "--batch", "2", "--groups", "4", "--device", "cpu"]
    assert main(["gradients", NAME, *options, "--no-record"]) == 0
    assert not (copied / "metrics.jsonl").exists()
    assert main(["gradients", NAME, *options, "--chunk", "2"]) == 0
    said = re.findall(r"the least cosine of any two of 3 is (.*)", capsys.readouterr().out)
    run = runs.load_run(NAME)
    (line,) = run.metrics
    assert (line["images"], line["count"], line["groups"], len(line["gram"])) == (16, 8, 4, 3)

    # by hand: the means over 2 of the 8 images, each with its own noise, by a plain loop over levels
    D, real = run.denoiser(), data.load("celeba64")
    train, _ = data.holdout_split(12, 3)
    rows = train[np.arange(8) * 9 // 8]
    y = sample.from_uint8(torch.from_numpy(real.images[rows]))
    noise = sample.SeedNoise([pareto.NOISE_SEED + int(i) for i in rows], (3, 64, 64))()
    weight = weights.from_config(config.Weight("constant"), D.parameterization)
    g = {group: [] for group in range(4)}
    for group, sigma in itertools.product(g, line["sigmas"]):
        D.requires_grad_(True).zero_grad()
        sigmas = torch.full((2,), sigma, dtype=torch.float64)
        D.loss(y[group::4], noise[group::4], sigmas, None, weight).mean().backward()
        g[group].append(torch.cat([p.grad.flatten() for p in D.parameters()]).double())
    g = [torch.stack(rows) for rows in g.values()]
    whole = sum(g) / 4
    pairs = [g[a] @ g[b].T for a, b in itertools.permutations(range(4), 2)]
    expected = {"gram": whole @ whole.T, "between": sum(pairs) / 12}
    for name, inner in expected.items():
        np.testing.assert_allclose(line[name], inner, rtol=1e-3, atol=1e-5 * float(expected["gram"].max()))
    least = "not known from so few images"
    if line["value"] is not None:
        least = f"{line['value']:.4f}, standard error {line['value_error']:.4f}"
    assert said == [least] * 2
    # a weight multiplies rows and columns: SNR on x0, where the network predicts x0
    snr = torch.tensor(line["sigmas"], dtype=torch.float64) ** -2
    weighted = pareto.of_weight(line, lambda snr: snr, D.parameterization)
    for name in ("gram", "between", "between_errors"):
        expected = snr.outer(snr).numpy() * np.array(line[name])
        np.testing.assert_allclose(weighted[name], expected, rtol=1e-6)

    for unfit in ("--images 6", "--levels 0", "--images 0", "--batch 0", "--groups 2"):
        assert main(["gradients", NAME, *options, *unfit.split()]) == 1
        assert "cannot be taken: give at least 1 level, 3 groups or more" in capsys.readouterr().err
    assert main(["gradients", NAME, *options, "--images", "16"]) == 1
    assert "16 images were asked for, but celeba64 has 9 to train on" in capsys.readouterr().err


def test_evaluate_measures_standard_errors(copied, home, capsys, monkeypatch):
    options = ["--evaluate.samples", "5", "--precision", "fp32", "--device", "cpu", "--standard-errors"]
    assert main(["evaluate", NAME, *options]) == 1
    assert "5 images in 20 groups are too few; take more samples" in capsys.readouterr().err
    assert not (copied / "metrics.jsonl").exists()
    monkeypatch.setattr(evaluation, "GROUPS", 2)
    monkeypatch.setattr(evaluation, "standard_error", lambda features, *_: float(len(features)))
    assert main(["evaluate", NAME, *options]) == 0
    assert "standard error of FD (EfficientNet-Lite0): " in capsys.readouterr().out
    run = runs.load_run(NAME)
    line = run.standard_errors(run.sample, 5)
    assert (line["of_samples"], line["of_reference"]) == (5, run.record.data.count)


def test_evaluate_measures_precision_and_recall(copied, home, capsys):
    options = ["--evaluate.samples", "5", "--precision", "fp32", "--device", "cpu", "--precision-recall"]
    assert main(["evaluate", NAME, *options]) == 0
    out = capsys.readouterr().out
    distance, precision, recall = runs.load_run(NAME).metrics
    assert (precision["name"], recall["name"]) == (
        "precision (EfficientNet-Lite0, k = 3)", "recall (EfficientNet-Lite0, k = 3)",
    )  # fmt: skip
    for line in (precision, recall):
        said = f"{line['name']}: {line['value']:.4f}, 4 samples from seed 1000000"
        assert said in out and 0 <= line["value"] <= 1 and 0 <= line["real_halves"] <= 1
        assert (line["samples"], line["real"], line["k"], line["images"]) == (4, 4, 3, 16)  # 9 // 2 of each
        assert line["sample"] == distance["sample"] and line["features"] == "efficientnet_lite0"
    assert runs.load_run(NAME).distances(runs.load_run(NAME).config.sample) == []  # of 10,000 there are none
    assert main(["evaluate", NAME, *options[2:], "--evaluate.samples", "3"]) == 1
    message = (
        "error: precision and recall with k = 3 need at least 4 samples and 8 training images; there are"
    )
    assert f"{message} 3 and 9" in capsys.readouterr().err


def test_evaluate_measures_blocks_of_seeds_and_each_of_the_runs_samplers(copied, home, capsys):
    options = ["--evaluate.samples", "4", "--precision", "fp32", "--device", "cpu", "--blocks", "2"]
    record = json.loads((copied / "run.json").read_text())
    record["config"]["evaluate"]["also"] = [{**record["config"]["sample"], "steps": 3}]
    (copied / "run.json").write_text(json.dumps(record))
    assert main(["evaluate", NAME, *options]) == 0
    found = runs.load_run(NAME).metrics
    assert [(line["steps"], line["first_seed"]) for line in found] == [
        (2, 1_000_000), (2, 1_000_004), (3, 1_000_000), (3, 1_000_004)
    ]  # fmt: skip
    assert len({line["value"] for line in found}) == 4

    assert main(["evaluate", NAME, *options, "--sample.steps", "4", "--evaluate.first-seed", "7"]) == 0
    assert [(line["steps"], line["first_seed"]) for line in runs.load_run(NAME).metrics[4:]] == [
        (4, 7), (4, 11)
    ]  # fmt: skip
    assert "--blocks 0 measures nothing" in refused(capsys, "evaluate", NAME, "--blocks", "0")


def test_evaluate_measures_a_further_average_of_the_weights(home, trained, capsys, monkeypatch):
    out = home / "two" / NAME
    assert main(["train", NAME, "--out", str(out), *TINY, "--train.also-ema-halflife-images", "40"]) == 0
    monkeypatch.setenv("REPRO_RUNS", str(home / "two"))
    recorded = runs.load_run(NAME)
    assert sorted(recorded.record.weights) == [
        "weights-00001-of-00001.safetensors", "weights-ema40-00001-of-00001.safetensors",
    ]  # fmt: skip
    options = ["--evaluate.samples", "4", "--precision", "fp32", "--device", "cpu"]
    assert main(["evaluate", NAME, *options]) == main(["evaluate", NAME, *options, "--ema", "40"]) == 0
    assert main(["evaluate", NAME, *options, "--ema", "1"]) == 0  # the main one, by its half-life
    main_line, further, again = runs.load_run(NAME).metrics
    assert further["ema_halflife_images"] == 40 and "ema_halflife_images" not in main_line | again
    assert main_line["value"] == again["value"] != further["value"]
    message = refused(capsys, "evaluate", NAME, *options, "--ema", "7")
    assert "keeps no average with a half-life of 7 images; it keeps those of 1, 40" in message


@pytest.mark.parametrize(
    "name, options, wanted",
    [
        ("edm", ["--min-snr-factor", "20"], (20.0, None, (320_000.0,))),
        ("edm-minsnr", ["--min-snr-factor", "None"], (None, None, (320_000.0,))),
        ("edm-minsnr", ["--train.micro-batch", "64"], (5.0, 64, (320_000.0,))),
        ("edm", ["--train.also-ema-halflife-images", "1e3", "2e3"], (None, None, (1e3, 2e3))),
        ("edm", ["--train.also-ema-halflife-images"], (None, None, ())),
    ],
)
def test_options_that_may_be_none_or_several(monkeypatch, name, options, wanted):
    seen = []
    monkeypatch.setattr("repro.train.train", lambda run, *_, **__: seen.append(run))
    assert main(["train", f"lab/imagenet64-{name}", *options]) == 0
    (run,) = seen
    assert (run.min_snr_factor, run.train.micro_batch, run.train.also_ema_halflife_images) == wanted


def test_a_run_in_a_folder_of_its_own_says_after_which_preset_unless_it_has_a_note(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("repro.train.train", lambda run, *_, **__: seen.append((run.name, run.note)))
    command = ["train", NAME, "--out", str(tmp_path / "mine")]
    for options in ([], ["--no-record-weights"], ["--note", "A rate that was tried."]):
        assert main([*command, *options]) == 0
    after = f"After the preset {NAME}."
    assert seen == [
        ("lab/mine", after),
        ("lab/mine", f"{after} Its weights are not recorded."),
        ("lab/mine", "A rate that was tried."),
    ]


# Help -----------------------------------------------------------------------------------------------


def helped(capsys, *arguments) -> str:
    """What a command prints when it ends well, by returning or by exiting."""
    capsys.readouterr()
    try:
        status = main([*arguments])
    except SystemExit as end:
        status = end.code
    assert status == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        text = helped(capsys, *arguments)
        for command in (
            "prepare",
            "train",
            "sample",
            "evaluate",
            "render",
            "claims",
            "trace",
            "verify",
            "cards",
            "report",
        ):
            assert f"• {command} " in text


HELP = {
    "prepare": ("--source DIR_OR_TAR", "--on-corrupt {error,skip}", "{celeba64,imagenet64,imagenet256}"),
    "train": ("train PRESET [options]", "train PRESET --help", ", ".join(PRESETS)),
    "sample": ("sample RUN [options]", "--seeds 0 64"),
    "evaluate": ("evaluate RUN [options]", "--evaluate.samples 10000"),
    "render": ("NAME=VALUE", "--force", "--list"),
    "trace": ("FILE", "Status 0 where all matches"),
    "cards": ("a model card for each recorded run", "--check"),
    "report": ("--out FILE", "paper/report.pdf"),
    "archive": ("Pack code, records and outputs", "--check"),
    "site": ("need no server", "--out DIR"),
    "claims": ("--values DIR", "--json", "is no error"),
    "presets": ("List the runs that can be trained", "--profile"),
}


@pytest.mark.parametrize("command", HELP)
def test_help_of_every_command(capsys, command):
    text = helped(capsys, command, "--help")
    assert f"python -m repro {command}" in text
    for part in HELP[command]:
        assert part in text


def test_help_of_a_preset_and_of_a_run_has_their_own_defaults(capsys, trained):
    def default(text, option):
        return re.search(rf"{option} .*?\(default: ([^)]*)\)", re.sub(r"[\s│]+", " ", text))[1]

    text = helped(capsys, "train", NAME, "--help")
    assert default(text, "--train.lr FLOAT") == str(PRESETS[NAME].train.lr)
    assert default(text, "--model.multipliers") == " ".join(map(str, PRESETS[NAME].model.multipliers))
    paper_text = helped(capsys, "train", "paper/celeba64-unet", "--help")
    assert default(paper_text, "--train.lr FLOAT") == str(PRESETS["paper/celeba64-unet"].train.lr)
    assert PRESETS["paper/celeba64-unet"].train.lr != PRESETS[NAME].train.lr
    for command in ("sample", "evaluate"):
        assert default(helped(capsys, command, NAME, "--help"), "--sample.steps INT") == "2"


def test_presets_lists_all(capsys):
    text = helped(capsys, "presets")
    assert [line for line in text.splitlines() if not line.startswith(" ")] == list(PRESETS)
    assert all(preset.note in text for preset in PRESETS.values())
    assert "celeba64, unet, eps, min_snr 5, 12M images" in text
    assert "imagenet64-subset, vit, x0, truncated_snr, 2M images" in text
    assert "imagenet64-subset, unet, edm, edm times min(SNR, 5)/SNR, 4M images" in text
    assert "imagenet64, classifier, 76.8M images" in text  # which has no target and no loss weight


def test_render_does_not_draw_other_parameters_over_a_committed_output(capsys, monkeypatch):
    monkeypatch.delenv("REPRO_PAPER_OUT", raising=False)
    assert main(["render", "fig9_celeba64_unet", "-p", "rows=1"]) == 1
    assert "add output=mine" in capsys.readouterr().err


def test_another_python_without_our_packages_says_which_to_take():
    script = "import runpy, sys; sys.modules['tyro'] = None; runpy.run_module('repro', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1 and "run make env, then .venv/bin/python -m repro" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_render_lists_the_outputs(capsys):
    assert "fig9_celeba64_unet" in helped(capsys, "render", "--list").split()


# Errors ---------------------------------------------------------------------------------------------


def test_an_unknown_preset_is_one_line_in_a_process_of_its_own(home):
    done = run("train", "lab/celeba64-unte")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: there is no preset 'lab/celeba64-unte'. Near ones: lab/celeba64-unet, paper/celeba64-unet, "
        "paper/celeba64-vit. All: python -m repro presets\n"
    )


def test_a_pattern_that_fits_no_preset_is_named(capsys):
    message = refused(capsys, "train-all", "lab/imagenet64-x0-*", "lab/celeba46-*")
    assert "no preset 'lab/celeba46-*'" in message


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_an_unknown_run_lists_the_near_ones(capsys, trained, command):
    message = refused(capsys, command, "lab/celeba-unet")
    assert message.startswith(f"there is no recorded run lab/celeba-unet in {trained.path.parents[1]}. ")
    assert f"Near names: {NAME}. To make it: python -m repro train lab/celeba-unet" in message
    assert "there is no recorded run  in" in refused(capsys, command, "")


def test_a_data_set_that_is_not_prepared_names_the_command(capsys, home, tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_DATA", str(home / "data"))  # so that it is put back: --data-root sets it
    out = ["--out", str(tmp_path / "out")]
    message = refused(capsys, "train", NAME, *out, "--data-root", str(tmp_path), *TINY)
    assert f"'celeba64' is not prepared in {tmp_path} (there: none)" in message
    assert "Run: python -m repro prepare celeba64 --source FOLDER_OR_TAR\nor set REPRO_DATA" in message
    assert not (tmp_path / "out").exists()


def exits(capsys, *arguments) -> str:
    """What a command that is misspelt prints; its status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return re.sub(r"[\s│]+", " ", printed.err)


def test_a_misspelt_option_names_the_near_ones(capsys, trained):
    text = exits(capsys, "train", NAME, "--train.learning-rate", "1")
    assert "Unrecognized options: --train.learning-rate" in text
    text = exits(capsys, "train", NAME, "--train.imags", "1")
    assert "Perhaps you meant: --train.images INT" in text
    assert "Perhaps you meant: --neighbours" in exits(capsys, "evaluate", NAME, "--neighbors")
    assert "Unrecognized options: trian" in exits(capsys, "trian", NAME)
    commands = (
        "prepare, train, sample, evaluate, train-all, measure, gradients, encode, import, render, claims"
    )
    assert f"{commands}, trace, verify, cards, report, archive, site, presets" in exits(capsys, "trian", NAME)


def test_bad_values_are_named(capsys):
    assert "must be positive" in exits(capsys, "train", NAME, "--train.images", "-5")
    assert "--train.lr" in exits(capsys, "train", NAME, "--train.lr", "fast")
    assert "cosine_vp" in exits(capsys, "train", NAME, "--schedule.name", "cosine")
    assert "invalid choice 'celeba'" in exits(capsys, "prepare", "celeba", "--source", ".")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", NAME, "--seeds", "5", "5"], "--seeds 5 5 is no range"),
        (["sample", NAME, "--seeds", "-1", "3"], "--seeds -1 3 is no range"),
        (["sample", NAME, "--seeds", "0", str(2**31 + 1)], "is no range: give the first seed, at least 0"),
        (["sample", NAME, "--batch", "0"], "--batch 0: give at least 1 image at a time"),
        (["evaluate", NAME, "--batch", "-2"], "--batch -2: give at least 1 image at a time"),
        (["sample", NAME, "--device", "cuda"], "the device cuda was asked for, but torch sees no GPU"),
        (["sample", NAME, "--precision", "fp8"], "fp8 is for drawing with ViTs alone (model.kind vit)"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_drawn(
    capsys, trained, monkeypatch, arguments, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in refused(capsys, *arguments)
    assert not (Path.cwd() / "samples").exists()


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_a_command_without_its_name_does_nothing_and_says_so(capsys, command):
    for arguments in ([], ["--device", "cpu"], ["--device", "cpu", NAME]):
        assert main([command, *arguments]) == 2
        assert f"usage: python -m repro {command} " in capsys.readouterr().out


def test_evaluate_without_data_or_reference_names_the_command(capsys, copied, tmp_path, monkeypatch):
    for name in ("DATA", "REFERENCE"):
        monkeypatch.setenv(f"REPRO_{name}", str(tmp_path / "nothing"))
    assert main(["evaluate", NAME, "--evaluate.samples", "2", "--device", "cpu"]) == 1
    assert "Run: python -m repro prepare celeba64" in capsys.readouterr().err
    assert not (copied / "metrics.jsonl").exists()


def test_damaged_weights_are_named(capsys, copied):
    (path,) = copied.glob("weights-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"{path} is damaged" in refused(capsys, "sample", NAME, "--device", "cpu")
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**record, "sed": 1}))
    assert "run.json does not fit this version of the package: sed: " in refused(capsys, "sample", NAME)


def test_an_interrupt_ends_with_status_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("repro.__main__.preset", interrupted)
    assert main(["train", NAME]) == 130
    assert capsys.readouterr().err == "stopped\n"

"""Figures, tables and values: deterministic bytes, and the way back to what they were made from."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
from PIL import Image

from repro import files, paper, presets, provenance
from repro.config import Sample, Weight, sample_json
from repro.files import ReproError


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Outputs go to a scratch folder, and no file has been used yet."""
    monkeypatch.setenv("REPRO_PAPER_OUT", str(tmp_path / "out"))
    monkeypatch.delenv("REPRO_RENDER", raising=False)
    provenance.forget()
    yield tmp_path
    provenance.forget()
    plt.close("all")


@pytest.fixture
def recorded_run(tmp_path):
    """A run folder whose run.json and log were read."""
    folder = tmp_path / "runs" / "lab" / "faces"
    files.write_json(folder / "run.json", {"weights": {"weights-00001-of-00001.safetensors": "ab" * 32}})
    provenance.used(folder / "run.json")
    return folder


def draw():
    paper.style()
    fig, ax = plt.subplots(figsize=paper.figure_size("column"))
    ax.plot([0, 1, 2], [3, 1, 2], label=r"$\gamma = 5$")
    ax.set_xlabel("images seen (M)")
    ax.legend()
    return fig


def test_saving_twice_gives_the_same_bytes(scratch):
    first = [path.read_bytes() for path in paper.save_figure(draw(), "curve")]
    assert [path.read_bytes() for path in paper.save_figure(draw(), "curve")] == first
    assert b"CreationDate" not in first[1]


def test_another_process_gives_the_same_bytes(scratch):
    code = (
        "import matplotlib.pyplot as plt\nfrom repro import paper\npaper.style()\n"
        "plt.plot([0, 1, 2], [3, 1, 2], label='γ = 5')\nplt.legend()\npaper.save_figure(plt.gcf(), 'curve')"
    )
    saved = []
    for seed in "12":  # of Python's hashes, which order sets and name subset fonts
        out = scratch / seed
        environment = os.environ | {"PYTHONHASHSEED": seed, "REPRO_PAPER_OUT": str(out), "MPLBACKEND": "agg"}
        environment["PYTHONPATH"] = str(provenance.ROOT)
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=scratch)
        saved.append([(out / "figures" / f"curve{suffix}").read_bytes() for suffix in (".png", ".pdf")])
    assert saved[0] == saved[1]


def test_provenance_comes_back_from_every_kind_of_file(scratch, recorded_run):
    log = scratch / "odd (name) \\ é.jsonl"  # everything that PDF or JSON text must escape
    log.write_text("{}\n")
    provenance.used(log)
    frame = pandas.DataFrame({"FD": [1.5]})
    paths = [
        *paper.save_figure(draw(), "all"),
        *paper.save_table("all", frame, "A caption"),
        paper.save_values("all", {"x": 1}),
    ]
    expected = paper.stamp("all")
    assert expected["files"][provenance.relative(log)] == files.sha256(log)
    assert expected["runs"] == {"lab/faces": {"weights-00001-of-00001.safetensors": "ab" * 32}}
    for path in paths:
        if path.suffix != ".csv":
            assert paper.read_provenance(path) == expected, path.suffix


def test_provenance_says_which_library_code_was_in_use(scratch):
    # at least what this file imports, through to the modules those import
    assert {"repro.paper", "repro.files", "repro.provenance"} <= provenance.modules_of("import repro.paper")
    assert len(paper.stamp("x")["code"]) == 16
    assert paper.stamp("x")["parameters"] is None


def test_a_file_without_provenance_is_refused(scratch):
    Image.new("RGB", (4, 4)).save(scratch / "plain.png")
    with pytest.raises(ReproError, match="plain.png carries no provenance"):
        paper.read_provenance(scratch / "plain.png")


def test_figures_have_the_printed_size_and_embedded_truetype(scratch):
    png, pdf = paper.save_figure(draw(), "size")
    with Image.open(png) as image:
        assert image.size == (990, 673)  # 3.3 in wide at 300 dpi, 0.68 times as high
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert b"/Subtype /CIDFontType2" in pdf.read_bytes() or b"/Subtype /TrueType" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()


def test_style_does_not_depend_on_what_was_set_before(scratch):
    with matplotlib.rc_context():
        plt.rcParams["font.size"] = 30
        plt.rcParams["savefig.bbox"] = "tight"
        paper.style()
        assert plt.rcParams["font.size"] == 8
        assert plt.rcParams["savefig.bbox"] is None


def test_unknown_width_names_the_known_ones():
    with pytest.raises(ReproError, match="column, page"):
        paper.figure_size("colunm")


@pytest.mark.parametrize("id", ["../escape", "", "a b", ".hidden"])
def test_an_id_is_a_plain_name(id):
    with pytest.raises(ReproError, match="cannot be the id of an output"):
        paper.save_values(id, {})


def test_values_are_rounded_sorted_and_plain(scratch):
    path = paper.save_values(
        "v",
        {
            "b": np.float32(1 / 3),
            "a": {"array": np.array([1.23456789e-7, -0.0]), "count": np.int64(17_469)},
            "c": (True, None, "text"),
        },
    )
    text = path.read_text()
    assert json.loads(text)["values"] == {
        "a": {"array": [1.23457e-07, 0.0], "count": 17469},
        "b": 0.333333,
        "c": [True, None, "text"],
    }
    assert "-0.0" not in text
    assert text.index('"a"') < text.index('"b"')


@pytest.mark.parametrize(
    "values, message",
    [
        ({"fd": {"lab": [1.0, float("nan")]}}, r"cannot save fd\.lab\[1\]: it is nan"),
        ({"fd": np.array([np.inf])}, r"cannot save fd\[0\]: it is inf"),
        ({"when": object()}, "cannot save when: object is not"),
        ({"by": {3: 1.0}}, "cannot save by: the key 3 is not text"),
    ],
)
def test_values_that_are_no_values_are_named(scratch, values, message):
    with pytest.raises(ReproError, match=message):
        paper.save_values("bad", values)
    assert not (scratch / "out" / "values" / "bad.json").exists()


def test_the_csv_rounds_numbers_of_a_column_with_text_too(scratch):
    """Else digits that are rounding, and so another processor's, would be kept."""
    frame = pandas.DataFrame({"at least": [0.99999999999999, None, "unbounded", 3]}, dtype=object)
    csv, _, _ = paper.save_table("t", frame, "Least.")
    assert csv.read_text() == 'at least\n1\n""\nunbounded\n3\n'


def test_tables_in_three_formats(scratch):
    frame = pandas.DataFrame(
        {"run_name": ["a|b", "50% & up"], "FD": [7.123456789, None], "paper FID": [1.6, 2.28]},
        index=pandas.Index([1, 2], name="#"),
    )
    csv, md, tex = paper.save_table("t", frame, "Lab's 5% of $γ_5$", formats={"FD": ".2f"})
    assert csv.read_text() == "#,run_name,FD,paper FID\n1,a|b,7.12346,1.6\n2,50% & up,,2.28\n"
    assert md.read_text().splitlines()[2:] == [
        "Lab's 5% of $γ_5$",
        "",
        "| # | run_name | FD | paper FID |",
        "| --: | :-- | --: | --: |",
        r"| 1 | a\|b | 7.12 | 1.6 |",
        "| 2 | 50% & up | – | 2.28 |",
    ]
    text = tex.read_text()
    assert r"\caption{Lab's 5\% of \$γ\_5\$}" in text
    assert r"\# & run\_name & FD & paper FID \\" in text
    assert r"2 & 50\% \& up & – & 2.28 \\" in text
    assert r"\toprule" in text and r"\begin{tabular}{rlrr}" in text and r"\label{tab:t}" in text


def test_a_format_for_no_column_is_an_error():
    with pytest.raises(ReproError, match="no column fid; it has FD"):
        paper.save_table("t", pandas.DataFrame({"FD": [1.0]}), "", formats={"fid": ".2f"})


@pytest.mark.parametrize("channels_first", [False, True])
def test_image_grid_puts_each_image_in_its_place(channels_first):
    images = np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3), dtype=np.uint8)
    given = images.transpose(0, 3, 1, 2) if channels_first else images
    grid = paper.image_grid(given, rows=2, cols=3, pad=1)
    assert grid.shape == (2 * 5 + 1, 3 * 4 + 2, 3)
    for i in range(6):
        row, col = divmod(i, 3)
        np.testing.assert_array_equal(grid[row * 6 : row * 6 + 5, col * 5 : col * 5 + 4], images[i])
    assert (grid[5] == 255).all() and (grid[:, 4] == 255).all()


def test_names_lie_beneath_their_images():
    images = np.zeros((6, 40, 40, 3), np.uint8)
    grid = paper.image_grid(images, rows=2, cols=3, pad=2, below=20)
    assert grid.shape == (2 * 60 + 2, 3 * 42 - 2, 3)
    assert (grid[40:62] == 255).all() and (grid[102:] == 255).all() and (grid[62:102, 42:82] == 0).all()
    paper.style()
    fig = plt.figure(figsize=(3, 3), layout="none")
    ax = paper.show_image(fig.add_axes([0, 0, 1, 1]), grid)
    names = ["tench", "Old English sheepdog", "n0123456789012345", "a", "b", "c"]
    paper.name_images(ax, names, cols=3, side=40, below=20, size=6.0)
    assert [text.get_text() for text in ax.texts] == [
        "tench", "Old English\nsheepdog", "n0123456789012345", "a", "b", "c"
    ]  # fmt: skip
    fig.canvas.draw()
    for i in (0, 1, 4):
        box = ax.texts[i].get_window_extent().transformed(ax.transData.inverted())
        left, top = i % 3 * 42, i // 3 * 62
        assert left <= box.x0 < box.x1 <= left + 40  # in the image's column, and beneath it
        assert top + 39.5 <= min(box.y0, box.y1) and max(box.y0, box.y1) <= top + 62
    plt.close(fig)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((3, 8, 8, 3), np.uint8), "2 rows of 2 need 4 images; there are 3"),
        (np.zeros((4, 8, 8, 3), np.float32), "needs uint8 images .* not float32"),
        (np.zeros((4, 8, 8), np.uint8), r"not uint8 \[4, 8, 8\]"),
    ],
)
def test_image_grid_refuses_what_is_no_grid(images, message):
    with pytest.raises(ReproError, match=message):
        paper.image_grid(images, 2, 2)


def test_the_pdf_holds_the_pixels_of_a_grid(scratch):
    paper.style()
    fig, ax = plt.subplots(figsize=(2, 2))
    paper.show_image(ax, np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8))
    _, pdf = paper.save_figure(fig, "pixels")
    assert b"/Width 50" in pdf.read_bytes()  # not resampled to the dpi of the figure


def test_a_metric_says_what_it_measures():
    metric = {
        "name": "FD (EfficientNet-Lite0)",
        "value": 7.4142,
        "images": 6_000_000,
        "protocol": "lab",
        "features": "efficientnet_lite0",
        "samples": 10_000,
        "first_seed": 1_000_000,
        "sampler": "heun",
        "steps": 18,
        "evaluations": 35,
        "guidance": 1.0,
        "reference": {"name": "celeba64", "count": 17_469, "fingerprint": "0123456789abcdef"},
    }
    assert paper.describe_metric(metric, run="lab/celeba64-unet") == (
        "lab/celeba64-unet: FD (EfficientNet-Lite0) 7.41 after 6M images; protocol lab, features "
        "efficientnet_lite0, against 17,469 images of celeba64 (fingerprint 01234567); 10,000 samples, seeds "
        "1000000 to 1009999, heun, 18 steps, 35 network evaluations, no guidance"
    )
    assert paper.describe_metric(metric | {"guidance": 1.5}).endswith("guidance 1.5")
    del metric["features"]
    with pytest.raises(ReproError, match="the metric lacks features"):
        paper.describe_metric(metric)


@pytest.mark.parametrize(
    "sample, text",
    [
        (Sample(sigma_max=40.0), "Heun, 18 steps from σ = 40"),
        (Sample(sampler="ancestral"), "DDIM, 18 steps from σ = 80"),
        (Sample(sampler="ancestral", eta=0.5), "ancestral (η = 0.5), 18 steps from σ = 80"),
        (Sample(sampler="dpm_solver", multistep=True), "DPM-Solver++(2M), 18 steps from σ = 80"),
        (Sample(sampler="euler_maruyama", steps=1000), "Euler–Maruyama, 1000 steps from σ = 80"),
        (
            Sample(sampler="ancestral", eta=1.0, steps=250, grid="uniform", guidance=1.5, clip=True),
            "ancestral, 250 uniform timesteps, clipped, guidance 1.5",
        ),
        (
            Sample(sampler="ancestral", eta=1.0, steps=50, grid="uniform", grid_sections=(40, 10)),
            "ancestral, 40 + 10 uniform timesteps",
        ),
        (
            Sample(low_noise="lab/other", low_noise_below=0.45),
            "Heun, 18 steps from σ = 80, below σ = 0.45 by lab/other",
        ),
    ],
)
def test_a_sampler_in_a_few_words(sample, text):
    assert paper.describe_sampler(sample_json(sample)) == text
    assert paper.describe_sampler(asdict(sample)) == text


@pytest.mark.parametrize(
    "name, changes, text",
    [
        ("lab/imagenet64-x0-minsnr5", {}, "x₀, Min-SNR-5"),
        ("lab/imagenet64-eps-constant", {}, "ε, constant"),
        ("lab/imagenet64-eps-p2", {}, "ε, P2"),
        ("lab/imagenet64-x0-truncated", {"parameterization": "v"}, "v, truncated SNR"),
        ("lab/imagenet64-eps-constant", {"weight": Weight("soft_min_snr", gamma=2.5)}, "ε, soft Min-SNR-2.5"),
        ("lab/imagenet64-eps-constant", {"weight": Weight("min_snr")}, "ε, Min-SNR-5"),
        ("lab/imagenet64-edm-minsnr20", {}, "EDM, EDM × Min-SNR-20"),
        ("lab/imagenet64-classifier", {}, "classifier"),
    ],
)
def test_a_training_in_a_few_words(name, changes, text):
    assert paper.describe_training(replace(presets.preset(name), **changes)) == text


@pytest.mark.parametrize(
    "sample, family",
    [
        (Sample(steps=5, sigma_max=40.0, guidance=1.5), "Heun"),
        (Sample(sampler="ancestral", steps=250, grid="uniform", clip=True), "DDIM, uniform"),
        (
            Sample(sampler="ancestral", eta=1.0, steps=50, grid="uniform", grid_sections=(40, 10)),
            "ancestral, 2 stages",
        ),
        (Sample(sampler="dpm_solver", order=3), "DPM-Solver-3"),
        (Sample(sampler="dpm_solver", order=3, multistep=True), "DPM-Solver++(3M)"),
        (
            Sample(steps=20, guidance=2.1, guidance_interval=(0.0, 3.07)),
            "Heun, guidance 2.1 where 0 ≤ σ ≤ 3.07",
        ),
    ],
)
def test_the_family_of_a_sampler(sample, family):
    assert paper.sampler_family(sample_json(sample)) == family


def test_a_sampler_of_an_older_record_in_a_few_words():
    old = {"sampler": "heun", "steps": 18, "sigma_max": 40.0, "eta": 0.0, "guidance": 1.0}
    assert paper.describe_sampler(old) == "Heun, 18 steps from σ = 40"


def test_a_band_is_drawn_where_seeds_differ():
    fig, ax = plt.subplots()
    images, middle = np.array([1e6, 2e6]), np.array([30.0, 10.0])
    line = paper.draw_band(ax, images, middle, middle, middle, "--", "red", 2.0, "one seed")
    assert not ax.collections
    np.testing.assert_array_equal(line.get_xydata(), [[1, 30], [2, 10]])
    assert (line.get_linestyle(), line.get_color(), line.get_label()) == ("--", "red", "one seed")
    paper.draw_band(ax, images, middle, middle / 2, middle * 2, "-", "blue", 2.0, "seeds")
    (band,) = ax.collections
    edges = band.get_paths()[0].get_extents()
    assert (edges.ymin, edges.ymax) == (5, 60) and ax.get_yscale() == "log"
    plt.close(fig)


def test_bands_are_named_in_a_legend_where_there_are_some():
    images, middle = np.array([1e6, 2e6]), np.array([20.0, 10.0])
    _, axes = plt.subplots(1, 2)
    for ax in axes:
        paper.draw_band(ax, images, middle, middle, middle, "-", "red", 2.0, "one seed")
    assert paper.named_band(axes, "range") == {}
    paper.draw_band(axes[1], images, middle, middle / 2, middle * 2, "-", "red", 2.0, "seeds")
    (entry,) = paper.named_band(axes, "range").values()
    assert list(paper.named_band(axes, "range")) == ["range"]
    (band,) = axes[1].collections
    assert entry.get_alpha() == band.get_alpha()  # as strong as what it names


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((0.17, 0.72), [0.2, 0.3, 0.4, 0.5, 0.7]),
        ((0.9, 11), [1, 2, 3, 5, 10]),
        ((140, 560), [150, 200, 300, 400, 500]),
        ((0.15, 8), [0.2, 0.3, 0.5, 1, 2, 3, 5]),
        ((1e-3, 1e3), [1e-3, 1e-2, 0.1, 1, 10, 100, 1000]),
        ((1, 1e9), [10.0**n for n in range(10)]),  # more than asked for, but no fewer are round
        ((5.1, 6.9), [5.5, 6, 6.5]),
        ((31, 49), [35, 40, 45]),
    ],
)
def test_logarithmic_ticks_are_round_and_few(limits, expected):
    _, ax = plt.subplots()
    ax.set(xscale="log", xlim=limits)
    paper.plain_log_ticks(ax.xaxis)
    assert ax.get_xticks() == pytest.approx(expected)
    assert ax.get_xlim() == pytest.approx(limits)
    assert len(ax.get_xticks(minor=True)) == 0
    assert ax.xaxis.get_major_formatter()(expected[0]) == f"{expected[0]:g}"


def test_speed_ups_run_from_far_to_near_with_a_band_where_there_is_an_interval():
    fig, ax = plt.subplots()
    numbers = np.array([[300, 200, 100], [1, 2, 3], [0.5, 1, 0], [1.5, 3, np.inf]])
    for _ in range(2):  # a second line does not turn the axis back
        line = paper.draw_speed_ups(ax, *numbers, "--", "red", 2.0, "v")
    np.testing.assert_array_equal(line.get_xydata(), [[300, 1], [200, 2], [100, 3]])
    assert ax.xaxis_inverted() and (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    edges = ax.collections[0].get_paths()[0].get_extents()
    assert (edges.xmin, edges.xmax, edges.ymin, edges.ymax) == (200, 300, 0.5, 3)
    plt.close(fig)


def test_rows_of_images_stand_beneath_their_names():
    shades = {name: np.full((3, 8, 8, 3), shade, np.uint8) for name, shade in (("a", 10), ("b", 200))}
    fig = paper.show_rows(shades, columns=2)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["a", "b"]
    for ax, (images, *_) in zip(fig.axes, shades.values(), strict=True):
        shown = np.asarray(ax.images[0].get_array())
        np.testing.assert_array_equal(shown, paper.image_grid(np.repeat(images[None], 2, 0), 1, 2))
    plt.close(fig)


def test_records_for_values_have_keys_that_a_readme_can_name():
    table = pandas.DataFrame(
        {"Min-SNR (s)": [0.5, np.nan], "250 steps on it (times)": [1, 2], "|u|² over": ["a", None]}
    )
    assert paper.plain_records(table) == [
        {"min_snr_s": 0.5, "250_steps_on_it_times": 1, "u_over": "a"},
        {"min_snr_s": None, "250_steps_on_it_times": 2, "u_over": None},
    ]

"""Figures, tables and values of the paper: one style, deterministic files, and where each came from in it.

A notebook calls `style()` once, draws, and saves under an id:

    save_figure(fig, "fig9_celeba64_unet")      -> figures/<id>.png and .pdf
    save_table("table1", frame, caption)        -> tables/<id>.csv, .md and .tex
    save_values("fig9_celeba64_unet", {...})    -> values/<id>.json

Files are whole or not there, and saving the same thing twice gives the same bytes. `read_provenance`
tells, of any of them, the runs, weights, files, parameters and code it was made from.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

from repro import config, files, provenance
from repro.files import ReproError

WIDTHS = {"column": 3.3, "page": 6.8}
"""Widths of a figure in inches, as printed: one column of the paper, or both."""

PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#808080",
)  # fmt: skip
"""Okabe and Ito's colours, told apart under every common colour blindness; last yellow, faint on white, and
grey."""

DIGITS = 6
"""Significant digits of a saved number: more would differ between machines."""


# Style ----------------------------------------------------------------------------------------------


def style() -> None:
    """Set the paper's style: 8 pt text at printed size, Okabe and Ito's colours, fonts embedded in PDFs.

    Starts from matplotlib's own defaults, so that a user's matplotlibrc changes nothing.
    """
    matplotlib.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": figure_size("column"),
            "figure.dpi": 150,  # on the screen; save_figure states its own
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.labelsize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "0.9",
            "grid.linewidth": 0.5,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "lines.linewidth": 1.2,
            "lines.markersize": 3,
            "pdf.fonttype": 42,  # TrueType: text in the PDF can be searched and edited
            "svg.hashsalt": "repro",
        }
    )


def figure_size(width: str = "column", aspect: float = 0.68) -> tuple[float, float]:
    """Width and height in inches of a figure `"column"` or `"page"` wide; `aspect` is height over width."""
    if width not in WIDTHS:
        raise ReproError(f"no figure width is called {width!r}; known are {', '.join(WIDTHS)}")
    return WIDTHS[width], WIDTHS[width] * aspect


def image_grid(
    images: np.ndarray, rows: int, cols: int, pad: int = 2, below: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """The first rows · cols images side by side, row by row, as one RGB image.

    `images` is uint8, [n, h, w, 3] or [n, 3, h, w]; `pad` white pixels lie between neighbours and none
    around the edge, and `below` more beneath each image, for `name_images`. Raises `ReproError` where there
    are too few images, or they are not of that kind.
    """
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[3] != 3 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ReproError(f"a grid needs uint8 images [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    if len(images) < rows * cols or rows < 1 or cols < 1:
        raise ReproError(f"{rows} rows of {cols} need {rows * cols} images; there are {len(images)}")
    _, height, width, _ = images.shape
    down = height + below + pad
    grid = np.full((rows * down - pad, cols * (width + pad) - pad, 3), 255, np.uint8)
    for i, image in enumerate(images[: rows * cols]):
        top, left = i // cols * down, i % cols * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid


def show_image(ax: Axes, image: np.ndarray) -> Axes:
    """Draw an image, or a grid of them, without ticks or frame; returns `ax`."""
    ax.imshow(image, interpolation="none")  # the PDF then holds the pixels themselves
    ax.set_axis_off()
    return ax


def name_images(
    ax: Axes, names: Sequence[str], cols: int, side: int, below: int, pad: int = 2, size: float = 4.0
) -> Axes:
    """Write a name beneath each image of a shown `image_grid` of images `side` pixels wide; returns `ax`.

    cols, below, pad: as in `image_grid`. size: of the text, in points; long names take several lines.
    """
    for i, name in enumerate(names):
        left, top = i % cols * (side + pad), i // cols * (side + below + pad)
        text = textwrap.fill(name, 14, break_long_words=False)
        ax.text(left + side / 2, top + side + 1, text, size=size, ha="center", va="top", linespacing=1)
    return ax


def show_rows(rows: Mapping[str, np.ndarray], columns: int) -> Figure:
    """A page-wide figure of the first `columns` images of each of `rows`, by what is written above the row.

    Images are as in `image_grid`.
    """
    fig, axes = plt.subplots(
        len(rows), 1, figsize=figure_size("page", 1.3 * len(rows) / columns), squeeze=False
    )
    for ax, (title, images) in zip(axes[:, 0], rows.items(), strict=True):
        show_image(ax, image_grid(images, 1, columns))
        ax.set_title(title, loc="left", fontsize=6, pad=2)
    return fig


def draw_band(
    ax: Axes,
    images: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    line: str,
    colour: str,
    width: float,
    label: str,
) -> Line2D:
    """Draw distances over images seen, in millions, and between `low` and `high` a band; returns the line.

    The y axis becomes logarithmic, with plain numbers. `compare.band` gives the four arrays, of one length.
    """
    (drawn,) = ax.plot(images / 1e6, middle, line, color=colour, lw=width, label=label)
    ax.plot(images / 1e6, middle, "o", color=colour, ms=2.5)
    if (low < high).any():
        ax.fill_between(images / 1e6, low, high, color=colour, alpha=0.25, lw=0)
    ax.set_yscale("log")
    plain_log_ticks(ax.yaxis)
    return drawn


def named_band(axes: Iterable[Axes], label: str) -> dict[str, Patch]:
    """A legend's entry for bands, by its label; none where none of the `axes` has a band."""
    drawn = any(isinstance(one, PolyCollection) for ax in axes for one in ax.collections)
    return {label: Patch(color="0.4", alpha=0.25, lw=0)} if drawn else {}


def plain_log_ticks(axis: Axis, most: int = 7) -> None:
    """Plain numbers on a logarithmic axis that has its data: the finest steps with at most so many.

    Evenly spaced numbers where the axis is so short that these are fewer than three.
    """
    low, high = sorted(axis.get_view_interval())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in (*decades, decades.stop) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    if len(ticks) < 3:
        evenly = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        ticks = [tick for tick in evenly if low <= tick <= high]
    axis.set_ticks(ticks)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def draw_speed_ups(
    ax: Axes,
    distances: np.ndarray,
    ratios: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    line: str,
    colour: str,
    width: float,
    label: str,
) -> Line2D:
    """Draw how many times sooner a distance is reached, over distances; returns the line.

    Distances run from high to low, as training goes, both axes are logarithmic, and where `high` is finite a
    band goes from `low` to it. `compare.speed_up` gives the numbers, of one distance each.
    """
    (drawn,) = ax.plot(distances, ratios, line, color=colour, lw=width, label=label)
    known = np.isfinite(high)
    ax.fill_between(distances, low, high, where=known, color=colour, alpha=0.25, lw=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        plain_log_ticks(axis)
    if not ax.xaxis_inverted():
        ax.invert_xaxis()
    return drawn


# Saving ---------------------------------------------------------------------------------------------


def out() -> Path:
    """The folder of figures/, tables/ and values/: REPRO_PAPER_OUT where it is set, else paper/."""
    return Path(os.environ.get("REPRO_PAPER_OUT") or provenance.ROOT / "paper")


def stamp(id: str) -> dict:
    """What the output `id` is made from, as far as this process has read files.

    `runs`: the SHA-256 of the weights of each recorded run read, by file. `files`: the SHA-256 of every
    file read. `code`: the content hash of the `repro` modules in use. `notebook` and `parameters`:
    those of the notebook being rendered; null in a session of one's own.
    """
    work = os.environ.get("REPRO_RENDER")  # set by `render`
    job = json.loads((Path(work) / "job.json").read_text()) if work else {}
    used = provenance.used_files()
    runs = {}
    for path in used:
        if path.endswith("/run.json"):
            folder = Path(path).parent
            record = json.loads((provenance.ROOT / path).read_text())
            runs[f"{folder.parent.name}/{folder.name}"] = record.get("weights", {})
    loaded = sorted(name for name in sys.modules if name.startswith("repro."))
    return {
        "id": id,
        "runs": runs,
        "files": used,
        "code": provenance.code_version("\n".join(f"import {name}" for name in loaded)),
        "notebook": job.get("notebook"),
        "parameters": job.get("parameters"),
    }


def save_figure(fig: Figure, id: str, dpi: int = 300) -> list[Path]:
    """Write figures/<id>.png, at `dpi` pixels per inch, and figures/<id>.pdf; returns both paths.

    The provenance is in their metadata: text chunk `repro` of the PNG, Keywords of the PDF.
    """
    record = json.dumps(stamp(id), sort_keys=True)
    png, pdf = _path("figures", id, ".png"), _path("figures", id, ".pdf")
    metadata = {"Title": id, "repro": record}
    files.replace_atomic(png, lambda path: fig.savefig(path, format="png", dpi=dpi, metadata=metadata))
    metadata = {"Title": id, "Keywords": record, "CreationDate": None}
    files.replace_atomic(pdf, lambda path: fig.savefig(path, format="pdf", dpi=dpi, metadata=metadata))
    return [png, pdf]


def plain_records(table: pandas.DataFrame) -> list[dict]:
    """Rows of a table for `save_values`: keys of letters, digits and "_" alone, and None where nothing is.

    So a README can name them: "Min-SNR (s)" is `min_snr_s`.
    """
    names = {column: re.sub(r"[^a-z0-9]+", "_", str(column).lower()).strip("_") for column in table}
    return table.rename(columns=names).astype(object).where(table.notna().to_numpy(), None).to_dict("records")


def save_values(id: str, values: dict) -> Path:
    """Write values/<id>.json: `values`, with sorted keys and 6 significant digits, and their provenance.

    numpy numbers and arrays become plain ones. Raises `ReproError` naming the key of a value that is
    not a finite number, text, true, false, none, or a list or dictionary of these.
    """
    path = _path("values", id, ".json")
    record = {"provenance": stamp(id), "values": _plain(values, "")}
    files.write_atomic(path, json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def save_table(
    id: str, frame: pandas.DataFrame, caption: str, formats: dict[str, str] | None = None
) -> list[Path]:
    """Write tables/<id>.csv, .md and .tex (booktabs); returns the three paths.

    The CSV holds numbers to 6 significant digits. The other two show them as `formats` says by column
    (`{"FD": ".2f"}`), else to 4 digits, and a missing value as a dash. Text and `caption` are plain:
    what Markdown or LaTeX would take for markup is escaped. A named index becomes the first columns.
    Raises `ReproError` for a format of a column that is not there, or a repeated column.
    """
    if any(frame.index.names):
        frame = frame.reset_index()
    columns = [str(column) for column in frame.columns]
    formats = formats or {}
    if unknown := set(formats) - set(columns):
        unknown = ", ".join(sorted(unknown))
        raise ReproError(f"table {id} has no column {unknown}; it has {', '.join(columns)}")
    if len(set(columns)) < len(columns):
        raise ReproError(f"table {id} has two columns of one name: {', '.join(columns)}")

    frame = frame.set_axis(columns, axis=1).reset_index(drop=True)
    numeric = [frame[column].dtype.kind in "iuf" for column in columns]
    shown = frame.astype(object)
    for column in columns:
        shown[column] = [
            "–" if missing else _cell(value, formats.get(column))
            for value, missing in zip(frame[column], frame[column].isna(), strict=True)
        ]
    record = json.dumps(stamp(id), sort_keys=True)

    def markdown(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    rule = "| " + " | ".join("--:" if right else ":--" for right in numeric) + " |"
    rows = [markdown(row) for row in shown.itertuples(index=False)]
    md = [f"<!-- repro: {record} -->", "", caption, "", markdown(columns), rule, *rows]
    escaped = shown.style.format(escape="latex").format_index(escape="latex", axis=1).hide(axis="index")
    tex = escaped.to_latex(
        hrules=True,
        column_format="".join("r" if right else "l" for right in numeric),
        position_float="centering",
        caption=caption.translate(_latex_escapes),
        label=f"tab:{id}",
    )
    paths = [_path("tables", id, suffix) for suffix in (".csv", ".md", ".tex")]
    rounded = frame.astype(object).map(  # floats of a column of objects, too
        lambda value: f"{value:.{DIGITS}g}" if isinstance(value, float) and value == value else value
    )
    files.write_atomic(paths[0], rounded.to_csv(index=False, lineterminator="\n"))
    files.write_atomic(paths[1], "\n".join(md) + "\n")
    files.write_atomic(paths[2], f"% repro: {record}\n{tex}")
    return paths


def read_provenance(path: str | Path) -> dict:
    """The provenance (see `stamp`) inside a saved .png, .pdf, .json, .md or .tex file.

    Raises `ReproError` where the file has none.
    """
    path = Path(path)
    record = None
    if path.suffix == ".png":
        with Image.open(path) as image:
            record = image.info.get("repro")
    elif path.suffix == ".pdf":
        # matplotlib leaves the Info dictionary uncompressed, at the end; text in it is backslash-escaped
        if found := re.findall(rb"/Keywords \(((?:\\.|[^\\)])*)\)", path.read_bytes(), re.DOTALL):
            record = re.sub(rb"\\(.)", rb"\1", found[-1]).decode()
    elif path.suffix == ".json":
        record = json.dumps(json.loads(path.read_text()).get("provenance"))
    elif path.suffix in (".md", ".tex"):
        if found := re.match(r"(?:<!--|%) repro: (\{.*\})", path.read_text()):
            record = found[1]
    if record in (None, "null"):
        raise ReproError(f"{path} carries no provenance; it was not written by repro.paper")
    return json.loads(record)


def describe_training(run: config.Config) -> str:
    """The target and the loss weight of a training, as "x₀, Min-SNR-5"; of what draws no images, its kind.

    "constant" is 1 on the loss of the target itself. Told besides are Min-SNR's gamma, and `min_snr_factor`.
    """
    if run.model.kind not in config.DRAWS:
        return run.model.kind
    target = {"x0": "x₀", "eps": "ε", "v": "v", "edm": "EDM"}[run.parameterization]
    gamma = run.weight.gamma or 5  # where there is none, see `weights.min_snr`
    title = {
        "snr": "SNR",
        "truncated_snr": "truncated SNR",
        "min_snr": f"Min-SNR-{gamma:g}",
        "soft_min_snr": f"soft Min-SNR-{gamma:g}",
        "p2": "P2",
        "edm": "EDM",
        "ugd": "UGD",
    }.get(run.weight.name, run.weight.name)
    factor = "" if run.min_snr_factor is None else f" × Min-SNR-{run.min_snr_factor:g}"
    return f"{target}, {title}{factor}"


def describe_metric(metric: dict, run: str | None = None) -> str:
    """One line that says what a number is: what stands next to a paper number in a figure or table.

    `metric` is a line of metrics.jsonl (see `repro.evaluate`); `run` is the run's name, whose first
    part is the profile. Raises `ReproError` naming the keys that are missing.
    """
    needed = "name value images protocol features samples first_seed sampler steps evaluations guidance"
    if missing := [key for key in ("reference", *needed.split()) if key not in metric]:
        raise ReproError(f"the metric lacks {', '.join(missing)}: it does not say what it measures")
    m, reference = metric, metric["reference"]
    last_seed = m["first_seed"] + m["samples"] - 1
    if "sha256" in reference:  # statistics that others released
        against = f"{reference['name']} (SHA-256 {reference['sha256'][:8]})"
    else:
        known = f"{reference['name']} (fingerprint {reference['fingerprint'][:8]})"
        against = f"{reference['count']:,} images of {known}"
    return (
        f"{run + ': ' if run else ''}{m['name']} {m['value']:.3g} after {m['images'] / 1e6:.3g}M images; "
        f"protocol {m['protocol']}, features {m['features']}, against {against}; {m['samples']:,} samples, "
        f"seeds {m['first_seed']} to {last_seed}, {m['sampler']}, {m['steps']} steps, "
        f"{m['evaluations']} network evaluations, "
        + ("no guidance" if m["guidance"] == 1 else f"guidance {m['guidance']:g}")
    )


def describe_sampler(sample: dict) -> str:
    """A sampler's settings in a few words, such as `Heun, 18 steps from σ = 40`.

    On the uniform grid `ancestral, 250 uniform timesteps`, or with its sections, least noise first, such as
    `ancestral, 40 + 10 uniform timesteps`. `sample` is as `config.sample_json` gives it, or has given it.
    """
    name, guidance = _solver(sample), _guidance(sample)
    if sample.get("clip"):
        guidance = f", clipped{guidance}"
    if sample.get("low_noise"):
        guidance += f", below σ = {sample['low_noise_below']:g} by {sample['low_noise']}"
    if sample.get("grid") == "uniform":
        steps = " + ".join(str(n) for n in sample["grid_sections"] or [sample["steps"]])
        return f"{name}, {steps} uniform timesteps{guidance}"
    return f"{name}, {sample['steps']} steps from σ = {sample['sigma_max']:g}{guidance}"


def sampler_family(sample: dict) -> str:
    """What two samplers that differ in their number of steps have in common, such as `DDIM, uniform`.

    Solver and grid (EDM's where nothing is said), and a limited interval of guidance; `sample` as in
    `describe_sampler`. Guidance itself, clipping and where EDM's grid starts are left out: say them once.
    """
    family = _solver(sample)
    if sample.get("grid") == "uniform":
        sections = len(sample["grid_sections"])
        family += ", uniform" if sections < 2 else f", {sections} stages"
    return family + (_guidance(sample) if sample.get("guidance_interval") else "")


def _solver(sample: dict) -> str:
    if sample["sampler"] == "dpm_solver":
        return f"DPM-Solver++({sample['order']}M)" if sample["multistep"] else f"DPM-Solver-{sample['order']}"
    return {
        "heun": "Heun" + (f" (churn {sample['churn']:g})" if sample.get("churn") else ""),
        "ancestral": {0: "DDIM", 1: "ancestral"}.get(sample["eta"], f"ancestral (η = {sample['eta']:g})"),
        "euler_maruyama": "Euler–Maruyama",
    }[sample["sampler"]]


def _guidance(sample: dict) -> str:
    guidance = "" if sample["guidance"] == 1 else f", guidance {sample['guidance']:g}"
    if sample.get("guidance_interval"):
        low, high = sample["guidance_interval"]
        guidance += f" where {low:g} ≤ σ ≤ {high:.3g}"
    if sample.get("classifier"):
        guidance += f", classifier {sample['classifier']} × {sample['classifier_scale']:g}"
    return guidance


def _path(kind: str, id: str, suffix: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", id):
        raise ReproError(f"{id!r} cannot be the id of an output: use letters, digits, _ and -")
    # while `render` executes a notebook its outputs wait there, and take their places only if all goes well
    work = os.environ.get("REPRO_RENDER")
    return (Path(work) / "out" if work else out()) / kind / (id + suffix)


def _plain(value: object, key: str) -> object:
    """`value` in JSON's types, floats rounded; `key` is the way to it, for errors."""
    if hasattr(value, "tolist"):  # numpy numbers and arrays, tensors, pandas series
        value = value.tolist()
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ReproError(f"cannot save {key or 'the values'}: the key {name!r} is not text")
        return {name: _plain(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{key}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ReproError(f"cannot save {key}: it is {value}, not a finite number")
        return float(f"{value:.{DIGITS}g}") + 0.0  # + 0.0 turns -0.0 into 0.0
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise ReproError(f"cannot save {key}: {type(value).__name__} is not a number, text, list or dictionary")


def _cell(value: object, form: str | None) -> str:
    """A table's cell as text."""
    if isinstance(value, (float, np.floating)) or form:
        return format(value, form or ".4g")
    return str(value)


_latex_escapes = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)

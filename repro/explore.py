"""Sliders over weights, live samples of recorded networks, two runs side by side: notebooks/explore.ipynb.

Each panel is a function of plain values that draws or samples, and a box of widgets that calls it. Nothing
here writes a file, and no number of the paper comes from here.
"""

from __future__ import annotations

import html
import io
import math
import time
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure

from repro import config, denoiser, paper, runs, sample, schedules, weights
from repro.files import ReproError

TARGETS = ("x0", "eps", "v", "edm")
WEIGHTS = ("min_snr", "soft_min_snr", "constant", "snr", "truncated_snr", "p2", "edm")

GAMMAS = tuple(float(f"{digits}e{power}") for power in range(-1, 3) for digits in (1, 1.5, 2, 3, 5, 7))
"""What the slider steps through: round numbers, the paper's 1, 5, 10 and 20 among them."""

SAMPLERS = {
    "Heun": {"sampler": "heun"},
    "DPM-Solver 2": {"sampler": "dpm_solver", "order": 2},
    "DPM-Solver++ 2 (multistep)": {"sampler": "dpm_solver", "order": 2, "multistep": True},
    "DDIM": {"sampler": "ancestral", "grid": "uniform", "clip": True},
    "ancestral DDPM": {"sampler": "ancestral", "grid": "uniform", "clip": True, "eta": 1.0},
}
"""Ways of drawing by the names in the menu."""

SMALL = 8_000_000
"""Parameters: a network of more takes long on a CPU."""

QUICK = 0.1
"""Seconds after a drawing within which the next click is taken for one that waited while it was drawn."""


# Weights ---------------------------------------------------------------------------------------------


def draw_weights(gamma: float, target: str, others: Sequence[str] = ()) -> Figure:
    """Min-SNR's weight over SNR for one gamma, on losses in x0 and as it weighs losses in `target`'s space.

    others: further weights of `WEIGHTS` beside it. A loss in another space is the loss in x0 times a factor
    (supplement, Section 2), so a weight there is the weight on x0 over that factor. Raises `ReproError` for a
    gamma that is not positive, an unknown target and an unknown weight.
    """
    snr = torch.logspace(-4, 4, 400, dtype=torch.float64)
    space = denoiser.parameterization(target)
    names = ["min_snr", *(name for name in others if name != "min_snr")]
    if unknown := [name for name in names if name not in WEIGHTS]:
        raise ReproError(f"there is no weight {unknown[0]!r}; known are {', '.join(WEIGHTS)}")
    fig, axes = _pair()
    for name in names:
        takes_gamma = name in ("min_snr", "soft_min_snr")
        weight = weights.from_config(config.Weight(name, gamma=gamma if takes_gamma else None), space)
        on_x0 = weight(snr)
        told = f"{name}, gamma {gamma:g}" if takes_gamma else name
        axes[0].plot(snr, on_x0, label=told)
        axes[1].plot(snr, on_x0 / space.inverse_c_out2(snr), label=told)
    for ax, of in zip(axes, ("x0", target), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="SNR", ylabel="weight", title=f"on losses in {of}")
        ax.minorticks_off()  # over eight decades they say nothing, and take most of the time to draw
    _legend_below(fig, columns=4)
    return fig


# Samples ---------------------------------------------------------------------------------------------


def small_runs() -> list[str]:
    """Recorded runs whose weights draw images on a CPU in seconds, the one of the fewest parameters first."""
    found = []
    for name in runs.names():
        record = runs.load_run(name).record
        if record.weights and record.config.model.kind in config.DRAWS and record.parameters <= SMALL:
            found.append((record.parameters, name))
    return [name for _, name in sorted(found)]


def can_guide(recorded: runs.Run) -> bool:
    """Whether a run has classes and a null class: without them there is nothing to guide from."""
    return bool(recorded.config.data.classes and recorded.config.model.null_class)


def way(recorded: runs.Run, sampler: str, steps: int, guidance: float) -> config.Sample:
    """How to draw: by the sampler of that name in `SAMPLERS`, on that run's own range of noise.

    Without guidance where the run cannot guide (`can_guide`). Raises `ReproError` for an unknown name.
    """
    if sampler not in SAMPLERS:
        raise ReproError(f"there is no sampler {sampler!r}; known are {', '.join(SAMPLERS)}")
    own = recorded.sample
    guided = guidance if can_guide(recorded) else 1.0
    return config.Sample(
        steps=steps, guidance=guided, sigma_min=own.sigma_min, sigma_max=own.sigma_max, **SAMPLERS[sampler]
    )


def draw_samples(
    recorded: runs.Run,
    how: config.Sample,
    seeds: Sequence[int],
    tell: Callable[[int, int, UInt8[np.ndarray, "n h w 3"]], None] = lambda done, of, images: None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Images of these sample seeds, as `Run.draw` draws them; `tell(done, of, images)` as it goes.

    After each of the `of` calls of the network (guidance counts once), with what is denoised so far: the
    estimate D of the clean images, in which details come last. Of latents only the end is decoded: until
    then three of their channels are shown.
    """
    net = recorded.denoiser()
    data = recorded.config.data
    levels = len(schedules.grid_for(net.schedule, how)) - 1
    of, done = sample.evaluations(how, levels), 0
    guided = sample.guided(net, how)

    def told(x, sigma, labels):
        nonlocal done
        D_x = guided(x, sigma, labels)
        done += 1
        tell(done, of, _images(D_x))
        return D_x

    noise = sample.SeedNoise(list(seeds), (data.channels, data.resolution, data.resolution), "cpu")
    labels = sample.labels_for(list(seeds), data.classes) if data.classes else None
    found = sample.sample_batch(net, how, noise, labels, told)
    if data.autoencoder:
        from repro import latents

        with torch.no_grad():
            found = latents.decode(found, data.autoencoder)
    return _images(found)


def _images(x: torch.Tensor) -> np.ndarray:
    return sample.to_uint8(x[:, :3]).permute(0, 2, 3, 1).cpu().numpy()


# Curves ----------------------------------------------------------------------------------------------


def draw_curves(names: Sequence[str]) -> Figure:
    """The distances of recorded runs by their own samplers over images seen, and their training losses.

    Losses of different weights or targets are not on one scale: they are drawn to see a run's own course.
    Distances of different feature networks do not belong on one axis: raises `ReproError`.
    """
    found = [runs.load_run(name) for name in dict.fromkeys(names)]  # one named twice has one curve
    features = {one.config.evaluate.features for one in found}
    if len(features) > 1:
        raise ReproError(
            f"distances on different features ({', '.join(sorted(features))}) have no common axis"
        )
    fig, axes = _pair()
    for one in found:
        images, distances = one.curve(one.sample)
        axes[0].plot(np.array(images) / 1e6, distances, "o-", label=one.name)
        log = [(line["images"], line["loss"]) for line in one.log if line.get("loss") is not None]
        seen, losses = np.array(log).T if log else ([], [])
        axes[1].plot(np.array(seen) / 1e6, losses, lw=0.8, label=one.name)
    label = "training images seen (millions)"
    axes[0].set(xlabel=label, ylabel="distance to the real images", yscale="log")
    axes[1].set(xlabel=label, ylabel="training loss (own weight)", yscale="log")
    _legend_below(fig, columns=2)
    return fig


def _pair() -> tuple[Figure, np.ndarray]:
    return plt.subplots(1, 2, figsize=paper.figure_size("page", 0.4), layout="constrained")


def _legend_below(fig: Figure, columns: int) -> None:
    """One legend for both axes, outside them: lines go anywhere, so that inside it would lie on some."""
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)


# Panels ----------------------------------------------------------------------------------------------


def weights_panel(gamma: float | int = 5.0) -> widgets.Widget:
    """Sliders over `draw_weights`, that of gamma over `GAMMAS` and the given one, where it begins.

    Raises `ReproError` for a gamma that is not above 0.
    """
    if not 0 < gamma < math.inf:
        raise ReproError(f"gamma must be a number above 0, not {gamma}")
    # without a readout: one could type into it, and nothing would come of it
    known = [(f"{value:.12g}", value) for value in sorted({*GAMMAS, float(gamma)})]
    slider = widgets.SelectionSlider(options=known, value=float(gamma), readout=False)

    def describe(_=None) -> None:
        slider.description = f"γ = {slider.label}"

    slider.observe(describe, "value")
    describe()
    target = widgets.ToggleButtons(options=TARGETS, description="target", style={"button_width": "60px"})
    others = widgets.SelectMultiple(options=WEIGHTS[1:], value=("constant",), rows=6, description="beside it")
    return _redrawn(draw_weights, {"gamma": slider, "target": target, "others": others})


def curves_panel(first: str, second: str) -> widgets.Widget:
    """Menus over `draw_curves`: any two recorded runs that have distances."""
    known = [name for name in runs.names() if (one := runs.load_run(name)).log and one.curve(one.sample)[0]]
    for name in (first, second):
        if name not in known:
            raise ReproError(f"{name} is no recorded run with distances; there are {', '.join(known)}")
    one = widgets.Dropdown(options=known, value=first, description="one", layout=_wide())
    other = widgets.Dropdown(options=known, value=second, description="another", layout=_wide())
    return _redrawn(lambda one, other: draw_curves([one, other]), {"one": one, "other": other})


def samples_panel(run: str, seeds: int = 2) -> widgets.Widget:
    """Menus and sliders over `draw_samples`, with a button, a progress bar and the images as they come.

    seeds: how many images at once. The slider of guidance is off where the chosen run cannot guide. Raises
    `ReproError` for a run that is none of `small_runs`, and for no images.
    """
    known = small_runs()
    if run not in known:
        raise ReproError(f"{run} is no small recorded run with weights; there are {', '.join(known)}")
    if seeds < 1:
        raise ReproError(f"at least 1 image must be drawn at once, not {seeds}")
    of = widgets.Dropdown(options=known, value=run, description="run", layout=_wide())
    sampler = widgets.Dropdown(options=list(SAMPLERS), description="sampler", layout=_wide())
    steps = widgets.IntSlider(8, min=2, max=50, description="steps", layout=_wide())
    guidance = widgets.FloatSlider(1.5, min=1.0, max=4.0, step=0.25, description="guidance", layout=_wide())
    seed = widgets.BoundedIntText(0, min=0, max=10**9, description="first seed", layout=_wide())
    button = widgets.Button(description="draw", button_style="primary")
    progress, told = widgets.IntProgress(0, min=0, max=1, layout=_wide()), widgets.HTML(layout=_wide())
    # as wide as there is room for beside the controls, below them where there is little
    picture = _picture(flex="1 1 300px", min_width="0", max_width="700px", display="none")

    def chosen(_=None) -> None:
        guidance.disabled = not can_guide(runs.load_run(of.value))

    def show(images: np.ndarray) -> None:
        _show(picture, paper.show_rows({"": images}, len(images)))

    def step(done: int, calls: int, images: np.ndarray) -> None:
        progress.max, progress.value = calls, done
        if done % max(1, calls // 8) == 0:
            show(images)

    ended = 0.0

    def draw(_=None) -> None:
        nonlocal ended
        if time.perf_counter() - ended < QUICK:  # a second click, made before the button was off
            return
        button.disabled, began = True, time.perf_counter()
        progress.value, told.value = 0, ""
        try:
            recorded = runs.load_run(of.value)
            how = way(recorded, sampler.value, steps.value, guidance.value)
            drawn = range(seed.value, seed.value + seeds)
            show(draw_samples(recorded, how, drawn, step))
            described = paper.describe_sampler(config.sample_json(how))
            took = f"{time.perf_counter() - began:.1f} s, {progress.max} calls"
            told.value = html.escape(f"{of.value}, {described}, seeds from {drawn.start}: {took}")
        except ReproError as error:
            _tell_error(told, picture, error)
        finally:
            button.disabled, ended = False, time.perf_counter()

    of.observe(chosen, "value")
    chosen()
    button.on_click(draw)
    left = widgets.VBox([of, sampler, steps, guidance, seed, button, progress, told])
    left.layout.max_width = "100%"
    return widgets.Box([left, picture], layout={"flex_flow": "row wrap"})


def _redrawn(draw: Callable[..., Figure], controls: dict[str, widgets.Widget]) -> widgets.Widget:
    """Controls, and below them what `draw` makes of their values, drawn anew when one changes."""
    picture, told = _picture(), widgets.HTML()

    def redraw(_=None) -> None:
        values = {name: control.value for name, control in controls.items()}
        try:
            _show(picture, draw(**values))
            told.value = ""
        except ReproError as error:
            _tell_error(told, picture, error)

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return widgets.VBox(
        [widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"}), told, picture]
    )


def _wide() -> widgets.Layout:
    """Of a control that shows the longest run's name in full, and is as wide as there is room for at most."""
    return widgets.Layout(width="400px", max_width="100%")


def _picture(**layout: str) -> widgets.Image:
    # a box would stretch it, and with its margin it would be wider than the cell
    return widgets.Image(layout={"align_self": "flex-start", "margin": "0", **layout})


def _show(picture: widgets.Image, fig: Figure) -> None:
    picture.value = _png(fig)
    picture.layout.display = None


def _tell_error(told: widgets.HTML, picture: widgets.Image, error: ReproError) -> None:
    """What is wrong, in place of a picture of something else. (A `Label` would cut it to one line.)"""
    told.value = html.escape(f"error: {error}")
    picture.layout.display = "none"


def _png(fig: Figure) -> bytes:
    """A figure as a PNG, closed. An `Output` widget would take figures as they are, but a notebook that is
    executed without a browser can wait for one of them for ever."""
    with io.BytesIO() as file:
        fig.savefig(file, format="png")
        plt.close(fig)
        return file.getvalue()

"""The exploring notebook: what it draws against the library, and its widgets."""

import json
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import pytest
import torch

from repro import explore, provenance, runs
from repro.files import ReproError

RUN = "lab/imagenet64-x0-minsnr5"


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def lines(ax) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): line.get_data() for line in ax.lines}


@pytest.mark.parametrize("target", explore.TARGETS)
@pytest.mark.parametrize("gamma", [0.1, 5.0, 1000.0])
def test_weights_are_drawn_as_the_library_has_them(gamma, target):
    left, right = explore.draw_weights(gamma, target, ("constant", "p2")).axes
    snr, on_x0 = lines(left)[f"min_snr, gamma {gamma:g}"]
    np.testing.assert_allclose(on_x0, np.minimum(snr, gamma))
    factor = {"x0": snr * 0 + 1, "eps": snr, "v": snr + 1, "edm": snr + 4}[target]  # supplement, Section 2
    np.testing.assert_allclose(lines(right)[f"min_snr, gamma {gamma:g}"][1], np.minimum(snr, gamma) / factor)
    np.testing.assert_allclose(lines(right)["constant"][1], 1)  # constant in the target's own space
    assert set(lines(left)) == {f"min_snr, gamma {gamma:g}", "constant", "p2"}


def test_legends_lie_outside_the_axes_with_any_number_of_lines():
    for fig in (
        explore.draw_weights(5.0, "v", explore.WEIGHTS),
        explore.draw_curves([RUN, "lab/imagenet64-x0-snr"]),
    ):
        fig.canvas.draw()
        (legend,) = fig.legends
        assert not any(ax.get_legend() for ax in fig.axes)
        assert not any(legend.get_window_extent().overlaps(ax.get_tightbbox()) for ax in fig.axes)
        assert len(legend.texts) == len(fig.axes[0].lines)


def test_weights_that_there_are_not():
    with pytest.raises(ReproError, match="no weight 'minsnr'; known are min_snr"):
        explore.draw_weights(5.0, "x0", ("minsnr",))
    with pytest.raises(ReproError, match="gamma .* must be positive"):
        explore.draw_weights(0.0, "x0")
    with pytest.raises(ReproError):
        explore.draw_weights(5.0, "x")


def test_samples_are_those_that_a_run_draws_and_come_step_by_step():
    recorded = runs.load_run(RUN)
    how = explore.way(recorded, "Heun", 3, 1.5)
    assert (how.steps, how.guidance, how.sigma_max) == (3, 1.0, recorded.sample.sigma_max)  # no null class
    seen = []
    images = explore.draw_samples(recorded, how, [0, 7], lambda *step: seen.append(step))
    np.testing.assert_array_equal(images, recorded.draw([0, 7], how))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5] and {of for _, of, _ in seen} == {5}
    # the last estimate is the end: the last step goes to sigma = 0
    np.testing.assert_array_equal(seen[-1][2], images)
    first = seen[0][2].astype(float)
    assert np.abs(first - images).mean() > 5 and first.shape == images.shape == (2, 64, 64, 3)


@pytest.mark.parametrize("name", explore.SAMPLERS)
def test_every_sampler_of_the_menu_makes_as_many_calls_as_it_says(name, monkeypatch):
    recorded = runs.load_run(RUN)
    monkeypatch.setattr(runs.Run, "denoiser", lambda self: stand_in(recorded))
    told = []
    explore.draw_samples(
        recorded, explore.way(recorded, name, 4, 1.0), [0], lambda done, of, _: told.append((done, of))
    )
    assert told[-1][0] == told[-1][1] == len(told)


def stand_in(recorded: runs.Run):
    """That run's denoiser with a network that answers 0 at once."""

    class Zero(torch.nn.Module):
        classes, null_class = recorded.config.data.classes, False

        def forward(self, x, t, labels=None):
            return torch.zeros_like(x)

    return runs.joined(recorded.config, Zero())


def test_ways_of_drawing():
    recorded = runs.load_run(RUN)
    with pytest.raises(ReproError, match="no sampler 'heun'; known are Heun, "):
        explore.way(recorded, "heun", 4, 1.0)
    faces = runs.load_run("lab/celeba64-unet")  # which has no classes
    assert explore.way(faces, "DDIM", 4, 3.0).guidance == 1.0
    latent = runs.load_run("lab/imagenet64-latent-vit")
    assert explore.way(latent, "Heun", 4, 3.0).guidance == 3.0


def test_latents_are_decoded_at_the_end_and_shown_before():
    recorded = runs.load_run("lab/imagenet64-latent-vit")
    how, seen = explore.way(recorded, "Heun", 2, 2.0), []
    images = explore.draw_samples(recorded, how, [3], lambda *step: seen.append(step[2].shape))
    np.testing.assert_array_equal(images, recorded.draw([3], how))
    assert seen == [(1, 16, 16, 3)] * 3 and images.shape == (1, 64, 64, 3)


def test_runs_in_the_menus_are_small_and_have_weights_and_curves_are_the_recorded_ones():
    small = explore.small_runs()
    assert RUN in small and "lab/imagenet64-classifier" not in small
    for name in small:
        record = runs.load_run(name).record
        assert record.weights and record.parameters <= explore.SMALL
    left, right = explore.draw_curves([RUN, "lab/imagenet64-x0-constant"]).axes
    recorded = runs.load_run(RUN)
    images, distances = recorded.curve(recorded.sample)
    np.testing.assert_allclose(lines(left)[RUN][0] * 1e6, images)
    np.testing.assert_allclose(lines(left)[RUN][1], distances)
    assert len(lines(right)[RUN][0]) == len([line for line in recorded.log if line.get("loss") is not None])
    assert set(lines(explore.draw_curves([RUN, RUN]).axes[0])) == {RUN}  # one run twice is one curve
    with pytest.raises(ReproError, match="lab/vit is no small recorded run"):
        explore.samples_panel("lab/vit")
    with pytest.raises(ReproError, match="at least 1 image must be drawn at once, not 0"):
        explore.samples_panel(RUN, seeds=0)
    with pytest.raises(ReproError, match="lab/nothing is no recorded run with distances"):
        explore.curves_panel(RUN, "lab/nothing")


def found(box, kind):
    """All widgets of a kind in a box, by description."""
    inside = [box] if isinstance(box, kind) else []
    for child in getattr(box, "children", ()):
        inside += found(child, kind)
    return inside


def test_moving_a_slider_draws_anew_and_an_error_is_told_in_place_of_the_picture(monkeypatch):
    asked = []

    def drawn(**given):
        asked.append(given)
        if given["gamma"] > 100:
            raise ReproError("gamma is > 100")
        return plt.figure()

    monkeypatch.setattr(explore, "draw_weights", drawn)
    panel = explore.weights_panel()
    (gamma,) = found(panel, explore.widgets.SelectionSlider)
    (told,) = found(panel, explore.widgets.HTML)
    (picture,) = found(panel, explore.widgets.Image)
    gamma.value = 20.0
    assert [given["gamma"] for given in asked] == [5.0, 20.0] and asked[1]["others"] == ("constant",)
    gamma.value = 200.0
    assert told.value == "error: gamma is &gt; 100" and picture.layout.display == "none"
    gamma.value = 1.0
    assert told.value == "" and picture.layout.display is None


def test_the_slider_of_gamma_has_the_papers_values_and_says_which_it_is_at():
    assert {1.0, 5.0, 10.0, 20.0} <= set(explore.GAMMAS)
    (gamma,) = found(explore.weights_panel(), explore.widgets.SelectionSlider)
    assert gamma.description == "γ = 5" and not gamma.readout
    gamma.value = 0.15
    assert gamma.description == "γ = 0.15"
    (gamma,) = found(explore.weights_panel(6.5), explore.widgets.SelectionSlider)
    assert gamma.description == "γ = 6.5" and gamma.value == 6.5
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ReproError, match="gamma must be a number above 0"):
            explore.weights_panel(bad)


def test_controls_stay_beside_or_above_a_picture_of_any_width():
    for panel in (explore.weights_panel(), explore.curves_panel(RUN, RUN), explore.samples_panel(RUN)):
        assert "row wrap" in [box.layout.flex_flow for box in found(panel, explore.widgets.Box)]
        (picture,) = found(panel, explore.widgets.Image)
        assert (picture.layout.align_self, picture.layout.margin) == ("flex-start", "0")
    (picture,) = found(explore.samples_panel(RUN), explore.widgets.Image)
    assert picture.layout.min_width == "0"  # else it takes the controls' room
    assert picture.layout.display == "none"  # there is none yet, and browsers show a broken one


def test_guidance_can_be_moved_only_where_the_run_can_guide():
    panel = explore.samples_panel(RUN)
    (guidance,) = found(panel, explore.widgets.FloatSlider)
    assert guidance.disabled
    found(panel, explore.widgets.Dropdown)[0].value = "lab/imagenet64-latent-vit"
    assert not guidance.disabled


def test_the_button_draws_shows_progress_and_tells_how_long_it_took(monkeypatch):
    shown = []
    png = explore._png
    monkeypatch.setattr(explore, "_png", lambda fig: shown.append(png(fig)) or shown[-1])
    recorded = runs.load_run(RUN)
    monkeypatch.setattr(runs.Run, "denoiser", lambda self: stand_in(recorded))
    panel = explore.samples_panel(RUN, seeds=2)
    (button,) = found(panel, explore.widgets.Button)
    (progress,) = found(panel, explore.widgets.IntProgress)
    (told,) = found(panel, explore.widgets.HTML)
    (picture,) = found(panel, explore.widgets.Image)
    found(panel, explore.widgets.IntSlider)[0].value = 4
    button.click()
    assert progress.value == progress.max == 7 and not button.disabled
    assert told.value.startswith(f"{RUN}, Heun, 4 steps from σ = 80, seeds from 0: ")
    assert told.value.endswith(" s, 7 calls")
    assert len(shown) >= 2 and picture.layout.display is None
    assert picture.value == shown[-1] and shown[-1].startswith(b"\x89PNG")

    drawn = len(shown)
    monkeypatch.setattr(explore, "QUICK", 60.0)
    button.click()  # as the second of two quick clicks, which the kernel gets when the first has been drawn
    assert len(shown) == drawn and not button.disabled
    monkeypatch.setattr(explore, "QUICK", 0.0)
    button.click()
    assert len(shown) > drawn

    def broken(*_):
        raise ReproError("no weights")

    monkeypatch.setattr(explore, "draw_samples", broken)
    button.click()
    assert told.value == "error: no weights" and not button.disabled
    assert picture.layout.display == "none" and progress.value == 0


@pytest.mark.parametrize(
    "path", sorted((provenance.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebooks_name_their_kernel_and_their_formulas_are_formulas(path):
    book = nbformat.read(path, 4)
    assert book.metadata.kernelspec.name == "python3"  # or JupyterLab asks for one first
    texts = [cell.source for cell in book.cells if cell.cell_type == "markdown"]
    assert not any(re.search(r"\\\\[A-Za-z]", text) for text in texts)  # a command's backslash, doubled


def test_the_notebook_runs_and_shows_three_panels(tmp_path):
    out = tmp_path / "explore.ipynb"
    book = provenance.ROOT / "notebooks" / "explore.ipynb"
    how = {"kernel_name": "python3", "language": "python", "progress_bar": False, "cwd": str(book.parent)}
    papermill.execute_notebook(book, out, {"seeds": 1}, **how)
    cells = [cell for cell in nbformat.read(out, 4).cells if cell.cell_type == "code"]
    views = [
        data
        for cell in cells
        for output in cell.outputs
        for data in output.get("data", {})
        if data == "application/vnd.jupyter.widget-view+json"
    ]
    assert len(views) == 3
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def test_a_container_opens_the_notebook_with_what_the_makefile_sets_up():
    about = json.loads((provenance.ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert about["postCreateCommand"].startswith("make ") and "explore.ipynb" in json.dumps(about)
    targets = (provenance.ROOT / "Makefile").read_text()
    target = about["postCreateCommand"].split()[1]
    assert f"\n{target}:" in targets

"""The benchmark of UGD's cost: its literal method is the one on the Gram matrix, and its parts add up."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import config, pareto, presets, train, ugd_cost
from repro.files import ReproError

LAB = presets.preset("lab/imagenet64-x0-minsnr5")
TINY = dataclasses.replace(
    LAB,
    model=config.ViT(patch=8, width=32, depth=1, heads=2, null_class=False),
    data=dataclasses.replace(LAB.data, resolution=16),
    train=dataclasses.replace(LAB.train, compile=False, cuda_graphs=False, precision="fp32"),
)
CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 2**32 - 1), st.integers(-3, 3))
def test_the_steps_without_a_gram_matrix_are_those_on_it(levels, steps, seed, scale):
    random = np.random.default_rng(seed)
    g = torch.from_numpy(random.normal(size=(levels, 12)) * 10.0**scale + random.normal(size=12))
    literal, G = ugd_cost.steps_without_gram(g, steps), pareto.gram(g)
    found, expected = pareto.combine(G, literal), pareto.frank_wolfe(G, steps)
    assert found.squared_norm == pytest.approx(expected.squared_norm, rel=1e-6, abs=1e-9 * float(G.max()))
    assert float(literal.sum()) == pytest.approx(1) and literal.min() >= 0


def test_no_step_is_refused():
    with pytest.raises(ReproError, match="steps must be at least 1, not 0"):
        ugd_cost.steps_without_gram(torch.eye(2), 0)


def test_gradients_by_level_are_those_of_the_theorem():
    trainer = train.Trainer(TINY, train.Place(0, 1, CPU))
    random = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 3, 3, 16, 16, generator=random)
    labels, sigmas = torch.tensor([0, 1, 2]), trainer.denoiser.schedule.sigmas[[50, 400, 900]]
    rows = torch.empty(3, sum(p.numel() for p in trainer.parameters))
    ugd_cost.LevelGradients(trainer, y, noise, labels)(sigmas, rows)
    expected = pareto.gradients(trainer.denoiser, y, noise, sigmas, trainer.weight, labels)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-7)


def test_each_part_is_timed_and_what_is_too_large_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(ugd_cost.NETWORKS, "tiny", TINY)
    out = tmp_path / "ugd.json"
    ugd_cost.main(out, ("tiny",), (2, 4, 10**6), (2,), "cpu")
    written = json.loads(out.read_text())
    small, large, huge = written["lines"]
    assert (small["levels"], large["levels"], small["batch"], small["steps"]) == (2, 4, 2, 250)
    assert huge["too_large"].endswith("GiB of gradients") and ugd_cost.totals(huge) == {
        "Min-SNR": huge["minsnr"]
    }
    for line in (small, large):
        parts = ("gradients", "without_gram", "gram", "gram_steps", "exact", "combine", "minsnr")
        assert all(line[part] > 0 for part in parts)
        both = ugd_cost.totals(line)
        saved = both["UGD, without Gram matrix"] - both["UGD, Gram matrix"]
        assert saved == pytest.approx(line["without_gram"] - line["gram"] - line["gram_steps"])
    with pytest.raises(SystemExit, match="there is no network 'ViT-X' to measure; known: lab arm"):
        ugd_cost.main(out, ("ViT-X",))


def test_many_networks_are_compiled_one_after_the_other(unchecked, monkeypatch):
    """As in the benchmark, one compilation each: what torch.compile keeps of the others has a limit."""
    compiled = []

    def compile_eagerly(net):
        def backend(graph, inputs):
            compiled.append(len(inputs))
            return graph.forward

        return torch.compile(net, backend=backend, fullgraph=True, dynamic=False)

    monkeypatch.setattr(ugd_cost.train.runs, "compiled", compile_eagerly)
    for width in range(1, 11):
        model = dataclasses.replace(TINY.model, width=2 * width)
        run = dataclasses.replace(TINY, model=model, train=dataclasses.replace(TINY.train, compile=True))
        (line,) = ugd_cost.measure("tiny", run, (2,), 2, CPU, steps=2)
        assert line["gradients"] > 0
    assert len(compiled) == 10

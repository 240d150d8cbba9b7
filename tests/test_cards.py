"""Cards: every record has one, they say what it says, and a broken record is an error."""

import json
import math
import re
import shutil

import pytest
import yaml

from repro import cards, provenance, runs
from repro.__main__ import main
from repro.files import ReproError

RUNS = provenance.ROOT / "paper" / "runs"
MITCHELL = [
    "Model details",
    "Intended use",
    "Factors",
    "Metrics",
    "Evaluation data",
    "Training data",
    "Quantitative analyses",
    "Ethical considerations",
    "Caveats and recommendations",
]
GEBRU = [
    "Motivation",
    "Composition",
    "Collection process",
    "Preprocessing, cleaning and labelling",
    "Uses",
    "Distribution",
    "Maintenance",
]


@pytest.fixture(scope="module")
def written():
    """The cards of all recorded runs, as they would be written now."""
    return cards.cards(RUNS)


@pytest.fixture
def copied(tmp_path):
    """A folder of recorded runs that holds one, without weights, and the run's own folder."""
    folder = tmp_path / "runs" / "lab" / "unet-lr1e-3"
    shutil.copytree(RUNS / "lab" / folder.name, folder)
    return tmp_path / "runs", folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_committed_cards_are_those_of_the_records(written):
    assert cards.differences(written) == [], "run: python -m repro cards"


def test_every_run_and_every_data_set_has_a_card(written):
    recorded = [runs.load_run(name, RUNS) for name in runs.names(RUNS)]
    data = {f"data/{run.record.data.name}.md" for run in recorded}
    assert written.keys() == {f"{run.name}.md" for run in recorded} | data
    assert {"data/celeba64.md", "data/imagenet64-subset.md"} <= data


def test_each_card_has_its_headings_a_header_of_yaml_and_links_that_lead_somewhere(written):
    for name, text in written.items():
        _, header, body = text.split("---\n", 2)
        about = yaml.safe_load(header)
        assert about["license"] == "other" and about["tags"] and len(set(about["tags"])) == len(about["tags"])
        headings = re.findall(r"^## (.*)$", body, re.M)
        expected = GEBRU if name.startswith("data/") else MITCHELL
        assert [heading for heading in headings if heading in expected] == expected, name
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", body), name
        assert not re.search(r"^## .*\n\n(?=## |\Z)", body, re.M), f"{name} has a heading without content"
        for link in re.findall(r"\]\(([^)]+)\)", body):
            assert (cards.CARDS / name).parent.joinpath(link).exists(), f"{name}: {link}"
        for table in re.findall(r"(?:^\|.*\n)+", body, re.M):
            assert len({line.count(" | ") for line in table.splitlines()}) == 1, f"{name}: a row is too short"


def test_a_card_says_what_the_record_does(written):
    text = written["lab/celeba64-unet.md"]
    run = runs.load_run("lab/celeba64-unet", RUNS)
    for told in (
        f"{run.record.parameters:,} parameters",
        "Learns: the noise (eps); loss weight min_snr (gamma 5.0)",
        "8,294,400 images seen of 12,000,000 planned, in 665 seconds",
        f"library {run.record.code}, commit {run.record.commit}",
        run.record.data.fingerprint,
        "| 6.977 | 8,294,400 | 10,000 samples, seeds 1000000 to 1009999 | ancestral, 250 steps from σ = 80 |",
        "is 0.929 times that of 1,000 held-out images",
        "Loss: 0.01389 on 1,000 held-out images and 0.01185 on as many training images",
        "for non-commercial research purposes only",
        *run.record.weights,
        *run.record.weights.values(),
    ):
        assert told in text, told
    assert "7.603" not in text  # of the sweep that chose the sampler, on other seeds


def test_a_last_measurement_is_the_last_and_of_each_way_of_drawing():
    run = runs.load_run("lab/imagenet64-edm", RUNS)
    lines = cards._last_measured(run)
    assert {line["images"] for line in lines} == {run.record.images}
    ways = [json.dumps([line["name"], line.get("sample"), line.get("ema_halflife_images")]) for line in lines]
    assert len(set(ways)) == len(ways) > 2
    assert any("ema_halflife_images" in line for line in lines)


def test_what_was_not_measured_or_recorded_says_so(written, copied):
    root, folder = copied
    assert "## Weights\n\nnot recorded" in written["lab/unet-lr1e-3.md"]
    assert "Nearest training image: not measured" in written["lab/imagenet64-edm.md"]
    assert "No images were held out" in written["lab/imagenet64-edm.md"]
    (folder / "metrics.jsonl").unlink()
    text = cards.cards(root)["lab/unet-lr1e-3.md"]
    for told in (
        "## Quantitative analyses\n\nnot measured\n",
        "## Metrics\n\n- not measured\n",
        "Nearest training image: not measured",
        "Loss on held-out and on training images: not measured",
    ):
        assert told in text
    change(folder / "run.json", data=json.loads((folder / "run.json").read_text())["data"] | {"name": "mine"})
    about = cards.cards(root)["data/mine.md"]
    assert "Licence: not stated" in about and "Origin: not stated" in about


def test_a_card_tells_the_weights_that_a_training_began_from():
    text = cards.cards()["lab/imagenet64-vit.md"]
    began = json.loads((provenance.ROOT / "paper/runs/lab/imagenet64-vit/run.json").read_text())[
        "from_weights"
    ]
    told = ", ".join(f"`{digest[:8]}…`" for digest in began.values())
    assert f"Began from: weights that were recorded of lab/imagenet64-vit (SHA-256 {told})" in text


def test_an_imported_run_claims_no_training(copied):
    root, folder = copied
    change(
        folder / "run.json",
        imported={"url": "https://example.org/a.pt", "size": 5},
        images=0,
        data={"name": "imagenet64", "fingerprint": "unknown", "count": 0, "trained_on": 0, "held_out": 0},
        weights={"weights-00001-of-00001.safetensors": "0" * 64},
    )
    found = cards.cards(root)
    text = found["lab/unet-lr1e-3.md"]
    assert "Imported, not trained here: url https://example.org/a.pt" in text and "Trained by" not in text
    assert "no run was trained on it here" in found["data/imagenet64.md"]


def test_a_broken_record_is_an_error_that_names_the_file(copied):
    root, folder = copied
    metrics, run_json = folder / "metrics.jsonl", folder / "run.json"
    whole, record = metrics.read_text(), run_json.read_text()
    first = json.loads(whole.splitlines()[0])
    assert first["name"].startswith("FD ")
    for line, message in (
        ('{"name": "FD (A)", "images": 1}', "lacks value"),
        ("{}", "lacks name, value, images"),
        (json.dumps(first | {"value": math.nan}), "nan, not a finite number"),
        (json.dumps({key: value for key, value in first.items() if key != "samples"}), "'samples'"),
        ("{", "is not JSON"),
    ):
        metrics.write_text(f"{line}\n")
        with pytest.raises(ReproError, match=message) as raised:
            cards.cards(root)
        assert str(metrics) in str(raised.value)
    metrics.write_text(whole)
    for values, message in (
        ({"unknown": 1}, "unknown"),
        ({"seconds": math.inf}, "inf|finite"),
        ({"weights": {"weights-00001-of-00001.safetensors": "0" * 64}}, "safetensors is missing; restore it"),
    ):
        run_json.write_text(json.dumps(json.loads(record) | values))
        with pytest.raises(ReproError, match=message) as raised:
            cards.cards(root)
        assert str(folder) in str(raised.value)


def test_check_writes_nothing_and_the_command_writes_what_is_due(copied, tmp_path, monkeypatch, capsys):
    root, folder = copied
    out = tmp_path / "cards"
    monkeypatch.setattr(cards, "CARDS", out)
    monkeypatch.setenv("REPRO_RUNS", str(root))
    name = f"lab/{folder.name}.md"
    assert main(["cards", "--check"]) == 1 and not out.exists()
    assert f"{name} is missing\n" in capsys.readouterr().out
    assert main(["cards"]) == 0 and main(["cards", "--check"]) == 0
    text = (out / name).read_text()
    (out / name).write_text(text + "more\n")
    shutil.copy(out / name, out / "lab" / "gone.md")
    (out / "notes.md").write_text("my own")
    capsys.readouterr()
    assert main(["cards", "--check"]) == 1
    told = f"lab/gone.md is of no recorded run\n{name} is out of date\n"
    assert capsys.readouterr().out == told and (out / name).read_text() != text
    assert main(["cards"]) == 0
    assert (out / name).read_text() == text
    assert (out / "notes.md").exists() and not (out / "lab" / "gone.md").exists()

"""The report: the same files give the same bytes, what is missing is named, and no number is typed."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.signal import fftconvolve

from repro import claims, provenance, report, runs
from repro.__main__ import main
from repro.files import ReproError

PAPER = provenance.ROOT / "paper"
SOURCE = (PAPER / "report.typ").read_text()
CODE, TEXT = SOURCE.split("\n// Text ---", 1)


@pytest.fixture(scope="module")
def committed():
    """The report of the recorded files, set here."""
    return report.build()[0]


@pytest.fixture
def paper(tmp_path):
    """A copy of what the report reads, to be changed; what is large is linked."""
    for path in PAPER.iterdir():
        if path.name in ("figures", "runs"):
            (tmp_path / path.name).mkdir()
            for inner in path.iterdir():
                (tmp_path / path.name / inner.name).symlink_to(inner)
        elif path.is_dir() and path.name in ("values", "bench"):
            shutil.copytree(path, tmp_path / path.name)
        elif path.suffix in (".typ", ".toml"):
            shutil.copy(path, tmp_path)
    return tmp_path


def change(path, key, new=None):
    """Another number at `key` of a JSON file, or none: then the key is removed."""
    record = json.loads(path.read_text())
    *steps, last = key.split(".")
    at = record
    for step in steps:
        at = at[int(step) if isinstance(at, list) else step]
    if new is None:
        del at[last]
    else:
        at[last] = new
    path.write_text(json.dumps(record))


# The same bytes -------------------------------------------------------------------------------------


def test_it_is_the_committed_one_and_the_same_when_repeated(committed, tmp_path):
    assert (PAPER / "report.pdf").read_bytes() == committed, "run: make report"
    assert main(["report", "--out", str(tmp_path / "again.pdf")]) == 0
    assert (tmp_path / "again.pdf").read_bytes() == committed
    assert len(committed) < 3e6


def test_it_is_the_same_from_another_folder_at_another_time(committed, paper, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    assert report.build(paper)[0] == committed


def test_it_has_8_to_12_pages():
    assert 8 <= len(report.build(form="png", ppi=9.0)) <= 12


def test_a_changed_value_and_a_changed_record_change_it(committed, paper):
    key = "values.speed_ups.guided.eps-minsnr5/eps-constant.ratio"
    change(paper / "values/fig1_pixel_ablation.json", key, 9.99)
    changed = report.build(paper)[0]
    assert changed != committed
    run = paper / "runs/lab/imagenet64-vit"
    lab = paper / "runs/lab"
    lab.unlink()
    lab.mkdir()
    for path in (PAPER / "runs/lab").iterdir():
        (lab / path.name).symlink_to(path)
    run.unlink()
    shutil.copytree(PAPER / "runs/lab/imagenet64-vit", run)
    change(run / "run.json", "seconds", 123456.0)
    assert report.build(paper)[0] != changed


# What is missing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "told"),
    [
        ("values/fig2_edm.json", "values.measurements", "fig2_edm.json has no 'measurements' on the way"),
        ("values/claims.json", "values.claims.theorem1", "claims.json has no 'theorem1'"),
        ("values/claims.json", "values.counts.contradicted", "claims.json has no 'contradicted'"),
        ("bench/vit.json", "device", "bench/vit.json has no 'device'"),
    ],
)
def test_a_removed_key_is_an_error_by_name(paper, file, key, told):
    change(paper / file, key)
    with pytest.raises(ReproError, match=re.escape(told)):
        report.build(paper)


def test_a_value_that_is_null_or_no_number_is_an_error(paper):
    path = paper / "values/fig2_edm.json"
    record = json.loads(path.read_text())
    for odd, told in [(None, "has nothing at 'values.measurements'"), ("8", "not a number")]:
        record["values"]["measurements"] = odd
        path.write_text(json.dumps(record))
        with pytest.raises(ReproError, match=told):
            report.build(paper)


@pytest.mark.parametrize("name", ["figures/fig2_edm.pdf", "values/sec2_targets.json", "reported.toml"])
def test_a_missing_file_is_an_error_by_name(paper, name):
    (paper / name).unlink()
    with pytest.raises(ReproError, match=f"{name}.*run make figures"):
        report.build(paper)


def test_without_records_it_is_an_error(paper):
    (paper / "runs/lab").unlink()
    with pytest.raises(ReproError, match="no recorded runs"):
        report.build(paper)


def test_without_typst_the_command_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "typst", None)
    assert main(["report"]) == 1
    assert capsys.readouterr().err == (
        "error: the report is set by typst, which is not installed: run make env\n"
    )


def test_where_it_cannot_be_written_is_named(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert f"error: cannot write {tmp_path}: " in capsys.readouterr().err


# Nothing typed by hand ------------------------------------------------------------------------------

NAMES = (
    r"(Sections?|Figures?|Equations?|Tables?|Theorem)\s+\d+(\.\d+)*((,|\s+and|\s+or|\s+to)\s+\d+(\.\d+)*)*",
    r"Min-SNR-5|EfficientNet-Lite0|64×64|SHA-256|ViT-\w+/2|ICCV 2023|SNR \+ 1|= 1/σ²",
    r"figures/fig1_pixel_ablation.png|imagenet64-vit|imagenet64-eps-minsnr5",
)
"""Names with digits: places in the paper, networks, data, presets."""


def prose(text: str) -> str:
    """The text without strings, comments, what is asked of the files, and names."""
    text = re.sub(r'"[^"\n]*"|(?<!:)//.*', "", text)
    for _ in range(6):  # calls without content, the innermost first: their numbers are decimals and factors
        text = re.sub(r"(?:#|\.|(?<![\w.-]))[a-z][\w.-]*\([^()\[\]]*\)", "", text)
    return re.sub("|".join(NAMES), "", text)


def test_no_number_is_typed_by_hand():
    found = re.findall(r".{0,30}\d.{0,20}", prose(TEXT))
    assert not found, "take these from a file, or add a name to NAMES"


def test_a_typed_number_would_be_found():
    for typed in ("at 7.0 distance", "of #form(a.b(c), 2) and 3 seeds", "(95% interval) ([a], [2 runs])"):
        assert re.search(r"\d", prose(typed)), typed


def test_every_verdict_is_that_of_a_claim():
    words = prose(TEXT)
    for verdict in claims.VERDICTS[1:]:
        assert verdict not in words
    used = set(re.findall(r'#(?:verdict|written-for|judged)\("(\w+)"', TEXT))
    for call in re.findall(r"#judged\(([^)]*)\)|#for id in \(([^)]*)\)", TEXT):
        used |= set(re.findall(r'"(\w+)"', "".join(call)))
    assert len(used) > 25 and used <= {claim.id for claim in claims.load()}


def test_prose_around_a_verdict_that_changes_must_be_read_again(paper):
    change(paper / "values/claims.json", "values.claims.fig1_x0.verdict", "holds at lab scale")
    told = "written for claim fig1_x0 as 'undecided at lab scale', and it is 'holds at lab scale' now"
    with pytest.raises(ReproError, match=told):
        report.build(paper)


def test_every_verdict_that_the_text_shows_is_one_it_was_written_for():
    written = set(re.findall(r'#written-for\("(\w+)"', TEXT))
    for ids in re.findall(r"#for id in \(([^)]*)\) \{ written-for", TEXT):
        written |= set(re.findall(r'"(\w+)"', ids))
    assert set(re.findall(r'#verdict\("(\w+)"', TEXT)) <= written


def likeness(page, image):
    """The greatest correlation of a grey image with a part of a grey page that is as large."""
    of_image, ones = image - image.mean(), np.ones_like(image)
    sums, squares = (fftconvolve(each, ones, "valid") for each in (page, page**2))
    product = fftconvolve(page, of_image[::-1, ::-1], "valid")
    variance = np.maximum(squares - sums**2 / image.size, image.size)
    return (product / np.sqrt(variance * (of_image**2).sum())).max()


def test_pictures_are_of_the_first_sample_seeds():
    """The upper half of each grid, in which the first seed is and the 33rd is not."""
    drawn = [Image.open(io.BytesIO(page)).convert("L") for page in report.build(form="png", ppi=100.0)]
    pages = [np.asarray(page, float) for page in drawn]

    def found(name, seed, page):  # an image is 40 to 41 pixels wide there
        image = Image.fromarray(runs.load_run(f"lab/{name}").samples()[seed]).convert("L")
        return max(likeness(page, np.asarray(image.resize((side, side)), float)) for side in (40, 41))

    page = max(pages, key=lambda page: found("imagenet64-vit", 0, page))
    for name in ("imagenet64-unet", "imagenet64-vit", "imagenet64-latent-vit", "celeba64-unet"):
        assert found(name, 0, page) > 0.9 and found(name, 32, page) < 0.7, name


def test_it_never_calls_our_distance_an_fid():
    for sentence in re.findall(r"[^.]*\bFIDs?\b[^.]*\.", TEXT):
        assert re.search(r"paper|measured|no FID|an FID|is recorded", sentence), sentence


def test_a_training_that_records_share_counts_once(tmp_path):
    """And so does what was measured in it: lines of a record that are another's too say what they share."""
    lines = [
        {"value": value, "images": 10 * value, "seconds": 5.0, "training_seconds": 50.0 * value}
        for value in range(1, 5)
    ]
    records = {  # seconds, and lines: of one training recorded three times, and of another
        "longest": (230.0, lines),
        "whole": (100.0, lines[:2]),
        "middle": (160.0, lines[:3]),
        "other": (30.0, [lines[0] | {"value": 0.5}]),
    }
    for name, (seconds, of_it) in records.items():
        folder = tmp_path / "runs" / "lab" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"seconds": seconds, "processes": 2, "device": name[0]}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_it))
        if name == "other":  # whose first 10 images two more processes saw, in 20 of its seconds
            lines_of_it = folder / "metrics.jsonl"
            lines_of_it.write_text(json.dumps(of_it[0] | {"training_seconds": 20.0}) + "\n")
            record = {"seconds": seconds, "processes": 2, "device": "o", "first_image": 10}
            record["earlier"] = [{"first_image": 0, "processes": 4, "device": "o"}]
            (folder / "run.json").write_text(json.dumps(record))
    found = report.totals(tmp_path)
    # the middle one has 60 after the 100 of the first, and the last 80 after the 150 of the third line
    assert found == {
        "runs": 4, "gpu_seconds": 2 * (30 + 100 + 60 + 80) + 2 * 20, "evaluation_seconds": 25.0,
        "devices": "l, m, o, w",
    }  # fmt: skip

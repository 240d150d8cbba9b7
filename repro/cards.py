"""Model cards and data cards, written from the records alone.

    python -m repro cards            writes paper/cards/<profile>/<run>.md and paper/cards/data/<data set>.md
    python -m repro cards --check    says where they are not what it would write

Headings are those of Model Cards (Mitchell et al. 2019, section 4) and of Datasheets for Datasets (Gebru et
al. 2021, section 3). What a card says of a run is in its run.json and metrics.jsonl; where the images come
from and on what terms is in paper/datasets.toml, names of classes in paper/classes.toml.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import asdict
from pathlib import Path

from repro import config, files, paper, provenance, runs
from repro.files import ReproError

CARDS = provenance.ROOT / "paper" / "cards"
DATASETS = provenance.ROOT / "paper" / "datasets.toml"
CLASSES = provenance.ROOT / "paper" / "classes.toml"

MARK = "<!-- Written by `python -m repro cards` from the records: do not edit. -->"

TARGETS = {"x0": "the clean image", "eps": "the noise", "v": "v", "edm": "EDM's mixture of image and noise"}

MEANINGS = {
    "FD": "Fréchet distance of features of samples to those of real images, smaller is nearer; not on "
    "Inception's features, so no FID, and not to be compared with one",
    "FID": "Fréchet distance on Inception's features, smaller is nearer; of different protocols (in "
    "brackets) not to be compared",
    "precision": "share of samples that are as near to real images as these are to each other",
    "recall": "share of real images that are as near to samples as these are to each other",
    "standard error": "by how much a distance would vary with other samples and other real images",
    "denoising error": "mean squared error of denoised pixels in [-1, 1], or latents, mean over noise levels",
    "accuracy": "share of noisy images whose likeliest class is the right one, mean over noise levels",
    "gradients": "least cosine of the gradients of any two noise levels' losses",
    "reconstruction FD": "Fréchet distance of reconstructed images to the images themselves, smaller is "
    "nearer",
    "reconstruction FID": "Fréchet distance of reconstructed images to the images themselves, on Inception's "
    "features",
    "reconstruction error": "mean absolute error of a pixel, in grey levels of 255",
}
"""What a measure is, by how its name begins; the longest that fits."""

USES = {
    "draws": (
        "To compare loss weights, targets and samplers of diffusion training at the scale of one laboratory",
        "for producing images for use",
    ),
    "classifier": (
        "To guide recorded diffusion networks, as in the ablation of the paper",
        "for classifying images for any other purpose",
    ),
    "autoencoder": (
        "To encode images as the latents that recorded diffusion networks learn, and to decode them",
        "for compressing images for use",
    ),
}
"""What a run is for, and what not, by kind of network."""

MEMORISATION = ("nearest training image", "loss on held-out images", "loss on training images")


def cards(root: str | Path | None = None) -> dict[str, str]:
    """Every card's text, by its path below paper/cards.

    root: folder of recorded runs (see `runs.root_folder`). Raises `ReproError` where a record is broken: no
    run.json that fits, a line of metrics.jsonl without name, number of images or value, a number that is not
    finite, or a file of weights that is missing.
    """
    recorded = [runs.load_run(name, root) for name in runs.names(root)]
    found = {}
    for run in recorded:
        _check(run)
        try:
            found[f"{run.name}.md"] = model_card(run)
        except ReproError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ReproError(f"{run.path / 'metrics.jsonl'} lacks what its card says: {error!r}") from error
    for name in sorted({run.record.data.name for run in recorded}):
        found[f"data/{name}.md"] = data_card(name, [run for run in recorded if run.record.data.name == name])
    return found


def differences(wanted: dict[str, str], out: str | Path | None = None) -> list[str]:
    """What in the folder of cards is not as it would be written, a line for each card."""
    there = _written(Path(out or CARDS))
    told = [f"{name} is missing" for name in wanted if name not in there]
    told += [f"{name} is out of date" for name in wanted if there.get(name, wanted[name]) != wanted[name]]
    return sorted(told + [f"{name} is of no recorded run" for name in there if name not in wanted])


def write(wanted: dict[str, str], out: str | Path | None = None) -> None:
    """Write the cards that are missing or out of date, and remove those of no recorded run."""
    out = Path(out or CARDS)
    there = _written(out)
    for name in wanted:
        if there.get(name) != wanted[name]:
            files.write_atomic(out / name, wanted[name])
    for name in there.keys() - wanted.keys():
        (out / name).unlink()


def _written(out: Path) -> dict[str, str]:
    """The text of each card in a folder, by path below it; files that are no cards of ours are left alone."""
    texts = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.md")}
    return {name: text for name, text in texts.items() if MARK in text}


# Model cards ----------------------------------------------------------------------------------------


def model_card(run: runs.Run) -> str:
    """The model card of a recorded run, as Markdown."""
    return _page(
        {"license": "other", "tags": _tags(run.config)},
        run.name,
        {
            "": [run.config.note] if run.config.note else [],
            "Model details": _list(_details(run)),
            "Intended use": _list(_uses(run.config)),
            "Factors": _list(_factors(run)),
            "Metrics": _list(_metrics(run)),
            "Evaluation data": _list(_evaluation_data(run)),
            "Training data": _list(_training_data(run)),
            "Quantitative analyses": _analyses(run),
            "Memorisation": _list(_memorisation(run)),
            "Ethical considerations": _list([_ethics(run.record.data.name)]),
            "Caveats and recommendations": _list(_limits(run)),
            "Weights": _weights(run),
        },
    )


def _tags(how: config.Config) -> list[str]:
    if how.model.kind not in config.DRAWS:
        return [how.model.kind]
    return list(dict.fromkeys([how.model.kind, "diffusion", how.parameterization, how.weight.name]))


def _details(run: runs.Run) -> list[str]:
    record, how = run.record, run.config
    told = [f"Network: {how.model.kind}, {record.parameters:,} parameters ({_settings(how.model, 'kind')})"]
    if how.model.kind in config.DRAWS:
        factor = f", times min(SNR, {how.min_snr_factor:g}) / SNR" if how.min_snr_factor else ""
        weight = how.weight.name + (f" ({given})" if (given := _settings(how.weight, "name")) else "")
        told.append(
            f"Learns: {TARGETS[how.parameterization]} ({how.parameterization}); loss weight {weight}{factor}"
        )
    if how.model.kind != "autoencoder":
        told.append(f"Noise: {how.schedule.name}")
    if record.imported:
        source = ", ".join(f"{key} {value}" for key, value in record.imported.items())
        return [
            *told,
            f"Imported, not trained here: {source}",
            "Licence: that of its source, not recorded here",
        ]
    execution = [name.removeprefix("train.") for name in runs.EXECUTION]
    told.append(
        f"Training: {record.images:,} images seen of {how.train.images:,} planned, in {record.seconds:,.0f} "
        f"seconds ({_settings(how.train, 'images', *execution)})"
    )
    for part in record.sessions:
        since = f"from {part.first_image:,} images on: " if len(record.sessions) > 1 else ""
        versions = ", ".join(f"{name} {version}" for name, version in part.versions.items())
        told.append(
            f"Trained by: {since}{part.processes} × {part.device}, library {part.code}, "
            f"commit {part.commit}, {versions}"
        )
        if part.from_run:
            hashes = ", ".join(f"`{digest[:8]}…`" for digest in part.from_weights.values())
            told.append(
                f"Began from: weights that were recorded of {part.from_run} (SHA-256 {hashes}), with a new "
                "optimizer; where they are not there any more, look into the git history of its folder"
            )
    terms = _terms(record.data.name)
    told.append(
        f"Licence: that of this repository; the images that it learned have terms of their own: {terms}"
    )
    return told


def _uses(how: config.Config) -> list[str]:
    for_what, not_for = USES["draws" if how.model.kind in config.DRAWS else how.model.kind]
    return [f"{for_what}, and to check what was measured of it", f"Not {not_for}"]


def _factors(run: runs.Run) -> list[str]:
    classes = run.config.data.classes
    told = f"Condition: the class, of {classes}" if classes else "Condition: none"
    if run.config.model.kind == "classifier":
        told = f"Tells apart: {classes} classes"
    elif run.config.model.kind == "autoencoder":
        told = "Condition: none"
    return [
        told,
        "Measured over all images together; not broken down by class or by group of people",
    ]


def _metrics(run: runs.Run) -> list[str]:
    begins = {_meaning(line["name"]) for line in _last_measured(run)}
    return [f"{begin}: {MEANINGS[begin]}" for begin in sorted(begins - {""})] or ["not measured"]


def _meaning(name: str) -> str:
    fitting = [begin for begin in MEANINGS if name.startswith(f"{begin} ") or name == begin]
    return max(fitting, key=len, default="")


def _evaluation_data(run: runs.Run) -> list[str]:
    told = [_against(line) for line in _last_measured(run)]
    return sorted({each for each in told if each}) or ["not measured"]


def _against(line: dict) -> str:
    """The images that a measure is of, or against."""
    about = line.get("reference") or line.get("dataset")
    if not about:
        return ""
    count = about.get("count", line.get("count"))
    images = f"{count:,} images of " if count else ""
    digest = about.get("fingerprint") or about.get("sha256") or "unknown"
    return f"{images}{about['name']} ({digest[:8]})"


def _training_data(run: runs.Run) -> list[str]:
    data, how = run.record.data, run.config.data
    link = f"[{data.name}](../data/{data.name}.md)"
    if run.record.imported:
        return [f"{link}, as others have it: not recorded"]
    told = [
        f"{link}, {data.trained_on:,} of {data.count:,} images; {data.held_out:,} held out",
        f"Resolution: {how.resolution}×{how.resolution}, {how.channels} channels"
        + (", mirrored at random" if how.flip else ""),
        f"Fingerprint: `{data.fingerprint}`",
    ]
    if how.autoencoder:
        told.append(
            f"Learned as latents of {how.autoencoder}: SHA-256 `{data.latents.get('sha256', 'not recorded')}`"
        )
    return told


def _last_measured(run: runs.Run) -> list[dict]:
    """Each measure's lines where it was measured last, with the run's own sample seeds and their number."""
    own, last, found = run.config.evaluate, {}, {}
    for line in run.metrics:
        other = line.get("first_seed", own.first_seed) != own.first_seed
        fewer = _meaning(line["name"]) in ("FD", "FID") and line["samples"] != own.samples
        if line["name"] in MEMORISATION or other or fewer:
            continue
        if line["images"] > last.get(line["name"], -1):
            found = {key: kept for key, kept in found.items() if key[0] != line["name"]}
        last[line["name"]] = max(line["images"], last.get(line["name"], -1))
        if line["images"] == last[line["name"]]:
            about = (line.get("sample"), line.get("ema_halflife_images"), line.get("precision"))
            found[line["name"], json.dumps(about, sort_keys=True)] = line
    return list(found.values())


def _analyses(run: runs.Run) -> list[str]:
    lines = _last_measured(run)
    if not lines:
        return ["not measured"]
    head = ["measure", "value", "images seen", "of", "drawn by", "arithmetic", "against"]
    rows = [
        [
            line["name"],
            "not known" if line["value"] is None else f"{line['value']:.4g}",
            f"{line['images']:,}",
            _samples(line),
            _drawn(line),
            line.get("precision", ""),
            _against(line),
        ]
        for line in lines
    ]
    table = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    kept = (
        f"The last of each measure with the run's own seeds; all {len(run.metrics):,} lines: [metrics.jsonl]"
    )
    return [*table, "", f"{kept}({_folder(run)}/metrics.jsonl)"]


def _samples(line: dict) -> str:
    count = line.get("samples", line.get("count"))
    if "first_seed" in line:
        return f"{count:,} samples, seeds {line['first_seed']} to {line['first_seed'] + count - 1}"
    return f"{count:,} images" if count else ""


def _drawn(line: dict) -> str:
    told = paper.describe_sampler(line["sample"]) if "sample" in line else ""
    if ema := line.get("ema_halflife_images"):
        told += f"; average of the weights over {ema:g} images"
    return told


def _memorisation(run: runs.Run) -> list[str]:
    of_main = [line for line in run.metrics if "ema_halflife_images" not in line]
    last = {line["name"]: line for line in of_main}
    told = []
    if nearest := last.get(MEMORISATION[0]):
        told.append(
            f"Nearest training image: the median distance of {_samples(nearest)} ({_drawn(nearest)}) is "
            f"{nearest['value']:.3g} times that of {nearest['held_out']:,} held-out images, on features of "
            f"{nearest['features']}, after {nearest['images']:,} images; "
            f"{nearest['closer_than_1_percent_of_held_out']:.2%} of the samples are closer than 99% of the "
            f"held-out images. Copies would be closer than nearly all held-out images are"
        )
    else:
        told.append("Nearest training image: not measured")
    held_out, training = (last.get(name) for name in MEMORISATION[1:])
    if held_out and training:
        lines = [line for line in of_main if line["name"] == held_out["name"]]
        least = min(lines, key=lambda line: line["value"])
        told.append(
            f"Loss: {held_out['value']:.4g} on {held_out['count']:,} held-out images and "
            f"{training['value']:.4g} on as many training images, after {held_out['images']:,} images; on "
            f"held-out images it was least, {least['value']:.4g}, after {least['images']:,}. One that rises "
            f"while that on training images falls is a sign of learning by heart"
        )
    else:
        told.append("Loss on held-out and on training images: not measured")
    if not run.record.data.held_out and not run.record.imported:
        told.append("No images were held out, which both measures need")
    return told


def _ethics(name: str) -> str:
    return f"People in the training images: {_about(name).get('people', 'not stated')}"


def _limits(run: runs.Run) -> list[str]:
    record, data = run.record, run.record.data
    told = []
    if record.imported:
        told.append("How it was trained is not recorded here")
    else:
        seed, times = run.config.train.seed, record.images / data.trained_on
        told.append(
            f"One training, with seed {seed}; it saw each of {data.trained_on:,} images {times:,.0f} times"
        )
        if not run.finished:
            told.append(f"It stopped after {record.images:,} of {run.config.train.images:,} planned images")
        if any(part.commit.endswith(("+", "unknown")) for part in record.sessions):
            told.append("A commit does not say all of the code that ran here; the library's hash does")
    if not record.weights:
        told.append(
            "Without weights nothing of it can be drawn or measured again; training it anew gives others"
        )
    if run.config.model.kind in config.DRAWS and record.samples is None:
        told.append("No samples are recorded")
    return told


def _weights(run: runs.Run) -> list[str]:
    if not run.record.weights:
        return ["not recorded"]
    rows = []
    for name, digest in run.record.weights.items():
        # of others' weights, which git does not keep, run.json alone is sure to be here
        size = "" if run.record.imported else f"{_size(run.path / name):,}"
        rows.append(_row([name, size, f"`{digest}`"]))
    return [_row(["file", "bytes", "SHA-256"]), _row(["---"] * 3), *rows]


def _size(path: Path) -> int:
    if not path.is_file():
        raise ReproError(f"{path} is missing; restore it (git checkout), or copy the run folder again")
    return path.stat().st_size


# Data cards -----------------------------------------------------------------------------------------


def data_card(name: str, learned_by: list[runs.Run]) -> str:
    """The data card of the data set `name`, which the recorded runs `learned_by` name, as Markdown."""
    about = _about(name)
    title, origin = about.get("title", name), about.get("origin", "not stated")
    here = [run for run in learned_by if not run.record.imported]
    header = {"license": "other", "pretty_name": title, "tags": ["images"]}
    if "link" in about:
        header["license_link"] = about["link"]
    return _page(
        header,
        f"{name}: {title}" if title != name else name,
        {
            "Motivation": _list(
                ["To train and to measure the recorded runs below, at the scale of one laboratory"]
            ),
            "Composition": _list(_composition(about, here)),
            "Collection process": _list([f"Origin: {origin}"]),
            "Preprocessing, cleaning and labelling": _list([about.get("preparation", "not stated")]),
            "Uses": _list([f"Learned by [{run.name}](../{run.name}.md)" for run in learned_by]),
            "Distribution": _list([f"Licence: {_terms(name)}", "The images are not in this repository"]),
            "Maintenance": _list(
                ["A fingerprint in each record tells whether a copy has the same pixels and labels"]
            ),
        },
    )


def _composition(about: dict, here: list[runs.Run]) -> list[str]:
    told = [f"Content: {about.get('content', 'not stated')}", f"People: {about.get('people', 'not stated')}"]
    if not here:
        return [*told, "Number, fingerprint: not recorded, since no run was trained on it here"]
    for fingerprint in sorted({run.record.data.fingerprint for run in here}):
        some = [run for run in here if run.record.data.fingerprint == fingerprint]
        data = some[0].record.data
        told.append(f"{data.count:,} images; SHA-256 of pixels and labels `{fingerprint}`")
        for held_out in sorted({run.record.data.held_out for run in some}):
            number = sum(run.record.data.held_out == held_out for run in some)
            kept = f"{held_out:,} held out, the same ones in each" if held_out else "none held out"
            told.append(f"Split: {data.count - held_out:,} learned and {kept}, by {number} of the runs below")
    sides = {
        f"{r.config.data.resolution}×{r.config.data.resolution}"
        for r in here
        if not r.config.data.autoencoder
    }
    if sides:
        told.append(f"Resolution: {', '.join(sorted(sides))}")
    if classes := max((run.record.data.classes for run in here), key=len):
        names = _toml(CLASSES)
        told.append(f"Classes: {', '.join(f'{names.get(each, each)} ({each})' for each in classes)}")
    lines = [line for run in here for line in run.metrics if "dataset" in line]
    vals = {_against(line) for line in lines if line["dataset"]["name"] == f"{here[0].record.data.name}-val"}
    told += [f"Val split: {each}, which no run learned" for each in sorted(vals)]
    return told


def _about(name: str) -> dict[str, str]:
    """What datasets.toml says of a data set; nothing where it does not know it."""
    return _toml(DATASETS).get(name, {})


def _terms(name: str) -> str:
    about = _about(name)
    return f"{about['terms']} ({about['link']})" if about else "not stated"


# All cards ------------------------------------------------------------------------------------------


def _check(run: runs.Run) -> None:
    """Raise `ReproError` where what is recorded of a run lacks what a card says, or holds no number."""
    _check_finite(asdict(run.record), f"{run.path / 'run.json'}: ")
    for number, line in enumerate(run.metrics, start=1):
        where = f"{run.path / 'metrics.jsonl'}, line {number}: "
        if lacking := [key for key in ("name", "value", "images") if key not in line]:
            raise ReproError(f"{where}it lacks {', '.join(lacking)}; restore the file")
        _check_finite(line, where)


def _check_finite(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_finite(inner, f"{where}{key} ")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_finite(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ReproError(f"{where}is {value}, not a finite number; restore the file")


def _page(header: dict, title: str, sections: dict[str, list[str]]) -> str:
    """A card: a header in YAML, as Hugging Face has it, a title, and sections by their heading."""
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        "---",
    ]
    lines += [MARK, "", f"# {title}"]
    for heading, content in sections.items():
        lines += ["", f"## {heading}"] if heading else []
        lines += ["", *content] if content else []
    return "\n".join(lines) + "\n"


def _list(items: list[str]) -> list[str]:
    return [f"- {item}" for item in items]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _settings(part: object, *without: str) -> str:
    """The settings of a part of a configuration, in a line; those that are not given are left out."""
    told = []
    for key, value in asdict(part).items():
        if key not in without and value not in (None, (), []):
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            told.append(f"{key} {shown}")
    return ", ".join(told)


def _folder(run: runs.Run) -> str:
    """The way from a run's card to its record."""
    return f"../../runs/{run.name}"


def _toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ReproError(f"{path} cannot be read: {error}; restore it (git checkout)") from error

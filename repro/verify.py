"""Check that the records are whole, that figures follow from them, and that weights still score as recorded.

    python -m repro verify --level records       # a minute: every hash, and what each output was made from
    python -m repro verify                       # minutes: also draws everything anew, and compares
    python -m repro verify --level checkpoints   # on GPUs: draws the samples again, and measures them

Drawn anew, values and tables must be the same to the last digit. A picture must be the same but for what
another build of the drawing libraries does to edges: smoothed, no pixel may differ by more than `PICTURE`. A
PDF has no pixels: where its bytes are others, its PNG speaks for it. Recorded samples are drawn again by the
notebooks themselves, which fail beyond `runs.SAMPLE_TOLERANCE`.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image, ImageFilter

from repro import evaluate, files, notebook, provenance, render, runs, train
from repro.files import ReproError

PICTURE = 24
"""Grey levels of 255 by which a pixel of a picture may differ, smoothed over a few pixels."""

SMOOTHED = 3
"""Pixels: the radius of that smoothing."""

KINDS = {"figures": (".png", ".pdf"), "tables": (".csv", ".md", ".tex"), "values": (".json",)}


@dataclass(frozen=True)
class Finding:
    """What was found about one file, or one run."""

    name: str
    well: bool
    told: str
    measured: dict | None = None
    """Of a distance measured anew: `value`, what is `recorded`, how far they are `apart` and may be
    (`allowed`), relative to what is recorded, and on which `device`; None for what is no number."""


def about(level: str) -> dict:
    """What a report says first: how far the verification went, and by which code."""
    return {
        "level": level,
        "code": provenance.code_version("import repro.verify, repro.evaluate, repro.runs"),
        "commit": train.git_commit(),
        "versions": train.versions(),
    }


def report(findings: list[Finding], about: dict) -> dict:
    """What was found, for a file: how many are well, and of distances how far the farthest is `apart`.

    None where nothing was measured, or where a distance is no number.
    """
    apart = [finding.measured["apart"] for finding in findings if finding.measured]
    return {
        **about,
        "findings": [vars(finding) for finding in findings],
        "count": len(findings),
        "well": sum(finding.well for finding in findings),
        "farthest_apart": max(map(abs, apart)) if apart and None not in apart else None,
    }


def summary(findings: list[Finding]) -> str:
    """One line: how many there are, and those that are not well."""
    bad = [finding for finding in findings if not finding.well]
    if not bad:
        return f"all {len(findings)} are as recorded"
    return f"{len(bad)} of {len(findings)} are not as recorded: " + "; ".join(
        f"{finding.name}: {finding.told}" for finding in bad
    )


# Records ---------------------------------------------------------------------------------------------


def records() -> Iterator[Finding]:
    """Of every recorded run, whether its files are those that its run.json names; of its lines, whether they
    can be read."""
    base = runs.root_folder()
    for name in runs.names():
        folder, problems = base / name, []
        try:
            record = runs.load_run(name).record
            drawn = [one for one in (record.samples, *record.further_samples) if one]
            named = record.weights | {one.file: one.sha256 for one in drawn}
            for file, digest in named.items():
                if not (folder / file).is_file():
                    problems.append(f"{file} is missing")
                elif files.sha256(folder / file) != digest:
                    problems.append(f"{file} is changed")
            for lines in ("metrics.jsonl", "log.jsonl"):
                files.read_lines(folder / lines)
        except ReproError as error:
            problems.append(str(error))
            named = {}
        told = "; ".join(problems) or f"{len(named)} files are those of run.json"
        yield Finding(f"{provenance.relative(folder)}", not problems, told)


def outputs(home: Path | None = None) -> list[Path]:
    """All figures, tables and values in `home` (by default paper/), sorted."""
    home = home or provenance.ROOT / "paper"
    found = [path for kind, ends in KINDS.items() for end in ends for path in (home / kind).glob(f"*{end}")]
    return sorted(found)


def traced(paths: Iterable[Path] | None = None) -> Iterator[Finding]:
    """Of every output, whether all that it was made from is what it was (see `repro.trace`)."""
    from repro import trace

    for path in outputs() if paths is None else paths:
        try:
            found = trace.trace(path)
            told = "; ".join(found.problems) or f"{len(found.compared)} files match, and so does the code"
            yield Finding(provenance.relative(path), not found.problems, told)
        except ReproError as error:
            yield Finding(provenance.relative(path), False, str(error))


# Drawn anew --------------------------------------------------------------------------------------------


def redrawn(ids: Iterable[str], out: Path) -> Iterator[Finding]:
    """Of every output of `ids`, drawn anew into the folder `out`, whether it is the one in paper/."""
    home, owners = provenance.ROOT / "paper", _owners()
    for id in ids:
        try:
            render.render(id, _figures_toml(), out, force=True)
        except ReproError as error:
            yield Finding(id, False, str(error))
            continue
        record = files.read_json(out / "build" / "render" / f"{id}.json")
        made = sorted(name for name in record["outputs"] if not name.endswith(".ipynb"))
        for name in made:
            yield compare(home / name, out / name, name)
        for name in sorted(set(owners.get(id, ())) - set(made)):
            yield Finding(name, False, "is not drawn any more: remove it")


def _figures_toml() -> Path:
    return provenance.ROOT / "paper" / "figures.toml"


def _owners() -> dict[str | None, list[str]]:
    """What lies in paper/ by the output of figures.toml that saved it, as notebook and parameters tell.

    Under None those that none of them saves.
    """
    from repro import paper

    home, known, found = provenance.ROOT / "paper", {}, {}
    for id in render.ids(_figures_toml()):
        output = render.find(id, _figures_toml())
        usual = notebook.check_parameters(output.notebook, output.parameters)
        known[provenance.relative(output.notebook), json.dumps(usual, sort_keys=True)] = id
    for path in outputs(home):
        carrier = path.with_suffix(".md") if path.suffix == ".csv" else path
        with contextlib.suppress(ReproError, OSError, ValueError):  # which `traced` tells
            record = paper.read_provenance(carrier)
            place = (record.get("notebook") or {}).get("path")
            id = known.get((place, json.dumps(record.get("parameters"), sort_keys=True)))
            found.setdefault(id, []).append(path.relative_to(home).as_posix())
    return found


def strays() -> Iterator[Finding]:
    """What lies in paper/ and is saved by no output of figures.toml."""
    for name in _owners().get(None, ()):
        yield Finding(name, False, "no output of figures.toml saves it: remove it, or render it")


def compare(committed: Path, made: Path, name: str) -> Finding:
    """Whether what was made anew is what is committed."""
    if not committed.is_file():
        return Finding(name, False, "is made, but is not in paper/")
    if committed.read_bytes() == made.read_bytes():
        return Finding(name, True, "the same bytes")
    if made.suffix == ".json":
        apart = list(_different(_values(committed), _values(made), "values"))
        return Finding(name, not apart, "; ".join(apart[:3]) or "the same values")
    if made.suffix == ".png":
        return Finding(name, *_pictures(committed, made))
    if made.suffix == ".pdf":
        well, told = _pictures(committed.with_suffix(".png"), made.with_suffix(".png"))
        return Finding(name, well, f"other bytes; as a .png: {told}")
    apart = [line for line in zip(_text(committed), _text(made), strict=False) if line[0] != line[1]]
    if not apart and len(_text(committed)) == len(_text(made)):
        return Finding(name, True, "the same table")
    told = f"{apart[0][0]!r} is {apart[0][1]!r} now" if apart else "has another number of rows"
    return Finding(name, False, told)


def _values(path: Path) -> object:
    return json.loads(path.read_text())["values"]


def _text(path: Path) -> list[str]:
    """The lines of a table without that of its provenance."""
    return [line for line in path.read_text().splitlines() if " repro: {" not in line]


def _different(a: object, b: object, key: str) -> Iterator[str]:
    """The keys at which two values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if name not in a or name not in b:
                yield f"{key}.{name} is {'new' if name not in a else 'gone'}"
            else:
                yield from _different(a[name], b[name], f"{key}.{name}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _different(one, other, f"{key}.{i}")
    elif a != b:
        yield f"{key} is {json.dumps(b)[:60]}, not {json.dumps(a)[:60]}"


def _pictures(committed: Path, made: Path) -> tuple[bool, str]:
    """Whether two pictures are the same to the eye."""
    pair = []
    for path in (committed, made):
        with Image.open(path) as image:
            pair.append(image.convert("RGB"))
    if pair[0].size != pair[1].size:
        return False, f"{' x '.join(map(str, pair[1].size))} pixels, not {' x '.join(map(str, pair[0].size))}"
    if pair[0].tobytes() == pair[1].tobytes():
        return True, "the same pixels"
    smooth = [np.asarray(image.filter(ImageFilter.BoxBlur(SMOOTHED)), np.int16) for image in pair]
    largest = int(np.abs(smooth[0] - smooth[1]).max())
    told = f"smoothed, pixels differ by up to {largest} of 255 grey levels"
    return largest <= PICTURE, f"{told}; {PICTURE} are allowed"


# Measured anew -------------------------------------------------------------------------------------------


def tolerance() -> float:
    """By how much a distance measured anew may differ, relative to the recorded one.

    Two drawings of as many samples from other seeds differ by less with a probability of 95%, if distances
    vary as much as the upper end of the 95% interval says that Section 4.4's notebook found. The same seeds
    are drawn, so only rounding, on another GPU say, should make a difference.
    """
    values = files.read_json(provenance.used(provenance.ROOT / "paper" / "values" / "sec4_4_seeds.json"))
    return 1.96 * math.sqrt(2) * values["values"]["intervals"]["sampling"][1]


def measurable(names: Iterable[str] | None = None) -> list[str]:
    """Those of the recorded runs, or of `names`, whose distance can be measured anew.

    Runs without weights or a distance, such as a classifier, are left out, but not what cannot be read: that
    is found when it is measured. Where they are named, all these raise `ReproError`, as an unknown name does.
    """
    found = []
    for name in runs.names() if names is None else names:
        try:
            recorded = runs.load_run(name)
            lines = _own_lines(recorded)
        except ReproError:
            if names is not None:
                raise
            found.append(name)
            continue
        if lines and recorded.record.weights:
            found.append(name)
        elif names is not None:
            what = "weights" if lines else "distance of its own sampler"
            raise ReproError(f"{name} has no recorded {what}, so there is nothing to measure anew")
    return found


def remeasured(
    names: Iterable[str] | None = None, device: str = "cuda", batch: int = 500
) -> Iterator[Finding]:
    """Of every recorded run with weights, or of those named, the last distance of its own sampler, anew.

    From the weights on the disk, with as many samples of the same seeds in the same precision. A run that
    cannot be measured, for want of a file or of memory say, is a finding. Raises what `measurable` does.
    """
    allowed, place = tolerance(), train.find_place(device)
    for name in measurable(names):
        try:
            yield _remeasure(name, allowed, place.device, batch)
        except Exception as error:  # whatever it is, the other runs can be measured
            told = str(error) if isinstance(error, ReproError) else f"{type(error).__name__}: {error}"
            yield Finding(name, False, told)


def _remeasure(name: str, allowed: float, device: str | torch.device, batch: int) -> Finding:
    recorded = runs.load_run(name)
    line, config = _own_lines(recorded)[-1], recorded.config
    how = replace(config.evaluate, samples=line["samples"], first_seed=line["first_seed"])
    found = evaluate.evaluate(
        recorded.denoiser(device),
        replace(config, sample=recorded.sample, evaluate=how),
        recorded.record.data.fingerprint,
        line["images"],
        device,
        line["precision"],
        batch,
    )[0]
    apart = found["value"] / line["value"] - 1
    told = (
        f"{line['name']} {found['value']:.2f}, recorded {line['value']:.2f}: {apart:+.2%} "
        f"({allowed:.2%} allowed)"
    )
    measured = {"value": found["value"], "recorded": line["value"], "apart": apart, "allowed": allowed}
    measured = {key: number if math.isfinite(number) else None for key, number in measured.items()}
    return Finding(
        name, bool(abs(apart) <= allowed), told, measured | {"device": evaluate.device_name(device)}
    )


def shared_out(names: Iterable[str] | None, devices: Sequence[str]) -> Iterator[Finding]:
    """What `remeasured` finds, a run at a time on each of the `devices`, by commands of their own.

    In the order in which they end. Raises what `measurable` does. A command that fails is a finding: its
    last words.
    """
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def one(name: str) -> Finding:
        device = free.get()
        try:
            with tempfile.TemporaryDirectory() as folder:
                report = Path(folder) / "report.json"
                command = [sys.executable, "-m", "repro", "verify", name, "--level", "checkpoints"]
                command += ["--device", device, "--report", str(report)]
                ended = subprocess.run(command, capture_output=True, text=True)
                found = files.read_json(report)["findings"] if report.is_file() else []
            last = (ended.stdout + ended.stderr).strip().splitlines()[-1:] or ["it said nothing"]
            return Finding(**found[0]) if found else Finding(name, False, f"measuring it failed: {last[0]}")
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            for ended in as_completed([pool.submit(one, name) for name in measurable(names)]):
                yield ended.result()
        finally:
            pool.shutdown(cancel_futures=True)  # when stopped, do not go on to the other runs


def _own_lines(recorded) -> list[dict]:
    """Its recorded distances by its own sampler, of its final weights; none of what draws no images."""
    if recorded.config.model.kind in ("autoencoder", "classifier"):
        return []
    return [
        line
        for line in recorded.distances(recorded.sample)
        if line["images"] == recorded.record.images
        and line["samples"] == recorded.config.evaluate.samples
        and line["first_seed"] == recorded.config.evaluate.first_seed
    ]

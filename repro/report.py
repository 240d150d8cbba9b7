"""The replication report: `paper/report.typ`, set by typst into a PDF.

The text reads its numbers, verdicts and figures from the files beside it; what it needs of all records
together is summed here. What is missing is an error. No clock and no font of the system is asked: the same
files give the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from repro import files, provenance, runs
from repro.files import ReproError

PAPER = provenance.ROOT / "paper"

DATE = 1704067200
"""Seconds since 1970, as in `render`: any fixed date."""


def totals(paper: Path = PAPER) -> dict[str, object]:
    """How many runs are recorded, and what training and measuring them took.

    Raises `ReproError` where there is no record, or one that lacks what is summed.
    """
    found = {"runs": 0, "gpu_seconds": 0.0, "evaluation_seconds": 0.0}
    records = []
    for path in sorted(paper.glob("runs/lab/*/run.json")):
        record = files.read_json(path)
        if absent := [key for key in ("seconds", "processes", "device") if key not in record]:
            raise ReproError(f"{path} has no {absent[0]!r}")
        metrics = path.with_name("metrics.jsonl")
        records.append((record, metrics.read_text().splitlines() if metrics.is_file() else []))
    known: set[str] = set()
    for record, lines in sorted(records, key=lambda each: each[0]["seconds"]):
        # a line that a shorter record has too is of a training that both share, up to there
        shared = [json.loads(line).get("training_seconds") or 0 for line in lines if line in known]
        found["runs"] += 1
        sessions = [*record.get("earlier", ()), record]
        parts = [(part.get("first_image", 0), part["processes"]) for part in sessions]
        own = [json.loads(line) for line in lines]
        found["gpu_seconds"] += runs.gpu_seconds(parts, record["seconds"], own, max(shared, default=0.0))
        new = [json.loads(line).get("seconds") or 0 for line in lines if line not in known]
        found["evaluation_seconds"] += sum(new)
        known |= set(lines)
    devices = {record["device"] for record, _ in records}
    if not found["runs"]:
        raise ReproError(f"there are no recorded runs in {paper / 'runs'}")
    return {**found, "devices": ", ".join(sorted(devices))}


def build(paper: Path = PAPER, form: str = "pdf", ppi: float | None = None) -> list[bytes]:
    """The report of the folder `paper`, as one PDF, or with `form` "png" as a picture of each page.

    Raises `ReproError` where typst is not installed, and naming file and key where a value or figure is
    missing.
    """
    try:
        import typst
    except ImportError:
        raise ReproError("the report is set by typst, which is not installed: run make env") from None
    source = paper / "report.typ"
    if not source.is_file():
        raise ReproError(f"{source} is missing")
    try:
        made, warnings = typst.compile_with_warnings(
            str(source),
            root=str(paper),
            ignore_system_fonts=True,
            format=form,
            ppi=ppi,
            sys_inputs={"totals": json.dumps(totals(paper))},
            timestamp=DATE,
        )
    except typst.TypstError as error:
        raise ReproError(f"{source} cannot be set: {_told(error)}") from None
    if warnings:
        raise ReproError(f"{source} is set with a warning: {warnings[0].message}")
    return made if isinstance(made, list) else [made]


def _told(error: Exception) -> str:
    """What typst says, in our words where `panic` in report.typ said it."""
    message = getattr(error, "message", str(error))
    if ours := re.fullmatch(r'panicked with: "(.*)"', message, re.DOTALL):
        return f"{ours[1]}; run make figures"
    return f"{message}; where files are missing, run make figures"


def write(out: Path | None = None, paper: Path = PAPER) -> Path:
    """Write the report's PDF, whole or not at all; by default to paper/report.pdf.

    Raises `ReproError` as `build` does, and where it cannot be written there.
    """
    out = out or paper / "report.pdf"
    files.write_atomic(out, build(paper)[0])
    return out

"""What the paper claims, and what the recorded values say of it.

`paper/claims.toml` holds every claim of the supplement, in its order, as a table by id: where it stands,
what it says, what evidence is possible here, and a test on one file of `paper/values/`. Numbers of the paper
are named by their key in `paper/reported.toml`, never repeated. No verdict is written down: `verdict`
computes it.

A key is the dotted way to a number, as in README.md; -1 is the last of a list. `*` stands for every entry,
`name=text` for those of a list whose `name` is `text`; after another one, for those of them that are so too.
`KEY / KEY` and `KEY / 1e6` are quotients. What `differs` may show values: `{KEY}`, or `{KEY|FORMAT}`.
"""

from __future__ import annotations

import json
import math
import operator
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from scipy import stats

from repro import provenance
from repro.files import ReproError
from repro.notebook import near

CLAIMS = provenance.ROOT / "paper" / "claims.toml"
REPORTED = provenance.ROOT / "paper" / "reported.toml"

VERDICTS = (
    "holds",
    "holds at lab scale",
    "undecided at lab scale",
    "fails at lab scale",
    "contradicted",
    "not testable here",
)
"""Undecided: the interval of a measurement holds both what the claim says and its contrary."""

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "below": operator.lt,
    "at least": operator.ge,
    "at most": operator.le,
}

CONFIDENCE = 0.95
"""Of the intervals made here, from a `deviation`."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Claim:
    """One table of claims.toml."""

    id: str
    place: str
    """In the supplement, such as `Section 1, Equation 7`."""
    says: str
    evidence: Literal["mathematics", "recomputed here", "lab scale", "none"]
    paper: Sequence[str] = ()
    """Keys of the paper's numbers in reported.toml."""
    values: str | None = None
    """Which file of paper/values, by id."""
    key: str | None = None
    """Of our number or numbers, of which each must pass."""
    compare: Literal["equal", "above", "below", "at least", "at most", "true"] | None = None
    than: float | str | None = None
    """A number, or its key in the same file; by default the paper's number, the last of `paper`."""
    tolerance: float | None = None
    """How far from it is equal; or `relative`, as a share of it."""
    relative: float | None = None
    intervals: Sequence[str] = ()
    """Keys of the number's confidence intervals, [low, high]: each must lie on the claimed side."""
    deviation: str | None = None
    """Key of the relative standard deviation of each of two measurements, where there are no intervals."""
    freedom: str | None = None
    """Key of the degrees of freedom with which that was found."""
    seeds: str | None = None
    """Key of a list with an entry for each seed."""
    sources: Sequence[str] = ("runs/*",)
    """Patterns of files in paper/ that the numbers are of, among those that the values were made from."""
    differs: str | None = None
    """In what our measurement differs from the paper's."""
    why: str | None = None
    """Why there is no evidence here."""

    @property
    def tested(self) -> bool:
        """Whether there is a test."""
        return self.evidence != "none"


@dataclass(frozen=True)
class Verdict:
    """A claim beside what is recorded of it."""

    id: str
    place: str
    says: str
    evidence: str
    paper: str
    """The paper's numbers; empty where it gives none."""
    here: str
    """Ours, with their intervals; empty where there are none."""
    test: str
    verdict: str
    remark: str
    """What differs from the paper's measurement, or why nothing can be tested."""
    values: str | None
    key: str | None
    notebook: str | None
    sources: dict[str, str]
    """SHA-256 of the files that the numbers are of, by path: weights of runs, records of runs without."""


# Reading --------------------------------------------------------------------------------------------


def load(path: str | Path = CLAIMS) -> list[Claim]:
    """The claims, in their order; raises `ReproError` naming claim and key where the file is not sound."""
    path = provenance.used(path)
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:  # which names an id that is there twice
        raise ReproError(f"{path} cannot be read: {error}") from None
    return [_claim(id, table, path.name) for id, table in tables.items()]


def _claim(id: str, table: object, file: str) -> Claim:
    where = f"{file}, [{id}]"
    if not isinstance(table, dict):
        raise ReproError(f"{file}: {id!r} must be a table [{id}]")
    known = [field.name for field in fields(Claim) if field.name != "id"]
    for key in table:
        if key not in known:
            raise ReproError(f"{where}: unknown key {key!r}. {near(key, known)}")
    try:
        claim = Claim(id=id, **table)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise ReproError(f"{where}: {told}") from None
    if problem := _unsound(claim, table):
        raise ReproError(f"{where}: {problem}")
    return claim


def _unsound(claim: Claim, table: dict) -> str | None:
    """What is wrong with a claim whose keys are each as they should be."""
    for key in (*claim.paper, claim.deviation or "", claim.freedom or "", claim.seeds or ""):
        if re.search("[*=]", key):
            return f"{key!r} must be the key of one thing"
    if not claim.tested:
        extra = [key for key in table if key not in ("place", "says", "evidence", "paper", "why")]
        if extra:
            return f"without evidence it can have no {', '.join(extra)}"
        return None if claim.why else "without evidence it needs a `why`"
    if lacking := [key for key in ("values", "key", "compare") if getattr(claim, key) is None]:
        return f"its test lacks {', '.join(lacking)}"
    if claim.why:
        return "`why` is for claims without evidence; say what `differs`"
    if [claim.tolerance, claim.relative].count(None) != (1 if claim.compare == "equal" else 2):
        return "`equal`, and nothing else, needs one of `tolerance` and `relative`"
    if (claim.intervals or claim.deviation) and claim.compare not in OPERATORS:
        return f"`{claim.compare}` takes no intervals: compare by one of {', '.join(OPERATORS)}"
    if claim.intervals and claim.deviation:
        return "it needs `intervals` or a `deviation`, not both"
    if bool(claim.deviation) != bool(claim.freedom):
        return "a `deviation` needs its degrees of `freedom`, and these a deviation"
    if claim.seeds and not claim.intervals:
        return "`seeds` says of how many the `intervals` are; give these"
    if (claim.intervals or claim.deviation) and claim.evidence != "lab scale":
        return "intervals and deviations are of measurements: its evidence would be `lab scale`"
    if claim.evidence == "lab scale" and not claim.differs:
        return "evidence at lab scale needs `differs`"
    if claim.compare == "true" and claim.than is not None:
        return "`true` compares with nothing"
    if claim.compare != "true" and claim.than is None and not claim.paper:
        return "without `than` it is compared with the paper's number: give the key of it in `paper`"
    return None


def read_reported(path: str | Path = REPORTED) -> dict:
    """The paper's numbers; raises `ReproError` where the file cannot be read."""
    path = provenance.used(path)
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ReproError(f"{path} cannot be read: {error}") from None


def _read_values(claim: Claim, folder: Path) -> dict:
    path = provenance.used(folder / f"{claim.values}.json")
    if not path.is_file():
        raise ReproError(f"claim {claim.id} needs {path}, which is missing; run make figures")
    try:
        record = json.loads(path.read_text())
        about = {key: record["provenance"][key] for key in ("id", "notebook", "parameters", "runs", "files")}
        if about["id"] != claim.values:
            raise ValueError(f"it is of {about['id']}")
        return {"values": record["values"], "provenance": about}
    except (ValueError, KeyError, TypeError) as error:
        raise ReproError(f"claim {claim.id}: {path} holds no values ({error!r}); run make figures") from None


def look_up(tree: object, key: str, where: str) -> list:
    """All that lies at `key` (see above) of nested dictionaries and lists.

    Raises `ReproError`, which begins with `where`, for a step that leads nowhere.
    """
    found = [tree]
    for step in key.split("."):
        name, equals, text = step.partition("=")
        following = []
        for one in found:
            if step == "*" and isinstance(one, (dict, list)) and one:
                following += one.values() if isinstance(one, dict) else one
            elif isinstance(one, dict) and step in one:
                following.append(one[step])
            elif equals and isinstance(one, (dict, list)):
                entries = one if isinstance(one, list) else [one]
                following += [
                    each for each in entries if isinstance(each, dict) and str(each.get(name)) == text
                ]
            elif isinstance(one, list) and one and re.fullmatch(r"-1|\d+", step) and int(step) < len(one):
                following.append(one[int(step)])
            else:
                following = []
                break
        if not following:
            known = f" {near(step, [*found[0]])}" if isinstance(found[0], dict) else ""
            raise ReproError(f"{where} has no {step!r} on the way {key!r}.{known}")
        found = following
    return found


def numbers(tree: dict, reference: str, where: str) -> list[float]:
    """The numbers that `reference`, a key or a quotient of two, names; `ReproError` for anything else."""
    above, slash, below = reference.partition(" / ")
    found = [_number(value, above, where) for value in look_up(tree, above, where)]
    if not slash:
        return found
    try:
        by = [float(below)]
    except ValueError:
        by = [_number(value, below, where) for value in look_up(tree, below, where)]
    if 0 in by:
        raise ReproError(f"{where}: {below!r} is 0, and nothing can be divided by it")
    return [x / y for x, y in _pairs(found, by, where)]


def _number(value: object, key: str, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        hint = f"; {key}.* would be its entries" if isinstance(value, (list, dict)) else ""
        shown = json.dumps(value)
        shown = shown if len(shown) < 60 else f"{shown[:56]} ..."
        raise ReproError(f"{where}: {key!r} is {shown}, not a finite number{hint}")
    return float(value)


def _pairs(first: list[float], second: list[float], where: str) -> list[tuple[float, float]]:
    """Each of `first` with its own of `second`, or all with the one that is there."""
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ReproError(f"{where}: {len(first)} numbers cannot be held against {len(second)}")
    count = max(len(first), len(second))
    return list(zip(first * (count // len(first)), second * (count // len(second)), strict=True))


# Testing --------------------------------------------------------------------------------------------


def verdicts(claims: list[Claim], reported: dict, folder: str | Path) -> list[Verdict]:
    """What the values in `folder` say of each claim.

    Raises `ReproError`, naming claim, file and key, where a value is missing or no finite number.
    """
    return [verdict(claim, reported, Path(folder)) for claim in claims]


def verdict(claim: Claim, reported: dict, folder: Path) -> Verdict:
    """What the values in `folder` say of one claim; raises `ReproError` as `verdicts` does."""
    told = {name: getattr(claim, name) for name in ("id", "place", "says", "evidence", "values", "key")}
    told["paper"] = _told_paper(claim, reported)
    if not claim.tested:
        untested = {"verdict": "not testable here", "remark": claim.why, "notebook": None, "sources": {}}
        return Verdict(**told, **untested, here="", test="")
    record = _read_values(claim, folder)
    values, about = record["values"], record["provenance"]
    where = f"claim {claim.id}: values/{claim.values}.json"
    if claim.compare == "true":
        passed, here, test = _all_true(claim, values, where)
    else:
        ours = numbers(values, claim.key, where)
        theirs, named = _theirs(claim, values, reported, where)
        pairs = _pairs(ours, theirs, where)
        if claim.compare == "equal":
            passed, more = _equal(claim, pairs)
            bound = f"{claim.relative:g} of it" if claim.tolerance is None else f"{claim.tolerance:g}"
            test = f"equal to {named}" + (f", to {bound}" if bound != "0" else "")
        else:
            passed, more = _ordered(claim, pairs, values, about, where)
            test = f"{claim.compare} {named}"
        here = _span(ours) + more
    lab = " at lab scale" if claim.evidence == "lab scale" else ""
    names = {True: f"holds{lab}", False: f"fails{lab}" if lab else "contradicted", None: f"undecided{lab}"}
    return Verdict(
        **told,
        here=here,
        test=test,
        verdict=names[passed],
        remark=_filled(claim.differs or "", values, where),
        notebook=(about["notebook"] or {}).get("path"),
        sources=_sources(claim, about, where),
    )


def _all_true(claim: Claim, values: dict, where: str) -> tuple[bool, str, str]:
    found = look_up(values, claim.key, where)
    if odd := [value for value in found if type(value) is not bool]:
        raise ReproError(f"{where}: {claim.key!r} is {json.dumps(odd[0])}, not true or false")
    return all(found), ", ".join("yes" if value else "no" for value in found), "yes"


def _theirs(claim: Claim, values: dict, reported: dict, where: str) -> tuple[list[float], str]:
    """What the claim's number is held against, and how to say it."""
    if claim.than is None:
        found = numbers(reported, claim.paper[-1], f"claim {claim.id}: reported.toml")
        return found, f"the paper's {_span(found)}"
    if isinstance(claim.than, str):
        found = numbers(values, claim.than, where)
        return found, f"{claim.than} ({_span(found)})"
    return [claim.than], f"{claim.than:g}"


def _equal(claim: Claim, pairs: list[tuple[float, float]]) -> tuple[bool, str]:
    """Whether each of `pairs` is equal to the claim's tolerance, and by how much they are apart."""
    apart = [abs(x - y) for x, y in pairs]
    if claim.tolerance is not None:
        return max(apart) <= claim.tolerance, f", {max(apart):.2g} apart at most" if any(apart) else ""
    if not all(y for _, y in pairs):
        raise ReproError(f"claim {claim.id}: nothing is within a share of 0; give a `tolerance`")
    shares = [gap / abs(y) for gap, (_, y) in zip(apart, pairs, strict=True)]
    return max(shares) <= claim.relative, f", {max(shares):.2g} of it apart at most" if any(apart) else ""


def _ordered(
    claim: Claim, pairs: list[tuple[float, float]], values: dict, about: dict, where: str
) -> tuple[bool | None, str]:
    """Whether each of `pairs` is in the order claimed (None: its interval reaches to both sides), and why."""
    order = OPERATORS[claim.compare]
    if claim.intervals:
        return _by_intervals(claim, pairs, values, about, where)
    if claim.deviation:
        (deviation,) = numbers(values, claim.deviation, where)
        if deviation <= 0 or min(map(min, pairs)) <= 0:
            raise ReproError(f"{where}: with {claim.deviation!r}, a share, all numbers must be above 0")
        (freedom,) = numbers(values, claim.freedom, where)
        if freedom < 1:
            raise ReproError(f"{where}: {claim.freedom!r}, degrees of freedom, must be 1 or more")
        spread = math.exp(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(2) * deviation)
        bounds = [(x / y / spread, x / y * spread) for x, y in pairs]
        sides = [_side(order, low, high, 1.0) for low, high in bounds]
        told = f", {_span([x / y for x, y in pairs])} times the other, {CONFIDENCE:.0%} interval "
        told += ", ".join(f"{low:.3g} to {high:.3g}" for low, high in bounds)
        passed = False if False in sides else None if None in sides else True
        return passed, f"{told} ({freedom:g} degrees of freedom)"
    once = ", no interval: measured once" if claim.evidence == "lab scale" else ""
    return all(order(x, y) for x, y in pairs), once


def _by_intervals(
    claim: Claim, pairs: list[tuple[float, float]], values: dict, about: dict, where: str
) -> tuple[bool | None, str]:
    """`_ordered` by recorded intervals: they must all lie on the claimed side, or all on the other."""
    if len(pairs) != 1:
        raise ReproError(f"{where}: intervals are of one number, and {claim.key!r} names {len(pairs)}")
    ((number, bound),) = pairs
    bounds = [numbers(values, f"{key}.*", where) for key in claim.intervals]
    for key, each in zip(claim.intervals, bounds, strict=True):
        if len(each) != 2 or not each[0] <= number <= each[1]:
            raise ReproError(f"{where}: {key!r} is no interval [low, high] that holds {claim.key!r}")
    (confidence,) = numbers(about["parameters"] or {}, "confidence", f"{where}, parameters of its notebook,")
    told = f", {confidence:.0%} interval " + " and ".join(f"{low:.3g} to {high:.3g}" for low, high in bounds)
    if claim.seeds:
        (seeds,) = look_up(values, claim.seeds, where)
        if not isinstance(seeds, list) or len(seeds) < 2:
            raise ReproError(f"{where}: {claim.seeds!r} is no list with an entry for each of several seeds")
        told += f", {len(seeds)} seeds"
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    return _side(OPERATORS[claim.compare], low, high, bound), told


def _side(order: Callable[[float, float], bool], low: float, high: float, bound: float) -> bool | None:
    """Whether an interval lies on the claimed side of `bound`; None where it reaches to both."""
    sides = {order(low, bound), order(high, bound)}
    return sides.pop() if len(sides) == 1 else None


def _sources(claim: Claim, about: dict, where: str) -> dict[str, str]:
    """SHA-256 of the files that the claim's patterns name: of a run its weights, else its record."""
    known = {path: digest for path, digest in about["files"].items() if not path.startswith("paper/runs/")}
    for name, weights in about["runs"].items():
        folder = f"paper/runs/{name}"
        files = weights or {"run.json": about["files"][f"{folder}/run.json"]}
        known |= {f"{folder}/{file}": digest for file, digest in files.items()}
    found = {}
    for pattern in claim.sources:
        some = {path: digest for path, digest in known.items() if fnmatch(path, f"paper/{pattern}")}
        if not some:
            raise ReproError(f"{where} was made from no file paper/{pattern}; there are {', '.join(known)}")
        found |= some
    return found


# Telling --------------------------------------------------------------------------------------------


def counts(found: list[Verdict]) -> dict[str, int]:
    """How many claims have each verdict, in the order of `VERDICTS`; keys that README.md can name."""
    return {name.replace(" ", "_"): sum(one.verdict == name for one in found) for name in VERDICTS}


def tell(found: list[Verdict]) -> str:
    """The verdicts as text for a terminal, grouped by place, and how many there are of each."""
    lines, place = [], None
    width = max(map(len, VERDICTS)) + 2
    for one in found:
        if one.place != place:
            lines += ["", one.place]
            place = one.place
        lines.append(f"  {one.verdict:{width}}{one.id}: {one.says}")
        said = {"paper": one.paper, "here": one.here, "test": one.test, "note": one.remark}
        said |= {"notebook": one.notebook, "from": tell_sources(one)}
        lines += [f"  {'':{width}}{name}: {text}" for name, text in said.items() if text]
    total = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts(found).items())
    return "\n".join([*lines[1:], "", f"{len(found)} claims: {total}"])


def tell_sources(one: Verdict) -> str:
    """Runs and other files that a verdict rests on, each with the first digits of its hashes."""
    return ", ".join(f"{name} {digits}" for name, (_, digits) in places(one).items())


def places(one: Verdict) -> dict[str, tuple[str, str]]:
    """Folder of each run, or other file, that a verdict rests on, and first digits of its hashes, by name."""
    found: dict[str, tuple[str, str]] = {}
    for path, digest in one.sources.items():
        folder, _, file = path.rpartition("/")
        name = folder.removeprefix("paper/runs/")
        if name == folder:
            name = folder = path
        elif file == "run.json":
            name += " (record)"
        found[name] = folder, f"{found[name][1]} {digest[:8]}" if name in found else digest[:8]
    return found


def _told_paper(claim: Claim, reported: dict) -> str:
    """The paper's numbers, each with the last part of its key: but one alone that ours is held against, or
    that nothing is."""
    shown = {}
    for key in claim.paper:
        where = f"claim {claim.id}: reported.toml"
        (value,) = numbers(reported, key, where) if " / " in key else look_up(reported, key, where)
        if isinstance(value, dict):
            raise ReproError(f"{where}: {key!r} is a table; name a number in it")
        parts = value if isinstance(value, list) else [value]
        shown[key] = ", ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
    if len(shown) == 1 and claim.than is None:
        return shown.popitem()[1]
    return "; ".join(f"{key.rpartition('.')[2].replace('_', ' ')} = {text}" for key, text in shown.items())


def _filled(text: str, values: dict, where: str) -> str:
    """`text` with the values that it names in braces."""

    def one(match: re.Match) -> str:
        key, _, form = match[1].partition("|")
        found = numbers(values, key, where) if form else look_up(values, key, where)
        return ", ".join(dict.fromkeys(format(value, form) for value in found))

    return re.sub(r"\{([^{}]+)\}", one, text)


def _span(found: list[float]) -> str:
    """A number, or the least and the largest of several."""
    low, high = min(found), max(found)
    if len(found) == 1:
        return f"{low:.4g}"
    return (
        f"{low:.4g} (all {len(found)})" if low == high else f"{low:.4g} to {high:.4g} ({len(found)} numbers)"
    )

"""How much sooner one way of training reaches a distance than another, and how sure that is.

A curve is the distance over the images seen, of one training run. Several seeds of the same way give
several curves; their spread is what a difference must be measured against.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from repro.files import ReproError

Curve = tuple[Sequence[float], Sequence[float]]
"""Images seen, ascending, and the distance at each."""


def images_to_reach(curve: Curve, target: float) -> float:
    """Images after which a curve first is at or below `target`, straight between points in log-log.

    Infinite where it never is. NaN where it is so from its first point on: when it was reached is not known
    then. Raises `ReproError` for a curve that is not positive and ascending in images.
    """
    images, values = (np.asarray(numbers, float) for numbers in curve)
    if len(images) != len(values) or len(images) < 2 or (np.diff(images) <= 0).any() or images[0] <= 0:
        raise ReproError("a curve needs two points or more, in ascending order of images")
    if not target > 0 or not (values > 0).all():
        raise ReproError("distances must be positive to be compared in logarithms")
    below = np.flatnonzero(values <= target)
    if len(below) == 0:
        return math.inf
    after = below[0]
    if after == 0:
        return math.nan
    x, y = np.log(images[after - 1 : after + 1]), np.log(values[after - 1 : after + 1])
    return float(np.exp(x[0] + (math.log(target) - y[0]) / (y[1] - y[0]) * (x[1] - x[0])))


@dataclass(frozen=True)
class SpeedUp:
    """How many times fewer images `fast` needs than `slow` to reach `target`: with a confidence interval."""

    target: float
    ratio: float
    low: float
    high: float
    seeds_fast: int
    seeds_slow: int
    confidence: float
    verdict: str
    """`faster`, `slower` or `undecided`: whether 1 lies outside the interval, and on which side."""


def speed_up(
    ways: Mapping[str, Sequence[Curve]],
    fast: str,
    slow: str,
    target: float,
    confidence: float = 0.95,
    paired: bool = False,
) -> SpeedUp | None:
    """Images that `slow` needs over those that `fast` needs, to reach `target` (geometric means of seeds).

    The interval is Student's t on ln(images): Welch's, for seeds that are independent and ways that may vary
    differently; or `paired`, of the differences between curves of one place in their lists, for ways that
    share what a seed decides, such as the order of the data. Where either has one seed, nothing is known
    (how much a time varies depends on how flat the curve is, so others' spread says little): it goes from 0
    to infinity, and the verdict is `undecided`. None where either does not reach the target with every seed,
    or was there at its first measurement. Raises `ReproError` for a confidence outside (0, 1), and for pairs
    of unequal lists.
    """
    if not 0 < confidence < 1:
        raise ReproError(f"confidence must lie in (0, 1), not {confidence}")
    if paired and len(ways[fast]) != len(ways[slow]):
        raise ReproError(f"seeds of {fast} and {slow} cannot be paired: {len(ways[fast])}, {len(ways[slow])}")
    logs = [np.log([images_to_reach(curve, target) for curve in ways[way]]) for way in (fast, slow)]
    if not all(np.isfinite(values).all() for values in logs):
        return None
    difference, half = float(logs[1].mean() - logs[0].mean()), math.inf
    if all(len(values) > 1 for values in logs):
        # squared standard errors of what is subtracted, and their degrees of freedom
        parts = [logs[1] - logs[0]] if paired else logs
        errors = np.array([values.var(ddof=1) / len(values) for values in parts])
        each = np.array([len(values) - 1 for values in parts])
        freedom = errors.sum() ** 2 / (errors**2 / each).sum() if errors.any() else each.sum()
        half = float(stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(errors.sum()))
    verdict = "undecided" if abs(difference) <= half else "faster" if difference > 0 else "slower"
    low, ratio, high = (float(np.exp(value)) for value in (difference - half, difference, difference + half))
    return SpeedUp(target, ratio, low, high, len(logs[0]), len(logs[1]), confidence, verdict)


def targets(ways: Mapping[str, Sequence[Curve]], count: int) -> np.ndarray:
    """Distances at which all curves can be compared, geometrically spaced, the highest first.

    From the best that all reach up to that which one has at its first measurement, left out. Empty where
    there is none between the two.
    """
    best = common_target(ways)
    first = min(values[0] for curves in ways.values() for _, values in curves)
    return np.geomspace(first, best, count + 1)[1:] if best < first else np.empty(0)


def speed_ups(
    ways: Mapping[str, Sequence[Curve]],
    fast: str,
    slow: str,
    count: int,
    confidence: float = 0.95,
    paired: bool = False,
) -> list[SpeedUp]:
    """`speed_up` at each of `count` `targets` of the two where there is one.

    paired: whether their curves are of the same seeds, in the same order; then each interval reaches as far
    as Welch's and that of pairs together, and its verdict is what both say.
    """
    both = {way: ways[way] for way in (fast, slow)}
    found = []
    for target in targets(both, count):
        one = speed_up(both, fast, slow, target, confidence)
        if one and paired:
            other = speed_up(both, fast, slow, target, confidence, paired=True)
            low, high = min(one.low, other.low), max(one.high, other.high)
            one = replace(one, low=low, high=high, verdict=_agreed(one, other))
        if one:
            found.append(one)
    return found


def decided_from(found: Sequence[SpeedUp]) -> float | None:
    """The distance from which on, to the last of `found`, each verdict is that of the last.

    None where there is none, or the last is undecided. found: as `speed_ups` gives them, early in training
    first.
    """
    if not found or found[-1].verdict == "undecided":
        return None
    same = itertools.takewhile(lambda one: one.verdict == found[-1].verdict, reversed(found))
    return [one.target for one in same][-1]


def _agreed(one: SpeedUp, other: SpeedUp | None) -> str:
    """The verdict of both intervals; `undecided` where they differ."""
    return one.verdict if other is None or other.verdict == one.verdict else "undecided"


def common_target(ways: Mapping[str, Sequence[Curve]], share: float = 1.0) -> float:
    """A distance that all curves reach: the worst of their best values, over `share` in (0, 1].

    With share 1 the slowest curve reaches it at its best point only.
    """
    if not 0 < share <= 1:
        raise ReproError(f"share must lie in (0, 1], not {share}")
    return max(min(values) for curves in ways.values() for _, values in curves) / share


def band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, and geometric mean, lowest and highest of the distances of several seeds.

    Raises `ReproError` where the curves were not measured at the same images.
    """
    images = np.asarray(curves[0][0], float)
    if any(len(other) != len(images) or (np.asarray(other, float) != images).any() for other, _ in curves):
        raise ReproError("curves of several seeds must be measured at the same images")
    logs = np.log([values for _, values in curves])
    return images, np.exp(logs.mean(0)), np.exp(logs.min(0)), np.exp(logs.max(0))


def leads_from(fast: Sequence[Curve], slow: Sequence[Curve]) -> float | None:
    """Images from which on, up to the end, the mean curve of `fast` is below that of `slow`; else none.

    Measured where both were: raises `ReproError` where they were measured at other images.
    """
    images, one, *_ = band(fast)
    others, other, *_ = band(slow)
    if len(images) != len(others) or (images != others).any():
        raise ReproError("curves that are compared must be measured at the same images")
    behind = np.flatnonzero(one >= other)
    after = 0 if len(behind) == 0 else behind[-1] + 1
    return float(images[after]) if after < len(images) else None


@dataclass(frozen=True)
class Pair:
    """All that is said of one way of training beside another (see `pair`)."""

    fast: str
    slow: str
    target: float
    """Distance at which they are compared: the best that all seeds of both reach."""
    ends: tuple[float, float]
    """Last distance of each, geometric means over seeds."""
    early: tuple[str, ...]
    """Which of them are at `target` from their first measurement on, so that there is no ratio."""
    speed_up: SpeedUp | None
    paired: SpeedUp | None
    """The same with the interval of pairs of seeds; none where the seeds of the two are not the same."""
    leads_from: float | None
    """Images from which on, to the end, `fast` is below `slow` in the mean; none where not in the end."""

    @property
    def sure(self) -> bool:
        """Whether there is an interval: both have several seeds."""
        return self.speed_up is not None and math.isfinite(self.speed_up.high)

    @property
    def verdict(self) -> str | None:
        """What both intervals say; `undecided` where they do not agree, none without an interval."""
        return _agreed(self.speed_up, self.paired) if self.sure else None

    def cells(self) -> dict[str, str]:
        """What a table shows of the pair."""
        found = self.speed_up
        ratio = (
            f"{found.ratio:.2f}"
            if found
            else f"none: {', '.join(self.early)} there from the first measurement"
        )
        interval = _span(found) if self.sure else "unknown" if found else ""
        return {
            "arm": self.fast,
            "beside": self.slow,
            "last distance": f"{self.ends[0]:.1f}",
            "that beside": f"{self.ends[1]:.1f}",
            "at the distance": f"{self.target:.1f}",
            "speed-up": ratio,
            "interval": interval,
            "by pairs of seeds": (_span(self.paired) if self.paired else "not the same seeds")
            if self.sure
            else "",
            "verdict": self.verdict or "",
            "leads from (million images)": "never"
            if self.leads_from is None
            else f"{self.leads_from / 1e6:.2f}",
        }

    def sentence(self, distance: str) -> str:
        """The same in words, without a full stop; distance: what its numbers are called."""
        found, at = self.speed_up, f"{distance} {self.target:.1f}"
        says = f"**{self.fast} beside {self.slow}**: "
        if found is None:
            says += (
                f"{distance} {self.ends[0]:.0f} and {self.ends[1]:.0f} at the end; there is no ratio, for at "
            )
            says += f"{self.target:.1f} or below from the first measurement: {', '.join(self.early)}"
        elif self.sure:
            says += {"undecided": "undecided by these seeds"}.get(self.verdict, self.verdict)
            says += f"; the other needs {found.ratio:.2f} times as many images ({_span(found)}"
            pairs = (
                f"by pairs of seeds {_span(self.paired)}" if self.paired else "their seeds are not the same"
            )
            says += f"; {pairs}) to {at}"
        else:
            says += (
                f"the other needs {found.ratio:.2f} times as many images to {at}; as not both have several "
            )
            says += "seeds, how sure that is, is not known"
        if self.leads_from is None:
            return f"{says}; it is not ahead at the end"
        mean = " in the mean" if found and max(found.seeds_fast, found.seeds_slow) > 1 else ""
        return f"{says}; it is ahead{mean} at each measurement from {self.leads_from / 1e6:.2f}M images on"

    def values(self) -> dict:
        """The same as numbers, for `paper.save_values`; none where something is not known."""
        found = self.speed_up
        return {
            "target": self.target,
            "ends": list(self.ends),
            "leads_from": self.leads_from,
            "ratio": found and found.ratio,
            "interval": [found.low, found.high] if self.sure else None,
            "paired": [self.paired.low, self.paired.high] if self.sure and self.paired else None,
            "verdict": self.verdict,
        }


def _span(found: SpeedUp) -> str:
    return f"{found.low:.2f} to {found.high:.2f}"


def pair(
    ways: Mapping[str, Sequence[Curve]], fast: str, slow: str, confidence: float = 0.95, paired: bool = False
) -> Pair:
    """How much sooner `fast` is where `slow` is: at the best distance that all seeds of both reach.

    paired: whether the curves of the two are of the same seeds, in the same order. `speed_up` says how the
    intervals are found. Raises `ReproError` as it and `leads_from` do.
    """
    target = common_target({way: ways[way] for way in (fast, slow)})
    return Pair(
        fast,
        slow,
        target,
        ends=tuple(float(band(ways[way])[1][-1]) for way in (fast, slow)),
        early=tuple(way for way in (fast, slow) if any(values[0] <= target for _, values in ways[way])),
        speed_up=speed_up(ways, fast, slow, target, confidence),
        paired=speed_up(ways, fast, slow, target, confidence, paired=True) if paired else None,
        leads_from=leads_from(ways[fast], ways[slow]),
    )


def pooled_deviation(groups: Mapping[str, Sequence[float]]) -> float | None:
    """Standard deviation of ln(value) within groups, pooled over those of two or more; none without any."""
    logs = [np.log(values) for values in groups.values() if len(values) > 1]
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in logs)
    freedom = pooled_freedom(groups)
    return math.sqrt(squares / freedom) if freedom else None


def pooled_freedom(groups: Mapping[str, Sequence[float]]) -> int:
    """With how many degrees of freedom `pooled_deviation` finds it: each group's values but one."""
    return sum(len(values) - 1 for values in groups.values() if len(values) > 1)


def deviation_at(ways: Mapping[str, Sequence[Curve]], point: int) -> float | None:
    """`pooled_deviation` of the distances of several ways at one measurement, by its place along the curves.

    Raises `IndexError` where a curve has no such place.
    """
    return pooled_deviation({way: [values[point] for _, values in curves] for way, curves in ways.items()})


def deviation_interval(deviation: float, freedom: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a standard deviation that was found with so many degrees of freedom.

    Of normally distributed values: freedom * deviation^2 / variance is chi-squared. Raises `ReproError` for a
    confidence outside (0, 1) and less than one degree of freedom.
    """
    if not 0 < confidence < 1:
        raise ReproError(f"confidence must lie in (0, 1), not {confidence}")
    if freedom < 1:
        raise ReproError(f"a deviation needs a degree of freedom or more, not {freedom}")
    high, low = stats.chi2.ppf([(1 - confidence) / 2, (1 + confidence) / 2], freedom)
    return float(deviation * math.sqrt(freedom / low)), float(deviation * math.sqrt(freedom / high))

"""How much sooner one way of training reaches a distance than another, and how sure that is.

A curve is the distance over the images seen, of one training run. Several seeds of the same way give
several curves; their spread is what a difference must be measured against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def spread(ways: Mapping[str, Sequence[Curve]], target: float) -> tuple[float, int] | None:
    """Standard deviation of ln(images to reach `target`) over seeds, pooled over ways, and its degrees of
    freedom. Where the seeds of a way do not all reach the target, it is taken where they last all are: at
    the lowest distance that all of them reach. None where nothing is known of any.
    """
    logs_of = {}
    for way, curves in ways.items():
        if len(curves) < 2:
            continue
        logs = np.log([images_to_reach(curve, target) for curve in curves])
        if not np.isfinite(logs).all():
            lowest = common_target({way: curves})
            logs = np.log([images_to_reach(curve, lowest) for curve in curves])
        if np.isfinite(logs).all():  # or one is below the best of another from its first point on
            logs_of[way] = logs
    return _pooled(logs_of)


def speed_up(
    ways: Mapping[str, Sequence[Curve]], fast: str, slow: str, target: float, confidence: float = 0.95
) -> SpeedUp | None:
    """Images that `slow` needs over those that `fast` needs, to reach `target` (geometric means of seeds).

    The interval is Student's t, with the spread over seeds pooled over all `ways`: a way trained with one
    seed is taken to vary as the others do. Seeds count as independent: where ways share what a seed decides,
    such as the order of the data, it is wider than it need be. Where no way has several, nothing is
    known of it: it goes from 0 to infinity, and the verdict is `undecided`. None where either does not reach
    the target with every seed, or was there at its first measurement.
    """
    if not 0 < confidence < 1:
        raise ReproError(f"confidence must lie in (0, 1), not {confidence}")
    logs = [np.log([images_to_reach(curve, target) for curve in ways[way]]) for way in (fast, slow)]
    if not all(np.isfinite(values).all() for values in logs):
        return None
    difference = float(logs[1].mean() - logs[0].mean())
    half = math.inf
    if (known := spread(ways, target)) is not None:
        deviation, freedom = known
        half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * deviation
        half *= math.sqrt(1 / len(logs[0]) + 1 / len(logs[1]))
    verdict = "undecided" if abs(difference) <= half else "faster" if difference > 0 else "slower"
    low, ratio, high = (float(np.exp(value)) for value in (difference - half, difference, difference + half))
    return SpeedUp(target, ratio, low, high, len(logs[0]), len(logs[1]), confidence, verdict)


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


def pooled_deviation(groups: Mapping[str, Sequence[float]]) -> float | None:
    """Standard deviation of ln(value) within groups, pooled over those of two or more; none without any."""
    known = _pooled({group: np.log(values) for group, values in groups.items()})
    return known and known[0]


def _pooled(groups: Mapping[str, np.ndarray]) -> tuple[float, int] | None:
    """Standard deviation within groups, pooled over those of two or more, and its degrees of freedom."""
    several = [values for values in groups.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
    return (math.sqrt(squares / freedom), freedom) if freedom else None

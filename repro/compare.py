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

    Infinite where it never is. NaN where it is so from its first point on: then it was reached at an
    unknown earlier time. Raises `ReproError` for a curve that is not positive and ascending in images.
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
        return images[0] if values[0] == target else math.nan
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


def spread(ways: Mapping[str, Sequence[Curve]], target: float) -> tuple[float, int]:
    """Standard deviation of ln(images to reach `target`) over seeds, pooled over ways, and its degrees of
    freedom. Only ways with two or more seeds that all reach the target count.

    Raises `ReproError` where there are none.
    """
    squares, freedom = 0.0, 0
    for curves in ways.values():
        logs = np.log([images_to_reach(curve, target) for curve in curves])
        if len(logs) >= 2 and np.isfinite(logs).all():
            squares += float(((logs - logs.mean()) ** 2).sum())
            freedom += len(logs) - 1
    if freedom == 0:
        raise ReproError(f"no way of training reached {target:g} with two seeds or more: no spread is known")
    return math.sqrt(squares / freedom), freedom


def speed_up(
    ways: Mapping[str, Sequence[Curve]], fast: str, slow: str, target: float, confidence: float = 0.95
) -> SpeedUp | None:
    """Images that `slow` needs over those that `fast` needs, to reach `target` (geometric means of seeds).

    The interval is Student's t, with the spread over seeds pooled over all `ways`: a way trained with one
    seed is taken to vary as the others do. Seeds count as independent: where ways share what a seed decides,
    such as the order of the data, it is wider than it need be. None where either does not reach the target
    with every seed, or was below it from its first measurement on.
    """
    if not 0 < confidence < 1:
        raise ReproError(f"confidence must lie in (0, 1), not {confidence}")
    logs = [np.log([images_to_reach(curve, target) for curve in ways[way]]) for way in (fast, slow)]
    if not all(np.isfinite(values).all() for values in logs):
        return None
    deviation, freedom = spread(ways, target)
    difference = float(logs[1].mean() - logs[0].mean())
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * deviation
    half *= math.sqrt(1 / len(logs[0]) + 1 / len(logs[1]))
    verdict = "undecided" if abs(difference) <= half else "faster" if difference > 0 else "slower"
    low, ratio, high = (math.exp(value) for value in (difference - half, difference, difference + half))
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

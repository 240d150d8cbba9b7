"""Speed-ups and their intervals: on curves whose answer is known, and by how often intervals hold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from repro import compare
from repro.files import ReproError

IMAGES = [2.0 ** (n / 2) * 1e5 for n in range(8)]


def power(scale: float, exponent: float = -0.7):
    """A curve that is a line in log-log; every distance is reached `scale` times later than with scale 1."""
    return IMAGES, [30 * (images / 1e5 / scale) ** exponent for images in IMAGES]


@given(
    scale=st.floats(0.5, 2), exponent=st.floats(-2, -0.1), where=st.floats(1.01, 11)
)  # in units of 1e5 images
def test_the_images_to_reach_a_distance_are_exact_on_lines_in_log_log(scale, exponent, where):
    target = 30 * (where / scale) ** exponent
    assert compare.images_to_reach(power(scale, exponent), target) == pytest.approx(where * 1e5, rel=1e-9)


def test_a_distance_that_is_never_or_always_reached_is_told_apart():
    curve = power(1)
    assert compare.images_to_reach(curve, min(curve[1]) * 0.99) == math.inf
    assert math.isnan(compare.images_to_reach(curve, max(curve[1]) * 1.01))
    assert math.isnan(compare.images_to_reach(curve, max(curve[1])))  # reached then, or earlier
    assert compare.images_to_reach(curve, min(curve[1])) == pytest.approx(IMAGES[-1])


def test_the_first_time_counts_where_a_curve_rises_again():
    curve = ([1.0, 2.0, 3.0, 4.0], [40.0, 20.0, 30.0, 10.0])
    assert compare.images_to_reach(curve, 20.0) == 2
    # reached after the rise only
    expected = 3 * (4 / 3) ** (math.log(15 / 30) / math.log(10 / 30))
    assert compare.images_to_reach(curve, 15.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "curve, message",
    [
        (([1.0], [2.0]), "two points"),
        (([1.0, 1.0], [2.0, 1.0]), "ascending"),
        (([2.0, 1.0], [2.0, 1.0]), "ascending"),
        (([1.0, 2.0], [2.0, 0.0]), "positive"),
        (([1.0, 2.0, 3.0], [2.0, 1.0]), "two points"),
    ],
)
def test_what_is_no_curve_is_refused(curve, message):
    with pytest.raises(ReproError, match=message):
        compare.images_to_reach(curve, 1.5)


def test_a_speed_up_and_its_interval_by_hand():
    fast, slow = [1.0, 1.1, 1.25], [2.0, 2.2, 2.1]
    ways = {"fast": [power(s) for s in fast], "slow": [power(s) for s in slow], "alone": [power(1.5)]}
    found = compare.speed_up(ways, "fast", "slow", 15.0)
    logs = [np.log(fast), np.log(slow)]
    parts = [values.var(ddof=1) / 3 for values in logs]
    half = stats.t.ppf(0.975, sum(parts) ** 2 / sum(part**2 / 2 for part in parts)) * math.sqrt(sum(parts))
    center = logs[1].mean() - logs[0].mean()
    expected = [math.exp(center + sign * half) for sign in (-1, 0, 1)]
    assert [found.low, found.ratio, found.high] == pytest.approx(expected, rel=1e-9)
    assert (found.verdict, found.seeds_fast, found.seeds_slow) == ("faster", 3, 3)
    assert compare.speed_up(ways, "slow", "fast", 15.0).verdict == "slower"
    pairs = stats.ttest_rel(logs[1], logs[0]).confidence_interval(0.95)
    found = compare.speed_up(ways, "fast", "slow", 15.0, paired=True)
    assert [found.low, found.high] == pytest.approx(np.exp([pairs.low, pairs.high]), rel=1e-9)
    with pytest.raises(ReproError, match="cannot be paired: 3, 1"):
        compare.speed_up(ways, "fast", "alone", 15.0, paired=True)
    # with one seed of either, how sure it is, is not known, whatever other ways vary by
    for pair in (("fast", "alone"), ("alone", "fast")):
        one = compare.speed_up(ways, *pair, 15.0)
        assert (one.low, one.high, one.verdict) == (0, math.inf, "undecided")


@given(factor=st.floats(0.2, 5))
def test_a_speed_up_depends_on_no_unit_of_distance(factor):
    ways = {"a": [power(1), power(1.1)], "b": [power(2), power(2.3)]}
    scaled = {way: [(x, [factor * value for value in y]) for x, y in curves] for way, curves in ways.items()}
    one, other = compare.speed_up(ways, "a", "b", 15.0), compare.speed_up(scaled, "a", "b", 15.0 * factor)
    assert (other.low, other.ratio, other.high) == pytest.approx((one.low, one.ratio, one.high), rel=1e-9)


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=5), st.lists(st.floats(-1, 1), min_size=2, max_size=5),
    st.floats(0.5, 0.999),
)  # fmt: skip
def test_the_interval_is_scipys_of_welch(one, other, confidence):
    one[0] += 0.1 * (np.ptp(one) < 1e-3)  # Welch's is not defined without any spread, nor exact with little
    other[0] += 0.1 * (np.ptp(other) < 1e-3)
    ways = {way: [power(math.exp(s)) for s in shifts] for way, shifts in (("a", one), ("b", other))}
    found = compare.speed_up(ways, "a", "b", 30 * 3.3**-0.7, confidence)
    expected = stats.ttest_ind(other, one, equal_var=False).confidence_interval(confidence)
    assert np.log([found.low, found.high]) == pytest.approx([expected.low, expected.high], rel=1e-6, abs=1e-6)


def test_without_any_spread_the_interval_is_one_point():
    found = compare.speed_up({"a": [power(1)] * 2, "b": [power(2)] * 2}, "a", "b", 15.0)
    assert (found.low, found.high) == (pytest.approx(2), pytest.approx(2))


@pytest.mark.parametrize("spreads, paired, holds", [
    ((0.1, 0.1), False, (0.95, 0.98)),  # Welch's is on the safe side with so few seeds
    ((0.18, 0.036), False, (0.93, 0.97)),  # as Figure 1's, where pooling the two would hold less often
    ((0.1, 0.1), True, (0.93, 0.97)),
])  # fmt: skip
def test_two_ways_that_do_not_differ_are_told_apart_as_rarely_as_said(spreads, paired, holds):
    """Of many studies with three seeds and no difference, so many of the 95% intervals hold 1."""
    random, studies, held = np.random.default_rng(0), 2000, 0
    for _ in range(studies):
        common = random.normal(0, 0.2, 3) * paired  # what a seed does to both
        ways = {
            way: [power(math.exp(s)) for s in common + random.normal(0, spread, 3)]
            for way, spread in zip("ab", spreads, strict=True)
        }
        held += compare.speed_up(ways, "a", "b", 15.0, paired=paired).verdict == "undecided"
    assert holds[0] < held / studies < holds[1]


def test_targets_go_from_the_first_measurement_to_the_best_that_all_reach():
    ways = {"a": [power(1), power(1.1)], "b": [power(2)]}
    found = compare.targets(ways, 5)
    assert len(found) == 5 and found[-1] == pytest.approx(compare.common_target(ways))
    assert found[0] < power(1)[1][0] and (np.diff(np.log(found)) < 0).all()
    np.testing.assert_allclose(np.diff(np.log(found)), np.log(found[1] / found[0]))
    assert all(compare.speed_up(ways, "a", "b", at) for at in found)
    risen = (IMAGES, [10.0] + [20.0] * 7)
    assert len(compare.targets({**ways, "risen": [risen]}, 5)) == 0


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_that_is_none_is_refused(confidence):
    ways = {"a": [power(1), power(1.1)], "b": [power(2), power(2.1)]}
    with pytest.raises(ReproError, match="confidence"):
        compare.speed_up(ways, "a", "b", 15.0, confidence)


def test_a_curve_with_a_hole_is_refused():
    with pytest.raises(ReproError, match="positive"):
        compare.images_to_reach(([1.0, 2.0, 3.0], [math.nan, 20.0, 10.0]), 15.0)


def test_without_an_answer_there_is_none():
    ways = {"a": [power(1), power(1.1)], "b": [power(9), power(9.1)]}
    assert compare.speed_up(ways, "a", "b", min(power(1.1)[1]) * 1.001) is None  # b never reaches it


def test_a_common_target_is_one_that_all_reach():
    ways = {"a": [power(1), power(1.1)], "b": [power(3)]}
    target = compare.common_target(ways)
    assert target == min(power(3)[1])
    assert all(
        math.isfinite(compare.images_to_reach(curve, target)) for way in ways.values() for curve in way
    )
    assert compare.common_target(ways, 0.8) == pytest.approx(target / 0.8)
    with pytest.raises(ReproError, match="share"):
        compare.common_target(ways, 0.0)


def test_a_band_is_the_geometric_mean_and_the_extremes():
    images, middle, low, high = compare.band([power(1), power(4)])
    np.testing.assert_allclose(images, IMAGES)
    np.testing.assert_allclose(middle, power(2)[1])
    np.testing.assert_allclose(low, power(1)[1])
    np.testing.assert_allclose(high, power(4)[1])
    with pytest.raises(ReproError, match="same images"):
        compare.band([power(1), (IMAGES[:-1], power(1)[1][:-1])])


def test_without_several_seeds_nothing_is_known_of_the_interval():
    found = compare.speed_up({"fast": [power(1)], "slow": [power(2)]}, "fast", "slow", 15.0)
    assert (found.ratio, found.low, found.high) == (pytest.approx(2), 0, math.inf)
    assert found.verdict == "undecided"


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_way_leads_from_after_the_last_point_where_it_was_behind(first, second):
    fast = np.full(8, 10.0)
    slow = np.full(8, 11.0)
    fast[[first, second]] = 11.0, 12.0  # as far, and farther
    last = max(first, second)
    expected = None if last == 7 else IMAGES[last + 1]
    assert compare.leads_from([(IMAGES, fast.tolist())], [(IMAGES, slow.tolist())]) == expected
    assert compare.leads_from([(IMAGES, [9.0] * 8)], [(IMAGES, slow.tolist())]) == IMAGES[0]


def test_the_mean_over_seeds_decides_who_leads():
    behind = [(IMAGES, [10.0] * 8)]
    ahead = [(IMAGES, [5.0] * 8), (IMAGES, [19.0] * 8)]  # geometric mean 9.7
    assert compare.leads_from(ahead, behind) == IMAGES[0]
    with pytest.raises(ReproError, match="same images"):
        compare.leads_from([(IMAGES[1:], [10.0] * 7)], behind)


def test_the_pooled_deviation_by_hand():
    groups = {"a": [2.0, 2.2, 1.9], "b": [7.0, 8.0], "alone": [3.0]}
    squares = 2 * np.log(groups["a"]).var(ddof=1) + np.log(groups["b"]).var(ddof=1)
    assert compare.pooled_deviation(groups) == pytest.approx(math.sqrt(squares / 3))
    assert compare.pooled_deviation({"alone": [3.0]}) is None
    assert compare.pooled_freedom(groups) == 3 and compare.pooled_freedom({"alone": [3.0], "none": []}) == 0


def test_the_deviation_at_one_measurement():
    ways = {"a": [power(1), power(1.2)], "b": [power(3)]}
    at = [np.log([values[2] for _, values in curves]) for curves in ways.values()]
    assert compare.deviation_at(ways, 2) == pytest.approx(at[0].std(ddof=1))
    assert compare.deviation_at({"b": ways["b"]}, 2) is None
    with pytest.raises(IndexError):
        compare.deviation_at(ways, 8)


@pytest.mark.parametrize("freedom, confidence", [(2, 0.95), (8, 0.8)])
def test_the_interval_of_a_deviation_holds_as_often_as_said(freedom, confidence):
    deviations = np.random.default_rng(0).normal(size=(4000, freedom + 1)).std(axis=1, ddof=1) * 3
    bounds = np.array([compare.deviation_interval(found, freedom, confidence) for found in deviations])
    held = ((bounds[:, 0] < 3) & (3 < bounds[:, 1])).mean()
    assert abs(held - confidence) < 4 * math.sqrt(confidence * (1 - confidence) / 4000)
    # as often too high as too low
    assert (bounds[:, 0] >= 3).mean() == pytest.approx((1 - confidence) / 2, abs=0.015)


@pytest.mark.parametrize("freedom, confidence, message", [(0, 0.95, "degree"), (2, 95.0, "confidence")])
def test_a_deviation_of_nothing_has_no_interval(freedom, confidence, message):
    with pytest.raises(ReproError, match=message):
        compare.deviation_interval(1.0, freedom, confidence)


def test_speed_ups_are_those_at_each_target_with_the_wider_of_two_intervals():
    ways = {"fast": [power(1), power(1.1)], "slow": [power(2), power(2.1)]}
    points = compare.targets(ways, 6)
    alone = compare.speed_ups(ways, "fast", "slow", 6)
    assert alone == [compare.speed_up(ways, "fast", "slow", at) for at in points]
    pairs = [compare.speed_up(ways, "fast", "slow", at, paired=True) for at in points]
    for wider, one, other in zip(
        compare.speed_ups(ways, "fast", "slow", 6, paired=True), alone, pairs, strict=True
    ):
        assert (wider.low, wider.high) == (min(one.low, other.low), max(one.high, other.high))
        assert (wider.ratio, one.verdict, other.verdict, wider.verdict) == (
            one.ratio, "faster", "faster", "faster",
        )  # fmt: skip
    against = {
        "fast": [power(s) for s in (1.0, 1.05, 1.1, 1.15)],
        "slow": [power(s) for s in (1.35, 1.3, 1.25, 1.2)],
    }
    verdicts = [
        {found.verdict for found in compare.speed_ups(against, "fast", "slow", 6, paired=paired)}
        for paired in (False, True)
    ]
    assert verdicts == [{"faster"}, {"undecided"}]
    ways["risen"] = [(IMAGES, [10.0] + [20.0] * 7)]
    assert compare.speed_ups(ways, "fast", "risen", 6) == []


def test_a_verdict_is_decided_from_where_it_stays():
    def found(*verdicts):
        return [
            compare.SpeedUp(100.0 - n, 1.0, 1.0, 1.0, 2, 2, 0.95, verdict)
            for n, verdict in enumerate(verdicts)
        ]

    assert compare.decided_from(found("slower", "slower")) == 100
    assert compare.decided_from(found("slower", "undecided", "faster", "slower", "slower")) == 97
    assert compare.decided_from(found("undecided", "faster")) == 99
    assert compare.decided_from(found("slower", "undecided")) is None  # one seed, say
    assert compare.decided_from([]) is None


def test_a_pair_says_all_that_is_known_of_two_ways():
    ways = {"fast": [power(1), power(1.1)], "slow": [power(2), power(2.2)], "alone": [power(1.05)]}
    found = compare.pair(ways, "fast", "slow")
    assert found.target == min(power(2.2)[1])
    assert found.speed_up == compare.speed_up(ways, "fast", "slow", found.target)
    assert found.ends == pytest.approx([power(math.sqrt(a * b))[1][-1] for a, b in ((1, 1.1), (2, 2.2))])
    assert (found.early, found.leads_from, found.sure) == ((), IMAGES[0], True)
    up = found.speed_up
    assert found.cells() == {
        "arm": "fast",
        "beside": "slow",
        "last distance": f"{found.ends[0]:.1f}",
        "that beside": f"{found.ends[1]:.1f}",
        "at the distance": f"{found.target:.1f}",
        "speed-up": "2.00",
        "interval": f"{up.low:.2f} to {up.high:.2f}",
        "by pairs of seeds": "not the same seeds",
        "verdict": "faster",
        "leads from (million images)": "0.10",
    }
    assert found.sentence("FD") == (
        f"**fast beside slow**: faster; the other needs 2.00 times as many images "
        f"({up.low:.2f} to {up.high:.2f}; their seeds are not the same) to FD {found.target:.1f}; "
        "it is ahead in the mean at each measurement from 0.10M images on"
    )
    assert found.values() == {
        "target": found.target,
        "ends": list(found.ends),
        "leads_from": IMAGES[0],
        "ratio": up.ratio,
        "interval": [up.low, up.high],
        "paired": None,
        "verdict": "faster",
    }
    back = compare.pair(ways, "slow", "fast")
    assert (back.leads_from, back.cells()["verdict"], back.cells()["leads from (million images)"]) == (
        None, "slower", "never",
    )  # fmt: skip
    assert back.sentence("FD").endswith("it is not ahead at the end")
    near = compare.pair({**ways, "near": [power(1.05), power(1)]}, "fast", "near")
    assert near.sentence("FD").startswith("**fast beside near**: undecided by these seeds")


def test_a_verdict_is_what_both_intervals_say():
    """Seeds that move two ways apart: taken as independent these are told apart, in pairs not."""
    one, other = [1.0, 1.05, 1.1, 1.15], [1.35, 1.3, 1.25, 1.2]
    ways = {"fast": [power(s) for s in one], "slow": [power(s) for s in other]}
    alone, found = (compare.pair(ways, "fast", "slow", paired=paired) for paired in (False, True))
    assert (alone.verdict, alone.speed_up.verdict, found.speed_up.verdict) == ("faster",) * 3
    assert (found.paired.verdict, found.verdict, found.values()["verdict"]) == ("undecided",) * 3
    span = f"{found.paired.low:.2f} to {found.paired.high:.2f}"
    assert found.cells()["by pairs of seeds"] == span and f"; by pairs of seeds {span}) to" in found.sentence(
        "FD"
    )
    assert found.values()["paired"] == [found.paired.low, found.paired.high]


def test_a_pair_of_one_seed_each_has_no_verdict():
    found = compare.pair({"a": [power(1)], "b": [power(2)]}, "a", "b")
    assert not found.sure and (found.values()["interval"], found.values()["verdict"]) == (None, None)
    assert found.values()["ratio"] == pytest.approx(2)
    assert (found.cells()["interval"], found.cells()["verdict"]) == ("unknown", "")
    assert "how sure that is, is not known" in found.sentence("FD")


def test_a_way_that_is_best_at_its_first_measurement_gives_no_ratio():
    """It does not learn: to reach what it had at once says nothing of speed."""
    ways = {"learns": [power(1)], "does not": [(IMAGES, [25.0 + n for n in range(8)])]}
    found = compare.pair(ways, "learns", "does not")
    assert (found.target, found.early, found.speed_up) == (25.0, ("does not",), None)
    assert found.values()["ratio"] is None and found.values()["verdict"] is None
    assert found.cells()["speed-up"] == "none: does not there from the first measurement"
    assert "there is no ratio, for at 25.0 or below from the first measurement: does not" in found.sentence(
        "FD"
    )

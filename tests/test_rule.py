"""The rule: a table of parabolas and what follows from them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_dist.line.estimators import Quadratic
from gen_dist.line.measure import Measurement
from gen_dist.policy.rule import Auto, Decision, History, Raw

NAN, INF = math.nan, math.inf

#       slope  curvature  noise  last  lr_min lr_max   rate   reason
TABLE = [
    (-2.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.5, "accepted"),
    (-2.0, 4.0, 0.0, 0.1, 0.0, 0.2, 0.2, "clamped"),
    (-2.0, 4.0, 0.0, 0.1, 0.7, 1.0, 0.7, "clamped"),
    (-2.0, -4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "curvature not positive"),
    (-2.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.1, "curvature not positive"),
    (2.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (0.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (2.0, -4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (-2.0, 4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (-2.0, -4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (2.0, 4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (-2.0, 0.0, 0.0, 3.0, 0.0, 1.0, 1.0, "curvature not positive"),
    (-2.0, NAN, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (NAN, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (-INF, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (-1e300, 1e-300, 0.0, 0.1, 0.0, 1.0, 1.0, "clamped"),
]


def measurement(
    slope: float,
    curvature: float,
    noise: float = 0.0,
    loss: float = 1.0,
    errors: tuple[float, float] = (NAN, NAN),
    norms: tuple[float, float] = (1.0, 1.0),
) -> Measurement:
    return Measurement(Quadratic(loss, slope, curvature, noise), -slope, True, *errors, *norms)


@pytest.mark.parametrize(("slope", "curvature", "noise", "last", "lr_min", "lr_max", "rate", "reason"), TABLE)
def test_table(
    slope: float, curvature: float, noise: float, last: float, lr_min: float, lr_max: float, rate: float, reason: str
) -> None:
    seen = measurement(slope, curvature, noise)
    decision, history = Raw().decide(seen, Raw().begin(last), 1, lr_min, lr_max)
    assert decision == (rate, reason)
    assert history == Raw().begin(rate)


numbers = st.floats(allow_nan=True, allow_infinity=True)
rates = st.floats(0, 1e6)


@pytest.mark.parametrize("rule", [Raw(), Auto(), Auto(weigh_errors=True)], ids=["raw", "auto", "auto with errors"])
@given(
    st.lists(st.tuples(numbers, numbers, numbers, st.floats(0, 1e6), numbers, numbers, numbers, numbers), max_size=8),
    rates,
    rates,
    rates,
)
def test_any_measurements_give_rates_inside_the_clamp(
    rule: Raw | Auto, sequence: list[tuple[float, ...]], last: float, a: float, b: float
) -> None:
    low, high, history = min(a, b), max(a, b), History(last)
    for loss, slope, curvature, noise, *rest in sequence:
        seen = measurement(slope, curvature, noise, loss, (rest[0], rest[1]), (abs(rest[2]), abs(rest[3])))
        decision, history = rule.decide(seen, history, 8, low, high)
        assert low <= decision.lr <= high
        assert history.rate == decision.lr or decision.reason == "not finite"


# ---------------------------------------------------------------------------------------- the recipe, part by part

FREE = {"lr_min": 0.0, "lr_max": INF}


def rates_of(rule: Auto, ratios: list[float | None], steps: int = 8, history: History | None = None) -> list[Decision]:
    """Decisions on parabolas of these ratios; None is one without curvature, a negative ratio one that ascends.

    The loss stays as it is, which no promise must be held against.
    """
    history, rule = history or History(123.0), replace(rule, trust=-math.inf)
    decisions = []
    for ratio in ratios:
        seen = measurement(-1.0, 0.0) if ratio is None else measurement(-math.copysign(1.0, ratio), 1 / abs(ratio))
        decision, history = rule.decide(seen, history, steps, **FREE)
        decisions.append(decision)
    return decisions


def test_auto_starts_relative_to_the_weights_whatever_the_rate_was() -> None:
    seen = measurement(-1.0, 1e-9, norms=(4.0, 2.0))
    for last in (1e-6, 1e-1):
        decision, _ = Auto(start=0.01).decide(seen, History(last), 0, **FREE)
        assert decision.lr == pytest.approx(0.01 * 4 / 2)


def test_auto_grows_within_its_limit_and_under_its_cap() -> None:
    decisions = rates_of(Auto(start=0.01, cap=0.05, growth=2**0.125), [1e9] * 5)
    assert [d.lr for d in decisions] == pytest.approx([0.02, 0.04, 0.05, 0.05, 0.05])


def test_auto_takes_the_ratio_of_two_averages() -> None:
    rule, history = Auto(smoothing=0.5, start=0.05, growth=100.0), History(0.0)
    _, history = rule.decide(measurement(-1.0, 20.0), history, 8, **FREE)
    decision, history = rule.decide(measurement(-3.0, 100.0), history, 8, **FREE)
    assert decision.lr == pytest.approx((0.25 * 1 + 0.5 * 3) / (0.25 * 20 + 0.5 * 100))


def test_auto_only_falls_after_the_ratio_has_held_it_three_times() -> None:
    rule = Auto(smoothing=0.0, start=0.01, growth=1.2)
    rates = [d.lr for d in rates_of(rule, [1e9, 0.02, 0.03, 0.02, 0.05, 0.015, 0.09])]
    assert rates[:4] == pytest.approx([0.01 * 1.2**8, 0.02, 0.03, 0.02])
    assert rates[4:] == pytest.approx([0.02, 0.015, 0.015])


def test_auto_grows_without_curvature_and_shrinks_without_descent() -> None:
    decisions = rates_of(Auto(start=0.01, growth=2**0.125), [None, None, -1.0])
    assert [d.lr for d in decisions] == pytest.approx([0.02, 0.04, 0.03])
    assert [d.reason for d in decisions] == ["curvature not positive"] * 2 + ["the direction does not descend"]


def test_auto_treats_what_is_within_its_error_as_unknown_if_asked() -> None:
    history = History(0.02, started=True)
    uncertain_slope = measurement(-1.0, 100.0, errors=(1.5, 0.1))
    uncertain_curvature = measurement(-1.0, 100.0, errors=(0.1, 150.0))
    for rule, expected in ((Auto(), (0.01, 0.01)), (Auto(weigh_errors=True), (0.02, 0.02 * 1.09**8))):
        seen = tuple(rule.decide(m, history, 8, **FREE)[0].lr for m in (uncertain_slope, uncertain_curvature))
        assert seen == pytest.approx(expected)


def test_auto_decays_to_a_known_horizon() -> None:
    linear, cosine = Auto(total_steps=100), Auto(total_steps=100, decay="cosine", warmup_steps=9)
    assert [linear.factor(s) for s in (0, 50, 100)] == [1, 0.5, 0]
    assert [cosine.factor(s) for s in (0, 4, 9, 100)] == pytest.approx([0.1, 0.5, 1, 0])
    assert Auto().factor(10**6) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"smoothing": 1.0}, {"growth": 0.5}, {"cap": 1e-9}, {"decay": "step"}, {"total_steps": 5, "warmup_steps": 5}],
)
def test_auto_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need|must"):
        Auto(**wrong)  # type: ignore[arg-type]


def test_auto_settles_at_its_cap_and_then_wants_fewer_updates() -> None:
    rule, history = Auto(start=0.01, cap=0.02, growth=1.2, settled_stride=3), History(0.0)
    strides = []
    for _ in range(5):
        strides.append(rule.stride(history))
        _, history = rule.decide(measurement(-1.0, 0.0), history, 8, **FREE)  # no curvature to be seen
    assert strides == [1, 1, 1, 3, 3]
    assert history.rate == pytest.approx(0.02)
    assert Raw().stride(Raw().begin(0.1)) == 1


def test_chance_alone_does_not_take_a_settled_rate_to_zero() -> None:
    """It falls by updates that do not descend, but no faster than one over the square root of the steps."""
    rule = Auto(start=1e-3, growth=2.0)
    down, up = measurement(slope=-1.0, curvature=10.0), measurement(slope=1.0, curvature=10.0)
    history = rule.begin(1.0)
    for _ in range(20):
        decision, history = rule.decide(down, history, 1, **FREE)
    settled, age = decision.lr, history.age
    assert history.settled >= 3
    for _ in range(30):
        decision, history = rule.decide(up, history, 100, **FREE)
    assert decision.lr < settled
    assert decision.lr == pytest.approx(history.reach / (age + 30 * 100) ** 0.5)
    assert history.reach <= settled * age**0.5


def after(rates_kept: float, rule: Auto) -> tuple[Decision, History]:
    """Growing by 2 a step over lines that promise a fall of a tenth of the rate each, of which a share comes true."""
    history, loss = rule.begin(1.0), 1.0
    for _ in range(12):
        decision, history = rule.decide(measurement(slope=-0.2, curvature=1e-9, loss=loss), history, 1, **FREE)
        loss -= rates_kept * 0.1 * decision.lr
    return decision, history


def test_growth_ends_where_the_loss_does_not_fall_as_promised() -> None:
    rule = Auto(start=1e-3, growth=2.0, cap=1e9)
    kept, broken = after(0.5, rule), after(0.0, rule)
    assert kept[0].lr == pytest.approx(1e-3 * 2**12)
    assert broken[1].settled >= 3
    # 0.1 (2 + 4 + ... + 2^n) 1e-3 is more than a quarter of the loss from n = 11 on
    assert broken[0].lr == pytest.approx(0.75 * 1e-3 * 2**11)
    assert after(0.0, replace(rule, trust=-1.0))[0].lr == pytest.approx(1e-3 * 2**12)

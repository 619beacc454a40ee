"""The rule: a table of parabolas and what follows from them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gen_dist.parabola import Parabola
from gen_dist.policy import Auto, Clamp, Raw, State, state_from_dict, state_to_dict, update
from gen_dist.policy.auto import AutoMemory
from gen_dist.policy.groups import begin_groups
from gen_dist.policy.state import GroupMemory

NAN, INF = math.nan, math.inf

#    g.d   d'Hd  rounding last lr_min lr_max  rate  reason
TABLE = [
    (2.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.5, "accepted"),
    (2.0, 4.0, 0.0, 0.1, 0.0, 0.2, 0.2, "clamped"),
    (2.0, 4.0, 0.0, 0.1, 0.7, 1.0, 0.7, "clamped"),
    (2.0, -4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "curvature not positive"),
    (2.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.1, "curvature not positive"),
    (-2.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (0.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (-2.0, -4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (2.0, 4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (2.0, -4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (-2.0, 4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (2.0, 0.0, 0.0, 3.0, 0.0, 1.0, 1.0, "curvature not positive"),
    (2.0, NAN, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (NAN, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (INF, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (1e300, 1e-300, 0.0, 0.1, 0.0, 1.0, 1.0, "clamped"),
]
FREE = Clamp()


def seen(
    numerator: float,
    denominator: float,
    rounding: float = 0.0,
    loss: float = 1.0,
    norms: tuple[float, float] = (1.0, 1.0),
) -> Parabola:
    return Parabola(loss, numerator, denominator, rounding, weight_norm=norms[0], direction_norm=norms[1])


@pytest.mark.parametrize(("numerator", "denominator", "rounding", "last", "lr_min", "lr_max", "rate", "reason"), TABLE)
def test_table(
    numerator: float,
    denominator: float,
    rounding: float,
    last: float,
    lr_min: float,
    lr_max: float,
    rate: float,
    reason: str,
) -> None:
    state = Raw().decide(Raw().begin(last), seen(numerator, denominator, rounding), 1, Clamp(lr_min, lr_max))
    assert state == State(rate, reason)


numbers = st.floats(allow_nan=True, allow_infinity=True)
rates = st.floats(0, 1e6)


@pytest.mark.parametrize("rule", [Raw(), Auto(), Auto(trust=-1e300)], ids=["raw", "auto", "auto that trusts"])
@given(
    st.lists(st.tuples(numbers, numbers, numbers, st.floats(0, 1e6), numbers, numbers), max_size=8), rates, rates, rates
)
@example([(0.0, 2.6e-236, 5e-324, 0.0, 0.0, 1.0)], 0.0, 0.0, 0.0)  # the average of the denominators underflows
def test_any_measurements_give_rates_inside_the_clamp(
    rule: Raw | Auto, sequence: list[tuple[float, ...]], last: float, a: float, b: float
) -> None:
    """From any start, inside the clamp or not."""
    clamp, state = Clamp(min(a, b), max(a, b)), rule.begin(last)
    for loss, numerator, denominator, rounding, weights, direction in sequence:
        parabola = seen(numerator, denominator, rounding, loss, (abs(weights), abs(direction)))
        state = update(rule, state, parabola, clamp)._replace(step=state.step + 8)
        assert clamp.lr_min <= state.rate <= clamp.lr_max
        assert state.reason


def test_probes_follow_the_rate_and_reach_farther_where_curvature_is_rounding() -> None:
    state = Raw().begin(0.1)._replace(probe=0.1)
    state = update(Raw(), state, seen(2.0, 4.0), FREE)
    assert (state.rate, state.probe, state.updated) == (0.5, 0.5, 1)
    state = update(Raw(), state._replace(step=7), seen(2.0, 4.0, rounding=5.0), FREE)
    assert (state.rate, state.probe, state.updated) == (0.5, 5.0, 8)
    assert update(Raw(), state, seen(2.0, 4.0, rounding=5.0), Clamp(0.0, 1.0)).probe == 5.0, "not beyond the clamp"
    assert update(Raw(), state, seen(-2.0, 4.0), FREE).probe == 5.0


# ---------------------------------------------------------------------------------------- the recipe, part by part


def states_of(rule: Auto, ratios: list[float | None], steps: int = 8) -> list[State]:
    """States after parabolas of these ratios; None is one without curvature, a negative ratio one that ascends.

    The loss stays as it is, which no promise must be held against.
    """
    rule = replace(rule, trust=-math.inf)
    state, states = rule.begin(123.0), []
    for ratio in ratios:
        parabola = seen(1.0, 0.0) if ratio is None else seen(math.copysign(1.0, ratio), 1 / abs(ratio))
        state = rule.decide(state, parabola, steps, FREE)
        states.append(state)
    return states


def test_auto_starts_relative_to_the_weights_whatever_the_rate_was() -> None:
    rule = Auto(start=0.01)
    for last in (1e-6, 1e-1):
        assert rule.decide(rule.begin(last), seen(1.0, 1e-9, norms=(4.0, 2.0)), 0, FREE).rate == pytest.approx(
            0.01 * 4 / 2
        )


@pytest.mark.parametrize(
    ("numerator", "denominator", "loss", "whole_step"),
    [(1.0, 4.0, 3.0, 0.25), (1.0, 0.0, 3.0, 3.0), (2.0, -4.0, 3.0, 1.5)],
    ids=["the minimum of the parabola", "no curvature: to a loss of zero", "a negative one: to a loss of zero"],
)
def test_weights_that_are_zero_start_from_the_parabola_whatever_the_rate_was(
    numerator: float, denominator: float, loss: float, whole_step: float
) -> None:
    rule = Auto(start=0.01)
    for last in (1e-6, 1e-1):
        state = rule.decide(rule.begin(last), seen(numerator, denominator, loss=loss, norms=(0.0, 5.0)), 0, FREE)
        assert state.rate == pytest.approx(0.01 * whole_step)
        assert state.reason != "not finite"


def test_weights_that_were_zero_are_no_cap_while_they_are_small() -> None:
    rule = Auto(start=0.01, growth=2.0)
    state = rule.decide(rule.begin(1.0), seen(1.0, 1.0, norms=(0.0, 1.0)), 0, FREE)
    state = rule.decide(state, seen(1.0, 1.0, norms=(0.01, 1.0)), 1, FREE)
    assert state.rate == pytest.approx(0.02), "it grows"
    for _ in range(9):
        state = rule.decide(state, seen(1.0, 1.0, norms=(0.01, 1.0)), 1, FREE)
    assert state.rate == pytest.approx(0.1), "up to the share of the parabola's minimum"


def test_auto_grows_within_its_limit_and_under_its_cap() -> None:
    states = states_of(Auto(start=0.01, cap=0.05, growth=2**0.125), [1e9] * 5)
    assert [s.rate for s in states] == pytest.approx([0.02, 0.04, 0.05, 0.05, 0.05])


def test_auto_takes_the_ratio_of_two_averages() -> None:
    rule = Auto(smoothing=0.5, start=0.05, growth=100.0)
    state = rule.decide(rule.begin(0.0), seen(1.0, 20.0), 8, FREE)
    state = rule.decide(state, seen(3.0, 100.0), 8, FREE)
    assert state.rate == pytest.approx((0.25 * 1 + 0.5 * 3) / (0.25 * 20 + 0.5 * 100))


def test_auto_only_falls_after_the_ratio_has_held_it_three_times() -> None:
    rule = Auto(smoothing=0.0, start=0.01, growth=1.2)
    rates = [s.rate for s in states_of(rule, [1e9, 0.02, 0.03, 0.02, 0.05, 0.015, 0.09])]
    assert rates[:4] == pytest.approx([0.01 * 1.2**8, 0.02, 0.03, 0.02])
    assert rates[4:] == pytest.approx([0.02, 0.015, 0.015])


def test_auto_grows_without_curvature_and_shrinks_without_descent() -> None:
    states = states_of(Auto(start=0.01, growth=2**0.125), [None, None, -1.0])
    assert [s.rate for s in states] == pytest.approx([0.02, 0.04, 0.03])
    assert [s.reason for s in states] == ["curvature not positive"] * 2 + ["the direction does not descend"]


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
    rule = Auto(start=0.01, cap=0.02, growth=1.2, settled_stride=3)
    state, strides = rule.begin(0.0), []
    for _ in range(5):
        due = [step for step in range(0, 60, 4) if rule.is_due(state._replace(step=step), 4)]
        strides.append((due[1] - due[0]) // 4)
        state = rule.decide(state, seen(1.0, 0.0), 8, FREE)  # no curvature to be seen
    assert strides == [1, 1, 1, 3, 3]
    assert state.rate == pytest.approx(0.02)


def test_auto_measures_at_every_step_until_it_has_started() -> None:
    rule = Auto()
    state = rule.begin(0.1)
    assert all(rule.is_due(state._replace(step=step), 8) for step in range(10))
    state = rule.decide(state, seen(1.0, 1.0), 1, FREE)
    assert [step for step in range(1, 20) if rule.is_due(state._replace(step=step), 8)] == [8, 16]
    assert [step for step in range(7) if Raw().is_due(Raw().begin(0.1)._replace(step=step), 3)] == [0, 3, 6]


def test_chance_alone_does_not_take_a_settled_rate_to_zero() -> None:
    """It falls by updates that do not descend, but no faster than one over the square root of the steps."""
    rule = Auto(start=1e-3, growth=2.0)
    down, up = seen(1.0, 10.0), seen(-1.0, 10.0)
    state = rule.begin(1.0)
    for _ in range(20):
        state = rule.decide(state, down, 1, FREE)
    settled, age = state.rate, state.memory.age
    assert state.memory.settled >= 3
    for _ in range(30):
        state = rule.decide(state, up, 100, FREE)
    assert state.rate < settled
    assert state.rate == pytest.approx(state.memory.reach / (age + 30 * 100) ** 0.5)
    assert state.memory.reach <= settled * age**0.5


def after(rates_kept: float, rule: Auto) -> State:
    """Growing by 2 a step over lines that promise a fall of a tenth of the rate each, of which a share comes true."""
    state, loss = rule.begin(1.0), 1.0
    for _ in range(12):
        state = rule.decide(state, seen(0.2, 1e-9, loss=loss), 1, FREE)
        loss -= rates_kept * 0.1 * state.rate
    return state


def test_growth_ends_where_the_loss_does_not_fall_as_promised() -> None:
    rule = Auto(start=1e-3, growth=2.0, cap=1e9)
    kept, broken = after(0.5, rule), after(0.0, rule)
    assert kept.rate == pytest.approx(1e-3 * 2**12)
    assert broken.memory.settled >= 3
    # 0.1 (2 + 4 + ... + 2^n) 1e-3 is more than a quarter of the loss from n = 11 on
    assert broken.rate == pytest.approx(0.75 * 1e-3 * 2**11)
    assert after(0.0, replace(rule, trust=-1.0)).rate == pytest.approx(1e-3 * 2**12)


# --------------------------------------------------------------------------------------------- a state that is saved


def test_a_state_survives_json_and_weights_only_loading() -> None:
    rule = Auto()
    state = rule.decide(rule.begin(0.1), seen(1.0, 20.0), 1, FREE)._replace(groups=begin_groups([1.0, 0.5]))
    file = io.BytesIO()
    torch.save(state_to_dict(state), file)
    file.seek(0)
    for saved in (json.loads(json.dumps(state_to_dict(state))), torch.load(file, weights_only=True)):
        assert state_from_dict(saved, rule.begin(0.3)) == state


def test_a_state_of_the_first_version_loads() -> None:
    """As 0.1.0 saved it: tuples, a factor of verification apart, no version."""
    saved = {
        "last_epoch": 17,
        "history": (0.25, 3.0, 4.0, 2, True, 16, 0.5, 2.5, 0.1, 0.01),
        "updated_at": 16,
        "probe": 0.125,
        "updates": 5,
        "shortened": 0.5,
        "groups": ([1.0, 0.5], [2.0, 1.0], [[4.0, 1.0], [1.0, 2.0]]),
        "last": (0.125, 3.0, 4.0, 2.0, "shortened", None, None, None, None),
    }
    memory = AutoMemory(3.0, 4.0, 2, True, 16, 0.5, 2.5, 0.1, 0.01)
    groups = GroupMemory([1.0, 0.5], [2.0, 1.0], [[4.0, 1.0], [1.0, 2.0]])
    assert state_from_dict(saved, Auto().begin(1.0)) == State(0.125, "shortened", 0.125, 17, 16, memory, groups)
    assert state_from_dict(saved, Raw().begin(1.0)) == State(0.125, "shortened", 0.125, 17, 16, None, groups)


def test_a_state_that_does_not_fit_is_refused() -> None:
    saved = state_to_dict(Raw().begin(0.1))
    with pytest.raises(ValueError, match="another rule"):
        state_from_dict(saved, Auto().begin(0.1))
    with pytest.raises(ValueError, match=r"version 99.*update gen_dist"):
        state_from_dict(saved | {"version": 99}, Raw().begin(0.1))

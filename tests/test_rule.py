"""The rule: a table of parabolas and what follows from them."""

from __future__ import annotations

import io
import itertools
import json
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gen_dist.parabola import Parabola
from gen_dist.policy import Auto, Clamp, Raw, State, state_from_dict, state_to_dict, update
from gen_dist.policy.auto import AutoMemory

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


@pytest.mark.parametrize("rule", [Raw(), Auto()], ids=["raw", "auto"])
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


def lines(e: float, p: float, rate: float) -> Parabola:
    """A line on which this rate is the share `e` of the way to the minimum, and promises the share `p` of a fall.

    The loss is 1 and has not fallen, so a half of it is taken to be left.
    """
    return seen(p / rate / 2, e * p / rate**2 / 2, loss=1.0)


def path(rule: Auto, shares: list[tuple[float, float]], steps: int = 2) -> list[State]:
    """The states after updates, `steps` apart, at which the rate has these shares `(e, p)`."""
    state, states = rule.begin(123.0), []
    for e, p in shares:
        rate = state.rate if state.memory.started else rule.start
        state = rule.decide(state, lines(e, p, rate), steps, FREE)
        states.append(state)
        for _ in range(steps):
            state = rule.advance(state, FREE)
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


@pytest.mark.parametrize(
    ("e", "p", "growth"),
    [
        (0.0, 0.0, 1.5),
        (-3.0, 0.001, 1.5),
        (0.0075, 0.0, 1.5),
        (0.075, 0.0, 1.07),
        (0.0, 0.02, 1.07),
        (0.7, 0.19, 1.07),
        (0.075 / math.sqrt(10), 0.0, 1.285),
    ],
    ids=["flat", "a hill", "1 % of e", "10 % of e", "10 % of p", "just below both", "half way, as logarithms"],
)
def test_growth_slows_from_a_hundredth_to_a_tenth_of_the_nearer_limit(e: float, p: float, growth: float) -> None:
    [state] = path(Auto(), [(e, p or 1e-9)])
    assert state.memory.growth == pytest.approx(growth)
    assert Auto().advance(state, FREE).rate == pytest.approx(5e-5 * growth)
    assert not state.memory.settled


@pytest.mark.parametrize("over", [(0.8, 0.01), (0.1, 0.21)], ids=["e", "p"])
def test_growth_ends_at_either_limit_once_two_of_three_updates_say_so(over: tuple[float, float]) -> None:
    below = (0.01, 0.001)
    states = path(Auto(slow=1.0, quick=1.0), [below, below, over, over, below, below, below, over])
    assert [s.memory.settled for s in states] == [False, False, False, True, True, True, True, True]
    assert states[3].memory.budget == pytest.approx(states[3].rate)


@pytest.mark.parametrize(
    ("over", "kept"),
    [((0.9, 0.01), 1 / 1.2), ((0.1, 0.22), 1 / 1.1), ((3.0, 0.01), 1 / 1.07**4)],
    ids=["e", "p", "not below the rate before"],
)
def test_growth_that_has_passed_a_limit_goes_back_to_it(over: tuple[float, float], kept: float) -> None:
    """What the rate has grown by since the update before, nobody had measured; a post-norm transformer died of it."""
    rule = Auto()
    below = (0.1, 0.02)
    before, after = path(rule, [below, below, over, over], steps=4)[2:]
    assert (before.memory.settled, after.memory.settled) == (False, True), "the median decides"
    grown = before.rate * before.memory.growth**4
    assert before.memory.growth == pytest.approx(1.07)
    assert after.rate == pytest.approx(grown * kept)
    assert after.memory.budget == pytest.approx(after.rate)


@pytest.mark.parametrize(
    ("losses", "fall"),
    [([4.0], 2.0), ([4.0, 3.0], 1.5), ([4.0, 2.5], 1.5), ([4.0, 2.0], 2.0), ([4.0, 1.0], 1.0), ([4.0, 5.0], 2.5)],
    ids=["at first", "half", "as much as it has fallen", "as much, and to zero", "not below zero", "a loss that rose"],
)
def test_the_fall_that_is_left(losses: list[float], fall: float) -> None:
    rule = Auto()
    state = rule.begin(1.0)
    for loss in losses:
        state = rule.decide(state, seen(0.3, 0.0, loss=loss), 2, FREE)
    assert state.memory.slopes[-1] == pytest.approx(0.3 / fall)


def test_a_settled_rate_creeps_within_both_limits_and_its_budget() -> None:
    rule = Auto(slow=1.0)
    over, free, promises_much, steep = (0.8, 0.01), (0.5, 0.01), (0.5, 0.41), (0.76, 0.01)
    settled = path(rule, [over] * 3)[-1]
    assert settled.memory.growth == 1
    for shares, growth in [(free, 1 + 0.5 / 12), (promises_much, 1.0), (steep, 1.0)]:
        state = settled
        for _ in range(3):
            state = rule.decide(state, lines(*shares, rate=state.rate), 2, FREE)
        assert state.memory.growth == pytest.approx(growth), shares
    state = settled
    for _ in range(3):  # the loss has risen
        line = lines(*free, rate=state.rate)
        state = rule.decide(state, line._replace(loss=1.1), 2, FREE)
    assert state.memory.growth == 1


def test_a_growth_that_has_ended_too_early_goes_on() -> None:
    """As after a player that made the loss harder for a while: nothing is for life."""
    early = path(Auto(), [(5.0, 1e-9)] + [(0.8, 0.01)] * 2 + [(1e-3, 1e-6)] * 200, steps=4)
    assert early[0].memory.settled
    assert early[-1].rate > 100 * early[2].rate
    growth = [s.memory.growth for s in early[5:]]
    assert max(growth) == 1.07
    assert growth == sorted(growth, reverse=True), "slower and slower, by 1 + 3 / t"


@pytest.mark.parametrize(("loss", "again"), [(0.5, True), (0.11, True), (0.09, False), (1e-6, False)])
def test_near_the_end_of_a_training_small_steps_are_no_reason_to_grow_again(loss: float, again: bool) -> None:
    """A classifier of few sentences reached a loss of 3e-4, and its rate twenty times what it can bear."""
    rule = Auto()
    state = path(rule, [(0.8, 0.01)] * 3)[-1]
    assert state.memory.settled
    for _ in range(3):
        line = seen(1e-3 * loss / state.rate, 1e-6 * loss / state.rate**2, loss=loss)
        state = rule.decide(state, line, 2, FREE)
    assert state.memory.growth == pytest.approx(1.07 if again else 1 + 0.5 / state.memory.age)


def test_a_rate_beyond_the_minimum_is_halved() -> None:
    rule = Auto()
    states = path(rule, [(0.1, 0.01)] * 3 + [(5.0, 0.01)] * 2 + [(0.5, 0.01)])
    assert states[3].reason == "accepted", "one strange batch"
    assert states[4].reason == "the rate was beyond the minimum: halved"
    assert states[4].memory.settled
    before = rule.advance(rule.advance(states[3], FREE), FREE).rate
    assert states[4].rate == pytest.approx(before / 2)
    assert states[5].rate == states[4].rate


@pytest.mark.parametrize(
    ("e", "loss", "falls"), [(1.7, 2.1, True), (0.9, 100.0, False), (1.7, 1.9, False), (3.9, 1.0, False)]
)
def test_a_loss_that_jumps_on_a_step_beyond_the_minimum_halves_the_rate(e: float, loss: float, falls: bool) -> None:
    rule = Auto()
    before = path(rule, [(0.1, 0.01)] * 3)[-1]
    line = seen(1e-3 / before.rate, e * 1e-3 / before.rate**2, loss=loss)
    state = rule.decide(before, line, 2, FREE)
    assert state.rate == pytest.approx(before.rate / (2 if falls else 1))
    assert (state.reason == "the rate was beyond the minimum: halved") == falls
    assert rule.is_due(state._replace(updated=state.step), 3) == falls, "the next step looks again"


def test_directions_that_do_not_descend_end_growth_and_curvature_in_rounding_does_not() -> None:
    rule = Auto()
    up = seen(-1.0, 1.0)
    state = path(rule, [(0.01, 0.01)])[-1]
    for _ in range(2):
        state = rule.decide(state, up, 2, FREE)
    assert state.reason == "the direction does not descend"
    assert (state.memory.settled, state.memory.growth) == (True, 1.0)
    state = path(rule, [(0.01, 0.01)])[-1]
    for _ in range(3):
        state = rule.decide(state, seen(1e-9, 1e3, rounding=1e4), 2, FREE)
    assert state.reason == "curvature within rounding"
    assert state.memory.growth > 1.07


def test_long_pauses_between_updates_bound_the_growth_in_between() -> None:
    [state] = path(Auto(), [(0.0, 1e-9)], steps=16)
    assert state.memory.growth**16 == pytest.approx(1.5**3)


def test_a_known_horizon_ends_the_run() -> None:
    assert [Auto(total_steps=100).factor(s) for s in (0, 99, 100, 1000)] == [1, 1, 0, 0]
    assert Auto().factor(10**6) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"slow": 0.5}, {"quick": 1.01}, {"edge": 5.0}, {"share": 0}, {"start": 0}, {"total_steps": 0}],
)
def test_auto_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"need|must"):
        Auto(**wrong)  # type: ignore[arg-type]


def due(rule: Auto, state: State, update_every: int, until: int, e: float = 0.0) -> list[int]:
    """The steps at which a run is measured on lines along which its rate is the share `e` of the way to the minimum."""
    seen_at = []
    while state.step < until:
        if rule.is_due(state, update_every):
            state = update(rule, state, lines(e, 1e-9, state.rate), FREE)
            seen_at.append(state.step)
        state = rule.advance(state, Clamp(0.0, 1.0))
    return seen_at


def test_updates_become_rarer() -> None:
    growing = due(Auto(), Auto().begin(1.0), 3, 80)
    assert growing[:10] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert growing[-3:] == [63, 69, 75], "every sixth step as long as the rate grows"
    settled = path(Auto(), [(1.0, 0.01)] * 3)[-1]
    for e, share, largest, in_600 in ((1.0, 2, 128, 16), (0.0, 8, 128, 40)):  # at rest, and growing again
        steps = due(Auto(), settled._replace(step=6, updated=5), 2, 3000, e)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert gaps[3:] == sorted(gaps[3:])
        assert gaps[-1] == largest
        assert all(gap <= max((step + 4) / share, 2) for step, gap in zip(steps[3:], gaps[3:], strict=False))
        assert sum(step < 600 for step in steps) < in_600


def test_auto_measures_at_every_step_until_it_has_started() -> None:
    rule = Auto()
    state = rule.begin(0.1)
    assert all(rule.is_due(state._replace(step=step), 8) for step in range(10))
    assert due(rule, state, 8, 30) == [0, 8, 16, 24]
    assert [step for step in range(7) if Raw().is_due(Raw().begin(0.1)._replace(step=step), 3)] == [0, 3, 6]


# --------------------------------------------------------------------------------------------- a state that is saved


def test_a_state_survives_json_and_weights_only_loading() -> None:
    rule = Auto()
    state = rule.decide(rule.begin(0.1), seen(1.0, 20.0), 1, FREE)
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
        "groups": None,
        "last": (0.125, 3.0, 4.0, 2.0, "shortened", None, None, None, None),
    }
    memory = AutoMemory(started=True, age=16, settled=True)  # the rule was another one then
    assert state_from_dict(saved, Auto().begin(1.0)) == State(0.125, "shortened", 0.125, 17, 16, memory)
    assert state_from_dict(saved, Raw().begin(1.0)) == State(0.125, "shortened", 0.125, 17, 16, None)


def test_a_state_that_does_not_fit_is_refused() -> None:
    saved = state_to_dict(Raw().begin(0.1))
    with pytest.raises(ValueError, match="another rule"):
        state_from_dict(saved, Auto().begin(0.1))
    with pytest.raises(ValueError, match=r"group_rates.*no longer"):
        state_from_dict(saved | {"groups": {"ratios": [1.0, 0.5]}}, Raw().begin(0.1))
    with pytest.raises(ValueError, match=r"version 99.*update gen_dist"):
        state_from_dict(saved | {"version": 99}, Raw().begin(0.1))

"""Training loops of well-known scripts: the default scheduler in each, called as the script calls its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import public_loops as loops
import pytest
from public_loops import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def needs(loop: Callable[..., Run]) -> pytest.MarkDecorator:
    absent = loops.missing(loop)
    how = "pip install -e '.[trainers]'"
    return pytest.mark.skipif(bool(absent), reason=f"needs {' and '.join(absent)}: {how}")


LOOPS = [pytest.param(loop, marks=needs(loop), id=loop.__name__) for loop in loops.PACKAGES]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_loop_trains_and_a_measurement_changes_nothing_in_it(loop: Callable[..., Run]) -> None:
    """Up to the first step the loop sees bitwise what it sees without gen_dist; the rate grows, and the loss falls."""
    own, ours = loop(False), loop(True)
    assert ours.scheduler is not None
    assert ours.scheduler.last is not None
    assert ours.scheduler.state.memory.started, ours.scheduler.last.reason
    steps = ours.scheduler.last_epoch
    assert ours.scheduler.state.memory.age > steps / 2
    assert len(ours.losses) == len(own.losses)
    if loop is loops.lightning_gan:  # two optimizers take turns, and their losses do not both fall
        assert ours.losses[0] == own.losses[0]
        return
    micro_batches = len(ours.losses) // steps
    assert ours.losses[:micro_batches] == own.losses[:micro_batches]
    assert ours.evaluation < own.losses[0]


@needs(loops.nlp_example)
def test_a_rate_does_not_run_away_once_the_loss_is_near_zero() -> None:
    """With no limit near the end, this run ended at 1.1, and at 0.009 with the script's own schedule."""
    assert loops.nlp_example(True, epochs=16).evaluation < 0.01


@needs(loops.nlp_example)
def test_a_loop_of_accelerate_resumes_bitwise(tmp_path: Path) -> None:
    whole = loops.nlp_example(True)
    loops.nlp_example(True, epochs=1, checkpoints=str(tmp_path))
    resumed = loops.nlp_example(True, resume=str(tmp_path))
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]
    assert resumed.evaluation == whole.evaluation

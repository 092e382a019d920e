"""The learning rate is a function of the step and the whole plan alone."""

import re

import pytest

from chimera.cli import UserError
from chimera.train.settings import SchedulerSettings
from chimera.train.step.schedulers import check_scheduler, jump, multiplier


def curve(steps: int, **settings) -> list[float]:
    return [multiplier(SchedulerSettings(**settings), steps, step) for step in range(steps)]


def test_warm_up_stable_decay():
    rates = curve(10, name="wsd", warmup_steps=4, decay_steps=3, final=0.1)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.55, 0.1])


@pytest.mark.parametrize(
    ("decay", "end"),
    [
        ("linear", [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5, 0.2]),
        ("sqrt", [1, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5), 0.2 + 0.8 * (1 - 0.75**0.5), 0.2]),
    ],
)
def test_each_shape_of_a_decay_goes_from_the_peak_to_the_end(decay: str, end: list[float]):
    rates = curve(8, name="wsd", warmup_steps=2, decay_steps=5, final=0.2, decay=decay)
    assert rates == pytest.approx([0.5, 1, 1, *end])


def test_the_shape_of_a_decay_is_of_warm_up_stable_decay_alone():
    for name in ("cosine", "constant"):
        assert curve(9, name=name, decay="sqrt") == curve(9, name=name)


def test_cosine_goes_from_the_peak_to_the_end():
    rates = curve(9, name="cosine", warmup_steps=1, final=0.2)
    assert rates[0] == rates[1] == 1
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    assert rates[4] + rates[5] == pytest.approx(1.2, abs=0.2)


def test_a_decay_of_one_step_is_at_the_final_rate():
    assert curve(3, name="wsd", decay_steps=1, final=0.1) == pytest.approx([1, 1, 0.1])
    assert curve(3, name="cosine", warmup_steps=2, final=0.1) == pytest.approx([0.5, 1, 0.1])


def test_constant_stays_at_the_peak_after_warm_up():
    assert curve(5, name="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1]


def test_stages_longer_than_the_run_are_refused():
    with pytest.raises(UserError, match="do not fit into 10 steps"):
        check_scheduler(SchedulerSettings(warmup_steps=8, decay_steps=3), 10)


@pytest.mark.parametrize(
    ("step", "steps", "peak", "words"),
    [
        (5, 10, 1.0, None),  # nothing has changed
        (1, 10, 1.0, None),  # in the warm-up, which goes up as it should
        (8, 10, 1.0, None),  # in the decay, which goes on
        (5, 20, 1.0, None),  # before the decay: a longer plan
        (
            8,
            20,
            1.0,
            r"from 0.7 at step 7 to 1 at step 8: the checkpoint is 2 steps into a decay .* of step 6",
        ),
        (
            10,
            20,
            1.0,
            r"from 0.1 at step 9 to 1 at step 10: the checkpoint is 4 steps into .* of step 6 or",
        ),
        (5, 10, 2.0, r"from 1 at step 4 to 2 at step 5: if it should not, set `optimizer.lr`"),
    ],
)
def test_a_rate_that_would_jump_up_is_said(step: int, steps: int, peak: float, words: str | None) -> None:
    """Warm-up to step 3; the last four steps of ten decay: 1, 0.7, 0.4, 0.1."""
    options = {"name": "wsd", "warmup_steps": 4, "decay_steps": 4, "final": 0.1, "decay": "linear"}
    said = jump({**options, "peak": 1.0, "steps": 10}, SchedulerSettings(**options), peak, steps, step)
    assert said is None if words is None else said and re.search(words, said), said

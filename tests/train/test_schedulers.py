"""The learning rate is a function of the step and the whole plan alone."""

import pytest

from chimera.cli import UserError
from train.schedulers import check_scheduler, multiplier
from train.settings import SchedulerSettings


def curve(steps: int, **settings) -> list[float]:
    return [multiplier(SchedulerSettings(**settings), steps, step) for step in range(steps)]


def test_warm_up_stable_decay():
    rates = curve(10, name="wsd", warmup_steps=4, decay_steps=3, final=0.1)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.55, 0.1])


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

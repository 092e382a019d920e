"""Ranks that wait for one: longer than a collective operation may take, and never past its error."""

import subprocess

import pytest

from chimera.cli import UserError
from chimera.train.data.shards import open_shards
from chimera.train.order.run_plan import plan_of
from chimera.train.run.ranks import first_difference, run_on_ranks, what_must_agree
from chimera.train.settings import read_settings
from tests.train.conftest import ROOT

HEAD = """
import os, sys, time; sys.path.insert(0, os.getcwd())
from composer.utils import dist
from chimera.cli import UserError
from chimera.train.run.ranks import run_on_ranks
dist.initialize_dist("cpu", timeout=4)
leader = dist.get_global_rank() == 0
"""

# The leader's own work would take hours: an error elsewhere does not wait for it.
BODY = """
def attempt(error):
    def fail():
        raise error
    try:
        run_on_ranks((lambda: time.sleep(10_000)) if leader else fail)
    except Exception as error:
        return type(error).__name__ + " " + str(error)
for error in (UserError("a mistake"), OSError("a defect")):
    print(dist.all_gather_object(attempt(error)), flush=True)
print(run_on_ranks((lambda: time.sleep(9) or 'slow') if leader else None), flush=True)
os._exit(0)  # past the threads that still sleep
"""


def test_errors_reach_all_ranks_at_once_and_long_work_is_waited_for(tmp_path, warm):
    script = tmp_path / "script.py"
    script.write_text(HEAD + BODY)
    command = [str(warm / "composer"), "-n", "2", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "['UserError a mistake', 'UserError a mistake']" in said
    assert "['RuntimeError rank 1 failed: OSError: a defect', 'OSError a defect']" in said
    assert "['slow', None]" in said


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("seed=18", "setting `seed` is 18 on rank 2 and 17 on rank 0"),
        ("optimizer.lr=0.5", "setting `optimizer.lr` is 0.5 on rank 2 and 0.003 on rank 0"),
        ("phases.1.steps=99", "setting `phases.1.steps` is 99 on rank 2 and 100 on rank 0"),
        ("cache=/of/a/node", None),
    ],
)
def test_a_rank_of_another_config_is_noticed(demo_shards, change, difference):
    def rank(*words):
        settings = read_settings(ROOT / "yamls/demo/phase2.yaml", [f"shards={demo_shards}", *words])
        shards = open_shards(settings.shards, settings.cache)
        return what_must_agree(settings, shards, plan_of(settings, shards.block_len))

    assert first_difference([rank(), rank(), rank(change)]) == difference


def test_one_rank_alone_works_too():
    assert run_on_ranks(lambda: 3) == [3]
    with pytest.raises(UserError, match="a mistake"):
        run_on_ranks(lambda: fail("a mistake"))


def fail(text: str) -> None:
    raise UserError(text)

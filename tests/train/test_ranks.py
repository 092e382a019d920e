"""Ranks that wait for one: longer than a collective operation may take, and never past its error."""

import subprocess
import sys
from pathlib import Path

import pytest

from chimera.cli import UserError
from tests.train.conftest import ROOT
from train.ranks import together

COMPOSER = Path(sys.executable).parent / "composer"

HEAD = """
import os, sys, time; sys.path.insert(0, os.getcwd())
from composer.utils import dist
from chimera.cli import UserError
from train.ranks import together
dist.initialize_dist("cpu", timeout=4)
leader = dist.get_global_rank() == 0
"""

# The leader's own work would take hours: an error elsewhere does not wait for it.
BODY = """
def attempt(error):
    def fail():
        raise error
    try:
        together((lambda: time.sleep(10_000)) if leader else fail)
    except Exception as error:
        return type(error).__name__ + " " + str(error)
for error in (UserError("a mistake"), OSError("a defect")):
    print(dist.all_gather_object(attempt(error)), flush=True)
print(together((lambda: time.sleep(9) or 'slow') if leader else None), flush=True)
os._exit(0)  # past the threads that still sleep
"""


def test_errors_reach_all_ranks_at_once_and_long_work_is_waited_for(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HEAD + BODY)
    done = subprocess.run(
        [str(COMPOSER), "-n", "2", str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "['UserError a mistake', 'UserError a mistake']" in said
    assert "['RuntimeError rank 1 failed: OSError: a defect', 'OSError a defect']" in said
    assert "['slow', None]" in said


def test_one_rank_alone_works_too():
    assert together(lambda: 3) == [3]
    with pytest.raises(UserError, match="a mistake"):
        together(lambda: fail("a mistake"))


def fail(text: str) -> None:
    raise UserError(text)

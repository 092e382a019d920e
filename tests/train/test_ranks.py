"""Ranks that wait for one: longer than a collective operation may take, and never past its error."""

import subprocess
import sys
import time
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


def two_ranks(tmp_path: Path, code: str) -> tuple[int, str]:
    """Run `code` on two ranks; the exit code and what rank 0 (and the launcher) printed."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + code)
    done = subprocess.run(
        [str(COMPOSER), "-n", "2", str(script)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_work_longer_than_the_timeout_of_the_ranks_is_waited_for(tmp_path):
    code, said = two_ranks(tmp_path, "print(together((lambda: time.sleep(9) or 'slow') if leader else None))")
    assert code == 0, said
    assert "['slow', None]" in said


@pytest.mark.parametrize("error", ["UserError('a mistake')", "OSError('a defect')"])
def test_an_error_of_one_rank_ends_all_at_once(tmp_path, error):
    begun = time.monotonic()
    code, said = two_ranks(
        tmp_path,
        f"""
def fail():
    raise {error}
try:
    together(fail if not leader else lambda: time.sleep(60))
except Exception as error:
    said = dist.all_gather_object(type(error).__name__ + " " + str(error))
    print(said, flush=True)
    os._exit(0)  # past the thread that still works
""",
    )
    there = "RuntimeError rank 1 failed: OSError: a defect" if "OSError" in error else "UserError a mistake"
    here = "OSError a defect" if "OSError" in error else there
    assert f"['{there}', '{here}']" in said
    assert code == 0
    assert time.monotonic() - begun < 55


def test_one_rank_alone_works_too():
    assert together(lambda: 3) == [3]
    with pytest.raises(UserError, match="a mistake"):
        together(lambda: fail("a mistake"))


def fail(text: str) -> None:
    raise UserError(text)

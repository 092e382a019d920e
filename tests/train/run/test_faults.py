"""Training on a disk that fails: one line, and the run goes on from its newest complete checkpoint."""

import os
import random
import subprocess
import sys

import pytest

from chimera.commands.train import main
from tests.faulty_disk import compiled, environment
from tests.train.conftest import ROOT, steps_of


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_chaos_a_disk_that_fails_at_any_call(overrides, tmp_path):
    library, rng = compiled(tmp_path), random.Random(5)
    main(overrides("whole"))
    wanted = [line["digest"] for line in steps_of(tmp_path / "whole")]
    command = [sys.executable, "-m", "chimera.train", *overrides("run")]
    failed = lines = whole = 0
    for _ in range(30):
        log = tmp_path / "run.faults"
        faults = environment(library, tmp_path / "run", rng)
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **faults}, capture_output=True, text=True)
        failed += log.exists()
        log.unlink(missing_ok=True)
        assert "Traceback" not in ended.stderr, (faults, ended.stderr)
        assert ended.returncode in (0, 2), (faults, ended.stderr)
        lines += ended.returncode == 2
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert again.returncode == 0, (faults, ended.stderr, again.stderr)
        assert [line["digest"] for line in steps_of(tmp_path / "run")] == wanted
        whole += 1
        subprocess.run(["rm", "-r", tmp_path / "run"], check=True)
    print(f"\ndisk: {failed} of 30 runs met a fault, {lines} ended in a line, {whole} ended with the digests")

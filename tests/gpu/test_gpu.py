"""What only a GPU can run: the checks of `bench/gpu.py`, of which each raises where its claim is untrue.

`python -m pytest -m gpu`; no time is asserted. A check that lacks something else than a GPU is skipped by name.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_checks import CHECKS, FULL, missing_modules, named
from bench.gpu_runs import Runs, Skipped

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """At the sizes of `bench/gpu.py` on a GPU, with a plain run that the checks share."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is false")
    if missing := missing_modules():
        pytest.skip(f"needs {', '.join(missing)}: bench/gpu.py --wheels FOLDER --target DIR, then PYTHONPATH=DIR")
    probe = subprocess.run([sys.executable, "bench/device.py"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return Runs(tmp_path_factory.mktemp("gpu"), FULL, json.loads(probe.stdout))


@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith("speed")])
def test_what_bench_gpu_checks_holds(name: str, runs: Runs) -> None:
    try:
        figures = named(name, runs)
    except Skipped as reason:
        pytest.skip(f"needs {reason}")
    assert figures


def test_a_billion_parameters_train_in_bf16_with_compiled_kernels(runs: Runs) -> None:
    try:
        figures = named("speed large compile", runs)
    except Skipped as reason:
        pytest.skip(f"needs {reason}")
    assert 900 < figures["parameters M"] < 1100
    assert figures["peak GB"] * 1e9 < runs.device["memory"]

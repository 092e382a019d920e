"""One run of `train/main.py` with a clock in it: how long each step took, and the most memory in use.

python bench/timed_run.py OUT.json [--kill-after STEP] CONFIG [key=value ...]
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)


def timed_main(argv: Sequence[str], kill_after: int | None = None) -> dict[str, Any]:
    """Train as `composer train/main.py ARGV` does on one rank.

    Args:
        kill_after: the step at whose end the process kills itself with SIGKILL.

    Returns:
        `seconds`: of each step but the last, by its number; `parameters` of the model; `flops_per_token` by sequence
        length, of a forward and a backward pass; `peak_bytes`: of GPU memory, of the process's on a CPU; `matmul_flops`
        a second, taken right after the run.
    """
    import torch
    from composer import Callback

    from bench.device import matmul_ceiling
    from chimera.commands import train as command

    on_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {}
    starts: dict[int, float] = {}

    class Clock(Callback):
        def fit_start(self, state: Any, logger: Any) -> None:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()

        def batch_start(self, state: Any, logger: Any) -> None:
            # The monitor reads the loss at each step's end, so what a GPU was asked to do before is done.
            starts[state.timestamp.batch.value] = time.perf_counter()

        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch.value - 1 == kill_after:  # composer has counted the step
                os.kill(os.getpid(), signal.SIGKILL)

        def fit_end(self, state: Any, logger: Any) -> None:
            model = getattr(state.model, "module", state.model)
            found["parameters"] = model.size
            found["flops_per_token"] = {
                length: model.flops_per_batch({"input_ids": torch.empty(1, length, device="meta")}) / length
                for length in lengths
            }

    lengths: list[int] = []
    build = command.build_trainer

    def with_clock(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        trainer.state.callbacks.append(Clock())  # behind the monitor, which writes the step's line
        settings = next(a for a in arguments if hasattr(a, "curriculum"))
        lengths.extend(stage.seq_len for stage in settings.curriculum.stages)
        return trainer

    command.build_trainer = with_clock
    try:
        command.main(argv)
    finally:
        command.build_trainer = build
    found["seconds"] = {step: after - at for (step, at), (_, after) in pairwise(starts.items())}
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "peak_bytes": peak, "matmul_flops": matmul_ceiling()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--kill-after", type=int, metavar="STEP")
    args, config = parser.parse_known_args()
    args.out.write_text(json.dumps(timed_main(config, args.kill_after)))


if __name__ == "__main__":
    from chimera.cli import run

    run(lambda _: main())

"""Time and memory of a build and a run at many times the size of the recipe: parts, streams, files, shards, ranks.

`python bench/scale.py [--only CASE ...] [--scale X] [--json FILE]`

Nothing of it is text or a model: the sources are tiny, parts end at once, and all shards of an index are one and the
same file. What is measured is what grows with the number of things. Each case is a process of its own; `cpu` is its
CPU seconds, with those of its children; `peak` is the most resident memory it has meanwhile, imports included.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # so imports of the project come after it

from bench import scale_build, scale_train
from chimera.text import table

Row = dict[str, Any]
# the function, and its sizes: each is multiplied by `--scale`
CASES = {
    "parts": (scale_build.parts, 10_000),
    "streams": (scale_build.streams, 3_000),
    "text files": (scale_build.text_files, 100_000),
    "line files": (scale_build.line_files, 100_000),
    "index": (scale_train.index, 1_000_000),
    "ranks": (scale_train.ranks, 1_000),
    "lanes": (scale_train.lanes, 64),
    "streams of a run": (scale_train.streams, 3_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--scale", type=float, default=1, help="of all sizes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for name in args.only:
        pool = multiprocessing.get_context("spawn").Pool(1)
        with tempfile.TemporaryDirectory() as folder:
            found += pool.apply(case, (name, max(2, round(CASES[name][1] * args.scale)), folder))
        pool.close()
        pool.join()  # it ends by itself: nothing of it is left over
        say(f"{name}: done")
    rows = [[f"{row['size']} {row['case']}", row["what"], row["cpu"], row["peak"], row["figures"]] for row in found]
    print("\n".join(table(["", "", "cpu s", "peak MB", ""], [list(map(shown, row)) for row in rows])))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def case(name: str, size: int, folder: str) -> list[Row]:
    """The rows of one case, measured in this process."""
    rows: list[Row] = []

    @contextmanager
    def measured(what: str) -> Iterator[dict[str, Any]]:
        """A row of what happens in the block, which may add figures to it."""
        figures: dict[str, Any] = {}
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        start = cpu_seconds()
        yield figures
        cpu, peak = cpu_seconds() - start, memory("VmHWM")
        row = {"case": name, "size": size, "what": what, "cpu": round(cpu, 3), "peak": round(peak, 1)}
        rows.append({**row, "figures": figures})
        say(f"{name}, {what}: {cpu:.2f} s, {peak:.0f} MB {shown(figures)}")

    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # a line for each stream and bar
        CASES[name][0](size, Path(folder), measured)
    return rows


def shown(value: Any) -> str:
    return ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else str(value)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.__stderr__, flush=True)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def memory(field: str) -> float:
    """A field of this process's status, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()

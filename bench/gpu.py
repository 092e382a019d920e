"""What a GPU shows of this project, in ten minutes: every path that CPUs cannot run, and how fast it trains.

    python bench/gpu.py [--only CHECK ...] [--smallest] [--minutes 10] [--folder DIR] [--json FILE]

It needs torch and transformers, and of the rest what `--wheels` brings to a machine that reaches no registry:

    python bench/gpu.py --collect FOLDER --python 3.12      where a registry is reached
    python bench/gpu.py --wheels FOLDER [--target DIR]      on the machine with the GPU

Each check trains with `train/main.py` in processes of its own, on shards made here, and ends as a row of one table: its
figures, `skipped` with what is missing, or `FAILED` with why. The exit code is 1 where one failed. The table is
followed by the same as JSON. Without a GPU the sizes are the smallest, in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from bench.wheels import collect, install
from chimera.text import table as aligned

Row = dict[str, Any]  # name, result, seconds, figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="of the names in the table")
    parser.add_argument("--smallest", action="store_true", help="the sizes for a CPU, on a GPU too")
    parser.add_argument("--minutes", type=float, default=10, help="checks that have not begun by then are skipped")
    parser.add_argument("--limit", type=float, help="minutes a check may take (default: its own, 1 to 4)")
    parser.add_argument("--folder", type=Path, help="keep runs and logs here, an empty folder")
    parser.add_argument("--json", type=Path, help="write the JSON here too")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install what is missing from these wheels first")
    parser.add_argument("--target", type=Path, metavar="DIR", help="install there, to be kept (default: temporary)")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="download the wheels, and do no more")
    parser.add_argument("--python", default="3.12", help="the Python that --collect is for")
    args = parser.parse_args()
    if args.collect:
        print(collect(args.collect, args.python))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        if args.wheels:
            return again_with(args.wheels, args.target or Path(temporary, "packages"))
        folder = args.folder or Path(temporary, "runs")
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--folder {folder} is not empty")
        rows, found = measure(folder.resolve(), args)
    print(table(rows))
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(row["result"].startswith("FAILED") for row in rows) else 0


def again_with(wheels: Path, target: Path) -> int:
    """Install what is missing into `target`, and run the same command without `--wheels` in a process that sees it."""
    chosen = install(wheels, target.resolve())
    print(f"installed from {wheels} into {target}: {', '.join(chosen) or 'nothing, all is there'}", file=sys.stderr)
    path = os.pathsep.join(filter(None, [str(target.resolve()), os.environ.get("PYTHONPATH")]))
    command, left = [], iter(sys.argv)
    for word in left:
        if word in ("--wheels", "--target"):
            next(left)
        elif not word.startswith(("--wheels=", "--target=")):
            command.append(word)
    return subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Every check's row, and all that was found."""
    began = time.monotonic()
    probe = subprocess.run(
        [sys.executable, "bench/device.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    device = json.loads(probe.stdout)
    from bench.gpu_checks import CHECKS, FULL, SMALLEST, missing_modules, versions_line
    from bench.gpu_runs import Runs

    sizes = FULL if device["on_gpu"] and not args.smallest else SMALLEST
    print(versions_line(device), file=sys.stderr)
    unknown = set(args.only or ()) - set(CHECKS)
    if unknown:
        raise SystemExit(f"error: --only {', '.join(sorted(unknown))}: known are {', '.join(CHECKS)}")
    missing, runs = missing_modules(), Runs(folder, sizes, device)
    runs.limit = args.limit
    rows = []
    for name in args.only or CHECKS:
        lacking = missing if name != "matmul ceiling" else []
        row = run_check(name, runs, lacking, began + 60 * args.minutes)
        print(f"{row['seconds']:6.1f} s  {name}: {row['result']}", file=sys.stderr)
        rows.append(row)
    about = {"sizes": "full" if sizes is FULL else "smallest", "seconds": round(time.monotonic() - began, 1)}
    return rows, {**device, **about, "checks": rows}


def run_check(name: str, runs: Any, missing: list[str], end: float) -> Row:
    """One row. `missing`: modules this Python lacks; `end`: the monotonic time past which no check begins."""
    from bench.gpu_checks import named
    from bench.gpu_runs import Failed, Skipped

    began, figures = time.monotonic(), {}
    try:
        if missing:
            raise Skipped(f"{', '.join(missing)} (--wheels FOLDER brings them)")
        if began > end:
            raise Skipped("time: raise --minutes")
        figures, result = named(name, runs), "ok"
    except Skipped as reason:
        result = f"skipped: needs {reason}"
    except Failed as reason:
        result = f"FAILED: {reason}"
    except Exception as error:  # a defect of the check's: the others still run
        traceback.print_exc()
        result = f"FAILED: {type(error).__name__}: {error}".split("\n")[0]
    return {"name": name, "result": result, "seconds": round(time.monotonic() - began, 1), "figures": figures}


def table(rows: list[Row]) -> str:
    """Name, result and figures of each row."""

    def shown(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    figures = [", ".join(f"{name} {shown(value)}" for name, value in row["figures"].items()) for row in rows]
    cells = [(row["name"], row["result"], shown) for row, shown in zip(rows, figures, strict=True)]
    return "\n".join(aligned((), cells))


if __name__ == "__main__":
    sys.exit(main())

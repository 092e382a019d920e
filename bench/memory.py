"""How much memory a build takes for the largest things its readers must hold: a page, a batch, a line.

`python bench/memory.py [--scale X] [--json FILE]`

Each row of the table is one build with one worker, from the file's reading to its shards; the peak (resident memory) is
that of the worker or of the builder, whichever took more. `held` is what the format makes its library hold at once.
Files that are memory-mapped count while the system has nothing better to do with the memory: `peak` has them, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # so imports of the project come after it

from tests.convert import builds

MEASURE = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)
BOOK = 400_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", type=float, default=1, help="of all sizes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for what, suffix, megabytes, held, write in CASES:
        with tempfile.TemporaryDirectory() as folder:
            file, size = Path(folder, f"in{suffix}"), int(megabytes * 1e6 * args.scale)
            write(file, size)
            peak = peak_of(file, Path(folder))
        found.append({"what": what, "held_megabytes": round(held * args.scale), "peak_megabytes": peak})
        print(f"{what:<66} held {found[-1]['held_megabytes']:>4} MB   peak {peak:>5} MB", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def books(size: int) -> Any:
    """A table of texts of 400 kB, half of them of no pattern."""
    import pyarrow as pa

    return pa.table({"text": [os.urandom(BOOK // 4).hex() + "a" * (BOOK // 2) for _ in range(size // BOOK)]})


def parquet(**options: Any) -> Callable[[Path, int], None]:
    def write(file: Path, size: int) -> None:
        import pyarrow.parquet as pq

        pq.write_table(books(size), file, row_group_size=1 << 20, **options)

    return write


def arrow(compression: str | None) -> Callable[[Path, int], None]:
    def write(file: Path, size: int) -> None:
        import pyarrow as pa

        made, options = books(size), pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_stream(str(file), made.schema, options=options) as writer:
            writer.write_table(made)

    return write


def line(file: Path, size: int) -> None:
    text = "Why does the river bend where the hill is soft? "
    file.write_bytes(builds.jsonl([{"text": builds.PROSE}, {"text": text * (size // len(text))}]))


def short(file: Path, size: int) -> None:
    file.write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, size // 600)))


CASES: list[tuple[str, str, int, int, Callable[[Path, int], None]]] = [
    ("JSONL of short lines", ".jsonl", 20, 0, short),
    (
        "parquet: books in a row group of 400 MB, a page for each",
        ".parquet",
        400,
        0,
        parquet(use_dictionary=False, write_batch_size=1),
    ),
    ("parquet: books in a page of 200 MB", ".parquet", 200, 200, parquet(use_dictionary=False)),
    ("parquet: books in a dictionary's page of 200 MB", ".parquet", 200, 200, parquet()),
    ("parquet: books in a row group of 400 MB, one page", ".parquet", 400, 400, parquet()),
    ("Arrow: books in a batch of 150 MB", ".arrow", 150, 0, arrow(None)),
    ("Arrow: books in a batch of 150 MB, compressed", ".arrow", 150, 150, arrow("zstd")),
    ("JSONL: a line of 100 MB", ".jsonl", 100, 100, line),
]


def peak_of(file: Path, folder: Path) -> int:
    """Megabytes that a build of a file takes at most."""
    settings = builds.config(folder, folder / "out", block_len=1024, shard_bytes=32 << 20, workers=1)
    settings["streams"] = {"s": {"sources": [{"files": [str(file)]}]}}
    config = folder / "shards.yaml"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-c", MEASURE, sys.executable, str(ROOT / "convert" / "build_shards.py"), str(config)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return round(int(done.stdout) * 1024 / 1e6)


if __name__ == "__main__":
    main()

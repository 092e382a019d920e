"""What a run did, from its save folder: a short summary on stdout and a page, `SAVE_FOLDER/report.html`.

    python train/report.py SAVE_FOLDER [OTHER] [--out FILE] [--json] [--watch] [--every SECONDS]

Works while the run goes on, and on a run in a store. Two runs are drawn in one page, and it says up to which step they
saw the same batches. Exits 1 when a step's digest is not the one that its run's plan and shards give.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chimera.cli import UserError, run, say, show
from chimera.files import try_lock, write_whole
from chimera.stores import is_remote
from chimera.text import json_text, one_line

if TYPE_CHECKING:
    from chimera.train.history.runlog import Run

CLEAR = "\x1b[H\x1b[2J"  # of a terminal
Found = list[tuple["Run", list[int], str | None]]  # runs, steps that differ from the plan's, why none was compared


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description="Write a run's report from its save folder; of two runs, one that compares them."
    )
    parser.add_argument("folder", metavar="SAVE_FOLDER", help="a run's `save_folder`, here or in a store")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="that of a run to compare it with")
    parser.add_argument(
        "--out",
        type=Path,
        help="the page (default: SAVE_FOLDER/report.html, or ./report.html of two runs and of one in a store)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and write no page but to --out")
    parser.add_argument("--watch", action="store_true", help="again and again until the run has ended")
    parser.add_argument("--every", metavar="SECONDS", type=int, default=10, help="between two looks (default: 10)")
    args = parser.parse_args(list(argv))
    if args.every < 1:
        raise UserError(f"--every {args.every}: give the seconds between two looks, at least 1")
    folders = [args.folder, *([args.other] if args.other else [])]
    out = page_file(folders, args.out, args.json)
    if args.watch:
        say(f"again every {args.every} s until all steps are done; Ctrl-C ends the looking, not the run")
    while True:
        going = args.watch and any(map(is_going_on, folders))
        found = look(folders)
        going = going and not all(ended(each) for each, _, _ in found)
        if out is not None:
            write_page(out, found, args.every if going else None)
        if args.watch and not args.json and sys.stdout.isatty():
            sys.stdout.write(CLEAR)
        print_report(found, args.json)
        if out is not None and not args.json:
            show(f"page: {one_line(out)}")
        if not going:
            return 1 if any(differing for _, differing, _ in found) else 0
        sys.stdout.flush()
        time.sleep(args.every)


def page_file(folders: Sequence[str], out: Path | None, as_json: bool) -> Path | None:
    """Where the page goes; None: it is not asked for. Raises `UserError` where it can be no file."""
    if out is None and as_json:
        return None
    if out is None:
        out = Path("report.html") if len(folders) > 1 or is_remote(folders[0]) else Path(folders[0]) / "report.html"
    if is_remote(str(out)):
        raise UserError(f"{out} cannot be written (it is not a file here): give another place with --out")
    if out.is_dir():
        raise UserError(f"{out} cannot be written (it is a folder): give another place with --out")
    return out


def look(folders: Sequence[str]) -> Found:
    """The runs as they are now, with what their digests say."""
    from chimera.train.history.digests import compare_digests

    runs = [read(place) for place in folders]
    return [(each, *compare_digests(each)) for each in runs]


def read(place: str) -> "Run":
    """The run in a save folder, here or in a store."""
    from chimera.train.history.run_files import read_run

    if not is_remote(place):
        return read_run(Path(place))
    from chimera.train.run.run_store import RunStore

    store = RunStore(place)
    with tempfile.TemporaryDirectory(prefix="chimera-report-") as folder:
        store.fetch_files(Path(folder), 0)
        return read_run(Path(folder), place, list(store.sizes.items()))


def is_going_on(place: str) -> bool:
    """Whether a process trains in a save folder, as far as can be told: in a store nothing says that it ended."""
    if is_remote(place):
        return True
    lock = Path(place) / ".lock"
    try:
        with lock.open() as file:
            return not try_lock(file.fileno(), lock)  # and given up at once
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a file system without locks


def ended(found: "Run") -> bool:
    """Whether a run has done all its steps."""
    from chimera.train.order.run_plan import end_step

    return found.done >= end_step(found.settings.max_duration, found.plan.steps)


def write_page(out: Path, found: Found, again: int | None) -> None:
    """Write the page of one run or two; `again`: seconds after which a browser reads it again."""
    from chimera.train.history.compare import Pair
    from chimera.train.history.compare_page import compare_page
    from chimera.train.history.page import page

    if len(found) == 1:
        text = page(*found[0], again)
    else:
        text = compare_page(Pair(found[0][0], found[1][0]), again)
    try:
        write_whole(out, text.encode(), sync="nothing")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another place with --out") from None


def print_report(found: Found, as_json: bool) -> None:
    from chimera.train.history.compare import Pair, compare
    from chimera.train.history.facts import facts
    from chimera.train.history.summary import digests_of, summary

    pair = Pair(found[0][0], found[1][0]) if len(found) > 1 else None
    if as_json:
        runs = [facts(*each) for each in found]
        print(json_text({"runs": runs, **pair.facts()} if pair else runs[0]))
    elif pair:
        show(compare(pair))
        for name, each in zip(pair.names, found, strict=True):
            show(f"{one_line(name)}: {digests_of(*each)}")
    else:
        show(summary(*found[0]))


def entry() -> None:
    run(main)

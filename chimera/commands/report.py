"""What a run did, from its save folder: a short summary on stdout and `SAVE_FOLDER/report.html`.

    python train/report.py SAVE_FOLDER [--out FILE]

Works while the run goes on. Exits 1 when a step's digest is not the one the plan and the shards give.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chimera.cli import UserError, run, show
from chimera.files import write_whole
from chimera.stores import is_remote
from chimera.text import NONE, amount, decimal, one_line, percent, span, table

if TYPE_CHECKING:
    from chimera.train.history.runlog import Run


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description="Write a run's report from its save folder.")
    parser.add_argument("folder", metavar="SAVE_FOLDER", type=Path, help="the run's `save_folder`")
    parser.add_argument("--out", type=Path, help="the page (default: SAVE_FOLDER/report.html)")
    args = parser.parse_args(list(argv))

    from chimera.train.history.digests import compare_digests
    from chimera.train.history.page import page
    from chimera.train.history.runlog import read_run

    if args.out is not None and is_remote(str(args.out)):
        raise UserError(f"{args.out} cannot be written (it is not a file here): give another place with --out")
    found = read_run(args.folder)
    differing, unchecked = compare_digests(found)
    out = args.folder / "report.html" if args.out is None else args.out
    if out.is_dir():
        raise UserError(f"{out} cannot be written (it is a folder): give another place with --out")
    try:
        write_whole(out, page(found, differing, unchecked).encode(), sync="nothing")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another place with --out") from None
    show(summary(found, differing, unchecked))
    show(f"page: {one_line(out)}")
    return 1 if differing else 0


def summary(found: "Run", differing: Sequence[int], unchecked: str | None) -> str:
    """The same facts as the page's, in plain text."""
    from chimera.train.history.page import lost, padded, untrained

    starts = ", ".join(f"step {start['from_step']} on {start['ranks']}" for start in found.starts)
    text = [
        f"run {one_line(found.settings.run_name)}: {found.done} of {found.plan.steps} steps, {found.tokens:,} tokens"
        + (
            f" ({percent(1 - found.tokens / found.positions)} of {found.positions:,} positions are padding)"
            if padded(found)
            else ""
        ),
        f"starts (step, ranks): {starts or 'not recorded'}",
        "",
        *table(
            ("phase", "steps", "stream", "planned", "realized", "of the tokens", "off by at most"),
            [
                (
                    row.phase,
                    span(row.first_step, row.end_step),
                    row.stream,
                    percent(row.planned),
                    percent(row.realised),
                    percent(row.of_tokens),
                    NONE if row.worst is None else f"{row.worst:.2f} blocks",
                )
                for row in found.mix()
            ],
        ),
        "",
        *table(
            ("stage", "steps", f"done{found.since}", "tokens", "loss", "loss at its end"),
            [
                (
                    f"{row.phase} {row.seq_len}",
                    span(row.first_step, row.end_step),
                    str(row.done),
                    amount(row.tokens),
                    decimal(row.mean_loss),
                    decimal(row.last_loss),
                )
                for row in found.stages()
            ],
        ),
        "",
        f"data: manifest {one_line(found.about.get('manifest'))[:16]}, "
        f"digests of all steps{found.since} {found.digest[:16]}",
    ]
    if found.untrained:
        text.append(untrained(found))
    if found.missing:
        text.append(lost(found))
    if unchecked is not None:
        text.append(f"digests were not compared with the plan's: {unchecked}")
    elif not found.digests:
        text.append("digests: no step is logged in steps.jsonl")
    elif differing:
        text.append(f"digests: {len(differing)} steps DIFFER from the plan's, the first is step {differing[0]}")
    else:
        text.append(
            f"digests: all {len(found.digests)} steps{found.since} equal those computed from the plan and the shards"
        )
    return "\n".join(text)


def entry() -> None:
    run(main)

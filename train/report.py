"""What a run did, from its save folder: a short summary on stdout and `SAVE_FOLDER/report.html`.

    python train/report.py SAVE_FOLDER [--out FILE]

Works while the run goes on. Exits 1 when a step's digest is not the one the plan and the shards give.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.cli import UserError, run

if TYPE_CHECKING:
    from train.runlog import Run


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description="Write a run's report from its save folder.")
    parser.add_argument("folder", metavar="SAVE_FOLDER", type=Path, help="the run's `save_folder`")
    parser.add_argument("--out", type=Path, help="the page (default: SAVE_FOLDER/report.html)")
    args = parser.parse_args(list(argv))

    from train.digests import compare_digests
    from train.page import page
    from train.runlog import read_run

    found = read_run(args.folder)
    differing, unchecked = compare_digests(found)
    out = args.folder / "report.html" if args.out is None else args.out
    if out.is_dir():
        raise UserError(f"{out} cannot be written (it is a folder): give another place with --out")
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        temporary.write_text(page(found, differing, unchecked), encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another place with --out") from None
    print(summary(found, differing, unchecked))
    print(f"page: {out}")
    return 1 if differing else 0


def summary(found: "Run", differing: Sequence[int], unchecked: str | None) -> str:
    """The same facts as the page's, in plain text."""
    from train.charts import short
    from train.page import lost, number, percent, span

    starts = ", ".join(f"step {start['from_step']} on {start['ranks']}" for start in found.starts)
    text = [
        f"run {found.settings.run_name}: {found.done} of {found.plan.steps} steps, {found.tokens:,} tokens",
        f"starts (step, ranks): {starts or 'not recorded'}",
        "",
        *table(
            ("phase", "steps", "stream", "planned", "realised", "off by at most"),
            [
                (
                    row.phase,
                    span(row.first_step, row.end_step),
                    row.stream,
                    percent(row.planned),
                    percent(row.realised),
                    "–" if row.worst is None else f"{row.worst:.2f} blocks",
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
                    short(row.tokens),
                    number(row.mean_loss),
                    number(row.last_loss),
                )
                for row in found.stages()
            ],
        ),
        "",
        f"data: manifest {str(found.about.get('manifest'))[:16]}, "
        f"digests of all steps{found.since} {found.digest[:16]}",
    ]
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


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, text left and numbers right."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    left = [all(not cell[:1].isdigit() and cell != "–" for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in (heads, *rows)
    ]


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()

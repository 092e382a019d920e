"""A run's report in plain text: the same facts as its page's."""

from collections.abc import Sequence

from chimera.text import NONE, amount, decimal, one_line, percent, span, table
from chimera.train.history.page import lost, padded, untrained
from chimera.train.history.runlog import Run


def summary(run: Run, differing: Sequence[int], unchecked: str | None) -> str:
    """The same facts as the page's, in plain text."""
    starts = ", ".join(f"step {start['from_step']} on {start['ranks']}" for start in run.starts)
    text = [
        f"run {one_line(run.settings.run_name)}: {run.done} of {run.plan.steps} steps, {run.tokens:,} tokens"
        + (
            f" ({percent(1 - run.tokens / run.positions)} of {run.positions:,} positions are padding)"
            if padded(run)
            else ""
        ),
        f"starts (step, ranks): {starts or 'not recorded'}",
        *([f"branch of {one_line(run.origin)}: {one_line(run.parent['checkpoint'])}"] if run.parent else []),
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
                for row in run.mix()
            ],
        ),
        "",
        *table(
            ("stage", "steps", f"done{run.since}", "tokens", "loss", "loss at its end"),
            [
                (
                    f"{row.phase} {row.seq_len}",
                    span(row.first_step, row.end_step),
                    str(row.done),
                    amount(row.tokens),
                    decimal(row.mean_loss),
                    decimal(row.last_loss),
                )
                for row in run.stages()
            ],
        ),
        "",
        f"data: manifest {one_line(run.about.get('manifest'))[:16]}, digests of all steps{run.since} {run.digest[:16]}",
    ]
    if run.untrained:
        text.append(untrained(run))
    if run.missing:
        text.append(lost(run))
    return "\n".join([*text, digests_of(run, differing, unchecked)])


def digests_of(run: Run, differing: Sequence[int], unchecked: str | None) -> str:
    """What the comparison of a run's digests with its plan's says."""
    if unchecked is not None:
        return f"digests were not compared with the plan's: {unchecked}"
    if not run.digests:
        return "digests: no step is logged in steps.jsonl"
    if differing:
        return f"digests: {len(differing)} steps DIFFER from the plan's, the first is step {differing[0]}"
    return f"digests: all {len(run.digests)} steps{run.since} equal those computed from the plan and the shards"

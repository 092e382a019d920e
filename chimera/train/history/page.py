"""A run's report as one HTML page: inline SVG and CSS, no script, nothing fetched from anywhere."""

from collections.abc import Iterable, Sequence

from chimera.text import NONE, amount, decimal, html, percent, size, span
from chimera.train.data.places import shown
from chimera.train.history.facts import LAST, last_loss
from chimera.train.history.figures import figures, ranks
from chimera.train.history.runlog import MixRow, Run, StageRow

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#fff;--ink:#1c2024;--soft:#5a636d;--grid:#e3e6ea;--edge:#d5d9de;
--good:#1a7f4b;--bad:#c02b2b;
--s0:#2166c4;--s1:#c65a11;--s2:#14866d;--s3:#8a3fb5;--s4:#a17900;--s5:#c2316f;--s6:#4b6b88;--s7:#5f7d16}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1b1f23;--ink:#e8eaed;--soft:#a3acb5;--grid:#2c3238;
--edge:#343b42;--good:#57c98b;--bad:#ff7a70;
--s0:#6ea8ff;--s1:#f2965a;--s2:#43c9a8;--s3:#c792f0;--s4:#dcb53f;--s5:#f07fae;--s6:#93b1cc;--s7:#a9c956}}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px 16px 48px;max-width:1120px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:24px;margin:0 0 2px}h2{font-size:17px;margin:0 0 2px}p{margin:0 0 8px;color:var(--soft)}
.tiles,.grid{display:grid;gap:14px;margin:18px 0}
.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.grid{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));align-items:start}
.rows{grid-template-columns:minmax(0,1fr)}
section,.tiles>div{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px 14px;min-width:0}
.tiles b{display:block;font-size:21px;line-height:1.25}.tiles span{color:var(--soft);font-size:13px}
.good b{color:var(--good)}.bad b{color:var(--bad)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;margin:6px 0 0;padding:0;font-size:13px}
.legend i{display:inline-block;width:16px;margin-right:6px;border-top:3px solid var(--c);vertical-align:middle}
.legend i.dash{border-top:2px dashed var(--ink)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px 4px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{font-weight:600;color:var(--soft);font-size:13px}td.text,th.text{text-align:left}
tr:last-child td{border-bottom:0}
code{font:12.5px/1.5 ui-monospace,Consolas,monospace;overflow-wrap:anywhere}
@media(max-width:520px){svg text{font-size:13.5px}table{font-size:12.5px}th{font-size:12px;white-space:normal}
th,td{padding-right:6px}section,.tiles>div{padding:10px}}
dl{margin:0}dt{color:var(--soft);font-size:13px}dd{margin:0 0 6px}
"""


def page(run: Run, differing: Sequence[int], unchecked: str | None, again: int | None = None) -> str:
    """The page of a run; `differing` are steps whose digest is not the plan's, `unchecked` why none was computed.

    `again`: seconds after which a browser reads it again.
    """
    tables = "".join(
        [
            _table_of_mix(run.mix()),
            _table_of_stages(run.stages(), run.since),
            _table_of_evals(run),
            _table_of_passes(run),
            _table_of_starts(run),
            _table_of_checkpoints(run),
            _data(run, differing, unchecked),
        ]
    )
    body = f'<div class="tiles">{_tiles(run, differing, unchecked)}</div>'
    body += f'<div class="grid">{figures(run)}</div><div class="grid">{tables}</div>'
    return frame(html(run.settings.run_name), _summary(run), body, again)


def frame(title: str, note: str, body: str, again: int | None = None) -> str:
    """A whole page; all is HTML. `again`: seconds after which a browser reads it again."""
    refresh = f'<meta http-equiv="refresh" content="{again}">' if again else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">{refresh}'
        f"<style>{STYLE}</style><body><h1>{title}</h1><p>{note}</p>{body}</body></html>\n"
    )


def lost(run: Run) -> str:
    """What is said of steps that are missing in the log."""
    return (
        f"steps.jsonl lacks {len(run.missing)} of the steps {run.first} to {run.done - 1}, the first is step "
        f"{run.missing[0]}: nothing of them is counted here"
    )


def padded(run: Run) -> bool:
    """Whether some of the positions so far were padding."""
    return 0 < run.tokens < run.positions


def untrained(run: Run) -> str:
    """What is said of steps without a loss."""
    return f"{run.untrained} of the steps logged had no token to train on: they have no loss and count in no mean"


def worst(rows: Iterable[MixRow]) -> float | None:
    """Blocks any stream was off its target at most, in any phase."""
    return max((row.worst for row in rows if row.worst is not None), default=None)


def _summary(run: Run) -> str:
    phases = ", then ".join(f"{html(p.name)} ({p.steps} steps)" for p in run.plan.phases)
    lengths = ", ".join(str(n) for n in dict.fromkeys(s.seq_len for s in run.plan.segments))
    branch = f"; a branch of {html(run.origin)}" if run.parent else ""
    return f"{phases}; sequences of {lengths} tokens{branch}"


def _tiles(run: Run, differing: Sequence[int], unchecked: str | None) -> str:
    off = worst(run.mix())
    if unchecked is not None:
        check = ("", NONE, "digests not compared")
    elif differing:
        check = ("bad", str(len(differing)), f"steps are not the plan's, the first is {differing[0]}")
    else:
        check = ("good", f"{len(run.digests)} of {len(run.digests)}", f"steps{run.since} have the plan's digest")
    tiles = [
        ("", f"{run.done:,} of {run.plan.steps:,}", "steps"),
        ("", amount(run.tokens), "tokens"),
        *([("", percent(1 - run.tokens / run.positions), "of the positions are padding")] if padded(run) else []),
        ("", decimal(last_loss(run)), f"loss, mean of the last {LAST} steps"),
        ("", decimal(off, 2), "blocks a stream was off its share at most"),
        check,
    ]
    return "".join(f'<div class="{kind}"><b>{value}</b><span>{label}</span></div>' for kind, value, label in tiles)


def html_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", text: int = 1) -> str:
    """A card with a table; the first `text` columns are aligned left. Cells are escaped here."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="text"' if index < text else "" for index in range(len(cells))]
        return "".join(f"<{tag}{kind}>{html(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    if not body:
        return ""
    return (
        f"<section><h2>{title}</h2>{f'<p>{note}</p>' if note else ''}"
        f'<div class="wide"><table><tr>{row("th", heads)}</tr>{body}</table></div></section>'
    )


def _table_of_mix(rows: Sequence[MixRow]) -> str:
    cells = [
        (row.stream, row.phase, *map(percent, (row.planned, row.realised, row.of_tokens)), decimal(row.worst, 2))
        for row in rows
    ]
    note = "Shares of the positions; of the tokens, which padding is none of. "
    note += "Off: blocks the stream was away from its share at most, at any step."
    heads = ("stream", "phase", "planned", "realized", "of the tokens", "off")
    return html_table("Planned and realized mix", heads, cells, note, 2)


def _table_of_stages(rows: Sequence[StageRow], since: str) -> str:
    cells = [
        (
            f"{row.phase} {row.seq_len}",
            span(row.first_step, row.end_step)
            + (f", {row.done} done" if row.done < row.end_step - row.first_step else ""),
            amount(row.tokens),
            decimal(row.mean_loss),
            decimal(row.last_loss),
        )
        for row in rows
    ]
    note = f"A phase at one sequence length{since and f', counted{since}'}. "
    note += "Loss: mean over its trained tokens, and over those of its last tenth of steps."
    return html_table("Stages", ("stage", "steps", "tokens", "loss", "at its end"), cells, note)


def _table_of_evals(run: Run) -> str:
    lengths = sorted({seq_len for _, seq_len in run.evals})
    cells = [
        [stream, *(decimal(run.evals[stream, n][1][-1]) if (stream, n) in run.evals else NONE for n in lengths)]
        for stream in run.evaluated
    ]
    last = max((int(steps[-1]) for steps, _ in run.evals.values()), default=0)
    note = f"Mean over each stream's eval split after step {last}, by sequence length."
    return html_table("Loss of each stream", ["stream", *map(str, lengths)], cells, note)


def _table_of_passes(run: Run) -> str:
    cells = [
        (stream, f"{stored:,}", decimal(so_far, 2), decimal(in_all, 2))
        for stream, stored, so_far, in_all in run.passes()
    ]
    return html_table("Passes over the data", ("stream", "blocks stored", "so far", "at the plan's end"), cells)


def _table_of_starts(run: Run) -> str:
    cells = [
        (str(start["from_step"]), ranks(start), start.get("versions", {}).get("torch", NONE)) for start in run.starts
    ]
    note = "Every start of the run: the first, and each resume with its ranks."
    return html_table("Starts and topologies", ("from step", "on", "torch"), cells, note)


def _table_of_checkpoints(run: Run) -> str:
    cells = [(name, str(step), size(held)) for step, name, held in run.checkpoints]
    return html_table("Checkpoints kept", ("file", "step", "size"), cells)


def _data(run: Run, differing: Sequence[int], unchecked: str | None) -> str:
    if unchecked is not None:
        check = f"not compared with the plan: {html(unchecked)}"
    elif not run.digests:
        check = "no step is logged in steps.jsonl"
    elif differing:
        check = f"{len(differing)} steps differ from the plan's, the first is step {differing[0]}"
    else:
        check = f"all {len(run.digests)} equal those computed from the plan and the shards"
    if run.untrained:
        check += f"; {untrained(run)}"
    if run.missing:
        check += f"; {lost(run)}"
    parent = ""
    if run.parent:
        parent = f"<dt>branch of {html(run.origin)}</dt><dd><code>{html(run.parent['checkpoint'])}</code></dd>"
        parent += f"<dt>its checkpoint, SHA-256</dt><dd><code>{html(run.parent['digest'])}</code></dd>"
    versions = ", ".join(f"{html(k)} {html(v)}" for k, v in run.about.get("versions", {}).items())
    return (
        "<section><h2>Data</h2><dl>"
        f"{parent}<dt>shards</dt><dd><code>{html(shown(run.settings.shards))}</code></dd>"
        f"<dt>manifest, SHA-256</dt><dd><code>{html(run.about.get('manifest'))}</code></dd>"
        f"<dt>digests of steps {run.first} to {max(0, run.done - 1)}, SHA-256 over all</dt>"
        f"<dd><code>{run.digest}</code></dd>"
        f"<dt>digests of the steps</dt><dd>{check}</dd>"
        f"<dt>versions</dt><dd>{versions}</dd></dl></section>"
    )

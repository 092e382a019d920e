"""Two runs side by side: up to which step both saw the same batches, and what their configs have different."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chimera.config import leaves
from chimera.stores import is_remote
from chimera.text import NONE, counted, decimal, one_line, percent, span, table
from chimera.train.history.facts import LAST, last_loss
from chimera.train.history.runlog import Run

Rows = list[tuple[str, ...]]
NAMES = {"run_name", "save_folder", "branch.from", "branch.step", "branch"}  # differ in any two runs: shown apart


@dataclass(frozen=True)
class Pair:
    """Two runs, as given."""

    one: Run
    other: Run

    @property
    def runs(self) -> tuple[Run, Run]:
        return self.one, self.other

    @property
    def names(self) -> tuple[str, str]:
        """What the runs are called: their names, or where these are the same their save folders."""
        one, other = (run.settings.run_name for run in self.runs)
        return (one, other) if one != other else (self.one.address, self.other.address)

    @cached_property
    def digests(self) -> list[tuple[int, bool]]:
        """The steps that both have logged, in order, and whether their batches were the same."""
        one, other = (dict(zip(run.steps.tolist(), run.digests, strict=True)) for run in self.runs)
        return [(step, one[step] == other[step]) for step in sorted(one.keys() & other.keys())]

    @property
    def apart(self) -> int | None:
        """The first step that both have logged with other batches; None: there is none."""
        return next((step for step, same in self.digests if not same), None)

    @property
    def agreement(self) -> str:
        """What the digests say, in words: up to which step both saw the same batches."""
        if not self.digests:
            return f"no step is logged by both{self._before(self.one.done)}"
        first, last = self.digests[0][0], self.digests[-1][0]
        count = counted(len(self.digests), "step")
        if self.apart is None:
            return f"all {count} that both logged ({span(first, last + 1)}) have the same batches"
        other = sum(not same for _, same in self.digests)
        until = f"the same batches up to step {self.apart - 1}{self._before(self.apart)}"
        if self.apart == first and not self._before(first):
            until = "other batches from the first step on that both logged"
        return f"{until}; {other} of the {count} that both logged differ, the first is step {self.apart}"

    def _before(self, step: int) -> str:
        """What is said where one run is the other's parent, which it left at `step`."""
        for run, parent in (self.runs, self.runs[::-1]):
            folder = os.path.dirname(run.parent["checkpoint"]) if run.parent else ""
            at = parent.address if is_remote(parent.address) else os.path.realpath(parent.address)
            if run.parent and run.parent["step"] == step and at.rstrip("/") == folder:
                return ", where one left the other"
        return ""

    @property
    def left(self) -> list[str]:
        """Where a run that is a branch left its parent, a sentence for each."""
        return [
            f"{name} is a branch of {run.origin}" for name, run in zip(self.names, self.runs, strict=True) if run.parent
        ]

    @cached_property
    def differences(self) -> list[tuple[str, Any, Any]]:
        """Settings, versions and data that are not the same: name, and the value of each run (None: it has none)."""
        one, other = (_made_of(run) for run in self.runs)
        keys = [*one, *(key for key in other if key not in one)]
        return [(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]

    def facts(self) -> dict[str, Any]:
        """What is said of the two beside each, as a JSON-able object."""
        return {
            "logged_by_both": len(self.digests),
            "same_batches": sum(same for _, same in self.digests),
            "first_that_differs": self.apart,
            "differences": [{"key": key, "values": [one, other]} for key, one, other in self.differences],
        }

    def stages(self) -> Rows:
        """Of each stage of either: its name, its steps, and the mean loss and that at its end of both."""
        return _beside(
            [
                {
                    (f"{row.phase} {row.seq_len}", span(row.first_step, row.end_step)): (
                        decimal(row.mean_loss),
                        decimal(row.last_loss),
                    )
                    for row in run.stages()
                }
                for run in self.runs
            ]
        )

    def mix(self) -> Rows:
        """Of each stream in each phase of either: planned and realized share of both."""
        return _beside(
            [
                {(row.phase, row.stream): (percent(row.planned), percent(row.realised)) for row in run.mix()}
                for run in self.runs
            ]
        )

    def totals(self) -> Rows:
        """What is counted of each run: its name, and the values of both."""
        rows = {
            "steps": [f"{run.done} of {run.plan.steps}" for run in self.runs],
            "tokens": [f"{run.tokens:,}" for run in self.runs],
            f"loss, mean of the last {LAST} steps": [decimal(last_loss(run)) for run in self.runs],
            "starts (step, ranks)": [
                ", ".join(f"{start['from_step']} on {start['ranks']}" for start in run.starts) or NONE
                for run in self.runs
            ],
            "branch of": [run.origin or NONE for run in self.runs],
        }
        return [(name, *values) for name, values in rows.items()]

    def evals(self) -> Rows:
        """Of each stream and length that either evaluated: the newest loss of both, with its step."""
        keys = dict.fromkeys(key for run in self.runs for key in run.evals)
        rows: Rows = []
        for stream, length in keys:
            losses = []
            for run in self.runs:
                points = run.evals.get((stream, length))
                losses.append(f"{points[1][-1]:.3f} (step {int(points[0][-1])})" if points else NONE)
            rows.append((stream, str(length), *losses))
        return rows


def shown(value: Any) -> str:
    """A setting's value as a cell."""
    return NONE if value is None else one_line(value)


def compare(pair: Pair) -> str:
    """The same facts as the page's, in plain text."""
    one, other = pair.names
    text = [
        f"runs {one_line(one)} ({one_line(pair.one.address)}) and {one_line(other)} ({one_line(pair.other.address)})",
        *pair.left,
        f"digests: {pair.agreement}",
        "",
        *table(("", one, other), pair.totals()),
        "",
        *table(("stage", "steps", f"loss {one}", "at its end", f"loss {other}", "at its end"), pair.stages()),
        "",
        *table(("phase", "stream", f"planned {one}", "realized", f"planned {other}", "realized"), pair.mix()),
    ]
    if pair.evals():
        text += ["", *table(("eval loss", "length", one, other), pair.evals())]
    rows = [(key, shown(value), shown(theirs)) for key, value, theirs in pair.differences]
    text += ["", *(table(("different", one, other), rows) if rows else ["settings, versions and shards are the same"])]
    return "\n".join(text)


def _made_of(run: Run) -> dict[str, Any]:
    """What could make a run another one: settings by their dotted names, versions, and the shards."""
    named = {key: value for key, value in leaves(run.settings.model_dump()) if key not in NAMES}
    named |= {f"version of {name}": version for name, version in run.about.get("versions", {}).items()}
    named |= {f"shards of {name}": str(index)[:12] for name, index in run.about.get("indexes", {}).items()}
    return named


def _beside(both: Sequence[Mapping[tuple[str, str], tuple[str, str]]]) -> Rows:
    """Rows of two tables with the same first two columns side by side, those of the first one first."""
    none = (NONE, NONE)
    return [(*key, *both[0].get(key, none), *both[1].get(key, none)) for key in dict.fromkeys([*both[0], *both[1]])]

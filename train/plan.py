"""What a run will see, before it runs: `python train/plan.py [CONFIG] [key=value ...] [--json] [--plot FILE.png]`.

Needs the config alone; with the shards there, it also tells how often each stream is passed over.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.cli import UserError, parse, run, say
from chimera.stores import is_remote
from train.cache import ShardCache, parse_bytes, smallest_cache
from train.index import StreamIndex, open_indexes, read_manifest, stream_names
from train.schedule import Plan
from train.schedulers import check_scheduler
from train.settings import TrainSettings, end_step, eval_lengths, plan_of, read_settings


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw mix and length over steps")
    args, config, overrides = parse(parser, argv, default_config="yamls/full.yaml")
    settings = read_settings(config, overrides)
    plan, indexes = plan_with_shards(settings)
    if indexes is None:
        say(f"no shards at {settings.shards} yet: what is needed, in blocks of {plan.block_len} (the longest length)")
    about = describe(plan, indexes)
    if args.plot is not None:
        from train.plan_plot import draw

        draw(plan, args.plot)
    if args.json:
        print(json.dumps(about))
    else:
        print("\n".join(table(settings, plan, about)))
    for warning in [*refusals(settings, plan, indexes is not None), *warnings(settings, about)]:
        say(f"warning: {warning}")
    return 0


def plan_with_shards(settings: TrainSettings) -> tuple[Plan, dict[str, StreamIndex] | None]:
    """The step plan, and the indexes of its streams; None, and blocks of the longest length, without shards."""
    from train.reader import stored_block_len

    manifest = read_manifest(settings.shards, settings.cache)
    if manifest is not None:
        plan = plan_of(settings, manifest["block_len"])
        return plan, open_indexes(settings.shards, settings.cache, plan.streams)
    plan = plan_of(settings, max(stage.seq_len for stage in settings.curriculum.stages))
    if not any(name in stream_names(settings.shards) for name in plan.streams):
        return plan, None
    indexes = open_indexes(settings.shards, settings.cache, plan.streams)  # shards made by others
    first = next(iter(indexes.values()))
    return plan_of(settings, stored_block_len(first, ShardCache(settings.shards, settings.cache))), indexes


def describe(plan: Plan, indexes: dict[str, StreamIndex] | None) -> dict[str, Any]:
    """The plan as one JSON-able object; `passes` and `held` are null without shards."""
    needed = plan.blocks_before(plan.steps)
    segments = []
    for segment in plan.segments:
        before, after = plan.blocks_before(segment.first_step), plan.blocks_before(segment.end_step)
        segments.append(
            {
                "phase": segment.phase_name,
                "first_step": segment.first_step,
                "last_step": segment.end_step - 1,
                "seq_len": segment.seq_len,
                "sequences_per_step": segment.sequences_per_step,
                "blocks_per_step": segment.blocks_per_step,
                "tokens": segment.steps * segment.blocks_per_step * plan.block_len,
                "streams": {name: after[name] - before[name] for name in plan.streams},
            }
        )
    return {
        "steps": plan.steps,
        "tokens": plan.tokens,
        "block_len": plan.block_len,
        "streams": {
            name: {
                "tokens": blocks * plan.block_len,
                "blocks": blocks,
                "held": None if indexes is None else indexes[name].blocks,
                "passes": None if indexes is None else blocks / indexes[name].blocks,
            }
            for name, blocks in needed.items()
        },
        "segments": segments,
        "smallest_cache_limit": None if indexes is None else smallest_cache(indexes.values(), plan.lanes),
    }


def refusals(settings: TrainSettings, plan: Plan, stored: bool) -> list[str]:
    """What training would refuse beside the plan itself; the length of blocks is known only once they are `stored`."""
    checks: list[Callable[[], object]] = [
        lambda: check_scheduler(settings.scheduler, plan.steps),
        lambda: end_step(settings.max_duration, plan.steps),
    ]
    if stored and settings.eval.interval:
        checks.append(lambda: eval_lengths(settings, plan))
    if settings.cache_limit is not None:
        checks.append(lambda: ShardCache(settings.shards, settings.cache, parse_bytes(settings.cache_limit)))
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(f"training would refuse this: {error}")
    return found


def warnings(settings: TrainSettings, about: dict[str, Any]) -> list[str]:
    """What the user should know before running."""
    found = []
    for name, stream in about["streams"].items():
        if stream["passes"] is not None and stream["passes"] > settings.max_passes:
            most = int(stream["held"] * settings.max_passes)
            found.append(
                f"{name} is passed over {stream['passes']:.1f} times (max_passes is {settings.max_passes:g}): it holds "
                f"{stream['held']} blocks, {stream['blocks']} are needed; lower its proportion to about "
                f"{most / stream['blocks']:.2f} of what it is, or add data"
            )
    return found


def table(settings: TrainSettings, plan: Plan, about: dict[str, Any]) -> list[str]:
    """The plan for people."""
    rate = settings.tokens_per_second
    time = lambda tokens: hours(tokens / rate) if rate else "-"
    lines = [
        f"{plan.steps} steps, {plan.tokens} tokens ({amount(plan.tokens)}), blocks of {plan.block_len}"
        + (f", {time(plan.tokens)} at {rate:g} tokens/s" if rate else ""),
        "",
    ]
    rows = [["phase", "steps", "length", "sequences", "tokens", "time", *plan.streams]]
    for segment in about["segments"]:
        blocks = sum(segment["streams"].values())
        rows.append(
            [
                segment["phase"],
                f"{segment['first_step']}-{segment['last_step']}",
                str(segment["seq_len"]),
                str(segment["sequences_per_step"]),
                amount(segment["tokens"]),
                time(segment["tokens"]),
                *(f"{100 * segment['streams'][name] / blocks:.2f}%" for name in plan.streams),
            ]
        )
    lines += [*aligned(rows), ""]
    rows = [["stream", "tokens", "blocks needed", "blocks held", "passes"]]
    for name, stream in about["streams"].items():
        held, passes = stream["held"], stream["passes"]
        known = ["-", "-"] if held is None else [str(held), f"{passes:.2f}"]
        rows.append([name, amount(stream["tokens"]), str(stream["blocks"]), *known])
    lines += aligned(rows)
    if about["smallest_cache_limit"] is not None and is_remote(settings.shards):
        lines += ["", f"smallest cache_limit: {about['smallest_cache_limit']} bytes ({settings.shards} is remote)"]
    return lines


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as text columns: the first flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def amount(tokens: int) -> str:
    """`449.3M`."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return str(tokens)


def hours(seconds: float) -> str:
    """`2 h 05 min`, `4 min`, `12 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"
    return f"{int(seconds // 60)} min" if seconds >= 60 else f"{seconds:.0f} s"


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()

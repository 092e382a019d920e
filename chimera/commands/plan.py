"""What a run will see, before it runs: `python train/plan.py [CONFIG] [key=value ...] [--json] [--plot FILE.png]`.

Needs the config alone; with the shards there, it also tells how often each stream is passed over. Positions and blocks
are exact; tokens and padding are expected values, by the mean of each stream's blocks. Exits 2 where training would
refuse the config.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera.cli import UserError, parse, run, say, show
from chimera.stores import is_remote
from chimera.text import NONE, amount, decimal, duration, percent, span, table
from chimera.train.data.cache import smallest_cache
from chimera.train.data.index import StreamIndex
from chimera.train.data.places import Roots, places_of, shown
from chimera.train.data.roots import held_at, open_root, plan_with_shards
from chimera.train.order.schedule import Plan

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw mix and length over steps")
    args, config, overrides = parse(parser, argv, default_config="yamls/full.yaml")
    from chimera.train.settings import read_settings

    settings = read_settings(config, overrides)
    plan, indexes = plan_with_shards(settings)
    if indexes is None:
        at = shown(settings.shards)
        say(f"no shards at {at} yet: what is needed, in blocks of {plan.block_len} (the longest length)")
    held = densities(settings, indexes)
    about = describe(plan, indexes, held)
    if args.plot is not None:
        from chimera.train.history.plan_plot import draw

        draw(plan, args.plot)
    if args.json:
        print(json.dumps(about))
    else:
        show("\n".join(lines_of(settings, plan, about)))
    sys.stdout.flush()  # what follows takes some seconds where a model is to be looked at
    no, look = refused(settings, plan, indexes)
    for warning in [*no, *look, *warnings(settings, about), *shifts(settings, plan, held)]:
        say(f"warning: {warning}")
    return 2 if no else 0


def densities(settings: "TrainSettings", indexes: dict[str, StreamIndex] | None) -> dict[str, Fraction] | None:
    """Of each stream, the share of its blocks' positions that hold a token; None without shards."""
    if indexes is None:
        return None
    held = held_at(Roots(settings.shards, settings.cache))
    return {name: held.get(name, Fraction(1)) for name in indexes}  # made by others: no padding


def describe(
    plan: Plan, indexes: dict[str, StreamIndex] | None, held: dict[str, Fraction] | None = None
) -> dict[str, Any]:
    """The plan as one JSON-able object; `passes` and `held` are null without shards.

    Tokens are what the positions hold on average (`held`, by stream), exact over whole passes. Where that is not known,
    `padding` is null and every position counts as a token.
    """
    needed = plan.blocks_before(plan.steps)
    segments = []

    def tokens(blocks: Mapping[str, int]) -> int:
        return sum(tokens_in(name, count) for name, count in blocks.items())

    def tokens_in(name: str, blocks: int) -> int:
        return round(blocks * plan.block_len * (held[name] if held else 1))

    def padding(positions: int, tokens: int) -> int | None:
        return None if held is None else positions - tokens

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
                "tokens": tokens(after) - tokens(before),
                "positions": (positions := segment.steps * segment.blocks_per_step * plan.block_len),
                "padding": padding(positions, tokens(after) - tokens(before)),
                "streams": {name: after[name] - before[name] for name in plan.streams},
                "stream_tokens": {n: tokens_in(n, after[n]) - tokens_in(n, before[n]) for n in plan.streams},
            }
        )
    return {
        "steps": plan.steps,
        "tokens": tokens(needed),
        "positions": plan.positions,
        "padding": padding(plan.positions, tokens(needed)),
        "block_len": plan.block_len,
        "streams": {
            name: {
                "tokens": tokens_in(name, blocks),
                "positions": blocks * plan.block_len,
                "padding": padding(blocks * plan.block_len, tokens_in(name, blocks)),
                "blocks": blocks,
                "held": None if indexes is None else indexes[name].blocks,
                "passes": None if indexes is None else blocks / indexes[name].blocks,
                "root": None if indexes is None else indexes[name].root,
            }
            for name, blocks in needed.items()
        },
        "segments": segments,
        "smallest_cache_limit": None if indexes is None else smallest_cache(indexes.values(), plan.lanes),
    }


def refused(
    settings: "TrainSettings", plan: Plan, indexes: dict[str, StreamIndex] | None
) -> tuple[list[str], list[str]]:
    """What training would refuse beside the plan itself, and what it would warn of, in its words.

    `indexes` of the plan's streams; None: there are no shards.
    """
    from chimera.train.step.refusals import cautions, refusals

    found: list[UserError] = []
    shards = None
    if indexes is not None:
        try:
            shards = open_root(settings)
        except UserError as error:
            found.append(error)
    found += refusals(settings, plan, shards, indexes is not None)
    if settings.branch:
        from chimera.train.run.check_branch import check_branch

        try:
            check_branch(settings, plan, indexes, shards)
        except UserError as error:
            found.append(error)
    return [f"training would refuse this: {error}" for error in found], list(cautions(settings, shards))


def warnings(settings: "TrainSettings", about: dict[str, Any]) -> list[str]:
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


def shifts(settings: "TrainSettings", plan: Plan, held: dict[str, Fraction] | None) -> list[str]:
    """Streams that a phase names and gives less: padding moves their share by a percent, or no block of them comes."""
    found = []
    for number, phase in enumerate(plan.phases):
        end = plan.phase_start(number + 1) if number + 1 < len(plan.phases) else plan.steps
        before, after = plan.blocks_before(plan.phase_start(number)), plan.blocks_before(end)
        shares = {name: share for name, share in phase.proportions.items() if share}
        blocks = sum(after.values()) - sum(before.values())
        for name, share in shares.items():
            if after[name] == before[name]:
                found.append(
                    f"phase {phase.name}: no block of {name} comes, its proportion {float(share):.3g} of {blocks} "
                    "blocks is too small: raise it, or leave the stream out"
                )
        if held is None or settings.mix_by == "tokens":
            continue
        total = sum(share * held[name] for name, share in shares.items())
        for name, share in shares.items():
            real = share * held[name] / total
            if share - real > Fraction(1, 100):  # what others win by it is not theirs to fix
                places, tokens, padding = (percent(float(x)) for x in (share, real, 1 - held[name]))
                found.append(
                    f"phase {phase.name}: {name} is {places} of the positions and {tokens} of the tokens: {padding} of "
                    "its blocks is padding; change its proportion, set `mix_by: tokens`, or build it with another "
                    "`packing`"
                )
    return found


def lines_of(settings: "TrainSettings", plan: Plan, about: dict[str, Any]) -> list[str]:
    """The plan for people."""
    rate = settings.tokens_per_second
    time = lambda tokens: duration(tokens / rate) if rate else NONE
    padding = (about["padding"] or 0) / about["positions"]
    lines = [
        f"{plan.steps} steps, {about['tokens']} tokens ({amount(about['tokens'])}), blocks of {plan.block_len}"
        + (f", {percent(padding)} of the positions are padding" if padding else "")
        + (f", {time(about['tokens'])} at {rate:g} tokens/s" if rate else ""),
        "",
    ]
    rows = []
    for segment in about["segments"]:
        blocks = sum(segment["streams"].values())
        rows.append(
            [
                segment["phase"],
                span(segment["first_step"], segment["last_step"] + 1),
                str(segment["seq_len"]),
                str(segment["sequences_per_step"]),
                amount(segment["tokens"]),
                time(segment["tokens"]),
                *(percent(segment["streams"][name] / blocks) for name in plan.streams),
            ]
        )
    lines += [*table(["phase", "steps", "length", "sequences", "tokens", "time", *plan.streams], rows), ""]
    rows = []
    for name, stream in about["streams"].items():
        held, passes = stream["held"], stream["passes"]
        shares = [stream["tokens"] / about["tokens"], stream["padding"] / stream["positions"]] if padding else []
        known = [NONE if held is None else str(held), decimal(passes, 2)]
        rows.append([name, amount(stream["tokens"]), *map(percent, shares), str(stream["blocks"]), *known])
    heads = ["stream", "tokens", *(["share", "padding"] if padding else []), "blocks needed", "blocks held", "passes"]
    lines += table(heads, rows)
    if len(roots := places_of(settings.shards)) > 1 and about["smallest_cache_limit"] is not None:
        lines += ["", *(f"{name}: {stream['root']}" for name, stream in about["streams"].items())]
    if about["smallest_cache_limit"] is not None and (remote := [root for root in roots if is_remote(root)]):
        places = f"{shown(remote)} {'is' if len(remote) == 1 else 'are'} remote"
        lines += ["", f"smallest cache_limit: {about['smallest_cache_limit']} bytes ({places})"]
    return lines


def entry() -> None:
    run(main)

"""The step plan that a run's settings stand for, and which part of it they ask for."""

import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING

from chimera.cli import UserError
from chimera.train.order.schedule import Phase, Plan, Stage, build_plan, proportion

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings

PARTS = 100_000  # shares of blocks that follow from shares of tokens are multiples of 1 / PARTS, where need be


def densities(tokens: Mapping[str, int | None], blocks: Mapping[str, int], block_len: int) -> dict[str, Fraction]:
    """Of each stream, the share of its blocks' positions that hold a token; 1 where its tokens are not known."""
    return {
        name: Fraction(tokens[name] or 0, count * block_len) if count and tokens.get(name) else Fraction(1)
        for name, count in blocks.items()
    }


def shares_of_blocks(shares: Mapping[str, Fraction], held: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """The shares of blocks that give `shares` of the tokens, where a stream's blocks hold `held` of their positions.

    Exact where they come out even after `PARTS` blocks, else rounded to that, by less than 1 / PARTS each.
    """
    weights = {name: share / held[name] for name, share in shares.items() if share}
    total = sum(weights.values(), Fraction(0))
    exact = {name: weight / total for name, weight in weights.items()}
    if lcm(*(share.denominator for share in exact.values())) <= PARTS:
        return exact
    parts = {name: int(share * PARTS) for name, share in exact.items()}
    rest = PARTS - sum(parts.values())
    for name in sorted(parts, key=lambda name: (parts[name] - exact[name] * PARTS, name))[:rest]:
        parts[name] += 1
    return {name: Fraction(part, PARTS) for name, part in parts.items()}


def plan_of(settings: "TrainSettings", block_len: int, held: Mapping[str, Fraction] | None = None) -> Plan:
    """The step plan of `settings` over blocks of `block_len` tokens; raises `UserError` where it has none.

    `held` are the `densities` of the streams, which `mix_by: tokens` needs.
    """
    by_tokens = settings.mix_by == "tokens"
    if by_tokens and held is None:
        raise UserError(
            "setting `mix_by: tokens` needs the shards, which tell how many tokens the blocks of a stream hold: build "
            "them, or set `shards` to where they are"
        )
    phases = [
        Phase(
            phase.name,
            phase.steps,
            {
                stream: proportion(share, f"setting `phases.{number}.proportions.{stream}`: ")
                for stream, share in phase.proportions.items()
            },
            settings.global_train_batch_size
            if phase.global_train_batch_size is None
            else phase.global_train_batch_size,
        )
        for number, phase in enumerate(settings.phases)
    ]
    if by_tokens and held is not None and all(share >= 0 for phase in phases for share in phase.proportions.values()):
        known = {name: held.get(name, Fraction(1)) for phase in phases for name in phase.proportions}
        phases = [
            replace(phase, proportions=shares_of_blocks(phase.proportions, known))
            if sum(phase.proportions.values()) == 1  # else refused below, in the words of the config
            else phase
            for phase in phases
        ]
    stages = [Stage(stage.from_step, stage.seq_len) for stage in settings.curriculum.stages]
    mode, lanes = settings.curriculum.mode, settings.num_canonical_nodes
    return build_plan(phases, stages, mode, block_len=block_len, lanes=lanes)


def end_step(max_duration: str | None, steps: int) -> int:
    """The step training stops before, at most the plan's `steps`; raises `UserError` for another unit."""
    if max_duration is None:
        return steps
    if not (match := re.fullmatch(r"0*([1-9]\d*)ba", str(max_duration).replace("_", ""))):
        raise UserError(f"setting `max_duration` is {max_duration!r}; it is given in steps, at least one, like 45000ba")
    if int(match[1]) > steps:
        raise UserError(f"setting `max_duration` is {max_duration}, but the phases have {steps} steps in all")
    return int(match[1])


def eval_streams(settings: "TrainSettings", plan: Plan) -> list[str]:
    """The streams to evaluate, each once."""
    return list(plan.streams) if settings.eval.streams is None else list(dict.fromkeys(settings.eval.streams))


def eval_lengths(settings: "TrainSettings", plan: Plan) -> list[int]:
    """The sequence lengths to evaluate at; raises `UserError` for one that does not divide the blocks."""
    lengths = settings.eval.seq_lens or sorted({segment.seq_len for segment in plan.segments})
    for seq_len in lengths:
        if seq_len < 2 or plan.block_len % seq_len:
            raise UserError(
                f"setting `eval.seq_lens`: sequences of {seq_len} tokens do not divide blocks of {plan.block_len}"
            )
    return lengths

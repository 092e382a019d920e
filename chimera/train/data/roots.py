"""The shards that a run's settings name: roots of ours, token shards made by others, or both, of one tokenizer."""

import hashlib
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from chimera.cli import UserError
from chimera.train.data.cache import ShardCache
from chimera.train.data.external_shards import open_external
from chimera.train.data.index import StreamIndex, indexes_of
from chimera.train.data.places import Roots
from chimera.train.data.reader import stored_block_len
from chimera.train.data.shards import Shards, as_described, held_in
from chimera.train.order.run_plan import plan_of
from chimera.train.order.schedule import Plan

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings


def open_root(settings: "TrainSettings") -> Shards:
    """The shards of all roots; raises `UserError` where one has none, or where they do not go together.

    Token shards made by others are taken where the config names their tokenizer.
    """
    roots = Roots(settings.shards, settings.cache)
    found = roots.locate(_streams(settings))
    ours, others = [], []
    for root in roots:
        mine = [name for name in _trained_on(settings) if name in found and found[name] is root]
        if root.manifest is not None and root.digest is not None:
            part = as_described(root.place, settings.cache, root.manifest, root.digest)
            if isinstance(settings.shards, dict):
                named = [name for name, place in settings.shards.items() if place == root.place]
                part = replace(part, streams={n: stream for n, stream in part.streams.items() if n in named})
            ours.append(part)
        elif settings.tokenizer is None:
            raise UserError(
                f"no shards at {root.place} (no manifest.json there): build them with `python "
                "convert/build_shards.py`, or set `shards` to where they are"
            )
        elif mine:
            tokenizer, ends = settings.tokenizer, settings.document_ends
            others.append(open_external(root.place, settings.cache, tokenizer, mine, ends))
    if not ours and not others:
        raise UserError(f"no shards at {roots}: build them, or set `shards` to where they are")
    if settings.document_ends is not None and not others:
        raise UserError(
            "setting `document_ends` is for token shards made by others, named with their `tokenizer`; the shards at "
            f"{roots} say themselves where documents end: leave it out"
        )
    return _together(ours, others) if len(ours) + len(others) > 1 else [*ours, *others][0]


def _streams(settings: "TrainSettings") -> list[str]:
    """What a run reads of its shards, train or eval splits."""
    return list(dict.fromkeys([*_trained_on(settings), *(settings.eval.streams or ())]))


def _trained_on(settings: "TrainSettings") -> list[str]:
    return list(dict.fromkeys(name for phase in settings.phases for name in phase.proportions))


def _together(ours: Sequence[Shards], others: Sequence[Shards]) -> Shards:
    """Several roots as one. Raises `UserError` where two differ in what a run has one of.

    Shards made by `others` have no padding, and say of BOS only whether their first blocks hold it.
    """
    parts = [*ours, *others]
    first = (
        max(ours, key=lambda part: part.has_texts) if ours else max(others, key=lambda part: len(part.tokenizer.bos))
    )
    for part in parts:
        _check_same(first, part, made_alike=part in ours)
    digests = sorted(part.digest for part in parts)
    return Shards(
        " and ".join(part.where for part in parts),
        hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        first.tokenizer,
        first.block_len,
        {name: stream for part in parts for name, stream in part.streams.items()},
        {name: part.where for part in parts for name in part.streams},
    )


def _check_same(one: Shards, other: Shards, made_alike: bool) -> None:
    """Raise `UserError` unless a run can read both; `made_alike`: both say what pads, and what texts begin with."""
    mine, theirs = one.tokenizer, other.tokenizer
    same = {
        "tokenizer": (mine.digest[:12], theirs.digest[:12]),
        "block_len": (one.block_len, other.block_len),
        "eos_token": (mine.eos_token, theirs.eos_token),
        "end of a document": (mine.document_ends, theirs.document_ends),
    }
    if made_alike:
        same["pad_token"] = (str(mine.pad_token), str(theirs.pad_token))
        if one.has_texts and other.has_texts:  # a build of conversations alone says nothing of it
            same["BOS"] = (str(list(mine.bos)), str(list(theirs.bos)))
    for what, (here, there) in same.items():
        if here != there:
            raise UserError(
                f"the {what} of the shards at {one.where} is {here}, at {other.where} it is {there}: the roots of a "
                "run have one and the same: leave one of them out, or build its streams again as the other's"
            )


def held_at(roots: Roots) -> dict[str, Fraction]:
    """The `densities` of the streams that the roots' manifests name."""
    return {name: share for root in roots if root.manifest for name, share in held_in(root.manifest).items()}


def plan_with_shards(settings: "TrainSettings") -> tuple[Plan, dict[str, StreamIndex] | None]:
    """The step plan, and the indexes of its streams; None, and blocks of the longest length, without shards."""
    longest = max(stage.seq_len for stage in settings.curriculum.stages)
    roots = Roots(settings.shards, settings.cache)
    found = roots.locate(_streams(settings))
    if roots.empty(found):
        return plan_of(settings, longest), None
    manifests = [root.manifest for root in roots if root.manifest]
    held = held_at(roots)
    plan = plan_of(settings, manifests[0].block_len if manifests else longest, held)
    indexes = indexes_of({name: found[name] for name in plan.streams}, settings.cache)
    if not manifests:
        block_len = stored_block_len(next(iter(indexes.values())), ShardCache(settings.cache))
        plan = plan_of(settings, block_len, held)
    return plan, indexes


def allow_open_files() -> None:
    """Let this process open as many files as the system allows it: every shard in use is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS allows fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

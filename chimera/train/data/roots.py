"""The shards root that a run's settings name: one of ours, or token shards made by others."""

import resource
from contextlib import suppress
from typing import TYPE_CHECKING

from chimera.cli import UserError
from chimera.train.data.cache import ShardCache
from chimera.train.data.external_shards import open_external
from chimera.train.data.index import StreamIndex, open_indexes, stream_names
from chimera.train.data.reader import stored_block_len
from chimera.train.data.shards import Shards, fetch, held_in, open_shards, read_manifest
from chimera.train.order.run_plan import plan_of
from chimera.train.order.schedule import Plan

if TYPE_CHECKING:
    from chimera.train.settings import TrainSettings


def open_root(settings: "TrainSettings") -> Shards:
    """The shards root: one of ours, or token shards made by others when the config names their tokenizer."""
    if settings.tokenizer is not None and fetch(settings.shards, "manifest.json", settings.cache) is None:
        streams = dict.fromkeys(name for phase in settings.phases for name in phase.proportions)
        names, ends = list(streams), settings.document_ends
        return open_external(settings.shards, settings.cache, settings.tokenizer, names, ends)
    if settings.document_ends is not None:
        raise UserError(
            "setting `document_ends` is for token shards made by others, named with their `tokenizer`; the shards at "
            f"{settings.shards} say themselves where documents end: leave it out"
        )
    return open_shards(settings.shards, settings.cache)


def plan_with_shards(settings: "TrainSettings") -> tuple[Plan, dict[str, StreamIndex] | None]:
    """The step plan, and the indexes of its streams; None, and blocks of the longest length, without shards."""
    found = read_manifest(settings.shards, settings.cache)
    if found is not None:
        plan = plan_of(settings, found[0].block_len, held_in(found[0]))
        return plan, open_indexes(settings.shards, settings.cache, plan.streams)
    longest = max(stage.seq_len for stage in settings.curriculum.stages)
    names = dict.fromkeys(name for phase in settings.phases for name in phase.proportions)
    if not names.keys() & stream_names(settings.shards):
        return plan_of(settings, longest), None
    plan = plan_of(settings, longest, {})  # shards made by others, which hold no padding
    indexes = open_indexes(settings.shards, settings.cache, plan.streams)
    first = next(iter(indexes.values()))
    return plan_of(settings, stored_block_len(first, ShardCache(settings.shards, settings.cache)), {}), indexes


def allow_open_files() -> None:
    """Let this process open as many files as the system allows it: every shard in use is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS allows fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

"""Whether a run trained on what its plan and its shards say: each step's digest, computed anew."""

from collections.abc import Mapping
from typing import Any

from chimera.cli import UserError
from chimera.text import one_line
from chimera.train.data.index import StreamIndex, open_indexes
from chimera.train.data.places import shown
from chimera.train.history.runlog import Run
from chimera.train.order.ordering import RunOrder, digest

CHUNK = 4096  # steps whose digests are computed at once


def compare_digests(run: Run) -> tuple[list[int], str | None]:
    """Compute each step's digest from plan and shards: the steps that differ, and why it could not be done.

    A digest is of blocks by number: of shards that were built again with as many blocks it would be the same.
    """
    try:
        indexes = open_indexes(run.settings.shards, run.settings.cache, run.plan.streams)
    except UserError as error:
        return [], one_line(error)
    if other := other_shards(run.about, indexes):
        return [], f"the shards at {shown(run.settings.shards)} are not the run's: {other}"
    order = RunOrder(run.plan, {name: index.shard_blocks for name, index in indexes.items()}, run.settings.seed)
    logged = dict(zip(run.steps.tolist(), run.digests, strict=True))
    differing = []
    for segment in run.plan.segments:
        for first in range(segment.first_step, min(segment.end_step, run.done), CHUNK):
            chunk = order.steps(first, min(first + CHUNK, segment.end_step, run.done))
            for row, (streams, blocks) in enumerate(zip(chunk.streams.tolist(), chunk.blocks.tolist(), strict=True)):
                names = (run.plan.streams[stream] for stream in streams)
                found = logged.get(first + row)
                if found is not None and found != digest(zip(names, blocks, strict=True)):
                    differing.append(first + row)
    return differing, None


def other_shards(about: dict[str, Any], indexes: Mapping[str, StreamIndex]) -> str | None:
    """Which index is another than a run's config.json (`about`) says, as of shards built again; `None` for none."""
    for name, fingerprint in about.get("indexes", {}).items():
        if name in indexes and fingerprint not in (None, indexes[name].fingerprint):
            return f"the index of {name} is {indexes[name].fingerprint[:12]}, it was {str(fingerprint)[:12]}"
    return None

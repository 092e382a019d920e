"""MixtureDataset: a rank's slice of every step of the plan, from any step on, on any number of ranks and workers.

It is a `StreamingDataset` in type and in what Composer calls, but shares none of its machinery: no shared memory, no
array the size of an epoch. What a step holds is computed where it is needed, by vector, for a few steps at a time;
blocks are copied out of memory-mapped shards; threads fetch the shards of the steps ahead.
"""

import os
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from streaming import StreamingDataset
from torch.utils.data import get_worker_info

from chimera.cli import UserError, parse_bytes
from chimera.train.data.cache import ShardCache, check_limit, smallest_cache
from chimera.train.data.index import open_indexes
from chimera.train.data.places import Places
from chimera.train.data.reader import BlockReader, Key
from chimera.train.data.state import make_state, resume_step
from chimera.train.order.ordering import RunOrder, Steps, digest
from chimera.train.order.schedule import Plan, Segment

CHUNK = 512  # target blocks per read; ramps up from one step so that the first batch is fast


class MixtureDataset(StreamingDataset):
    """Iterates over steps: each item is this rank's part of one step's global batch.

    Args:
        root: shards root, a folder or a URL; or several, as in setting `shards`.
        cache: local folder for fetched and decompressed shards.
        plan: the run's step plan.
        seed: of the shuffles.
        cache_limit: most bytes of shards to keep in `cache` (remote roots only), e.g. "200gb".
        predownload: steps ahead of which shards are fetched.
        rank, world_size: default to RANK and WORLD_SIZE of the environment.

    Raises `UserError` where streams are missing or the cache is too small.
    """

    def __init__(
        self,
        *,
        root: Places,
        cache: str,
        plan: Plan,
        seed: int,
        cache_limit: str | int | float | None = None,
        predownload: int = 8,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        # Not calling super().__init__(): it would create shared memory, and an order of its own.
        self.plan, self.seed, self.predownload = plan, seed, predownload
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        self.replication = None  # read by StreamingDataLoader
        self.start = 0  # step that iteration begins at
        self.indexes = open_indexes(root, cache, plan.streams)
        self.order = RunOrder(plan, {name: index.shard_blocks for name, index in self.indexes.items()}, seed)
        limit = None if cache_limit is None else parse_bytes(cache_limit, "cache_limit")
        self.cache = ShardCache(cache, limit)
        if limit is not None:
            check_limit(root)
        if limit is not None and limit < (least := smallest_cache(self.indexes.values(), self._lanes_of_node())):
            raise UserError(
                f"setting `cache_limit` of {limit} bytes is too small: {least} hold what is shuffled together now "
                "and next, of every stream"
            )

    def _lanes_of_node(self) -> int:
        """Lanes that this machine's ranks read, which share its cache."""
        nodes = max(1, self.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world_size))))
        return self.plan.lanes // nodes if self.plan.lanes % nodes == 0 else self.plan.lanes

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of each stream's index."""
        return {name: index.fingerprint for name, index in self.indexes.items()}

    @property
    def size(self) -> int:
        return self.plan.steps

    def __len__(self) -> int:
        """Steps from where iteration begins."""
        return self.plan.steps - self.start

    def __del__(self) -> None:
        """Nothing to release."""

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The state after `num_samples` sequences, counted over all ranks.

        They count from the run's beginning (as Composer does), or from where this iteration began (as
        `StreamingDataLoader` does). Raises `ScheduleError` inside a step.
        """
        before = 0 if from_beginning else self.plan.sequences_before(self.start)
        step = self.plan.step_of_sequences(before + num_samples)
        return make_state(self.plan, self.seed, self.fingerprints, step)

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where the state was saved; raises `StateMismatch` if the config has another history."""
        self.start = resume_step(obj, self.plan, self.seed, self.fingerprints)

    def read_blocks(self, stream: str, blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], Any]:
        """Blocks of a stream by number: tokens [n, block_len] and masks [n, block_len] bool or None."""
        reader = BlockReader({stream: self.indexes[stream]}, self.cache, self.plan.block_len)
        return reader.read(np.zeros(len(blocks), np.int32), np.asarray(blocks, np.int64))

    def __getitem__(self, at: Any) -> Any:
        raise TypeError("MixtureDataset is iterated over; single blocks come from read_blocks()")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's steps: of W workers the w-th takes steps start + w, start + w + W, …"""
        self.plan.check_ranks(self.world_size, self.start)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = BlockReader(self.indexes, self.cache, self.plan.block_len)
        step, chunk = self.start + worker, 1
        try:
            while step < self.plan.steps:
                segment = self.plan.segment(step)
                most = max(1, CHUNK * self.world_size // segment.blocks_per_step) * workers
                end = min(segment.end_step, step + min(chunk * workers, most))
                yield from self._read(reader, segment, self.order.steps(step, end), workers)
                step += -(-(end - step) // workers) * workers
                chunk = min(2 * chunk, CHUNK)
        finally:
            reader.close()

    def _read(self, reader: BlockReader, segment: Segment, steps: Steps, stride: int) -> Iterator[dict[str, Any]]:
        """Records of every `stride`-th of `steps`."""
        first, end, offset, count = self._slice(segment)
        streams, blocks = steps.streams[::stride], steps.blocks[::stride]
        mine, mine_blocks = streams[:, first:end], blocks[:, first:end]
        needed = reader.keys(mine.ravel(), mine_blocks.ravel())
        ahead = self._windows(segment, steps)
        reader.keep([*needed, *ahead])
        reader.fetch_ahead([*needed, *ahead])
        for name, shard in needed:
            self.cache.touch(self.indexes[name], shard)
        tokens, masks = reader.read(mine.ravel(), mine_blocks.ravel())
        tokens = tokens.reshape(*mine.shape, -1)
        masks = None if masks is None else masks.reshape(tokens.shape)
        names = self.plan.streams
        starts = np.array([self.indexes[name].starts for name in names])
        totals = [(streams == number).sum(axis=1) * self.plan.block_len for number in range(len(names))]
        for i, (numbers, found) in enumerate(zip(streams.tolist(), blocks.tolist(), strict=True)):
            yield {
                "step": steps.first + i * stride,
                "tokens": tokens[i],
                "assistant": None if masks is None else masks[i],
                "starts": starts[mine[i]],
                "stream": mine[i],
                "block": mine_blocks[i],
                "first_sequence": offset,
                "sequences": count,
                "seq_len": segment.seq_len,
                "digest": digest([(names[n], block) for n, block in zip(numbers, found, strict=True)]),
                "streams": {name: int(total[i]) for name, total in zip(names, totals, strict=True)},
                "phase": segment.phase_name,
            }

    def _slice(self, segment: Segment) -> tuple[int, int, int, int]:
        """This rank's part of a step: (first block, end block, first sequence in the first block, sequences)."""
        each = self.plan.block_len // segment.seq_len
        count = segment.sequences_per_step // self.world_size
        first = self.rank * count
        return first // each, -(-(first + count) // each), first % each, count

    def _windows(self, segment: Segment, steps: Steps) -> list[Key]:
        """Shards of the windows that this rank reads now and `predownload` steps ahead, soonest first.

        Of each following window as large a share as the present one has been read, so that it is there in time and
        the network is used evenly.
        """
        first, end, _, _ = self._slice(segment)
        per_lane = segment.blocks_per_step // self.plan.lanes
        until = min(self.plan.steps, steps.first + len(steps.blocks) + self.predownload)
        now, then, last = (self.plan.lane_counts(step) for step in (steps.first, until, self.plan.steps))
        queues = []
        for lane in range(first // per_lane, -(-end // per_lane)):
            for number, (name, index) in enumerate(self.order.streams.items()):
                position = now[number]
                shards: list[int] = []
                while position < max(then[number], min(now[number] + 1, last[number])):
                    window = index.window(lane, position)
                    shards += window.shards
                    position = window.end
                if shards and position < last[number]:
                    following = index.window(lane, position).shards
                    read = (then[number] - window.first) / (window.end - window.first)
                    shards += following[: int(read * len(following))]
                queues.append([(name, shard) for shard in shards])
        return [key for key in chain.from_iterable(zip_longest(*queues)) if key is not None]

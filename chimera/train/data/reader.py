"""Blocks by number, straight from memory-mapped shards: fixed strides, no work per record.

A shard of n records is `[n u32][offsets u32 × (n + 1)][config JSON][records]` (streaming's MDS, version 2). Where all
records have one length, a record is at first + i · stride and a column at a fixed place in it; both are checked once
a shard. A record begins with a u32 length for each column of variable size, which must be the same throughout.
"""

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from chimera.train.data.cache import ShardCache, ShardError
from chimera.train.data.index import Column, StreamIndex

Key = tuple[str, int]  # stream, shard
Bytes = npt.NDArray[np.uint8]
THREADS = 4  # that fetch ahead


class MappedShard:
    """One shard's records: `tokens` and, if stored, `masks` are where they lie in one (`take`).

    A file that is mapped can change under its readers. So each record's hash is noted here, and compared when it is
    read.
    """

    def __init__(self, index: StreamIndex, number: int, data: Any, block_len: int | None) -> None:
        shard = index.shards[number]
        where = f"shard {index.folder}/{shard.raw.name}"
        head = np.frombuffer(data, np.uint32, 1)
        offsets = np.frombuffer(data, np.uint32, shard.blocks + 1, offset=4).astype(np.int64)
        stride = int(offsets[1] - offsets[0])
        if head[0] != shard.blocks or offsets[-1] > len(data) or (np.diff(offsets) != stride).any():
            raise ShardError(f"{where}: its records differ in length; blocks of one fixed length are needed")
        records = np.frombuffer(data, np.uint8, shard.blocks * stride, offset=int(offsets[0]))
        records = records.reshape(shard.blocks, stride)
        self._where, self._records, self._sums = where, records, _sums(records)
        self.masks: slice | None = None
        variable = [column for column in shard.columns if column.size is None]
        self._same(records[:, : 4 * len(variable)], where)
        sizes = dict(zip(variable, np.frombuffer(records[0, : 4 * len(variable)].tobytes(), np.uint32), strict=True))
        place = 4 * len(variable)
        for column in shard.columns:
            size = int(sizes[column]) if column.size is None else column.size
            values = records[:, place : place + size]
            if column.name == "tokens":
                self.tokens = slice(place + self._shape_bytes(column, values, where), place + size)
            elif column.name == "assistant":
                self.masks = slice(place + self._shape_bytes(column, values, where), place + size)
            place += size
        self.block_len = (self.tokens.stop - self.tokens.start) / index.dtype.itemsize
        if block_len is not None and self.block_len != block_len:
            raise ShardError(f"{where} holds blocks of {self.block_len:g} tokens, {block_len} are expected")
        if self.masks is not None and (self.masks.stop - self.masks.start) * 8 != self.block_len:
            raise ShardError(f"{where}: its `assistant` masks are not one bit a token")

    def take(self, rows: npt.NDArray[np.int64]) -> Bytes:
        """A copy of some records, [n, bytes]. Raises `ShardError` where one is not as it was when it was opened."""
        found = self._records[rows]
        if (_sums(found) != self._sums[rows]).any():
            raise ShardError(f"{self._where} was changed while it was read: bring it back and start again")
        return found

    def _shape_bytes(self, column: Column, values: Bytes, where: str) -> int:
        """Bytes before the values where an ndarray's shape is stored with each: `[ndim·4 + code][shape]`."""
        if column.size is not None or not column.encoding.startswith("ndarray"):
            return 0
        head = int(values[0, 0])
        size = 1 + (head >> 2) * (1 << head % 4)
        self._same(values[:, :size], where)
        return size

    @staticmethod
    def _same(heads: Bytes, where: str) -> None:
        if (heads != heads[:1]).any():
            raise ShardError(f"{where}: its records differ in shape; blocks of one fixed length are needed")


def _sums(records: Bytes) -> npt.NDArray[np.uint64]:
    """A hash of each record."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, records), np.uint64, len(records))


def stored_block_len(index: StreamIndex, cache: ShardCache) -> int:
    """Tokens of a stream's blocks, from its first shard: for shards without a manifest."""
    number = next(number for number, shard in enumerate(index.shards) if shard.blocks)
    return int(MappedShard(index, number, cache.open(index, number), None).block_len)


def first_blocks(index: StreamIndex, cache: ShardCache, count: int) -> npt.NDArray[Any]:
    """Up to `count` blocks of a stream's first shard that has any, [n, block_len]."""
    number = next(number for number, shard in enumerate(index.shards) if shard.blocks)
    shard = MappedShard(index, number, cache.open(index, number), None)
    records = shard.take(np.arange(min(count, index.shards[number].blocks)))
    return np.ascontiguousarray(records[:, shard.tokens]).view(index.dtype)


class BlockReader:
    """Reads blocks of several streams, mapping each shard once and fetching ahead in threads."""

    def __init__(self, indexes: Mapping[str, StreamIndex], cache: ShardCache, block_len: int) -> None:
        self.indexes, self.cache, self.block_len = dict(indexes), cache, block_len
        self.names = list(self.indexes)
        self.dtype = np.result_type(*(index.dtype for index in self.indexes.values()))
        self.has_masks = any(index.has_masks for index in self.indexes.values())
        self._starts = {n: np.concatenate([[0], np.cumsum(i.shard_blocks)]) for n, i in self.indexes.items()}
        self._shards: dict[Key, Future[MappedShard]] = {}
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Key | None] = SimpleQueue()
        self._queued: set[Key] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def read(self, streams: npt.NDArray[Any], blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], Any]:
        """Blocks by (number in `names`, block), each [n].

        Returns tokens [n, block_len] and the masks of what the assistant said, [n, block_len] bool: all True where
        a stream has none, and None where no stream has any.
        """
        size = self.block_len * self.dtype.itemsize
        tokens = np.empty((len(blocks), size), np.uint8)
        masks = np.full((len(blocks), self.block_len // 8), 255, np.uint8) if self.has_masks else None
        for number in np.unique(streams):
            name = self.names[number]
            index, starts = self.indexes[name], self._starts[name]
            here = np.flatnonzero(streams == number)
            shards = np.searchsorted(starts, blocks[here], side="right") - 1
            for shard in np.unique(shards):
                chosen = shards == shard
                places = here[chosen]
                rows = blocks[places] - starts[shard]
                mapped = self.shard((name, int(shard)))
                records = mapped.take(rows)
                found = records[:, mapped.tokens]
                if index.dtype != self.dtype:
                    found = np.ascontiguousarray(found).view(index.dtype).astype(self.dtype).view(np.uint8)
                tokens[places] = found
                if masks is not None and mapped.masks is not None:
                    masks[places] = records[:, mapped.masks]
        said = None if masks is None else np.unpackbits(masks, axis=1, bitorder="little").view(bool)
        return tokens.view(self.dtype), said

    def shard(self, key: Key) -> MappedShard:
        """A shard, opened here if no thread has begun to, or one failed: it may be within reach by now."""
        future, mine = self._claim(key)
        if not mine and future.exception() is not None:
            with self._lock:
                if self._shards.get(key) is future:
                    del self._shards[key]
            future, mine = self._claim(key)
        if mine:
            self._open(key, future)
        return future.result()

    def keys(self, streams: npt.NDArray[Any], blocks: npt.NDArray[np.int64]) -> list[Key]:
        """The shards that `read` would need."""
        keys = []
        for number in np.unique(streams):
            name = self.names[number]
            shards = np.searchsorted(self._starts[name], blocks[streams == number], side="right") - 1
            keys += [(name, int(shard)) for shard in np.unique(shards)]
        return keys

    def fetch_ahead(self, keys: Iterable[Key]) -> None:
        """Have threads open shards, in this order."""
        for key in keys:
            if key not in self._shards and key not in self._queued:
                self._queued.add(key)
                self._queue.put(key)
        if self._queued and not self._threads:
            # daemons: a download must not hold up the end of the process
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
            for thread in self._threads:
                thread.start()

    def keep(self, keys: Iterable[Key]) -> None:
        """Forget all shards but these."""
        keys = set(keys)
        with self._lock:
            for key in [key for key, future in self._shards.items() if key not in keys and future.done()]:
                del self._shards[key]

    def close(self) -> None:
        """Stop the threads; what they are fetching now is finished."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)

    def _claim(self, key: Key) -> tuple["Future[MappedShard]", bool]:
        """The future of a shard, and whether the caller is the one to open it."""
        with self._lock:
            if key in self._shards:
                return self._shards[key], False
            self._shards[key] = Future()
            return self._shards[key], True

    def _work(self) -> None:
        """A thread: open what is queued and no one else has begun to."""
        while (key := self._queue.get()) is not None and not self._closed:
            future, mine = self._claim(key)
            if mine:
                self._open(key, future)
            self._queued.discard(key)

    def _open(self, key: Key, future: "Future[MappedShard]") -> None:
        index = self.indexes[key[0]]
        try:
            future.set_result(MappedShard(index, key[1], self.cache.open(index, key[1]), self.block_len))
        except BaseException as error:  # raised where the shard is asked for
            future.set_exception(error)

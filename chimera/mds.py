"""Blocks → MDS shards: the bytes of a shard, and its entry in the index.

The bytes are those of streaming's `MDSWriter` (a test compares them), written with numpy because every record has
the same length: a shard is `[samples u32][offsets u32 × (samples + 1)][config JSON][records]`, a record its columns
in the order of their names.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from chimera.files import write_whole

Array = NDArray[Any]
Json = dict[str, Any]
SPLITS = ("train", "eval")  # of a stream, each a folder with an index of its own


@functools.cache
def known_hashes() -> tuple[str, ...]:
    """Names of the hashes streaming can check, by the same rule as its own."""
    library = {a for a in hashlib.algorithms_available if hasattr(hashlib, a) and not a.startswith("shake_")}
    return tuple(sorted(library | set(xxhash.algorithms_available)))


def digest(algorithm: str, data: bytes) -> str:
    """Hex digest of `data` under one of `known_hashes()`."""
    maker = getattr(xxhash, algorithm, None) or getattr(hashlib, algorithm)
    return str(maker(data).hexdigest())


@dataclass(frozen=True)
class ShardFormat:
    """What all shards of a stream share. `dtype` is the tokens' numpy name; `masked` streams store who speaks.

    `starts`: the mask of a token behind an EOS says whether a document, or the rest of one, starts there. (It is then
    never one that is learned, which has a mask of its own.)
    """

    block_len: int
    dtype: str
    masked: bool
    compression: str | None
    hash: str
    shard_bytes: int
    starts: bool = False

    @property
    def columns(self) -> list[tuple[str, str, int]]:
        """(name, MDS encoding, bytes) of each column, in stored order."""
        tokens = ("tokens", f"ndarray:{self.dtype}:{self.block_len}", self.block_len * np.dtype(self.dtype).itemsize)
        assistant = ("assistant", f"ndarray:uint8:{self.block_len // 8}", self.block_len // 8)
        return [assistant, tokens] if self.masked else [tokens]

    @property
    def config(self) -> Json:
        """The part of an index entry that stands in every shard's head, too."""
        names, encodings, sizes = zip(*self.columns, strict=True)
        return {
            "version": 2,
            "format": "mds",
            "compression": self.compression,
            "hashes": [self.hash],
            "size_limit": self.shard_bytes,
            "column_names": list(names),
            "column_encodings": list(encodings),
            "column_sizes": list(sizes),
        }

    @property
    def blocks_per_shard(self) -> int:
        """Blocks of a full shard: as many as `MDSWriter` puts under the same `size_limit`, at least one."""
        head = 4 + 4 + len(json.dumps(self.config, sort_keys=True))
        return max(1, (self.shard_bytes - head) // (4 + sum(size for _, _, size in self.columns)))

    @property
    def suffix(self) -> str:
        return ".mds.zstd" if self.compression else ".mds"


def shard_bytes(form: ShardFormat, tokens: Array, masks: Array | None) -> bytes:
    """The MDS file of `tokens` [blocks, block_len] and, for masked streams, `masks` [blocks, block_len] bool."""
    columns = [tokens.astype(np.dtype(form.dtype).newbyteorder("<"), copy=False).view(np.uint8)]
    if masks is not None:
        columns.insert(0, np.packbits(masks, axis=1, bitorder="little"))
    records = np.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]
    config = json.dumps(form.config, sort_keys=True).encode()
    blocks, record = records.shape
    first = 4 + 4 * (blocks + 1) + len(config)
    offsets = first + np.arange(blocks + 1, dtype=np.int64) * record
    head = np.uint32(blocks).tobytes() + offsets.astype("<u4").tobytes() + config
    return b"".join([head, np.ascontiguousarray(records).data])


def write_shard(form: ShardFormat, folder: Path, name: str, tokens: Array, masks: Array | None) -> Json:
    """Write one shard as `folder/name` + suffix, durable when this returns; its index entry."""
    raw = shard_bytes(form, tokens, masks)
    entry: Json = {
        "samples": len(tokens),
        "raw_data": {"basename": f"{name}.mds", "bytes": len(raw), "hashes": {form.hash: digest(form.hash, raw)}},
        "zip_data": None,
        **form.config,
    }
    data = raw
    if form.compression:
        level = int(form.compression.partition(":")[2] or 3)
        data = zstandard.ZstdCompressor(level=level).compress(raw)
        hashes = {form.hash: digest(form.hash, data)}
        entry["zip_data"] = {"basename": f"{name}{form.suffix}", "bytes": len(data), "hashes": hashes}
    write_whole(folder / f"{name}{form.suffix}", data)
    return entry


def file_of(entry: Json) -> Json:
    """The file an index entry's shard is stored as: {basename, bytes, hashes}."""
    stored: Json = entry["zip_data"] or entry["raw_data"]
    return stored


def is_whole(entry: Json, data: bytes) -> bool:
    """Whether a file is the one that an index entry's shard was stored as."""
    file = file_of(entry)
    return len(data) == file["bytes"] and all(digest(name, data) == value for name, value in file["hashes"].items())


def index_bytes(entries: list[Json]) -> bytes:
    """An `index.json` over shards in their order."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()

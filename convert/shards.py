"""Blocks → MDS shards: the bytes of a shard, its entry in the index, and files that appear whole or not at all.

The bytes are those of streaming's `MDSWriter` (a test compares them), written with numpy because every record has
the same length: a shard is `[samples u32][offsets u32 × (samples + 1)][config JSON][records]`, a record its columns
in the order of their names.
"""

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Json = dict[str, Any]


@functools.cache
def known_hashes() -> tuple[str, ...]:
    """Names of the hashes streaming can check, by the same rule as its own."""
    import xxhash

    library = {a for a in hashlib.algorithms_available if hasattr(hashlib, a) and not a.startswith("shake_")}
    return tuple(sorted(library | set(xxhash.algorithms_available)))


def digest(algorithm: str, data: bytes) -> str:
    """Hex digest of `data` under one of `known_hashes()`."""
    import xxhash

    maker = getattr(xxhash, algorithm, None) or getattr(hashlib, algorithm)
    return str(maker(data).hexdigest())


@dataclass(frozen=True)
class ShardFormat:
    """What all shards of a stream share. `dtype` is the tokens' numpy name; `masked` streams store who speaks."""

    block_len: int
    dtype: str
    masked: bool
    compression: str | None
    hash: str
    shard_bytes: int

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
        import zstandard

        level = int(form.compression.partition(":")[2] or 3)
        data = zstandard.ZstdCompressor(level=level).compress(raw)
        hashes = {form.hash: digest(form.hash, data)}
        entry["zip_data"] = {"basename": f"{name}{form.suffix}", "bytes": len(data), "hashes": hashes}
    write_file(folder / f"{name}{form.suffix}", data)
    return entry


def file_of(entry: Json) -> Json:
    """The file an index entry's shard is stored as: {basename, bytes, hashes}."""
    stored: Json = entry["zip_data"] or entry["raw_data"]
    return stored


def index_bytes(entries: list[Json]) -> bytes:
    """An `index.json` over shards in their order."""
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()


def write_file(path: Path, data: bytes) -> None:
    """Make `path` hold `data`: whole, durable, or as it was before.

    Raises `OSError` (a full disk included) with the temporary file removed.
    """
    with _whole(path) as file:
        file.write(data)


def move_file(file: Path, path: Path) -> None:
    """Move `file` to `path`, also to another disk; the same promise as `write_file`'s."""
    try:
        os.replace(file, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _whole(path) as out, open(file, "rb") as data:
            shutil.copyfileobj(data, out)
        file.unlink()
    else:
        _sync_folder(path.parent)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place at the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

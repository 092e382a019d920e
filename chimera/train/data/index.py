"""A stream's `index.json`: its shards, their files and hashes, and how a record is laid out.

Reads what `convert/` writes and what MDSWriter writes elsewhere (llm-foundry's token shards), as long as every
record of a shard has the same length. Names found in an index never become paths unchecked.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from chimera.cli import UserError
from chimera.manifest import Stream
from chimera.stores import is_remote
from chimera.text import one_line
from chimera.train.data.places import NAME, Places, Root, Roots
from chimera.train.data.shards import fetch, not_there

FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a shard: its name in the split's folder, bytes, and hex digests by algorithm."""

    name: str
    bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a record: its MDS encoding, and its bytes where every record has the same by declaration."""

    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: `raw` is what is read, `zip` what is stored where it is compressed."""

    blocks: int
    raw: StoredFile
    zip: StoredFile | None
    compression: str | None
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class StreamIndex:
    """One split of one stream."""

    name: str
    root: str  # the shards root it is of, a path or URL
    folder: str  # in it, the one that holds index.json
    fingerprint: str  # sha256 of index.json
    shards: tuple[Shard, ...]
    starts: bool = False  # its masks say where documents start (`ShardFormat.starts`)

    @cached_property
    def shard_blocks(self) -> npt.NDArray[np.int64]:
        """Blocks of each shard, [shards]."""
        return np.array([shard.blocks for shard in self.shards], np.int64)

    @property
    def blocks(self) -> int:
        return int(self.shard_blocks.sum())

    @property
    def remote(self) -> bool:
        return is_remote(self.root)

    @cached_property
    def in_place(self) -> bool:
        """Whether its shards are read where they are, and not from a cache."""
        return not self.remote and all(shard.zip is None for shard in self.shards)

    @cached_property
    def has_masks(self) -> bool:
        """Whether blocks say which tokens the assistant said."""
        return any(column.name == "assistant" for column in self.shards[0].columns)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of tokens as stored; `bytes` columns hold int64, as llm-foundry writes them."""
        encoding = next(c.encoding for c in self.shards[0].columns if c.name == "tokens")
        kind, _, rest = encoding.partition(":")
        if kind == "bytes":
            return np.dtype(np.int64)
        if kind == "ndarray" and rest.partition(":")[0] in ("uint16", "uint32", "int32", "int64"):
            return np.dtype(rest.partition(":")[0])
        raise UserError(
            f"stream {self.name} at {self.folder}: its column `tokens` is stored as `{encoding}`; readable are "
            "ndarray of uint16, uint32, int32 or int64, and bytes of int64"
        )


def open_indexes(shards: Places, cache: str, streams: Iterable[str]) -> dict[str, StreamIndex]:
    """The train indexes of `streams`, each checked against its root's manifest where it has one."""
    streams, roots = list(streams), Roots(shards, cache)
    found = roots.locate(streams)
    if streams and not found:
        raise UserError(f"stream {streams[0]} has no train index at {roots}: correct the name, or build it")
    return indexes_of(found, cache)


def indexes_of(roots: Mapping[str, Root], cache: str) -> dict[str, StreamIndex]:
    """The train index of each stream, in its root."""
    found = {}
    for name, root in roots.items():
        if root.manifest and name not in root.manifest.streams:
            raise UserError(f"stream `{name}` (in `phases`) {not_there(root.place, root.manifest.streams)}")
        known = root.manifest.streams[name] if root.manifest else None
        found[name] = read_index(root.place, name, cache, known=known)
    return found


def read_index(root: str, stream: str, cache: str, split: str = "train", known: Stream | None = None) -> StreamIndex:
    """The index of `ROOT/<stream>/<split>/`, or of `ROOT/<stream>/` where there are no splits (split `train`).

    `known` is the stream as a manifest has it. Raises `UserError` naming stream and place.
    """
    if not NAME.fullmatch(stream):
        raise UserError(f"stream name {stream!r}: letters, digits, _ and - only")
    path = None
    for name in [f"{stream}/{split}", *([stream] if split == "train" else [])]:
        folder = f"{root.rstrip('/')}/{name}"
        path = fetch(root, f"{name}/index.json", cache)
        if path is not None:
            break
    if path is None:
        raise UserError(f"stream {stream} has no {split} index at {root}/{stream}: correct the name, or build it")
    data = path.read_bytes()
    fingerprint = hashlib.sha256(data).hexdigest()
    if known and known.splits[split].index not in (None, fingerprint):
        raise UserError(
            f"{folder}/index.json is not the one the manifest of {root} names: the shards were changed since, or "
            "are being built: wait for the build, or build them again"
        )
    try:
        shards = _shards(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/index.json is no index of MDS shards: {one_line(repr(error))}") from None
    if not sum(shard.blocks for shard in shards):
        raise UserError(f"stream {stream} at {folder} has no blocks")
    if not any(column.name == "tokens" for column in shards[0].columns):
        names = ", ".join(column.name for column in shards[0].columns)
        raise UserError(f"stream {stream} at {folder} has no column `tokens` (it has {names})")
    if any(shard.columns != shards[0].columns for shard in shards):
        raise UserError(f"stream {stream} at {folder}: its shards differ in their columns: build it again")
    return StreamIndex(stream, root, folder, fingerprint, shards, known is not None and known.starts)


def _shards(data: bytes) -> tuple[Shard, ...]:
    """The shards of an index. Each entry is made one as soon as it is parsed: as JSON all take twice the memory."""
    columns: dict[tuple[Column, ...], tuple[Column, ...]] = {}  # alike in all shards, and kept once

    def made(found: dict[str, Any]) -> Any:
        return _shard(found, columns) if "raw_data" in found else found

    shards = json.loads(data, object_hook=made)["shards"]
    return tuple(found if isinstance(found, Shard) else _shard(found, columns) for found in shards)


def _shard(entry: dict[str, Any], known: dict[tuple[Column, ...], tuple[Column, ...]]) -> Shard:
    """An entry of `shards` in an index; raises `ValueError` where it is none."""
    if (entry["version"], entry["format"]) != (2, "mds"):
        raise ValueError(f"version {entry['version']}, format {entry['format']!r}")
    described = zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True)
    columns = tuple(Column(str(n), str(e), None if s is None else _count(s)) for n, e, s in described)
    return Shard(
        blocks=_count(entry["samples"]),
        raw=_file(entry["raw_data"]),
        zip=_file(entry["zip_data"]) if entry["zip_data"] else None,
        compression=str(entry["compression"]).partition(":")[0] if entry["compression"] else None,
        columns=known.setdefault(columns, columns),
    )


def _file(entry: dict[str, Any]) -> StoredFile:
    if not FILE_NAME.fullmatch(entry["basename"]):
        raise ValueError(f"file name {entry['basename']!r}")
    return StoredFile(entry["basename"], _count(entry["bytes"]), {str(k): str(v) for k, v in entry["hashes"].items()})


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} where a count is expected")
    return value

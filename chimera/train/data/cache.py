"""Raw shards on this machine: fetched, verified, decompressed, and kept within a limit.

A shard is a file `CACHE/<stream>-<key>/<name>.mds`, the key a hash of its root and index: shards that were built again
are noticed, and streams of one name in several roots are kept apart. Each has a lock file; under it a shard is
downloaded to a temporary name, verified, decompressed, verified again, and renamed: what has its final name was whole
once, and is verified again whenever it is opened (once a pass). Killed at any point, nothing needs cleaning up; any
number of processes and jobs may share a cache. Uncompressed shards of a local root are used where they are, and a root
is never written to.

A mapped file may be removed: whoever has it mapped goes on reading it. So eviction needs no word from readers.
"""

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash
import zstandard

from chimera.cli import UserError, say
from chimera.files import lock_file
from chimera.stores import is_remote
from chimera.train.data.index import Shard, StoredFile, StreamIndex
from chimera.train.data.places import Places, places_of, shown
from chimera.train.data.remote import download
from chimera.train.order import ordering


class ShardError(UserError):
    """A shard that cannot be had; readable also when a DataLoader worker's traceback was wrapped around it."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition("ShardError: ")[2])


def smallest_cache(indexes: Iterable[StreamIndex], lanes: int) -> int:
    """Bytes that hold, of every stream and lane, two windows: what is shuffled together now, and next."""
    total = 0
    for index in indexes:
        if index.in_place:
            continue
        most = max(index.shards, key=lambda shard: shard.blocks)
        # a window ends with the piece that fills it, and a lane's run may begin and end inside a shard
        blocks = ordering.WINDOW_BLOCKS + 3 * most.blocks
        window = min(ordering.WINDOW_PIECES * most.raw.bytes, blocks * -(-most.raw.bytes // most.blocks))
        total += min(2 * lanes * window, sum(shard.raw.bytes for shard in index.shards))
    return total


def check_limit(shards: Places) -> None:
    """Raise `UserError` where `cache_limit` is given, but no root of `shards` is remote."""
    if not any(map(is_remote, places_of(shards))):
        raise UserError(
            f"setting `cache_limit` is given, but the shards at {shown(shards)} are local: nothing "
            "can be fetched again once it is removed; delete the setting"
        )


class ShardCache:
    """Opens shards, of any root. `cache` is a local folder, `limit` in bytes of all raw shards in it."""

    def __init__(self, cache: str, limit: int | None = None) -> None:
        self.folder, self.limit = Path(cache), limit

    def open(self, index: StreamIndex, number: int) -> mmap.mmap:
        """Map a shard's raw bytes, fetching and verifying them if need be; raises `ShardError` naming the shard."""
        shard = index.shards[number]
        if not index.remote and shard.zip is None:
            return self._open_in_place(index, shard)
        path = self.path(index, shard)
        try:
            with locked(path):
                if path.exists() and not _is_good(path, shard.raw):
                    say(f"{path} was damaged (its hash is not the index's): fetching it again")
                    path.unlink()
                if not path.exists():
                    self._fetch(index, shard, path)
                return _map(path)
        except OSError as error:
            raise ShardError(
                f"shard {index.folder}/{shard.raw.name} cannot be kept in {self.folder}: {error}"
            ) from None

    def path(self, index: StreamIndex, shard: Shard) -> Path:
        """Where the cache keeps a shard."""
        key = hashlib.sha256(f"{index.root}\n{index.fingerprint}".encode()).hexdigest()[:16]
        return self.folder / f"{index.name}-{key}" / shard.raw.name

    def touch(self, index: StreamIndex, number: int) -> None:
        """Note that a shard is in use: eviction takes what was longest out of use."""
        if self.limit is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path(index, index.shards[number]))

    def _open_in_place(self, index: StreamIndex, shard: Shard) -> mmap.mmap:
        path = Path(index.folder, shard.raw.name)
        try:
            if not _is_good(path, shard.raw):
                raise ShardError(f"shard {path} is damaged (its hash is not the index's): restore or build it again")
            return _map(path)
        except FileNotFoundError:
            raise ShardError(f"shard {path} is missing: build the stream {index.name} again") from None
        except OSError as error:
            raise ShardError(f"shard {path} cannot be read: {error.strerror}") from None

    def _fetch(self, index: StreamIndex, shard: Shard, path: Path) -> None:
        """Make `path` hold the raw shard; the caller has its lock. `files.open_whole` would not reserve the room."""
        stored = shard.zip or shard.raw
        place = f"{index.folder}/{stored.name}"
        room = path.with_name(f".{path.name}.part")
        self._make_room(room, shard.raw.bytes)
        fetched = path.with_name(f".{path.name}.fetched")
        try:
            for last in (False, True) if index.remote else (True,):
                source = self._download(place, fetched) if index.remote else Path(place)
                if not source.is_file():
                    raise ShardError(f"shard {place} is missing: build the stream {index.name} again")
                if _is_good(source, stored):
                    break
                if last:
                    raise ShardError(
                        f"shard {place} is damaged at its source (its hash is not the index's): upload or build it "
                        f"again; the rest of stream {index.name} is not touched"
                    )
                say(f"{place} arrived damaged (its hash is not the index's): fetching it again")
            if shard.zip is not None:
                data = _decompress(str(shard.compression), source.read_bytes(), shard.raw.bytes)
                with room.open("r+b") as file:  # not shortened: its size is the reservation
                    file.write(data or b"")
                source = room
                if data is None or len(data) != shard.raw.bytes or not _matches(room, shard.raw):
                    raise ShardError(f"shard {place} does not decompress to what its index says: build it again")
            with self._whole_cache():  # whoever adds up its files must not miss one between two names
                os.replace(source, path)
        finally:
            room.unlink(missing_ok=True)
            fetched.unlink(missing_ok=True)

    def _download(self, url: str, to: Path) -> Path:
        try:
            download(url, to)
        except OSError as error:
            raise ShardError(f"shard {url} cannot be fetched: {error}") from None
        return to

    def _make_room(self, room: Path, size: int) -> None:
        """Make the sparse file `room` of `size` bytes, which others count against the limit.

        If need be, the shards longest out of use go.
        """
        with self._whole_cache():
            if self.limit is not None:
                self._evict(size, self.limit)
            with room.open("wb") as file:
                file.truncate(size)

    def _whole_cache(self) -> contextlib.AbstractContextManager[bool]:
        """Hold the cache's lock, if there is a limit to keep."""
        return contextlib.nullcontext(True) if self.limit is None else locked(self.folder / "limit")

    def _evict(self, size: int, limit: int) -> None:
        """Remove shards until `size` more bytes are within `limit`; the caller has the cache's lock."""
        files = []
        for path in self.folder.glob("*/*.mds*"):
            with contextlib.suppress(FileNotFoundError):
                if path.name.endswith((".mds", ".part")):
                    stat = path.stat()
                    files.append((path.name.endswith(".mds"), stat.st_mtime_ns, stat.st_size, path))
                elif path.name.endswith((".fetched", ".fetched.d")):
                    _remove_unless_locked(path)  # a killed process's; no part of the limit
        used = sum(bytes_ for _, _, bytes_, _ in files)
        for _, _, freed, path in sorted(files):  # reservations of killed processes first
            if used + size <= limit:
                return
            if _remove_unless_locked(path):
                used -= freed
        if used + size > limit:
            raise ShardError(f"`cache_limit` of {limit} bytes is too small: {used} are in use, {size} more are needed")


def locked(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Wait for the lock of a file, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return lock_file(_lock_of(path), wait=True)


def _lock_of(path: Path) -> Path:
    name = path.name.removeprefix(".").removesuffix(".part").removesuffix(".d").removesuffix(".fetched")
    return path.with_name(f".{name}.lock")


def _remove_unless_locked(path: Path) -> bool:
    """Remove a shard or what a killed process left; False where the shard is being fetched or opened."""
    with lock_file(_lock_of(path), wait=False) as free:
        if free:
            path.unlink(missing_ok=True)
        return free


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _is_good(path: Path, file: StoredFile) -> bool:
    """Whether a file has the index's bytes and hashes."""
    return path.stat().st_size == file.bytes and _matches(path, file)


def _matches(path: Path, file: StoredFile) -> bool:
    """Whether a file's content has every hash the index gives for it (foreign indexes may give none)."""
    if not file.hashes:
        return True
    makers = {name: getattr(xxhash, name, None) or getattr(hashlib, name, None) for name in file.hashes}
    if unknown := [name for name, maker in makers.items() if maker is None]:
        raise ShardError(f"shard {path}: its index names the unknown hash {unknown[0]}")
    states = {name: maker() for name, maker in makers.items() if maker is not None}
    with path.open("rb", buffering=0) as data:
        while chunk := data.read(1 << 20):
            for state in states.values():
                state.update(chunk)
    return all(state.hexdigest() == file.hashes[name] for name, state in states.items())


def _decompress(algorithm: str, data: bytes, size: int) -> bytes | None:
    """`data` decompressed, None where it cannot be; zstd without importing streaming, which takes seconds."""
    try:
        if algorithm == "zstd":
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        from streaming.base.compression import decompress

        return decompress(algorithm, data)
    except Exception:  # every algorithm has its own kinds
        return None

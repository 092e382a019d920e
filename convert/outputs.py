"""Where a build ends up: a folder or an object store. Both take finished shards, small files, then the manifest."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from chimera.cli import UserError, say
from convert.journal import SENT, SPLITS
from convert.planned import PARTS
from convert.settings import BuildSettings
from convert.shards import Json, digest, file_of, move_file, write_file
from convert.store import Store

CLAIM = "builder.json"  # while a build writes to a store: who it is
_OURS = re.compile(r"index\.json|shard\.[\w.]+|\..+\.tmp")  # files of a split


class Output(Protocol):
    name: str

    def held(self) -> contextlib.AbstractContextManager[bool]:
        """Keep other builders of this machine out meanwhile; gives whether there was none."""
        ...

    def read(self, key: str) -> bytes | None:
        """A small file of the output, or `None`."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """A small file, whole or not at all."""
        ...

    def put(self, file: Path, key: str) -> None:
        """A file of any size, whole or not at all; `file` may be gone afterwards."""
        ...

    def adopt(self, made: Path, key: str, entry: Json) -> bool:
        """Publish the finished shard `made` as `key`; returns whether the output holds it as its index entry says.

        May be repeated after a kill: then `made` can be gone, and what was published is checked.
        """
        ...

    def claim(self, work: Path, rebuild: bool) -> None:
        """Refuse with `UserError` when another work folder's build has begun here, or take over under `rebuild`."""
        ...

    def check_free(self, streams: Iterable[str], rebuild: bool) -> None:
        """Raise `UserError` where there is no room for a new build of `streams`; `rebuild` lets an older one go."""
        ...

    def clear(self, streams: Iterable[str]) -> None:
        """Remove what an older build left of `streams`, the manifest first; may be repeated after a kill."""
        ...

    def prune(self, split: str, known: Iterable[str]) -> None:
        """Remove what a build killed here left in `STREAM/SPLIT` beside the index and the shards in `known`."""
        ...

    @property
    def can_discard(self) -> bool:
        """Whether shards that turn out to be too many can be removed again."""
        ...

    def discard(self, key: str) -> None:
        """Remove a shard that is not part of the output after all."""
        ...

    def release(self) -> None:
        """The build is whole: give up the claim."""
        ...


def open_output(settings: BuildSettings) -> Output:
    """The output the settings name."""
    if settings.remote:
        return StoreOutput(settings.output, settings.work_folder, settings.retries)
    return FolderOutput(settings.output)


class FolderOutput:
    """A local folder. A lock on it (`held`) keeps other builders out, so there is nothing to claim."""

    def __init__(self, name: str) -> None:
        self.name, self._root = name, Path(name)

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the folder against builders with another `work`, for which its own lock says nothing."""
        new = not self._root.exists()
        self._root.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._root, os.O_RDONLY)
        alone = True
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:
            pass  # a file system without locks on folders (NFS): the work folder's must do
        try:
            yield alone
        finally:
            os.close(folder)
            if new and not any(self._root.iterdir()):  # nothing has begun
                self._root.rmdir()

    def read(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        (self._root / key).parent.mkdir(parents=True, exist_ok=True)
        write_file(self._root / key, data)

    def put(self, file: Path, key: str) -> None:
        place = self._root / key
        place.parent.mkdir(parents=True, exist_ok=True)
        move_file(file, place)

    def adopt(self, made: Path, key: str, entry: Json) -> bool:
        place, file = self._root / key, file_of(entry)
        if made.exists():
            self.put(made, key)
            return place.stat().st_size == file["bytes"]
        return place.exists() and all(digest(name, place.read_bytes()) == v for name, v in file["hashes"].items())

    def claim(self, work: Path, rebuild: bool) -> None:
        pass

    def check_free(self, streams: Iterable[str], rebuild: bool) -> None:
        for folder in [self._root / name for name in streams if os.path.lexists(self._root / name)]:
            if not rebuild:
                raise UserError(
                    f"{folder} is not of this build (or it was begun with another `work`): choose another `output` or "
                    "set `rebuild=true`"
                )
            if foreign := next(_foreign(folder), None):
                raise UserError(
                    f"{foreign} was not made by a build: move it away before `rebuild=true` removes the rest"
                )

    def clear(self, streams: Iterable[str]) -> None:
        (self._root / "manifest.json").unlink(missing_ok=True)  # first: nothing half removed may look whole
        for name in streams:
            for split in SPLITS:
                self.prune(f"{name}/{split}", [])
            _remove_folder(self._root / name)
            (self._root / "rejects" / f"{name}.jsonl.zst").unlink(missing_ok=True)

    def prune(self, split: str, known: Iterable[str]) -> None:
        folder, kept = self._root / split, {*known}
        if kept:
            kept.add("index.json")
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name not in kept and _OURS.fullmatch(file.name):
                file.unlink()
        if not kept:
            _remove_folder(folder)

    can_discard = True

    def discard(self, key: str) -> None:
        pass  # it lies in the work folder, and goes with it

    def release(self) -> None:
        pass


def _foreign(folder: Path) -> Iterator[Path]:
    """What in a stream's folder no build makes."""
    if not folder.is_dir():
        yield folder
        return
    for split in folder.iterdir():
        if split.name not in SPLITS or not split.is_dir():
            yield split
        else:
            yield from (file for file in split.iterdir() if not (_OURS.fullmatch(file.name) and file.is_file()))


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder; a link to one stays."""
    if folder.is_dir() and not folder.is_symlink():
        folder.rmdir()


class StoreOutput:
    """An object store, to which the workers have sent the shards already.

    Stores have no locks: the object `builder.json` says which work folder's build is under way, which keeps out a
    builder on another machine unless both begin in the same second.
    """

    def __init__(self, name: str, work: Path, retries: int) -> None:
        self.name = name
        self._work = work
        self._store = Store(name, work / "publishing", retries)

    def held(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)  # `claim` does it

    def read(self, key: str) -> bytes | None:
        return self._store.get(key)

    def write(self, key: str, data: bytes) -> None:
        file = self._work / "publishing" / "file"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self.put(file, key)

    def put(self, file: Path, key: str) -> None:
        self._store.put(file, key)

    def adopt(self, made: Path, key: str, entry: Json) -> bool:
        return made.with_name(made.name + SENT).exists()

    def claim(self, work: Path, rebuild: bool) -> None:
        mine = work / "builder"
        if not mine.exists():
            write_file(mine, secrets.token_hex(8).encode())
        claim = json.dumps({"builder": mine.read_text()}).encode()
        if self._store.get(CLAIM) not in (None, b"{}", claim):
            if not rebuild:
                raise UserError(
                    f"another builder is writing {self.name}, or was stopped: wait for it or run its command again, or "
                    "take over with `rebuild=true`"
                )
            for parts in work.glob(f"{PARTS}*"):  # first: its objects may lie in the places of those that were sent
                shutil.rmtree(parts)
        self.write(CLAIM, claim)
        if self._store.get(CLAIM) != claim:
            raise UserError(f"another builder began to write {self.name} at the same time: wait for it")

    def check_free(self, streams: Iterable[str], rebuild: bool) -> None:
        """Objects cannot be removed on every store, so an older build must go before a new one of another shape."""
        if self._store.get("manifest.json") is not None:
            raise UserError(f"remove the objects below {self.name} before it is built anew")
        for key in self._indexes(streams):
            if not (rebuild and self.can_discard) and self._store.get(key) is not None:
                raise UserError(
                    f"{self.name}/{key} is not of this build: choose another `output`, remove the objects below this "
                    "one or, where the store's client can, set `rebuild=true`"
                )

    def clear(self, streams: Iterable[str]) -> None:
        for key in self._indexes(streams) if self.can_discard else ():
            self._store.delete(key)

    def prune(self, split: str, known: Iterable[str]) -> None:
        if not [*known] and self.can_discard:
            self._store.delete(f"{split}/index.json")

    def _indexes(self, streams: Iterable[str]) -> list[str]:
        return [f"{name}/{split}/index.json" for name in streams for split in SPLITS]

    @property
    def can_discard(self) -> bool:
        return self._store.can_delete

    def discard(self, key: str) -> None:
        self._store.delete(key)

    def release(self) -> None:
        if self._store.can_delete:
            self._store.delete(CLAIM)
        else:
            self.write(CLAIM, b"{}")
            say(f"{self.name}/{CLAIM} may be removed")

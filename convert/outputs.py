"""Where a build ends up: a folder or an object store. Both take finished shards, small files, then the manifest."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from chimera.cli import UserError, say
from convert.journal import SENT, SPLITS
from convert.settings import BuildSettings
from convert.shards import move_file, write_file
from convert.store import Store

CLAIM = "builder.json"  # while a build writes to a store: who it is


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

    def adopt(self, made: Path, key: str, size: int) -> None:
        """Take over the finished shard `made` of `size` bytes as `key`; again after a kill."""
        ...

    def claim(self, work: Path, rebuild: bool) -> None:
        """Refuse with `UserError` when another work folder's build has begun here."""
        ...

    def clear(self, streams: Iterable[str], rebuild: bool) -> None:
        """Make room for a new build of `streams`: remove an older one under `rebuild`, else refuse what is there."""
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

    def adopt(self, made: Path, key: str, size: int) -> None:
        place = self._root / key
        if made.exists():
            self.put(made, key)
        if not place.exists() or place.stat().st_size != size:
            raise UserError(f"{place} is missing or damaged: set `rebuild=true` and build again")

    def claim(self, work: Path, rebuild: bool) -> None:
        pass

    def clear(self, streams: Iterable[str], rebuild: bool) -> None:
        streams = list(streams)
        taken = [self._root / name for name in streams if (self._root / name).exists()]
        if taken and not rebuild:
            raise UserError(f"{taken[0]} is not of this build: choose another `output` or set `rebuild=true`")
        foreign = [file for folder in taken for file in folder.glob("*") if file.name not in SPLITS]
        if foreign:
            raise UserError(
                f"{foreign[0]} was not made by a build: move it away before `rebuild=true` removes the rest"
            )
        (self._root / "manifest.json").unlink(missing_ok=True)  # first: nothing half removed may look whole
        for name in streams:
            shutil.rmtree(self._root / name, ignore_errors=True)
            (self._root / "rejects" / f"{name}.jsonl.zst").unlink(missing_ok=True)

    can_discard = True

    def discard(self, key: str) -> None:
        pass  # it lies in the work folder, and goes with it

    def release(self) -> None:
        pass


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

    def adopt(self, made: Path, key: str, size: int) -> None:
        if not made.with_name(made.name + SENT).exists():
            raise UserError(f"{self.name}/{key} was not uploaded: remove {self._work} and build again")

    def claim(self, work: Path, rebuild: bool) -> None:
        mine = work / "builder"
        if not mine.exists():
            write_file(mine, secrets.token_hex(8).encode())
        claim = json.dumps({"builder": mine.read_text()}).encode()
        if self._store.get(CLAIM) not in (None, b"{}", claim) and not rebuild:
            raise UserError(
                f"another builder is writing {self.name}, or was stopped: wait for it or run its command again, or "
                "take over with `rebuild=true`"
            )
        self.write(CLAIM, claim)
        if self._store.get(CLAIM) != claim:
            raise UserError(f"another builder began to write {self.name} at the same time: wait for it")

    def clear(self, streams: Iterable[str], rebuild: bool) -> None:
        """Objects cannot be removed on every store, so an older build must go before a new one of another shape."""
        if self._store.get("manifest.json") is not None:
            raise UserError(f"remove the objects below {self.name} before it is built anew")
        for key in (f"{name}/{split}/index.json" for name in streams for split in SPLITS):
            if not rebuild and self._store.get(key) is not None:
                raise UserError(
                    f"{self.name}/{key} is not of this build: choose another `output` or set `rebuild=true`"
                )

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

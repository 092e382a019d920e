"""Where a build ends up: a folder or an object store. Both take finished shards, small files, then the manifest."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from chimera.cli import UserError, say
from chimera.convert.build.part_state import SENT
from chimera.convert.build.plan import PARTS
from chimera.convert.build.store import SECONDS
from chimera.convert.settings import LEASE, BuildSettings
from chimera.files import move_file, try_lock, write_whole
from chimera.manifest import Manifest, NotAManifest, parse_manifest
from chimera.mds import SPLITS, Json, is_whole
from chimera.objects import Objects
from chimera.retries import OPENING

BUILDER = "builder"  # in the work folder: the name under which it asks for a store's lease
_OURS = re.compile(r"index\.json|shard\.[\w.]+|\..+\.tmp")  # files of a split


class Output(Protocol):
    name: str

    def lock(self) -> contextlib.AbstractContextManager[bool]:
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

    def publish_shard(self, made: Path, key: str, entry: Json) -> bool:
        """Publish the finished shard `made` as `key`; returns whether the output holds it as its index entry says.

        May be repeated after a kill: then `made` can be gone, and what was published is checked.
        """
        ...

    def acquire(self, work: Path, rebuild: bool, finished: bool = False) -> None:
        """Refuse with `UserError` when another work folder's build has begun here, or take over under `rebuild`.

        `finished`: it has a manifest, and streams are built beside those that it names.
        """
        ...

    def check_lease(self) -> None:
        """Raise `UserError` where another builder has taken this one's place since `acquire`."""
        ...

    def check_free(self, streams: Iterable[str], rebuild: bool, finished: bool = False) -> None:
        """Raise `UserError` where there is no room for a new build of `streams`; `rebuild` lets an older one go."""
        ...

    def clear(self, streams: Iterable[str], finished: bool = False) -> None:
        """Remove what an older build left of `streams`, the manifest first; may be repeated after a kill.

        `finished`: the manifest names none of them, and stays.
        """
        ...

    def remove_stale(self, split: str, known: Iterable[str]) -> None:
        """Remove what a build killed here left in `STREAM/SPLIT` beside the index and the shards in `known`."""
        ...

    def delete_shard(self, key: str) -> None:
        """Remove a shard that is not part of the output after all."""
        ...

    def release_lease(self) -> None:
        """Give up the lease, if this work folder's build has it."""
        ...


def open_output(settings: BuildSettings) -> Output:
    """The output the settings name."""
    if settings.remote:
        return StoreOutput(settings.output, settings.work_folder, settings.retries)
    return FolderOutput(settings.output)


def manifest_of(output: Output) -> Manifest | None:
    """The output's manifest, or `None` before it is whole. Raises `UserError` for one of another program."""
    data = output.read("manifest.json")
    try:
        return None if data is None else parse_manifest(data)
    except NotAManifest:
        raise UserError(
            f"{output.name}/manifest.json was written by another version or program: choose another `output`"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{output.name}/manifest.json is damaged ({error}): bring it back, or remove that file"
        ) from None


class FolderOutput:
    """A local folder. A lock on it (`lock`) keeps other builders out, so there is nothing to acquire."""

    def __init__(self, name: str) -> None:
        self.name, self._root = name, Path(name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the folder against builders with another `work`, for which its own lock says nothing."""
        new = not self._root.exists()
        self._root.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._root, os.O_RDONLY)
        alone = True
        with contextlib.suppress(OSError):  # a file system without locks on folders (NFS): the work folder's must do
            alone = try_lock(folder, self._root)
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
        write_whole(self._root / key, data)

    def put(self, file: Path, key: str) -> None:
        place = self._root / key
        place.parent.mkdir(parents=True, exist_ok=True)
        move_file(file, place)

    def publish_shard(self, made: Path, key: str, entry: Json) -> bool:
        place = self._root / key
        if made.exists():
            self.put(made, key)
        return is_whole(entry, place.read_bytes() if place.exists() else b"")

    def acquire(self, work: Path, rebuild: bool, finished: bool = False) -> None:
        pass

    def check_lease(self) -> None:
        """Nothing: the lock is held."""

    def check_free(self, streams: Iterable[str], rebuild: bool, finished: bool = False) -> None:
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

    def clear(self, streams: Iterable[str], finished: bool = False) -> None:
        if not finished:
            (self._root / "manifest.json").unlink(missing_ok=True)  # first: nothing half removed may look whole
        for name in streams:
            for split in SPLITS:
                self.remove_stale(f"{name}/{split}", [])
            _remove_folder(self._root / name)
            for beside in ("rejects", "proof"):
                (self._root / beside / f"{name}.jsonl.zst").unlink(missing_ok=True)

    def remove_stale(self, split: str, known: Iterable[str]) -> None:
        folder, kept = self._root / split, {*known}
        if kept:
            kept.add("index.json")
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name not in kept and _OURS.fullmatch(file.name):
                file.unlink()
        if not kept:
            _remove_folder(folder)

    def delete_shard(self, key: str) -> None:
        pass  # it lies in the work folder, and goes with it

    def release_lease(self) -> None:
        pass


def _forget_parts(work: Path) -> None:
    """Have all parts made anew."""
    for parts in work.glob(f"{PARTS}*"):
        shutil.rmtree(parts)


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

    Stores have no locks: the object `builder.json`, which only one builder can create, says which work folder's build
    is under way.
    """

    def __init__(self, name: str, work: Path, retries: int) -> None:
        self.name = name
        self._work = work
        self._store = Objects(name, retries, SECONDS, OPENING)
        self._lease = b""

    def lock(self) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(True)  # `acquire` does it

    def read(self, key: str) -> bytes | None:
        return self._store.find(key)

    def write(self, key: str, data: bytes) -> None:
        self._store.put(key, data)

    def put(self, file: Path, key: str) -> None:
        self._store.put(key, file)

    def publish_shard(self, made: Path, key: str, entry: Json) -> bool:
        return made.with_name(made.name + SENT).exists()

    def acquire(self, work: Path, rebuild: bool, finished: bool = False) -> None:
        begun = self._mine() is not None
        if not begun:
            write_whole(work / BUILDER, secrets.token_hex(8).encode())
        self._lease = lease = self._mine() or b""
        found = self._store.find(LEASE)
        if found is None:
            if begun:  # another builder has had the lease since, and is done: what was sent may be gone, or its
                _forget_parts(work)
            if self._store.put_if_absent(LEASE, lease) and self._store.put_if_absent(LEASE, lease):  # twice?
                say(f"{self.name}: no conditional creates here: a builder that begins in the same second may go unseen")
        elif found != lease:
            self._take_over(work, lease, rebuild)
        self.check_lease()
        if not finished and self._store.exists("manifest.json"):  # of a builder that had the lease in between
            self.release_lease()
            raise UserError(f"another builder has just finished {self.name}: run the same command again")

    def check_lease(self) -> None:
        if self._store.find(LEASE) != self._lease:
            raise UserError(f"another builder began to write {self.name}, at the same time or since: wait for it")

    def _take_over(self, work: Path, lease: bytes, rebuild: bool) -> None:
        if not rebuild:
            raise UserError(
                f"another builder is writing {self.name}, or was stopped: wait for it or run its command again, or "
                "take over with `rebuild=true`"
            )
        _forget_parts(work)  # first: its objects may lie in the places of those that were sent
        self._store.put(LEASE, lease)

    def _mine(self) -> bytes | None:
        """The lease of this work folder's build, once it has asked for one."""
        file = self._work / BUILDER
        return json.dumps({"builder": file.read_text()}).encode() if file.exists() else None

    def check_free(self, streams: Iterable[str], rebuild: bool, finished: bool = False) -> None:
        """A finished build is removed by hand alone; `rebuild` lets what one left unfinished go."""
        if not finished and self._store.exists("manifest.json"):
            raise UserError(f"remove the objects below {self.name} before it is built anew")
        for key in self._indexes(streams):
            if not rebuild and self._store.exists(key):
                raise UserError(
                    f"{self.name}/{key} is not of this build: choose another `output`, remove the objects below this "
                    "one, or set `rebuild=true`"
                )

    def clear(self, streams: Iterable[str], finished: bool = False) -> None:
        for key in self._indexes(streams := [*streams]):
            self._store.delete(key)
        for name in streams if finished else ():
            for split in SPLITS:
                self.remove_stale(f"{name}/{split}", [])
            for beside in ("rejects", "proof"):
                self._store.delete(f"{beside}/{name}.jsonl.zst")

    def remove_stale(self, split: str, known: Iterable[str]) -> None:
        kept = {*known}
        if kept:
            kept.add("index.json")
        for entry in self._store.list(split):
            name = entry.key.removeprefix(f"{split}/")
            if name not in kept and _OURS.fullmatch(name):
                self._store.delete(entry.key)

    def _indexes(self, streams: Iterable[str]) -> list[str]:
        return [f"{name}/{split}/index.json" for name in streams for split in SPLITS]

    def delete_shard(self, key: str) -> None:
        self._store.delete(key)

    def release_lease(self) -> None:
        mine = self._mine()
        if mine and self._store.find(LEASE) == mine:  # another builder may have taken over
            self._store.delete(LEASE)

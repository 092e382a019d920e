"""A folder as the output of a build."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from chimera.cli import UserError
from chimera.convert.build.claims import alone, claimed, just_changed
from chimera.files import move_file, write_whole
from chimera.manifest import Manifest, parse_manifest
from chimera.mds import SPLITS, Json, is_whole

OURS = re.compile(r"index\.json|shard\.[\w.]+|\..+\.tmp")  # files of a split


class FolderOutput:
    """A local folder, or one that machines share. See `outputs.Output`."""

    def __init__(self, name: str) -> None:
        self.name, self._root = name, Path(name)

    @contextlib.contextmanager
    def lock(self, streams: Iterable[str], terms: Json) -> Iterator[None]:
        new = not self._root.exists()
        try:
            with claimed(self._root, streams, terms):
                yield
        finally:
            if new and self._root.exists() and not any(self._root.iterdir()):  # nothing has begun
                self._root.rmdir()

    def acquire(self, work: Path, streams: Iterable[str], terms: Json, rebuild: bool) -> None:
        """Nothing: the locks end with their holder, however that ends."""

    def check_claims(self, streams: Iterable[str] | None = None) -> None:
        """Nothing: the locks are held."""

    def release(self) -> None:
        """Nothing: the `with` of `lock` does it."""

    def read(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        (self._root / key).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._root / key, data)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> bytes:
        with alone(self._root):
            before = self.read(key)
            after = change(before)
            if after != before:
                self.write(key, after)
        return after

    def put(self, file: Path, key: str) -> None:
        place = self._root / key
        place.parent.mkdir(parents=True, exist_ok=True)
        move_file(file, place)

    def publish_shard(self, made: Path, key: str, entry: Json) -> bool:
        place = self._root / key
        if made.exists():
            self.put(made, key)
        return is_whole(entry, place.read_bytes() if place.exists() else b"")

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

    def remove_manifest(self, older: Manifest) -> None:
        with alone(self._root):
            if (found := self.read("manifest.json")) is None:
                return
            if parse_manifest(found) != older:
                raise just_changed(self.name)
            (self._root / "manifest.json").unlink()

    def clear(self, streams: Iterable[str]) -> None:
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
            if file.name not in kept and OURS.fullmatch(file.name):
                file.unlink()
        if not kept:
            _remove_folder(folder)

    def delete_shard(self, key: str) -> None:
        """Nothing: it lies in the work folder, and goes with it."""


def _foreign(folder: Path) -> Iterator[Path]:
    """What in a stream's folder no build makes."""
    if not folder.is_dir():
        yield folder
        return
    for split in folder.iterdir():
        if split.name not in SPLITS or not split.is_dir():
            yield split
        else:
            yield from (file for file in split.iterdir() if not (OURS.fullmatch(file.name) and file.is_file()))


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder; a link to one stays."""
    if folder.is_dir() and not folder.is_symlink():
        folder.rmdir()

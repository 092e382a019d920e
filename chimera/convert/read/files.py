"""Paths, globs and folders → the local files they stand for, in order, each once.

A million files are found in seconds: what is the same for all files of a folder is looked up once a folder.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import Any, NamedTuple

from chimera.cli import UserError
from chimera.convert.read.cannot_open import CannotOpen
from chimera.convert.read.reading import kind_of, packing_of
from chimera.convert.read.store_files import find_objects
from chimera.stores import is_remote
from chimera.text import counted

_SHOWN = 100_000  # entries of a folder that are looked at, to say which globs would match
_MARKS_OF_A_CLONE = (".gitattributes", ".cache/huggingface")  # of `git clone`, and of `hf download --local-dir`
_POINTER = b"version https://git-lfs.github.com/spec/"


class Found(NamedTuple):
    path: str
    bytes: int
    of_set: bool = False  # named by a set's card, so that its rows are those of `datasets`
    etag: str | None = None  # of an object in a store

    @property
    def remote(self) -> bool:
        return is_remote(self.path)


def find(patterns: Sequence[str], where: str, attempts: int, ours: Sequence[Path] = ()) -> Iterator[Found]:
    """The files of paths, globs, folders and URLs in the order given, a glob's sorted; not those in the folders `ours`.

    `attempts` is how often a request to a store is tried.

    Raises `CannotOpen` where there is none, and `UserError` for a name that is not UTF-8 or a folder that is no set.
    """
    known: set[str] = set()  # by their real path: one file may be reached in several ways
    for pattern in patterns:
        if is_remote(pattern):
            for url, entry in find_objects(pattern, attempts):
                if url not in known:
                    known.add(url)
                    yield Found(url, entry.size, etag=entry.etag)
            continue
        folder = _Folders(ours)
        count = 0
        for path, of_set in _paths(pattern, where):
            try:
                stat = os.lstat(path)
                link = S_ISLNK(stat.st_mode)
                stat = os.stat(path) if link else stat
            except FileNotFoundError:
                continue
            if not S_ISREG(stat.st_mode) or not (real := folder.real(path, link)):
                continue
            count += 1
            if real in known:
                continue
            known.add(real)
            if not path.isascii() and path != path.encode("utf-8", "replace").decode():
                raise UserError(f"{os.fsencode(path)!r}: the file's name is not UTF-8: rename it")
            if not os.access(path, os.R_OK):
                raise CannotOpen(f"no permission to read {path}")
            yield Found(path, stat.st_size, of_set)
        if not count:
            raise CannotOpen(f"no file at {pattern}")


class _Folders:
    """Real paths of files, of which those of their folders are looked up once."""

    def __init__(self, ours: Sequence[Path]) -> None:
        self._ours = [os.path.realpath(folder) for folder in ours]
        self._known: dict[str, str] = {}

    def real(self, path: str, link: bool) -> str:
        """The real path of a file; empty for one in the folders `ours`."""
        if link:
            path = os.path.realpath(path)
        folder, name = os.path.split(path)
        if folder not in self._known:
            real = os.path.realpath(folder)
            self._known[folder] = "" if any(Path(real).is_relative_to(one) for one in self._ours) else real
        real = self._known[folder]
        return real and os.path.join(real, name)


def _paths(pattern: str, where: str) -> Iterator[tuple[str, bool]]:
    """The paths of a pattern, and whether a set's card names them."""
    if os.path.isdir(pattern):
        yield from _of_folder(pattern, where)
    elif os.path.isfile(pattern):
        yield pattern, False
    else:
        for path in sorted(glob.glob(pattern, recursive=True)):
            yield path, False


def _of_folder(folder: str, where: str) -> Iterator[tuple[str, bool]]:
    """The files of a set that `datasets` has saved, or of a clone of one on the hub."""
    if splits := _json(folder, "dataset_dict.json").get("splits"):
        if "train" not in splits:
            raise UserError(f"{where}: {folder} has the splits {', '.join(splits)}: name one, as {folder}/{splits[0]}")
        folder = os.path.join(folder, "train")
    if files := _json(folder, "state.json").get("_data_files"):
        yield from ((os.path.join(folder, file["filename"]), False) for file in files)
    elif _is_clone(folder):
        from chimera.convert.read.hub import files_of_clone

        yield from ((file, True) for file in files_of_clone(where, folder))
    else:
        raise CannotOpen(f"no file at {folder}; it is a folder{_globs(folder)}")


def _json(folder: str, name: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            found = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_clone(folder: str) -> bool:
    """Whether a folder holds a set of the hub: with a card whose head is for machines, or as its tools leave it."""
    if any(os.path.exists(os.path.join(folder, mark)) for mark in _MARKS_OF_A_CLONE):
        return True
    try:
        with open(os.path.join(folder, "README.md"), "rb") as card:
            return card.read(4).rstrip() == b"---"
    except FileNotFoundError:
        return False


def _globs(folder: str) -> str:
    """Which globs would match in a folder, the most files first."""
    here: Counter[str] = Counter()  # files that `FOLDER/*SUFFIX` takes
    deep: Counter[str] = Counter()  # and that `FOLDER/**/*SUFFIX` does
    seen = 0
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # as globs pass them over
        for name in names:
            if (kind := kind_of(name)) and not name.startswith("."):
                suffix = name[-len(kind + packing_of(name)) :]  # as it is written: globs tell a from A
                here[suffix] += at == folder
                deep[suffix] += 1
        seen += len(names)
        if seen > _SHOWN:
            break
    if not deep:
        return " without any file of a kind that is read here"
    root = folder.rstrip("/")
    found = [
        (f"{root}/**/*{suffix}" if count > here[suffix] else f"{root}/*{suffix}", count)
        for suffix, count in sorted(deep.items(), key=lambda item: (-item[1], item[0]))[:4]
    ]
    matches = [f"`{pattern}` ({counted(count, 'file')})" for pattern, count in found]
    return f", in which {', '.join(matches)} would match"


def check_not_a_pointer(path: str, head: bytes) -> None:
    """Raise `UserError` for what git has in place of a large file that was not fetched."""
    if head.startswith(_POINTER):
        raise UserError(f"{path}: git has only a pointer here in place of the file: run `git lfs pull` in its folder")

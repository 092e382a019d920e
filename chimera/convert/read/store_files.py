"""Source files in object stores: found by globs, read by ranges, noticed when they change by size and tag."""

import functools
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import translate
from io import BufferedReader

from chimera.cli import UserError
from chimera.convert.read.cannot_open import CannotOpen
from chimera.convert.read.range_file import RangeFile
from chimera.objects import Objects, split
from chimera.objects_client import Entry
from chimera.stores import StoreError

_MAGIC = re.compile(r"[*\[]")
_BUFFER = 1 << 20  # bytes
_AT_ONCE = 16  # requests, where one an object is needed


@functools.lru_cache(maxsize=8)
def _objects(place: str, attempts: int) -> Objects:
    return Objects(place, attempts)


def find_objects(pattern: str, attempts: int) -> list[tuple[str, Entry]]:
    """The URL and entry of every object that a URL or glob stands for, sorted by URL.

    Raises `CannotOpen` where there is none, or the store cannot be used after `attempts` at a request.
    """
    place, path = split(pattern)
    magic = _MAGIC.search(path)
    folder = path[: magic.start()].rpartition("/")[0] if magic else path
    try:
        objects = _objects(place, attempts)
        if not magic:
            try:
                return [(pattern, objects.head(path))]
            except FileNotFoundError:
                below = any(entry.key.startswith(f"{path}/") for entry in objects.list(folder))
                said = f"; objects lie below it: give a glob, say {pattern.rstrip('/')}/*.parquet" if below else ""
                raise CannotOpen(f"no object at {pattern}{said}") from None
        matches = re.compile(_regex(path)).fullmatch
        found = [(f"{place}/{entry.key}", entry) for entry in objects.list(folder) if matches(entry.key)]
    except StoreError as error:
        raise CannotOpen(str(error)) from None
    if not found:
        raise CannotOpen(f"no object at {pattern}")
    return found


def _regex(pattern: str) -> str:
    """A glob as a regular expression: `*` within a name, `**/` for folders of any depth, as for local files."""
    out = ""
    for segment in pattern.split("/"):
        if segment == "**":
            out += r"(?:[^/.][^/]*/)*"
            continue
        within = translate(segment).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
        out += (r"(?!\.)" if segment[:1] in "*[" else "") + within + "/"
    return out.removesuffix("/")


@contextmanager
def open_object(url: str, size: int, etag: str | None, attempts: int) -> Iterator[BufferedReader]:
    """An object, as a seekable file. Raises `UserError` where it is gone, or no longer has its size and tag."""
    place, path = split(url)
    objects = _objects(place, attempts)
    try:
        now = objects.head(path)
    except FileNotFoundError:
        raise UserError(f"{url} is gone: bring it back, or set `rebuild=true`") from None
    if changed(now, size, etag):
        raise UserError(
            f"{url} changed since the build began ({size} bytes then, {now.size} now, or another tag): bring it back, "
            "or set `rebuild=true`"
        )
    with RangeFile(size, lambda begin, end: objects.get_range(path, begin, end)) as below:
        yield io.BufferedReader(below, _BUFFER)


def changed(now: Entry, size: int, etag: str | None) -> bool:
    """Whether an object is another than it was; a tag counts where the store gives one."""
    return now.size != size or (etag is not None and now.etag is not None and now.etag != etag)


def entries_now(urls: list[str]) -> dict[str, Entry | None]:
    """What there is at each URL; `None` where nothing is. Raises `StoreError`."""

    def head(url: str) -> Entry | None:
        place, path = split(url)
        try:
            return _objects(place, 4).head(path)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(urls, pool.map(head, urls), strict=True))

"""Objects below a URL: one interface for every place that is not a local folder.

`obstore` speaks to s3, gs, azure and https, `fsspec` to hf and oci, paramiko to sftp. What is written is read back and
compared; what fails is tried again (`stores.attempt`).
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chimera.cli import UserError
from chimera.files import open_whole
from chimera.objects_client import Client, Entry
from chimera.retries import ATTEMPTS
from chimera.stores import ADDRESSES, UNTIDY, NotOurs, Result, StoreError, attempt, is_remote, status_of

SECONDS = 60.0  # without an answer


class Objects:
    """The objects below `url`. Every method raises `StoreError` where the store cannot be used.

    `attempts` is how often a request is tried (of the first one `opening` times at most, if that is given), `seconds`
    how long one waits for an answer.
    """

    def __init__(
        self, url: str, attempts: int = ATTEMPTS, seconds: float = SECONDS, opening: int | None = None
    ) -> None:
        is_remote(url)  # or says what is wrong with the address
        self.url = url.rstrip("/")
        self._place, self._folder = split(self.url)
        self._attempts, self._seconds = attempts, seconds
        self._attempts_now = min(attempts, opening or attempts)  # until something has answered
        self._connected: Client | None = None

    def get(self, key: str) -> bytes:
        """The whole object; raises `FileNotFoundError` where there is none."""
        return self._try("read", key, lambda: b"".join(self._client.read(self._path(key))))

    def find(self, key: str) -> bytes | None:
        """The whole object, or `None` where there is none."""
        try:
            return self.get(key)
        except FileNotFoundError:
            return None

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of the object, fewer where it ends before; raises `FileNotFoundError`."""
        return self._try("read", key, lambda: b"".join(self._client.read(self._path(key), start, end)))

    def fetch(self, key: str, file: Path) -> None:
        """Make `file` hold the object, as a whole or not at all, by way of `file`.d; raises `FileNotFoundError`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.d")

        def act() -> None:
            with open_whole(file, sync="nothing", temporary=part) as out:
                for piece in self._client.read(self._path(key)):
                    out.write(piece)

        self._try("read", key, act)

    def head(self, key: str) -> Entry:
        """The object's size and tag; raises `FileNotFoundError` where there is none."""
        found = self._try("read", key, lambda: self._client.head(self._path(key)))
        return Entry(key, found.size, found.etag)

    def exists(self, key: str) -> bool:
        try:
            self.head(key)
        except FileNotFoundError:
            return False
        return True

    def list(self, folder: str = "") -> list[Entry]:
        """Every object below a folder, by key; nothing where there is no such folder."""
        found = self._try("listing", folder, lambda: [*self._client.list(self._path(folder))])
        skipped = len(self._folder) + 1 if self._folder else 0
        return sorted((Entry(e.key[skipped:], e.size, e.etag) for e in found), key=lambda entry: entry.key)

    def put(self, key: str, source: Path | bytes, check: Callable[[], None] = lambda: None) -> None:
        """Make the object hold what a file or `source` holds, and see that it does.

        `check` is called before each attempt, and raises where the object is not ours to write any more.
        """

        def act() -> None:
            _asked(check)
            self._client.write(self._path(key), source)
            try:
                kept = _same(self._client.read(self._path(key)), source)
            except Exception as error:
                if status_of(error) != 404:
                    raise
                raise OSError("the store does not hold what it was sent") from None
            if not kept:
                raise OSError("the store gave back other bytes than it was sent")

        self._try("upload", key, act)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Make an object of its own bytes (no other writer has the same) unless there is one; returns whether it did.

        That is one step where the store honors conditional creates. Where an attempt's answer was lost, what is there
        tells.
        """
        tried = 0

        def act() -> bool:
            nonlocal tried
            tried += 1
            return self._client.create(self._path(key), data)

        return self._try("upload", key, act) or (tried > 1 and self.find(key) == data)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> bytes:
        """Make an object what `change` makes of it (`None`: there is none), whoever else does so; returns what it is.

        `change` may be asked several times, and gives back what has its change already. No change of another writer is
        lost where the store honors conditional writes.
        """

        def act() -> bytes:
            path, made = self._path(key), False
            while not made:
                found = self._entry(path)
                before = None if found is None else b"".join(self._client.read(path))
                after = _asked(partial(change, before))
                if after == before:
                    return after
                if found is None:
                    made = self._client.create(path, after)
                else:
                    made = self._client.swap(path, after, found.etag)
            if b"".join(self._client.read(path)) != after:  # the next attempt sees whether it is another's change
                raise OSError("the store gave back other bytes than it was sent")
            return after

        return self._try("upload", key, act)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._try("removal", key, lambda: self._client.delete(self._path(key)))

    def _entry(self, path: str) -> Entry | None:
        """What is said of an object, or `None` where there is none."""
        try:
            return self._client.head(path)
        except Exception as error:
            if status_of(error) != 404:
                raise
            return None

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key}".strip("/")

    @property
    def _client(self) -> Client:
        """Made when first needed: it looks for credentials, and SFTP's connects."""
        if self._connected is None:
            self._connected = _connect(self._place, self._seconds)
        return self._connected

    def _try(self, what: str, key: str, act: Any) -> Any:
        url = f"{self.url}/{key}".rstrip("/")
        try:
            result = attempt(f"{what} of {url}", act, self._attempts_now, self._forget)
        except FileNotFoundError as error:
            self._attempts_now = self._attempts
            if what in ("upload", "listing"):  # the bucket is not there
                raise StoreError(str(error)) from None
            raise
        self._attempts_now = self._attempts
        return result

    def _forget(self) -> None:
        """Connect again: a broken SFTP session stays broken."""
        self._connected = None


def _asked(of: Callable[[], Result]) -> Result:
    """What a caller's function gives; its refusal is not taken for one of the store's."""
    try:
        return of()
    except UserError as error:
        raise NotOurs(str(error)) from None


def split(url: str) -> tuple[str, str]:
    """The place a URL names (scheme and bucket, host or set), and the path below it."""
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    own = {"hf": 3, "azure": 1 + ("." in parts[0]), "azure-dl": 1 + ("." in parts[0])}.get(scheme, 1)
    return f"{scheme}://{'/'.join(parts[:own])}", "/".join(parts[own:]).strip("/")


def _connect(place: str, seconds: float) -> Client:
    scheme = place.partition("://")[0]
    if UNTIDY.search(place):
        raise UserError(f"{place} holds an empty name, `.` or `..`: give the address without")
    if scheme in ("s3", "gs", "azure", "azure-dl", "https", "http"):
        from chimera.objects_obstore import ObstoreClient

        return ObstoreClient(place, seconds)
    if scheme in ("hf", "sftp", "oci"):
        from chimera.objects_fsspec import connect

        return connect(place, seconds)
    raise UserError(f"{place} is not an address that can be read: take a folder, {ADDRESSES}, or https://")


def _same(pieces: Iterator[bytes], source: Path | bytes) -> bool:
    """Whether the pieces are what a file or `source` holds."""
    if isinstance(source, bytes):
        return b"".join(pieces) == source
    with source.open("rb") as file:
        return all(file.read(len(piece)) == piece for piece in pieces) and not file.read(1)

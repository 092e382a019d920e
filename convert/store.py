"""An object store as the output: files go up through streaming's own uploaders and are read back and compared.

Streaming can write to a dozen stores but neither ask one whether an object is there nor delete one, so existence is
found by downloading, and deletion is offered where the client is boto3's (S3 and what speaks it) or our own.
"""

import filecmp
import functools
import os
import platform
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from chimera.cli import UserError, counted, one_line
from chimera.stores import download, downloader, status_of, uploader, wait_to_retry
from convert.journal import SENT

DOWNLOAD_SECONDS = 300.0  # to read one object back
WAITING_SHARDS = 2  # files of a part that may wait for their upload

Result = TypeVar("Result")


@functools.lru_cache(maxsize=1)
def worker_store(root: str, work: Path, retries: int) -> "Store":
    """The store of this worker process; connecting takes seconds, so its parts share it."""
    return Store(root, work / "sending" / f"{platform.node()}-{os.getpid()}", retries)


class Refused(Exception):
    """The store said no in a way that trying again will not change."""


class Store:
    """Objects below `root` (a URL), through `scratch`, a local folder of this process alone."""

    def __init__(self, root: str, scratch: Path, retries: int) -> None:
        self._root, self._scratch, self._retries = root.rstrip("/"), scratch, retries
        self._uploader: Any = None
        self._downloader: Any = None

    def put(self, file: Path, key: str) -> None:
        """Make the object `key` hold what `file` holds, and see that it does.

        Raises `UserError` when the store stays out of reach or keeps giving back other bytes.
        """
        self._attempt(f"upload of {self._root}/{key}", lambda: self._put(file, key))

    def get(self, key: str) -> bytes | None:
        """The object's bytes, or `None` where there is none."""
        return self._attempt(f"read of {self._root}/{key}", lambda: self._get(key))

    @property
    def can_delete(self) -> bool:
        return self._attempt(f"connection to {self._root}", lambda: _deletes(self._connected()))

    def delete(self, key: str) -> None:
        """Remove an object, if it is there. Only where the store `can_delete`."""
        self._attempt(f"removal of {self._root}/{key}", lambda: self._delete(key))

    def _delete(self, key: str) -> None:
        client = self._connected()
        if hasattr(client, "s3"):
            place = urlsplit(f"{self._root}/{key}")
            client.s3.delete_object(Bucket=place.netloc, Key=place.path.lstrip("/"))
        else:
            client.delete_file(key)

    def _put(self, file: Path, key: str) -> None:
        client = self._connected()
        staged = Path(client.local) / key
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        try:
            os.link(file, staged)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, staged)
        back = self._scratch / "back"
        try:
            client.upload_file(key)
            self._download(key, back)
            if not filecmp.cmp(file, back, shallow=False):
                raise OSError("the store gave back other bytes than it was sent")
        finally:
            staged.unlink(missing_ok=True)
            back.unlink(missing_ok=True)

    def _get(self, key: str) -> bytes | None:
        place = self._scratch / "get"
        try:
            self._download(key, place)
            return place.read_bytes()
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise
        finally:
            place.unlink(missing_ok=True)

    def _download(self, key: str, place: Path) -> None:
        client = self._downloader
        if client is None:
            try:
                client = self._downloader = downloader(self._root)
            except ValueError as error:
                raise Refused(one_line(error)) from None
        download(client, f"{self._root}/{key}", place, DOWNLOAD_SECONDS)

    def _connected(self) -> Any:
        """The uploader; made when first needed, since its import takes seconds."""
        client = self._uploader
        if client is None:
            try:
                client = self._uploader = uploader(self._root, self._scratch / "staging")
            except (KeyError, ValueError) as error:
                raise Refused(one_line(error)) from None
        return client

    def _attempt(self, what: str, act: Callable[[], Result]) -> Result:
        for attempt in range(1, self._retries + 1):
            try:
                return act()
            except Exception as error:
                said, status = one_line(error)[:300] or type(error).__name__, status_of(error)
                if status in (401, 403):  # of which streaming says that the object is not there
                    said = f"the store refuses these credentials (HTTP {status}; {said})"
                final = isinstance(error, (Refused, ImportError)) or status in (401, 403, 404)
                if final or attempt == self._retries or type(error).__name__ == "NoCredentialsError":
                    raise UserError(
                        f"{what} failed after {counted(attempt, 'attempt')}: {said}: mend it and run "
                        "the same command again; it goes on where it stopped"
                    ) from None
                wait_to_retry(what, said, error, attempt, self._retries)
                self._uploader = self._downloader = None  # SFTP's do not connect again by themselves
        raise AssertionError("unreachable")


def _deletes(client: Any) -> bool:
    return hasattr(client, "s3") or hasattr(client, "delete_file")


class Sender:
    """Uploads the shards of one part in the background, in order, and removes each local file once it is up.

    An empty file `NAME.sent` then stands for the shard, so a rerun knows.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: queue.Queue[tuple[Path, str] | None] = queue.Queue(WAITING_SHARDS)
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, file: Path, key: str) -> None:
        """Queue a file; blocks while `WAITING_SHARDS` are queued, so that local disk use stays bounded."""
        self._queue.put((file, key))
        self._raise()

    def finish(self) -> None:
        """Wait for every upload. Raises what an upload raised."""
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def close(self) -> None:
        """End the thread, once the upload it is at has ended; those that wait are left to a rerun."""
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None or self._closed:
                continue  # keep taking, so that nobody waits for room
            file, key = item
            try:
                self._store.put(file, key)
                file.with_name(file.name + SENT).touch()
                file.unlink()
            except BaseException as error:
                self._error = error

"""An object store as the output: the store of a worker process, a stream's claim, and a part's uploads."""

import functools
import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from chimera.cli import UserError
from chimera.convert.build.part_state import EVAL, SENT
from chimera.convert.settings import CLAIMS
from chimera.mds import Json
from chimera.objects import Objects

BUILDER = "builder"  # in the work folder: the name under which it claims streams
SECONDS = 300.0  # without an answer
WAITING_SHARDS = 2  # files of a part that may wait for their upload


@functools.lru_cache(maxsize=1)
def worker_store(root: str, retries: int) -> Objects:
    """The store of this worker process, whose parts share its connections."""
    return Objects(root, retries, SECONDS)


def value_of(claim: bytes | None) -> Json:
    """What a claim says; nothing where there is none, or it is no claim."""
    try:
        value = json.loads(claim or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def builder_of(claim: bytes | None) -> str | None:
    """The name of the builder that made a claim."""
    return value_of(claim).get("builder")


def builder_at(work: Path) -> str | None:
    """The name of a work folder's build, once it has asked for a claim."""
    file = work / BUILDER
    return file.read_text(errors="replace") if file.exists() else None


def check_claim(store: Objects, work: Path, stream: str) -> None:
    """Raise `UserError` where another builder than that of `work` has the claim on a stream, or none."""
    mine, key = builder_at(work), f"{CLAIMS}/{stream.removesuffix(EVAL)}"
    if mine is None or builder_of(store.find(key) or store.find(key)) != mine:  # one stale answer ends no build
        raise taken(f"{stream.removesuffix(EVAL)} of {store.url}")


def taken(what: str) -> UserError:
    """What to say where another builder has claimed what was ours, or was about to be."""
    return UserError(f"another builder began to write {what}, at the same time or since: wait for it")


class Uploader:
    """Uploads the shards of one part in the background, in order, and removes each local file once it is up.

    An empty file `NAME.sent` then stands for the shard, so a rerun knows. `check` raises where they are not to go up.
    """

    def __init__(self, store: Objects, check: Callable[[], None]) -> None:
        self._store, self._check = store, check
        self._queue: queue.Queue[tuple[Path, str] | None] = queue.Queue(WAITING_SHARDS)
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def upload(self, file: Path, key: str) -> None:
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
                self._store.put(key, file, self._check)
                file.with_name(file.name + SENT).touch()
                file.unlink()
            except BaseException as error:
                self._error = error

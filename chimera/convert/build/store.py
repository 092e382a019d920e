"""An object store as the output: the store of a worker process, and a part's uploads behind its back."""

import functools
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from chimera.convert.build.part_state import SENT
from chimera.objects import Objects

SECONDS = 300.0  # without an answer
WAITING_SHARDS = 2  # files of a part that may wait for their upload


@functools.lru_cache(maxsize=1)
def worker_store(root: str, retries: int) -> Objects:
    """The store of this worker process, whose parts share its connections."""
    return Objects(root, retries, SECONDS)


class Uploader:
    """Uploads the shards of one part in the background, in order, by `put`; removes each local file once it is up.

    An empty file `NAME.sent` then stands for the shard, so a rerun knows.
    """

    def __init__(self, put: Callable[[str, Path], None]) -> None:
        self._put = put
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
                self._put(key, file)
                file.with_name(file.name + SENT).touch()
                file.unlink()
            except BaseException as error:
                self._error = error

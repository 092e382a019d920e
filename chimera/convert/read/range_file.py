"""A file of a hub set, or in a store, whose next piece is fetched while the one before is worked on.

A hub answers in tenths of a second, too long to wait at each of a file's thousands of row groups. So one thread a file
asks for what comes next: for parquet exactly the columns' bytes, which its footer tells, else the whole file.
"""

import io
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

PIECE = 4 << 20  # bytes fetched at a time; of each range two at most are in memory
Range = tuple[int, int]  # bytes [begin, end) of the file


class RangeFile(io.RawIOBase):
    """A file of `size` bytes, seekable; what is not read of it is not fetched.

    `read(begin, end)` gives some of its bytes, in a thread of this file's; reading raises what that does.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._wanted: SimpleQueue[tuple[Range, Future[bytes]] | None] = SimpleQueue()
        self._read, self._at, self._size = read, 0, size
        self.expect([(0, self._size)], 1)
        # a daemon with one connection: a request under way must not hold up the end of the process
        threading.Thread(target=self._work, daemon=True).start()

    def expect(self, ranges: Sequence[Range], columns: int) -> None:
        """From now on these are read, each from its beginning, `columns` of them side by side."""
        self._ranges, self._columns = sorted((begin, min(end, self._size)) for begin, end in ranges), columns
        self._held: dict[int, tuple[int, bytes]] = {}  # of a range the piece at hand: where it begins, what it says
        self._ahead: dict[int, tuple[int, Future[bytes]]] = {}  # and the one after it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        begin, data = self._piece(len(buffer))
        found = memoryview(data)[self._at - begin :][: len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._wanted.put(None)
        super().close()

    def _piece(self, size: int) -> tuple[int, bytes]:
        """A piece that holds the present place, and where it begins; outside of the ranges `size` bytes."""
        at = self._at
        index = bisect_right(self._ranges, at, key=lambda known: known[0]) - 1
        end = self._ranges[index][1] if index >= 0 else 0
        if at >= end:
            return at, self._fetch(at, min(at + size, self._size)).result() if at < self._size else b""
        begin, data = self._held.get(index, (at, b""))
        if not begin <= at < begin + len(data):
            begin, coming = self._ahead.pop(index, (at, None))
            if coming is None or begin != at:
                begin, coming = at, self._fetch(at, min(at + PIECE, end))
            data = coming.result()
            self._held = {known: held for known, held in self._held.items() if known > index - self._columns}
            self._held[index] = begin, data
            self._look_ahead(index, begin + len(data))
        return begin, data

    def _look_ahead(self, index: int, begin: int) -> None:
        """Begin to fetch what follows in a range, or at its end the range its column has next."""
        if begin == self._ranges[index][1]:
            index += self._columns
            if index >= len(self._ranges):
                return
            begin = self._ranges[index][0]
        self._ahead[index] = begin, self._fetch(begin, min(begin + PIECE, self._ranges[index][1]))

    def _fetch(self, begin: int, end: int) -> "Future[bytes]":
        future: Future[bytes] = Future()
        self._wanted.put(((begin, end), future))
        return future

    def _work(self) -> None:
        """The thread: fetch what is wanted, in order."""
        while (wanted := self._wanted.get()) is not None and not self.closed:
            (begin, end), future = wanted
            try:
                data = self._read(begin, end)
                if len(data) != end - begin:  # which would pass for the end of the file
                    raise ConnectionError(f"{len(data)} bytes came, {end - begin} were asked for")
                future.set_result(data)
            except BaseException as error:  # raised where the piece is needed
                future.set_exception(error)

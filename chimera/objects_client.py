"""What speaks to one store, whatever the library behind it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PIECE = 4 << 20  # bytes compared or written to disk at a time


@dataclass(frozen=True)
class Entry:
    """An object: its key below the URL it was asked for at, its bytes, and a tag that changes with them, if known."""

    key: str
    size: int
    etag: str | None = None


class Client(Protocol):
    """What speaks to one place; paths begin below it. Raises what the library behind it does."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The object's bytes [start, end) in pieces."""
        ...

    def head(self, path: str) -> Entry: ...

    def list(self, folder: str) -> Iterator[Entry]:
        """Every object below a folder, however deep."""
        ...

    def write(self, path: str, source: Path | bytes) -> None:
        """Make the object, or replace it as a whole."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Make the object unless there is one, in one step where the store can; returns whether it did."""
        ...

    def swap(self, path: str, data: bytes, etag: str | None) -> bool:
        """Replace the object that has this tag, in one step where the store can; returns whether it did."""
        ...

    def delete(self, path: str) -> None:
        """Remove the object, if it is there."""
        ...


class Unconditional:
    """What a client does that has no conditional writes."""

    def swap(self: Client, path: str, data: bytes, etag: str | None) -> bool:
        """One step, which does not look at the tag."""
        del etag
        self.write(path, data)
        return True

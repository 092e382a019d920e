"""How much memory a build worker may take, and the one line that ends what would take more.

A worker takes about 0.4 GB, and about twice the largest thing that reading its source makes a library hold: a parquet
page, a compressed Arrow batch, a line (`bench/memory.py` measures it). Nothing but a page itself tells how large it is,
so the system counts: while a library reads, an allocation that would go above the bound fails (`RLIMIT_DATA`; Linux
alone holds to it).
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chimera.cli import UserError

BASE = 300 << 20  # bytes of a worker that holds no long row
SMALL = 1 << 20  # bytes
LEAST = 512 << 20  # bytes: with less, a row of 100 MB might not be read
_PAGE = resource.getpagesize()
_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # versions 2 and 1


class TooLarge(UserError):
    """What would take more memory than a worker may."""


@dataclass(frozen=True)
class Limits:
    """What reading rows may take.

    `memory` is in bytes, `retries` counts attempts in a row at a hub, and `scratch` is the folder for what must lie on
    disk meanwhile (`None`: the system's).
    """

    memory: int
    retries: int = 1
    scratch: Path | None = None

    @contextlib.contextmanager
    def held(self, what: str, remedy: str) -> Iterator[None]:
        """While a library reads. Raises `TooLarge`, naming what it reads, where that would take too much memory."""
        if sys.platform != "linux":
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resident, shared, data = _pages()
        most = data + max(0, self.memory - (resident - shared))
        resource.setrlimit(resource.RLIMIT_DATA, (min([most, *(x for x in (soft, hard) if x >= 0)]), hard))
        try:
            yield
        except MemoryError:
            pass
        else:
            return
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        raise self._refusal(what, remedy)

    def check(self, what: str, size: int, remedy: str) -> None:
        """Raise `TooLarge` where a large thing (`what`), of `size` bytes, would take more than `memory`."""
        if size > SMALL and BASE + 2 * size > self.memory:
            raise self._refusal(what, remedy)

    def _refusal(self, what: str, remedy: str) -> TooLarge:
        return TooLarge(
            f"{what} takes more memory than the {self.memory >> 20} MiB that a worker may (`worker_memory`): raise "
            f"that, run fewer `workers`, or {remedy}"
        )


def available_memory() -> int:
    """Bytes of memory that are free for use now, on this machine or in its container (all there are, but on Linux)."""
    if sys.platform != "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with open("/proc/meminfo") as lines:
        found = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    for group in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # of the other version, or `max`
            found = min(found, int(Path(group).read_text()))
    return found


def _pages() -> tuple[int, int, int]:
    """Bytes of this process: all in memory, those of them that files and others share, and what its limit counts."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, _, _, data, _ = (int(pages) * _PAGE for pages in file.read().split())
    return resident, shared, data

"""Faults of an S3 server that a build may meet, put in by the proxy before a real one."""

import random
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from chimera.cli import UserError
from tests.convert import builds

# What may go wrong with a request, and what the client sees of it.
KINDS = (
    "busy",  # 503
    "expired",  # 400 ExpiredToken: temporary credentials that somebody renews
    "reset",  # the connection, before the server has heard of the request
    "lost",  # the answer, when the server has done what was asked
    "cut",  # the answer's body, midway
    "slow",  # the answer's body comes in drops
    "stale",  # 404 for what is there
    "dropped",  # an upload: answered as done, and nothing is kept
    "torn",  # an upload: answered as done, and half of it is kept
)
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


class Faults:
    """Disturbs about one request in `every`, as `rng` has it; `seen` counts by kind, of which the rarest comes next."""

    def __init__(self, rng: random.Random, every: int, kinds: Sequence[str] = KINDS):
        self._rng, self._every, self._kinds = rng, every, kinds
        self.seen = dict.fromkeys(kinds, 0)

    def draw(self, request: Any) -> str | None:
        """The fault of this request, if it has one."""
        upload = request.command == "PUT" and "?" not in request.path and request.headers.get("If-None-Match") is None
        read = request.command == "GET" and "?" not in request.path
        fits = [k for k in self._kinds if (k not in ("dropped", "torn") or upload) and (k != "stale" or read)]
        if not fits or self._rng.randrange(self._every):
            return None
        kind = min(self._rng.sample(fits, len(fits)), key=self.seen.__getitem__)
        self.seen[kind] += 1
        return kind


def drip(out: Any, body: bytes) -> None:
    """Write a body in ten pieces, with pauses."""
    step = max(1, -(-len(body) // 10))
    for start in range(0, len(body), step):
        out.write(body[start : start + step])
        out.flush()
        time.sleep(0.01)


def reset(connection: socket.socket) -> None:
    """End a connection as a crashed peer does: what it sent and was not read is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def build_among(faults: Faults, server: Any, settings: dict[str, Any]) -> list[str]:
    """Build among faults, again after each stop with a line; those lines. After forty of them the faults end."""
    stops: list[str] = []
    while True:
        server.faults = faults if len(stops) < 40 else None
        try:
            builds.build_here(settings)
            return stops
        except UserError as error:
            stops.append(str(error))
            assert "\n" not in stops[-1]
        finally:
            server.faults = None

"""A store as a part writes to it: only while the build has its stream.

A builder may be stopped (SIGSTOP, a suspended machine) while another takes its streams over and publishes them. Once it
goes on, its uploads would take the places of what is published, so each is preceded by a look at the claim.
"""

from pathlib import Path

from chimera.cli import UserError
from chimera.convert.build.part_state import EVAL
from chimera.convert.build.store_output import BUILDER, builder_of
from chimera.convert.settings import CLAIMS
from chimera.objects import Objects


class ClaimedStore:
    def __init__(self, store: Objects, work: Path, stream: str) -> None:
        self._store, self._builder, self._stream = store, work / BUILDER, stream.removesuffix(EVAL)

    def put(self, key: str, file: Path) -> None:
        """Upload a shard. Raises `UserError` where another builder has taken the stream since."""
        if not self._store.put(key, file, self._is_ours):
            raise UserError(
                f"another builder began to write {self._stream} of {self._store.url}, at the same time or since: wait "
                "for it"
            )

    def _is_ours(self) -> bool:
        key = f"{CLAIMS}/{self._stream}"
        found = self._store.find(key) or self._store.find(key)  # one stale answer ends no build
        return builder_of(found) == self._builder.read_text(errors="replace")

"""An object store as the output of a build, to which the workers have sent the shards already."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from chimera.cli import UserError, say
from chimera.convert.build.claims import check_terms
from chimera.convert.build.folder_output import OURS
from chimera.convert.build.part_lock import left_alone
from chimera.convert.build.part_state import SENT
from chimera.convert.build.plan import PARTS
from chimera.convert.build.store import BUILDER, SECONDS, builder_at, builder_of, check_claim, taken, value_of
from chimera.convert.settings import CLAIMS, LEASE
from chimera.files import write_whole
from chimera.manifest import Manifest
from chimera.mds import SPLITS, Json
from chimera.objects import Objects
from chimera.retries import OPENING


class StoreOutput:
    """An object store. See `outputs.Output`.

    Stores have no locks: the object `.claims/STREAM`, which only one builder can create, says which work folder's
    build has begun the stream. (Earlier versions had one object for all, `builder.json`.)
    """

    def __init__(self, name: str, work: Path, retries: int) -> None:
        self.name = name
        self._work = work
        self._store = Objects(name, retries, SECONDS, OPENING)
        self._claims: list[str] = []
        self._new: list[str] = []  # of them, those that the last `acquire` made

    def lock(self, streams: Iterable[str], terms: Json) -> contextlib.AbstractContextManager[None]:
        del streams, terms  # `acquire` takes them
        return contextlib.nullcontext()

    def acquire(self, work: Path, streams: Iterable[str], terms: Json, rebuild: bool) -> None:
        begun = self._builder() is not None
        if not begun:
            write_whole(work / BUILDER, secrets.token_hex(8).encode())
        claim = json.dumps({"builder": self._builder(), "host": os.uname().nodename, "terms": terms}).encode()
        held = self._has_lease(rebuild)
        self._new = []
        try:
            for name in sorted(streams):
                self._claim(f"{CLAIMS}/{name}", claim, begun and not held, rebuild)
            self.check_claims()
            self._check_others(terms, rebuild, {*streams})
        except UserError:
            self._give_up(self._new if begun else self._claims)
            raise

    def _claim(self, key: str, claim: bytes, begun: bool, rebuild: bool) -> None:
        found = self._store.find(key)
        if found is None:
            if begun:  # another builder has had the claim since, and is done: what was sent may be gone, or its
                _forget_parts(self._work)
            if not self._store.put_if_absent(key, claim):
                raise taken(self._named(key))
            self._new.append(key)
            if not self._claims and self._store.put_if_absent(key, claim):  # twice?
                say(f"{self.name}: no conditional creates here: a builder that begins in the same second may go unseen")
        elif builder_of(found) != self._builder():
            self._check_rebuild(key, rebuild)
            _forget_parts(self._work)  # first: its objects may lie in the places of those that were sent
            self._store.put(key, claim)
        elif found != claim:
            self._store.put(key, claim)
        self._claims.append(key)

    def check_claims(self, streams: Iterable[str] | None = None) -> None:
        for key in self._claims if streams is None else [f"{CLAIMS}/{name}" for name in streams]:
            check_claim(self._store, self._work, key.removeprefix(f"{CLAIMS}/"))

    def release(self) -> None:
        self._give_up([*(self._claims or [entry.key for entry in self._store.list(CLAIMS)]), LEASE])

    def _give_up(self, keys: list[str]) -> None:
        for key in keys:
            found = self._store.find(key) or self._store.find(key)  # a stale answer would leave the claim for good
            if found and builder_of(found) == self._builder():  # another builder may have taken over
                self._store.delete(key)
        self._claims = []

    def _has_lease(self, rebuild: bool) -> bool:
        """Whether an earlier version claimed all streams for this build. What it claimed for another goes."""
        found = self._store.find(LEASE)
        if found is not None and builder_of(found) != self._builder():
            self._check_rebuild(LEASE, rebuild)
            _forget_parts(self._work)
            self._store.delete(LEASE)
            return False
        return found is not None

    def _check_others(self, terms: Json, rebuild: bool, streams: set[str]) -> None:
        """Raise `UserError` where others build other streams on other terms; `rebuild` takes their claims away."""
        for entry in self._store.list(CLAIMS):
            name = entry.key.removeprefix(f"{CLAIMS}/")
            found = None if name in streams else self._store.find(entry.key)
            if found is None or builder_of(found) == self._builder():
                continue
            try:
                check_terms(self.name, name, value_of(found).get("terms"), terms)
            except UserError:
                if not rebuild:
                    raise
                self._store.delete(entry.key)

    def _check_rebuild(self, key: str, rebuild: bool) -> None:
        if not rebuild:
            raise UserError(
                f"another builder is writing {self._named(key)}, or was stopped: wait for it or run its command again, "
                "or take over with `rebuild=true`"
            )

    def _named(self, key: str) -> str:
        stream = key.removeprefix(f"{CLAIMS}/")
        return self.name if key == LEASE else f"{stream} of {self.name}"

    def _builder(self) -> str | None:
        return builder_at(self._work)

    def read(self, key: str) -> bytes | None:
        return self._store.find(key)

    def write(self, key: str, data: bytes) -> None:
        self._store.put(key, data)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> bytes:
        return self._store.update(key, change)

    def put(self, file: Path, key: str) -> None:
        self._store.put(key, file)

    def publish_shard(self, made: Path, key: str, entry: Json) -> bool:
        return made.with_name(made.name + SENT).exists()

    def check_free(self, streams: Iterable[str], rebuild: bool, finished: bool = False) -> None:
        """A finished build is removed by hand alone; `rebuild` lets what one left unfinished go."""
        if not finished and self._store.exists("manifest.json"):
            raise self._by_hand()
        for key in self._indexes(streams):
            if not rebuild and self._store.exists(key):
                raise UserError(
                    f"{self.name}/{key} is not of this build: choose another `output`, remove the objects below this "
                    "one, or set `rebuild=true`"
                )

    def remove_manifest(self, older: Manifest) -> None:
        del older
        raise self._by_hand()

    def _by_hand(self) -> UserError:
        return UserError(f"remove the objects below {self.name} before it is built anew")

    def clear(self, streams: Iterable[str]) -> None:
        streams = [*streams]
        for key in self._indexes(streams):
            self._store.delete(key)
        for name in streams:
            for split in SPLITS:
                self.remove_stale(f"{name}/{split}", [])
            for beside in ("rejects", "proof"):
                self._store.delete(f"{beside}/{name}.jsonl.zst")

    def remove_stale(self, split: str, known: Iterable[str]) -> None:
        kept = {*known}
        if kept:
            kept.add("index.json")
        for entry in self._store.list(split):
            name = entry.key.removeprefix(f"{split}/")
            if name not in kept and OURS.fullmatch(name):
                self._store.delete(entry.key)

    def _indexes(self, streams: Iterable[str]) -> list[str]:
        return [f"{name}/{split}/index.json" for name in streams for split in SPLITS]

    def delete_shard(self, key: str) -> None:
        self._store.delete(key)


def _forget_parts(work: Path) -> None:
    """Have all parts made anew, once workers that outlived their build have let them go."""
    for folder in [path for path in work.glob(f"{PARTS}*/*/*") if path.is_dir()]:
        with left_alone(folder):
            shutil.rmtree(folder)
